"""Is a difference more than chance? Intervals over seeds and questions, and McNemar's test."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from irpo_utils import UserError, evaluation


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
