"""Methods and a loss beyond the paper's tables; importing this module adds them to the tables."""

from __future__ import annotations

import random
from collections import Counter

from irpo_utils.methods import METHODS, Method
from irpo_utils.training import LOSSES


def by_majority(rows: list[dict]) -> list[float]:
    """1 for the most frequent answer of the question; the gold answer is not used."""
    votes = Counter(row["extracted"] for row in rows if row["extracted"] is not None)
    first = votes.most_common(1)[0][0] if votes else None
    return [float(first is not None and row["extracted"] == first) for row in rows]


def by_own_likelihood(rows: list[dict]) -> list[float]:
    """1 for the half of the completions that the model itself finds likelier per token."""
    scores = [row["logprob"] / row["n_tokens"] for row in rows]
    middle = sorted(scores)[(len(rows) - 1) // 2]
    return [float(score > middle) for score in scores]


def at_random(rows: list[dict]) -> list[float]:
    """As many completions rewarded as are correct, but random ones: a control."""
    rng = random.Random("".join([rows[0]["id"], *(row["completion"] for row in rows)]))
    return [float(correct) for correct in rng.sample([row["correct"] for row in rows], len(rows))]


def never(rows: list[dict]) -> list[float]:
    """0 for all completions: the gold solution is chosen against each of them."""
    return [0.0 for _ in rows]


def dpo_nll_per_token(pairs, alpha: float, beta: float):
    """Eq. 1 with the NLL averaged as TRL does: over all tokens of the micro-batch."""
    _, terms = LOSSES["dpo_nll"](pairs, alpha, beta)
    terms["loss_nll"] = -pairs.chosen / pairs.n_chosen.float().mean()
    return terms["loss_dpo"] + alpha * terms["loss_nll"], terms


LOSSES["dpo_nll_per_token"] = dpo_nll_per_token
METHODS["shuffled"] = Method("Random labels", "control", reward=at_random)
METHODS["self_consistency"] = Method(
    "Majority as reward", "after Prasad et al. 2024, arXiv 2411.04109", reward=by_majority
)
METHODS["self_rewarding"] = Method(
    "Own likelihood as reward", "after Yuan et al. 2024, arXiv 2401.10020", reward=by_own_likelihood
)
# Without the paper's own loss: `alpha` adds an NLL term that SPIN does not have.
METHODS["spin"] = Method(
    "Gold vs. sampled (SPIN-style)",
    "after Chen et al. 2024, arXiv 2401.01335",
    {"gold": True},
    reward=never,
)
