"""Comparisons over methods, settings and seeds: every trial is a run of its own, and all of them end in one tidy table.

    python -m irpo_utils study tuning         # a learning rate for each method, on the validation split
    python -m irpo_utils study comparison     # the paper's table, with seeds
    python -m irpo_utils study ablations      # one setting at a time
    python -m irpo_utils study stability      # learning rate x alpha
    python -m irpo_utils study regimes        # where do losers teach what winners do not?
    python -m irpo_utils study long           # iterations 5 to 8
    python -m irpo_utils study curves         # log-probabilities during training

A study that was stopped goes on where it stood; what the tables need of a finished run is kept beside them, so that it
can go on elsewhere, too. What M_0 writes does not depend on the method: it is drawn once for each seed and shared by all
runs whose settings of sampling agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from irpo_utils import UserError, methods, profiles, report
from irpo_utils.profiles import EVALUATION, SAMPLING, Profile

RATES = (2e-5, 1e-4, 3e-4)  # the search budget of every method: three learning rates, one seed each
TUNED = (
    "irpo",
    "iterative_dpo",
    "star",
    "sft_gold",
    "shuffled",
    "self_consistency",
    "self_rewarding",
    "spin",
    "grpo",
)
LIKE = {
    "irpo_2x": "irpo",
    "irpo_from_sft": "irpo",
    "dpo_from_sft": "iterative_dpo",
    "star_2x": "star",
    "few_shot": "irpo",
    "irpo_lucky": "irpo",
    "star_lucky": "star",
}


@dataclass
class Trial:
    """One line of a study before seeds are put to it: a method, and what is set otherwise than in the base profile."""

    method: str = "irpo"
    settings: dict = field(default_factory=dict)
    factor: str = ""  # of an ablation: the setting that is varied, and its value
    level: str = ""
    after: int = 0  # goes on from this iteration of `like` in the comparison
    like: str = ""
    against: str = ""  # name of the trial that it is compared with, on the same questions
    seeds: int | None = None  # None: as many as the study has

    @property
    def name(self) -> str:
        return (
            "_".join(part for part in (self.method, self.factor, self.level) if part)
            .replace("/", "-")
            .replace(" ", "")
        )


def tuning() -> list[Trial]:
    """Every method at every rate, two iterations, on the validation split."""
    settings = {"eval_split": "validation", "iterations": 2}
    return [
        Trial(method, {**settings, "learning_rate": rate}, "learning_rate", f"{rate:g}", seeds=1)
        for method in TUNED
        for rate in RATES
    ]


def comparison() -> list[Trial]:
    """The rows of the paper's tables and those beside them, each at the rate that the tuning found for it."""
    beyond = (
        "grpo",
        "self_consistency",
        "self_rewarding",
        "spin",
    )  # the paper: fewer seeds, to save hours
    return [
        Trial(name, against="irpo", seeds=3 if name in beyond else None)
        for name in methods.METHODS
        if not name.endswith("_lucky")
    ]


def ablations() -> list[Trial]:
    """One setting at a time, at the rate of Iterative RPO; the default levels are one run, `irpo_base`.

    Two iterations on half of the questions: shorter, and not yet so near the ceiling that settings cannot differ.
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
    short = {"iterations": 2, "n_questions": 300}
    return [Trial("irpo", short, "base")] + [
        Trial("irpo", short | {name: level}, name, _show(level), against="irpo_base")
        for name, values in levels.items()
        for level in values
    ]


def stability() -> list[Trial]:
    """Learning rate x alpha, and the winners alone, two iterations each: where does training survive its steps?

    More seeds along the edge, between the rates where every alpha goes well and those where none but the largest does.
    """
    rates, alphas, edge = (2e-5, 1e-4, 3e-4, 1e-3), (0.0, 0.25, 1.0, 5.0), (1e-4, 3e-4)
    seeds = {rate: None if rate in edge else 1 for rate in rates}
    trials = [
        Trial(
            "irpo",
            {"learning_rate": rate, "alpha": alpha, "iterations": 2},
            f"alpha={alpha:g}",
            f"{rate:g}",
            against=f"irpo_alpha=0_{rate:g}",
            seeds=seeds[rate],
        )
        for rate, alpha in itertools.product(rates, alphas)
    ]
    return trials + [
        Trial(
            "star",
            {"learning_rate": rate, "iterations": 2},
            "star",
            f"{rate:g}",
            against=f"irpo_alpha=1_{rate:g}",
            seeds=seeds[rate],
        )
        for rate in rates
    ]


def regimes() -> list[Trial]:
    """Pairs and winners alone, two iterations on half of the questions, where there may be more to learn from losers than usual."""
    two = {"iterations": 2, "n_questions": 300}
    cases = {
        "usual": two,
        "few samples": two | {"n_samples": 3},
        "hot": two | {"temperature": [1.5]},
        "few questions": two | {"n_questions": 150},
        "lucky": two,
        "late": two,
        "choices": two | {"task": "word_choices"},
    }
    trials = []
    for name, changes in cases.items():
        suffix, after = "_lucky" if name == "lucky" else "", 3 if name == "late" else 0
        trials += [
            Trial(
                method + suffix,
                changes,
                name,
                after=after,
                like="irpo" if after else "",
                against=f"star{suffix}_{name}".replace(" ", ""),
            )
            for method in ("star", "irpo")
        ]
    # The winners' rate was tuned where winners are right; where many are not, a lower one may be fairer: that of the pairs.
    return [
        *trials,
        Trial(
            "star",
            cases["choices"] | {"learning_rate": 1e-4},
            "choices",
            "0.0001",
            against="irpo_choices",
        ),
    ]


def long() -> list[Trial]:
    """Iterations 5 to 8: where does it saturate or turn?"""
    return [
        Trial(name, {"iterations": 4}, after=4, like=name, against="irpo")
        for name in ("irpo", "iterative_dpo", "star")
    ]


def curves() -> list[Trial]:
    """Log-probabilities of fixed pairs of M_0 during the first training of each method (the paper's figures 2 to 4)."""
    return [
        Trial(name, {"iterations": 1, "probe_every": 5}, seeds=1)
        for name in ("irpo", "iterative_dpo", "star", "sft_gold", "irpo_from_sft", "dpo_from_sft")
    ]


STUDIES = {
    "tuning": tuning,
    "comparison": comparison,
    "curves": curves,
    "stability": stability,
    "regimes": regimes,
    "long": long,
    "ablations": ablations,
}
SEEDS = {
    "tuning": 1,
    "comparison": 5,
    "curves": 1,
    "stability": 3,
    "regimes": 3,
    "long": 3,
    "ablations": 3,
}
SMALL = dict(
    n_questions=24,
    n_samples=4,
    k_pairs=2,
    n_eval_questions=20,
    eval_samples=2,
    eval_samples_ends=2,
    iterations=2,
)


def study(
    name: str,
    out: str | Path = "figures",
    runs: str | Path = "runs/study",
    seeds: int | None = None,
    jobs: int = 1,
    only: list[str] | None = None,
    small: bool = False,
    progress: bool = True,
):
    """Run a study (a key of `STUDIES`) under the folder `runs`; writes its table into `out` and returns it.

    What tables and figures need of a finished run is kept in `out/STUDY_runs.jsonl`: a run that stands there with the
    same settings is not made again, also where its directory is gone, on another machine say. `only` takes the trials
    whose method, factor or name is listed. `jobs` runs go on at a time, one core each. `small` is for a look or a test:
    it shows that everything works, and nothing else. Raises `UserError` for unknown names, and where the tuning that a
    study needs was not run before.
    """
    if name not in STUDIES:
        raise UserError(f"There is no study {name!r}. The studies are {', '.join(STUDIES)}.")
    trials = [t for t in STUDIES[name]() if not only or {t.method, t.factor, t.name} & set(only)]
    if not trials:
        raise UserError(
            f"No trial of the study {name} is called {' or '.join(only or [])}. There are "
            f"{', '.join(t.name for t in STUDIES[name]())}."
        )
    runs, out, count = Path(runs), Path(out), seeds or SEEDS[name]
    used = {
        part for t in trials for part in (t.method, methods.get(t.method).start, t.like) if part
    }
    rates = (
        {}
        if name in ("tuning", "stability")
        else tuned_rates(out, {LIKE.get(part, part) for part in used})
    )
    wanted = {
        runs / name / t.name / f"seed_{seed}": settings(t, seed, rates, runs / name, small)
        for seed in range(count)
        for t in trials
        if seed < (t.seeds or count)
    }
    records, record = report.Records(name, out), {"study": name, "rates": rates, "small": small}
    if small and any(
        run["profile"]["n_questions"] != SMALL["n_questions"] for run in records.runs.values()
    ):
        raise UserError(
            f"{records.file} holds runs of full size, which small ones would replace. Give another --out, with a copy of "
            "tuning_of_methods.csv in it."
        )
    todo = {path: p for path, p in wanted.items() if not _is_kept(path, p, records, runs)}

    def valid() -> dict:
        """What was measured with the settings of today; a record of other settings is of no use."""
        by_name = {t.name: t for t in STUDIES[name]()}
        return {
            key: run
            for key, run in records.runs.items()
            if key[0] in by_name
            and _same(
                run["profile"],
                _portable(settings(by_name[key[0]], key[1], rates, runs / name, small), runs),
            )
        }

    for path in _run_all(
        _with_starts(todo, rates, runs, small), runs, jobs, progress, len(wanted) - len(todo)
    ):
        if path in todo:
            run = report.run_record(path)
            records.add(
                path.parent.name, todo[path].seed, {**run, "profile": _portable(todo[path], runs)}
            )
            report.write_table(name, STUDIES[name](), valid(), out, record)
    return report.write(name, STUDIES[name](), valid(), out, record)


def _is_kept(path: Path, p: Profile, records: report.Records, runs: Path) -> bool:
    kept = records.runs.get((path.parent.name, p.seed))
    return kept is not None and _same(kept["profile"], _portable(p, runs))


def _same(kept: dict, wanted: dict) -> bool:
    """Whether these are the same settings; fields that came after a record was made have their defaults in it."""
    try:
        return dataclasses.asdict(Profile(**kept)) == wanted
    except (TypeError, UserError):
        return False


def _portable(p: Profile, runs: Path) -> dict:
    """The settings of a run, with what it begins with relative to the folder of all runs."""
    inside = {
        name: str(Path(value).relative_to(runs))
        for name in ("start", "probe")
        if (value := getattr(p, name))
    }
    return json.loads(json.dumps(dataclasses.asdict(p) | inside))


def _with_starts(
    work: dict[Path, Profile], rates: dict[str, float], runs: Path, small: bool
) -> dict[Path, Profile]:
    """The runs of `work`, and before them those that they begin with, where these are not there (any more)."""
    first: dict[Path, Profile] = {}
    for p in work.values():
        for place in (p.start, p.probe):
            run = Path(place).parents[1] if place else None
            if run and not Path(place).exists() and run not in work:
                trial = next(t for t in STUDIES[run.parts[-3]]() if t.name == run.parts[-2])
                first[run] = settings(trial, p.seed, rates, runs / run.parts[-3], small)
    return _with_starts(first, rates, runs, small) | work if first else work


def settings(
    trial: Trial, seed: int, rates: dict[str, float], folder: Path, small: bool = False
) -> Profile:
    """The profile of one run: the default one, then the method, then the trial."""
    method = methods.get(trial.method)
    # Unpacked weights are the same numbers, faster on a CPU. Only Iterative RPO itself is asked for votes and pass@k.
    fields = dict(
        method=trial.method,
        seed=seed,
        dequantize=True,
        eval_samples=8 if trial.name == "irpo" else 2,
        eval_samples_ends=32 if trial.name == "irpo" else 2,
    )
    if rates:
        if (like := LIKE.get(trial.method, trial.method)) not in rates:
            raise UserError(
                f"The tuning has no learning rate for {like}: run `python -m irpo_utils study tuning --only {like}`."
            )
        fields["learning_rate"] = rates[like]
    fields |= (SMALL if small else {}) | trial.settings
    if small:
        fields["iterations"] = min(2, fields["iterations"])
    if method.start:
        fields["start"] = str(folder / method.start / f"seed_{seed}" / "iteration_1" / "adapter")
    if trial.after:
        t = min(trial.after, SMALL["iterations"]) if small else trial.after
        fields["start"] = str(
            folder.parent
            / "comparison"
            / trial.like
            / f"seed_{seed}"
            / f"iteration_{t}"
            / "adapter"
        )
    if fields.get("probe_every"):
        fields["probe"] = str(folder / "irpo" / f"seed_{seed}" / "iteration_0" / "pairs")
    return methods.apply(methods.doubled(profiles.get("cpu", **fields)))


def tuned_rates(out: Path, needed=TUNED) -> dict[str, float]:
    """The learning rate of each method: the best greedy accuracy after its last iteration on the validation split.

    Raises `UserError` where a run of the methods `needed` is not in the table.
    """
    import pandas

    if not (out / "tuning_of_methods.csv").exists():
        raise UserError(
            f"{out}/tuning_of_methods.csv is missing: run `python -m irpo_utils study tuning` first, which "
            "chooses a learning rate for every method."
        )
    rows = pandas.read_csv(out / "tuning_of_methods.csv").query("metric == 'greedy'")
    if absent := sorted(
        {(name, rate) for name in needed for rate in RATES}
        - set(zip(rows.method, rows.level.astype(float)))
    ):
        raise UserError(
            f"{out}/tuning_of_methods.csv lacks {len(absent)} of its runs, such as {absent[0][0]} at {absent[0][1]:g}: "
            "let `python -m irpo_utils study tuning` end first."
        )
    last = rows[
        rows.iteration == rows.groupby("method").iteration.transform("max")
    ]  # a run that stopped before is not chosen
    best = last.sort_values(["value", "level"], ascending=[False, True]).groupby("method").first()
    return {method: float(rate) for method, rate in best.level.items()}


def _run_all(
    work: dict[Path, Profile], runs: Path, jobs: int, progress: bool, done_before: int = 0
):
    """All runs, each as soon as what it starts from is there; yields the path of each that is finished."""
    from tqdm.auto import tqdm

    finished = [path for path, p in work.items() if _is_finished(path, p)]
    yield from finished
    waiting = [(path, p) for path, p in work.items() if path not in finished]
    bar = tqdm(
        total=done_before + len(work),
        initial=done_before + len(finished),
        desc="runs",
        unit="run",
        disable=not progress,
    )
    # Processes of their own: one core each, and the memory of a run goes with it. The C library is asked to keep memory
    # that was given back: fetching it anew for every tensor costs about a tenth of the time.
    os.environ.update(MALLOC_TRIM_THRESHOLD_=str(2**32 - 1), MALLOC_MMAP_THRESHOLD_=str(2**25))
    with (
        bar,
        _told(jobs),
        ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=24
        ) as pool,
    ):
        going: dict = {}
        while waiting or going:
            for path, p in [item for item in waiting if _is_ready(*item)][: jobs - len(going)]:
                waiting.remove((path, p))
                share(path, p, runs)
                going[pool.submit(_run_one, path, p, max(1, (os.cpu_count() or 1) // jobs))] = path
            if not going:
                path, p = waiting[0]
                raise UserError(
                    f"{path} begins with {p.start or p.probe}, and the run that should have made it stopped before: see "
                    f"stopped.json in its directory. Everything else is done; name the others with --only."
                )
            for done in wait(going, return_when=FIRST_COMPLETED).done:
                done.result()
                path = going.pop(done)
                bar.set_postfix_str(f"{path.parent.name} {path.name}")
                bar.update(1)
                yield path


@contextlib.contextmanager
def _told(jobs: int):
    """A process that was killed, as a `UserError`."""
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "The system ended a run, most often because memory ran out. What was finished is kept: the same command goes "
            f"on, and with fewer --jobs than {jobs} it needs less."
        ) from error


def _run_one(path: Path, p: Profile, threads: int) -> None:
    """One run in a process of its own. A run that cannot go on is a result, too: it says why in `stopped.json`."""
    import torch

    from irpo_utils import iteration
    from irpo_utils.__main__ import calm_libraries

    calm_libraries()
    torch.set_num_threads(threads)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "output.txt").open("a") as file, contextlib.redirect_stdout(file):
        try:
            iteration.run(p, path, progress=False)
        except UserError as error:
            if not str(error).startswith(("no pairs", "Training stopped")):
                raise
            (path / "stopped.json").write_text(
                json.dumps({"iteration": _done(path) + 1, "reason": str(error)}, indent=1) + "\n"
            )


def _done(path: Path) -> int:
    """The last iteration of a run that is there as a whole, or -1."""
    return max(
        (
            int(file.parent.name.rpartition("_")[2])
            for file in path.glob("iteration_*/metrics.json")
        ),
        default=-1,
    )


def _is_finished(path: Path, p: Profile) -> bool:
    return report.is_over(path) and json.loads(
        (path / "profile.json").read_text()
    ) == dataclasses.asdict(p)


def _is_ready(path: Path, p: Profile) -> bool:
    """Whether all is there that a run begins with."""
    own_probe = path / "iteration_0" / "pairs"
    return all(
        Path(place).exists() for place in (p.start, p.probe) if place and Path(place) != own_probe
    )


def share(path: Path, p: Profile, runs: Path) -> None:
    """Put M_0's completions and evaluation from another run in place, as links, where both would be the same."""
    from irpo_utils import iteration

    iteration.RunDirectory(path, p).check_profile()
    for other in sorted(runs.glob("*/*/seed_*")):
        try:
            q = Profile(**json.loads((other / "profile.json").read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if (
            other == path
            or q.start
            or methods.get(q.method).examples
            or methods.get(p.method).examples
        ):
            continue
        from_m0 = not p.start or methods.get(p.method).start
        if (
            from_m0
            and methods.get(p.method).samples
            and q.temperature_of(0) == p.temperature_of(0)
            and _agree(p, q, SAMPLING)
        ):
            for stage in ("samples", "graded"):
                _link(other / "iteration_0" / stage, path / "iteration_0" / stage)
        ends = [settings.eval_samples_ends for settings in (p, q)]
        if not p.start and ends[0] == ends[1] and _agree(p, q, EVALUATION):
            _link(other / "iteration_0" / "evaluation", path / "iteration_0" / "evaluation")


def _agree(p: Profile, q: Profile, names: tuple[str, ...]) -> bool:
    return all(getattr(p, name) == getattr(q, name) for name in ("model", "data", *names))


def _link(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=os.link)
        os.replace(partial, target)


def _show(level) -> str:
    if isinstance(level, list):
        return " then ".join(f"{value:g}" for value in level)
    return f"{level:g}" if isinstance(level, float) else str(level).lower()
