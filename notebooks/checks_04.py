"""Checks of the exercises in notebooks 04 and 04b: each returns a sentence that begins with "Right"
or names the mistake."""

from __future__ import annotations

import dis
import math

import torch
from torch.nn.functional import logsigmoid

UNSOLVED = "Not solved yet: fill in the cell above and run it again."
NO_RETURN = "Your function returned None: is a `return` missing?"
PLACEHOLDER = "Your code ran, but the last line still returns `...`: return your result there."
ALPHA, BETA = 0.7, 0.3


# ------------------------------------------------------------------------------ exercise 4.1


def loss(function) -> str:
    """Exercise 4.1: `function(logps_chosen, logps_rejected, ref_chosen, ref_rejected, n_tokens,
    alpha, beta)`, per pair.

    A wrong value is traced to its term: the DPO term alone at alpha = 0, and the NLL term alone
    where policy and reference are equal, so that the DPO term is ln 2.
    """
    w, l, rw, rl, n = case = _case()
    value, message = _call(function, *case, ALPHA, BETA)
    if message:
        return message
    dpo, nll = -logsigmoid(BETA * ((w - rw) - (l - rl))), -w / n
    right = dpo + ALPHA * nll
    if _close(value, dpo.mean() - ALPHA * w.sum() / n.sum()):
        return f"In the NLL term: {OVER_BATCH} Also return one loss for each pair, not their mean."
    if message := _wrong_shape(value, right, mean_of=right):
        return message
    if _close(value, right):
        return _loss_trains(function, case) or (
            "Right: sums in the DPO term, and in the NLL term every chosen completion is divided "
            "by its own length."
        )
    whole = [
        (
            "In the NLL term: you used the log-probability of the reference. It has no gradient. "
            "Use that of the model in training.",
            dpo - ALPHA * rw / n,
        ),
        (
            "In the NLL term: you took the mean over the pairs. Return one loss for each pair.",
            dpo + ALPHA * nll.mean(),
        ),
        (
            "α is on the DPO term. That was the paper's first version; in Eq. 1 of version 3 it is "
            "on the NLL term.",
            ALPHA * dpo + nll,
        ),
        ("α is on both terms. In Eq. 1 it is on the NLL term alone.", ALPHA * (dpo + nll)),
        ("The NLL term is missing. This is DPO alone.", dpo),
        ("The DPO term is missing. This is SFT on the chosen completions.", ALPHA * nll),
    ]
    if message := _match(value, whole):
        return message
    if _close(_call(function, *case, 0.0, BETA)[0], value):
        return "The loss is the same whatever α is: the NLL term or its α is missing."
    wrong = [_dpo_term(function, case), _nll_term(function, case)]
    found = [message for message in wrong if message]
    return " ".join(found) if found else _compare(value, right)


def _loss_trains(function, case) -> str | None:
    """What is wrong with a loss of the correct value: no gradient, or inf at a large negative delta."""
    w, l, rw, rl, n = case
    chosen, rejected = w.clone().requires_grad_(), l.clone().requires_grad_()
    value, message = _call(function, chosen, rejected, rw, rl, n, ALPHA, BETA)
    if message:
        return message
    if not torch.is_tensor(value) or not value.requires_grad:
        return (
            "The values are correct, but they have no gradient, so nothing could be trained. Use "
            "tensors throughout, without `.item()`, `.detach()` or `torch.no_grad()`."
        )
    far = torch.full_like(w, -2_000.0).float()
    value, message = _call(function, far, 0 * far, 0 * far, 0 * far, n, 0.0, BETA)
    if message or torch.isfinite(torch.as_tensor(value)).all():
        return message
    return (
        "Right, with one flaw: where δ is very negative, the sigmoid is rounded to 0 and its "
        "logarithm is infinite. `torch.nn.functional.logsigmoid` avoids this."
    )


OVER_BATCH = (
    "you divided by the tokens of the whole batch, so a long chosen completion weighs more than a "
    "short one. Divide each chosen completion by its own number of tokens."
)


def _dpo_term(function, case) -> str | None:
    """What is wrong with the DPO term, which is the whole loss at alpha = 0."""
    w, l, rw, rl, n = case
    value, message = _call(function, *case, 0.0, BETA)
    ratio_w, ratio_l = w - rw, l - rl
    right = -logsigmoid(BETA * (ratio_w - ratio_l))
    if message or _close(value, right):
        return message
    mistakes = [
        (
            "you divided the log-probabilities by the length. Here they are plain sums; only the "
            "NLL term is divided.",
            -logsigmoid(BETA * (ratio_w - ratio_l) / n),
        ),
        ("β is missing.", -logsigmoid(ratio_w - ratio_l)),
        (
            "the reference is missing. The term compares log-ratios to the reference, not the "
            "log-probabilities.",
            -logsigmoid(BETA * (w - l)),
        ),
        (
            "chosen and rejected are swapped. This loss teaches the model to prefer the rejected "
            "completions.",
            -logsigmoid(BETA * (ratio_l - ratio_w)),
        ),
        (
            "the two log-ratios are added. The margin is their difference, chosen minus rejected.",
            -logsigmoid(BETA * (ratio_w + ratio_l)),
        ),
        ("the minus sign before log σ is missing.", -right),
        (
            "the logarithm is missing: it is -log σ(βδ), not -σ(βδ).",
            -torch.sigmoid(BETA * (ratio_w - ratio_l)),
        ),
    ]
    text = _match(value, mistakes) or f"with α = 0 {_compare(value, right)}"
    return f"In the DPO term: {text}"


def _nll_term(function, case) -> str | None:
    """What is wrong with the NLL term: the policy is the reference, so the DPO term is ln 2."""
    w, l, _, _, n = case
    value, message = _call(function, w, l, w, l, n, ALPHA, BETA)
    at_zero, _ = _call(function, w, l, w, l, n, 0.0, BETA)
    right = -ALPHA * w / n
    if message or not _is_tensor_like(value, w) or not _is_tensor_like(at_zero, w):
        return message
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    value = value - torch.as_tensor(at_zero, dtype=torch.float64).detach()
    if _close(value, right):
        return None
    mistakes = [
        (OVER_BATCH, (-ALPHA * w.sum() / n.sum()).expand(len(w))),
        (OVER_BATCH, -ALPHA * w / n.sum()),
        (
            "the sign is wrong. Log-probabilities are negative, so the loss needs minus "
            "α log M_θ(w|x) / |w|.",
            -right,
        ),
        (
            "it is not divided by the number of tokens, so long chosen completions pay more.",
            -ALPHA * w,
        ),
        (
            "you divided by the mean length of the batch. Each chosen completion is divided by its "
            "own length.",
            -ALPHA * w / n.double().mean(),
        ),
        (
            "you used the log-ratio to the reference. The NLL term has no reference.",
            torch.zeros_like(w),  # the policy is the reference here
        ),
        (
            "you took the rejected log-probability. The term raises the chosen completion.",
            -ALPHA * l / n,
        ),
    ]
    text = _match(value, mistakes) or f"with the DPO term cancelled {_compare(value, right)}"
    return f"In the NLL term: {text}"


# ------------------------------------------------------------------------------ exercise 4.2


def response_logps(function) -> str:
    """Exercise 4.2: `function(logits, input_ids, response_mask)` -> (rows,)."""
    first = _response_logps(
        function, prompt=4, mask=[[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    )
    if not first.startswith("Right"):
        return first
    second = _response_logps(function, prompt=6, mask=[[1, 0, 0], [1, 1, 1]])
    if not second.startswith("Right"):
        return (
            "Your function is correct for P = 4 and R = 5, but not for P = 6 and R = 3. Take P and R "
            "from the shapes of the arguments."
        )
    return first


def _response_logps(function, prompt: int, mask: list) -> str:
    """The verdict for a batch with `prompt` columns before the completions."""
    generator, mask = torch.Generator().manual_seed(0), torch.tensor(mask)
    rows, width, vocabulary = *mask.shape, 11
    logits = torch.randn(rows, prompt + width, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (rows, prompt + width), generator=generator)
    value, message = _call(function, logits, ids, mask)
    if message:
        return message

    def picked(scores, first):
        """Scores at the columns from `first` on, of the completion's tokens."""
        return scores[:, first : first + width].gather(-1, ids[:, prompt:, None]).squeeze(-1)

    logps = torch.log_softmax(logits, -1)
    per_token = picked(logps, prompt - 1)
    right = (per_token * mask).sum(-1)
    if _same_shape(value, per_token):
        both = _close(value, per_token * mask)
        return "You returned one number per token" + (
            ", and they are correct: only the sum over each row is missing."
            if both
            else ". Return one sum per row."
        )
    if message := _wrong_shape(value, right):
        return message
    whole = logps[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    mistakes = [
        (
            "The shift is missing: the logits of a column predict the *next* token, so the first "
            "token of the completion needs the logits of the last prompt column.",
            (picked(logps, prompt) * mask).sum(-1),
        ),
        (
            "You shifted one column too far: the first token of the completion needs the logits of "
            "the last prompt column.",
            (picked(logps, prompt - 2) * mask).sum(-1),
        ),
        ("The mask is missing: padding was counted.", per_token.sum(-1)),
        ("You averaged over the tokens. DPO needs sums.", right / mask.sum(-1)),
        ("You averaged over the padded width. DPO needs sums.", (per_token * mask).mean(-1)),
        (
            "You summed logits. Take `log_softmax` over the vocabulary first.",
            (picked(logits, prompt - 1) * mask).sum(-1),
        ),
        ("You summed probabilities. Sum their logarithms.", (per_token.exp() * mask).sum(-1)),
        ("You also counted the prompt. Only completion tokens are scored.", whole.sum(-1)),
        (
            "You also counted the prompt. Only completion tokens are scored.",
            whole[:, : prompt - 1].sum(-1) + right,
        ),
        ("The sign is wrong: these are log-probabilities, not losses.", -right),
    ]
    praise = "Right: shifted by one column, masked, and summed over the tokens of each completion."
    return _verdict(value, right, mistakes, praise)


# ------------------------------------------------------------------------------ exercise 4.3


class _Four(torch.nn.Module):
    """Log-probabilities of four pairs as parameters, in place of a model."""

    def __init__(self):
        super().__init__()
        w, l, *_ = _case()
        self.chosen, self.rejected = torch.nn.Parameter(w), torch.nn.Parameter(l)

    def forward(self):
        return self.chosen, self.rejected


class _CountedSGD(torch.optim.SGD):
    """Plain gradient descent that counts its steps."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


STEP = 2.0  # learning rate of the plain gradient steps of the check


def train_step(function) -> str:
    """Exercise 4.3: `function(score, optimizer, reference, n_tokens, alpha, beta)` -> loss.

    Two steps of plain gradient descent on four pairs are compared with the correct ones.
    """
    w, l, rw, rl, n = _case()
    reference, model = (rw, rl), _Four()
    optimizer = _CountedSGD(model.parameters(), STEP)
    start, after = _state(model), []
    values = []
    for _ in range(2):
        value, message = _call(function, model, optimizer, reference, n, ALPHA, BETA)
        if message == NO_RETURN and not _equal(_state(model), start):
            return "Your function trains, but it returned None: is a `return` missing?"
        if message:
            return message
        values.append(value)
        after.append(_state(model))
    if _equal(after[0], start):
        if optimizer.steps:
            return (
                "`optimizer.step()` ran, but without gradients: call `zero_grad()`, then `backward()` "
                "on the loss, then `step()`."
            )
        return "Nothing was trained: call `backward()` on the loss and then `optimizer.step()`."
    expected, losses = _right_steps(start, reference, n)
    if _equal(after[0], expected[0]) and _equal(after[1], expected[1]):
        return _returned(values[0], losses[0], start, after[0], reference)
    if _equal(after[0], expected[0]):
        return (
            "The first step is correct and the second is not: gradients add up unless you call "
            "`optimizer.zero_grad()`."
        )
    first = {
        "The loss grows: check the signs. This step lowers δ.": (-1.0, "mean", ALPHA),
        "You summed the loss over the pairs. Take the mean, or the step grows with the batch.": (
            1.0,
            "sum",
            ALPHA,
        ),
        "α is missing: the NLL term needs its weight.": (1.0, "mean", 1.0),
        "The NLL term is missing: this is a step of DPO alone.": (1.0, "mean", 0.0),
    }
    for text, (sign, how, alpha) in first.items():
        if _equal(after[0], _right_steps(start, reference, n, sign, how, alpha)[0][0]):
            return text
    if _equal(after[0], _right_steps(start, (rl, rw), n)[0][0]):
        return "The two references are swapped: `reference` is (chosen, rejected)."
    rises = _margin(after[0], reference) > _margin(start, reference)
    return "The parameters are not those of one step on the mean loss of Eq. 1. " + (
        "δ rises, but by another amount."
        if rises
        else "δ does not rise. Check the signs and the order of the arguments."
    )


def _right_steps(start, reference, n, sign=1.0, how="mean", alpha=ALPHA):
    """Log-probabilities after one and after two steps, and the losses before them."""
    (w, l), (rw, rl), states, losses = start, reference, [], []
    for _ in range(2):
        w, l = w.clone().requires_grad_(), l.clone().requires_grad_()
        per_pair = -logsigmoid(BETA * ((w - rw) - (l - rl))) - alpha * w / n
        loss = per_pair.mean() if how == "mean" else per_pair.sum()
        gradients = torch.autograd.grad(sign * loss, (w, l))
        w, l = (x.detach() - STEP * g for x, g in zip((w, l), gradients, strict=True))
        states.append((w, l))
        losses.append(loss.detach())
    return states, losses


def _returned(value, right, start, after, reference) -> str:
    """What is said of the returned loss when the steps are right."""
    if not _close(value, right):
        return (
            "The step is correct, but the returned number is not the loss before the step: "
            f"expected {right:.4f}, got {_text(value)}."
        )
    margins = [_margin(state, reference).item() for state in (start, after)]
    return f"Right: the mean of δ rises from {margins[0]:.2f} to {margins[1]:.2f} nats."


def _margin(state, reference):
    return ((state[0] - reference[0]) - (state[1] - reference[1])).mean()


def _state(model):
    return model.chosen.detach().clone(), model.rejected.detach().clone()


def _equal(a, b) -> bool:
    return all(_close(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------ notebook 04b


def lora_linear(cls) -> str:
    """Exercise 4b.1: a module `cls(base, r, a)` with parameters A and B next to a frozen base."""
    d_in, d_out, r, a = 6, 5, 2, 8
    torch.manual_seed(0)
    base = torch.nn.Linear(d_in, d_out, bias=False)
    layer, message = _call(cls, base, r, a)
    if message:
        return message
    if not isinstance(layer, torch.nn.Module):
        return f"{_name(layer)} is not a `torch.nn.Module`: LoRALinear should be a class."
    x = torch.randn(3, d_in)
    first, message = _call(layer, x)
    if message:
        return message
    shapes = {"A": (r, d_in), "B": (d_out, r)}
    for name, shape in shapes.items():
        matrix = getattr(layer, name, None)
        if not isinstance(matrix, torch.nn.Parameter):
            return f"`{name}` is missing or is not a `torch.nn.Parameter`. The check needs one."
        if tuple(matrix.shape) != shape:
            return f"`{name}` has shape {tuple(matrix.shape)}; with this base it is {shape}."
    if base.weight.requires_grad:
        return "The base is not frozen: call `base.requires_grad_(False)`."
    if not _same_shape(first, x @ base.weight.T):
        return f"The output should have shape {(3, d_out)}."
    if not layer.A.any():
        return "A and B are both zero: then neither ever gets a gradient. Draw A at random."
    if layer.B.any():
        return "B is not zero at the start, so the layer already differs from its base."
    with torch.no_grad():
        layer.B.copy_(torch.randn(d_out, r))
        plain, product = x @ base.weight.T, x @ layer.A.T @ layer.B.T
        mistakes = [
            ("The scale a / r is missing.", plain + product),
            ("The scale is a / r; you multiplied by a.", plain + a * product),
            ("The scale is a / r, not r / a.", plain + r / a * product),
            ("The scale is a / r; you divided by r alone.", plain + product / r),
            ("The base is missing: add its output to the adapter's.", a / r * product),
            ("The adapter is missing: A and B are not used.", plain),
            ("The adapter is subtracted. Add it.", plain - a / r * product),
        ]
        praise = "Right: the base alone at the start, and a scaled low-rank change after training."
        return _verdict(layer(x), plain + a / r * product, mistakes, praise)


def lora_parameters(function) -> str:
    """Exercise 4b.2: numbers in LoRA matrices of rank r on layers of these (out, in) shapes."""
    shapes, r = [(128, 128), (384, 128), (128, 384), (64, 128)], 4
    value, message = _call(function, shapes, r)
    if message:
        return message

    def count(of_layer):
        return torch.tensor(float(sum(of_layer(d_out, d_in) for d_out, d_in in shapes)))

    right = count(lambda a, b: r * (a + b))
    if message := _wrong_shape(value, right):
        return message
    both = count(lambda a, b: r * (a + b) + a * b)
    only_last = torch.tensor(float(r * sum(shapes[-1])))
    mistakes = [
        (
            "That is the size of the frozen weights. LoRA trains A and B next to them.",
            count(lambda a, b: a * b),
        ),
        ("You also counted the frozen weights. Only A and B are trained.", both),
        (
            "That is r times the weight itself. A and B are thin: (r, in) and (out, r).",
            count(lambda a, b: r * a * b),
        ),
        ("You counted A only: B of shape (out, r) is missing.", count(lambda a, b: r * b)),
        ("You counted B only: A of shape (r, in) is missing.", count(lambda a, b: r * a)),
        ("The rank is missing: A has r rows and B has r columns.", count(lambda a, b: a + b)),
        (
            "r occurs twice. A has r x in numbers and B out x r.",
            count(lambda a, b: r * r * (a + b)),
        ),
        ("You multiplied the sizes of A and B. Add them.", count(lambda a, b: r * a * r * b)),
        (
            "That is the first layer only. Add up all layers.",
            torch.tensor(float(r * sum(shapes[0]))),
        ),
        ("That is the last layer only. Is there an `=` where `+=` belongs?", only_last),
    ]
    frozen = int(count(lambda a, b: a * b))
    praise = (
        f"Right: {int(right):,} numbers for these {len(shapes)} layers of {frozen:,} weights. It "
        "grows with the width of a layer and not with its area."
    )
    return _verdict(value, right, mistakes, praise)


# ------------------------------------------------------------------------------ shared parts


def _case():
    """Four pairs of unlike sizes for which all the mistakes give different numbers; float64."""
    w, l, rw, rl = (
        torch.tensor(values, dtype=torch.float64)
        for values in (
            [-12.0, -30.5, -8.0, -3.0],
            [-15.0, -20.0, -9.0, -6.0],
            [-13.0, -29.0, -6.0, -3.5],
            [-13.5, -21.0, -5.0, -4.0],
        )
    )
    return w, l, rw, rl, torch.tensor([24, 60, 8, 3])


def _call(function, *arguments):
    """(result, None), or (None, message) where there is no result."""
    if function is None or function is ...:
        return None, UNSOLVED
    if not callable(function):
        return (
            None,
            f"Give the check your function itself, without calling it; it got {_name(function)}.",
        )
    try:
        value = function(*(x.clone() if torch.is_tensor(x) else x for x in arguments))
    except NotImplementedError:
        return None, UNSOLVED
    except Exception as error:  # noqa: BLE001   whatever a student's code raises is told
        return None, f"Your function raised {type(error).__name__}: {error}"
    if value is None:
        return None, NO_RETURN
    return (None, _unsolved(function)) if value is ... else (value, None)


def _unsolved(function) -> str:
    """What is said of a function that returns `...`: a stub has no other instructions."""
    if hasattr(function, "__code__") and len(list(dis.get_instructions(function))) > 4:
        return PLACEHOLDER
    return UNSOLVED


def _name(value) -> str:
    return f"a {type(value).__name__}"


def _same_shape(value, right: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == right.shape


def _is_tensor_like(value, right: torch.Tensor) -> bool:
    try:
        return torch.as_tensor(value, dtype=torch.float64).shape == right.shape
    except (TypeError, ValueError, RuntimeError):
        return False


def _wrong_shape(value, right: torch.Tensor, mean_of=None) -> str | None:
    """What is said of a result that is no tensor of the right shape."""
    try:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        what = f"a tensor of shape {tuple(right.shape)}" if right.dim() else "one number"
        return f"Your function returned {_name(value)}; it should return {what}."
    if value.shape == right.shape:
        return None
    if mean_of is not None and value.numel() == 1:
        one = value.reshape(())
        mean, total = _close(one, mean_of.mean()), _close(one, mean_of.sum())
        kind = "the mean" if mean else "the sum" if total else "one number"
        return (
            f"You returned {kind} over the pairs. Return one number for each pair, shape "
            f"{tuple(right.shape)}."
        )
    return f"The result should have shape {tuple(right.shape)}; yours has {tuple(value.shape)}."


def _match(value, mistakes) -> str | None:
    """The text of the first mistake that gives this value."""
    return next((text for text, wrong in mistakes if _close(value, wrong)), None)


def _verdict(value, right: torch.Tensor, mistakes, praise: str) -> str:
    """`praise` for the right value, the text of a known mistake, or both numbers side by side."""
    if _close(value, right):
        return praise
    return _match(value, mistakes) or _compare(value, right)


def _compare(value, right) -> str:
    return f"expected {_text(right)}, got {_text(value)}. Check each part of the formula."


def _close(a, b) -> bool:
    try:
        a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _text(value) -> str:
    values = torch.as_tensor(value, dtype=torch.float64).detach().flatten().tolist()
    return ", ".join("nan" if math.isnan(x) else f"{x:.4g}" for x in values)
