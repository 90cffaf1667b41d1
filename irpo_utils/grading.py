"""Stage 2: reward 1 where the final answer equals the gold answer, otherwise 0 (section 2).

The prompts of appendix B.1 ask for "Final answer: ...". The task decides how an answer is read and
compared; the paper does not say how. It also does not say what happens to a completion without an
answer or one cut off at the token limit. Here both get reward 0, and `reason` tells them apart.
"""

import inspect
import re
from collections import Counter

from irpo_utils.tasks.base import Task

REASONS = ("ok", "wrong", "no_answer", "truncated")
COLUMNS = {"extracted": "string", "correct": "bool", "reason": "string", "reward": "float64"}


def grade_one(row: dict, task: Task) -> dict:
    """`extracted` (str or None), `correct`, `reason` (of `REASONS`) and `reward` of one row.

    The task sees all columns. A completion that was cut off, perhaps in a number, has no answer.
    """
    extracted, correct, reason = None, False, "truncated"
    if row["finished"]:
        extracted, reason = task.extract(row["completion"] or "", row), "no_answer"
    if extracted is not None:
        takes_row = "row" in inspect.signature(task.is_correct).parameters
        correct = bool(task.is_correct(extracted, row["answer"], *([row] if takes_row else [])))
        reason = "ok" if correct else "wrong"
    return {"extracted": extracted, "correct": correct, "reason": reason, "reward": float(correct)}


def grade(samples, task: Task):
    """`samples` (a `Dataset`) with the columns `extracted`, `correct`, `reason` and `reward`.

    Columns of these names are replaced. The task must be safe with any text, in bounded time.
    """
    from datasets import Value  # late: it takes a second, and the graders do without it

    samples = samples.remove_columns([name for name in COLUMNS if name in samples.column_names])
    grades = [grade_one(row, task) for row in samples]
    for name, kind in COLUMNS.items():
        samples = samples.add_column(name, [grade[name] for grade in grades], feature=Value(kind))
    return samples


def count_reasons(graded) -> dict[str, int]:
    """How many completions got each of `REASONS`, zeros included."""
    counts = Counter(graded["reason"])
    return {reason: counts[reason] for reason in REASONS}


def unread(graded, n: int = 3) -> tuple[int, list[tuple[str, int]]]:
    """How many completions have no readable answer, and their n commonest endings with counts.

    An ending is the last line, 60 characters at most, with # for numbers. Many equal endings are a
    format problem: read them before you train.
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
