"""The checks of notebook 05 accept the solution, and tell a typical wrong answer what is wrong with it."""

import json
import math
from pathlib import Path

import exercises
import numpy as np
import pytest

pytest.importorskip("jupytext")

import checks_05 as checks  # noqa: E402


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
        (lambda now, before: (-ratios(now, before).mean(), 0.1), "sign is turned round"),
        (
            lambda now, before: ((np.exp(now) * ratios(now, before)).sum(), 0.1),
            "samples carry the weights",
        ),
        (lambda now, before: (np.abs(ratios(now, before)).mean(), 0.1), "absolute values"),
        (lambda now, before: (np.exp(ratios(now, before)).mean(), 0.1), "exponentials"),
        (lambda now, before: (ratios(now, before).sum(), 0.1), "that is the sum"),
        (
            lambda now, before: (ratios(now, before).mean(), ratios(now, before).std(ddof=1)),
            "single answers",
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


def sound(table, t, logp=True, p=True, rise=True):
    row = table[t]
    return (
        (not rise or row["greedy"] > table[t - 1]["greedy"])
        and (not p or row["p"] < 0.05)
        and (not logp or row["logp_after"] >= row["logp_before"])
    )


def walk(table, **rules):
    return next(
        (t - 1 for t in range(1, len(table)) if not sound(table, t, **rules)), len(table) - 1
    )


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda t: max(range(len(t)), key=lambda i: t[i]["greedy"]), "highest accuracy"),
        (lambda t: len(t) - 1, "last model always"),
        (lambda t: min(walk(t) + 1, len(t) - 1), "Keep the model before it"),
        (lambda t: max([i for i in range(1, len(t)) if sound(t, i)], default=0), "last sound step"),
        (lambda t: sum(sound(t, i) for i in range(1, len(t))), "count sound steps"),
        (lambda t: walk(t, logp=False), "do not look at the winners"),
        (
            lambda t: next(
                (
                    i - 1
                    for i in range(1, len(t))
                    if not sound(t, i, logp=False)
                    or t[i]["logp_after"]
                    < (t[i - 1]["logp_after"] if i > 1 else t[i]["logp_before"])
                ),
                len(t) - 1,
            ),
            "iteration before",
        ),
        (lambda t: walk(t, p=False), "do not look at p"),
        (lambda t: walk(t, rise=False), "not at the direction"),
        (lambda t: 1, "keep M_"),
    ],
)
def test_stopping_names_the_mistake(wrong, words):
    assert words in checks.keep(wrong)
