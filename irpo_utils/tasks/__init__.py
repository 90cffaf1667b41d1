"""One file a task; `get` finds it by name."""

from __future__ import annotations

import importlib

from irpo_utils import UserError
from irpo_utils.tasks.base import FewShot, Task  # noqa: F401

NAMES = ("word_problems", "word_choices", "gsm8k", "svamp", "arc_challenge", "math", "jsonl")


def get(name: str) -> Task:
    """The task of that name, one of `NAMES`; raises `UserError` for any other."""
    if name not in NAMES:
        raise UserError(
            f"There is no task {name!r}. The tasks are {', '.join(NAMES)}; for questions of your own take "
            "--task jsonl --data FILE, a JSONL file whose lines have `question` and `answer`."
        )
    return importlib.import_module(f"irpo_utils.tasks.{name}").TASK
