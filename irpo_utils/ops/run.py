"""A run with checks and crash-safe storage."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from pathlib import Path

import datasets
from tqdm.auto import tqdm
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from irpo_utils import UserError, iteration, methods, tasks, training
from irpo_utils.engines import Engine
from irpo_utils.ops import checksums, contamination, export, hub, trainer
from irpo_utils.ops import plan as planning
from irpo_utils.ops.run_directory import RunDirectory
from irpo_utils.ops.storage import read_profile
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes


def run(profile: Profile, out: str | Path, progress: bool = True) -> list[dict]:
    """`iteration.run` with checks and crash-safe storage; the same call resumes at any point.

    Raises `UserError` for mistakes before anything is written, for an `out` that was made with
    other settings or is in use, and for what the stages refuse.
    """
    hub.limit_waiting()
    datasets.disable_caching()  # else a shuffle adds a file to the artefact that it reads
    processes.wait()  # joins the processes, if there are several
    progress, profile = progress and processes.is_first(), settled(profile, out)
    p = methods.apply(profile)
    overlap = check(p, out)
    keep, engine = RunDirectory(out), engine_of(p)
    with keep.lock(), contextlib.closing(engine):
        if progress:
            tqdm.write(contamination.describe(overlap))
        rows = iteration.run(profile, out, keep, engine, progress)
        keep.write_json(keep.out / "contamination.json", dataclasses.asdict(overlap))
        processes.wait()
    return rows


def check(p: Profile, out: str | Path) -> contamination.Overlap:
    """Refuse what cannot work before the model is loaded; returns the overlap of the questions."""
    method, task = methods.get(p.method), tasks.get(p.task)
    train = task.load("train", p.data).shuffle(seed=p.seed)
    questions = iteration.first(task.load(p.eval_split, p.data), p.n_eval_questions)
    for name, kind in {"lr_scheduler": SchedulerType, "optimizer": OptimizerNames}.items():
        value, known = getattr(p, name), sorted(choice.value for choice in kind)
        if value not in known:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {value!r}; transformers knows {', '.join(known)}.")
    if p.loss not in training.LOSSES:
        raise UserError(f"There is no loss {p.loss!r}. --loss is {', '.join(training.LOSSES)}.")
    if p.report_to != "none" and importlib.util.find_spec(p.report_to) is None:
        raise UserError(f"--report-to needs that package: `pip install {p.report_to}`.")
    methods.check_start(p)
    needs_gold = p.gold or not (method.samples or method.train)
    if needs_gold and not any(row.get("solution") for row in train):
        needs = "--gold true" if method.samples else f"--method {p.method}"
        raise UserError(f"There are no gold solutions for {needs}: add a column `solution`.")
    first, probe = Path(out).resolve() / "iteration_0", Path(p.probe or "").expanduser().resolve()
    if p.probe and probe != first / "pairs" and not (probe / "state.json").is_file():
        raise UserError(f"--probe {p.probe} is no folder of pairs, such as RUN/iteration_0/pairs.")
    if (p.probe or p.probe_every) and not trainer.CALLBACKS:
        raise UserError("--probe and --probe-every need scripts/run.py: give it the same options.")
    if p.start and checksums.read(first / "adapter") is None:
        export.find_start(p)
    return contamination.check([*train, *learnt_before(p)], questions, p.allow_overlap)


def settled(p: Profile, out: str | Path | None = None) -> Profile:
    """The profile with the choices of `plan.choose` that loading the model needs; NF4 on a CPU.

    The run `out` keeps those that it was started with, so that M_0 is the same on another GPU.
    """
    names = ["quantize"]
    if methods.get(p.method).train:  # it draws completions itself: their lengths are never known
        names += ["micro_batch_size", "gradient_checkpointing"]
    if None not in (getattr(p, name) for name in names):
        return p
    started = out is not None and any(Path(out).glob("iteration_*/*"))
    chosen = read_profile(out) if started else planning.plan(p).profile
    left = [name for name in names if getattr(p, name) is None]
    return dataclasses.replace(p, **{name: getattr(chosen, name) for name in left})


def load_model(p: Profile):
    """M_0 and its tokenizer, as a run of this profile loads them."""
    hub.limit_waiting()
    return engine_of(p).load(settled(p))


def engine_of(p: Profile) -> Engine:
    """The engine of the profile, for the processes of this run; its errors name cause and fix."""
    engine = iteration.plugin(f"engines.{p.engine}").Engine()
    engine.load = hub.explained(p.model)(engine.load)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("Configure accelerate without FSDP, and use --shard true instead.")
    return processes.engine(p, engine) if p.shard or processes.count() > 1 else engine


def learnt_before(p: Profile) -> list[dict]:
    """The training questions of the runs that `p` starts from, as far as their data are there."""
    start = Path(p.start).expanduser().resolve() if p.start else None
    places = (start, *start.parents[:2]) if start else ()
    run_folder = next((place for place in places if (place / "profile.json").is_file()), None)
    if not run_folder:
        return []
    before = read_profile(run_folder)
    if (before.task, before.data) == (p.task, p.data):
        return learnt_before(before)
    try:
        return [*tasks.get(before.task).load("train", before.data), *learnt_before(before)]
    except UserError as error:
        tqdm.write(f"The training questions of --start {p.start} were not compared: {error}")
        return []
