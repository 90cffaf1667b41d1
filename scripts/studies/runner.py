"""Run the trials of a study, several at a time, and resume a study that was stopped.

What tables and figures need of a finished run is kept in OUT/STUDY_runs.jsonl, so that a study
continues where its run directories are gone, for example on another machine. The completions of
M_0 do not depend on the method: all runs of a seed with the same sampling settings share them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm.auto import tqdm

from irpo_utils import UserError, methods
from studies import api, report, trials
from studies.api import Profile

# No result depends on these settings beyond rounding.
ROUNDING = ("sampling_batch_size", "gradient_checkpointing")
# Errors of a run that are a result of its settings.
RESULTS = ("no pairs", "Training stopped")
# The C library keeps freed memory: to fetch it again for every tensor costs a tenth of the time.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


def run_study(
    name: str,
    out: str | Path = "figures",
    runs: str | Path = "runs/study",
    seeds: int | None = None,
    jobs: int = 1,
    only: list[str] | None = None,
    small: bool = False,
    progress: bool = True,
):
    """Run a study (a key of `trials.STUDIES`), write its tables and figures, and return its table.

    `out`: folder of the results; a run that is kept there with the same settings is not run again.
    `runs`: folder of the run directories. `jobs`: runs at a time. `only`: methods, factors or names
    of trials. `small`: a few questions, to see that everything works. Raises `UserError` for
    unknown names, and if the study `tuning` has to be run first.
    """
    selected = trials.select(name, only)
    study = Study(name, Path(out), Path(runs), small, selected)
    count = seeds or trials.SEEDS[name]
    wanted = {
        study.runs / name / trial.name / f"seed_{seed}": study.profile(trial, seed)
        for seed in range(count)
        for trial in selected
        if seed < (trial.seeds or count)
    }
    todo = {path: profile for path, profile in wanted.items() if not study.is_kept(path, profile)}
    needed = study.with_prerequisites(todo)
    with tqdm(total=len(wanted) - len(todo) + len(needed), disable=not progress) as bar:
        bar.set_description("runs")
        bar.update(len(wanted) - len(todo))
        for path in run_all(needed, study.runs, jobs):
            bar.set_postfix_str(f"{path.parent.name} {path.name}")
            bar.update()
            if path in todo:
                study.keep(path, todo[path])
    return report.write(name, trials.STUDIES[name](), study.valid(), study.out, study.record())


class Study:
    """Where a study has its runs and results, and which of its runs are done."""

    def __init__(self, name: str, out: Path, runs: Path, small: bool, selected: list):
        self.name, self.out, self.runs, self.small = name, out, runs, small
        self.records = report.Records(name, out)
        kept = {run["profile"]["n_questions"] for run in self.records.runs.values()}
        if small and kept - {trials.SMALL["n_questions"]}:
            raise UserError(
                f"{self.records.file} has runs of full size, which small ones would replace. "
                f"Choose another --out, with a copy of {trials.TUNING_FILE} in it."
            )
        self.learning_rates = {}
        if name not in ("tuning", "stability"):
            used = {trial.method for trial in selected}
            used |= {trial.like for trial in selected if trial.like}
            used |= {methods.get(method).start or method for method in used}
            tuned = {trials.TUNED_AS.get(method, method) for method in used}
            self.learning_rates = trials.tuned_learning_rates(out, tuned)

    def profile(self, trial, seed: int, study: str | None = None) -> Profile:
        """The settings of a run of this study, or of another one that it needs."""
        rates, study = self.learning_rates, study or self.name
        return trials.profile_of(trial, seed, rates, self.runs, study, self.small)

    def record(self) -> dict:
        """How the study was run, for the JSON files next to its results."""
        return {"study": self.name, "rates": self.learning_rates, "small": self.small}

    def is_kept(self, path: Path, profile: Profile) -> bool:
        """Whether the results have this run with the same settings."""
        kept = self.records.runs.get((path.parent.name, profile.seed))
        return kept is not None and self._has_settings(kept, profile)

    def valid(self) -> dict:
        """The kept runs of today's settings, by (trial, seed); others would not be comparable."""
        by_name = {trial.name: trial for trial in trials.STUDIES[self.name]()}
        return {
            (name, seed): run
            for (name, seed), run in self.records.runs.items()
            if name in by_name and self._has_settings(run, self.profile(by_name[name], seed))
        }

    def _has_settings(self, kept: dict, profile: Profile) -> bool:
        """Compare settings; a field that is newer than the kept run has its default value there."""
        try:
            settings = dataclasses.asdict(api.profile_from(kept["profile"]))
        except (TypeError, UserError):
            return False
        return _same_settings(settings, trials.portable(profile, self.runs))

    def keep(self, path: Path, profile: Profile) -> None:
        """Add a finished run to the results and write the table anew."""
        run = report.run_record(path) | {"profile": trials.portable(profile, self.runs)}
        self.records.add(path.parent.name, profile.seed, run)
        every_trial = trials.STUDIES[self.name]()
        report.write_table(self.name, every_trial, self.valid(), self.out, self.record())

    def with_prerequisites(self, work: dict[Path, Profile]) -> dict[Path, Profile]:
        """`work`, and before it the runs that it starts from, where their files are missing."""
        first: dict[Path, Profile] = {}
        for profile in work.values():
            for place in (profile.start, profile.probe):
                if not place or Path(place).exists() or Path(place).parents[1] in work:
                    continue
                run = Path(place).parents[1]  # RUNS/STUDY/TRIAL/seed_SEED
                study, name = run.parts[-3:-1]
                trial = next(t for t in trials.STUDIES[study]() if t.name == name)
                first[run] = self.profile(trial, profile.seed, study)
        return self.with_prerequisites(first) | work if first else work


def run_all(work: dict[Path, Profile], runs: Path, jobs: int):
    """Run everything, each run as soon as what it starts from is there; yields finished paths."""
    waiting = []
    for path, profile in work.items():
        if _is_finished(path, profile):
            yield path
        else:
            waiting.append((path, profile))
    os.environ.update(KEEP_MEMORY)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Separate processes: each has its own cores, and the system gets a run's memory back.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=24)
    with _report_killed_process(jobs), pool:
        running = {}
        while waiting or running:
            ready = [item for item in waiting if _is_ready(*item)]
            for path, profile in ready[: jobs - len(running)]:
                waiting.remove((path, profile))
                share_stages(path, profile, runs)
                running[pool.submit(_run_one, path, profile, threads)] = path
            if not running:
                path, profile = waiting[0]
                raise UserError(
                    f"{path} starts from {profile.start or profile.probe}, but the run that makes "
                    "it stopped early; its stopped.json says why. All other runs are done: select "
                    "them with --only."
                )
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                yield running.pop(done)


@contextlib.contextmanager
def _report_killed_process(jobs: int):
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "The system ended a run, most often because memory ran out. Finished work is kept: run "
            f"the same command to resume, with fewer --jobs than {jobs} if memory was short."
        ) from error


def _run_one(path: Path, profile: Profile, threads: int) -> None:
    """One run in a separate process; if its settings end it early, stopped.json says why."""
    import torch

    api.quiet_libraries()
    torch.set_num_threads(threads)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "output.txt").open("a") as file, contextlib.redirect_stdout(file):
        try:
            api.run(profile, path, progress=False)
        except UserError as error:
            if not str(error).startswith(RESULTS):
                raise
            stopped = {"iteration": _last_iteration(path) + 1, "reason": str(error)}
            (path / "stopped.json").write_text(json.dumps(stopped, indent=1) + "\n")


def _last_iteration(path: Path) -> int:
    """The last iteration of a run that has its metrics, or -1."""
    files = path.glob("iteration_*/metrics.json")
    return max((report.iteration_of(file.parent) for file in files), default=-1)


def _is_finished(path: Path, profile: Profile) -> bool:
    if not report.is_over(path):
        return False
    settings = dataclasses.asdict(methods.apply(profile))
    return _same_settings(json.loads((path / "profile.json").read_text()), settings)


def _same_settings(kept: dict, wanted: dict) -> bool:
    """Whether two profiles give the same results up to rounding."""
    return kept | {name: wanted[name] for name in ROUNDING} == wanted


def _is_ready(path: Path, profile: Profile) -> bool:
    """Whether everything that a run starts from is there; a probe may be its own pairs."""
    own_probe = path / "iteration_0" / "pairs"
    places = [Path(place) for place in (profile.start, profile.probe) if place]
    return all(place.exists() for place in places if place != own_probe)


def share_stages(path: Path, profile: Profile, runs: Path) -> None:
    """Link M_0's completions and evaluation from other runs with the same settings in `runs`."""
    api.prepare_run_directory(path, profile)
    method = methods.get(profile.method)
    for other in sorted(runs.glob("*/*/seed_*")):
        try:
            source = api.load_profile(other)
        except UserError:
            continue
        if other == path or method.task or methods.get(source.method).task:
            continue
        same_model = _samples_from(profile) == _samples_from(source)
        same_temperature = profile.temperature_of(0) == source.temperature_of(0)
        same_sampling = same_model and same_temperature and _agree(profile, source, api.SAMPLING)
        if method.samples and same_sampling:
            _link(other, path, "samples")
            _link(other, path, "graded")
        evaluation = (*api.EVALUATION, "eval_samples_ends", "start")
        if _agree(profile, source, evaluation):
            _link(other, path, "evaluation")


def _samples_from(profile: Profile) -> str | None:
    """The adapter that draws the completions of iteration 0; None: the base alone."""
    return None if methods.get(profile.method).start else profile.start


def _agree(a: Profile, b: Profile, names: tuple[str, ...]) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("model", "data", *names))


def _link(source: Path, target: Path, stage: str) -> None:
    """Link a stage of iteration 0 of another run, whole or not at all."""
    source, target = (run / "iteration_0" / stage for run in (source, target))
    if source.exists() and not target.exists():
        partial = target.with_name(f".{stage}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=os.link)
        os.replace(partial, target)
