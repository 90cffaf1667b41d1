"""Stage 3: winners and losers into preference pairs (section 2 of the paper, footnote 2).

The paper "iterates over G^w and G^l simultaneously" and starts a set again at its first element when its end is
reached: a zip with wrap-around, not a random draw. A question with an empty set is left out.
"""

from __future__ import annotations

import random

from irpo_utils import UserError, models

COUNTS = (
    "questions",
    "used",
    "all_right",
    "all_wrong",
    "duplicates",
    "empty",
    "repeated",
    "over_long",
    "gold_winners",
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
):
    """K pairs per question: (`Dataset` of pairs, counts).

    graded: completions of one model with `correct` (the columns of `grading.grade`).
    gold: optional rows `id`, `completion`, `completion_ids` (see `gold_completions`) put in front of the winners, as
        the paper does on GSM8K, so that the set of winners is never empty.
    max_length: pairs whose prompt and longer response together have more tokens are dropped (section 3.1).
    deduplicate: a completion that repeats the text of an earlier one of the same question and verdict is left out.
        The paper describes no such step; without it a question whose samples agree gives the same pair K times.
    pairing: "wrap_around" (the paper) or "random" (K draws with replacement by `seed`), for comparison.

    Columns: `id`, `prompt`, `chosen`, `rejected`, `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_sample` (-1 for a
    gold chain), `rejected_sample`. Counts: `questions`, `used`, `all_right`, `all_wrong`, `duplicates`, `empty`,
    `repeated` (the same pair once more, after wrapping round both sets), `over_long`, `gold_winners`, `pairs`.
    Raises `UserError` beginning "no pairs" where nothing is left.
    """
    from datasets import Dataset

    if k < 1 or pairing not in ("wrap_around", "random"):
        raise UserError(
            f"k = {k} must be at least 1 and pairing = {pairing!r} either wrap_around or random."
        )
    rng, rows = random.Random(seed), []
    gold_by_id = {row["id"]: {**row, "sample": -1} for row in gold} if gold is not None else {}
    counts = dict.fromkeys(COUNTS, 0)
    for question_id, completions in _by_question(graded).items():
        counts["questions"] += 1
        winners, losers = _split(completions, gold_by_id.get(question_id), deduplicate, counts)
        if not winners or not losers:
            counts["all_wrong" if not winners else "all_right"] += 1
            continue
        indices = (
            walk(len(winners), len(losers), k)
            if pairing == "wrap_around"
            else [(rng.randrange(len(winners)), rng.randrange(len(losers))) for _ in range(k)]
        )
        counts["repeated"] += len(indices) - len(set(indices))
        new = [_pair(completions[0], winners[w], losers[l]) for w, l in indices]
        kept = [pair for pair in new if max_length is None or _length(pair) <= max_length]
        counts["over_long"] += len(new) - len(kept)
        counts["used"] += bool(kept)
        counts["gold_winners"] += sum(pair["chosen_sample"] == -1 for pair in kept)
        rows += kept
    counts["pairs"] = len(rows)
    if not rows:
        raise UserError(_no_pairs(counts))
    return Dataset.from_list(rows), counts


def walk(n_winners: int, n_losers: int, k: int) -> list[tuple[int, int]]:
    """K index pairs (winner, loser), both sets walked in parallel and begun again at their ends (footnote 2).

    >>> walk(2, 3, 4)
    [(0, 0), (1, 1), (0, 2), (1, 0)]
    """
    return [(i % n_winners, i % n_losers) for i in range(k)]


def gold_completions(questions, tokenizer) -> list[dict]:
    """The gold solutions as completions that end in EOS, for `build_pairs(gold=...)`; questions without one are left out."""
    return [
        {
            "id": row["id"],
            "completion": row["solution"],
            "completion_ids": tokenizer(
                models.plain_text(tokenizer, row["solution"]), add_special_tokens=False
            ).input_ids
            + [tokenizer.eos_token_id],
        }
        for row in questions
        if row.get("solution")
    ]


def gold_pairs(questions, prompts: list[str], tokenizer, max_length: int | None = None):
    """Gold solutions over an empty answer, one pair a question, for SFT on them: (`Dataset` of pairs, counts).

    `prompts` are the rendered prompts of the questions. With a DPO weight of 0 the loser, a lone EOS, is not learnt
    from. Columns and counts are those of `build_pairs`. Raises `UserError` beginning "no pairs" where no question
    has a solution, or none a short enough one.
    """
    from datasets import Dataset

    gold = {row["id"]: row for row in gold_completions(questions, tokenizer)}
    eos = {"completion": "", "completion_ids": [tokenizer.eos_token_id], "sample": 0}
    encoded = tokenizer(prompts, add_special_tokens=False).input_ids
    pairs = [
        _pair(
            {"id": row["id"], "prompt": prompt, "prompt_ids": ids},
            {**gold[row["id"]], "sample": -1},
            eos,
        )
        for row, prompt, ids in zip(questions, prompts, encoded, strict=True)
        if row["id"] in gold
    ]
    kept = [pair for pair in pairs if max_length is None or _length(pair) <= max_length]
    if not kept:
        raise UserError(
            "no pairs: the questions have no gold solutions. Take a task that has them, such as gsm8k."
            if not pairs
            else f"no pairs: all {len(pairs)} gold solutions are longer than the limit. Raise --max-length."
        )
    counts = dict.fromkeys(COUNTS, 0)
    return Dataset.from_list(kept), counts | {
        "questions": len(questions),
        "used": len(kept),
        "gold_winners": len(kept),
        "over_long": len(pairs) - len(kept),
        "pairs": len(kept),
    }


def _by_question(graded) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in graded:
        groups.setdefault(row["id"], []).append(row)
    return groups


def _split(completions, gold, deduplicate, counts) -> tuple[list[dict], list[dict]]:
    """Winners and losers of one question, in the order of the samples, the gold chain first among the winners."""
    winners = [gold] if gold else []
    losers: list[dict] = []
    for row in completions:
        side = winners if row["correct"] else losers
        if not row["completion_ids"]:
            counts["empty"] += 1
        elif deduplicate and any(row["completion"] == other["completion"] for other in side):
            counts["duplicates"] += 1
        else:
            side.append(row)
    return winners, losers


def _pair(row, winner, loser) -> dict:
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": winner["completion"],
        "rejected": loser["completion"],
        "prompt_ids": row["prompt_ids"],
        "chosen_ids": winner["completion_ids"],
        "rejected_ids": loser["completion_ids"],
        "chosen_sample": winner["sample"],
        "rejected_sample": loser["sample"],
    }


def _length(pair) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def _no_pairs(counts) -> str:
    cause = (
        f"no pairs: of {counts['questions']} questions, every sample was right for {counts['all_right']} and every "
        f"one wrong for {counts['all_wrong']}"
    )
    if counts["over_long"]:
        return f"{cause}, and {counts['over_long']} pairs were longer than the limit. Raise --max-length."
    if counts["all_wrong"] >= counts["all_right"]:
        return (
            f"{cause}. The model is too weak for these questions or its answers are not read: draw more samples "
            "(--n-samples), add gold solutions as winners (--gold true), take easier questions or a stronger "
            "model, and look at `extracted` and `reason` in the graded data. Other settings need another --out."
        )
    return (
        f"{cause}. The questions are too easy for the model: raise --temperature or --n-samples so that some "
        "samples go wrong, or take harder questions. Other settings need another --out."
    )
