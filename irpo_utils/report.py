"""What a study measured: one tidy table, means with paired differences, and figures."""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path

import pandas
from datasets import load_from_disk

from irpo_utils import evaluation, methods, plots, run_directory, tasks

FILES = {
    "tuning": "tuning_of_methods",
    "long": "eight_iterations",
}  # the others are called like their study
COST = ["factor", "level", "tokens", "seconds"]
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def file_of(name: str) -> str:
    """What the files of a study in figures/ begin with."""
    return FILES.get(name, name)


def run_record(path: Path) -> dict:
    """All that tables and figures need of a finished run, in a form that outlives its directory.

    `profile`, `environment`; `metrics`: the rows of metrics.csv with `tokens` and `seconds`, and those metrics that only a
    study looks at; `answers`: for each iteration and question the number of right answers out of `k`, a digit each (base
    36), and as `solved` whether the greedy answer was no luck, where the task can tell (`word_choices`); `probe_log`:
    log-probabilities during training, where they were logged more often than at its ends.

    `tokens` were sampled and `seconds` spent up to that iteration to make M_t: sampling, grading, pairing, training, but
    not its evaluation; for a trial that goes on from another run, since then. The metric `stopped` (1) marks an iteration
    that could not be made, `one_step_apart` the share of pairs whose two sides differ in one line of working.
    """
    profile = json.loads((path / "profile.json").read_text())
    rows = _with_more(pandas.read_csv(path / "metrics.csv"), path)
    cost = _cost(
        pandas.read_csv(path / "timing.csv"), methods.get(profile["method"]).train is not None
    )
    rows = rows.assign(
        tokens=rows.iteration.map(cost.tokens), seconds=rows.iteration.map(cost.seconds)
    )
    probe = path / "iteration_1" / "adapter" / "probe_log.jsonl"
    return {
        "profile": profile,
        "environment": json.loads((path / "environment.json").read_text()),
        "metrics": json.loads(rows.to_json(orient="records", double_precision=15)),
        "answers": {
            t: _answers(path, t, tasks.get(profile["task"]))
            for t in range(profile["iterations"] + 1)
            if (path / f"iteration_{t}" / "evaluation" / "checksums.json").exists()
        },
        "probe_log": [json.loads(line) for line in probe.read_text().splitlines()]
        if profile["probe_every"]
        else [],
    }


def _answers(path: Path, t: int, task) -> dict:
    counted = {"k": 1}
    for metric in ("greedy", "sampled"):
        data = load_from_disk(str(path / f"iteration_{t}" / "evaluation"))[metric]
        right = dict.fromkeys(data["id"], 0)
        for question, correct in zip(data["id"], data["correct"]):
            right[question] += correct
        if metric == "greedy" and hasattr(task, "solved"):
            counted["solved"] = "".join(
                str(int(row["finished"] and task.solved(row["completion"], row))) for row in data
            )
        counted[metric] = "".join(DIGITS[n] for n in right.values())
        counted["k"] = len(data) // len(right)
    return counted


def accuracies(record: dict, t: int, metric: str) -> list[float]:
    """Share of right completions of M_t for each question of its evaluation; `metric` is greedy, sampled or solved."""
    answers = record["answers"][str(t)]
    return [
        int(digit, 36) / (answers["k"] if metric == "sampled" else 1) for digit in answers[metric]
    ]


class Records:
    """The finished runs of a study by (trial, seed), one line each in `out/STUDY_runs.jsonl`, written anew with each."""

    def __init__(self, name: str, out: Path):
        self.file = out / f"{file_of(name)}_runs.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.runs = {(row["trial"], row["seed"]): row for row in map(json.loads, lines)}

    def add(self, trial: str, seed: int, record: dict) -> None:
        """Keep a run; one of the same trial and seed that was made with other settings makes room."""
        self.runs[trial, seed] = json.loads(json.dumps({"trial": trial, "seed": seed, **record}))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text("".join(json.dumps(self.runs[key]) + "\n" for key in sorted(self.runs)))
        os.replace(partial, self.file)


def write(name: str, trials: list, runs: dict, out: Path, record: dict):
    """Write the tables and draw the figures of a study from its `runs` by (trial, seed); returns its table."""
    result, average = write_table(name, trials, runs, out, record), means(trials, runs)
    average.to_csv(out / f"{file_of(name)}_mean.csv", index=False)
    if name == "comparison":
        paired(trials, runs).to_csv(out / "comparison_paired.csv", index=False)
    if name == "curves":
        log_probabilities(runs).to_csv(out / "log_probabilities.csv", index=False)
    if name in FIGURES:
        for title, (figure, data) in FIGURES[name](result, average, runs).items():
            plots.save(figure, out, title, data, _record(runs, record))
    return result


def write_table(name: str, trials: list, runs: dict, out: Path, record: dict):
    """The table of what has been measured so far, with what made it beside it."""
    result, file = table(name, trials, runs), file_of(name)
    out.mkdir(parents=True, exist_ok=True)
    result.to_csv(out / f"{file}.csv", index=False)
    (out / f"{file}.json").write_text(json.dumps(_record(runs, record), indent=1) + "\n")
    return result


def _record(runs: dict, record: dict) -> dict:
    """What made the runs of a study: they may be of several days, commits and machines."""
    made = [run["environment"] for run in runs.values()]
    return {
        **record,
        **run_directory.environment(),
        "runs": len(made),
        "commits": sorted({each["commit"] or "" for each in made}),
        "processors": sorted({each["processor"] for each in made}),
        "torch": sorted({each["versions"]["torch"] for each in made}),
    }


def table(name: str, trials: list, runs: dict):
    """All that the runs of a study have measured: the metrics table with `factor`, `level`, `tokens`, `seconds` (see `run_record`)."""
    parts = [
        pandas.DataFrame(run["metrics"])
        .assign(factor=trial.factor, level=trial.level)
        .assign(iteration=lambda rows: rows.iteration + trial.after)  # noqa: B023
        for trial in trials
        for run in _of(trial.name, runs).values()
    ]
    result = pandas.concat(parts, ignore_index=True)
    if name == "comparison":
        zero = result[(result.method == "irpo") & (result.iteration == 0)].assign(
            method="zero_shot"
        )
        result = pandas.concat([zero, result], ignore_index=True)
    return result[[column for column in result if column not in COST] + COST]


def _of(name: str, runs: dict) -> dict[int, dict]:
    """The runs of a trial by seed."""
    return {seed: runs[trial, seed] for trial, seed in sorted(runs) if trial == name}


def is_over(path: Path) -> bool:
    """Whether a run has all its iterations, whole, or has stopped because it could not go on."""
    return (path / "stopped.json").exists() or run_directory.is_whole(path)


def _with_more(rows, path: Path):
    """The metrics of a run, with those that only a study looks at."""
    more = []
    if (path / "stopped.json").exists():
        stopped = json.loads((path / "stopped.json").read_text())
        more.append({"iteration": stopped["iteration"], "metric": "stopped", "value": 1.0, "n": 1})
    for folder in sorted(path.glob("iteration_*/pairs")):
        share, n = _one_step_apart(folder)
        if n:
            more.append(
                {
                    "iteration": int(folder.parent.name.rpartition("_")[2]),
                    "metric": "one_step_apart",
                    "value": share,
                    "n": n,
                }
            )
    for row in more:
        rows.loc[len(rows)] = {**rows.iloc[0], "k": 0, "low": None, "high": None, **row}
    return rows


def _one_step_apart(folder: Path) -> tuple[float, int]:
    """(share, number of pairs); no pairs where there are winners alone."""
    pairs = load_from_disk(str(folder))
    apart = [one_step_apart(*both) for both in zip(pairs["chosen"], pairs["rejected"]) if both[1]]
    return (sum(apart) / len(apart), len(apart)) if apart else (0.0, 0)


def one_step_apart(chosen: str, rejected: str) -> bool:
    """Whether two solutions have the same number of lines and differ in one, the final answer not counted."""
    a, b = (text.strip().splitlines()[:-1] for text in (chosen, rejected))
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1


def means(trials: list, runs: dict):
    """Accuracy of each trial and iteration over its seeds, and what it gains over the trial that it is set against.

    Columns `method`, `factor`, `level`, `iteration`, `metric`, `value`, `low`, `high`, `n` (questions), `seeds`, and with
    the same seeds, questions and iteration `against`, `difference`, `difference_low`, `difference_high`. Intervals
    resample seeds and questions together (`evaluation.seed_and_question_interval`).
    """
    by_name, rows = {trial.name: trial for trial in trials}, []
    for trial in trials:
        for t, metric in itertools.product(range(9), ("greedy", "sampled", "solved")):
            own = _accuracies(trial.name, runs, t, metric)
            if not own:
                continue
            value, low, high = evaluation.seed_and_question_interval(list(own.values()))
            row = {
                "method": trial.method,
                "factor": trial.factor,
                "level": trial.level,
                "iteration": t + trial.after,
                "metric": metric,
                "value": value,
                "low": low,
                "high": high,
                "n": len(next(iter(own.values()))),
                "seeds": len(own),
            }
            compared = trial.against in by_name and trial.against != trial.name
            other = _accuracies(trial.against, runs, t, metric) if compared else {}
            if shared := sorted(set(own) & set(other)):
                gain = [
                    [a - b for a, b in zip(own[seed], other[seed], strict=True)] for seed in shared
                ]
                difference = evaluation.seed_and_question_interval(gain)
                row |= dict(
                    zip(
                        ("against", "difference", "difference_low", "difference_high"),
                        (trial.against, *difference),
                    )
                )
            rows.append(row)
    return pandas.DataFrame(rows)


def paired(trials: list, runs: dict):
    """All methods against each other at the same iteration, and each against the iteration before and against M_0.

    Columns `method`, `iteration`, `against`, `against_iteration`, `difference` (what the first gains over the second, greedy),
    `low`, `high`, `n`, `seeds`; on the same questions and seeds, intervals as in `means`.
    """
    cells = {
        (trial.method, t): found
        for trial in trials
        for t in range(9)
        if (found := _accuracies(trial.name, runs, t, "greedy"))
    }
    rows = []
    for (a, t), own in cells.items():
        for (b, u), other in cells.items():
            seeds = sorted(set(own) & set(other))
            if seeds and ((t == u > 0 and a != b) or (a == b and t > 0 and u in (0, t - 1))):
                gain = [
                    [x - y for x, y in zip(own[seed], other[seed], strict=True)] for seed in seeds
                ]
                rows.append(
                    (
                        a,
                        t,
                        b,
                        u,
                        *evaluation.seed_and_question_interval(gain),
                        len(gain[0]),
                        len(seeds),
                    )
                )
    names = [
        "method",
        "iteration",
        "against",
        "against_iteration",
        "difference",
        "low",
        "high",
        "n",
        "seeds",
    ]
    return pandas.DataFrame(rows, columns=names)


def _accuracies(name: str, runs: dict, t: int, metric: str) -> dict[int, list[float]]:
    """Accuracy question by question of M_t, by seed."""
    return {
        seed: accuracies(run, t, metric)
        for seed, run in _of(name, runs).items()
        if metric in run["answers"].get(str(t), ())
    }


def log_probabilities(runs: dict):
    """Log-probabilities of the same pairs of M_0 during training: `method`, `seed`, `step`, sums and per token by side."""
    logs = [
        pandas.DataFrame(run["probe_log"]).assign(method=run["profile"]["method"], seed=seed)
        for (_, seed), run in sorted(runs.items())
        if run["probe_log"]
    ]
    return pandas.concat(logs, ignore_index=True)


def _cost(timing, samples_in_training: bool):
    """Tokens sampled and seconds spent before M_t was there, by t."""
    made = timing[timing.stage != "evaluation"].copy()
    made["iteration"] += made.stage != "adapter"  # what M_t writes goes into M_{t+1}
    made["tokens"] = made.tokens.where(
        made.stage == ("adapter" if samples_in_training else "samples"), 0
    )
    sums = made.groupby("iteration")[["tokens", "seconds"]].sum()
    return sums.reindex(range(int(timing.iteration.max()) + 1), fill_value=0).cumsum()


def _draw_comparison(result, average, runs: dict) -> dict:
    last = result[result.method == "irpo"].iteration.max()
    shown = result[
        (
            (result.metric == "greedy")
            & result.iteration.isin((0, 1, last))
            & ((result.iteration > 0) | result.method.isin(("zero_shot", "few_shot")))
        )
        | ((result.metric == "majority") & (result.k == 32) & (result.method == "irpo"))
    ]
    rivals = result.method.isin(
        (
            "irpo",
            "iterative_dpo",
            "star",
            "self_consistency",
            "self_rewarding",
            "spin",
            "grpo",
            "shuffled",
        )
    )
    shown, costs = (
        _titled(shown),
        _titled(result[rivals & (result.metric == "greedy") & (result.iteration > 0)]),
    )
    spread = result[
        (result.method == "irpo") & result.metric.isin(("pass_at_k", "distinct_answers"))
    ]
    drawn = {}
    for title, rows, draw in (
        ("dots", shown, plots.dot_plot),
        ("tokens", costs, plots.accuracy_against_tokens),
        ("seconds", costs, functools.partial(plots.accuracy_against_tokens, x="seconds")),
        ("diversity", spread, plots.diversity),
    ):
        if len(rows):  # a study of a few methods may have none of these
            drawn[f"comparison_{title}"] = (draw(rows), rows)
    return drawn


def _titled(rows):
    """The methods by their titles, as figures show them."""
    return rows.assign(
        method=[
            methods.METHODS[name].title if name in methods.METHODS else "M0, zero-shot"
            for name in rows.method
        ]
    )


def _draw_stability(result, average, runs: dict) -> dict:
    pairs = result[result.factor.str.startswith("alpha=") & (result.metric == "greedy")]
    pairs = pairs.assign(
        alpha=pairs.factor.str[6:].astype(float), learning_rate=pairs.level.astype(float)
    )
    return {"stability_map": (plots.heat_map(pairs), pairs)}


def _draw_curves(result, average, runs: dict) -> dict:
    logs = log_probabilities(runs)
    drawn = {}
    for title, names in (
        ("log_probabilities_from_m0", ("irpo", "iterative_dpo", "star")),
        ("log_probabilities_others", ("irpo_from_sft", "dpo_from_sft", "sft_gold")),
    ):
        rows = logs[logs.method.isin(names)]
        if len(rows):
            panels = {
                methods.get(name).title: rows[rows.method == name]
                for name in names
                if name in set(rows.method)
            }
            drawn[title] = (plots.training_curves(panels), rows)
    return drawn


def _draw_differences(name: str, result, average, runs: dict) -> dict:
    if "difference" not in average:
        return {}
    compared = average[
        average.metric.isin(("greedy", "solved"))
        & average.difference.notna()
        & (average.method != "star")
    ]
    shown = compared[
        compared.iteration == compared.groupby(["factor", "level"]).iteration.transform("max")
    ]
    if shown.empty:
        return {}
    labels = [
        " ".join(
            word
            for word in (
                row.factor.replace("_", " "),
                row.level,
                "(number)" * (row.metric == "solved"),
            )
            if word
        )
        for row in shown.itertuples()
    ]
    return {f"{name}_differences": (plots.differences(shown, labels), shown)}


def _draw_long(result, average, runs: dict) -> dict:
    lines = average[average.metric == "greedy"].assign(
        metric=average.method.map(lambda name: methods.get(name).title)
    )
    return {
        "eight_iterations_greedy": (
            plots.sweep(lines, "iteration", "Iteration", "Right answers, greedy (%)"),
            lines,
        )
    }


FIGURES = {
    "comparison": _draw_comparison,
    "curves": _draw_curves,
    "stability": _draw_stability,
    "long": _draw_long,
    "regimes": functools.partial(_draw_differences, "regimes"),
    "ablations": functools.partial(_draw_differences, "ablations"),
}
