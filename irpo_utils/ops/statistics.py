"""Statistics beyond one evaluation: several seeds, McNemar's test, and further metrics."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from irpo_utils import UserError, evaluation
from irpo_utils.evaluation import bootstrap_row, per_question, proportion_row
from irpo_utils.grading import group


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % point of Student's t."""
    return float(stats.t.ppf(0.975, degrees))


def seed_and_question_interval(matrix, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of `matrix[seed, question]`, for the mean over all seeds and questions.

    Resamples both; a resample takes the same questions for each of its seeds. Give the matrix of
    differences to compare two methods. With one seed the interval holds for that seed only. A
    single new run scatters more than the mean.
    """
    if not len(matrix) or {len(row) for row in matrix} != {max(1, len(matrix[0]))}:
        raise UserError("matrix[seed, question] needs the same questions for every seed.")
    matrix = spread = np.array(matrix, dtype=float)
    n_seeds, n_questions = matrix.shape
    if n_seeds > 1:
        # A bootstrap over few seeds is too narrow (five that differ much: 87 % instead of 95 %). So
        # the distances of the seeds from their mean are stretched to what Student's t asks for.
        effects = matrix.mean(1, keepdims=True) - matrix.mean()
        stretch = t_quantile(n_seeds - 1) / evaluation.Z * math.sqrt(n_seeds / (n_seeds - 1))
        spread = matrix + effects * (stretch - 1)
    rng, means = np.random.default_rng(seed), []
    for _ in range(evaluation.RESAMPLES):
        of_questions = spread[rng.integers(n_seeds, size=n_seeds)].mean(0)
        means.append(of_questions[rng.integers(n_questions, size=n_questions)].mean())
    low, high = np.clip(np.percentile(means, (2.5, 97.5)), matrix.min(), matrix.max())
    return float(matrix.mean()), float(low), float(high)


def mcnemar(correct_a, correct_b) -> dict:
    """Exact two-sided McNemar test on the same questions: `p`, and the four counts.

    Only questions that exactly one of the two answers correctly tell them apart: without a
    difference, each of them is a fair coin toss.
    """
    a, b = (np.asarray(side, dtype=float) for side in (correct_a, correct_b))
    if a.shape != b.shape or not len(a) or not np.isin([a, b], (0, 1)).all():
        raise UserError(
            "McNemar's test needs 0 or 1 per question, for the same questions on both sides; else "
            "use `paired_difference`."
        )
    only_a, only_b, both = int((a > b).sum()), int((a < b).sum()), int((a * b).sum())
    neither, n = len(a) - only_a - only_b - both, only_a + only_b
    p = float(stats.binomtest(only_a, n).pvalue) if n else 1.0
    return {"p": p, "only_a": only_a, "only_b": only_b, "both": both, "neither": neither}


COMMON_K = 8  # majority votes are also counted at this k, so that runs with another k compare


def further_rows(answers, questions) -> list[dict]:
    """Metrics that `evaluation.score` leaves out: lengths of greedy completions, votes at 8, kinds.

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
        distinct = [mean_over_blocks(_distinct, rows_, size) for rows_ in many]
        rows.append(bootstrap_row("distinct_answers", distinct, size))
        if size < k:  # `score` has the vote over all k
            votes = [mean_over_blocks(evaluation.majority, rows_, size) for rows_ in many]
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
