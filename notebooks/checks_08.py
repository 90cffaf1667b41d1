"""Checks of the exercises in 08_past_one_gpu: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import math

import torch
from checks_common import call, number

SHARES = [(7, 3), (6, 3), (2, 4), (11, 4), (5, 1)]  # items, processes


def share(function) -> str:
    """Exercise 8.1: consecutive parts of a list, one for each process."""
    parts = {}
    for n, count in SHARES:
        for rank in range(count):
            items = [f"q{i}" for i in range(n)]
            value, message = call(function, items, rank, count)
            if message:
                return message
            if isinstance(value, (str, bytes, dict, int, float)):
                return f"Your function returned a {type(value).__name__}. Return a list: the items of this process."
            try:
                parts[n, count, rank] = list(value)
            except TypeError:
                return f"Your function returned a {type(value).__name__}. Return a list: the items of this process."
    strategies = [
        (
            "Right: nothing is lost, nothing is done twice, and put one after the other the parts are in order.",
            _share,
        ),
        (
            "You deal the items out like cards. Put one part after the other, and they come out in another order: take consecutive ones.",
            lambda items, rank, count: items[rank::count],
        ),
        (
            "What is left over after the division gets lost: of 7 items 3 processes take 6. Give one more to the first ones.",
            lambda items, rank, count: items[
                rank * (len(items) // count) : (rank + 1) * (len(items) // count)
            ],
        ),
        (
            "The last process takes all that is left over. Then the others wait for it: give one more to each of the first ones.",
            lambda items, rank, count: items[
                rank * (len(items) // count) : None
                if rank == count - 1
                else (rank + 1) * (len(items) // count)
            ],
        ),
        (
            "You rounded the length of a part up. Then the last process has too little, or nothing: parts may differ by one.",
            lambda items, rank, count: items[
                rank * -(-len(items) // count) : (rank + 1) * -(-len(items) // count)
            ],
        ),
        (
            "The parts are fair, but the longer ones are the last. The first processes should have them, as in the module.",
            lambda items, rank, count: items[
                rank * len(items) // count : (rank + 1) * len(items) // count
            ],
        ),
        (
            "The parts are fair, but the longer ones are the last. The first processes should have them, as in the module.",
            lambda items, rank, count: _share(items[::-1], count - 1 - rank, count)[::-1],
        ),
        (
            "The first processes have one more, but the parts of the others begin where they would without it: some items are done twice, "
            "others never. Shift the beginning by `min(rank, left_over)`.",
            lambda items, rank, count: items[rank * (len(items) // count) :][
                : len(items) // count + (rank < len(items) % count)
            ],
        ),
        (
            "Every process takes all items, so that all of it is done several times.",
            lambda items, rank, count: items,
        ),
        (
            "Ranks begin at 0. You count them from 1.",
            lambda items, rank, count: _share(items, rank - 1, count),
        ),
    ]
    for text, strategy in strategies:
        if all(
            parts[n, count, rank] == strategy([f"q{i}" for i in range(n)], rank, count)
            for n, count, rank in parts
        ):
            return text
    for n, count in SHARES:
        items = [f"q{i}" for i in range(n)]
        got = [parts[n, count, rank] for rank in range(count)]
        if all(isinstance(part, list) for each in got for part in each) and any(got):
            return "You return the parts of all processes. Return the part of `rank` alone."
        flat = [item for part in got for item in part]
        if missing := [item for item in items if item not in flat]:
            return f"Of {n} items for {count} processes nobody takes {missing[0]} (the items are q0, q1, ...). Yours gives {got}."
        if len(flat) > n:
            return f"Of {n} items for {count} processes some are taken twice. Yours gives {got}."
        right = [_share(items, rank, count) for rank in range(count)]
        if got != right:
            return f"{n} items for {count} processes should be {right}. Yours gives {got}."
    return "Something is left over."  # cannot come: one of the cases differs


def _share(items: list, rank: int, count: int) -> list:
    each, left_over = divmod(len(items), count)
    start = rank * each + min(rank, left_over)
    return items[start : start + each + (rank < left_over)]


# gradients of means, and the numbers of items they are means of
PARTS = {
    "equal parts": ([[1.0, -2.0], [3.0, 4.0]], [4, 4]),
    "3 items and 1 item": ([[1.0, -2.0], [5.0, 6.0]], [3, 1]),
    "300, 20 and 80 tokens": ([[0.5, 0.1], [-1.0, 2.0], [0.25, 0.0]], [300, 20, 80]),
    "a process without items": ([[2.0, 1.0], [math.nan, math.nan], [4.0, -1.0]], [1, 0, 3]),
}


def combine(function) -> str:
    """Exercise 8.2: the gradient of the mean over all items from those of the parts' means."""
    values = {}
    for name, (gradients, counts) in PARTS.items():
        value, message = call(
            function, [torch.tensor(gradient) for gradient in gradients], list(counts)
        )
        if message:
            return message
        try:
            values[name] = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return (
                f"Your function returned a {type(value).__name__}. Return one tensor: the gradient."
            )
        if values[name].shape != (2,):
            return f"Your result has the shape {tuple(values[name].shape)}. It should be that of one gradient, here (2,)."
    strategies = [
        (
            "Right: every item counts the same, whoever had it.",
            lambda g, n: _weighted(g, n, sum(n), nan=0.0),
        ),
        (
            "nan times 0 is nan. Leave out processes without items.",
            lambda g, n: _weighted(g, n, sum(n)),
        ),
        (
            "You averaged over processes. With unequal parts an item of a small part then counts more: weigh each gradient by its count.",
            lambda g, n: _weighted(g, [1] * len(n), len(n)),
        ),
        (
            "You averaged over processes, and left out those without items. With unequal parts an item of a small part then counts more: weigh "
            "each gradient by its count.",
            lambda g, n: _weighted(g, [int(c > 0) for c in n], sum(c > 0 for c in n), nan=0.0),
        ),
        (
            "You averaged over all processes. With unequal parts an item of a small part then counts more: weigh each gradient by its count.",
            lambda g, n: _weighted(g, [1] * len(n), len(n), nan=0.0),
        ),
        (
            "You added the means. Each has to be weighed by its count, and the sum divided by all items.",
            lambda g, n: _weighted(g, [1] * len(n), 1),
        ),
        (
            "You added the means. Each has to be weighed by its count, and the sum divided by all items.",
            lambda g, n: _weighted(g, [1] * len(n), 1, nan=0.0),
        ),
        (
            "That is the sum over all items. Divide it by their number.",
            lambda g, n: _weighted(g, n, 1, nan=0.0),
        ),
        (
            "That is the sum over all items. Divide it by their number; and nan times 0 is nan: leave out processes without items.",
            lambda g, n: _weighted(g, n, 1),
        ),
        (
            "You divided the sum over all items by the number of processes. Divide it by the number of items.",
            lambda g, n: _weighted(g, n, len(n), nan=0.0),
        ),
        (
            "You divided the sum over all items by the number of processes. Divide it by the number of items; and nan times 0 is nan.",
            lambda g, n: _weighted(g, n, len(n)),
        ),
        (
            "You divided by the total without weighing each mean by its own count first.",
            lambda g, n: _weighted(g, [1] * len(n), sum(n), nan=0.0),
        ),
        (
            "You divided by the total without weighing each mean by its own count first.",
            lambda g, n: _weighted(g, [1] * len(n), sum(n)),
        ),
    ]
    for text, strategy in strategies:
        if all(_same(values[name], strategy(*case)) for name, case in PARTS.items()):
            return text
    for name, (gradients, counts) in PARTS.items():
        right = _weighted(gradients, counts, sum(counts), nan=0.0)
        if not _same(values[name], right):
            return f"For {name} it should be {_list(right)}; yours gives {_list(values[name])}."
    return "Something is left over."


def _weighted(gradients, weights, divisor, nan=None) -> torch.Tensor:
    rows = torch.tensor(gradients, dtype=torch.float64)
    rows = rows if nan is None else rows.nan_to_num(nan)
    return (rows * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0) / divisor


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _list(tensor: torch.Tensor) -> list[float]:
    return [round(x, 4) for x in tensor.tolist()]


# bytes of all layers, of what lies outside, of the gradients; cards, micro-batches of a step on one card
SPLITS = {
    "8 cards, 2 micro-batches": (4_000, 1_000, 200, 8, 2),
    "2 cards, 1 micro-batch": (600, 90, 40, 2, 1),
    "64 cards, 4 micro-batches": (6_400, 640, 64, 64, 4),
    "one card": (4_000, 1_000, 200, 1, 2),
}


def sent_when_split(function) -> str:
    """Exercise 8.3: bytes that a card sends per optimiser step where layers are split."""
    values = {}
    for name, case in SPLITS.items():
        values[name], message = number(function, *case)
        if message:
            return message
    strategies = [
        (
            "Right: nearly all of it is the base, which goes round twice in each micro-batch, whatever is trained.",
            lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1) / p,
        ),
        (
            "You gathered the layers once. They are given back after the forward pass and needed again in the backward pass.",
            lambda w, o, g, p, m: m * (w + o + g) * (p - 1) / p,
        ),
        (
            "You gathered what lies outside of the layers twice. It is kept from the forward to the backward pass.",
            lambda w, o, g, p, m: m * (2 * w + 2 * o + g) * (p - 1) / p,
        ),
        (
            "You let the gradients go round twice, as in an all-reduce. Each card needs the sum for its own part alone: once.",
            lambda w, o, g, p, m: m * (2 * w + o + 2 * g) * (p - 1) / p,
        ),
        (
            "The gradients are missing: they are summed in every micro-batch, too.",
            lambda w, o, g, p, m: m * (2 * w + o) * (p - 1) / p,
        ),
        (
            "What lies outside of the layers is missing.",
            lambda w, o, g, p, m: m * (2 * w + g) * (p - 1) / p,
        ),
        (
            "You counted one micro-batch. Weights are gathered anew in each of them.",
            lambda w, o, g, p, m: (2 * w + o + g) * (p - 1) / p,
        ),
        (
            "You summed the gradients once per step. With split layers every micro-batch ends with a reduce-scatter: a card has no room for "
            "the whole gradient.",
            lambda w, o, g, p, m: (m * (2 * w + o) + g) * (p - 1) / p,
        ),
        (
            "You gathered the weights once per step, and only the gradients in each micro-batch. The weights are given back every time.",
            lambda w, o, g, p, m: (2 * w + o + m * g) * (p - 1) / p,
        ),
        (
            "A card does not send all of it: in a ring each sends (cards - 1) / cards of what is gathered, and one card alone nothing.",
            lambda w, o, g, p, m: m * (2 * w + o + g),
        ),
        (
            "That is what all cards together send. One of them sends (cards - 1) / cards of what is gathered.",
            lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1),
        ),
        (
            "That is the part that a card has already. It sends (cards - 1) / cards.",
            lambda w, o, g, p, m: m * (2 * w + o + g) / p,
        ),
        (
            "You took the all-reduce of whole copies. Here weights travel as well.",
            lambda w, o, g, p, m: 2 * g * (p - 1) / p,
        ),
        (
            "You took everything to go round twice. What lies outside of the layers is gathered once, and gradients go round once.",
            lambda w, o, g, p, m: 2 * m * (w + o + g) * (p - 1) / p,
        ),
        (
            "That is in gigabytes. Return bytes.",
            lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1) / p / 1e9,
        ),
    ]
    for text, strategy in strategies:
        if all(_close(values[name], strategy(*case)) for name, case in SPLITS.items()):
            return text
    name = next(
        name for name, case in SPLITS.items() if not _close(values[name], strategies[0][1](*case))
    )
    return f"For {name}, {SPLITS[name][:3]} bytes, it should be {strategies[0][1](*SPLITS[name]):,.0f}; yours gives {values[name]:,.0f}."


def _close(a, b) -> bool:
    return math.isfinite(a) and abs(a - b) <= 1e-6 * max(1e-6, abs(b))
