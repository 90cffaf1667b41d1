"""The checks of notebook 06 accept the solution, and tell a typical wrong answer what is wrong with it."""

from collections import Counter

import exercises
import numpy as np
import pytest

from irpo_utils import baselines, evaluation, methods
from irpo_utils.ops import statistics

pytest.importorskip("jupytext")

import checks_06 as checks  # noqa: E402


def solution(name: str, begins: str, solved: bool = True):
    """What the exercise's cell of the notebook's source defines under that name, solved or as a stub."""
    return exercises.defined(
        "06_baselines_and_ablations",
        name,
        solved,
        begins,
        np=np,
        Counter=Counter,
        evaluation=evaluation,
        statistics=statistics,
        methods=methods,
    )


EXERCISES = {
    "majority_verdict": ("majority_verdict", "def majority_verdict("),
    "paired": ("paired", "def paired("),
    "clear_majority_method": ("CLEAR", "CLEAR = None\n"),
}


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
    [("majority_verdict", lambda f: f), ("paired", lambda f: f), ("clear_majority_method", entry)],
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
    assert checks.majority_verdict(right).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: winner(x, Counter(x).most_common(1)[0][0]), "None does not vote"),
        (
            lambda x: winner(x, votes(x).most_common(1)[0][0] if votes(x) else None),
            "where nobody votes",
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
        (lambda x: [a != first(x) for a in x], "turned round"),
        (lambda x: [a == "7" for a in x], "it should be"),
        (lambda x: "w" * len(x), "Return a list"),
        (lambda x: winner(votes(x), first(x)), "a list of 4 is needed"),
    ],
)
def test_the_majority_names_the_mistake(wrong, words):
    assert words in checks.majority_verdict(wrong)


def of(interval, word=checks._word):
    """An answer from a function of the two matrices and a rule for the word."""

    def answer(a, b):
        numbers = interval(np.array(a), np.array(b))
        return *numbers, word(*numbers)

    return answer


both = statistics.seed_and_question_interval


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
    half = statistics.t_quantile(len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return gains.mean(), gains.mean() - half, gains.mean() + half


@pytest.mark.parametrize(
    "wrong, words",
    [
        (of(lambda a, b: both(a - b)), "sign is turned round"),
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
                lambda d, low, high: "better" if d > 0 else "worse" if d < 0 else "within noise",
            ),
            "difference alone",
        ),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: (
                    "worse" if low > 0 else "better" if high < 0 else "within noise"
                ),
            ),
            "exchanged",
        ),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: "better" if low > 0 else "within noise",
            ),
            "wholly below zero",
        ),
        (
            of(
                lambda a, b: both(b - a),
                lambda d, low, high: (
                    "better" if low >= 0 else "worse" if high < 0 else "within noise"
                ),
            ),
            "touches zero",
        ),
        (of(lambda a, b: both(b - a), lambda d, low, high: "within noise"), "the word is"),
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
            "Nobody wins then",
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
