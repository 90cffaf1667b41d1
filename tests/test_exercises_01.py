"""The checks of notebook 01 accept the solution, and tell a typical wrong answer what is wrong with it."""

import math
from itertools import combinations

import exercises
import numpy as np
import pytest
import torch

pytest.importorskip("jupytext")

import checks_01 as checks  # noqa: E402


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    notebook = "01b_fast_sampling" if name in ("nucleus", "saved") else "01_sampling"
    return exercises.defined(notebook, name, solved, torch=torch, math=math)


EXERCISES = ("with_temperature", "nucleus", "saved", "pass_at_k", "choose")


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
        raise ZeroDivisionError("no mass")

    check = getattr(checks, name)
    assert "ZeroDivisionError: no mass" in check(broken)
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: [None] * 4,
        lambda *a: float("nan"),
        lambda *a: [float("nan")] * 4,
        lambda *a: torch.ones(2, 2),
        lambda *a: {},
    ):
        assert not check(odd).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda z, t: torch.softmax(z, -1), "no effect"),
        (lambda z, t: torch.softmax(z * t, -1), "multiplied the logits"),
        (lambda z, t: torch.softmax(z, -1) / t, "divided the probabilities"),
        (lambda z, t: torch.exp(z / t), "divide the exponentials by their sum"),
        (lambda z, t: z / t, "Now take the exponential"),
        (lambda z, t: torch.softmax(z - t, -1), "no effect"),
        (lambda z, t: [0.25] * 4, "it should be"),
        (lambda z, t: torch.softmax(z, -1)[:2], "4 tokens and you return 2"),
    ],
)
def test_with_temperature_names_the_mistake(wrong, words):
    assert words in checks.with_temperature(wrong)


def test_with_temperature_tells_of_an_overflow():
    message = checks.with_temperature(
        lambda z, t: torch.exp(z / t) / torch.exp(z / t).sum(-1, keepdim=True)
    )
    assert message.startswith("Right") and "overflow" in message
    assert checks.with_temperature(lambda z, t: torch.softmax(z / t, -1).tolist()).startswith(
        "Right"
    )


def test_with_temperature_looks_at_a_batch():
    message = checks.with_temperature(lambda z, t: torch.softmax((z / t).flatten(), 0).view_as(z))
    assert not message.startswith("Right") and "over the last dimension" in message


def walk(p, top_p, early=False, sort=True, ascending=False, normalise=True, place=True, by=None):
    """A nucleus with one thing done differently."""
    order = (
        sorted(range(len(p)), key=lambda i: p[i] if ascending else -p[i]) if sort else range(len(p))
    )
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p or early and mass + p[i] > top_p:
            break
        kept.append(i)
        mass += p[i]
    total = by or (mass if normalise else 1)
    if not place:
        return [p[i] / total for i in kept] + [0.0] * (len(p) - len(kept))
    return [x / total if i in kept else 0.0 for i, x in enumerate(p)]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda p, t: walk(p, t, normalise=False), "divide each by the sum"),
        (lambda p, t: walk(p, t, early=True), "one token too early"),
        (lambda p, t: walk(p, t, sort=False), "Nothing was cut"),
        (lambda p, t: walk(p, t, ascending=True), "Nothing was cut"),
        (lambda p, t: walk(p, t, place=False), "in the order of their size"),
        (lambda p, t: walk(p, t, by=t), "divided by top_p"),
        (lambda p, t: [x if x >= t else 0 for x in p], "not a threshold for one token"),
        (lambda p, t: [float(x == max(p)) for x in p], "that is greedy"),
        (lambda p, t: [x for x in walk(p, t) if x], "one number for each token"),
        (lambda p, t: walk(p, t + 1e-9), "equal to top_p"),
        (lambda p, t: p, "Nothing was cut"),
    ],
)
def test_nucleus_names_the_mistake(wrong, words):
    assert words in checks.nucleus(wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda p, ls: (len(ls) - 1) * p, "number of positions saved"),
        (lambda p, ls: len(ls) * p / (len(ls) * p + sum(ls)), "(N - 1) times"),
        (lambda p, ls: (len(ls) - 1) * p / (p + sum(ls)), "without"),
        (lambda p, ls: (p + sum(ls)) / (len(ls) * p + sum(ls)), "Subtract it from 1"),
        (lambda p, ls: (len(ls) - 1) * p / (len(ls) * p + sum(ls) / len(ls)), "mean length"),
        (lambda p, ls: 3 * p / (4 * p + sum(ls)), "single completion"),
        (lambda p, ls: 0.9, "yours is 0.9"),
    ],
)
def test_saved_names_the_mistake(wrong, words):
    assert words in checks.saved(wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda n, c, k: 1 - (1 - c / n) ** k, "biased"),
        (lambda n, c, k: math.comb(n - c, k) / math.comb(n, k), "Subtract it from 1"),
        (lambda n, c, k: c / n, "pass@1"),
        (lambda n, c, k: math.comb(c, k) / math.comb(n, k), "all k are correct"),
        (lambda n, c, k: 1 - math.comb(c, k) / math.comb(n, k), "from the correct ones"),
        (lambda n, c, k: k * c / n, "do not add"),
        (lambda n, c, k: min(1, k * c / n), "do not add"),
        (lambda n, c, k: math.comb(n, k) - math.comb(n - c, k), "not a chance"),
        (
            lambda n, c, k: (
                1 - np.prod([(n - c - i) / (n - i) for i in range(min(k, n - c))])
                if k <= n - c
                else 0.5
            ),
            "fewer incorrect ones than k",
        ),
        (lambda n, c, k: 0.123, "yours is 0.123"),
    ],
)
def test_pass_at_k_names_the_mistake(wrong, words):
    assert words in checks.pass_at_k(wrong)


def test_pass_at_k_by_enumeration_is_right():
    def enumerate_picks(n, c, k):
        picks = list(combinations(range(n), k))
        return sum(any(i < c for i in pick) for pick in picks) / len(picks)

    assert checks.pass_at_k(enumerate_picks).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda counts, n: max(counts, key=lambda t: sum(counts[t])), "most correct completions"),
        (
            lambda counts, n: max(counts, key=lambda t: sum(c > 0 for c in counts[t])),
            "also need an incorrect one",
        ),
        (
            lambda counts, n: max(counts, key=lambda t: sum(c < n for c in counts[t])),
            "also need a correct one",
        ),
        (
            lambda counts, n: min(counts, key=lambda t: abs(np.mean(counts[t]) / n - 0.5)),
            "one by one",
        ),
        (lambda counts, n: max(counts), "also need a correct one"),
        (
            lambda counts, n: max(sum(0 < c < n for c in counts[t]) for t in counts),
            "return the temperature",
        ),
        (lambda counts, n: 1.0, "its own arguments"),
        (
            lambda counts, n: max(counts, key=lambda T: sum(c * (n - c) for c in counts[T])),
            "counts once",
        ),
        (
            lambda counts, n: max(counts, key=lambda T: sum(min(c, n - c) for c in counts[T])),
            "counts once",
        ),
        (lambda counts, n: "warm", "Return one temperature"),
    ],
)
def test_choose_names_the_mistake(wrong, words):
    assert words in checks.choose(wrong)


def test_a_fixed_dimension_and_the_n_of_the_notebook_are_named():
    def last_of_two(z, t):
        return torch.softmax(z / t, min(1, z.dim() - 1))

    assert "*last* dimension" in checks.with_temperature(last_of_two)

    def with_n_8(counts, n):
        return max(counts, key=lambda t: sum(0 < c < 8 for c in counts[t]))

    assert "its own argument `n`" in checks.choose(with_n_8)
