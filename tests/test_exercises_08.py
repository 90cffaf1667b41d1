"""The checks of notebook 08 accept the solution, and tell a typical wrong answer what is wrong with it."""

import math
from pathlib import Path

import exercises
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("jupytext")

import checks_08 as checks  # noqa: E402

EXERCISES = ("share", "combine", "sent_when_split")


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined("08_past_one_gpu", name, solved)


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
        raise KeyError("question")

    check = getattr(checks, name)
    assert "KeyError: 'question'" in check(broken)
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: {"x": None},
        lambda *a: float("nan"),
        lambda *a: (1, 2, 3),
        lambda *a: [None],
        lambda *a: -1,
        lambda *a: [{}],
        lambda *a: True,
        lambda *a: [1.0, 2.0],
    ):
        said = check(odd)
        assert said and not said.startswith("Right") and not said.startswith("Something")


def right_share(items, rank, count):
    return solution("share")(items, rank, count)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda items, rank, count: items[rank::count], "like cards"),
        (
            lambda items, rank, count: items[rank * (len(items) // count) :][: len(items) // count],
            "gets lost",
        ),
        (
            lambda items, rank, count: items[
                rank * (len(items) // count) : None
                if rank == count - 1
                else (rank + 1) * (len(items) // count)
            ],
            "The last process takes all",
        ),
        (
            lambda items, rank, count: items[rank * math.ceil(len(items) / count) :][
                : math.ceil(len(items) / count)
            ],
            "rounded the length",
        ),
        (
            lambda items, rank, count: items[
                rank * len(items) // count : (rank + 1) * len(items) // count
            ],
            "the longer ones are the last",
        ),
        (
            lambda items, rank, count: items[rank * (len(items) // count) :][
                : len(items) // count + (rank < len(items) % count)
            ],
            "done twice",
        ),
        (lambda items, rank, count: items, "all items"),
        (
            lambda items, rank, count: [right_share(items, r, count) for r in range(count)],
            "part of `rank` alone",
        ),
        (lambda items, rank, count: right_share(items, rank - 1, count) if rank else [], "from 1"),
        (lambda items, rank, count: len(right_share(items, rank, count)), "Return a list"),
        (lambda items, rank, count: right_share(items, rank, count)[:1], "nobody takes"),
        (lambda items, rank, count: right_share(items, rank, count) * 2, "taken twice"),
        (lambda items, rank, count: right_share(items, rank, count)[::-1], "should be"),
    ],
)
def test_share_names_the_mistake(wrong, words):
    said = checks.share(wrong)
    assert words in said, said


def test_another_type_of_sequence_is_accepted():
    assert checks.share(
        lambda items, rank, count: tuple(right_share(items, rank, count))
    ).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda g, n: sum(g) / len(g), "averaged over processes"),
        (
            lambda g, n: sum(x for x, c in zip(g, n) if c) / sum(c > 0 for c in n),
            "left out those without items",
        ),
        (lambda g, n: sum(x.nan_to_num() for x in g) / len(g), "averaged over all processes"),
        (lambda g, n: sum(x * c for x, c in zip(g, n)) / sum(n), "nan times 0"),
        (lambda g, n: sum(g), "added the means"),
        (lambda g, n: sum(x for x, c in zip(g, n) if c), "added the means"),
        (lambda g, n: sum(x * c for x, c in zip(g, n) if c), "Divide it by their number"),
        (lambda g, n: sum(x * c for x, c in zip(g, n)), "nan times 0"),
        (lambda g, n: sum(x * c for x, c in zip(g, n) if c) / len(n), "number of processes"),
        (lambda g, n: sum(x for x, c in zip(g, n) if c) / sum(n), "without weighing"),
        (lambda g, n: g[0][0], "the shape ()"),
        (lambda g, n: "gradient", "Return one tensor"),
        (lambda g, n: g[0], "it should be"),
    ],
)
def test_combine_names_the_mistake(wrong, words):
    said = checks.combine(wrong)
    assert words in said, said


def test_other_ways_to_combine_are_accepted():
    def stacked(gradients, counts):
        import torch

        kept = [(gradient, count) for gradient, count in zip(gradients, counts) if count]
        return torch.stack([gradient * count for gradient, count in kept]).sum(0) / sum(
            count for _, count in kept
        )

    assert checks.combine(stacked).startswith("Right")
    assert checks.combine(lambda g, n: stacked(g, n).tolist()).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda w, o, g, p, m: m * (w + o + g) * (p - 1) / p, "needed again in the backward pass"),
        (lambda w, o, g, p, m: m * (2 * w + 2 * o + g) * (p - 1) / p, "kept from the forward"),
        (lambda w, o, g, p, m: m * (2 * w + o + 2 * g) * (p - 1) / p, "as in an all-reduce"),
        (lambda w, o, g, p, m: m * (2 * w + o) * (p - 1) / p, "gradients are missing"),
        (lambda w, o, g, p, m: m * (2 * w + g) * (p - 1) / p, "outside of the layers is missing"),
        (lambda w, o, g, p, m: (2 * w + o + g) * (p - 1) / p, "one micro-batch"),
        (lambda w, o, g, p, m: (m * (2 * w + o) + g) * (p - 1) / p, "once per step"),
        (lambda w, o, g, p, m: (2 * w + o + m * g) * (p - 1) / p, "given back every time"),
        (lambda w, o, g, p, m: m * (2 * w + o + g), "does not send all of it"),
        (lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1), "all cards together"),
        (lambda w, o, g, p, m: m * (2 * w + o + g) / p, "has already"),
        (lambda w, o, g, p, m: 2 * g * (p - 1) / p, "all-reduce of whole copies"),
        (lambda w, o, g, p, m: 2 * m * (w + o + g) * (p - 1) / p, "everything to go round twice"),
        (lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1) / p / 1e9, "Return bytes"),
        (lambda w, o, g, p, m: 7, "it should be"),
        (lambda w, o, g, p, m: [w, o, g], "one number"),
    ],
)
def test_bytes_of_split_layers_name_the_mistake(wrong, words):
    said = checks.sent_when_split(wrong)
    assert words in said, said
