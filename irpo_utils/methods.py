"""What differs between the methods that the paper compares: one entry each in one table.

All of them go through the same loop and the same stages. A method fixes a few settings, and says how the completions
of M_t become what M_{t+1} is trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from irpo_utils import UserError, pairs, sampling
from irpo_utils.profiles import Profile


def preferences(graded, questions, task, tokenizer, p: Profile, seed: int):
    """Winners against losers, as in Iterative RPO (section 2): (pairs, counts)."""
    gold = pairs.gold_completions(questions, tokenizer) if p.gold else None
    return pairs.build_pairs(graded, k=p.k_pairs, gold=gold, max_length=p.max_length, deduplicate=p.deduplicate, seed=seed)


def gold_alone(graded, questions, task, tokenizer, p: Profile, seed: int):
    """The gold solutions, and nothing that the model wrote: (pairs, counts)."""
    prompts = [sampling.render_prompt(tokenizer, task.prompt(row)) for row in questions]
    return pairs.gold_pairs(questions, prompts, tokenizer, max_length=p.max_length)


@dataclass(frozen=True)
class Method:
    """`build` makes the pairs, `settings` are fields of the profile that the method fixes."""

    title: str
    source: str
    build: Callable = preferences
    samples: bool = True                # whether M_t has to write completions for `build`
    settings: dict = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "irpo": Method("Iterative RPO", "Pang et al. 2024, section 2"),
    "sft_gold": Method("SFT on gold solutions", "Pang et al. 2024, table 1", gold_alone, samples=False,
                       settings={"dpo_weight": 0.0, "alpha": 1.0}),
}


def get(name: str) -> Method:
    """The method of that name; raises `UserError` for one that is not in the table."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}. The methods are {', '.join(METHODS)}.")
    return METHODS[name]


def apply(profile: Profile) -> Profile:
    """The profile with the settings that its method fixes."""
    return dataclasses.replace(profile, **get(profile.method).settings)
