"""The checks of notebook 04 accept the solution, and tell a typical wrong answer what is wrong with it."""

import exercises
import pytest
import torch
from torch.nn.functional import logsigmoid

pytest.importorskip("jupytext")

import checks_04 as checks  # noqa: E402


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined("04_dpo_nll_training", name, solved, torch=torch)


EXERCISES = {
    "loss": "my_loss",
    "gradient_rejected": "gradient_rejected",
    "batch_nll": "batch_nll",
    "lora_parameters": "lora_parameters",
}


@pytest.mark.parametrize("check, name", EXERCISES.items())
def test_solutions_are_right_and_stubs_are_unsolved(check, name):
    check = getattr(checks, check)
    assert check(solution(name)).startswith("Right")
    assert check(solution(name, solved=False)).startswith("Not solved yet")
    for nothing in (None, ..., lambda *arguments: None, lambda *arguments: ...):
        assert check(nothing).startswith("Not solved yet")


@pytest.mark.parametrize("check", EXERCISES)
def test_checks_never_raise(check):
    def broken(*arguments):
        raise KeyError("mask")

    check = getattr(checks, check)
    assert "KeyError: 'mask'" in check(broken)
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: {"x": None},
        lambda *a: float("nan"),
        lambda *a: torch.zeros(2, 2),
        lambda *a: (torch.zeros(4), torch.ones(4)),
    ):
        assert not check(odd).startswith("Right")


def eq1(w, l, rw, rl, n, alpha, beta):
    return -logsigmoid(beta * ((w - rw) - (l - rl))) - alpha * w / n


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            lambda w, l, rw, rl, n, a, b: -a * logsigmoid(b * ((w - rw) - (l - rl))) - w / n,
            "α stands before the DPO term",
        ),
        (
            lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, 0, b) - a * w / n.double().mean(),
            "mean length of the batch",
        ),
        (
            lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, 0, b) - a * w,
            "not divided by the winner's number of tokens",
        ),
        (lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, -a, b), "sign of the NLL"),
        (
            lambda w, l, rw, rl, n, a, b: -logsigmoid(b * (w - l)) - a * w / n,
            "reference is missing",
        ),
        (
            lambda w, l, rw, rl, n, a, b: -logsigmoid(b * ((w - rw) - (l - rl)) / n) - a * w / n,
            "they are plain sums",
        ),
        (lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, 0, b), "NLL term is missing"),
        (lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, 5 * a, b), "yours gives"),
        (lambda *a: eq1(*a).mean(), "the mean over the pairs"),
        (lambda *a: eq1(*a).sum(), "the sum over the pairs"),
    ],
)
def test_loss_names_the_mistake(wrong, words):
    assert words in checks.loss(wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            lambda w, l, rw, rl, n, a, b: -b * torch.sigmoid(-b * ((w - rw) - (l - rl))),
            "sign is wrong",
        ),
        (
            lambda w, l, rw, rl, n, a, b: b * torch.sigmoid(b * ((w - rw) - (l - rl))),
            "σ(-h) belongs",
        ),
        (lambda w, l, rw, rl, n, a, b: torch.sigmoid(-b * ((w - rw) - (l - rl))), "β is missing"),
        (
            lambda w, l, rw, rl, n, a, b: -b * torch.sigmoid(-b * ((w - rw) - (l - rl))) - a / n,
            "derivative for the winner",
        ),
        (
            lambda w, l, rw, rl, n, a, b: b * torch.sigmoid(-b * ((w - rw) - (l - rl))).mean(),
            "the mean over the pairs",
        ),
    ],
)
def test_gradient_names_the_mistake(wrong, words):
    assert words in checks.gradient_rejected(wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda logps, mask: -(logps * mask).sum() / mask.sum(), "tokens of the whole batch"),
        (lambda logps, mask: -logps.mean(-1).mean(), "padded width"),
        (lambda logps, mask: -logps.sum(-1).mean(), "long winners pay more"),
        (lambda logps, mask: (logps.sum(-1) / mask.sum(-1)).mean(), "sign is turned round"),
        (lambda logps, mask: -logps.sum(-1) / mask.sum(-1), "only their mean is missing"),
        (
            lambda logps, mask: -(logps.sum(-1) / mask.sum(-1)).mean(),
            "`token_logps` by the mask before you sum",
        ),
        (lambda logps, mask: -(logps.sum(0) / mask.sum(0)).mean(), "wrong dimension"),
    ],
)
def test_nll_names_the_mistake(wrong, words):
    assert words in checks.batch_nll(wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda shapes, r: sum(a * b for a, b in shapes), "frozen weights"),
        (lambda shapes, r: sum(r * a * b for a, b in shapes), "A and B are thin"),
        (lambda shapes, r: sum(r * b for a, b in shapes), "A only"),
        (lambda shapes, r: sum(a + b for a, b in shapes), "rank is missing"),
        (lambda shapes, r: sum(shapes[0]) * r, "first layer only"),
    ],
)
def test_lora_count_names_the_mistake(wrong, words):
    assert words in checks.lora_parameters(wrong)
