"""Checks of the exercises in notebooks 07 and 07b: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import math
import re

from checks_common import NO_RETURN, call, number

# layers, heads, kv_heads, head_dim, rows, columns, bytes of a number
CACHES = {
    "Llama-3.1-8B, 160 completions of 665 positions in 16 bits": (32, 32, 8, 128, 160, 665, 2),
    "Qwen2.5-0.5B, 3 completions of 100 positions in 32 bits": (24, 14, 2, 64, 3, 100, 4),
    "SmolLM2-1.7B, whose heads share nothing, one completion of 10 positions": (
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
    """Exercise 7.2: bytes of keys and values."""
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
            "You stored a key and a value for every head. The heads of a group share them: only `kv_heads` are stored.",
            lambda n, h, g, d, r, c, b: 2 * n * h * d * r * c * b,
        ),
        (
            "Keys alone are half of it. The values are also stored.",
            lambda n, h, g, d, r, c, b: n * g * d * r * c * b,
        ),
        (
            "You counted keys alone, and for every head. The cache stores keys and values for `kv_heads` heads.",
            lambda n, h, g, d, r, c, b: n * h * d * r * c * b,
        ),
        (
            "You counted the numbers. Each number takes `bytes_per_number` bytes.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d * r * c,
        ),
        (
            "You used 2 bytes per number. Use `bytes_per_number`.",
            lambda n, h, g, d, r, c, b: 4 * n * g * d * r * c,
        ),
        (
            "Your result is in bits. Return bytes.",
            lambda n, h, g, d, r, c, b: 16 * n * g * d * r * c * b,
        ),
        (
            "That is the cache of one layer. Multiply by `layers`.",
            lambda n, h, g, d, r, c, b: 2 * g * d * r * c * b,
        ),
        (
            "That is the cache of one completion. Multiply by `rows`.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d * c * b,
        ),
        (
            "That is the cache of one position. Multiply by `columns`.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d * r * b,
        ),
        (
            "`head_dim` is missing: a key is a vector of `head_dim` numbers.",
            lambda n, h, g, d, r, c, b: 2 * n * g * r * c * b,
        ),
        (
            "Do not divide by the number of heads: `head_dim` is already the size of one head.",
            lambda n, h, g, d, r, c, b: 2 * n * g * d / h * r * c * b,
        ),
        ("Your result is in gigabytes. Return bytes.", lambda *case: _cache(*case) / 1e9),
        ("Your result is in gigabytes. Return bytes.", lambda *case: _cache(*case) / 2**30),
    ]
    for text, strategy in strategies:
        if all(_close(values[name], strategy(*case)) for name, case in CACHES.items()):
            return text
    name = next(name for name in right if not _close(values[name], right[name]))
    return f"For {name} the cache has {right[name]:,} bytes; your function returned {values[name]:,.0f}."


# gain and half-width of its interval in points, questions
GAINS = {
    "a gain of 3 points with a half-width of 4.25 on 200 questions": (3.0, 4.25, 200),
    "a gain of 0.5 points with a half-width of 2 on 1,319 questions": (0.5, 2.0, 1319),
    "a gain of 5 points with a half-width of 1 on 90 questions": (5.0, 1.0, 90),
    "a gain of 7 points with a half-width of 9 on 150 questions": (7.0, 9.0, 150),
}


def questions_needed(function) -> str:
    """Exercise 7.3: questions until the interval of a gain excludes 0."""
    values = {}
    for name, case in GAINS.items():
        values[name], message = number(function, *case)
        if message:
            return message
    right = {name: _needed(*case) for name, case in GAINS.items()}
    if all(_close(values[name], right[name]) for name in right):
        first = next(iter(right.values()))
        return (
            f"Right: {first} questions for a gain of 3 points. Half the gain needs four times as "
            "many questions."
        )
    strategies = [
        (
            "You scaled with the ratio itself. The half-width falls with the square root of the "
            "number of questions, so square the ratio.",
            lambda g, h, n: math.ceil(n * h / g),
        ),
        (
            "You took the square root of the ratio. The half-width falls with the square root of "
            "the number of questions, so square the ratio.",
            lambda g, h, n: math.ceil(n * math.sqrt(h / g)),
        ),
        (
            "Your ratio is upside down: a wide interval needs more questions, not fewer.",
            lambda g, h, n: math.ceil(n * (g / h) ** 2),
        ),
        (
            "You doubled the half-width. The interval excludes 0 as soon as its half-width is "
            "smaller than the gain.",
            lambda g, h, n: math.ceil(n * (2 * h / g) ** 2),
        ),
        (
            "That is how many questions are missing. Return how many are needed in total.",
            lambda g, h, n: _needed(g, h, n) - n,
        ),
        ("`n` is missing. Multiply the squared ratio by `n`.", lambda g, h, n: (h / g) ** 2),
        (
            "You rounded down, and the interval would still include 0. Round up with `math.ceil`.",
            lambda g, h, n: math.floor(n * (h / g) ** 2),
        ),
        (
            "Return a whole number of questions: round up with `math.ceil`.",
            lambda g, h, n: n * (h / g) ** 2,
        ),
    ]
    for text, strategy in strategies:
        if all(_close(values[name], strategy(*case)) for name, case in GAINS.items()):
            return text
    name = next(name for name in right if not _close(values[name], right[name]))
    return (
        f"For {name} it takes {right[name]:,} questions; your function returned {values[name]:,g}."
    )


def _needed(gain: float, half_width: float, n: int) -> int:
    return math.ceil(n * (half_width / gain) ** 2)


RUNS_TRAIN = [
    {
        "id": "train-0",
        "question": "One two three four five six seven eight nine ten eleven twelve thirteen.",
    },
    {"id": "train-1", "question": "Ann has 5 pears, Ben has 7."},
]
RUNS_TEST = [
    {
        "id": "the same",
        "question": "One two three four five six seven eight nine ten eleven twelve thirteen.",
    },
    {"id": "a run of four", "question": "Zero two three four five nine."},
    {"id": "a run of five", "question": "Zero two three four five six nine."},
    {"id": "a run of three", "question": "Zero two three four nine."},
    {"id": "another order", "question": "Seven six five four three two one."},
    {"id": "capitals", "question": "TWO three FOUR five zero."},
    {"id": "punctuation", "question": "Zero two, three; four: five!"},
    {"id": "at the end", "question": "Zero four zero ten eleven twelve thirteen."},
    {"id": "across two questions", "question": "Twelve thirteen Ann has."},
    {"id": "numbers are words", "question": "Cleo has 5 pears, Ben too."},
    {"id": "short", "question": "Six seven."},
]


def shared_runs(function) -> str:
    """Exercise 7b.1: ids of test rows that share n words in a row with a training question."""
    rows = [dict(row) for row in RUNS_TRAIN], [dict(row) for row in RUNS_TEST]
    value, message = call(function, *rows, 4)
    if message:
        return message
    if not isinstance(value, list):
        return (
            f"Your function returned a {type(value).__name__}. Return a list of the ids of the "
            "matching test rows."
        )
    right = _shared()
    if value == right:
        return "Right: with n = 13 this is the check of Brown et al. (2020)."
    if value and all(isinstance(x, dict) for x in value):
        return "You return whole rows. Return each row's `id`."
    if value and all(x in [row["id"] for row in RUNS_TRAIN] for x in value):
        return "These are ids of training rows. Return the ids of the matching test rows."
    if sorted(map(str, value)) == sorted(right):
        return "These are the correct ids in another order. Keep the order of the test rows."
    strategies = [
        (
            "Capitals or punctuation still matter. Take the words with "
            '`re.findall(r"\\w+", text.casefold())`.',
            dict(words=str.split),
        ),
        (
            "Capitals still matter. Use `.casefold()`.",
            dict(words=lambda text: re.findall(r"\w+", text)),
        ),
        (
            'Punctuation still matters. Take the words with `re.findall(r"\\w+", ...)`.',
            dict(words=lambda text: text.casefold().split()),
        ),
        ("Your runs have one word too few: use n words.", dict(n=3)),
        (
            "Your runs have one word too many, or you skip the last run: there are "
            "`len(words) - n + 1` runs.",
            dict(n=5),
        ),
        (
            "You skip the last run of each question: there are `len(words) - n + 1` runs.",
            dict(last=0),
        ),
        ("You used n = 13. Use the argument `n`.", dict(n=13)),
    ]
    for text, options in strategies:
        if value == _shared(**options):
            return text
    for name in right:
        if name not in value:
            return f"Your function does not find {name!r}."
    extra = next(x for x in value if x not in right)
    return f"Your function finds {extra!r}, which has no 4 words in a row in common with one training question."


def _shared(words=lambda text: re.findall(r"\w+", text.casefold()), n=4, last=1) -> list[str]:
    def found(question):
        listed = words(question)
        return {tuple(listed[i : i + n]) for i in range(len(listed) - n + last)}

    known = {run for row in RUNS_TRAIN for run in found(row["question"])}
    return [row["id"] for row in RUNS_TEST if found(row["question"]) & known]


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
    {"id": "capitals", "question": "ANN has 77 apples and eats 2. How many are LEFT?"},
    {"id": "spacing", "question": "Ann has  77 apples\nand eats 2. How many are left?"},
    {
        "id": "point against none",
        "question": "A rope of 10 metres is cut into 4 pieces. How long is a piece?",
    },
    {"id": "a word more", "question": "Ann has 12 red apples and eats 5. How many are left?"},
]


def renumbered_twins(function) -> str:
    """Exercise 7b.2: ids of test rows that equal a training question except for the numbers."""
    value, message = call(function, [dict(row) for row in TRAIN], [dict(row) for row in TEST])
    if message:
        return message
    if isinstance(value, (bool, int, float, str)):
        return f"Your function returned a {type(value).__name__}. Return a list of the ids of the matching test rows."
    try:
        value = list(value)
    except TypeError:
        return f"Your function returned a {type(value).__name__}. Return a list of the ids of the matching test rows."
    right = _twins()
    if value == right:
        return "Right: this check finds twins with other numbers and no question with other words. It will find many in files made from templates."
    if len(value) == len(TEST) and all(isinstance(x, bool) for x in value):
        return "You return True or False for every test row. Return the ids of the matching rows."
    if value and all(isinstance(x, dict) for x in value):
        return "You return whole rows. Return each row's `id`."
    if value and all(x in [row["id"] for row in TRAIN] for x in value):
        return "These are ids of training rows. Return the ids of the matching test rows."
    if sorted(map(str, value)) == sorted(right):
        return "These are the correct ids in another order. Keep the order of the test rows: a set does not."
    strategies = [
        (
            "You replaced digit by digit, so 12 becomes two marks and 5 becomes one. Replace whole numbers: `\\d+` instead of `\\d`.",
            dict(mask=lambda text: re.sub(r"\d", "#", text)),
        ),
        (
            "You replaced digit by digit, and capitals and spacing still matter. Use `\\d+`, ignore case and remove spaces.",
            dict(mask=lambda text: re.sub(r"\d", "#", text), fold=False),
        ),
        (
            "Capitals and spacing still matter. Ignore case, and compare without spaces.",
            dict(fold=False),
        ),
        ("Capitals still matter. Use `.casefold()`.", dict(fold="spacing")),
        (
            "Spacing still matters. Remove spaces and line breaks with `split()` and `join`.",
            dict(fold="case"),
        ),
        (
            "1,200 became two marks with a comma between them, and 900 became one. Allow a comma or a point between the digits of a number.",
            dict(mask=lambda text: re.sub(r"\d+", "#", text)),
        ),
        (
            "1,200 became two marks, and capitals and spacing still matter. Allow a comma or a point between the digits of a number, ignore "
            "case and remove spaces.",
            dict(mask=lambda text: re.sub(r"\d+", "#", text), fold=False),
        ),
        (
            "2.5 became two marks with a point between them. A decimal point is part of the number, like the comma.",
            dict(mask=lambda text: re.sub(r"\d+(?:,\d+)*", "#", text)),
        ),
        (
            "1,200 became two marks with a comma between them. A comma between digits is part of the number, like the point.",
            dict(mask=lambda text: re.sub(r"\d+(?:\.\d+)*", "#", text)),
        ),
        (
            "You compared the questions with their numbers. Replace each number by a mark first.",
            dict(mask=lambda text: text),
        ),
        (
            "You compared the questions with their numbers. Replace each number by a mark first.",
            dict(mask=lambda text: text, fold=False),
        ),
        (
            "You removed the numbers and left no mark, so a question without a number equals one with a number. Put a mark in its place.",
            dict(mask=lambda text: re.sub(r"\d[\d,.]*", "", text)),
        ),
        (
            "You removed the numbers and left no mark, so a question without a number equals one with a number. Put a mark in its place.",
            dict(mask=lambda text: re.sub(r"\d+(?:[.,]\d+)*", "", text)),
        ),
        (
            "You left out the question that is identical, numbers included. It also matches.",
            dict(identical=False),
        ),
    ]
    for text, options in strategies:
        if value == _twins(**options):
            return text
    too_few, too_many = [i for i in right if i not in value], [i for i in value if i not in right]
    if too_few:
        row = next(row for row in TEST if row["id"] == too_few[0])
        return f"Your function does not find {row['question']!r} ({row['id']})."
    return f"Your function finds {too_many[0]!r}, but more than a number is different there."


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
    "before any stage is finished": 10,
    "in the minute in which sampling finishes": 50,
    "at the very end": 137,
    "long after the end": 200,
}


def minutes_lost(function) -> str:
    """Exercise 7.1: minutes of work since the last finished stage."""
    values = {}
    for name, minute in KILLED.items():
        values[name], message = number(function, list(STAGES), minute)
        if message == NO_RETURN and len(values) > 1:
            return f"Killed {name}, your function returns None. Add a `return` for the case that all stages are finished."
        if message:
            return message
    right = {name: _lost(minute) for name, minute in KILLED.items()}
    if all(_close(values[name], right[name]) for name in right):
        return (
            "Right: finished stages are kept. The longest stage is the most that a kill can cost."
        )
    total = sum(minutes for _, minutes in STAGES)
    strategies = [
        ("You count everything since the start of the run. Finished stages are kept.", lambda m: m),
        (
            "That is the minute at which the last stage finished. Return the minutes since then.",
            lambda m: m - _lost(m) if m <= total else total,
        ),
        (
            "That is the time that the interrupted stage still needed. Return the time it had already used.",
            lambda m: _stage(m)[1] - _lost(m),
        ),
        (
            "That is the whole length of the interrupted stage. Return the time it had already used.",
            lambda m: _stage(m)[1],
        ),
        (
            "A stage that ends in the minute of the kill is safe: compare with `>`, not with `>=`.",
            lambda m: _lost(m, strict=False),
        ),
        ("After the end of the run nothing can be lost: return 0.", lambda m: _lost(m, ends=False)),
        (
            "A stage that ends in the minute of the kill is safe, and after the end of the run nothing can be lost.",
            lambda m: _lost(m, strict=False, ends=False),
        ),
        ("Your result is in hours. Return minutes.", lambda m: _lost(m) / 60),
    ]
    for text, strategy in strategies:
        if all(_close(values[name], strategy(minute)) for name, minute in KILLED.items()):
            return text
    name = next(name for name in right if not _close(values[name], right[name]))
    return (
        f"Killed {name} (minute {KILLED[name]} of stages of {', '.join(str(minutes) for _, minutes in STAGES)} minutes) "
        f"{right[name]:g} minutes are lost; your function returned {values[name]:g}."
    )


def _lost(minute: float, strict: bool = True, ends: bool = True) -> float:
    safe = 0
    for _, minutes in STAGES:
        if safe + minutes > minute or (not strict and safe + minutes == minute):
            return minute - safe
        safe += minutes
    return 0 if ends else minute - safe


def _stage(minute: float) -> tuple[str, float]:
    """The stage that runs at that minute; one of length 0 after the end."""
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
