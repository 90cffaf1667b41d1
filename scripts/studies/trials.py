"""The trials of each study: which methods and settings are run, and with which learning rate."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pandas

from irpo_utils import UserError, methods
from studies import api, few_shot, lucky, word_choices  # noqa: F401 (they add methods)
from studies.api import Profile

# The search budget of every method: three learning rates, one seed each.
LEARNING_RATES = (2e-5, 1e-4, 3e-4)
TUNED_AS = {  # variants take the learning rate of the method that they are most like
    "irpo_2x": "irpo",
    "irpo_from_sft": "irpo",
    "dpo_from_sft": "iterative_dpo",
    "star_2x": "star",
    "few_shot": "irpo",
    "irpo_lucky": "irpo",
    "star_lucky": "star",
}
TUNED = tuple(name for name in methods.METHODS if name not in TUNED_AS)
TUNING_FILE = "tuning_of_methods.csv"
TUNING_COMMAND = "python scripts/study.py tuning"
# Settings of a small study, which shows that everything works and nothing else.
SMALL = {
    "n_questions": 24,
    "n_samples": 4,
    "k_pairs": 2,
    "n_eval_questions": 20,
    "eval_samples": 2,
    "eval_samples_ends": 2,
    "iterations": 2,
}
TWO_ITERATIONS = {"iterations": 2}
SHORT = {"iterations": 2, "n_questions": 300}


@dataclass
class Trial:
    """A row of a study: a method, and the settings that differ from the base profile.

    `factor` and `level` name the setting that an ablation varies, and its value. `against` is the
    name of the trial that it is compared with on the same questions. `after` and `like`: it
    continues from iteration `after` of the trial `like` of the comparison. `seeds`: None for as
    many as the study has.
    """

    method: str = "irpo"
    settings: dict = field(default_factory=dict)
    factor: str = ""
    level: str = ""
    after: int = 0
    like: str = ""
    against: str = ""
    seeds: int | None = None

    @property
    def name(self) -> str:
        """The name of the trial's folder."""
        parts = [part for part in (self.method, self.factor, self.level) if part]
        return "_".join(parts).replace("/", "-").replace(" ", "")


def tuning() -> list[Trial]:
    """Every method at every learning rate, two iterations, on the validation split."""
    settings = TWO_ITERATIONS | {"eval_split": "validation"}
    return [
        Trial(method, {**settings, "learning_rate": lr}, "learning_rate", f"{lr:g}", seeds=1)
        for method, lr in itertools.product(TUNED, LEARNING_RATES)
    ]


def comparison() -> list[Trial]:
    """The methods of the paper's tables and others, each at its tuned learning rate."""
    beyond_the_paper = ("grpo", "self_consistency", "self_rewarding", "spin")  # expensive
    names = [name for name in methods.METHODS if name not in lucky.LUCKY]
    names.sort(key=lambda name: name == "few_shot")  # last, whatever was imported first
    return [
        Trial(name, against="irpo", seeds=3 if name in beyond_the_paper else None) for name in names
    ]


def ablations() -> list[Trial]:
    """One setting at a time at the learning rate of Iterative RPO; `irpo_base` has the defaults.

    Two iterations on half of the questions: with more, all settings come close to the ceiling.
    """
    levels = {
        "alpha": (0.0, 0.25, 2.0, 5.0),
        "beta": (0.05, 0.5, 1.0),
        "n_samples": (4, 16),
        "k_pairs": (1, 8),
        "temperature": ([0.7], [1.3], [1.0, 1.3]),
        "reference": ("start",),
        "gold": (True,),
        "keep_pairs": (True,),
        "nll_per": ("token",),
        "pairing": ("random",),
        "fresh_questions": (True,),
        "deduplicate": (False,),
    }
    changed = []
    for name, values in levels.items():
        for level in values:
            setting = {"loss": "dpo_nll_per_token"} if name == "nll_per" else {name: level}
            level = _format_level(level)
            changed.append(Trial("irpo", SHORT | setting, name, level, against="irpo_base"))
    return [Trial("irpo", SHORT, "base"), *changed]


def stability() -> list[Trial]:
    """Learning rate x alpha, and chosen completions alone: which learning rates do they tolerate?

    There are more seeds at the two learning rates between those where training is stable at every
    alpha and those where it is stable at the largest alpha only.
    """
    trials = {"pairs": [], "chosen alone": []}
    for lr, seeds in ((2e-5, 1), (1e-4, None), (3e-4, None), (1e-3, 1)):
        base, level = TWO_ITERATIONS | {"learning_rate": lr}, f"{lr:g}"
        for alpha in (0.0, 0.25, 1.0, 5.0):
            trial = Trial("irpo", base | {"alpha": alpha}, f"alpha={alpha:g}", level, seeds=seeds)
            trial.against = f"irpo_alpha=0_{level}"
            trials["pairs"].append(trial)
        against = f"irpo_alpha=1_{level}"
        trials["chosen alone"].append(
            Trial("star", base, "star", level, against=against, seeds=seeds)
        )
    return trials["pairs"] + trials["chosen alone"]


def regimes() -> list[Trial]:
    """Pairs against chosen completions alone, where rejected ones may teach more than usual."""
    cases = {
        "usual": SHORT,
        "few samples": SHORT | {"n_samples": 3},
        "hot": SHORT | {"temperature": [1.5]},
        "few questions": SHORT | {"n_questions": 150},
        "lucky": SHORT,
        "late": SHORT,
        "choices": SHORT | {"task": word_choices.TASK.name},
    }
    trials = []
    for name, settings in cases.items():
        suffix = "_lucky" if name == "lucky" else ""
        start = {"after": 3, "like": "irpo"} if name == "late" else {}
        against = Trial(f"star{suffix}", factor=name).name
        for method in ("star", "irpo"):
            trials.append(Trial(method + suffix, settings, name, against=against, **start))
    # The learning rate of `star` was tuned where chosen completions are correct. Where many are
    # not, that of the pairs may be fairer.
    lower = cases["choices"] | {"learning_rate": 1e-4}
    return [*trials, Trial("star", lower, "choices", "0.0001", against="irpo_choices")]


def long() -> list[Trial]:
    """Iterations 5 to 8: does accuracy saturate or degrade?"""
    return [
        Trial(name, {"iterations": 4}, after=4, like=name, against="irpo")
        for name in ("irpo", "iterative_dpo", "star")
    ]


def curves() -> list[Trial]:
    """Log-probabilities of the same pairs of M_0 in each method's first training (figures 2-4)."""
    names = ("irpo", "iterative_dpo", "star", "sft_gold", "irpo_from_sft", "dpo_from_sft")
    return [Trial(name, {"iterations": 1, "probe_every": 5}, seeds=1) for name in names]


STUDIES = {
    "tuning": tuning,
    "comparison": comparison,
    "curves": curves,
    "stability": stability,
    "regimes": regimes,
    "long": long,
    "ablations": ablations,
}
SEEDS = {**dict.fromkeys(STUDIES, 3), "tuning": 1, "comparison": 5, "curves": 1}


def select(name: str, only: list[str] | None = None) -> list[Trial]:
    """The trials of a study, or those whose method, factor or name is in `only`.

    Raises `UserError` for an unknown study, or where no trial is left.
    """
    if name not in STUDIES:
        raise UserError(f"There is no study {name!r}. The studies are {', '.join(STUDIES)}.")
    trials = STUDIES[name]()
    selected = [t for t in trials if not only or {t.method, t.factor, t.name} & set(only)]
    if not selected:
        raise UserError(
            f"No trial of the study {name} is called {' or '.join(only)}. The trials are "
            f"{', '.join(t.name for t in trials)}."
        )
    return selected


def tuned_learning_rates(out: Path, needed=TUNED) -> dict[str, float]:
    """The learning rate with the best greedy validation accuracy after the last iteration.

    A dictionary by method, from the table that the study `tuning` wrote into `out`; of equal
    learning rates the smaller one. Raises `UserError` if a run of the methods `needed` is missing.
    """
    file = out / TUNING_FILE
    if not file.exists():
        raise UserError(f"{file} is missing: run `{TUNING_COMMAND}` first.")
    rows = pandas.read_csv(file).query("metric == 'greedy'")
    tried = set(zip(rows.method, rows.level.astype(float), strict=True))
    absent = sorted(set(itertools.product(needed, LEARNING_RATES)) - tried)
    if absent:
        method, lr = absent[0]
        raise UserError(
            f"{file} lacks {len(absent)} of its runs, such as {method} at {lr:g}. Let "
            f"`{TUNING_COMMAND}` finish first."
        )
    last_iteration = rows.groupby("method").iteration.transform("max")
    last = rows[rows.iteration == last_iteration]  # without runs that stopped early
    best = last.sort_values(["value", "level"], ascending=[False, True]).groupby("method").first()
    return {method: float(lr) for method, lr in best.level.items()}


def profile_of(
    trial: Trial, seed: int, learning_rates: dict[str, float], runs: Path, study: str, small=False
) -> Profile:
    """The settings of one run: the default profile, then the method, then the trial.

    `learning_rates`: by tuned method; empty for a study that sets them itself. `runs`: the folder
    of all runs, with the folder `study`. Raises `UserError` if a learning rate is missing.
    """
    method, all_metrics = methods.get(trial.method), trial.name == "irpo"
    fields = {
        "method": trial.method,
        "seed": seed,
        "dequantize": True,  # the same numbers as packed weights, faster on a CPU
        "eval_samples": 8 if all_metrics else 2,
        "eval_samples_ends": 32 if all_metrics else 2,
    }
    if learning_rates:
        tuned = TUNED_AS.get(trial.method, trial.method)
        if tuned not in learning_rates:
            raise UserError(
                f"The tuning has no learning rate for {tuned}. Run "
                f"`{TUNING_COMMAND} --only {tuned}`."
            )
        fields["learning_rate"] = learning_rates[tuned]
    if small:
        fields |= SMALL
    fields |= trial.settings
    after = trial.after
    if small:
        fields["iterations"] = min(SMALL["iterations"], fields["iterations"])
        after = min(SMALL["iterations"], after)
    if method.start:
        first = runs / study / method.start / f"seed_{seed}"
        fields["start"] = str(first / "iteration_1" / "adapter")
    if after:
        first = runs / "comparison" / trial.like / f"seed_{seed}"
        fields["start"] = str(first / f"iteration_{after}" / "adapter")
    if fields.get("probe_every"):
        fields["probe"] = str(runs / study / "irpo" / f"seed_{seed}" / "iteration_0" / "pairs")
    return api.make_profile(fields)


def portable(profile: Profile, runs: Path) -> dict:
    """The settings as a run keeps them, with paths relative to the folder of all runs."""
    settings = dataclasses.asdict(methods.apply(profile))
    for name in ("start", "probe"):
        if settings[name]:
            settings[name] = str(Path(settings[name]).relative_to(runs))
    return settings


def _format_level(level) -> str:
    if isinstance(level, str):
        return level
    if isinstance(level, list):
        return " then ".join(f"{value:g}" for value in level)
    return f"{level:g}" if isinstance(level, float) else str(level).lower()
