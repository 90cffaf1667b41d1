"""The embedded word problems as a multiple-choice test: four numbers to choose from, the nearest one counts.

One raw question, and its options (the right one is B):

    Mia keeps 24 shells in a jar. ... How many shells does Mia have now?
    (A) 41   (B) 74   (C) 107   (D) 140

The questions, splits and gold solutions are those of `word_problems`, and so is the prompt: M0 knows no other. The options
are not shown to the model. It works a number out, and the option nearest to that number is ticked for it, as by a pupil who
picks what comes closest. So a wrong number can win, which is what makes multiple choice lucky (notebook 02, section 7).
"""

from __future__ import annotations

import random
from string import ascii_uppercase
from typing import TYPE_CHECKING

from irpo_utils.tasks.base import Task
from irpo_utils.tasks.numbers import parse
from irpo_utils.tasks.word_problems import TASK as NUMBERS

if TYPE_CHECKING:
    from datasets import Dataset

OPTIONS = 4


def options(row: dict) -> dict:
    """`choices` and `answer` (a letter) for a row of word_problems; the same row has the same options always.

    The right option has each of the four places equally often (the smallest numbers apart). The options are equally spaced, by
    an odd number of at most half the right one, so that no whole number is as near to one as to another; all are positive.
    """
    number, rng = int(row["answer"]), random.Random(row["id"])
    place = min(rng.randrange(OPTIONS), number - 1)
    widest = min(number // 2, (number - 1) // place if place else number)
    step = rng.randrange(1, max(1, widest) + 1, 2)
    return {
        "choices": [str(number + (i - place) * step) for i in range(OPTIONS)],
        "answer": ascii_uppercase[place],
    }


def nearest(number: str, choices: list[str]) -> str | None:
    """The letter of the option nearest to `number`, or None where two are equally near.

    >>> nearest("80", ["41", "74", "107", "140"]), nearest("57.5", ["41", "74", "107", "140"])
    ('B', None)
    """
    value = parse(number)
    distances = [abs(value - int(choice)) for choice in choices]
    return (
        ascii_uppercase[distances.index(min(distances))]
        if distances.count(min(distances)) == 1
        else None
    )


class WordChoices(Task):
    """Word problems whose answer is a letter."""

    name = "word_choices"
    prompt = staticmethod(NUMBERS.prompt)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The letter of the option of `row["choices"]` nearest to the number after the last "Final answer:", or None."""
        number, choices = NUMBERS.extract(completion), (row or {}).get("choices")
        return nearest(number, choices) if number is not None and choices else None

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """The same letter."""
        return extracted is not None and extracted == answer

    def solved(self, completion: str, row: dict) -> bool:
        """Whether the number itself is right: the letter may be so by luck."""
        return NUMBERS.is_correct(
            NUMBERS.extract(completion), row["choices"][ascii_uppercase.index(row["answer"])]
        )

    def load(self, split: str, data: str | None = None) -> Dataset:
        """The rows of that split of word_problems with `choices`, and a letter as `answer`; raises the same `UserError`s."""
        from datasets import Dataset

        return Dataset.from_list([{**row, **options(row)} for row in NUMBERS.load(split, data)])


TASK = WordChoices()
