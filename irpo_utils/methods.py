"""What differs between Iterative RPO and the methods beside it: one entry each in one table.

All of them go through the same loop and the same stages. A method fixes a few settings, and may say otherwise which
completions win, what the pairs are made of, from which model it starts, or how it is trained. To add one, add an entry.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from irpo_utils import UserError, pairs, sampling
from irpo_utils.profiles import Profile


def by_gold(rows: list[dict], rng: random.Random) -> list[bool]:
    """Reward 1 where the final answer is the gold answer (section 2)."""
    return [row["correct"] for row in rows]


def by_majority(rows: list[dict], rng: random.Random) -> list[bool]:
    """Reward 1 for the answer that most completions of the question give, without a look at the gold answer."""
    votes = Counter(row["extracted"] for row in rows if row["extracted"] is not None)
    return [bool(votes) and row["extracted"] == votes.most_common(1)[0][0] for row in rows]


def by_own_likelihood(rows: list[dict], rng: random.Random) -> list[bool]:
    """Reward 1 for the half of the completions that the model itself finds likelier per token: its own judge."""
    scores = [row["logprob"] / row["n_tokens"] for row in rows]
    middle = sorted(scores)[(len(rows) - 1) // 2]
    return [score > middle for score in scores]


def by_luck(rows: list[dict], rng: random.Random) -> list[bool]:
    """The gold answer, and one wrong answer in four: as in multiple choice, where a wrong result can hit the right letter."""
    return [
        row["correct"]
        or (
            row["extracted"] is not None
            and zlib.crc32(f"{row['id']} {row['extracted']}".encode()) % 4 == 0
        )
        for row in rows
    ]


def by_lot(rows: list[dict], rng: random.Random) -> list[bool]:
    """The right number of winners, drawn by lot: what training on one's own text does by itself."""
    return rng.sample([row["correct"] for row in rows], len(rows))


def never(rows: list[dict], rng: random.Random) -> list[bool]:
    """All completions lose, and the gold solution wins against them."""
    return [False] * len(rows)


def preferences(graded, questions, task, tokenizer, p: Profile, seed: int, verdict=by_gold):
    """Winners against losers, as in Iterative RPO (section 2): (pairs, counts)."""
    gold = pairs.gold_completions(questions, tokenizer) if p.gold else None
    return pairs.build_pairs(
        with_verdicts(graded, verdict, seed),
        k=p.k_pairs,
        gold=gold,
        max_length=p.max_length,
        deduplicate=p.deduplicate,
        pairing=p.pairing,
        seed=seed,
    )


def with_verdicts(graded, verdict, seed: int):
    """`graded` with the column `correct` as `verdict` decides, question by question; the data on disk stays as it is."""
    if verdict is by_gold:
        return graded
    groups: dict[str, list[tuple[int, dict]]] = {}
    for i, row in enumerate(
        graded.select_columns(["id", "extracted", "correct", "logprob", "n_tokens"])
    ):
        groups.setdefault(row["id"], []).append((i, row))
    correct, rng = [False] * len(graded), random.Random(seed)
    for group in groups.values():
        for (i, _), value in zip(group, verdict([row for _, row in group], rng), strict=True):
            correct[i] = value
    return graded.remove_columns("correct").add_column("correct", correct)


def gold_alone(graded, questions, task, tokenizer, p: Profile, seed: int, verdict=by_gold):
    """The gold solutions, and nothing that the model wrote: (pairs, counts)."""
    prompts = [sampling.render_prompt(tokenizer, task.prompt(row)) for row in questions]
    return pairs.gold_pairs(questions, prompts, tokenizer, max_length=p.max_length)


def by_grpo(*arguments, **options):
    """See `grpo.train`; the import waits, as TRL's trainer takes seconds to load."""
    from irpo_utils import grpo

    return grpo.train(*arguments, **options)


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    `settings` are fields of the profile that the method fixes. `start` names the method whose M_1 it begins with, on the
    pairs of M_0. `twice` doubles K, as the paper's "2x data" (see `doubled`). `examples` worked examples go before every question.
    """

    title: str
    source: str
    settings: dict = field(default_factory=dict)
    verdict: Callable = by_gold
    build: Callable = preferences
    samples: bool = True  # whether M_t has to write completions for `build`
    start: str | None = None
    twice: bool = False
    examples: int = 0
    train: Callable | None = (
        None  # of its own: (model, tokenizer, questions, task, profile, seed) -> TrainingResult
    )


PAPER = "Pang et al. 2024, table 1"
ONCE = {"iterations": 1}
NO_NLL, WINNERS = {"alpha": 0.0, "dpo_weight": 1.0}, {"alpha": 1.0, "dpo_weight": 0.0}
METHODS: dict[str, Method] = {
    "irpo": Method("Iterative RPO", "Pang et al. 2024, section 2"),
    "irpo_2x": Method("Iterative RPO, twice the pairs", PAPER, ONCE, twice=True),
    "irpo_from_sft": Method("Iterative RPO from SFT on chosen", PAPER, start="star"),
    "iterative_dpo": Method(
        "DPO without NLL", f"{PAPER}; Xu et al. 2023, arXiv 2312.16682", NO_NLL
    ),
    "dpo_from_sft": Method("DPO from SFT on chosen", PAPER, {**NO_NLL, **ONCE}, start="star"),
    # After the papers named, and not their whole methods: see notebook 06. STaR trains M_0 anew in each iteration, and shows the
    # model the answer where it fails; ScPO weighs pairs by their votes; SPIN has no NLL term, which `alpha` of the run adds here.
    "star": Method(
        "SFT on chosen (STaR)", f"{PAPER}; after Zelikman et al. 2022, arXiv 2203.14465", WINNERS
    ),
    "star_2x": Method("SFT on chosen, twice the data", PAPER, {**WINNERS, **ONCE}, twice=True),
    "sft_gold": Method(
        "SFT on gold solutions", PAPER, {**WINNERS, **ONCE}, build=gold_alone, samples=False
    ),
    "shuffled": Method("Verdicts by lot", "control", verdict=by_lot),
    "few_shot": Method(
        "M0 with four examples", "Wei et al. 2022, arXiv 2201.11903", {"iterations": 0}, examples=4
    ),
    "self_consistency": Method(
        "Majority as reward", "after Prasad et al. 2024, arXiv 2411.04109", verdict=by_majority
    ),
    "self_rewarding": Method(
        "Own likelihood as reward",
        "after Yuan et al. 2024, arXiv 2401.10020",
        verdict=by_own_likelihood,
    ),
    "spin": Method(
        "Gold against sampled (SPIN)",
        "after Chen et al. 2024, arXiv 2401.01335",
        {"gold": True},
        verdict=never,
    ),
    "grpo": Method("GRPO", "Shao et al. 2024, arXiv 2402.03300", samples=False, train=by_grpo),
    "irpo_lucky": Method("Iterative RPO, lucky winners", "control", verdict=by_luck),
    "star_lucky": Method("SFT on chosen, lucky winners", "control", WINNERS, verdict=by_luck),
}


def get(name: str) -> Method:
    """The method of that name; raises `UserError` for one that is not in the table."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}. The methods are {', '.join(METHODS)}.")
    return METHODS[name]


def apply(profile: Profile) -> Profile:
    """The profile with the settings that its method fixes. (Not `doubled`: a profile may come here more than once.)"""
    return dataclasses.replace(profile, **get(profile.method).settings)


def doubled(profile: Profile) -> Profile:
    """The profile with twice the pairs per question, where that is what its method is about."""
    return (
        dataclasses.replace(profile, k_pairs=2 * profile.k_pairs)
        if get(profile.method).twice
        else profile
    )


def check_start(profile: Profile) -> None:
    """Raises `UserError` where a method that begins with another one's M_1 is not told where that is."""
    if (first := get(profile.method).start) and not profile.start:
        raise UserError(
            f"The method {profile.method} begins with M_1 of the method {first}. Make that first: run with --method "
            f"{first} --iterations 1 --out DIR; then add --start DIR/iteration_1/adapter here."
        )
