"""What a task is: a prompt, a way to read the answer out of a completion, a comparison with gold, and a data set."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from irpo_utils import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
FINAL_ANSWER = re.compile(r"final answer\s*:", re.IGNORECASE)


class Task:
    """A kind of question. Each file of this package defines one subclass and one instance of it, `TASK`.

    Rows are dicts with at least `id`, `question` and `answer` (all str); `solution` (gold chain of thought) and
    `choices` where the task has them.
    """

    name: str

    def prompt(self, row: dict) -> str:
        """The text of the user's turn; the model's chat template is put round it by `sampling`."""
        raise NotImplementedError

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The final answer in one fixed spelling, so that equal answers vote together, or None where there is none."""
        raise NotImplementedError

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """Reward 1 of the paper (section 2): the extracted answer equals the gold answer after normalisation."""
        raise NotImplementedError

    def load(self, split: str, data: str | None = None) -> Dataset:
        """Questions of "train", "validation" or "test"; `data` is a local folder or file instead of the hub."""
        raise NotImplementedError


class FewShot(Task):
    """A task whose every question comes after a few worked ones, in the same user turn (Wei et al. 2022)."""

    def __init__(self, task: Task, examples: list[dict]):
        if not all(row.get("solution") for row in examples):
            raise UserError(f"The task {task.name} has no worked solutions to show as examples.")
        self.task, self.name = task, task.name
        self.head = "".join(f"{task.prompt(row)} {row['solution']}\n\n" for row in examples)
        self.extract, self.is_correct, self.load = task.extract, task.is_correct, task.load

    def prompt(self, row: dict) -> str:
        """The worked questions, then this one."""
        return self.head + self.task.prompt(row)


def after_final_answer(completion: str) -> str | None:
    """The rest of the line after the last "Final answer:" (any case), or None.

    >>> after_final_answer("Final answer: 3\\nNo, wait.\\nFinal answer: 4")
    '4'
    """
    parts = FINAL_ANSWER.split(completion)
    if len(parts) == 1:
        return None
    line = parts[-1].lstrip().split("\n", 1)[0].strip()
    return line or None
