"""M_0 with a few worked examples in its prompt, as a method of the study `comparison`.

Importing this module adds it to the table of methods.
"""

from __future__ import annotations

from irpo_utils import UserError
from irpo_utils.methods import METHODS, Method
from irpo_utils.profiles import Profile
from irpo_utils.tasks.base import Task


class FewShot(Task):
    """A task whose questions each come after a few worked ones, in one turn (Wei et al. 2022)."""

    def __init__(self, task: Task, examples: list[dict]):
        if not all(row.get("solution") for row in examples):
            raise UserError(f"The task {task.name} has no worked solutions to show as examples.")
        worked = "".join(f"{task.prompt(row)} {row['solution']}\n\n" for row in examples)
        self.prompt, self.name = lambda row: worked + task.prompt(row), task.name
        self.extract, self.is_correct, self.load = task.extract, task.is_correct, task.load


def with_four_examples(task: Task, p: Profile) -> FewShot:
    return FewShot(task, list(task.load("train", p.data).select(range(4))))


METHODS["few_shot"] = Method(
    "M0 with four examples",
    "Wei et al. 2022, arXiv 2201.11903",
    {"iterations": 0},
    task=with_four_examples,
)
