"""The embedded task: grade-school word problems with integer answers, made by a seeded generator.

"Mia keeps 24 shells in a jar. A friend gives Mia 13 more shells. Then the number of shells doubles.
How many shells does Mia have now?" has the solution "24+13=37\\n37*2=74\\nFinal answer: 74".

A question is a *skeleton* (the story with names, objects and numbers masked) filled with numbers. A
fixed seed draws 2,000 skeletons, 400 for each number of steps from 2 to 6. A quarter are held out
of the training split and of the corpus of the seed model M0; `new_skeleton` marks their questions.
"""

import functools
import json
import random
from pathlib import Path
from typing import NamedTuple

from irpo_utils import UserError
from irpo_utils.tasks.numbers import NumberTask

STEPS = (2, 3, 4, 5, 6)
SKELETONS_PER_STEP, HELD_OUT = 400, 100
SPLIT_SIZES = {"train": 2400, "validation": 500, "test": 500}

# In the sentences {n}, {k} and {m} are numbers, {name} and {item} are filled once per question.
SENTENCES = json.loads(Path(__file__).with_name("word_problems.json").read_text(encoding="utf-8"))
NAMES, THEMES, ANY_THEME = SENTENCES["names"].split(), SENTENCES["themes"], SENTENCES["any theme"]
OPERATORS = {"gain": "+", "pack": "+", "loss": "-", "share": "-", "multiply": "*", "halve": "/"}
TWO_STEPS = ("pack", "share")  # "buys 3 bags with 4 shells each": 3*4=12, and then the sum


class NumberRange(NamedTuple):
    """Bounds on the start value, the value between steps, the result, and single operands."""

    start: int = 60
    running: int = 199
    result: int = 599
    operand: int = 60


TASK_RANGE = NumberRange()
WIDE_RANGE = NumberRange(start=120, running=499, result=999, operand=150)  # M0's first corpus


class Skeleton(NamedTuple):
    """A story without names, objects and numbers; a clause is (kind, sentence, factor)."""

    theme: dict
    order: str
    opening: str
    clauses: tuple[tuple[str, str, int], ...]
    question: str

    def tell(self, opening: str, sentences: list[str]) -> str:
        """The story in its order, with this opening and these sentences."""
        parts = {"opening": opening, "sentences": " ".join(sentences), "question": self.question}
        return SENTENCES["orders"][self.order].format(setting=self.theme["setting"], **parts)

    @property
    def text(self) -> str:
        """The masked question, with {name}, {item}, {n}, {k} and {m} where the fillings go."""
        return self.tell(self.opening, [sentence for _, sentence, _ in self.clauses])


def _draw_skeleton(rng: random.Random, steps: int) -> Skeleton:
    theme, order = rng.choice(THEMES), rng.choice(list(SENTENCES["orders"]))
    told_last = order == "start last"
    opening = rng.choice(ANY_THEME["openings told last"] if told_last else theme["openings"])
    clauses: list[tuple[str, str, int]] = []
    while steps > 0:
        kinds = ["gain"] * 4 + ["loss"] * 4 + ["multiply"] * 2 + ["halve"]
        kind = rng.choice(kinds + (["pack", "pack", "share", "share"] if steps >= 2 else []))
        factor = rng.choice((2, 3)) if kind == "multiply" else 2
        several = {"multiply": ANY_THEME["double" if factor == 2 else "triple"]}
        clause = kind, rng.choice((theme | ANY_THEME | several)[kind]), factor
        repeated = clauses and {kind, clauses[-1][0]} <= {"multiply", "halve"}
        if not repeated and clause not in clauses:
            clauses.append(clause)
            steps -= 2 if kind in TWO_STEPS else 1
    return Skeleton(theme, order, opening, tuple(clauses), rng.choice(theme["questions"]))


@functools.lru_cache(maxsize=1)
def skeletons() -> dict[tuple[str, int], list[Skeleton]]:
    """All skeletons by group ("seen" or "held_out") and number of steps; equal on every machine."""
    rng, known, groups = random.Random(2404), set(), {}
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
    """A row with numbers but no names, or None where no draw of `tries` stayed within bounds."""
    for _ in range(tries):
        value = start = rng.randint(4, bounds.start)
        sentences, lines = [], []
        for clause in skeleton.clauses:
            sentence, equations, value = _apply_clause(clause, value, rng, bounds.operand)
            sentences.append(sentence)
            lines += equations
            is_last = len(sentences) == len(skeleton.clauses)
            if not 1 <= value <= (bounds.result if is_last else bounds.running):
                break
        else:
            opening = skeleton.opening.replace("{n}", str(start))
            solution = "\n".join([*lines, f"Final answer: {value}"])
            question = skeleton.tell(opening, sentences)
            return {"question": question, "answer": str(value), "solution": solution}
    return None


def _apply_clause(clause: tuple[str, str, int], value: int, rng, operand: int):
    """(sentence, equation lines, new value) of one clause; half of an odd number counts as 0."""
    (kind, sentence, n), lines = clause, []
    if kind in TWO_STEPS:
        k, m = rng.randint(2, 9), rng.randint(2, 9)
        sentence, n = sentence.replace("{k}", str(k)).replace("{m}", str(m)), k * m
        lines.append(f"{k}*{m}={n}")
    elif kind in ("gain", "loss"):
        n = rng.randint(2, operand)
    half = value // n if value % n == 0 else 0
    symbol = OPERATORS[kind]
    result = {"+": value + n, "-": value - n, "*": value * n, "/": half}[symbol]
    return sentence.replace("{n}", str(n)), [*lines, f"{value}{symbol}{n}={result}"], result


def make_question(rng, group="seen", bounds=TASK_RANGE, steps: int | None = None) -> dict:
    """One question as a row; group is "seen" or "held_out", steps the number of equation lines."""
    row, steps = None, rng.choice(STEPS) if steps is None else steps
    while row is None:
        skeleton = rng.choice(skeletons()[group, steps])
        row = _fill(skeleton, rng, bounds)
    text = row["question"].replace("{name}", rng.choice(NAMES))
    text = text.replace("{item}", rng.choice(skeleton.theme["items"]))
    row |= {"question": text[0].upper() + text[1:], "steps": steps, "skeleton": skeleton.text}
    return row | {"new_skeleton": group == "held_out"}


@functools.lru_cache(maxsize=1)
def all_splits() -> dict[str, list[dict]]:
    """The fixed splits: train has seen skeletons only, the others 30 % held-out ones."""
    rng, known, splits = random.Random(19733), set(), {}
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
        return f"Question: {row['question']}\nSolution:"

    def load(self, split: str, data: str | None = None):
        """The `Dataset` of one fixed split; `UserError` for another split and for `data`."""
        from datasets import Dataset

        if data:
            raise UserError("The task word_problems reads no data; use --task jsonl with --data.")
        if split not in SPLIT_SIZES:
            raise UserError(f"There is no split {split!r}; use one of {', '.join(SPLIT_SIZES)}.")
        return Dataset.from_list(all_splits()[split])


TASK = WordProblems()
