"""Grade completions: reward 1 where the final answer equals the gold answer (section 2 of the paper), otherwise 0.

Source: Pang et al., arXiv 2404.19733v3, section 2 ("the reward is 1 if y matches the gold label") and the prompts of
appendix B.1, which ask for "Final answer: ...". How an answer is read and compared is the task's affair
(`irpo_utils.tasks`); the paper does not say how. Nor does it say what becomes of a completion without an answer or cut
off at the token limit: here both are wrong, so that they can be losers and never winners, and `reason` tells which.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from irpo_utils.tasks.base import Task

REASONS = ("ok", "wrong", "no_answer", "truncated")


def grade_one(row: dict, task: Task) -> dict:
    """`extracted` (str or None), `correct` (bool) and `reason` (one of `REASONS`) of one row of samples.

    `row` has `completion`, `answer`, `finished`, and `choices` if the task has them. Where `finished` is False the
    completion was cut off: what it says last may be half a number, so nothing is extracted from it, and it has no vote.
    """
    if not row["finished"]:
        return {"extracted": None, "correct": False, "reason": "truncated"}
    extracted = task.extract(row["completion"] or "", row)
    if extracted is None:
        return {"extracted": None, "correct": False, "reason": "no_answer"}
    correct = bool(task.is_correct(extracted, row["answer"]))
    return {"extracted": extracted, "correct": correct, "reason": "ok" if correct else "wrong"}


def grade(samples: Dataset, task: Task) -> Dataset:
    """`samples` (one row a completion) with the columns `extracted`, `correct` and `reason` added (or made anew).

    Raises nothing whatever a completion says; it is for the task to be safe with hostile text, in bounded time.
    """
    from datasets import Value

    kinds = {"extracted": "string", "correct": "bool", "reason": "string"}
    samples = samples.remove_columns([name for name in kinds if name in samples.column_names])
    needed = [
        name
        for name in ("completion", "answer", "finished", "choices")
        if name in samples.column_names
    ]
    grades = [grade_one(row, task) for row in samples.select_columns(needed)]
    for name, kind in kinds.items():
        samples = samples.add_column(name, [grade[name] for grade in grades], feature=Value(kind))
    return samples


def count_reasons(graded: Dataset) -> dict[str, int]:
    """How many completions got each of `REASONS`, zeros included.

    >>> count_reasons({"reason": ["ok", "wrong", "ok"]})
    {'ok': 2, 'wrong': 1, 'no_answer': 0, 'truncated': 0}
    """
    counts = Counter(graded["reason"])
    return {reason: counts[reason] for reason in REASONS}
