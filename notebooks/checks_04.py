"""Checks of the exercises in 04_dpo_nll_training: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

UNSOLVED = "Not solved yet: fill in the cell above and run it again."
ALPHA, BETA = 0.7, 0.3


def loss(function) -> str:
    """Exercise 4.1: `function(logps_chosen, logps_rejected, ref_chosen, ref_rejected, n_tokens, alpha, beta)`, per pair."""
    w, l, rw, rl, n = case = _case()
    value, message = _call(function, *case, ALPHA, BETA)
    if message:
        return message
    ratio_w, ratio_l = w - rw, l - rl
    dpo, nll = -logsigmoid(BETA * (ratio_w - ratio_l)), -w / n
    right = dpo + ALPHA * nll
    if message := _wrong_shape(value, right, mean_of=right):
        return message
    mistakes = [
        (
            "The sign of the NLL is turned round: log-probabilities are negative, so the loss needs minus α log M(w|x) / |w|.",
            dpo - ALPHA * nll,
        ),
        (
            "α stands before the DPO term. That was the paper's first version; in Eq. 1 of version 3 it weighs the NLL.",
            ALPHA * dpo + nll,
        ),
        ("α is missing: the NLL term is added with weight 1 whatever α is.", dpo + nll),
        (
            "The NLL is not divided by the winner's number of tokens, so long winners pay more.",
            dpo - ALPHA * w,
        ),
        (
            "You divided the NLL by the mean length of the batch. Each winner is divided by its own length.",
            dpo - ALPHA * w / n.float().mean(),
        ),
        (
            "You divided the log-probabilities in the DPO term by the length, too. There they are plain sums; only the NLL is divided.",
            -logsigmoid(BETA * (ratio_w - ratio_l) / n) + ALPHA * nll,
        ),
        ("β is missing in the DPO term.", -logsigmoid(ratio_w - ratio_l) + ALPHA * nll),
        (
            "The reference is missing: the DPO term compares ratios to M_t, not the log-probabilities themselves.",
            -logsigmoid(BETA * (w - l)) + ALPHA * nll,
        ),
        (
            "Winner and loser have changed places in the margin: this loss teaches the model to prefer the losers.",
            -logsigmoid(BETA * (ratio_l - ratio_w)) + ALPHA * nll,
        ),
        (
            "The two log-ratios are added. The margin is their difference, winner minus loser.",
            -logsigmoid(BETA * (ratio_w + ratio_l)) + ALPHA * nll,
        ),
        ("The minus sign before log σ is missing in the DPO term.", -dpo + ALPHA * nll),
        (
            "The logarithm before σ is missing in the DPO term: it is -log σ(h), not -σ(h).",
            -torch.sigmoid(BETA * (ratio_w - ratio_l)) + ALPHA * nll,
        ),
        (
            "The NLL uses the ratio to the reference. Its log-probability is the model's own: no reference in it.",
            dpo - ALPHA * ratio_w / n,
        ),
        ("The NLL term is missing. This is DPO alone.", dpo),
        ("The DPO term is missing. This is SFT on the winners.", ALPHA * nll),
        ("The NLL takes the loser's log-probability. It raises the winner.", dpo - ALPHA * l / n),
    ]
    return _verdict(
        value,
        right,
        mistakes,
        "Right: a sum in the ratio, a mean in the NLL, and every winner with its own length.",
    )


def gradient_rejected(function) -> str:
    """Exercise 4.2: derivative of the loss per pair with respect to the loser's log-probability."""
    w, l, rw, rl, n = case = _case()
    value, message = _call(function, *case, ALPHA, BETA)
    if message:
        return message
    h = BETA * ((w - rw) - (l - rl))
    right = BETA * torch.sigmoid(-h)
    if message := _wrong_shape(value, right, mean_of=right):
        return message
    mistakes = [
        (
            "The sign is wrong: with it training would raise the losers. Two minus signs meet here, one from -σ(-h), one from h's "
            "minus before the loser.",
            -right,
        ),
        (
            "You have σ(h) where σ(-h) belongs: the push must be strong while the pair is ordered wrongly, and fade afterwards.",
            BETA * torch.sigmoid(h),
        ),
        (
            "β is missing. h contains β times the loser's log-probability, so β comes out as a factor.",
            torch.sigmoid(-h),
        ),
        (
            "This is the derivative for the winner. The loser does not stand in the NLL, and its sign is the other one.",
            -right - ALPHA / n,
        ),
        (
            "α / |w| does not belong here: the NLL term does not contain the loser.",
            right - ALPHA / n,
        ),
        (
            "α / |w| does not belong here: the NLL term does not contain the loser.",
            right + ALPHA / n,
        ),
        (
            "This is the derivative with respect to h. Multiply by that of h with respect to the loser's log-probability, -β.",
            -torch.sigmoid(-h),
        ),
        (
            "You took σ'(h) = σ(h)(1 - σ(h)); but it is the *logarithm* of σ that is differentiated, which gives σ(-h).",
            BETA * torch.sigmoid(h) * torch.sigmoid(-h),
        ),
        (
            "α does not belong here: it weighs the NLL term, which does not contain the loser.",
            ALPHA * right,
        ),
        (
            "The reference is missing in h: take ratios to M_t.",
            BETA * torch.sigmoid(-BETA * (w - l)),
        ),
    ]
    return _verdict(
        value,
        right,
        mistakes,
        "Right: always positive, so the loser is always pushed down, at most with force β, and "
        "less and less as the margin grows. Autograd gives the same.",
    )


def batch_nll(function) -> str:
    """Exercise 4.3: the mended NLL, `function(token_logps, mask)` -> one number."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    logps = -torch.tensor(
        [[3.0, 1.0, 2.0, 2.5, 1.0, 2.5], [0.5, 0.25, 0, 0, 0, 0], [1.0, 0.5, 0.75, 0, 0, 0]]
    )
    value, message = _call(function, logps, mask)
    if message:
        return message
    sums, lengths = logps.sum(-1), mask.sum(-1)
    right = -(sums / lengths).mean()
    if message := _wrong_shape(value, right, per_pair=-sums / lengths):
        return message
    mistakes = [
        (
            "Not solved yet: it still divides by the tokens of the whole batch, so that the winner of 6 tokens weighs three times as "
            "much as the winner of 2. Each winner is to be divided by its own number of tokens first.",
            -sums.sum() / lengths.sum(),
        ),
        (
            "You averaged over the padded width: the zeros of the padding count as perfect tokens. Divide by `mask.sum(-1)`.",
            -logps.mean(),
        ),
        (
            "You divided by the number of winners only: this is the mean *sum* of each winner, and long winners pay more.",
            -sums.mean(),
        ),
        (
            "The sign is turned round: log-probabilities are negative, and a loss that falls should raise them.",
            -right,
        ),
        (
            "You added the winners up. Take their mean, or the loss grows with the batch.",
            -(sums / lengths).sum(),
        ),
        (
            "You divided every winner by the longest one's length. Each has its own: `mask.sum(-1)`.",
            -(sums / lengths.max()).mean(),
        ),
        (
            "You divided by the mean length of the batch, which is the mean over all tokens in another dress. Each winner has its own "
            "length.",
            -(sums / lengths.float().mean()).mean(),
        ),
        (
            "The sum goes over the wrong dimension: it adds up the columns of different winners. Sum over the last one, the tokens.",
            -(logps.sum(0) / mask.sum(0)).mean(),
        ),
    ]
    verdict = _verdict(
        value,
        right,
        mistakes,
        "Right: each winner is divided by its own length, and then all winners weigh the same.",
    )
    if verdict.startswith("Right"):
        padded, _ = _call(function, torch.where(mask.bool(), logps, torch.tensor(-7.0)), mask)
        if padded is None or not _close(padded, right):
            return (
                "Nearly: it fits where `token_logps` is 0 on padding, but yours counts padding that is not 0. Do multiply "
                "`token_logps` by the mask before you sum."
            )
    return verdict


def lora_parameters(function) -> str:
    """Exercise 4.4: numbers in LoRA matrices of rank r on layers of these (out, in) shapes."""
    shapes, r = [(128, 128), (384, 128), (128, 384), (64, 128)], 4
    value, message = _call(function, shapes, r)
    if message:
        return message
    count = lambda f: sum(f(a, b) for a, b in shapes)  # noqa: E731
    right = count(lambda a, b: r * (a + b))
    if message := _wrong_shape(value, torch.tensor(float(right))):
        return message
    mistakes = [
        (
            "That is the size of the frozen weights. LoRA trains A and B beside them.",
            count(lambda a, b: a * b),
        ),
        (
            "You counted the frozen weights as well as the adapter. Only A and B are trained.",
            right + count(lambda a, b: a * b),
        ),
        (
            "That is r times the weight itself. A and B are thin: (r, in) and (out, r).",
            count(lambda a, b: r * a * b),
        ),
        ("You counted A only: B of shape (out, r) is missing.", count(lambda a, b: r * b)),
        ("You counted B only: A of shape (r, in) is missing.", count(lambda a, b: r * a)),
        (
            "The rank is missing: each side of the layer meets r rows or columns.",
            count(lambda a, b: a + b),
        ),
        (
            "r comes in twice. A has r x in numbers and B out x r.",
            count(lambda a, b: r * r * (a + b)),
        ),
        (
            "You multiplied the sizes of A and B. They stand side by side: add them.",
            count(lambda a, b: r * a * r * b),
        ),
        ("That is the first layer only. Add up all layers.", r * sum(shapes[0])),
        (
            "That is the last layer only: the sum over layers is lost. Is a `return` inside the loop, or an `=` where `+=` belongs?",
            r * sum(shapes[-1]),
        ),
    ]
    mistakes = [(text, torch.tensor(float(wrong))) for text, wrong in mistakes]
    return _verdict(
        value,
        torch.tensor(float(right)),
        mistakes,
        f"Right: {right:,} numbers for these {len(shapes)} layers of {count(lambda a, b: a * b):,} weights. It grows with the "
        "width of a layer and not with its area, so the share falls as models grow.",
    )


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
    """(result, None), or (None, message) where there is nothing to look at."""
    if function is None or function is ...:
        return None, UNSOLVED
    if not callable(function):
        return (
            None,
            f"Give the check your function itself, without calling it; it got a {type(function).__name__}.",
        )
    try:
        value = function(*(x.clone() if torch.is_tensor(x) else x for x in arguments))
    except NotImplementedError:
        return None, UNSOLVED
    except Exception as error:  # noqa: BLE001   whatever a student's code raises is told
        return None, f"Your function raised {type(error).__name__}: {error}"
    return (None, UNSOLVED) if value is None or value is ... else (value, None)


def _wrong_shape(value, right: torch.Tensor, mean_of=None, per_pair=None) -> str | None:
    """What is said of a result that is no tensor of the right shape."""
    try:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        what = f"a tensor of shape {tuple(right.shape)}" if right.dim() else "one number"
        return f"Your function returned a {type(value).__name__}; it should return {what}."
    if value.shape == right.shape:
        return None
    if mean_of is not None and value.numel() == 1:
        kind = (
            "the mean"
            if _close(value.reshape(()), mean_of.mean())
            else "the sum"
            if _close(value.reshape(()), mean_of.sum())
            else "one number"
        )
        return f"You returned {kind} over the pairs. Return one number for each pair, shape {tuple(right.shape)}."
    if per_pair is not None and value.shape == per_pair.shape:
        return "That is one number for each winner" + (
            ", and they are right: only their mean is missing."
            if _close(value, per_pair)
            else ". Return their mean."
        )
    return f"The result should have shape {tuple(right.shape)}; yours has {tuple(value.shape)}."


def _verdict(value, right: torch.Tensor, mistakes, praise: str) -> str:
    """`praise` for the right value, the text of the first mistake that gives the same, or both numbers side by side."""
    if _close(value, right):
        return praise
    for text, wrong in mistakes:
        if _close(value, wrong):
            return text
    return f"It should be {_text(right)} here; yours gives {_text(value)}. Compare the two term by term with the formula above."


def _close(a, b) -> bool:
    try:
        a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _text(value) -> str:
    values = torch.as_tensor(value, dtype=torch.float64).detach().flatten().tolist()
    return ", ".join(f"{x:.4g}" for x in values)
