"""Stage 5: how good M_t is, with intervals. Accuracies are fractions of 1, intervals are 95 %.

The first half is statistics on numpy arrays. `score` applies it to graded completions, `evaluate`
samples, grades and scores, and `compare` pairs two models on the same questions.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict

from irpo_utils import UserError
from irpo_utils.grading import grade
from irpo_utils.pairs import group
from irpo_utils.sampling import sample

Z = 1.959964  # two-sided 95 % point of the normal distribution
RESAMPLES = 2000
COMMON_K = 8  # majority votes are also counted at this k, so that runs with another k compare


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Interval of one proportion (Wilson 1927); it also holds near 0 and 1 and for small n."""
    if not 0 <= successes <= n or n == 0:
        raise UserError(f"{successes} successes of {n}: n must be positive and not less.")
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # The ends at 0 and n successes are exactly 0 and 1, up to rounding.
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples is correct, unbiased, from c correct of n (Chen et al. 2021)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"pass@{k} from {c} correct of {n} samples: k must be between 1 and n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(extracted: list[str | None], is_correct) -> float:
    """Credit in [0, 1] of the most frequent answer; `is_correct(answer)` is True or False.

    None does not vote. Tied answers share the credit, which is what drawing one of them would earn
    on average. Answers agree if they are the same string, as `task.extract` spells them.
    """
    votes = Counter(answer for answer in extracted if answer is not None)
    if not votes:
        return 0.0
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(bool(is_correct(answer)) for answer in first) / len(first)


def mcnemar(correct_a, correct_b) -> dict:
    """Exact two-sided McNemar test on the same questions: `p`, and the four counts.

    Only questions that exactly one of the two answers correctly tell them apart: without a
    difference, each of them is a fair coin toss.
    """
    a, b = _paired(correct_a, correct_b)
    if not np.isin([a, b], (0, 1)).all():
        raise UserError("McNemar's test needs 0 or 1 per question; else use `paired_difference`.")
    only_a, only_b, both = int((a > b).sum()), int((a < b).sum()), int((a * b).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    counts = {"only_a": only_a, "only_b": only_b, "both": both, "neither": len(a) - n - both}
    return {"p": min(1.0, 2 * tail / 2**n), **counts}


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
    a, b = _paired(correct_a, correct_b)
    return bootstrap_mean(b - a, seed)


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError("A paired comparison needs the same questions on both sides, at least one.")
    return a, b


def bootstrap_row(metric: str, values, k: int = 1, seed: int = 0) -> dict:
    """One row of the metrics table from one value per question."""
    value, low, high = bootstrap_mean(values, seed)
    return {"metric": metric, "k": k, "value": value, "low": low, "high": high, "n": len(values)}


def share_row(metric: str, shares, k: int = 1) -> dict:
    """`bootstrap_row`; if all shares are 0 or all are 1, Wilson's interval instead of a point."""
    row = bootstrap_row(metric, shares, k)
    if row["low"] == row["high"] and row["value"] in (0, 1):
        successes = round(row["value"] * len(shares))
        row["low"], row["high"] = wilson_interval(successes, len(shares))
    return row


def proportion_row(metric: str, correct) -> dict:
    """One row of the metrics table from correct or incorrect per question."""
    successes, n = int(sum(correct)), len(correct)
    low, high = wilson_interval(successes, n)
    return {"metric": metric, "k": 1, "value": successes / n, "low": low, "high": high, "n": n}


def score(
    greedy: Dataset, sampled: Dataset, k: int, questions: Dataset | None = None
) -> list[dict]:
    """Rows `metric`, `k`, `value`, `low`, `high`, `n` (questions) from graded completions.

    greedy: one completion per question; sampled: k per question. The column `k` is how many
    completions of a question a number looks at: 1 for means over single completions, more for
    `pass_at_k`, `majority` and `distinct_answers`. `questions` adds accuracy by `steps` and by
    `new_skeleton` if it has these columns.
    """
    columns = ["id", "correct", "extracted", "finished", "n_tokens"]
    single, many = group(greedy.select_columns(columns)), group(sampled.select_columns(columns))
    sizes = [{len(rows) for rows in groups.values()} for groups in (single, many)]
    if set(single) != set(many) or sizes != [{1}, {k}]:
        raise UserError(f"Every question needs one greedy and k = {k} sampled completions.")
    first = {i: rows[0] for i, rows in single.items()}
    groups = [many[i] for i in first]

    def mean(of) -> list[float]:
        return [float(np.mean([of(row) for row in rows])) for rows in groups]

    rows = [
        proportion_row("greedy", [row["correct"] for row in first.values()]),
        bootstrap_row("greedy_mean_tokens", [row["n_tokens"] for row in first.values()]),
        proportion_row("greedy_truncated_rate", [not row["finished"] for row in first.values()]),
        share_row("sampled", mean(lambda row: row["correct"])),
        bootstrap_row("mean_tokens", mean(lambda row: row["n_tokens"])),
        share_row("truncated_rate", mean(lambda row: not row["finished"])),
        share_row("no_answer_rate", mean(lambda row: row["extracted"] is None)),
    ]
    for size in sorted({min(COMMON_K, k), k}):
        rows.append(share_row("majority", [_blocks(_majority, r, size) for r in groups], size))
        distinct = [_blocks(_distinct, r, size) for r in groups]
        rows.append(bootstrap_row("distinct_answers", distinct, size))
    correct = [sum(row["correct"] for row in rows) for rows in groups]
    for size in sorted({2**i for i in range(k.bit_length())} | {k}):
        rows.append(share_row("pass_at_k", [pass_at_k(k, c, size) for c in correct], size))
    return rows + _by_kind(first, questions or [])


def _majority(rows: list[dict]) -> float:
    correct = {row["extracted"] for row in rows if row["correct"]}
    return majority_vote([row["extracted"] for row in rows], lambda answer: answer in correct)


def _distinct(rows: list[dict]) -> int:
    return len({row["extracted"] for row in rows} - {None})


def _blocks(count, rows: list[dict], size: int) -> float:
    """The mean of `count` over disjoint blocks of `size` completions; an incomplete one is left out."""
    starts = range(0, len(rows) - size + 1, size)
    return float(np.mean([count(rows[start : start + size]) for start in starts]))


def _by_kind(first: dict[str, dict], questions) -> list[dict]:
    """Greedy accuracy by number of steps, and for unseen and seen question templates."""
    groups: dict[str, list[bool]] = {}
    for question in questions:
        correct = first[question["id"]]["correct"]
        if question.get("new_skeleton") is not None:
            kind = "new" if question["new_skeleton"] else "seen"
            groups.setdefault(f"greedy_{kind}_skeleton", []).append(correct)
        if question.get("steps") is not None:
            groups.setdefault(f"greedy_steps_{question['steps']}", []).append(correct)
    return [proportion_row(metric, groups[metric]) for metric in sorted(groups)]


@dataclass
class Evaluation:
    """What `evaluate` returns: `metrics` as `score` makes them, and the graded completions."""

    metrics: Dataset
    greedy: Dataset
    sampled: Dataset


def evaluate(
    model, tokenizer, questions, task, k: int = 8, temperature=0.8, **options
) -> Evaluation:
    """Greedy accuracy, and accuracy, majority vote, pass@k and lengths over k samples.

    The paper votes over 32 samples at temperature 0.8 (section 3.1). `options` go to
    `sampling.sample`.
    """
    both = answers(model, tokenizer, questions, task, k, temperature, **options)
    rows = score(both["greedy"], both["sampled"], k, questions)
    return Evaluation(Dataset.from_list(rows), both["greedy"], both["sampled"])


def answers(
    model, tokenizer, questions, task, k: int, temperature: float, **options
) -> DatasetDict:
    """Graded completions: one `greedy` and k `sampled` ones per question.

    The prompts are left out: they are those of the questions, and most of the size.
    """
    top_p = options.pop("top_p", 1.0)
    greedy = sample(model, tokenizer, questions, task, 1, 0.0, **options)
    sampled = sample(model, tokenizer, questions, task, k, temperature, top_p, **options)
    both = DatasetDict({"greedy": grade(greedy, task), "sampled": grade(sampled, task)})
    return both.remove_columns(["prompt", "prompt_ids"])


def compare(graded_a: Dataset, graded_b: Dataset) -> dict:
    """What b gains over a on the same questions, one completion each, matched by `id`.

    Keys: `difference` (b - a, fraction of 1), `low`, `high`, `p_mcnemar`, `only_a`, `only_b`, `n`.
    """
    a, b = correct_per_question(graded_a), correct_per_question(graded_b)
    if set(a) != set(b) or len(a) != len(graded_a) or len(b) != len(graded_b):
        raise UserError(
            f"compare needs the same questions on both sides ({len(set(a) ^ set(b))} ids are on one "
            "side only) with one completion each, such as the greedy ones. For sampled completions, "
            "give `correct_per_question` of both to `paired_difference`."
        )
    values_a, values_b = list(a.values()), [b[i] for i in a]
    difference, low, high = paired_difference(values_a, values_b)
    test = mcnemar(values_a, values_b)
    counts = {"only_a": test["only_a"], "only_b": test["only_b"], "n": len(a)}
    return {"difference": difference, "low": low, "high": high, "p_mcnemar": test["p"], **counts}


def correct_per_question(graded: Dataset) -> dict[str, float]:
    """Share of correct completions by question id."""
    groups = group(graded.select_columns(["id", "correct"]))
    return {i: float(np.mean([row["correct"] for row in rows])) for i, rows in groups.items()}
