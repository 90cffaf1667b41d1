"""Stage 5: how good M_t is, with honest spread. Accuracies are fractions of 1, intervals 95 %.

The upper half is plain statistics on numpy arrays; `score` applies it to graded completions; `evaluate` samples,
grades and scores; `compare` sets two iterations side by side.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from irpo_utils import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Z = 1.959964  # two-sided 95 % point of the normal distribution
T_95 = (
    math.nan,
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
)  # of Student's t
RESAMPLES = 2000
COMMON_K = (
    8  # votes and distinct answers are also counted at this k, so that runs with another k compare
)


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % point of Student's t; from 11 degrees on by its expansion around the normal's, within 0.003."""
    if degrees < len(T_95):
        return T_95[degrees]
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Interval of one proportion (Wilson 1927): unlike p +- 1.96 s.e. it holds near 0 and 1 and for small n."""
    if not 0 <= successes <= n or n == 0:
        raise UserError(
            f"{successes} successes of {n}: at least one case is needed, and no more successes than cases."
        )
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # The ends at no and at all successes are exactly 0 and 1, which the formula misses by a rounding error.
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples is right, unbiased, from c right ones among n (Chen et al. 2021, eq. 1)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(
            f"pass@{k} from {c} right ones among {n} samples: k must lie between 1 and the samples drawn."
        )
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(extracted: list[str | None], is_correct) -> float:
    """Credit in [0, 1] of the most frequent answer; `is_correct(answer) -> bool`.

    None (could not be parsed) does not vote, tied answers share the credit (what drawing one of them would earn on
    average), and nobody voting earns 0. Answers agree if they are the same string, as `task.extract` spells them.
    """
    votes = Counter(answer for answer in extracted if answer is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(bool(is_correct(answer)) for answer in winners) / len(winners) if winners else 0.0


def mcnemar(correct_a, correct_b) -> dict:
    """Exact two-sided McNemar test on the same questions: `p`, and how many `only_a`, `only_b`, `both`, `neither`.

    Only questions that one of the two got right tell them apart: without a difference each is a toss of a fair coin.
    """
    a, b = _paired(correct_a, correct_b)
    if not np.isin([a, b], (0, 1)).all():
        raise UserError(
            "McNemar's test needs right or wrong per question; for fractions take `paired_difference`."
        )
    only_a, only_b, both = (int(x.sum()) for x in (a > b, b > a, a * b))
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    return {
        "p": min(1.0, 2 * tail / 2**discordant),
        "only_a": only_a,
        "only_b": only_b,
        "both": both,
        "neither": len(a) - discordant - both,
    }


def bootstrap_mean(values, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over questions, one value per question."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise UserError("A bootstrap needs a list of at least one number, one per question.")
    rng, n = np.random.default_rng(seed), len(values)
    low, high = np.percentile(
        [values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)], (2.5, 97.5)
    )
    return float(values.mean()), float(low), float(high)


def paired_difference(correct_a, correct_b, seed: int = 0) -> tuple[float, float, float]:
    """(mean of b - a, low, high): what b gains over a on the same questions; bootstrap over questions."""
    a, b = _paired(correct_a, correct_b)
    return bootstrap_mean(b - a, seed)


def seed_and_question_interval(matrix, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of `matrix[seed, question]`: resamples both, for the mean over all seeds and all questions.

    A single new run scatters more than that mean.

    All seeds answer the same questions, so a resample takes the same questions for each of its seeds. Give the matrix
    of differences to compare two methods. With one seed the interval holds for that seed only.
    """
    if not len(matrix) or {len(row) for row in matrix} != {max(1, len(matrix[0]))}:
        raise UserError(
            "matrix[seed, question] needs a seed and a question, and the same questions for every seed."
        )
    matrix = spread = np.array(matrix, dtype=float)
    seeds, questions = matrix.shape
    if seeds > 1:
        # Few seeds bootstrap too narrowly (five that differ much: 87 % instead of 95 %). So the distances of seeds from
        # their mean are stretched to what Student's t asks for; the mean itself stays.
        effects = matrix.mean(1, keepdims=True) - matrix.mean()
        spread = matrix + effects * (t_quantile(seeds - 1) / Z * math.sqrt(seeds / (seeds - 1)) - 1)
    rng = np.random.default_rng(seed)
    means = [
        spread[rng.integers(seeds, size=seeds)]
        .mean(0)[rng.integers(questions, size=questions)]
        .mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.clip(np.percentile(means, (2.5, 97.5)), matrix.min(), matrix.max())
    return float(matrix.mean()), float(low), float(high)


def bootstrap_row(metric: str, values, k: int = 1, seed: int = 0) -> dict:
    """One row of the metrics table from one value per question."""
    value, low, high = bootstrap_mean(values, seed)
    return {"metric": metric, "k": k, "value": value, "low": low, "high": high, "n": len(values)}


def share_row(metric: str, values, k: int = 1) -> dict:
    """`bootstrap_row` of shares; where all are 0 or all 1, which gives a bootstrap nothing to draw, Wilson's interval."""
    row = bootstrap_row(metric, values, k)
    row["low"], row["high"] = no_point(row["value"], row["low"], row["high"], len(values))
    return row


def no_point(value: float, low: float, high: float, n: int) -> tuple[float, float]:
    """(low, high), or Wilson's interval where a share of `n` questions is 0 or 1 for each of them."""
    return wilson_interval(round(value * n), n) if low == high and value in (0, 1) else (low, high)


def proportion_row(metric: str, correct) -> dict:
    """One row of the metrics table from right or wrong per question."""
    right, n = int(sum(correct)), len(correct)
    low, high = wilson_interval(right, n)
    return {"metric": metric, "k": 1, "value": right / n, "low": low, "high": high, "n": n}


def score(
    graded_greedy: Dataset, graded_sampled: Dataset, k: int, questions: Dataset | None = None
) -> list[dict]:
    """Rows `metric`, `k`, `value`, `low`, `high`, `n` (questions) from one greedy and k sampled completions each.

    The column `k` is how many completions of a question one number looks at: 1 for the mean of single completions
    (`sampled`, `mean_tokens`, the rates), more for `pass_at_k` (powers of two up to k, and k), `majority` and
    `distinct_answers` (at k, and at 8 so that evaluations with another k compare; blocks of 8 are averaged).
    `questions` adds accuracy by `steps` and `new_skeleton` where it has these columns.
    Raises `UserError` where the two do not hold the same questions with 1 and k completions each.
    """
    greedy, sampled = _by_question(graded_greedy), _by_question(graded_sampled)
    sizes = [{len(rows) for rows in groups.values()} for groups in (greedy, sampled)]
    if set(greedy) != set(sampled) or sizes != [{1}, {k}]:
        raise UserError(
            f"Every question needs one greedy and k = {k} sampled completions; at least one question."
        )
    single, many = {i: rows[0] for i, rows in greedy.items()}, [sampled[i] for i in greedy]
    rows = [
        proportion_row("greedy", [row["correct"] for row in single.values()]),
        bootstrap_row("greedy_mean_tokens", [row["n_tokens"] for row in single.values()]),
        proportion_row("greedy_truncated_rate", [not row["finished"] for row in single.values()]),
    ]
    for metric, of, as_row in (
        ("sampled", lambda row: row["correct"], share_row),
        ("mean_tokens", lambda row: row["n_tokens"], bootstrap_row),
        ("truncated_rate", lambda row: not row["finished"], share_row),
        ("no_answer_rate", lambda row: row["extracted"] is None, share_row),
    ):
        rows.append(as_row(metric, [np.mean([of(row) for row in group]) for group in many]))
    for metric, count, as_row in (
        ("majority", _majority, share_row),
        ("distinct_answers", _distinct, bootstrap_row),
    ):
        for size in sorted({min(COMMON_K, k), k}):
            rows.append(
                as_row(metric, [_mean_of_blocks(count, group, size) for group in many], size)
            )
    right = [sum(row["correct"] for row in group) for group in many]
    for size in sorted({2**i for i in range(k.bit_length())} | {k}):
        rows.append(share_row("pass_at_k", [pass_at_k(k, c, size) for c in right], size))
    return rows + _by_kind(single, questions or [])


@dataclass
class Evaluation:
    """What `evaluate` returns: `metrics` as `score` makes them, and the graded completions behind them."""

    metrics: Dataset
    greedy: Dataset
    sampled: Dataset


def evaluate(
    model,
    tokenizer,
    questions: Dataset,
    task,
    k: int = 8,
    temperature: float = 0.8,
    max_new_tokens: int = 256,
    seed: int = 0,
    top_p: float = 1.0,
    **options,
) -> Evaluation:
    """Greedy accuracy, and accuracy, majority vote, pass@k and lengths over k samples, of the model as it is now.

    The paper votes over 32 samples at temperature 0.8 (section 3.1). `options` (`batch_size`, `progress`) go to
    `sampling.sample`. Raises what `sampling.sample` and `score` raise.
    """
    from datasets import Dataset

    both = answers(
        model, tokenizer, questions, task, k, temperature, max_new_tokens, seed, top_p, **options
    )
    return Evaluation(
        Dataset.from_list(score(both["greedy"], both["sampled"], k, questions)),
        both["greedy"],
        both["sampled"],
    )


def answers(
    model,
    tokenizer,
    questions: Dataset,
    task,
    k: int = 8,
    temperature: float = 0.8,
    max_new_tokens: int = 256,
    seed: int = 0,
    top_p: float = 1.0,
    **options,
):
    """What `evaluate` counts: a `DatasetDict` of one `greedy` and k `sampled` graded completions per question."""
    # Stages do not know each other; this one is by definition sample + grade + count, so it borrows the first two
    # here, and the statistics above stay free of torch.
    from datasets import DatasetDict

    from irpo_utils.grading import grade
    from irpo_utils.sampling import sample

    def graded(**settings):
        return grade(
            sample(
                model,
                tokenizer,
                questions,
                task,
                max_new_tokens=max_new_tokens,
                seed=seed,
                **settings,
                **options,
            ),
            task,
        )

    return DatasetDict(
        {
            "greedy": graded(n=1, temperature=0.0),
            "sampled": graded(n=k, temperature=temperature, top_p=top_p),
        }
    )


def compare(graded_a: Dataset, graded_b: Dataset) -> dict:
    """Two iterations on the same questions, one (greedy) completion each, matched by `id`: what b gains over a.

    Keys `difference` (b - a, fraction of 1), `low`, `high`, `p_mcnemar`, `only_a`, `only_b`, `n`. Raises `UserError`
    when the questions differ or have several completions.
    """
    a, b = correct_per_question(graded_a), correct_per_question(graded_b)
    if set(a) != set(b):
        raise UserError(
            f"The two evaluations are not of the same questions ({len(set(a) ^ set(b))} ids are in one of "
            "them only), so they cannot be paired. Evaluate both on the same questions of one split."
        )
    if len(graded_a) != len(a) or len(graded_b) != len(b):
        raise UserError(
            "compare takes one completion per question, such as the greedy ones. For sampled completions "
            "give the values of `correct_per_question` of both to `paired_difference`."
        )
    a, b = list(a.values()), [b[i] for i in a]
    difference, low, high = paired_difference(a, b)
    test = mcnemar(a, b)
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "p_mcnemar": test["p"],
        "only_a": test["only_a"],
        "only_b": test["only_b"],
        "n": len(a),
    }


def correct_per_question(graded: Dataset) -> dict[str, float]:
    """Share of right completions by question id: a row of the matrix for `seed_and_question_interval`."""
    return {
        i: float(np.mean([row["correct"] for row in rows]))
        for i, rows in _by_question(graded).items()
    }


def _by_kind(single: dict[str, dict], questions) -> list[dict]:
    """Greedy accuracy by number of steps, and for skeletons that training had or had not, where questions say so."""
    groups: dict[str, list[bool]] = {}
    for question in (row for row in questions if row["id"] in single):
        correct = single[question["id"]]["correct"]
        if question.get("new_skeleton") is not None:
            groups.setdefault(
                f"greedy_{'new' if question['new_skeleton'] else 'seen'}_skeleton", []
            ).append(correct)
        if question.get("steps") is not None:
            groups.setdefault(f"greedy_steps_{question['steps']}", []).append(correct)
    return [proportion_row(metric, groups[metric]) for metric in sorted(groups)]


def _by_question(graded: Dataset) -> dict[str, list[dict]]:
    """Rows by question id, in the order of the table, with the columns that are counted."""
    groups: dict[str, list[dict]] = {}
    for row in graded.select_columns(["id", "correct", "extracted", "finished", "n_tokens"]):
        groups.setdefault(row["id"], []).append(row)
    return groups


def _majority(rows: list[dict]) -> float:
    right = {row["extracted"] for row in rows if row["correct"]}
    return majority_vote([row["extracted"] for row in rows], right.__contains__)


def _distinct(rows: list[dict]) -> int:
    return len({row["extracted"] for row in rows} - {None})


def _mean_of_blocks(count, rows: list[dict], size: int) -> float:
    """`count` of disjoint blocks of `size` completions, averaged; what does not fill a block is left out."""
    return float(np.mean([count(rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]))


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError("A paired comparison needs the same questions on both sides, at least one.")
    return a, b
