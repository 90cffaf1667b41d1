"""Several runs of one profile that differ in their seed, as one result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas
from datasets import load_from_disk

from irpo_utils import UserError, evaluation
from irpo_utils.ops import statistics
from irpo_utils.ops.run_directory import is_whole
from irpo_utils.ops.storage import read_inputs, read_profile
from irpo_utils.profiles import Profile


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
    data = load_from_disk(str(Path(run) / f"iteration_{t}" / "evaluation"))[metric]
    return list(evaluation.correct_per_question(data).values())
