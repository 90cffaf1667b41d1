"""Checks of the exercises in 01_sampling: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import math

import torch
from checks_common import call


def with_temperature(function) -> str:
    """Exercise 1.1: softmax(logits / temperature)."""
    z, temperature = torch.tensor([2.0, 1.0, 0.0, -1.0]), 2.0
    value, message = _numbers(function, 4, z, temperature)
    if message:
        return message
    plain, scaled = torch.softmax(z, -1), torch.exp(z / temperature)
    mistakes = {
        "The temperature has no effect: divide the logits by it before you take the exponential.": plain,
        "You multiplied the logits by the temperature. Then 2 sharpens where it should flatten: divide.": torch.softmax(
            z * temperature, -1
        ),
        "You divided the probabilities by the temperature: they no longer add up to 1. Divide the logits, before the softmax.": plain
        / temperature,
        "Your numbers do not add up to 1: divide the exponentials by their sum.": scaled,
        "These are logits divided by the temperature. Now take the exponential, and divide by the sum.": z
        / temperature,
        "You divided by the largest instead of by the sum, so the numbers do not add up to 1.": scaled
        / scaled.max(),
        "These are logarithms of probabilities: take the exponential once more.": torch.log_softmax(
            z / temperature, -1
        ),
        "You subtracted the temperature from the logits or added it. That changes nothing, since the softmax ignores a shift: divide.": torch.softmax(
            z - temperature, -1
        ),
    }
    if _same(value, scaled / scaled.sum()):
        batch = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        rows, message = call(function, batch, temperature)
        expected = torch.softmax(batch / temperature, -1)
        rows = torch.as_tensor(rows) if isinstance(rows, list) else rows
        alike = torch.is_tensor(rows) and rows.shape == expected.shape
        if not alike or not torch.allclose(rows, expected):
            return (
                "The formula is correct for one question. A batch has logits of shape (questions, vocabulary): divide by the sum "
                "over the last dimension, for example with torch.softmax(..., -1)."
            )
        cube = torch.arange(8.0).reshape(2, 2, 2) ** 2
        rows, message = call(function, cube, temperature)
        rows = torch.as_tensor(rows) if isinstance(rows, list) else rows
        if (
            message
            or not torch.is_tensor(rows)
            or not torch.allclose(rows, torch.softmax(cube / temperature, -1))
        ):
            return "Almost: logits of shape (2, 2, 2) fail. Divide by the sum over the *last* dimension, which is -1."
        large, message = _numbers(function, 2, torch.tensor([1000.0, 999.0]), 1.0)
        if message or not _same(large, torch.softmax(torch.tensor([1.0, 0.0]), -1)):
            return (
                "Right. One flaw to know of: for logits near 1,000 the exponentials overflow. Subtract the largest logit from all "
                "first, which changes nothing else; torch.softmax does so."
            )
        return "Right: the temperature divides the logits, and the probabilities add up to 1."
    return _name(value, mistakes) or (
        f"For logits {z.tolist()} and temperature {temperature} it should be {_text(scaled / scaled.sum())}; yours is {_text(value)}, "
        f"which adds up to {sum(value):.3g}."
    )


def nucleus(function) -> str:
    """Exercise 1b.1: the smallest set of most probable tokens whose mass reaches top_p."""
    p, top_p = [0.2, 0.4, 0.1, 0.3], 0.75
    value, message = _numbers(function, None, list(p), top_p)
    if message:
        return message
    if len(value) != len(p):
        return (
            f"There are {len(p)} tokens and you return {len(value)} numbers. Return one number for each token, in the order given, with 0 "
            "for those that are cut."
        )
    mistakes = {
        "You kept the correct tokens, but they add up to 0.9: divide each by the sum of the kept ones.": [
            0.2,
            0.4,
            0,
            0.3,
        ],
        "You stop one token too early: 0.4 + 0.3 is 0.7 and has not reached 0.75. Keep the token that reaches top_p.": [
            0,
            4 / 7,
            0,
            3 / 7,
        ],
        "You stop one token too early, and what is left is not divided by its sum.": [
            0,
            0.4,
            0,
            0.3,
        ],
        "Nothing was cut. Go through the tokens from the most probable one down, not in the order given, nor from the smallest up.": p,
        "The numbers are correct but in the order of their size. Put each back in the place of its token.": [
            4 / 9,
            3 / 9,
            2 / 9,
            0,
        ],
        "The numbers are in the order of their size and not divided by their sum.": [
            0.4,
            0.3,
            0.2,
            0,
        ],
        "You divided by top_p. Divide by the sum of what was kept, which is a little more.": [
            0.2 / 0.75,
            0.4 / 0.75,
            0,
            0.3 / 0.75,
        ],
        "You cut away everything. top_p is not a threshold for one token: it is compared with the sum of the kept ones.": [
            0,
            0,
            0,
            0,
        ],
        "You kept only the most probable token: that is greedy. Continue until the kept ones together reach top_p.": [
            0,
            1,
            0,
            0,
        ],
        "You kept the tail and cut the top.": [2 / 3, 0, 1 / 3, 0],
    }
    if not _same(value, [2 / 9, 4 / 9, 0, 3 / 9]):
        return _name(value, mistakes) or (
            f"For {p} and top_p {top_p} the kept ones are 0.4, 0.3 and 0.2, together 0.9, so it should be {_text([2 / 9, 4 / 9, 0, 3 / 9])}; "
            f"yours is {_text(value)}."
        )
    edge, message = _numbers(function, 3, [0.5, 0.25, 0.25], 0.5)
    if message or not _same(edge, [1, 0, 0]):
        return (
            "Almost: for 0.5, 0.25, 0.25 and top_p 0.5 the first token alone reaches 0.5, so it is kept alone; "
            f"yours {'is ' + _text(edge) if edge else 'fails there'}. Stop as soon as the mass is equal to top_p."
        )
    whole, message = _numbers(function, 3, [0.5, 0.25, 0.25], 1.0)
    if message or not _same(whole, [0.5, 0.25, 0.25]):
        return "Almost: with top_p 1 nothing should be cut, and yours cuts something."
    return "Right: the smallest set that reaches top_p, in its old order, adding up to 1."


def saved(function) -> str:
    """Exercise 1b.2: share of the positions that sharing the prompt saves."""
    prompt, lengths = 60, [10, 20, 30, 40]
    value, message = _number(function, prompt, list(lengths))
    if message:
        return message
    without, shared = 4 * prompt + 100, prompt + 100
    mistakes = {
        "That is the number of positions saved. Divide it by the positions without sharing.": without
        - shared,
        "You saved the prompt for all completions, but it still has to be computed once: it is saved (N - 1) times, not N.": 4
        * prompt
        / without,
        "You divided by the positions with sharing. Compare with what it costs without.": (
            without - shared
        )
        / shared,
        "That is the share that is left. Subtract it from 1.": shared / without,
        "You left the completions' own tokens out of the total.": (without - shared) / (4 * prompt),
        "You counted one completion's tokens only: add up all lengths.": 3
        * prompt
        / (4 * prompt + 10),
        "You took the mean length where the sum is needed: every completion has its own tokens.": 3
        * prompt
        / (4 * prompt + 25),
        "That is a percentage: return a share between 0 and 1.": 100 * (without - shared) / without,
        "That is how many times more it costs without sharing. Return the share that is saved.": without
        / shared,
    }
    right = (without - shared) / without
    if not _same([value], [right]):
        return _name([value], {text: [wrong] for text, wrong in mistakes.items()}) or (
            f"For a prompt of {prompt} tokens and completions of {lengths} it is ({without} - {shared}) / {without} = {right:.3f}; yours is {value:.4g}."
        )
    alone, message = _number(function, 60, [10])
    if message or not _same([alone], [0]):
        return "Almost: with a single completion nothing can be saved, so the result should be 0. Is N fixed in your function?"
    return f"Right: {100 * right:.0f} % of all positions in this case. The more completions a prompt has and the shorter they are, the more it is."


def pass_at_k(function) -> str:
    """Exercise 1.2: 1 - C(n - c, k) / C(n, k)."""
    n, c, k = 10, 4, 3
    value, message = _number(function, n, c, k)
    if message:
        return message
    none = math.comb(n - c, k) / math.comb(n, k)
    mistakes = {
        "That is 1 - (1 - c/n)^k, as if each of the k were drawn with replacement. Here k different ones are picked from the n; count with math.comb. "
        "The formula with powers is biased: too low on average.": 1 - (1 - c / n) ** k,
        "That is the probability that none of the k is correct. Subtract it from 1.": none,
        "That is the share of correct completions, pass@1. How does k enter?": c / n,
        "That is the probability that k draws with replacement are all incorrect. Count picks with math.comb, and subtract from 1.": (
            1 - c / n
        )
        ** k,
        "You multiplied c/n by k. Chances of events that can happen together do not add.": k
        * c
        / n,
        "1 is too much here. Do you divide with `//`, or cut k * c / n at 1? Chances of events that can happen together do not add.": min(
            1.0, k * c / n
        ),
        "That is the probability that all k are correct. One is enough: count the picks without any correct one.": math.comb(
            c, k
        )
        / math.comb(n, k),
        "You picked the k from the correct ones. Count the picks from the n - c incorrect ones.": 1
        - math.comb(c, k) / math.comb(n, k),
        "That is a number of picks, not a chance: divide by math.comb(n, k).": math.comb(n, k)
        - math.comb(n - c, k),
        "That is the probability of exactly one correct one. More than one also counts.": c
        * math.comb(n - c, k - 1)
        / math.comb(n, k),
    }
    if not _same([value], [1 - none]):
        return _name([value], {text: [wrong] for text, wrong in mistakes.items()}) or (
            f"For n = {n}, c = {c}, k = {k}: {math.comb(n - c, k)} of {math.comb(n, k)} picks contain no correct one, so it is {1 - none:.4f}; "
            f"yours is {value:.4g}."
        )
    for case, expected, why in (
        (
            (5, 4, 3),
            1.0,
            "there are fewer incorrect ones than k, so every pick contains a correct one",
        ),
        ((5, 0, 3), 0.0, "no completion is correct"),
        ((4, 1, 2), 0.5, "3 of the 6 picks contain the correct one"),
    ):
        value, message = _number(function, *case)
        if message or not _same([value], [expected]):
            return f"Almost: for n, c, k = {case} it should be {expected}, since {why}; yours {f'is {value:.4g}' if not message else 'fails there'}."
    return "Right: one minus the share of picks without a correct one. It is the mean over all picks, so it is unbiased."


def choose(function) -> str:
    """Exercise 1.3: the temperature with the most questions that have both kinds of completion."""
    n = 4
    counts = {
        0.3: [4, 4, 4, 4, 4, 0],
        0.7: [3, 4, 4, 1, 3, 4],
        1.0: [1, 2, 1, 1, 4, 0],
        1.3: [4, 4, 4, 0, 0, 0],
        2.0: [0, 0, 1, 0, 0, 0],
    }
    value, message = call(function, counts, n)
    if message:
        return message
    mistakes = {
        0.3: "You chose the temperature with the most correct completions. In the check's table nearly every question has only correct ones there, so it gives no pair.",
        0.7: "You chose the temperature at which most questions have a correct completion. They also need an incorrect one: c must also be below n.",
        1.3: "You chose the temperature at which half of all completions are correct. But each question has only correct or only "
        "incorrect ones. Look at the questions one by one.",
        2.0: "You chose the temperature at which most questions have an incorrect completion. They also need a correct one: c must also be above 0.",
    }
    try:
        value = float(value)
    except (TypeError, ValueError):
        return f"Return one temperature, a key of `counts`; your function returned {value!r}."
    if value == 0.7:
        other, message = _number(function, {0.5: [8, 8, 8], 1.0: [2, 8, 8]}, 8)
        if not message and other == 1.0:
            return (
                "With n = 4 your function chooses as if n were 8. Does it use its own argument `n`?"
            )
    if value in mistakes:
        return mistakes[value]
    if value != 1.0:
        hint = (
            " It looks like the share or number of usable questions; return the temperature where it is largest."
            if (value in (4, 4 / 6))
            else ""
        )
        return f"Your function returned {value:.4g}, which is not a temperature in the table ({', '.join(map(str, counts))}).{hint}"
    other, message = _number(function, {0.5: [8, 8, 8], 1.0: [2, 8, 8]}, 8)
    if message or other != 1.0:
        return "Almost: for {0.5: [8, 8, 8], 1.0: [2, 8, 8]} with n = 8 it should be 1.0: c must be below n."
    other, message = _number(function, {0.5: [2, 2, 0], 1.0: [2, 0, 0]}, 3)
    if message or other != 0.5:
        return (
            "Almost: for another table, {0.5: [2, 2, 0], 1.0: [2, 0, 0]} with n = 3, it should be 0.5. Does your function use "
            "its own arguments?"
        )
    other, message = _number(function, {0.5: [5, 5, 0], 1.0: [1, 1, 1]}, 10)
    if message or other != 1.0:
        return (
            "Almost: for {0.5: [5, 5, 0], 1.0: [1, 1, 1]} with n = 10 it should be 1.0. Do you count the pairs that could be made? A "
            "question counts once, whether one of its completions is correct or five."
        )
    return "Right: at this temperature most questions have both kinds of completion."


def _number(function, *arguments):
    value, message = call(function, *arguments)
    if message:
        return None, message
    try:
        return float(value), None
    except (TypeError, ValueError):
        return (
            None,
            f"Your function should return one number; it returned a {type(value).__name__}.",
        )


def _numbers(function, length, *arguments):
    value, message = call(function, *arguments)
    if message:
        return None, message
    try:
        value = [float(x) for x in (value.tolist() if hasattr(value, "tolist") else value)]
    except (TypeError, ValueError):
        return (
            None,
            f"Your function should return one number for each token; it returned a {type(value).__name__}.",
        )
    if length is not None and len(value) != length:
        return (
            None,
            f"There are {length} tokens and you return {len(value)} numbers: return one for each.",
        )
    return value, None


def _same(a, b) -> bool:
    a, b = list(map(float, a)), list(map(float, b))
    return len(a) == len(b) and all(abs(x - y) <= 1e-5 * max(1.0, abs(y)) for x, y in zip(a, b))


def _name(value, mistakes) -> str | None:
    """The text of the first wrong answer that equals the student's."""
    return next((text for text, wrong in mistakes.items() if _same(value, wrong)), None)


def _text(numbers) -> str:
    return "[" + ", ".join(f"{float(x):.3f}" for x in numbers) + "]"
