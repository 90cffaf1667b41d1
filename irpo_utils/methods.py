"""What differs between Iterative RPO and the methods it is compared with: one entry each.

All methods go through the same loop and stages. A notebook can also add an entry to `METHODS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from irpo_utils import UserError
from irpo_utils.grading import group

PAPER = "Pang et al. 2024, table 1"


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    settings: fields of the profile that the method fixes.
    reward: a function from the rows of one question (all columns of the question and of its graded
        completions) to a float per completion; None: 1.0 if the answer is correct, else 0.0.
    samples: False if the pairs are the gold solutions alone, so that nothing is sampled for them.
    start: the method whose M_1 this one starts from, on the pairs of M_0.
    pairs_factor: K is multiplied by this ("2x data" in the paper).
    task: replaces the task: (task, profile) -> task.
    train: replaces pairs and DPO: (model, tokenizer, questions, task, profile, seed) -> log.
    """

    title: str
    source: str
    settings: dict = field(default_factory=dict)
    reward: Callable[[list[dict]], list[float]] | None = None
    samples: bool = True
    start: str | None = None
    pairs_factor: int = 1
    task: Callable | None = None
    train: Callable | None = None


ONCE, DPO, SFT = {"iterations": 1}, {"alpha": 0.0}, {"loss": "sft", "alpha": 1.0}
METHODS: dict[str, Method] = {
    "irpo": Method("Iterative RPO", "Pang et al. 2024, section 2"),
    "irpo_2x": Method("Iterative RPO, twice the pairs", PAPER, ONCE, pairs_factor=2),
    "irpo_from_sft": Method("Iterative RPO from rejection-sampling SFT", PAPER, start="star"),
    "iterative_dpo": Method("DPO without NLL", f"{PAPER}; Xu et al. 2023, arXiv 2312.16682", DPO),
    "dpo_from_sft": Method("DPO from rejection-sampling SFT", PAPER, DPO | ONCE, start="star"),
    # STaR (Zelikman et al. 2022) retrains from M_0 each time and shows answers of failed questions.
    "star": Method("Rejection-sampling SFT", f"{PAPER}, there called STaR", SFT),
    "star_2x": Method("Rejection-sampling SFT, twice the data", PAPER, SFT | ONCE, pairs_factor=2),
    "sft_gold": Method("SFT on gold solutions", PAPER, SFT | ONCE, samples=False),
}


def get(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}. The methods are {', '.join(METHODS)}.")
    return METHODS[name]


def apply(profile):
    """The `profiles.Profile` with the settings of its method. `iteration.run` does this, once."""
    method = get(profile.method)
    k_pairs = profile.k_pairs * method.pairs_factor
    return replace(profile, **{"k_pairs": k_pairs, **method.settings})


def check_conflict(name: str, changes: dict) -> None:
    """Refuse settings that contradict those that the method fixes."""
    for setting, value in get(name).settings.items():
        if changes.get(setting, value) != value:
            option = f"--{setting.replace('_', '-')} {value}"
            raise UserError(f"--method {name} fixes {option}, but {changes[setting]} was given.")


def check_start(p) -> None:
    """Refuse a method that starts from another one's M_1 if the profile does not name it."""
    if (first := get(p.method).start) and not p.start:
        raise UserError(
            f"--method {p.method} starts from M_1 of {first}: first run --method {first} "
            "--iterations 1 --out DIR, then add --start DIR/iteration_1/adapter here."
        )


def reward(graded, function):
    """`graded` with the column `reward` made by `function`, question by question."""
    if function is None:
        return graded
    rows = list(graded)
    for completions in group(rows).values():
        rewards = list(map(float, function(completions)))
        if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
            raise UserError("A reward must return one finite number for each completion.")
        for row, value in zip(completions, rewards, strict=True):
            row["reward"] = value
    kept = graded.remove_columns([c for c in graded.column_names if c == "reward"])
    return kept.add_column("reward", [row["reward"] for row in rows])
