"""One file per task; `get` finds a task by name, `register` adds your own."""

from __future__ import annotations

import importlib

from irpo_utils import UserError
from irpo_utils.tasks.base import Task

NAMES = ("word_problems", "gsm8k", "svamp", "arc_challenge", "math", "jsonl")
_REGISTERED: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make `get` find `task` by its `name`, in this process; a later task replaces an earlier."""
    if not getattr(task, "name", None):
        raise UserError("A task needs a `name`; set it in the class.")
    if task.name in NAMES:
        raise UserError(f"The task {task.name!r} comes with the package; choose another name.")
    _REGISTERED[task.name] = task
    return task


def get(name: str) -> Task:
    """The task of that name, one of `NAMES` or a registered one; `UserError` for any other."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in NAMES:
        raise UserError(
            f"There is no task {name!r}. The tasks are {', '.join([*NAMES, *_REGISTERED])}; for "
            "your own: --task jsonl --data FILE, with `question` and `answer` in each line."
        )
    return importlib.import_module(f"irpo_utils.tasks.{name}").TASK
