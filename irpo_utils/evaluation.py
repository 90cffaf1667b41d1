"""Stage 5: how good M_t is, with intervals. Accuracies are fractions of 1, intervals are 95 %."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict

from irpo_utils import UserError
from irpo_utils.grading import grade, group
from irpo_utils.sampling import sample

Z = 1.959964  # two-sided 95 % point of the normal distribution
RESAMPLES = 2000


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Interval of one proportion (Wilson 1927); it also holds near 0 and 1 and for small n."""
    if not 0 <= successes <= n or n == 0:
        raise UserError(f"{successes} successes of {n}: must be between 0 and n, and n at least 1.")
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n successes the end is 0 or 1; rounding would miss it.
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples is correct, unbiased, from c correct of n (Chen et al. 2021)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"pass@{k} from {c} correct of {n} samples: k must be between 1 and n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(extracted: list[str | None], is_correct) -> float:
    """Credit in [0, 1] of the most frequent answer; `is_correct(answer)` is True or False.

    None does not vote. Tied answers share the credit, which drawing one would earn on average.
    """
    votes = Counter(answer for answer in extracted if answer is not None)
    if not votes:
        return 0.0
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(bool(is_correct(answer)) for answer in first) / len(first)


def bootstrap_mean(values, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over questions, one value per question."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise UserError("A bootstrap needs a list of at least one number, one per question.")
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def paired_difference(correct_a, correct_b, seed: int = 0) -> tuple[float, float, float]:
    """(mean of b - a, low, high): what b gains over a on the same questions."""
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape:
        raise UserError("A paired comparison needs the same questions on both sides.")
    return bootstrap_mean(b - a, seed)


def bootstrap_row(metric: str, values, k: int = 1, seed: int = 0) -> dict:
    """One row of the metrics table from one value per question."""
    value, low, high = bootstrap_mean(values, seed)
    return {"metric": metric, "k": k, "value": value, "low": low, "high": high, "n": len(values)}


def share_row(metric: str, shares, k: int = 1) -> dict:
    """`bootstrap_row`; if all shares are 0 or all are 1, Wilson's interval instead of a point."""
    row = bootstrap_row(metric, shares, k)
    if row["low"] == row["high"] and row["value"] in (0, 1):
        row["low"], row["high"] = wilson_interval(round(sum(shares)), len(shares))
    return row


def proportion_row(metric: str, correct) -> dict:
    """One row of the metrics table from correct or incorrect per question."""
    successes, n = int(sum(correct)), len(correct)
    low, high = wilson_interval(successes, n)
    return {"metric": metric, "k": 1, "value": successes / n, "low": low, "high": high, "n": n}


def score(greedy: Dataset, sampled: Dataset, k: int) -> list[dict]:
    """Rows `metric`, `k`, `value`, `low`, `high`, `n` (questions) from graded completions.

    greedy: one completion per question; sampled: k per question. The column `k` is how many
    completions of a question a number looks at: `pass_at_k` takes powers of two up to k, and k.
    """
    columns = ["id", "correct", "extracted", "finished", "n_tokens"]
    first, many = group(greedy.select_columns(columns)), group(sampled.select_columns(columns))
    sizes = [{len(rows) for rows in groups.values()} for groups in (first, many)]
    if set(first) != set(many) or sizes != [{1}, {k}]:
        raise UserError(f"Every question needs one greedy and k = {k} sampled completions.")
    correct = [sum(row["correct"] for row in rows) for rows in many.values()]
    rows = [
        proportion_row("greedy", [rows[0]["correct"] for rows in first.values()]),
        share_row("sampled", [c / k for c in correct]),
        bootstrap_row("mean_tokens", per_question(many, lambda row: row["n_tokens"])),
        share_row("truncated_rate", per_question(many, lambda row: not row["finished"])),
        share_row("no_answer_rate", per_question(many, lambda row: row["extracted"] is None)),
        share_row("majority", [majority(rows) for rows in many.values()], k),
    ]
    for size in sorted({2**i for i in range(k.bit_length())} | {k}):
        rows.append(share_row("pass_at_k", [pass_at_k(k, c, size) for c in correct], size))
    return rows


def per_question(groups: dict[str, list[dict]], of) -> list[float]:
    """The mean of `of(row)` for each question."""
    return [float(np.mean([of(row) for row in rows])) for rows in groups.values()]


def majority(rows: list[dict]) -> float:
    """`majority_vote` of the graded completions of one question."""
    correct = {row["extracted"] for row in rows if row["correct"]}
    return majority_vote([row["extracted"] for row in rows], lambda answer: answer in correct)


class Evaluation(NamedTuple):
    """What `evaluate` returns: `metrics` as `score` makes them, and the graded completions."""

    metrics: Dataset
    greedy: Dataset
    sampled: Dataset


def evaluate(model, tokenizer, questions, task, k=8, temperature=0.8, top_p=1.0, **options):
    """Greedy accuracy, and accuracy, majority vote, pass@k and lengths over k samples.

    The paper votes over 32 samples at temperature 0.8 (section 3.1). options: of `sampling.sample`.
    """
    greedy = sample(model, tokenizer, questions, task, 1, 0.0, **options)
    sampled = sample(model, tokenizer, questions, task, k, temperature, top_p, **options)
    both = graded(greedy, sampled, task)
    return Evaluation(Dataset.from_list(score(**both, k=k)), **both)


def graded(greedy: Dataset, sampled: Dataset, task) -> DatasetDict:
    """Both graded, without the prompts, which are those of the questions and most of the size."""
    both = DatasetDict({"greedy": grade(greedy, task), "sampled": grade(sampled, task)})
    return both.remove_columns(["prompt", "prompt_ids"])


def correct_per_question(graded: Dataset) -> dict[str, float]:
    """Share of correct completions by question id."""
    groups = group(graded.select_columns(["id", "correct"]))
    return dict(zip(groups, per_question(groups, lambda row: row["correct"]), strict=True))


def compare(graded_a: Dataset, graded_b: Dataset) -> dict:
    """What b gains over a on the same questions: `difference` in accuracy, `low`, `high`, `n`."""
    a, b = correct_per_question(graded_a), correct_per_question(graded_b)
    if set(a) != set(b):
        raise UserError(f"{len(set(a) ^ set(b))} questions are on one side only: nothing to pair.")
    difference, low, high = paired_difference(list(a.values()), [b[i] for i in a])
    return {"difference": difference, "low": low, "high": high, "n": len(a)}
