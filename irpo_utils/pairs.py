"""Stage 3: chosen and rejected completions as preference pairs (section 2 and footnote 2).

The paper "iterates over G^w and G^l simultaneously" and restarts a set when it reaches its end: a
zip with wrap-around, not a random draw. A question with an empty set is left out.
"""

import random

from datasets import Dataset

from irpo_utils import UserError, models
from irpo_utils.grading import group
from irpo_utils.sampling import check_ids

# Questions: all, with pairs, none rejected, none chosen. Completions: repeats, without a token.
# Pairs: repeated after wrapping around both sets, too long, with a gold solution, all that remain.
COUNTS = (
    "questions used all_right all_wrong duplicates empty repeated over_long gold_winners pairs"
).split()
NO_PAIRS = (
    "no pairs: of {questions} questions, all completions were correct for {all_right} and all "
    "incorrect for {all_wrong}; {over_long} pairs were longer than --max-length. If most are "
    "incorrect, raise --n-samples, add --gold true or look at `reason` in the graded data; if most "
    "are correct, raise --temperature or use harder questions. New settings need another --out."
)


def build_pairs(
    graded,
    k: int = 4,
    gold=None,
    max_length: int | None = None,
    max_pairs: int | None = None,
    deduplicate: bool = True,
    pairing: str = "wrap_around",
    seed: int = 0,
) -> tuple[Dataset, dict[str, int]]:
    """K pairs per question: (pairs, counts); see `COUNTS`.

    graded: completions of one model with `reward` (or `correct`), see `grading.grade`.
    gold: rows of `gold_completions`, which come first among the chosen, as the paper does on GSM8K.
    max_length: drop pairs whose prompt and longer response have more tokens (section 3.1).
    max_pairs: keep this many random pairs.
    deduplicate: leave out completions that repeat an earlier one; the paper has no such step.
    pairing: "wrap_around" (the paper) or "random" (K draws with replacement), for comparison.

    Columns: `id`, `prompt`, `chosen`, `rejected`, `prompt_ids`, `chosen_ids`, `rejected_ids`,
    `chosen_sample` (-1 for a gold solution), `rejected_sample`.
    Raises `UserError` beginning "no pairs" if nothing is left.
    """
    if k < 1 or pairing not in ("wrap_around", "random"):
        raise UserError(f"k = {k} must be at least 1, pairing = {pairing!r} wrap_around or random.")
    graded = list(graded)
    check_ids([(row["id"], row["sample"]) for row in graded], "samples")
    gold_of = {row["id"]: {**row, "sample": -1} for row in gold or []}
    rng, rows, counts = random.Random(seed), [], dict.fromkeys(COUNTS, 0)
    for question, completions in group(graded).items():
        counts["questions"] += 1
        sides = split(completions, gold_of.get(question))
        chosen, rejected = (_usable(side, deduplicate, counts) for side in sides)
        if not chosen or not rejected:
            counts["all_right" if chosen else "all_wrong"] += 1
            continue
        indices = walk(len(chosen), len(rejected), k)
        if pairing == "random":
            indices = [(rng.randrange(len(chosen)), rng.randrange(len(rejected))) for _ in indices]
        counts["repeated"] += k - len(set(indices))
        rows += [make_pair(completions[0], chosen[i], rejected[j]) for i, j in indices]
    limit = float("inf") if max_length is None else max_length
    longer = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in rows]
    kept = [row for row, n in zip(rows, longer, strict=True) if len(row["prompt_ids"]) + n <= limit]
    counts["over_long"] = len(rows) - len(kept)
    if not kept:
        raise UserError(NO_PAIRS.format(**counts))
    data = Dataset.from_list(kept)
    if max_pairs is not None and len(data) > max_pairs:
        data = data.shuffle(seed=seed).select(range(max_pairs))
    counts |= {"pairs": len(data), "used": len(set(data["id"]))}
    return data, counts | {"gold_winners": data["chosen_sample"][:].count(-1)}


def walk(n_chosen: int, n_rejected: int, k: int) -> list[tuple[int, int]]:
    """K index pairs (chosen, rejected): both sets in parallel, each restarted at its end.

    >>> walk(2, 3, 4)
    [(0, 0), (1, 1), (0, 2), (1, 0)]
    """
    return [(i % n_chosen, i % n_rejected) for i in range(k)]


def split(completions: list[dict], gold: dict | None = None) -> tuple[list[dict], list[dict]]:
    """(chosen, rejected) of one question, in the order of the samples, the gold solution first.

    Rewards of 0 and 1 are split as in the paper, others half-way between the lowest and highest. If
    all are equal and there is no gold solution, all are chosen from 0.5 on, and all rejected below.
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
    end, rows = models.turn_end(tokenizer), []
    for row in questions:
        if row.get("solution"):
            text = models.plain_text(tokenizer, row["solution"])
            ids = tokenizer(text, add_special_tokens=False).input_ids + [end]
            rows.append({"id": row["id"], "completion": row["solution"], "completion_ids": ids})
    return rows


def empty_completions(questions, prompts: list[str], tokenizer) -> list[dict]:
    """A lone end token per question with reward 0: what gold solutions are paired with for SFT."""
    empty = {"completion": "", "completion_ids": [models.turn_end(tokenizer)], "reward": 0.0}
    rows = []
    for row, prompt in zip(questions, prompts, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        rows.append({"id": row["id"], "sample": 0, "prompt": prompt, "prompt_ids": ids} | empty)
    return rows


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
