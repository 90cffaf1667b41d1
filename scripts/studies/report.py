"""What a study measured: one tidy table, means with paired differences, and figures."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pandas
from datasets import load_from_disk

from irpo_utils import methods, plots, tasks
from studies import api, figures
from studies.api import seed_and_question_interval

FILES = {"tuning": "tuning_of_methods", "long": "eight_iterations"}  # others: the study's name
COST = ["factor", "level", "tokens", "seconds"]  # columns of a study's table, after the metrics
ANSWERS = ("greedy", "sampled")  # completions of an evaluation
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
OLD_COLUMNS = {"logps_chosen": figures.CHOSEN, "logps_rejected": figures.REJECTED}


def run_record(path: Path) -> dict:
    """Everything that tables and figures need of a finished run, for a line of JSON.

    `profile`, `environment`; `metrics`: the rows of metrics.csv with `tokens` and `seconds`, and
    the metrics that only studies have; `answers`: for each iteration the number of correct
    completions of every question, out of `k`, as a digit in base 36, and as `solved` whether the
    greedy completion was correct without luck, where the task can tell; `probe_log`:
    log-probabilities during training, if the run has a probe.

    `tokens` and `seconds` are the totals up to that iteration of sampling, grading, pairing and
    training, without evaluation. The metric `stopped` marks an iteration that could not be made;
    `one_step_apart` is the share of pairs whose completions differ in one line.
    """
    profile = json.loads((path / "profile.json").read_text())
    rows = pandas.concat([pandas.read_csv(path / "metrics.csv"), _study_metrics(path)])
    cost = _cost(pandas.read_csv(path / "timing.csv"), methods.get(profile["method"]))
    rows = rows.assign(**{name: rows.iteration.map(cost[name]) for name in cost})
    probe_log = []
    if profile["probe_every"]:
        text = (path / "iteration_1" / "probe_log.jsonl").read_text()
        probe_log = [json.loads(line) for line in text.splitlines()]
    task = tasks.get(profile["task"])
    evaluations = sorted(path.glob("iteration_*/evaluation/checksums.json"))
    return {
        "profile": profile,
        "environment": json.loads((path / "environment.json").read_text()),
        "metrics": json.loads(rows.to_json(orient="records", double_precision=15)),
        "answers": {iteration_of(f.parents[1]): _answers(f.parent, task) for f in evaluations},
        "probe_log": probe_log,
    }


def iteration_of(folder: Path) -> int:
    """t of a folder iteration_t."""
    return int(folder.name.rpartition("_")[2])


def _answers(evaluation: Path, task) -> dict:
    """Correct completions by question for greedy and sampled, as strings of digits."""
    counted = {"k": 1}
    for metric in ANSWERS:
        rows = load_from_disk(str(evaluation))[metric]
        correct = pandas.Series(rows["correct"][:]).groupby(rows["id"][:], sort=False).sum()
        if metric == "greedy" and hasattr(task, "solved"):
            solved = [row["finished"] and task.solved(row["completion"], row) for row in rows]
            counted["solved"] = "".join("1" if each else "0" for each in solved)
        counted[metric] = "".join(DIGITS[n] for n in correct)
        counted["k"] = len(rows) // len(correct)
    return counted


def accuracies(record: dict, t: int, metric: str) -> list[float]:
    """Accuracy of M_t on each question of its evaluation; `metric`: greedy, sampled or solved."""
    answers = record["answers"][str(t)]
    k = answers["k"] if metric == "sampled" else 1
    return [int(digit, 36) / k for digit in answers[metric]]


def _study_metrics(path: Path) -> pandas.DataFrame:
    """Rows of metrics that only studies have: `stopped` and `one_step_apart`."""
    measured = []  # (iteration, metric, value, n)
    if (path / "stopped.json").exists():
        stopped = json.loads((path / "stopped.json").read_text())
        measured.append((stopped["iteration"], "stopped", 1.0, 1))
    for folder in sorted(path.glob("iteration_*/pairs")):
        pairs = load_from_disk(str(folder))
        both = [(c, r) for c, r in zip(pairs["chosen"], pairs["rejected"], strict=True) if r]
        if both:  # not with chosen completions alone
            share = sum(one_step_apart(*pair) for pair in both) / len(both)
            measured.append((iteration_of(folder.parent), "one_step_apart", share, len(both)))
    first = pandas.read_csv(path / "metrics.csv").iloc[0].to_dict()
    names = ("iteration", "metric", "value", "n")
    return pandas.DataFrame(
        [
            {**first, "k": 0, "low": None, "high": None, **dict(zip(names, row, strict=True))}
            for row in measured
        ]
    )


def one_step_apart(chosen: str, rejected: str) -> bool:
    """Whether two solutions have as many lines and differ in one; the final answer is ignored."""
    a, b = (text.strip().splitlines()[:-1] for text in (chosen, rejected))
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def _cost(timing: pandas.DataFrame, method) -> pandas.DataFrame:
    """Sampled `tokens` and `seconds` by t until M_t was made; `timing`: rows of timing.csv."""
    made = timing[timing.stage != "evaluation"].copy()
    made["iteration"] += made.stage != "adapter"  # completions of M_t are used for M_{t+1}
    sampling_stage = "samples" if method.train is None else "adapter"
    made["tokens"] = made.tokens.where(made.stage == sampling_stage, 0)
    sums = made.groupby("iteration")[["tokens", "seconds"]].sum()
    return sums.reindex(range(int(timing.iteration.max()) + 1), fill_value=0).cumsum()


def is_over(path: Path) -> bool:
    """Whether a run has all its iterations, or stopped early because of its settings."""
    return (path / "stopped.json").exists() or api.is_whole(path)


class Records:
    """The finished runs of a study by (trial, seed), a line each in OUT/STUDY_runs.jsonl."""

    def __init__(self, name: str, out: Path):
        self.file = out / f"{file_of(name)}_runs.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.runs = {(row["trial"], row["seed"]): row for row in map(json.loads, lines)}

    def add(self, trial: str, seed: int, record: dict) -> None:
        """Keep a run, instead of an earlier one of the same trial and seed."""
        self.runs[trial, seed] = json.loads(json.dumps({"trial": trial, "seed": seed, **record}))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text("".join(json.dumps(self.runs[key]) + "\n" for key in sorted(self.runs)))
        os.replace(partial, self.file)


def file_of(name: str) -> str:
    """The beginning of the names of a study's files."""
    return FILES.get(name, name)


def write(name: str, trials: list, runs: dict, out: Path, record: dict) -> pandas.DataFrame:
    """Write tables and figures of a study from its `runs` by (trial, seed); returns its table.

    `record`: how the study was run, for the JSON files next to the results.
    """
    result, average = write_table(name, trials, runs, out, record), means(trials, runs)
    average.to_csv(out / f"{file_of(name)}_mean.csv", index=False)
    if name == "comparison":
        paired(trials, runs).to_csv(out / "comparison_paired.csv", index=False)
    if name == "curves":
        log_probabilities(runs).to_csv(out / "log_probabilities.csv", index=False)
    for title, (figure, data) in draw(name, result, average, runs).items():
        plots.save(figure, out, title, data, made_by(runs, record))
    return result


def write_table(name: str, trials: list, runs: dict, out: Path, record: dict) -> pandas.DataFrame:
    """Write and return the table of the runs so far, with a JSON file on how they were made."""
    result, file = table(name, trials, runs), file_of(name)
    out.mkdir(parents=True, exist_ok=True)
    result.to_csv(out / f"{file}.csv", index=False)
    (out / f"{file}.json").write_text(json.dumps(made_by(runs, record), indent=1) + "\n")
    return result


def made_by(runs: dict, record: dict) -> dict:
    """How the runs of a study were made, which may be on several days, commits and machines."""
    made = [run["environment"] for run in runs.values()]
    return {
        **record,
        **api.environment(),
        "runs": len(made),
        "commits": sorted({each["commit"] or "" for each in made}),
        "processors": sorted({each["processor"] for each in made}),
        "torch": sorted({each["versions"]["torch"] for each in made}),
    }


def table(name: str, trials: list, runs: dict) -> pandas.DataFrame:
    """The metrics of all runs with `factor`, `level`, `tokens` and `seconds` (see `run_record`)."""
    parts = []
    for trial in trials:
        for run in _seeds_of(trial.name, runs).values():
            rows = pandas.DataFrame(run["metrics"]).assign(factor=trial.factor, level=trial.level)
            rows["iteration"] += trial.after
            parts.append(rows)
    result = pandas.concat(parts, ignore_index=True)
    if name == "comparison":
        m0 = result[(result.method == "irpo") & (result.iteration == 0)]
        result = pandas.concat([m0.assign(method="zero_shot"), result], ignore_index=True)
    return result[[column for column in result if column not in COST] + COST]


def means(trials: list, runs: dict) -> pandas.DataFrame:
    """Accuracy of each trial and iteration over its seeds, and the difference from `against`.

    Columns `method`, `factor`, `level`, `iteration`, `metric`, `value`, `low`, `high`, `n`
    (questions), `seeds`; and on the same seeds, questions and iteration `against`, `difference`,
    `difference_low`, `difference_high`. Intervals resample seeds and questions together.
    """
    names, rows = {trial.name for trial in trials}, []
    for trial in trials:
        for t, metric in itertools.product(range(9), (*ANSWERS, "solved")):
            own = _accuracies(trial.name, runs, t, metric)
            if not own:
                continue
            value, low, high = seed_and_question_interval(list(own.values()))
            row = {"method": trial.method, "factor": trial.factor, "level": trial.level}
            row |= {"iteration": t + trial.after, "metric": metric}
            row |= {"value": value, "low": low, "high": high}
            row |= {"n": len(next(iter(own.values()))), "seeds": len(own)}
            compared = trial.against in names - {trial.name}
            other = _accuracies(trial.against, runs, t, metric) if compared else {}
            if own.keys() & other.keys():
                difference, low, high = seed_and_question_interval(_differences(own, other))
                row |= {"against": trial.against, "difference": difference}
                row |= {"difference_low": low, "difference_high": high}
            rows.append(row)
    return pandas.DataFrame(rows)


def paired(trials: list, runs: dict, metric: str = "greedy") -> pandas.DataFrame:
    """Every method against every other at the same iteration, the previous iteration and M_0.

    Columns `method`, `iteration`, `against`, `against_iteration`, `difference` (accuracy of the
    first minus the second), `low`, `high`, `n`, `seeds`; intervals as in `means`.
    """
    cells = {
        (trial.method, t): found
        for trial in trials
        for t in range(9)
        if (found := _accuracies(trial.name, runs, t, metric))
    }
    rows = []
    for ((a, t), own), ((b, u), other) in itertools.product(cells.items(), repeat=2):
        compared = a != b and t == u > 0 or a == b and t > 0 and u in (0, t - 1)
        if compared and own.keys() & other.keys():
            difference = _differences(own, other)
            interval = seed_and_question_interval(difference)
            rows.append((a, t, b, u, *interval, len(difference[0]), len(difference)))
    names = "method iteration against against_iteration difference low high n seeds"
    return pandas.DataFrame(rows, columns=names.split())


def _seeds_of(name: str, runs: dict) -> dict[int, dict]:
    """The runs of a trial by seed."""
    return {seed: runs[trial, seed] for trial, seed in sorted(runs) if trial == name}


def _accuracies(name: str, runs: dict, t: int, metric: str) -> dict[int, list[float]]:
    """Accuracy of M_t on each question, by seed."""
    return {
        seed: accuracies(run, t, metric)
        for seed, run in _seeds_of(name, runs).items()
        if metric in run["answers"].get(str(t), ())
    }


def _differences(own: dict, other: dict) -> list[list[float]]:
    """Differences on each question for the seeds that both have."""
    return [
        [a - b for a, b in zip(own[seed], other[seed], strict=True)]
        for seed in sorted(own.keys() & other.keys())
    ]


def log_probabilities(runs: dict) -> pandas.DataFrame:
    """Log-probabilities of the probes during training: `method`, `seed`, `step`, by side."""
    logs = []
    for (_, seed), run in sorted(runs.items()):
        if run["probe_log"]:
            log = pandas.DataFrame(run["probe_log"]).rename(columns=OLD_COLUMNS)
            logs.append(log.assign(method=run["profile"]["method"], seed=seed))
    return pandas.concat(logs, ignore_index=True)


def draw(name: str, result, average, runs: dict) -> dict[str, tuple]:
    """The figures of a study with their data, by the name of their files."""
    if name == "comparison":
        return _draw_comparison(result)
    if name == "curves":
        return _draw_curves(log_probabilities(runs))
    if name == "stability":
        pairs = result[result.factor.str.startswith("alpha=") & (result.metric == "greedy")]
        alpha, learning_rate = pairs.factor.str[6:].astype(float), pairs.level.astype(float)
        pairs = pairs.assign(alpha=alpha, learning_rate=learning_rate)
        return {"stability_map": (figures.heat_map(pairs), pairs)}
    if name == "long":
        lines = average[average.metric == "greedy"]
        lines = lines.assign(metric=[api.method_title(method) for method in lines.method])
        figure = figures.sweep(lines, "iteration", "Iteration", "Greedy accuracy (%)")
        return {"eight_iterations_greedy": (figure, lines)}
    if name in ("regimes", "ablations") and "difference" in average:
        return _draw_differences(name, average)
    return {}


def _draw_comparison(result) -> dict[str, tuple]:
    is_irpo, greedy = result.method == "irpo", result.metric == "greedy"
    last = result[is_irpo].iteration.max()
    untrained = result.method.isin(("zero_shot", "few_shot"))
    ends = result.iteration.isin((1, last)) | (untrained & (result.iteration == 0))
    votes = is_irpo & (result.metric == "majority") & (result.k == 32)
    costly = "irpo iterative_dpo star self_consistency self_rewarding spin grpo shuffled".split()
    dots = _with_titles(result[(greedy & ends) | votes])
    costs = result[result.method.isin(costly) & greedy & (result.iteration > 0)]
    costs = _with_titles(costs)
    spread = result[is_irpo & result.metric.isin(("pass_at_k", "distinct_answers"))]
    drawn = {}
    if len(dots):
        drawn["comparison_dots"] = (figures.dot_plot(dots), dots)
    if len(costs):
        drawn["comparison_tokens"] = (figures.accuracy_against_cost(costs), costs)
        figure = figures.accuracy_against_cost(costs, x="seconds")
        drawn["comparison_seconds"] = (figure, costs)
    if len(spread):
        drawn["comparison_diversity"] = (figures.diversity(spread), spread)
    return drawn


def _with_titles(rows):
    """The methods with their titles, as figures show them."""
    return rows.assign(method=[api.method_title(name) for name in rows.method])


def _draw_curves(logs) -> dict[str, tuple]:
    panels = {
        "log_probabilities_from_m0": ("irpo", "iterative_dpo", "star"),
        "log_probabilities_others": ("irpo_from_sft", "dpo_from_sft", "sft_gold"),
    }
    drawn = {}
    for title, names in panels.items():
        rows = logs[logs.method.isin(names)]
        by_method = {
            api.method_title(name): rows[rows.method == name]
            for name in names
            if name in set(rows.method)
        }
        if by_method:
            drawn[title] = (figures.training_curves(by_method), rows)
    return drawn


def _draw_differences(name: str, average) -> dict[str, tuple]:
    """Pairs against another trial, after the last iteration of each setting."""
    rows = average[average.metric.isin(("greedy", "solved")) & average.difference.notna()]
    rows = rows[rows.method != "star"]
    rows = rows[rows.iteration == rows.groupby(["factor", "level"]).iteration.transform("max")]
    if rows.empty:
        return {}
    labels = []
    for row in rows.itertuples():
        label = f"{row.factor} = {row.level}" if row.level else row.factor
        labels.append(f"{label} (number)" if row.metric == "solved" else label)
    return {f"{name}_differences": (figures.differences(rows, labels), rows)}
