"""Finished runs of several seeds: whether they can be compared, their metrics and the means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pandas

from irpo_utils import UserError, evaluation
from irpo_utils.grading import group
from irpo_utils.ops import checksums, statistics
from irpo_utils.ops.run_directory import SETTINGS
from irpo_utils.ops.storage import read_inputs, read_profile
from irpo_utils.profiles import Profile
from studies import significance


def collect(runs: list[str | Path]) -> tuple[pandas.DataFrame, pandas.DataFrame, dict]:
    """Metrics of several runs (seeds) of one profile: (all rows, means with intervals, record).

    The intervals of the means resample seeds and questions together; the gain of the last iteration
    over M_0 is paired, question by question.
    """
    settings = [read_profile(run) for run in runs]
    if len({p.seed for p in settings}) < len(runs):
        raise UserError("Two runs have the same seed and would count as two: give one per seed.")
    for run, p in zip(runs, settings, strict=True):
        _check_comparable(run, p, runs[0], settings[0])
    first, means = settings[0], []
    for metric in ("greedy", "sampled"):
        matrices = []
        for t in range(first.iterations + 1):
            matrices.append(np.array([accuracy_per_question(run, t, metric) for run in runs]))
            means.append({"iteration": t, **share_row(metric, matrices[t])})
        if first.iterations:
            row = interval_row(f"{metric}_gain_over_M0", matrices[-1] - matrices[0])
            means.append({"iteration": first.iterations, **row})
    tables = [pandas.read_csv(Path(run) / "metrics.csv") for run in runs]
    for vote in tables[0][tables[0].metric == "majority"].itertuples():
        matrix = [majority_per_question(run, vote.iteration, vote.k) for run in runs]
        means.append({"iteration": vote.iteration, **share_row("majority", matrix, vote.k)})
    shared = {"method": first.method, "split": first.eval_split, "seeds": len(runs)}
    order = ["method", "iteration", "split", "metric", "k", "value", "low", "high", "n", "seeds"]
    record = {"seeds": [p.seed for p in settings], "profile": dataclasses.asdict(first)}
    record["runs"] = [_made(run, p.seed) for run, p in zip(runs, settings, strict=True)]
    means = pandas.DataFrame([shared | row for row in means])[order]
    return pandas.concat(tables, ignore_index=True), means, record


def is_whole(run: Path) -> bool:
    """Whether a run has all its iterations, sound, made from one another, and in its table."""
    try:
        iterations = range(json.loads((run / "profile.json").read_text())["iterations"] + 1)
        folders = [run / f"iteration_{t}" for t in iterations]
        for folder in folders:
            json.loads((folder / "metrics.json").read_text())
        listed = set(pandas.read_csv(run / "metrics.csv").iteration)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    artefacts = {file.parent for file in run.glob(f"iteration_*/*/{checksums.NAME}")}
    artefacts |= {folder / "evaluation" for folder in folders}
    artefacts |= {folder / "adapter" for folder in folders[1:]}
    records = [checksums.read(artefact) for artefact in artefacts]
    if listed != set(iterations) or not all(records):
        return False
    sources = {k: v for record in records for k, v in record.get("inputs", {}).items()}
    sources.pop(SETTINGS, None)
    return all(checksums.digest(run / name) == value for name, value in sources.items())


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
    return list(evaluation.correct_per_question(_evaluated(run, t)[metric]).values())


def majority_per_question(run: str | Path, t: int, k: int) -> list[float]:
    """Share of correct majority votes of M_t over k completions each, for each question."""
    sampled = _evaluated(run, t)["sampled"].select_columns(["id", "extracted", "correct"])
    questions = group(sampled).values()
    return [statistics.mean_over_blocks(evaluation.majority, rows, k) for rows in questions]


def _evaluated(run: str | Path, t: int) -> datasets.DatasetDict:
    """The graded completions of M_t: `greedy` and `sampled`."""
    return datasets.load_from_disk(str(Path(run) / f"iteration_{t}" / "evaluation"))


def interval_row(metric: str, matrix, k: int = 1) -> dict:
    """One row of a metrics table: the mean of `matrix[seed, question]` with its interval."""
    value, low, high = significance.seed_and_question_interval(matrix)
    n = len(matrix[0])
    return {"metric": metric, "k": k, "value": value, "low": low, "high": high, "n": n}


def share_row(metric: str, matrix, k: int = 1) -> dict:
    """`interval_row`; if all shares are 0 or all are 1, Wilson's interval instead of a point."""
    made = interval_row(metric, matrix, k)
    if made["low"] == made["high"] and made["value"] in (0, 1):
        made["low"], made["high"] = evaluation.wilson_interval(
            round(made["value"] * made["n"]), made["n"]
        )
    return made
