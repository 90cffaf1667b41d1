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
        ("Right: each item is in one part, and the joined parts are in order.", _share),
        (
            "You take every count-th item. The joined parts are then in another order. Take consecutive items.",
            lambda items, rank, count: items[rank::count],
        ),
        (
            "The items left over by the division are lost: 3 processes take 6 of 7 items. Give one more to each of the first processes.",
            lambda items, rank, count: items[
                rank * (len(items) // count) : (rank + 1) * (len(items) // count)
            ],
        ),
        (
            "The last process takes all items left over, and the others wait for it. Give one more to each of the first processes.",
            lambda items, rank, count: items[
                rank * (len(items) // count) : None
                if rank == count - 1
                else (rank + 1) * (len(items) // count)
            ],
        ),
        (
            "You rounded the length of a part up, so the last process has too few items, or none. Lengths may differ by one only.",
            lambda items, rank, count: items[
                rank * -(-len(items) // count) : (rank + 1) * -(-len(items) // count)
            ],
        ),
        (
            "The lengths are correct, but the last processes have the longer parts. The first processes should have them.",
            lambda items, rank, count: items[
                rank * len(items) // count : (rank + 1) * len(items) // count
            ],
        ),
        (
            "The lengths are correct, but the last processes have the longer parts. The first processes should have them.",
            lambda items, rank, count: _share(items[::-1], count - 1 - rank, count)[::-1],
        ),
        (
            "The first processes have one item more, but you did not move the start of the next parts: some items are done twice, "
            "and others never. Add `min(rank, left_over)` to the start.",
            lambda items, rank, count: items[rank * (len(items) // count) :][
                : len(items) // count + (rank < len(items) % count)
            ],
        ),
        (
            "Every process takes all items, so all work is done several times.",
            lambda items, rank, count: items,
        ),
        (
            "Ranks start at 0. You count them from 1.",
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
            return f"Of {n} items for {count} processes no process takes {missing[0]} (the items are q0, q1, ...). Yours gives {got}."
        if len(flat) > n:
            return f"Of {n} items for {count} processes some are taken twice. Yours gives {got}."
        right = [_share(items, rank, count) for rank in range(count)]
        if got != right:
            return f"{n} items for {count} processes should be {right}. Yours gives {got}."
    return "Your results could not be compared."  # cannot happen: one of the cases differs


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
            "Right: every item has the same weight, on any process.",
            lambda g, n: _weighted(g, n, sum(n), nan=0.0),
        ),
        ("nan times 0 is nan. Skip processes without items.", lambda g, n: _weighted(g, n, sum(n))),
        (
            "You averaged over processes. An item of a small part then has more weight. Multiply each gradient by its count.",
            lambda g, n: _weighted(g, [1] * len(n), len(n)),
        ),
        (
            "You averaged over the processes with items. An item of a small part then has more weight. "
            "Multiply each gradient by its count.",
            lambda g, n: _weighted(g, [int(c > 0) for c in n], sum(c > 0 for c in n), nan=0.0),
        ),
        (
            "You averaged over all processes. An item of a small part then has more weight. Multiply each gradient by its count.",
            lambda g, n: _weighted(g, [1] * len(n), len(n), nan=0.0),
        ),
        (
            "You added the means. Multiply each by its count, and divide the sum by the number of all items.",
            lambda g, n: _weighted(g, [1] * len(n), 1),
        ),
        (
            "You added the means. Multiply each by its count, and divide the sum by the number of all items.",
            lambda g, n: _weighted(g, [1] * len(n), 1, nan=0.0),
        ),
        (
            "That is the sum over all items. Divide it by their number.",
            lambda g, n: _weighted(g, n, 1, nan=0.0),
        ),
        (
            "That is the sum over all items. Divide it by their number. And nan times 0 is nan: skip processes without items.",
            lambda g, n: _weighted(g, n, 1),
        ),
        (
            "You divided the sum over all items by the number of processes. Divide it by the number of items.",
            lambda g, n: _weighted(g, n, len(n), nan=0.0),
        ),
        (
            "You divided the sum over all items by the number of processes. Divide it by the number of items. And nan times 0 is nan.",
            lambda g, n: _weighted(g, n, len(n)),
        ),
        (
            "You divided by the number of all items, but did not multiply each mean by its count first.",
            lambda g, n: _weighted(g, [1] * len(n), sum(n), nan=0.0),
        ),
        (
            "You divided by the number of all items, but did not multiply each mean by its count first.",
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
    return "Your results could not be compared."  # cannot happen: one of the cases differs


def _weighted(gradients, weights, divisor, nan=None) -> torch.Tensor:
    rows = torch.tensor(gradients, dtype=torch.float64)
    rows = rows if nan is None else rows.nan_to_num(nan)
    return (rows * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0) / divisor


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _list(tensor: torch.Tensor) -> list[float]:
    return [round(x, 4) for x in tensor.tolist()]


# bytes of all layers, of what is outside them, of the gradients; GPUs; micro-batches of a step on a GPU
SPLITS = {
    "8 GPUs, 2 micro-batches": (4_000, 1_000, 200, 8, 2),
    "2 GPUs, 1 micro-batch": (600, 90, 40, 2, 1),
    "64 GPUs, 4 micro-batches": (6_400, 640, 64, 64, 4),
    "one GPU": (4_000, 1_000, 200, 1, 2),
}


def sent_when_split(function) -> str:
    """Exercise 8.3: bytes that a GPU sends per optimiser step with split layers."""
    values = {}
    for name, case in SPLITS.items():
        values[name], message = number(function, *case)
        if message:
            return message
    strategies = [
        (
            "Right: most of the traffic is the base, which is gathered twice per micro-batch.",
            lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1) / p,
        ),
        (
            "You gathered the layers once. They are freed after the forward pass and gathered again for the backward pass.",
            lambda w, o, g, p, m: m * (w + o + g) * (p - 1) / p,
        ),
        (
            "You gathered `outside` twice. It is kept from the forward to the backward pass.",
            lambda w, o, g, p, m: m * (2 * w + 2 * o + g) * (p - 1) / p,
        ),
        (
            "You counted the gradients twice, as in an all-reduce. Each GPU needs the sum for its own part only: count them once.",
            lambda w, o, g, p, m: m * (2 * w + o + 2 * g) * (p - 1) / p,
        ),
        (
            "The gradients are missing: they are also summed in every micro-batch.",
            lambda w, o, g, p, m: m * (2 * w + o) * (p - 1) / p,
        ),
        ("`outside` is missing.", lambda w, o, g, p, m: m * (2 * w + g) * (p - 1) / p),
        (
            "You counted one micro-batch. Weights are gathered again in each.",
            lambda w, o, g, p, m: (2 * w + o + g) * (p - 1) / p,
        ),
        (
            "You counted the gradients once per step. With split layers every micro-batch ends with a reduce-scatter.",
            lambda w, o, g, p, m: (m * (2 * w + o) + g) * (p - 1) / p,
        ),
        (
            "You gathered the weights once per step. They are freed and gathered again in every micro-batch.",
            lambda w, o, g, p, m: (2 * w + o + m * g) * (p - 1) / p,
        ),
        (
            "A GPU does not send everything: in a ring it sends (gpus - 1) / gpus of what is gathered, and one GPU alone nothing.",
            lambda w, o, g, p, m: m * (2 * w + o + g),
        ),
        (
            "That is the traffic of all GPUs together. One GPU sends (gpus - 1) / gpus of what is gathered.",
            lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1),
        ),
        (
            "You multiplied by 1 / gpus, the part that a GPU already has. It sends (gpus - 1) / gpus.",
            lambda w, o, g, p, m: m * (2 * w + o + g) / p,
        ),
        (
            "That is the all-reduce of whole copies. Here weights are also sent.",
            lambda w, o, g, p, m: 2 * g * (p - 1) / p,
        ),
        (
            "You counted everything twice. `outside` is gathered once, and gradients are sent once.",
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
    return f"For {name} and {SPLITS[name][:3]} bytes it should be {strategies[0][1](*SPLITS[name]):,.0f}; yours gives {values[name]:,.0f}."


# bytes gathered per micro-batch, bytes per second of the link, weights, operations per second
BREAK_EVENS = [(60e9, 300e9, 70e9, 200e12), (8e9, 12e9, 8e9, 150e12), (1e9, 25e9, 0.5e9, 60e12)]


def hidden_from(function) -> str:
    """Exercise 8.4: tokens per micro-batch at which computing takes as long as sending."""
    values = []
    for case in BREAK_EVENS:
        value, message = number(function, *case)
        if message:
            return message
        values.append(value)
    strategies = [
        (
            "Right: from this number of tokens on, the traffic is hidden behind the computation.",
            lambda g, link, w, flops: g / link * flops / (6 * w),
        ),
        (
            "You counted one pass. Checkpointing needs three: forward, forward again, and backward.",
            lambda g, link, w, flops: g / link * flops / (2 * w),
        ),
        (
            "You counted two passes. Checkpointing needs three: forward, forward again, and backward.",
            lambda g, link, w, flops: g / link * flops / (4 * w),
        ),
        (
            "You counted one operation per weight. A multiplication and an addition are two.",
            lambda g, link, w, flops: g / link * flops / (3 * w),
        ),
        (
            "You counted one operation per weight and one pass. There are two operations and three passes.",
            lambda g, link, w, flops: g / link * flops / w,
        ),
        (
            "That is the inverse: divide the seconds of sending by the seconds of one token.",
            lambda g, link, w, flops: 6 * w * link / (g * flops),
        ),
        (
            "Those are the seconds of sending. Divide them by the seconds of computing one token.",
            lambda g, link, w, flops: g / link,
        ),
        (
            "Those are the seconds of computing one token. The seconds of sending are missing.",
            lambda g, link, w, flops: 6 * w / flops,
        ),
        (
            "A faster link takes *less* time: the seconds of sending are gathered / link.",
            lambda g, link, w, flops: g * link * flops / (6 * w),
        ),
        (
            "Sending takes gathered / link seconds, not link / gathered.",
            lambda g, link, w, flops: link / g * flops / (6 * w),
        ),
    ]
    for text, strategy in strategies:
        if all(_close(v, strategy(*case)) for v, case in zip(values, BREAK_EVENS)):
            return text
    case, mine = next(
        (c, v) for c, v in zip(BREAK_EVENS, values) if not _close(v, strategies[0][1](*c))
    )
    return (
        f"For {case} it should be {strategies[0][1](*case):,.1f} tokens. Yours gives {mine:,.1f}."
    )


def _close(a, b) -> bool:
    return math.isfinite(a) and abs(a - b) <= 1e-6 * max(1e-6, abs(b))
