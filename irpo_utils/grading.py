"""Grade completions: reward 1 where the final answer equals the gold answer, otherwise 0.

Source: Pang et al., arXiv 2404.19733v3, section 2 ("the reward is 1 if y matches the gold label")
and the prompts of appendix B.1, which ask for "Final answer: ...". The task decides how an answer
is read and compared (`irpo_utils.tasks`); the paper does not say how. It also does not say what
happens to a completion without an answer or one cut off at the token limit. Here both get reward 0,
and `reason` tells them apart.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from irpo_utils.tasks.base import Task

REASONS = ("ok", "wrong", "no_answer", "truncated")
COLUMNS = {"extracted": "string", "correct": "bool", "reason": "string", "reward": "float64"}


def grade_one(row: dict, task: Task) -> dict:
    """`extracted` (str or None), `correct`, `reason` (of `REASONS`) and `reward` of one row.

    `row` has `completion`, `answer`, `finished` and the columns of its question; the task sees all
    of them. Where `finished` is False the completion was cut off, perhaps within a number, so
    nothing is extracted from it.
    """
    if not row["finished"]:
        return {"extracted": None, "correct": False, "reason": "truncated", "reward": 0.0}
    extracted = task.extract(row["completion"] or "", row)
    if extracted is None:
        return {"extracted": None, "correct": False, "reason": "no_answer", "reward": 0.0}
    if "row" in inspect.signature(task.is_correct).parameters:
        correct = bool(task.is_correct(extracted, row["answer"], row))
    else:  # the verdict of this task does not depend on the question
        correct = bool(task.is_correct(extracted, row["answer"]))
    reason = "ok" if correct else "wrong"
    return {"extracted": extracted, "correct": correct, "reason": reason, "reward": float(correct)}


def grade(samples: Dataset, task: Task) -> Dataset:
    """`samples` with the columns `extracted`, `correct`, `reason` and `reward`.

    Columns of these names are replaced. No completion raises an error: the task must be safe with
    hostile text, in bounded time.
    """
    from datasets import Value

    samples = samples.remove_columns([name for name in COLUMNS if name in samples.column_names])
    grades = [grade_one(row, task) for row in samples]
    for name, kind in COLUMNS.items():
        samples = samples.add_column(name, [grade[name] for grade in grades], feature=Value(kind))
    return samples


def count_reasons(graded: Dataset) -> dict[str, int]:
    """How many completions got each of `REASONS`, zeros included.

    >>> count_reasons({"reason": ["ok", "wrong", "ok"]})
    {'ok': 2, 'wrong': 1, 'no_answer': 0, 'truncated': 0}
    """
    counts = Counter(graded["reason"])
    return {reason: counts[reason] for reason in REASONS}


def unread(graded: Dataset, n: int = 3) -> tuple[int, list[tuple[str, int]]]:
    """How many completions have no readable answer, and their n commonest endings with counts.

    An ending is the last line, 60 characters at most, with # for numbers. Many equal endings are a
    format problem: read them before you train.

    >>> unread({"reason": ["no_answer"] * 2, "completion": ["It is 4.", "It is 15."]})
    (2, [('It is #.', 2)])
    """
    rows = zip(graded["reason"], graded["completion"], strict=True)
    texts = [text or "" for reason, text in rows if reason == "no_answer"]
    last_lines = [text.strip().rpartition("\n")[2].strip()[-60:] for text in texts]
    endings = Counter(re.sub(r"\d[\d.,]*\d|\d", "#", line) for line in last_lines)
    return len(texts), endings.most_common(n)


def group(rows) -> dict[str, list[dict]]:
    """Rows by question id, in order."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups
