"""Stage 3: chosen and rejected completions as preference pairs (section 2 of the paper, footnote 2).

The paper "iterates over G^w and G^l simultaneously" and restarts a set at its first element when it
reaches its end. This is a zip with wrap-around, not a random draw. A question with an empty set is
left out.
"""

from __future__ import annotations

import random

from datasets import Dataset

from irpo_utils import UserError, models
from irpo_utils.sampling import check_ids

COUNTS = (
    "questions",  # with completions
    "used",  # that give pairs
    "all_right",  # all completions correct: no rejected one
    "all_wrong",  # no completion correct: no chosen one
    "duplicates",  # completions that repeat an earlier one of the same question and reward
    "empty",  # completions without a token
    "repeated",  # pairs that occur again after wrapping around both sets
    "over_long",  # pairs dropped by max_length
    "gold_winners",  # pairs whose chosen completion is the gold solution
    "pairs",
)


def build_pairs(
    graded,
    k: int = 4,
    gold=None,
    max_length: int | None = None,
    deduplicate: bool = True,
    pairing: str = "wrap_around",
    seed: int = 0,
) -> tuple[Dataset, dict[str, int]]:
    """K pairs per question: (pairs, counts); `COUNTS` says what is counted.

    graded: completions of one model with `reward` (or `correct`), see `grading.grade`.
    gold: optional rows `id`, `completion`, `completion_ids` (see `gold_completions`), which come
        first among the chosen, as the paper does on GSM8K.
    max_length: drop pairs whose prompt and longer response have more tokens (section 3.1).
    deduplicate: leave out completions that repeat an earlier one. The paper describes no such step;
        without it a question whose samples agree gives the same pair K times.
    pairing: "wrap_around" (the paper) or "random" (K draws with replacement), for comparison.

    Columns: `id`, `prompt`, `chosen`, `rejected`, `prompt_ids`, `chosen_ids`, `rejected_ids`,
    `chosen_sample` (-1 for a gold solution), `rejected_sample`.
    Raises `UserError` beginning "no pairs" if nothing is left.
    """
    if k < 1 or pairing not in ("wrap_around", "random"):
        raise UserError(
            f"k = {k} must be at least 1, and pairing = {pairing!r} must be wrap_around or random."
        )
    check_ids(
        [(row["id"], row["sample"]) for row in graded.select_columns(["id", "sample"])], "samples"
    )
    gold_of = {row["id"]: {**row, "sample": -1} for row in gold or []}
    rng, rows, counts = random.Random(seed), [], dict.fromkeys(COUNTS, 0)
    for question, completions in group(graded).items():
        counts["questions"] += 1
        chosen, rejected = split(completions, gold_of.get(question))
        chosen = _usable(chosen, deduplicate, counts)
        rejected = _usable(rejected, deduplicate, counts)
        if not chosen or not rejected:
            counts["all_right" if chosen else "all_wrong"] += 1
            continue
        indices = walk(len(chosen), len(rejected), k)
        if pairing == "random":
            indices = [(rng.randrange(len(chosen)), rng.randrange(len(rejected))) for _ in range(k)]
        counts["repeated"] += k - len(set(indices))
        new = [make_pair(completions[0], chosen[w], rejected[l]) for w, l in indices]
        kept = [pair for pair in new if max_length is None or length(pair) <= max_length]
        counts["over_long"] += len(new) - len(kept)
        counts["used"] += bool(kept)
        counts["gold_winners"] += sum(pair["chosen_sample"] == -1 for pair in kept)
        rows += kept
    counts["pairs"] = len(rows)
    if not rows:
        raise UserError(_no_pairs(counts))
    return Dataset.from_list(rows), counts


def walk(n_chosen: int, n_rejected: int, k: int) -> list[tuple[int, int]]:
    """K index pairs (chosen, rejected): both sets in parallel, restarted at their ends (footnote 2).

    >>> walk(2, 3, 4)
    [(0, 0), (1, 1), (0, 2), (1, 0)]
    """
    return [(i % n_chosen, i % n_rejected) for i in range(k)]


def split(completions: list[dict], gold: dict | None = None) -> tuple[list[dict], list[dict]]:
    """(chosen, rejected) of one question, in the order of the samples, the gold solution first.

    Rewards of 0 and 1 are split as in the paper. Other rewards are split half-way between the lowest
    and the highest, so that every chosen completion has a higher reward than every rejected one. If
    all rewards are equal, they count as 0 and 1 would: all chosen from 0.5 on, else all rejected.
    """
    rewards = [row["reward"] if "reward" in row else float(row["correct"]) for row in completions]
    both_ends = rewards + ([max(1.0, *rewards)] if gold else [])
    middle = (min(both_ends) + max(both_ends)) / 2
    if min(both_ends) == max(both_ends):
        middle = 0.5 if middle < 0.5 else -float("inf")
    chosen = [row for row, reward in zip(completions, rewards, strict=True) if reward > middle]
    rejected = [row for row, reward in zip(completions, rewards, strict=True) if reward <= middle]
    return ([gold] if gold else []) + chosen, rejected


def gold_completions(questions, tokenizer) -> list[dict]:
    """The gold solutions as completions, which end as the model's own do; others are left out."""
    end = models.turn_end(tokenizer)
    rows = []
    for row in questions:
        if row.get("solution"):
            text = models.plain_text(tokenizer, row["solution"])
            ids = tokenizer(text, add_special_tokens=False).input_ids + [end]
            rows.append({"id": row["id"], "completion": row["solution"], "completion_ids": ids})
    return rows


def gold_pairs(questions, prompts: list[str], tokenizer, max_length: int | None = None):
    """Gold solutions over an empty completion, for SFT on them: (pairs, counts) as `build_pairs`.

    `prompts` are the rendered prompts of the questions. SFT does not look at the rejected
    completion, which is a lone end token. Raises `UserError` beginning "no pairs" without solutions.
    """
    gold = {row["id"]: {**row, "sample": -1} for row in gold_completions(questions, tokenizer)}
    nothing = {"completion": "", "completion_ids": [models.turn_end(tokenizer)], "sample": 0}
    rows = []
    for row, prompt in zip(questions, prompts, strict=True):
        if row["id"] in gold:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            rows.append(
                make_pair({**row, "prompt": prompt, "prompt_ids": ids}, gold[row["id"]], nothing)
            )
    kept = [pair for pair in rows if max_length is None or length(pair) <= max_length]
    if not kept:
        raise UserError(
            f"no pairs: all {len(rows)} gold solutions are longer than the limit. Raise --max-length."
            if rows
            else "no pairs: the questions have no gold solutions. Use a task that has them, e.g. gsm8k."
        )
    counts = dict.fromkeys(COUNTS, 0) | {
        "questions": len(questions),
        "used": len(kept),
        "gold_winners": len(kept),
        "over_long": len(rows) - len(kept),
        "pairs": len(kept),
    }
    return Dataset.from_list(kept), counts


def group(rows) -> dict[str, list[dict]]:
    """Rows by question id, in order."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def make_pair(question: dict, chosen: dict, rejected: dict) -> dict:
    """One row of the pairs from a row with `id`, `prompt`, `prompt_ids` and two completions."""
    return {
        "id": question["id"],
        "prompt": question["prompt"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "prompt_ids": question["prompt_ids"],
        "chosen_ids": chosen["completion_ids"],
        "rejected_ids": rejected["completion_ids"],
        "chosen_sample": chosen["sample"],
        "rejected_sample": rejected["sample"],
    }


def length(pair: dict) -> int:
    """Tokens of the prompt and the longer response."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def _usable(completions: list[dict], deduplicate: bool, counts: dict) -> list[dict]:
    """Completions with at least one token, and no text twice."""
    kept, seen = [], set()
    for row in completions:
        if not row["completion_ids"]:
            counts["empty"] += 1
        elif deduplicate and row["completion"] in seen:
            counts["duplicates"] += 1
        else:
            kept.append(row)
            seen.add(row["completion"])
    return kept


def _no_pairs(counts) -> str:
    cause = (
        f"no pairs: of {counts['questions']} questions, all completions were correct for "
        f"{counts['all_right']} and all incorrect for {counts['all_wrong']}"
    )
    if counts["over_long"]:
        return f"{cause}, and {counts['over_long']} pairs were longer than the limit. Raise --max-length."
    if counts["all_wrong"] >= counts["all_right"]:
        return (
            f"{cause}. The model is too weak for these questions, or its answers are not read: draw "
            "more samples (--n-samples), add gold solutions (--gold true), use easier questions or a "
            "stronger model, and look at `extracted` and `reason` in the graded data. Other settings "
            "need another --out."
        )
    return (
        f"{cause}. The questions are too easy for the model: raise --temperature or --n-samples, or "
        "use harder questions. Other settings need another --out."
    )
