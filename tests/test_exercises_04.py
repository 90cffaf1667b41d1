"""The checks of notebooks 04 and 04b accept the solution, and tell a typical wrong answer what is wrong with it."""

import exercises
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

pytest.importorskip("jupytext")

import checks_04 as checks  # noqa: E402
import helpers_04  # noqa: E402

from irpo_utils import logprobs, models, training  # noqa: E402

# check -> (notebook, what the student defines, how the cell begins)
EXERCISES = {
    "loss": ("04_dpo_nll_training", "my_loss", None),
    "response_logps": ("04_dpo_nll_training", "my_response_logps", None),
    "train_step": ("04_dpo_nll_training", "train_step", None),
    "lora_linear": ("04b_qlora_by_hand", "LoRALinear", "class LoRALinear("),
    "lora_parameters": ("04b_qlora_by_hand", "lora_parameters", None),
}


def solution(check: str, solved: bool = True):
    """What the notebook's source defines for this check, solved or as a stub."""
    notebook, name, begins = EXERCISES[check]
    return exercises.defined(notebook, name, solved, begins, torch=torch, training=training)


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_stubs_are_unsolved(name):
    check = getattr(checks, name)
    assert check(solution(name)).startswith("Right")
    assert check(solution(name, solved=False)).startswith("Not solved yet")
    for nothing in (None, ..., lambda *arguments: ...):
        assert check(nothing).startswith("Not solved yet")


@pytest.mark.parametrize("name", EXERCISES)
def test_a_forgotten_return_is_named(name):
    def without_return(*arguments):
        solution(name)(*arguments)

    assert "is a `return` missing?" in getattr(checks, name)(without_return)


@pytest.mark.parametrize("name", EXERCISES)
def test_checks_never_raise(name):
    def broken(*arguments):
        raise KeyError("mask")

    check = getattr(checks, name)
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
        lambda *a: torch.nn.Linear(2, 2),
    ):
        assert not check(odd).startswith("Right")


def eq1(w, l, rw, rl, n, alpha, beta):
    return -logsigmoid(beta * ((w - rw) - (l - rl))) - alpha * w / n


def dpo(w, l, rw, rl, n, alpha, beta):
    return eq1(w, l, rw, rl, n, 0, beta)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda w, l, rw, rl, n, a, b: a * dpo(w, l, rw, rl, n, a, b) - w / n, ["α is on the DPO"]),
        (lambda w, l, rw, rl, n, a, b: a * eq1(w, l, rw, rl, n, 1, b), ["α is on both terms"]),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * w.sum() / n.sum(),
            ["In the NLL term", "tokens of the whole batch"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * w / n.sum(),
            ["In the NLL term", "tokens of the whole batch"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b).mean() - a * w.sum() / n.sum(),
            ["In the NLL term", "tokens of the whole batch", "one loss for each pair"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: -logsigmoid(b * (w - l)) - a * w.sum() / n.sum(),
            ["In the DPO term: the reference is missing", "In the NLL term: you divided"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * w / n.double().mean(),
            ["In the NLL term", "mean length of the batch"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * w,
            ["In the NLL term", "not divided by the number of tokens"],
        ),
        (lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, -a, b), ["the sign is wrong"]),
        (lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, 1, b), ["its α is missing"]),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * (w - rw) / n,
            ["In the NLL term", "log-ratio to the reference"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: -logsigmoid(b * (w - l)) - a * w / n,
            ["In the DPO term", "reference is missing"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: -logsigmoid(b * ((w - rw) - (l - rl)) / n) - a * w / n,
            ["In the DPO term", "plain sums"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: eq1(l, w, rl, rw, n, 0, b) - a * w / n,
            ["In the DPO term", "swapped"],
        ),
        (dpo, ["NLL term is missing"]),
        (lambda w, l, rw, rl, n, a, b: -a * w / n, ["DPO term is missing"]),
        (lambda w, l, rw, rl, n, a, b: eq1(w, l, rw, rl, n, 5 * a, b), ["cancelled expected"]),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * rw / n,
            ["In the NLL term", "log-probability of the reference"],
        ),
        (
            lambda w, l, rw, rl, n, a, b: dpo(w, l, rw, rl, n, a, b) - a * (w / n).mean(),
            ["In the NLL term", "mean over the pairs"],
        ),
        (lambda *a: eq1(*a).detach(), ["no gradient"]),
        (lambda *a: eq1(*a).tolist(), ["no gradient"]),
        (
            lambda w, l, rw, rl, n, a, b: (
                -torch.log(torch.sigmoid(b * ((w - rw) - (l - rl)))) - a * w / n
            ),
            ["Right, with one flaw", "logsigmoid"],
        ),
        (lambda *a: eq1(*a).mean(), ["the mean over the pairs"]),
        (lambda *a: eq1(*a).sum(), ["the sum over the pairs"]),
    ],
)
def test_loss_names_the_term_and_the_mistake(wrong, words):
    said = checks.loss(wrong)
    assert all(part in said for part in words), said
    if words[0] == "In the NLL term":
        assert "In the DPO term" not in said, said


def picked(logits, ids, mask, first, log=True):
    """Per-token scores of the completion, from the logits of the columns from `first` on."""
    width = mask.shape[1]
    prompt = ids.shape[1] - width
    scores = torch.log_softmax(logits, -1) if log else logits
    part = scores[:, prompt + first : prompt + first + width]
    return part.gather(-1, ids[:, prompt:, None]).squeeze(-1)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x, ids, m: (picked(x, ids, m, 0) * m).sum(-1), "The shift is missing"),
        (lambda x, ids, m: (picked(x, ids, m, -2) * m).sum(-1), "one column too far"),
        (lambda x, ids, m: picked(x, ids, m, -1).sum(-1), "The mask is missing"),
        (lambda x, ids, m: (picked(x, ids, m, -1) * m).sum(-1) / m.sum(-1), "DPO needs sums"),
        (lambda x, ids, m: (picked(x, ids, m, -1, log=False) * m).sum(-1), "You summed logits"),
        (lambda x, ids, m: picked(x, ids, m, -1) * m, "only the sum"),
        (lambda x, ids, m: -(picked(x, ids, m, -1) * m).sum(-1), "sign is wrong"),
        (
            lambda x, ids, m: (
                torch.log_softmax(x, -1)[:, :-1].gather(-1, ids[:, 1:, None]).sum((1, 2))
            ),
            "You also counted the prompt",
        ),
    ],
)
def test_response_logps_names_the_mistake(wrong, words):
    assert words in checks.response_logps(wrong)


def test_response_logps_with_fixed_sizes_is_named():
    def fixed(logits, ids, mask):
        logps = torch.log_softmax(logits[:, 3:8], -1).gather(-1, ids[:, 4:9, None]).squeeze(-1)
        return (logps * mask[:, : logps.shape[1]]).sum(-1)

    assert "Take P and R from the shapes" in checks.response_logps(fixed)


def test_a_placeholder_left_below_working_code_is_named():
    def my_loss(*arguments):
        loss = eq1(*arguments)
        assert loss.shape == arguments[0].shape
        return ...

    def train_step(*arguments):
        step()(*arguments)
        return ...

    assert "still returns `...`" in checks.loss(my_loss)
    assert "still returns `...`" in checks.train_step(train_step)


def test_gradients_that_are_cleared_before_the_step_are_named():
    def train_step(score, optimizer, reference, n_tokens, alpha, beta):
        terms = training.dpo_nll_loss(*score(), *reference, n_tokens, beta=beta)
        loss = (terms[0] + alpha * terms[1]).mean()
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        return loss.detach()

    assert "ran, but without gradients" in checks.train_step(train_step)


def test_dpo_alone_ends_at_the_third_completion_of_the_toy_and_the_nll_term_at_the_chosen():
    toy_training = exercises.defined(
        "04_dpo_nll_training", "toy_training", begins="def toy_training(", torch=torch
    )
    ends = [toy_training(alpha)[-1].argmax() for alpha in (0.0, 1.0)]
    assert ends == [2, 0]


def step(zero=True, how=torch.mean, sign=1, use=lambda alpha: alpha, act=True, swap=False):
    """A training step with one thing changed."""

    def train_step(score, optimizer, reference, n_tokens, alpha, beta):
        if zero:
            optimizer.zero_grad()
        reference = reference[::-1] if swap else reference
        terms = training.dpo_nll_loss(*score(), *reference, n_tokens, beta=beta)
        loss = how(terms[0] + use(alpha) * terms[1])
        (sign * loss).backward()
        if act:
            optimizer.step()
        return loss.item()

    return train_step


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "Right"),
        ({"zero": False}, "zero_grad"),
        ({"how": torch.sum}, "Take the mean"),
        ({"sign": -1}, "lowers δ"),
        ({"use": lambda alpha: 0}, "DPO alone"),
        ({"use": lambda alpha: 1}, "α is missing"),
        ({"act": False}, "Nothing was trained"),
        ({"swap": True}, "references are swapped"),
    ],
)
def test_train_step_names_the_mistake(changes, words):
    assert words in checks.train_step(step(**changes))


def test_train_step_that_returns_another_number_is_named():
    def train_step(*arguments):
        return step()(*arguments) + 1

    assert "is not the loss before the step" in checks.train_step(train_step)


def lora(scale=lambda r, a: a / r, freeze=True, zero_b=True, zero_a=False, wrap=True, add=True):
    """A LoRA layer with one thing changed."""
    parameter = torch.nn.Parameter if wrap else (lambda tensor: tensor)

    class LoRALinear(torch.nn.Module):
        def __init__(self, base, r, a):
            super().__init__()
            self.base, self.scale = base.requires_grad_(not freeze), scale(r, a)
            d_in, d_out = base.in_features, base.out_features
            self.A = parameter(torch.zeros(r, d_in) if zero_a else torch.randn(r, d_in))
            self.B = parameter(torch.zeros(d_out, r) if zero_b else torch.randn(d_out, r))

        def forward(self, x):
            change = self.scale * (x @ self.A.T @ self.B.T)
            return self.base(x) + change if add else self.base(x)

    return LoRALinear


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "Right"),
        ({"scale": lambda r, a: 1}, "scale a / r is missing"),
        ({"scale": lambda r, a: a}, "multiplied by a"),
        ({"scale": lambda r, a: r / a}, "not r / a"),
        ({"freeze": False}, "not frozen"),
        ({"zero_b": False}, "B is not zero"),
        ({"zero_a": True}, "both zero"),
        ({"wrap": False}, "not a `torch.nn.Parameter`"),
        ({"add": False}, "adapter is missing"),
    ],
)
def test_lora_linear_names_the_mistake(changes, words):
    assert words in checks.lora_linear(lora(**changes))


def test_lora_linear_whose_forward_returns_nothing_is_named():
    class Silent(lora()):
        def forward(self, x):
            super().forward(x)

    assert "is a `return` missing?" in checks.lora_linear(Silent)


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


# The study of section 6


@pytest.mark.parametrize(
    "value, expected, verdict",
    [
        (1.0, "rises", "yes"),
        (1.0, "falls", "no, it rises"),
        (-1.0, "falls", "yes"),
        (-1.0, "rises", "no, it falls"),
        (0.0, "falls", "not resolved"),
    ],
)
def test_a_claim_shows_the_change_itself_and_whether_it_agrees(value, expected, verdict, capsys):
    around = value + np.array([[-0.1, 0.1], [0.1, -0.1]])
    helpers_04.claim("some claim", around, expected)
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("some claim") and printed.endswith(verdict)
    assert f"{value:+.2f} (" in printed


def test_the_study_starts_from_m0_in_every_run():
    """Each method has the same seeds at a learning rate, and each run starts from M_0's own numbers."""
    model, tokenizer = models.load("seed", device="cpu")
    records, pairs = helpers_04.study(), helpers_04.held_out_pairs()
    assert len({pair["id"] for pair in pairs}) == len(pairs) == 256
    runs = {}
    for record in records:
        runs.setdefault((record["learning_rate"], record["seed"]), set()).add(record["method"])
        for side in ("chosen", "rejected"):
            assert {len(values) for values in record[side]} == {256}
            assert len(record[side]) == len(record["steps"]) and record["steps"][0] == 0
    assert all(methods == set(helpers_04.STYLES) for methods in runs.values())
    prompts = [pair["prompt_ids"] for pair in pairs[:8]]
    for side in ("chosen", "rejected"):
        under_m0 = logprobs.score(model, tokenizer, prompts, [p[f"{side}_ids"] for p in pairs[:8]])
        for record in records:
            assert record[side][0][:8] == pytest.approx(under_m0, abs=0.01)


def test_changes_are_end_minus_start_per_seed_and_pair():
    def record(method, seed, *steps):
        return {"method": method, "learning_rate": 1e-4, "seed": seed, "chosen": list(steps)}

    records = [
        record("DPO", 1, [0.0, 0.0], [0.0, 0.0], [5.0, 6.0]),
        record("DPO", 0, [-1.0, -2.0], [0.0, 0.0], [-3.0, -1.0]),
        record("SFT", 0, [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]),
    ]
    changes = helpers_04.changes(records, "DPO", 1e-4, "chosen")
    assert changes.tolist() == [[-2.0, 1.0], [5.0, 6.0]]  # in the order of the seeds
    between = helpers_04.changes(records, "DPO", 1e-4, "chosen", at=1)
    assert between.tolist() == [[1.0, 2.0], [0.0, 0.0]]
