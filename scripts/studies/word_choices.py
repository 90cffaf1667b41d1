"""The embedded word problems as multiple choice: the nearest of four numbers counts.

One raw question, and its options (the correct one is B):

    Mia keeps 24 shells in a jar. ... How many shells does Mia have now?
    (A) 41   (B) 74   (C) 107   (D) 140

Questions, splits, gold solutions and prompt are those of `word_problems`: M0 knows no other prompt.
The options are not shown to the model. It calculates a number, and the nearest option is taken, as
by a pupil who picks the closest one. An incorrect number can therefore be graded as correct, which
is the luck of multiple choice (notebook 02). Importing this module registers the task.
"""

from __future__ import annotations

import random
from string import ascii_uppercase

from datasets import Dataset

from irpo_utils import tasks
from irpo_utils.tasks.numbers import parse
from irpo_utils.tasks.word_problems import TASK as NUMBERS

OPTIONS = 4


def options(row: dict) -> dict:
    """`choices` and `answer` (a letter) for a row of word_problems, always the same.

    The correct option has each of the four places equally often (except for the smallest numbers).
    Options are positive and equally spaced, by an odd number of at most half the correct one, so
    that no whole number is as near to one as to another.
    """
    number, rng = int(row["answer"]), random.Random(row["id"])
    place = min(rng.randrange(OPTIONS), number - 1)
    widest = min(number // 2, (number - 1) // place if place else number)
    step = rng.randrange(1, max(1, widest) + 1, 2)
    choices = [str(number + (i - place) * step) for i in range(OPTIONS)]
    return {"choices": choices, "answer": ascii_uppercase[place]}


def nearest(number: str, choices: list[str]) -> str | None:
    """The letter of the option nearest to `number`, or None where two are equally near.

    >>> nearest("80", ["41", "74", "107", "140"]), nearest("57.5", ["41", "74", "107", "140"])
    ('B', None)
    """
    value = parse(number)
    distances = [abs(value - int(choice)) for choice in choices]
    smallest = min(distances)
    return ascii_uppercase[distances.index(smallest)] if distances.count(smallest) == 1 else None


class WordChoices(tasks.Task):
    """Word problems whose answer is a letter."""

    name = "word_choices"
    prompt = staticmethod(NUMBERS.prompt)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The letter of the option nearest to the number after "Final answer:", or None."""
        number, choices = NUMBERS.extract(completion), (row or {}).get("choices")
        return nearest(number, choices) if number is not None and choices else None

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """The same letter."""
        return extracted == answer

    def solved(self, completion: str, row: dict) -> bool:
        """Whether the number itself is correct: the letter may be correct by luck."""
        gold = row["choices"][ascii_uppercase.index(row["answer"])]
        return NUMBERS.is_correct(NUMBERS.extract(completion), gold)

    def load(self, split: str, data: str | None = None) -> Dataset:
        """The rows of `word_problems` with `choices` and a letter as `answer`; the same errors."""
        return Dataset.from_list([{**row, **options(row)} for row in NUMBERS.load(split, data)])


TASK = tasks.register(WordChoices())
