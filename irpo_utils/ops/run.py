"""A run with checks and crash-safe storage, and what is done with finished runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import pandas
from tqdm.auto import tqdm
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from irpo_utils import UserError, baselines, evaluation, iteration, methods, tasks, training
from irpo_utils.engines import Engine
from irpo_utils.ops import checksums, contamination, export, hub, statistics, trial
from irpo_utils.ops.run_directory import RunDirectory, is_whole
from irpo_utils.ops.storage import Folder, check_path, read_inputs, read_profile
from irpo_utils.profiles import Profile
from irpo_utils.scale import fsdp, processes


def run(profile: Profile, out: str | Path, progress: bool = True) -> list[dict]:
    """`iteration.run` with checks and crash-safe storage; the same call resumes at any point.

    Raises `UserError` for mistakes before anything is written, for an `out` that was made with
    other settings or is in use, and for what the stages refuse.
    """
    hub.limit_waiting()
    datasets.disable_caching()  # else a shuffle adds a file to the artefact that it reads
    processes.wait()  # joins the processes, if there are several
    progress = progress and processes.is_first()
    p = methods.apply(profile)
    overlap = check(p, out)
    keep = RunDirectory(out)
    with keep.lock():
        keep.write_json(keep.out / "contamination.json", dataclasses.asdict(overlap))
        if progress:
            tqdm.write(contamination.describe(overlap))
        rows = iteration.run(profile, out, keep, engine_of(p), progress)
        processes.wait()
    return rows


def check(p: Profile, out: str | Path) -> contamination.Overlap:
    """Refuse what cannot work before the model is loaded; returns the overlap of the questions."""
    method, task = methods.get(p.method), tasks.get(p.task)
    train = task.load("train", p.data).shuffle(seed=p.seed)
    questions = iteration.first(task.load(p.eval_split, p.data), p.n_eval_questions)
    for option, value, known in (
        ("--lr-scheduler", p.lr_scheduler, SchedulerType),
        ("--optimizer", p.optimizer, OptimizerNames),
    ):
        if value not in (names := sorted(kind.value for kind in known)):
            raise UserError(f"{option} is {value!r}; transformers knows {', '.join(names)}.")
    if p.loss not in training.LOSSES:
        raise UserError(f"There is no loss {p.loss!r}. --loss is {', '.join(training.LOSSES)}.")
    if p.report_to != "none" and importlib.util.find_spec(p.report_to) is None:
        raise UserError(
            f"--report-to {p.report_to} needs that package: `pip install {p.report_to}`."
        )
    methods.check_start(p)
    if method.train:
        baselines.check_group(p)
    needs_gold = p.gold or not (method.samples or method.train)
    if needs_gold and not any(row.get("solution") for row in train):
        needs = "--gold true" if method.samples else f"--method {p.method}"
        raise UserError(
            f"There are no gold solutions among the training questions, which {needs} needs. Add "
            "the column `solution` to the data, or leave that option out."
        )
    first, probe = Path(out).resolve() / "iteration_0", Path(p.probe or "").expanduser().resolve()
    if p.probe and probe != first / "pairs" and not (probe / "state.json").is_file():
        raise UserError(f"--probe {p.probe} is no folder of pairs, such as RUN/iteration_0/pairs.")
    if p.start and checksums.read(first / "adapter") is None:
        export.find_start(p)
    return contamination.check([*train, *learnt_before(p)], questions, p.allow_overlap)


def load_model(p: Profile):
    """M_0 and its tokenizer, as a run of this profile loads them."""
    hub.limit_waiting()
    return engine_of(p).load(p)


def engine_of(p: Profile) -> Engine:
    """The engine of the profile, for the processes of this run; its errors name cause and fix."""
    engine = iteration.plugin(f"engines.{p.engine}").Engine()
    engine.load = hub.explained(p.model)(engine.load)
    fsdp.check(p)
    if p.shard:
        engine = fsdp.ShardedEngine(engine)
    return processes.SharedEngine(engine) if processes.count() > 1 else engine


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
        tqdm.write(
            f"The training questions of --start {p.start} could not be compared with the "
            f"evaluation questions: {error}"
        )
        return []


def evaluate_run(
    run: str | Path,
    task: str | None = None,
    data: str | None = None,
    split: str | None = None,
    iterations: list[int] | None = None,
    k: int = 32,
    out: str | Path | None = None,
    allow_overlap: bool = False,
) -> str:
    """Evaluate M_t of a run again, perhaps on another task; writes a table and returns it as text.

    iterations: which M_t, by default the first and the last; the text ends with their paired
    comparison. Raises `UserError` if these are questions that the run was trained on.
    """
    hub.limit_waiting()
    p = read_profile(run)
    wanted = iterations if iterations is not None else sorted({0, p.iterations})
    if k < 1 or not wanted or min(wanted) < 0 or max(wanted) > p.iterations:
        raise UserError(
            f"--k must be at least 1, and --iterations from 0 to {p.iterations}, the last of {run}."
        )
    for t in wanted:
        adapter = Path(run) / f"iteration_{t}" / "adapter"
        if (t > 0 or p.start) and checksums.read(adapter) is None:
            raise UserError(f"{adapter} is missing or damaged. Run the command of {run} again.")
    folder = Path(out) if out else Path(run) / "evaluations"
    check_path(folder, "out")
    now = dataclasses.replace(
        p,
        task=task or p.task,
        data=data or (p.data if task in (None, p.task) else None),
        eval_split=split or p.eval_split,
        n_eval_questions=None,
        eval_samples=k,
        eval_samples_ends=k,
        allow_overlap=allow_overlap or p.allow_overlap,
        shard=False,
    )
    keep = _Evaluation(run, p, folder / f"{now.task}_{now.eval_split}.csv")
    stages = iteration.Stages(now, keep, engine_of(now), processes.is_first())
    for t in wanted:
        stages.evaluate(t)
    text = pandas.DataFrame(keep.rows).to_string(index=False)
    if len(wanted) > 1:
        ends = keep.greedy[wanted[0]], keep.greedy[wanted[-1]]
        correct = [list(evaluation.correct_per_question(rows).values()) for rows in ends]
        difference = evaluation.compare(*ends)
        difference["p_mcnemar"] = statistics.mcnemar(*correct)["p"]
        text += f"\n\nM_{wanted[-1]} against M_{wanted[0]}, greedy: {difference}"
    return text


class _Evaluation(Folder):
    """The adapters of a finished run `out`; the metrics of new questions go into `table_path`."""

    def __init__(self, out: str | Path, p: Profile, table_path: Path):
        super().__init__(out)
        self.p, self.table_path, self.rows, self.greedy = p, table_path, [], {}
        self.known = read_inputs(self.out)
        self.start = self.folder(0) / "adapter" if p.start else None
        self.revision = export.commit_of(self.known.get("model"))

    def check(self, stages: iteration.Stages) -> None:
        learnt, allowed = tasks.get(self.p.task).load("train", self.p.data), stages.p.allow_overlap
        if (
            self.known.get("training questions") not in (None, checksums.of_questions(learnt))
            and not allowed
        ):
            raise UserError(
                f"The training questions of {self.out} have changed since it was trained, so they "
                "cannot be compared with these. Restore the data, or add --allow-overlap true."
            )
        train = [*learnt, *learnt_before(self.p)]
        overlap = contamination.check(train, stages.eval_questions, allowed)
        if processes.is_first():
            tqdm.write(contamination.describe(overlap))

    def begin(self, stages: iteration.Stages) -> None:
        known = self.known.get("model")
        if known and export.fingerprint(stages.model) not in (None, known):
            raise UserError(
                f"The model {self.p.model} is no longer the one that {self.out} was made with. "
                "Restore it."
            )
        trial.check(stages.model, stages.tokenizer, stages.p, stages.engine)

    def dataset(self, t: int, name: str, make, over=None):
        answers = make(over)
        self.greedy[t] = answers["greedy"]
        return answers

    def evaluated(self, t: int, stages: iteration.Stages, answers) -> list[dict]:
        return statistics.further_rows(answers, stages.eval_questions)

    def metrics(self, t: int, rows: list[dict]) -> None:
        """Written after each iteration: an interrupt keeps what is there."""
        self.rows += rows
        self.write(self.table_path, pandas.DataFrame(self.rows).to_csv(index=False))


def collect(runs: list[str | Path]):
    """Metrics of several runs (seeds) of one profile: (all rows, means with intervals, record).

    The intervals of the means resample seeds and questions together; the gain of the last iteration
    over M_0 is paired, question by question.
    """
    settings = [read_profile(run) for run in runs]
    for run, p in zip(runs, settings, strict=True):
        _check_comparable(run, p, runs[0], settings[0])
    first, means = settings[0], []
    for metric in ("greedy", "sampled"):
        matrices = []
        for t in range(first.iterations + 1):
            matrices.append(np.array([accuracy_per_question(run, t, metric) for run in runs]))
            means.append({"iteration": t, **statistics.share_row(metric, matrices[t])})
        if first.iterations:
            row = statistics.row(f"{metric}_gain_over_M0", matrices[-1] - matrices[0])
            means.append({"iteration": first.iterations, **row})
    shared = {"method": first.method, "split": first.eval_split, "seeds": len(runs)}
    order = ["method", "iteration", "split", "metric", "k", "value", "low", "high", "n", "seeds"]
    tables = [pandas.read_csv(Path(run) / "metrics.csv") for run in runs]
    record = {"seeds": [p.seed for p in settings], "profile": dataclasses.asdict(first)}
    record["runs"] = [_made(run, p.seed) for run, p in zip(runs, settings, strict=True)]
    means = pandas.DataFrame([shared | row for row in means])[order]
    return pandas.concat(tables, ignore_index=True), means, record


def _check_comparable(run, p: Profile, other, first: Profile) -> None:
    if dataclasses.replace(p, seed=0) != dataclasses.replace(first, seed=0):
        raise UserError(f"{run} and {other} differ in more than their seed.")
    own, known = read_inputs(run), read_inputs(other)
    for name in ("model", "evaluation questions"):
        if own.get(name) and known.get(name) and own[name] != known[name]:
            raise UserError(f"{run} and {other} have different {name}.")
    if not is_whole(Path(run)):
        raise UserError(
            f"{run} is not finished, or something in it is damaged. Run its command again."
        )


def _made(run: str | Path, seed: int) -> dict:
    environment = json.loads((Path(run) / "environment.json").read_text())
    seconds = float(pandas.read_csv(Path(run) / "timing.csv").seconds.sum())
    return {"seed": seed, "environment": environment, "seconds": seconds}


def accuracy_per_question(run: str | Path, t: int, metric: str) -> list[float]:
    """Share of correct completions of M_t for each question; `metric` is greedy or sampled."""
    data = datasets.load_from_disk(str(Path(run) / f"iteration_{t}" / "evaluation"))[metric]
    return list(evaluation.correct_per_question(data).values())
