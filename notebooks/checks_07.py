"""Checks of the exercises in 07_real_models_on_one_gpu: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import math
import re

from checks_common import NO_RETURN, call, number

# layers, heads, kv_heads, head_dim, rows, columns, bytes of a number
CACHES = {
    "Llama-3.1-8B, 160 completions of 665 positions in 16 bits": (32, 32, 8, 128, 160, 665, 2),
    "Qwen2.5-0.5B, 3 completions of 100 positions in 32 bits": (24, 14, 2, 64, 3, 100, 4),
    "SmolLM2-1.7B, which shares nothing, one completion of 10 positions": (
        24,
        32,
        32,
        64,
        1,
        10,
        2,
    ),
}


def kv_cache_bytes(function) -> str:
    """Exercise 7.1: bytes of keys and values."""
    values = {}
    for name, case in CACHES.items():
        values[name], message = number(function, *case)
        if message:
            return message
    right = {name: _cache(*case) for name, case in CACHES.items()}
    if all(_close(values[name], right[name]) for name in right):
        gigabytes = next(iter(right.values())) / 1e9
        return f"Right: {gigabytes:.1f} GB for Llama-3.1-8B with 160 completions at once, more than the model itself in 4 bits."
    strategies = [
        (
            "You stored a key and a value for every head. Heads of a group share theirs: `kv_heads` of them are stored.",
            lambda n, h, g, d, r, c, b: 2 * n * h * d * r * c * b,
        ),
        (
            "Keys alone are half of it. The values are stored, too.",
            lambda n, h, g, d, r, c, b: n * g * d * r * c * b,
        ),
        (
            "You counted keys alone, and for every head. Keys and values are stored, for `kv_heads` heads.",
            lambda n, h, g, d, r, c, b: n * h * d * r * c * b,
        ),
        (
            "That is a number of numbers. Each takes `bytes_per_number` bytes.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d * r * c,
        ),
        (
            "You took 2 bytes for a number whatever `bytes_per_number` says.",
            lambda n, h, g, d, r, c, b: 4 * n * g * d * r * c,
        ),
        (
            "That is in bits. Eight of them are a byte.",
            lambda n, h, g, d, r, c, b: 16 * n * g * d * r * c * b,
        ),
        (
            "That is the cache of one block. Each of the `layers` blocks has its own.",
            lambda n, h, g, d, r, c, b: 2 * g * d * r * c * b,
        ),
        (
            "That is the cache of one completion. All `rows` that are under way have their own.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d * c * b,
        ),
        (
            "That is the cache of one position. Each of the `columns` positions has its own.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d * r * b,
        ),
        (
            "`head_dim` is missing: a key is a vector of that size.",
            lambda n, h, g, d, r, c, b: 2 * n * g * r * c * b,
        ),
        (
            "You divided by the heads once more: `head_dim` is the size of one head already.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d / h * r * c * b,
        ),
        ("That is in gigabytes. Return bytes.", lambda *case: _cache(*case) / 1e9),
        ("That is in gigabytes. Return bytes.", lambda *case: _cache(*case) / 2**30),
    ]
    for text, strategy in strategies:
        if all(_close(values[name], strategy(*case)) for name, case in CACHES.items()):
            return text
    name = next(name for name in right if not _close(values[name], right[name]))
    return f"For {name} it should be {right[name]:,} bytes; yours gives {values[name]:,.0f}."


TRAIN = [
    {"id": "train-0", "question": "Ann has 12 apples and eats 5. How many are left?"},
    {
        "id": "train-1",
        "question": "A ship of 1,200 tons carries 45 cars. How many tons is that a car?",
    },
    {
        "id": "train-2",
        "question": "A rope of 2.5 metres is cut into 5 pieces. How long is a piece?",
    },
]
TEST = [
    {"id": "same numbers", "question": "Ann has 12 apples and eats 5. How many are left?"},
    {"id": "other numbers", "question": "Ann has 8 apples and eats 31. How many are left?"},
    {
        "id": "numbers of the same length",
        "question": "Ann has 34 apples and eats 9. How many are left?",
    },
    {"id": "another name", "question": "Ben has 12 apples and eats 5. How many are left?"},
    {
        "id": "comma against none",
        "question": "A ship of 900 tons carries 45 cars. How many tons is that a car?",
    },
    {"id": "no number", "question": "Ann has apples and eats 5. How many are left?"},
    {
        "id": "capitals and spacing",
        "question": "ANN has  77 apples\nand eats 2. How many are LEFT?",
    },
    {
        "id": "point against none",
        "question": "A rope of 10 metres is cut into 4 pieces. How long is a piece?",
    },
    {"id": "a word more", "question": "Ann has 12 red apples and eats 5. How many are left?"},
]


def renumbered_twins(function) -> str:
    """Exercise 7.2: ids of test rows that equal a training question but for the numbers."""
    value, message = call(function, [dict(row) for row in TRAIN], [dict(row) for row in TEST])
    if message:
        return message
    if isinstance(value, (bool, int, float, str)):
        return f"Your function returned a {type(value).__name__}. Return a list of the ids of the test rows that are caught."
    try:
        value = list(value)
    except TypeError:
        return f"Your function returned a {type(value).__name__}. Return a list of the ids of the test rows that are caught."
    right = _twins()
    if value == right:
        return "Right: this net catches twins with other numbers, and no question with another word. Templates will give it much to do."
    if len(value) == len(TEST) and all(isinstance(x, bool) for x in value):
        return "That is a verdict for every test row. Return the ids of those that are caught."
    if value and all(isinstance(x, dict) for x in value):
        return "You return whole rows. Return their `id`."
    if value and all(x in [row["id"] for row in TRAIN] for x in value):
        return "These are ids of training rows. Return those of the test rows: they have to be taken out or replaced."
    if sorted(map(str, value)) == sorted(right):
        return "These are the right ids in another order. Keep the order of the test rows: a set has none."
    strategies = [
        (
            "You replaced digit by digit, so that 12 becomes two marks and 5 one. Replace a whole number at once: `\\d+` rather than `\\d`.",
            dict(mask=lambda text: re.sub(r"\d", "#", text)),
        ),
        (
            "You replaced digit by digit, and capitals and spacing still matter. Take `\\d+`, fold the case and drop the blanks.",
            dict(mask=lambda text: re.sub(r"\d", "#", text), fold=False),
        ),
        (
            "Capitals or spacing still matter in yours. Fold the case, and compare without blanks.",
            dict(fold=False),
        ),
        (
            "Capitals or spacing still matter in yours: fold the case as well, with `.casefold()`.",
            dict(fold="spacing"),
        ),
        (
            "Capitals or spacing still matter in yours: drop or join the blanks as well, with `split()`.",
            dict(fold="case"),
        ),
        (
            "1,200 became two marks with a comma between, so that it differs from 900. Let a number have a comma or point between its digits.",
            dict(mask=lambda text: re.sub(r"\d+", "#", text)),
        ),
        (
            "1,200 became two marks, and capitals and spacing still matter. Let a number have a comma or point between its digits, fold the "
            "case and drop the blanks.",
            dict(mask=lambda text: re.sub(r"\d+", "#", text), fold=False),
        ),
        (
            "2.5 became two marks with a point between. A decimal point belongs to the number, as the comma does.",
            dict(mask=lambda text: re.sub(r"\d+(?:,\d+)*", "#", text)),
        ),
        (
            "1,200 became two marks with a comma between. A comma between digits belongs to the number, as the point does.",
            dict(mask=lambda text: re.sub(r"\d+(?:\.\d+)*", "#", text)),
        ),
        (
            "You compared the questions as they are. Replace the numbers by a mark first.",
            dict(mask=lambda text: text),
        ),
        (
            "You compared the questions as they are. Replace the numbers by a mark first.",
            dict(mask=lambda text: text, fold=False),
        ),
        (
            "You took the numbers out and left no mark, so that a question without a number looks like one with it. Put a mark in its place.",
            dict(mask=lambda text: re.sub(r"\d[\d,.]*", "", text)),
        ),
        (
            "You took the numbers out and left no mark, so that a question without a number looks like one with it. Put a mark in its place.",
            dict(mask=lambda text: re.sub(r"\d+(?:[.,]\d+)*", "", text)),
        ),
        (
            "You left out the question that is the same with its numbers. It is a twin as well, and the worst.",
            dict(identical=False),
        ),
    ]
    for text, options in strategies:
        if value == _twins(**options):
            return text
    too_few, too_many = [i for i in right if i not in value], [i for i in value if i not in right]
    if too_few:
        row = next(row for row in TEST if row["id"] == too_few[0])
        return f"Yours does not catch {row['question']!r} ({row['id']})."
    return f"Yours catches {too_many[0]!r}, which it should not: more than a number is different there."


def _twins(
    mask=lambda text: re.sub(r"\d+(?:[.,]\d+)*", "#", text), fold=True, identical=True
) -> list[str]:
    def form(question):
        text = mask(question)
        text = "".join(text.split()) if fold in (True, "spacing") else text
        return text.casefold() if fold in (True, "case") else text

    seen, exact = {form(row["question"]) for row in TRAIN}, {row["question"] for row in TRAIN}
    return [
        row["id"]
        for row in TEST
        if form(row["question"]) in seen and (identical or row["question"] not in exact)
    ]


STAGES = [
    ("evaluation", 20),
    ("samples", 30),
    ("graded", 1),
    ("pairs", 1),
    ("adapter", 60),
    ("evaluation", 25),
]
KILLED = {
    "in the middle of sampling": 35,
    "in the middle of training": 100,
    "before anything was finished": 10,
    "in the very minute in which sampling was finished": 50,
    "at the very end": 137,
    "long after the end": 200,
}


def minutes_lost(function) -> str:
    """Exercise 7.3: minutes since the last stage that was finished."""
    values = {}
    for name, minute in KILLED.items():
        values[name], message = number(function, list(STAGES), minute)
        if message == NO_RETURN and len(values) > 1:
            return f"Killed {name}, your function returns nothing. Is there a `return` for the case that no stage is under way?"
        if message:
            return message
    right = {name: _lost(minute) for name, minute in KILLED.items()}
    if all(_close(values[name], right[name]) for name in right):
        return "Right: what was finished is kept. The longest of them is the most that can be lost."
    total = sum(minutes for _, minutes in STAGES)
    strategies = [
        (
            "You count everything since the start of the run. Stages that were finished are kept.",
            lambda m: m,
        ),
        (
            "That is the minute at which the last stage was finished. Asked is the time since then.",
            lambda m: m - _lost(m) if m <= total else total,
        ),
        (
            "That is what the stage under way still needed. Lost is what it had done already.",
            lambda m: _stage(m)[1] - _lost(m),
        ),
        (
            "That is the whole length of the stage under way. Lost is what it had done already.",
            lambda m: _stage(m)[1],
        ),
        (
            "A stage that ended in this very minute is safe: compare with `>`, not with `>=`.",
            lambda m: _lost(m, strict=False),
        ),
        (
            "After the end nothing is under way, and nothing can be lost: return 0.",
            lambda m: _lost(m, ends=False),
        ),
        (
            "A stage that ended in this very minute is safe, and after the end nothing can be lost.",
            lambda m: _lost(m, strict=False, ends=False),
        ),
        ("That is in hours. Return minutes.", lambda m: _lost(m) / 60),
    ]
    for text, strategy in strategies:
        if all(_close(values[name], strategy(minute)) for name, minute in KILLED.items()):
            return text
    name = next(name for name in right if not _close(values[name], right[name]))
    return (
        f"Killed {name} (minute {KILLED[name]} of stages of {', '.join(str(minutes) for _, minutes in STAGES)} minutes) "
        f"{right[name]:g} minutes are lost; yours gives {values[name]:g}."
    )


def _lost(minute: float, strict: bool = True, ends: bool = True) -> float:
    safe = 0
    for _, minutes in STAGES:
        if safe + minutes > minute or (not strict and safe + minutes == minute):
            return minute - safe
        safe += minutes
    return 0 if ends else minute - safe


def _stage(minute: float) -> tuple[str, float]:
    """The stage under way at that minute; one of no length after the end."""
    end = 0
    for name, minutes in STAGES:
        end += minutes
        if end > minute:
            return name, minutes
    return "", 0


def _cache(layers, heads, kv_heads, head_dim, rows, columns, bytes_per_number):
    return 2 * layers * kv_heads * head_dim * rows * columns * bytes_per_number


def _close(a, b) -> bool:
    return math.isfinite(a) and abs(a - b) <= 1e-6 * max(1.0, abs(b))
