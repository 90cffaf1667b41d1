"""The checks of notebooks 06 and 06b accept the solution, and tell a typical wrong answer what is wrong with it."""

from collections import Counter
from pathlib import Path

import exercises
import numpy as np
import pandas
import pytest

from irpo_utils import evaluation, methods

pytest.importorskip("jupytext")

import checks_06 as checks  # noqa: E402
import helpers_06  # noqa: E402

from studies import baselines, significance  # noqa: E402
from studies import lesson_statistics as lesson  # noqa: E402

ROOT = Path(__file__).parent.parent


COURSE, OPTIONAL = "06_baselines_and_ablations", "06b_judges_luck_ablations"
EXERCISES = {  # check: notebook, the name that the cell defines, how the definition begins
    "choose_learning_rate": (COURSE, "choose_learning_rate", "def choose_learning_rate("),
    "paired": (COURSE, "paired", "def paired("),
    "verdict": (COURSE, "verdict", "def verdict("),
    "majority_vote": (OPTIONAL, "majority_vote", "def majority_vote("),
    "clear_majority_method": (OPTIONAL, "CLEAR", "CLEAR = None\n"),
}


def solution(notebook: str, name: str, begins: str, solved: bool = True):
    """What the exercise's cell of the notebook's source defines under that name, solved or as a stub."""
    interval = significance.seed_and_question_interval
    scope = dict(np=np, Counter=Counter, methods=methods, seed_and_question_interval=interval)
    return exercises.defined(notebook, name, solved, begins, **scope)


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_stubs_are_unsolved(name):
    check = getattr(checks, name)
    assert check(solution(*EXERCISES[name])).startswith("Right")
    assert check(solution(*EXERCISES[name], solved=False)).startswith("Not solved yet")
    for nothing in (None, ...):
        assert check(nothing).startswith("Not solved yet")


def entry(reward, **settings):
    return methods.Method("A title", "a source", reward=reward, **settings)


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("choose_learning_rate", lambda f: f),
        ("paired", lambda f: f),
        ("verdict", lambda f: f),
        ("majority_vote", lambda f: f),
        ("clear_majority_method", entry),
    ],
)
def test_checks_never_raise(name, wrap):
    def broken(*arguments):
        raise KeyError("correct")

    check = getattr(checks, name)
    assert "KeyError: 'correct'" in check(wrap(broken))
    assert check(wrap(lambda *a: ...)).startswith("Not solved yet")
    assert "is a `return` missing?" in check(wrap(lambda *a: None))
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: {"x": None},
        lambda *a: float("nan"),
        lambda *a: (1, 2, 3),
        lambda *a: ("x", "y"),
        lambda *a: -1,
        lambda *a: [True],
        lambda *a: (0.0, 0.0, 0.0, "equal"),
        lambda *a: (0.0, 0.0, float("inf"), "better"),
        lambda *a: [None] * 4,
        lambda *a: ["w"] * 4,
        lambda *a: [2] * 4,
    ):
        assert not check(wrap(odd)).startswith("Right")
        assert not check(odd).startswith("Right")


def chosen_rate(accuracy, larger=False, tried=None):
    finished = {rate: value for rate, value in accuracy.items() if value is not None}
    best = max(finished, key=lambda rate: (finished[rate], rate if larger else -rate))
    rates = tried(accuracy, finished) if tried else accuracy
    return best, best in (min(rates), max(rates))


@pytest.mark.parametrize(
    "right",
    [
        chosen_rate,
        lambda x: list(chosen_rate(x)),
        lambda x: np.array(chosen_rate(x)),
        lambda x: (np.float64(chosen_rate(x)[0]), np.bool_(chosen_rate(x)[1])),
    ],
)
def test_any_way_to_return_the_learning_rate_is_right(right):
    assert checks.choose_learning_rate(right).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: chosen_rate(x, larger=True), "take the smaller learning rate"),
        (lambda x: chosen_rate(x, tried=lambda given, finished: finished), "that broke down"),
        (lambda x: (x[chosen_rate(x)[0]], chosen_rate(x)[1]), "You return the accuracy"),
        (
            lambda x: (chosen_rate(x)[0], chosen_rate(x)[0] == max(x)),
            "yours names the largest only",
        ),
        (lambda x: (chosen_rate(x)[0], chosen_rate(x)[0] == min(x)), "names the smallest only"),
        (lambda x: (chosen_rate(x)[0], not chosen_rate(x)[1]), "is reversed"),
        (
            lambda x: (chosen_rate(x)[0], chosen_rate(x)[0] in (list(x)[0], list(x)[-1])),
            "first or last of the dict",
        ),
        (lambda x: chosen_rate(x)[0], "Return two things"),
        (lambda x: (min(x), True), "it should be"),
        (lambda x: (max(x, key=x.get), True), "TypeError"),
    ],
)
def test_a_learning_rate_names_the_mistake(wrong, words):
    assert words in checks.choose_learning_rate(wrong)


def test_the_check_of_verdicts_takes_the_verdicts_of_the_claims():
    """The cases lead to all four verdicts, and the rule is that of figures/lesson_claims.csv."""
    assert {lesson.verdict(*case) for case in checks.INTERVALS.values()} == set(lesson.VERDICTS)
    assert checks.verdict(lesson.verdict).startswith("Right")
    solved = solution(*EXERCISES["verdict"])
    claims = pandas.read_csv(ROOT / "figures" / "lesson_claims.csv")
    judged = claims[claims.verdict.notna()]
    assert judged.paper.notna().all() and np.isfinite(judged.paper).sum() > 10
    for row in judged.itertuples():
        assert lesson.verdict(row.low, row.high, row.paper) == row.verdict, row.claim
        if np.isfinite(row.paper):
            assert solved(row.low, row.high, row.paper) == row.verdict, row.claim


def test_a_claim_without_a_number_of_the_paper_has_an_empty_cell_and_no_diamond():
    rows = helpers_06.claims()
    rows = rows[rows.claim.str.startswith("the NLL term helps")]
    assert list(helpers_06.claims_table(rows).paper) == ["+11.3", "", "", ""]
    figure = helpers_06.forest(rows)
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [line.get_xdata()[0] for line in diamonds] == [11.3]
    assert "inf" not in figure.alt_text and "no number in the paper" in figure.alt_text


def four(low, high, paper):
    if paper < 0:
        low, high, paper = -high, -low, -paper
    if low > 0:
        return lesson.VERDICTS[0]
    if high < 0:
        return lesson.VERDICTS[1]
    return lesson.VERDICTS[2] if high < paper else lesson.VERDICTS[3]


AGREES, DISAGREES, RULED_OUT, OPEN = lesson.VERDICTS


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda low, high, paper: four(low, high, abs(paper)), "turn the interval round"),
        (
            lambda low, high, paper: RULED_OUT if high < paper else AGREES if low > 0 else OPEN,
            "the paper's difference first",
        ),
        (
            lambda low, high, paper: AGREES if low > 0 else DISAGREES if high < 0 else OPEN,
            "says more than",
        ),
        (
            lambda low, high, paper: (
                AGREES if low >= 0 else DISAGREES if high <= 0 else four(low, high, paper)
            ),
            "touches 0 includes it",
        ),
        (
            lambda low, high, paper: RULED_OUT if high == paper else four(low, high, paper),
            "reaches it",
        ),
        (lambda low, high, paper: AGREES, "it should be"),
        (lambda low, high, paper: "better", "should be one of"),
        (lambda low, high: AGREES, "TypeError"),
    ],
)
def test_a_verdict_names_the_mistake(wrong, words):
    assert words in checks.verdict(wrong)


def votes(answers):
    return Counter(answer for answer in answers if answer is not None)


def winner(answers, best):
    return [answer == best for answer in answers]


def first(answers):
    return votes(answers).most_common(1)[0][0] if votes(answers) else ...


@pytest.mark.parametrize(
    "right",
    [
        lambda x: winner(x, first(x)),
        lambda x: np.array([answer == first(x) for answer in x]),
        lambda x: tuple(int(answer == first(x)) for answer in x),
    ],
)
def test_any_way_to_write_the_majority_is_right(right):
    assert checks.majority_vote(right).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: winner(x, Counter(x).most_common(1)[0][0]), "None does not vote"),
        (
            lambda x: winner(x, votes(x).most_common(1)[0][0] if votes(x) else None),
            "if no completion has an answer",
        ),
        (lambda x: winner(x, votes(x).most_common(1)[0][0]), "IndexError"),
        (
            lambda x: [a is not None and votes(x)[a] == max(votes(x).values()) for a in x],
            "let all of them win",
        ),
        (
            lambda x: winner(x, max(votes(x), key=lambda a: (votes(x)[a], a), default=...)),
            "yours is the greatest",
        ),
        (lambda x: winner(x, first(x[::-1])), "yours is the last"),
        (lambda x: [votes(x)[a] > len(x) / 2 for a in x], "more than half of all"),
        (
            lambda x: [votes(x)[a] > sum(votes(x).values()) / 2 for a in x],
            "more than half of the votes",
        ),
        (
            lambda x: [a == first(x) and i == x.index(a) for i, a in enumerate(x)],
            "All that give it do",
        ),
        (lambda x: [a != first(x) for a in x], "is reversed"),
        (lambda x: [a == "7" for a in x], "it should be"),
        (lambda x: "w" * len(x), "Return a list"),
        (lambda x: winner(votes(x), first(x)), "a list of 4 is needed"),
    ],
)
def test_the_majority_names_the_mistake(wrong, words):
    assert words in checks.majority_vote(wrong)


def of(interval, word=checks._word):
    """An answer from a function of the two matrices and a rule for the word."""

    def answer(a, b):
        numbers = interval(np.array(a), np.array(b))
        return *numbers, word(*numbers)

    return answer


both = significance.seed_and_question_interval


@pytest.mark.parametrize(
    "right",
    [
        of(lambda a, b: both(b - a)),
        of(lambda a, b: both(b - a, seed=7)),
        lambda a, b: list(of(lambda a, b: both((b - a).tolist(), seed=3))(a, b)),
    ],
)
def test_other_random_numbers_are_right_as_well(right):
    assert checks.paired(right).startswith("Right")


def separate(a, b):
    (x, x_low, x_high), (y, y_low, y_high) = both(a), both(b)
    return y - x, y_low - x_high, y_high - x_low


def quadrature(a, b):
    (x, x_low, x_high), (y, y_low, y_high) = both(a), both(b)
    return y - x, y - x - np.hypot(x_high - x, y - y_low), y - x + np.hypot(x - x_low, y_high - y)


def resampled(a, b):
    rng, m = np.random.default_rng(1), b - a
    draws = [
        m[rng.integers(len(m), size=len(m))][:, rng.integers(m.shape[1], size=m.shape[1])].mean()
        for _ in range(2000)
    ]
    return m.mean(), *np.percentile(draws, (2.5, 97.5))


def over_seeds(a, b):
    gains = (b - a).mean(1)
    half = significance.t_quantile(len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return gains.mean(), gains.mean() - half, gains.mean() + half


@pytest.mark.parametrize(
    "wrong, words",
    [
        (of(lambda a, b: both(a - b)), "sign is reversed"),
        (of(separate), "compared their ends"),
        (of(quadrature), "in quadrature"),
        (of(lambda a, b: evaluation.bootstrap_mean((b - a).mean(0))), "averaged the seeds first"),
        (of(lambda a, b: evaluation.paired_difference(a.ravel(), b.ravel())), "into one list"),
        (of(over_seeds), "averaged the questions first"),
        (of(resampled), "without the stretch"),
        (of(lambda a, b: both((b - a).T)), "without the stretch"),
        (of(lambda a, b: tuple(100 * x for x in both(b - a))), "percentage points"),
        (of(lambda a, b: both(b)), "interval of b"),
        (of(lambda a, b: evaluation.bootstrap_mean((b - a)[0])), "it should be about"),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: "better" if d > 0 else "worse" if d < 0 else "not resolved",
            ),
            "difference alone",
        ),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: (
                    "worse" if low > 0 else "better" if high < 0 else "not resolved"
                ),
            ),
            "exchanged",
        ),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: "better" if low > 0 else "not resolved",
            ),
            "wholly below zero",
        ),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: (
                    "better" if low >= 0 else "worse" if high < 0 else "not resolved"
                ),
            ),
            "touches zero",
        ),
        (of(lambda a, b: both(b - a), lambda d, low, high: "not resolved"), "the word is"),
        (of(lambda a, b: both(b - a), lambda d, low, high: "equal"), "The word should be"),
        (lambda a, b: both(np.array(b) - np.array(a)), "Return four things"),
        (lambda a, b: 0.05, "Return four things"),
        (lambda a, b: both(b - a), "TypeError"),
    ],
)
def test_a_paired_difference_names_the_mistake(wrong, words):
    assert words in checks.paired(wrong)


def answers(rows):
    return [row["extracted"] for row in rows]


def clear(rows):
    return [float(votes(answers(rows))[row["extracted"]] > len(rows) / 2) for row in rows]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (clear, "Put it into an entry"),
        ("clear", "should be a methods.Method"),
        (methods.Method("A title", "a source"), "no reward function"),
        (entry([True]), "is a list"),
        (entry(lambda rows: [0.5] * len(rows)), "should hold 1.0 and 0.0"),
        (entry(lambda rows: [row["reward"] for row in rows]), "changes with the gold answer"),
        (entry(baselines.by_majority), "plain majority"),
        (
            entry(
                lambda rows: [
                    votes(answers(rows))[a] > sum(votes(answers(rows)).values()) / 2
                    for a in answers(rows)
                ]
            ),
            "Half of *all*",
        ),
        (
            entry(lambda rows: [votes(answers(rows))[a] >= len(rows) / 2 for a in answers(rows)]),
            "Exactly half",
        ),
        (
            entry(lambda rows: [Counter(answers(rows))[a] > len(rows) / 2 for a in answers(rows)]),
            "None does not vote",
        ),
        (
            entry(lambda rows: clear(rows) if any(clear(rows)) else [True] * len(rows)),
            "None wins then",
        ),
        (
            entry(lambda rows: [x and row["correct"] for x, row in zip(clear(rows), rows)]),
            "changes with the gold answer",
        ),
        (entry(lambda rows, rng: clear(rows)), "TypeError"),
        (entry(lambda rows: None), "is a `return` missing?"),
        (entry(lambda rows: clear(rows)[:1]), "is needed"),
        (entry(lambda rows: [float(a == "7") for a in answers(rows)]), "it should be"),
        (entry(clear, settings=methods.SFT), "changes settings"),
        (entry(clear, pairs_factor=2, start="star"), "changes start and pairs_factor"),
        (methods.Method("", "a source", reward=clear), "needs a title"),
    ],
)
def test_an_entry_of_ones_own_names_the_mistake(wrong, words):
    assert words in checks.clear_majority_method(wrong)


def test_the_majority_of_the_package_is_that_of_the_exercise():
    rows = [checks._rows(given, "5") for given in checks.VOTES.values()]
    assert [baselines.by_majority(group) for group in rows] == [
        checks._majority(given) for given in checks.VOTES.values()
    ]
