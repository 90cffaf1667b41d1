"""The embedded task: grade-school word problems with integer answers, made by a seeded generator.

"Mia keeps 24 shells in a jar. A friend gives Mia 13 more shells. Then the number of shells doubles.
How many shells does Mia have now?" has the solution "24+13=37\\n37*2=74\\nFinal answer: 74".

A question is a *skeleton* (the story with names, objects and numbers masked) filled with numbers.
The 2,000 skeletons are drawn once from a fixed seed, 400 for each number of steps from 2 to 6. A
quarter are held out: neither the training split nor the corpus of the seed model M0 uses them, and
the column `new_skeleton` marks their questions. The sentences are in word_problems.json.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from irpo_utils import UserError
from irpo_utils.tasks.numbers import NumberTask

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = (2, 3, 4, 5, 6)
SKELETONS_PER_STEP, HELD_OUT = 400, 100
SPLIT_SIZES = {"train": 2400, "validation": 500, "test": 500}

# In the sentences {n}, {k} and {m} are numbers, {name} and {item} are filled once per question.
SENTENCES = json.loads(Path(__file__).with_name("word_problems.json").read_text(encoding="utf-8"))
NAMES, THEMES, ANY_THEME = SENTENCES["names"].split(), SENTENCES["themes"], SENTENCES["any theme"]
ORDERS = ("in order", "question first", "start last")
CLAUSE_STEPS = {"gain": 1, "loss": 1, "multiply": 1, "halve": 1, "pack": 2, "share": 2}
OPERATORS = {"gain": "+", "pack": "+", "loss": "-", "share": "-", "multiply": "*", "halve": "/"}


class NumberRange(NamedTuple):
    """Bounds on the start value, the value between steps, the result, and single operands."""

    start: int = 60
    running: int = 199
    result: int = 599
    operand: int = 60


TASK_RANGE = NumberRange()
WIDE_RANGE = NumberRange(start=120, running=499, result=999, operand=150)  # M0's first corpus


class Skeleton(NamedTuple):
    """A story without names, objects and numbers; `parts` are (clause kind, sentence, factor)."""

    theme: dict
    order: str
    opening: str
    parts: tuple[tuple[str, str, int], ...]
    question: str

    def tell(self, opening: str, sentences: list[str]) -> str:
        """The story in its order, with this opening and these sentences."""
        if self.order == "question first":
            return " ".join([self.question, opening, *sentences])
        if self.order == "start last":
            return " ".join([self.theme["setting"], *sentences, opening, self.question])
        return " ".join([opening, *sentences, self.question])

    @property
    def text(self) -> str:
        """The masked question, with {name}, {item}, {n}, {k} and {m} where the fillings go."""
        return self.tell(self.opening, [sentence for _, sentence, _ in self.parts])


def _draw_clause(rng: random.Random, theme: dict, steps_left: int) -> tuple[str, str, int]:
    kinds = ["gain"] * 4 + ["loss"] * 4 + ["multiply"] * 2 + ["halve"]
    kind = rng.choice(kinds + (["pack", "pack", "share", "share"] if steps_left >= 2 else []))
    if kind == "multiply":
        factor = rng.choice((2, 3))
        return kind, rng.choice(ANY_THEME["double" if factor == 2 else "triple"]), factor
    return kind, rng.choice((ANY_THEME if kind == "halve" else theme)[kind]), 2


def _draw_skeleton(rng: random.Random, steps: int) -> Skeleton:
    theme, order = rng.choice(THEMES), rng.choice(ORDERS)
    told_last = order == "start last"
    opening = rng.choice(ANY_THEME["openings told last"] if told_last else theme["openings"])
    parts: list[tuple[str, str, int]] = []
    while (left := steps - sum(CLAUSE_STEPS[kind] for kind, _, _ in parts)) > 0:
        clause = _draw_clause(rng, theme, left)
        repeated = parts and {clause[0], parts[-1][0]} <= {"multiply", "halve"}
        if not repeated and clause not in parts:
            parts.append(clause)
    return Skeleton(theme, order, opening, tuple(parts), rng.choice(theme["questions"]))


@functools.lru_cache(maxsize=1)
def skeletons() -> dict[tuple[str, int], list[Skeleton]]:
    """All skeletons by group ("seen" or "held_out") and number of steps; equal on every machine."""
    rng, known = random.Random(2404), set()
    groups = {}
    for steps in STEPS:
        drawn: list[Skeleton] = []
        while len(drawn) < SKELETONS_PER_STEP:
            skeleton = _draw_skeleton(rng, steps)
            if skeleton.text not in known and _fill(skeleton, rng, WIDE_RANGE, tries=50):
                known.add(skeleton.text)
                drawn.append(skeleton)
        groups["held_out", steps], groups["seen", steps] = drawn[:HELD_OUT], drawn[HELD_OUT:]
    return groups


def _fill(skeleton: Skeleton, rng, bounds: NumberRange, tries: int = 20) -> dict | None:
    """Numbers for one skeleton, or None where none within bounds were found in `tries` draws."""
    for _ in range(tries):
        value = start = rng.randint(4, bounds.start)
        sentences, lines = [], []
        for position, part in enumerate(skeleton.parts):
            last = position == len(skeleton.parts) - 1
            limit = bounds.result if last else bounds.running
            sentence, new_lines, value = _apply_clause(part, value, limit, rng, bounds.operand)
            if value is None:
                break
            sentences.append(sentence)
            lines += new_lines
        else:
            return {"start": start, "sentences": sentences, "lines": lines, "result": value}
    return None


def _apply_clause(part: tuple[str, str, int], value: int, limit: int, rng, operand: int):
    """(sentence, equation lines, new value) of one clause; Nones if the value leaves its bounds."""
    kind, sentence, n = part
    lines = []
    if kind in ("pack", "share"):
        k, m = rng.randint(2, 9), rng.randint(2, 9)
        sentence, n = sentence.replace("{k}", str(k)).replace("{m}", str(m)), k * m
        lines.append(f"{k}*{m}={n}")
    elif kind in ("gain", "loss"):
        n = rng.randint(2, operand)
    symbol = OPERATORS[kind]
    result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[symbol]
    if not 1 <= result <= limit or (kind == "halve" and value % 2):
        return None, None, None
    return sentence.replace("{n}", str(n)), [*lines, f"{value}{symbol}{n}={result}"], result


def make_question(rng, group="seen", bounds=TASK_RANGE, steps: int | None = None) -> dict:
    """One question as a row: `question`, `answer`, `solution`, `steps`, `skeleton`, `new_skeleton`.

    `group` is "seen" or "held_out"; `steps` fixes the number of equation lines (default: random).
    """
    steps = rng.choice(STEPS) if steps is None else steps
    filled = None
    while filled is None:
        skeleton = rng.choice(skeletons()[group, steps])
        filled = _fill(skeleton, rng, bounds)
    opening = skeleton.opening.replace("{n}", str(filled["start"]))
    text = skeleton.tell(opening, filled["sentences"]).replace("{name}", rng.choice(NAMES))
    text = text.replace("{item}", rng.choice(skeleton.theme["items"]))
    answer = str(filled["result"])
    return {
        "question": text[0].upper() + text[1:],
        "answer": answer,
        "solution": "\n".join([*filled["lines"], f"Final answer: {answer}"]),
        "steps": steps,
        "skeleton": skeleton.text,
        "new_skeleton": group == "held_out",
    }


@functools.lru_cache(maxsize=1)
def all_splits() -> dict[str, list[dict]]:
    """The fixed splits: train has seen skeletons only, the others 30 % held-out ones."""
    rng, known = random.Random(19733), set()
    splits = {}
    for split, size in SPLIT_SIZES.items():
        rows = splits[split] = []
        while len(rows) < size:
            group = "held_out" if split != "train" and len(rows) % 10 < 3 else "seen"
            row = make_question(rng, group, steps=STEPS[len(rows) // 10 % len(STEPS)])
            if row["question"] not in known:
                known.add(row["question"])
                rows.append({"id": f"word_problems-{split}-{len(rows):04d}", **row})
    return splits


class WordProblems(NumberTask):
    """The embedded task, with the short prompt that M0 (0.9 M parameters) was trained with."""

    name = "word_problems"

    def prompt(self, row: dict) -> str:
        """The question between "Question:" and "Solution:"."""
        return f"Question: {row['question']}\nSolution:"

    def load(self, split: str, data: str | None = None) -> Dataset:
        """Rows of one fixed split; `UserError` for another split and for `data`."""
        from datasets import Dataset

        if data:
            raise UserError("The task word_problems reads no data; use --task jsonl with --data.")
        if split not in SPLIT_SIZES:
            raise UserError(f"There is no split {split!r}; use one of {', '.join(SPLIT_SIZES)}.")
        return Dataset.from_list(all_splits()[split])


TASK = WordProblems()
