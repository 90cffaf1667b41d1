"""The checks of notebook 05 accept the solution, and tell a typical wrong answer what is wrong with it."""

import json
import math
from pathlib import Path

import exercises
import numpy as np
import pytest

pytest.importorskip("jupytext")

import checks_05 as checks  # noqa: E402
import helpers_05 as helpers  # noqa: E402


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined("05_iterations", name, solved, json=json, math=math, np=np, Path=Path)


EXERCISES = ("pairs_of_each_model", "mcnemar_p", "estimate_kl", "keep")


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_stubs_are_unsolved(name):
    check = getattr(checks, name)
    assert check(solution(name)).startswith("Right")
    assert check(solution(name, solved=False)).startswith("Not solved yet")
    for nothing in (None, ..., lambda *arguments: ...):
        assert check(nothing).startswith("Not solved yet")
    assert "is a `return` missing?" in check(lambda *arguments: None)


@pytest.mark.parametrize("name", EXERCISES)
def test_checks_never_raise(name):
    def broken(*arguments):
        raise KeyError("pairs")

    check = getattr(checks, name)
    assert "KeyError: 'pairs'" in check(broken)
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
    ):
        assert not check(odd).startswith("Right")


def count(run, t, key="pairs"):
    return json.loads((run / f"iteration_{t}/pairs/counts.json").read_text())[key]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda run: {t: count(run, t) for t in range(3)}, "pairs that each model *made*"),
        (lambda run: {t: count(run, t) for t in range(1, 4)}, "the last model makes no pairs"),
        (lambda run: {t: count(run, t) for t in range(1, 3)}, "made with M_t itself"),
        (lambda run: {t + 1: count(run, t) for t in range(4)}, "the last model makes no pairs"),
        (lambda run: {t + 1: count(run, t, "used") for t in range(3)}, "questions that gave pairs"),
        (lambda run: [count(run, t) for t in range(3)], "Return a dict"),
        (lambda run: {str(t + 1): count(run, t) for t in range(3)}, "keys are strings"),
        (lambda run: {1: 5}, "it should be {1: 1400"),
    ],
)
def test_reading_a_run_names_the_mistake(wrong, words):
    assert words in checks.pairs_of_each_model(wrong)


def split(a, b):
    return sum(x > y for x, y in zip(a, b)), sum(y > x for x, y in zip(a, b))


def tail(n, k):
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda a, b: tail(sum(split(a, b)), min(split(a, b))), "one-sided"),
        (lambda a, b: 2 * tail(len(a), min(split(a, b))), "for every question"),
        (
            lambda a, b: 2 * math.comb(sum(split(a, b)), min(split(a, b))) / 2 ** sum(split(a, b)),
            "exactly this split",
        ),
        (
            lambda a, b: math.erfc(abs(sum(a) - sum(b)) / math.sqrt(2 * sum(split(a, b)))),
            "chi-squared",
        ),
        (lambda a, b: 2 * tail(sum(split(a, b)), min(split(a, b)) - 1), "last term is missing"),
        (lambda a, b: 2 * tail(sum(split(a, b)), min(split(a, b))), "cut it at 1"),
        (lambda a, b: min(1, 2 * tail(sum(split(a, b)), split(a, b)[0])), "a and b exchanged"),
        (
            lambda a, b: (
                min(1, 2 * tail(sum(split(a, b)), min(split(a, b)))) if any(split(a, b)) else 0.0
            ),
            "no evidence",
        ),
        (lambda a, b: 0.5, "11 tosses"),
    ],
)
def test_mcnemar_names_the_mistake(wrong, words):
    assert words in checks.mcnemar_p(wrong)


def ratios(now, before):
    return np.array(now) - np.array(before)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda now, before: (-ratios(now, before).mean(), 0.1), "sign is reversed"),
        (
            lambda now, before: ((np.exp(now) * ratios(now, before)).sum(), 0.1),
            "samples carry the weights",
        ),
        (lambda now, before: (np.abs(ratios(now, before)).mean(), 0.1), "absolute values"),
        (lambda now, before: (np.exp(ratios(now, before)).mean(), 0.1), "exponentials"),
        (lambda now, before: (ratios(now, before).sum(), 0.1), "that is the sum"),
        (
            lambda now, before: (ratios(now, before).mean(), ratios(now, before).std(ddof=1)),
            "single completions",
        ),
        (
            lambda now, before: (
                ratios(now, before).mean(),
                ratios(now, before).std() / math.sqrt(8),
            ),
            "ddof=1",
        ),
        (
            lambda now, before: (ratios(now, before).mean(), ratios(now, before).std(ddof=1) / 8),
            "instead of its root",
        ),
        (lambda now, before: ratios(now, before).mean(), "Return two numbers"),
        (lambda now, before: (7.0, 0.1), "should be"),
    ],
)
def test_kl_names_the_mistake(wrong, words):
    assert words in checks.estimate_kl(wrong)


def patience(rows, n=1, column="validation"):
    best = 0
    for t in range(1, len(rows)):
        if rows[t][column] > rows[best][column]:
            best = t
        elif t - best == n:
            break
    return best


def accuracies(rows, column="validation"):
    return [row[column] for row in rows]


def before(rows, is_bad):
    return next((t - 1 for t in range(1, len(rows)) if is_bad(rows[t])), len(rows) - 1)


def first_rise(rows):
    """Patience 1 that continues on a tie and keeps the later of two equal models."""
    values = accuracies(rows)
    return next((t - 1 for t in range(1, len(rows)) if values[t] < values[t - 1]), len(rows) - 1)


def tolerant_best(rows):
    """Patience 1 that continues on a tie and keeps the earlier of two equal models."""
    values = accuracies(rows)[: first_rise(rows) + 1]
    return values.index(max(values))


def by_array(rows):
    values = np.array(accuracies(rows))
    stops = np.flatnonzero(np.diff(values) <= 0)
    return stops[0] if len(stops) else len(values) - 1


@pytest.mark.parametrize("sensible", [patience, first_rise, tolerant_best, by_array])
def test_selection_accepts_any_implementation_and_any_choice_on_a_tie(sensible):
    assert checks.keep(sensible).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda r: max(range(len(r)), key=lambda t: r[t]["validation"]), "best of all iterations"),
        (lambda r: len(r) - 1, "always return the last model"),
        (lambda r: min(patience(r) + 1, len(r) - 1), "at which you stop"),
        (lambda r: patience(r, column="test"), "select by test accuracy"),
        (lambda r: int(np.argmax(accuracies(r, "test"))), "best test accuracy"),
        (lambda r: patience(r, n=2), "patience 2"),
        (lambda r: min(max(1, patience(r)), len(r) - 1), "M_0 is a candidate"),
        (lambda r: before(r, lambda row: row["validation"] <= r[0]["validation"]), "with M_0"),
        (
            lambda r: max(
                (t for t in range(1, len(r)) if np.diff(accuracies(r))[t - 1] > 0), default=0
            ),
            "last iteration that improved",
        ),
        (lambda r: int((np.diff(accuracies(r)) > 0).sum()), "count the iterations"),
        (lambda r: r[patience(r)]["validation"], "return an accuracy"),
        (lambda r: before(r, lambda row: row["kl"] > 1), "stop by KL"),
        (lambda r: before(r, lambda row: row["chosen_change"] < 0), "by the chosen completions"),
        (
            lambda r: min(patience(r), before(r, lambda row: row["kl"] > 1)),
            "also stop if KL is large",
        ),
        (
            lambda r: min(patience(r), before(r, lambda row: row["chosen_change"] < 0)),
            "also stop if chosen completions fall",
        ),
        (lambda r: 1, "keep M_"),
        (lambda r: patience(r) if len(set(accuracies(r))) == len(r) else 0, "works without ties"),
    ],
)
def test_selection_names_the_mistake(wrong, words):
    assert words in checks.keep(wrong)


def test_shipped_runs_have_rows_for_the_rules():
    runs = helpers.shipped_runs()
    assert len(runs) > 32 and {len(one["rows"]) for one in runs} == {5, 9}
    for one in runs:
        first, *rest = one["rows"]
        assert first["kl"] is None and first["chosen_change"] is None
        assert all(row["kl"] is not None and row["chosen_change"] is not None for row in rest)
        assert all(0 <= row[split] <= 1 for row in one["rows"] for split in ("validation", "test"))


def test_patience_loses_less_test_accuracy_than_a_fall_of_chosen_completions():
    """The rule that the exercise replaced kept M_0 although M_1 was far better."""

    def lost(rule):
        return [
            max(accuracies(one["rows"], "test")) - one["rows"][rule(one["rows"])]["test"]
            for one in helpers.shipped_runs()
        ]

    fallen = lost(lambda rows: before(rows, lambda row: row["chosen_change"] < 0))
    assert np.mean(lost(solution("keep"))) < 0.03 < 0.1 < np.mean(fallen)
