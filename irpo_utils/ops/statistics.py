"""Metrics of a run that `evaluation.score` leaves out."""

from __future__ import annotations

import numpy as np

from irpo_utils import evaluation
from irpo_utils.evaluation import bootstrap_row, per_question, proportion_row
from irpo_utils.grading import group

COMMON_K = 8  # majority votes are also counted at this k, so that runs with another k compare


def further_rows(answers, questions) -> list[dict]:
    """Rows of the metrics table: lengths of greedy completions, votes at 8, kinds.

    answers: the tables `greedy` and `sampled` of `evaluation.graded`. `questions` give greedy
    accuracy by `steps` and by `new_skeleton` if they have these columns.
    """
    first, many = group(answers["greedy"]), list(group(answers["sampled"]).values())
    k = len(many[0])
    rows = [
        bootstrap_row("greedy_mean_tokens", per_question(first, lambda row: row["n_tokens"])),
        proportion_row("greedy_truncated_rate", [not r[0]["finished"] for r in first.values()]),
    ]
    for size in sorted({min(COMMON_K, k), k}):
        distinct = [mean_over_blocks(_distinct, drawn, size) for drawn in many]
        rows.append(bootstrap_row("distinct_answers", distinct, size))
        if size < k:  # `score` has the vote over all k
            votes = [mean_over_blocks(evaluation.majority, drawn, size) for drawn in many]
            rows.append(evaluation.share_row("majority", votes, size))
    kinds: dict[str, list[bool]] = {}
    for question in questions:
        correct = first[question["id"]][0]["correct"]
        if question.get("new_skeleton") is not None:
            kind = "new" if question["new_skeleton"] else "seen"
            kinds.setdefault(f"greedy_{kind}_skeleton", []).append(correct)
        if question.get("steps") is not None:
            kinds.setdefault(f"greedy_steps_{question['steps']}", []).append(correct)
    return rows + [proportion_row(metric, kinds[metric]) for metric in sorted(kinds)]


def _distinct(rows: list[dict]) -> int:
    return len({row["extracted"] for row in rows} - {None})


def mean_over_blocks(count, rows: list[dict], size: int) -> float:
    """The mean of `count` over disjoint blocks of `size` completions, without an incomplete one."""
    starts = range(0, len(rows) - size + 1, size)
    return float(np.mean([count(rows[start : start + size]) for start in starts]))
