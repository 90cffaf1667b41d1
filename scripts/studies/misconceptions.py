"""Pupils' misconceptions in the working of `word_problems`: how a pupil errs, and which error a
line shows.

The second seed model shows every step of its working and follows misconceptions in some of them.
This module writes such working (`pupil_solution`, for the corpus of that model) and reads it
(`classify`, for figures that count misconceptions per iteration).

    24+38=52 in all          forgets the carry
    Now 52-17=45 left        subtracts the smaller digit from the larger
    Final answer: 45
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
CORRECT, OTHER, MISSING = "correct", "other", "missing"
MAX_DIGITS = 6  # longer numbers in a completion are no working of this task


@dataclass(frozen=True)
class Misconception:
    """One way to err. `result(a, b)` is what the pupil writes after `a op b=`, or None where it
    does not apply.

    `share`: how often the pupil follows it on the last line of a solution (see `pupil_solution`).
    """

    name: str
    operation: str
    share: float
    result: Callable[[int, int], int | None]


def forget_carry(a: int, b: int) -> int | None:
    """27+15=32: the ten from 7+5 is not added."""
    return a + b - 10 if a % 10 + b % 10 >= 10 and max(a, b) >= 10 else None


def smaller_from_larger(a: int, b: int) -> int | None:
    """42-17=35: in each column the smaller digit is subtracted from the larger one."""
    if a < 10 or a % 10 >= b % 10 or a // 10 < b // 10:
        return None
    return (a // 10 - b // 10) * 10 + b % 10 - a % 10


def one_group_too_few(a: int, b: int) -> int | None:
    """7*8=49: counts in steps of 7 and stops one step early."""
    return a * (b - 1) if 3 <= a <= 9 and 3 <= b <= 9 else None


def forget_carry_in_product(a: int, b: int) -> int | None:
    """27*2=44: the digits are multiplied and the ten from 7*2 is not added."""
    carried = a % 10 * b // 10
    return a * b - 10 * carried if a >= 10 and b < 10 and carried else None


def halve_digit_by_digit(a: int, b: int) -> int | None:
    """74/2=32: 7 is halved to 3, and the ten that is left over is lost."""
    if b != 2 or a < 10 or a // 10 % 2 == 0:
        return None
    return a // 20 * 10 + a % 10 // 2


MISCONCEPTIONS = (
    Misconception("forgets the carry", "+", 0.70, forget_carry),
    Misconception("subtracts the smaller digit from the larger", "-", 0.60, smaller_from_larger),
    Misconception("counts one group too few", "*", 0.50, one_group_too_few),
    Misconception("forgets the carry in a product", "*", 0.65, forget_carry_in_product),
    Misconception("halves digit by digit", "/", 0.60, halve_digit_by_digit),
)
NAMES = tuple(m.name for m in MISCONCEPTIONS)

# Words around an equation, all equally likely: tokens that correct and incorrect completions share
# and that the model is uncertain about. {item} is what the story counts.
PREFIXES = ("", "", "Now ", "So ")
SUFFIXES = {
    "+": ("", " now", " in all", " {item}"),
    "-": ("", " left", " are left", " {item}"),
    "*": ("", " in all", " more", " {item}"),
    "/": ("", " left", " now", " {item}"),
}


@dataclass(frozen=True)
class Step:
    """One line of the gold working; `a_from` and `b_from` name the earlier line whose result is
    used, if any."""

    a: int
    operation: str
    b: int
    a_from: int | None
    b_from: int | None


def calculate(a: int, operation: str, b: int) -> int:
    """The result of one line; halves are rounded down, as a pupil with a wrong value may meet an
    odd number."""
    if operation == "/":
        return a // b if b else 0
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def gold_steps(solution: str) -> list[Step]:
    """The lines of a gold solution with the source of their operands."""
    found = [match.groups() for match in map(EQUATION.match, solution.split("\n")) if match]
    lines = [(int(a), operation, int(b), int(c)) for a, operation, b, c in found]
    steps: list[Step] = []
    running: int | None = None  # index of the line that holds the running value
    group: int | None = None  # index of a line `groups * size`, used by the next line
    for i, (a, operation, b, c) in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else None
        value = lines[running][3] if running is not None else None
        is_group = (
            group is None
            and operation == "*"
            and following is not None
            and following[1] in "+-"
            and following[2] == c
            and (following[0] != c if value is None else following[0] == value)
        )
        if is_group:
            steps.append(Step(a, operation, b, None, None))
            group = i
        else:
            steps.append(Step(a, operation, b, running, group))
            running, group = i, None
    return steps


def misconception_of(a: int, operation: str, b: int, result: int) -> str | None:
    """The name of the misconception that leads from `a operation b` to this incorrect `result`, if
    one does."""
    if result == calculate(a, operation, b):
        return None
    for misconception in MISCONCEPTIONS:
        if misconception.operation == operation and misconception.result(a, b) == result:
            return misconception.name
    return None


def applicable(a: int, operation: str, b: int) -> str | None:
    """The name of the misconception that could lead to an error on this line, if there is one."""
    for m in MISCONCEPTIONS:
        if m.operation == operation and m.result(a, b) not in (None, calculate(a, operation, b)):
            return m.name
    return None


def pupil_solution(row: dict, rng: random.Random, strength: float = 1.0, words: float = 1.0) -> str:
    """The working of a pupil with misconceptions. Later lines use the pupil's own values.

    strength: factor on the share of every misconception; 0 gives correct working.
    words: probability that a line gets words around its equation.

    Care fades along the chain: on the first line of a solution a misconception has half of its
    share, on the last line all of it. Correct and incorrect completions of a question therefore
    often differ late.
    """
    steps = gold_steps(row["solution"])
    shares = {m.name: m.share * strength for m in MISCONCEPTIONS}
    items = item_of(row)
    lines, results = [], []
    for i, step in enumerate(steps):
        a = step.a if step.a_from is None else results[step.a_from]
        b = step.b if step.b_from is None else results[step.b_from]
        result = calculate(a, step.operation, b)
        name = applicable(a, step.operation, b)
        fading = 0.5 + 0.5 * i / max(1, len(steps) - 1)
        if name and rng.random() < shares[name] * fading:
            misconception = MISCONCEPTIONS[NAMES.index(name)]
            result = misconception.result(a, b)
        result = max(0, result)  # a pupil does not write negative numbers of things
        results.append(result)
        equation = f"{a}{step.operation}{b}={result}"
        lines.append(with_words(equation, step.operation, items, rng, words))
    return "\n".join([*lines, f"Final answer: {results[-1]}"])


def with_words(equation: str, operation: str, item: str, rng: random.Random, words: float) -> str:
    """The equation with a word or two before and after it."""
    if rng.random() >= words:
        return equation
    suffix = rng.choice(SUFFIXES[operation]).replace("{item}", item)
    return rng.choice(PREFIXES) + equation + suffix


def item_of(row: dict) -> str:
    """What the story counts, for example "shells"; "things" where the question names none of the
    known items."""
    from irpo_utils.tasks.word_problems import THEMES

    words = set(re.findall(r"[a-z]+", row["question"].lower()))
    for theme in THEMES:
        for item in theme["items"]:
            if item in words:
                return item
    return "things"


def classify(row: dict, completion: str) -> list[str]:
    """One label per line of the gold working: CORRECT, the name of a misconception, OTHER or
    MISSING.

    A line is judged by its own operands: a line that continues correctly from an incorrect value is
    CORRECT. OTHER stands for another operation, for operands that the chain does not lead to, and
    for results that no misconception explains. MISSING stands for a line that the completion does
    not show.
    """
    written = [match.groups() for match in map(EQUATION.search, completion.split("\n")) if match]
    labels: list[str] = []
    results: list[int | None] = []
    for i, step in enumerate(gold_steps(row["solution"])):
        if i >= len(written) or max(map(len, written[i])) > MAX_DIGITS:
            labels.append(MISSING)
            results.append(None)
            continue
        a, operation, b, result = written[i]
        a, b, result = int(a), int(b), int(result)
        expected = (
            step.a if step.a_from is None else results[step.a_from],
            step.operation,
            step.b if step.b_from is None else results[step.b_from],
        )
        results.append(result)
        if (a, operation, b) != expected:
            labels.append(OTHER)
        elif result == max(0, calculate(a, operation, b)):
            labels.append(CORRECT)
        else:
            labels.append(misconception_of(a, operation, b, result) or OTHER)
    return labels


def count_misconceptions(rows: list[dict], completions: list[str]) -> dict[str, dict[str, int]]:
    """Per misconception: on how many lines it `applies`, and on how many of those the completion
    `follows` it or is `correct`.

    A line counts for the misconception that could lead to an error with the operands that the
    completion wrote.
    """
    counts = {name: {"applies": 0, "follows": 0, "correct": 0} for name in NAMES}
    for row, completion in zip(rows, completions, strict=True):
        written = [m.groups() for m in map(EQUATION.search, completion.split("\n")) if m]
        for label, (a, operation, b, _) in zip(classify(row, completion), written, strict=False):
            name = applicable(int(a), operation, int(b)) if label not in (OTHER, MISSING) else None
            if name:
                counts[name]["applies"] += 1
                counts[name]["follows"] += label == name
                counts[name]["correct"] += label == CORRECT
    return counts
