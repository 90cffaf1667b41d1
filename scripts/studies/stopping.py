"""Rules that say when to stop, and their scores on finished runs of the seed models.

A rule maps the rows of a run, one dict per model M_0, M_1, ..., to the number of the model that it
keeps. Rules that stop see no later row. Two questions: how much test accuracy does the kept model
lose against the best one of its run, and does a rule warn before accuracy falls?
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pandas

from irpo_utils import evaluation

FIGURES = Path(__file__).resolve().parents[2] / "figures"
FALL = 5  # points of test accuracy below the best earlier model
NOT_ITERATIVE = ("irpo_m0_samples", "sft_gold")


def finished_runs(figures: Path = FIGURES) -> list[dict]:
    """Finished runs: `study`, `model`, `trial`, `seed`, and `rows` with one dict per model.

    A row has accuracies as `validation` and `test` (fractions of 1) and, from M_1 on, `kl` to the
    previous model (nats), `chosen_change` of the log-probability of chosen completions, and
    `one_step`, the share of its training pairs that differ in one line (None where a study did not
    measure it). The runs of the first model stored one split: its questions with even numbers are
    `validation` here, those with odd numbers are `test`.
    """
    longer = {(r["trial"], r["seed"]): r for r in records("eight_iterations", figures)}
    found = []
    for record in records("comparison", figures):
        rows = _rows_of_first_model(record)
        if len(rows) < 5 or rows[1]["chosen_change"] is None:  # one iteration, or no pairs
            continue
        key = record["trial"], record["seed"]
        if key in longer:
            rows += _rows_of_first_model(longer[key])[1:]
        head = {"study": "comparison", "model": "hasty", "trial": key[0], "seed": key[1]}
        found.append(head | {"rows": rows})
    lesson = {record["key"]: record for record in records("lesson", figures)}
    # A run of eight iterations begins with the four of the run with the same settings and seed.
    repeated = {key.replace("/iterations=8", "") for key in lesson if "/iterations=8" in key}
    for key, record in lesson.items():
        iterative = record["method"] not in NOT_ITERATIVE
        if iterative and key not in repeated and len(record["iterations"]) > 2:
            head = {"study": "lesson", "model": record["model"], "seed": record["seed"]}
            head["trial"] = record["trial"].removeprefix(record["model"] + "/")
            found.append(head | {"rows": rows_of_lesson(record["iterations"])})
    return found


def records(study: str, figures: Path = FIGURES) -> list[dict]:
    """The runs of figures/`study`_runs.jsonl; none if the file is not there."""
    file = figures / f"{study}_runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _rows_of_first_model(record: dict) -> list[dict]:
    def of(name: str) -> dict[int, float]:
        return {m["iteration"]: m["value"] for m in record["metrics"] if m["metric"] == name}

    kl, after, before = map(
        of, ("kl_to_previous", "chosen_logp_per_token", "chosen_logp_per_token_before")
    )
    one_step, rows = of("one_step_apart"), []
    for t in sorted(map(int, record["answers"])):
        correct = [int(digit) for digit in record["answers"][str(t)]["greedy"]]
        rows.append(
            {
                "validation": float(np.mean(correct[0::2])),
                "test": float(np.mean(correct[1::2])),
                "kl": kl.get(t),
                "chosen_change": after[t] - before[t] if t in after else None,
                "one_step": one_step.get(t - 1),  # the pairs of M_{t-1} train M_t
            }
        )
    return rows


def rows_of_lesson(entries: list[dict]) -> list[dict]:
    """The rows of a run of the second model's study."""
    rows = []
    for t, entry in enumerate(entries):
        split = {name: entry[name]["greedy"] for name in ("validation", "test")}
        change = np.mean(entry["chosen"]) - np.mean(entries[t - 1]["chosen"]) if t else None
        rows.append(
            {name: float(np.mean([int(digit) for digit in text])) for name, text in split.items()}
            | {"kl": entry["kl_previous"][0] if t else None, "chosen_change": change}
            | {"one_step": None}
        )
    return rows


# ------------------------------------------------------------------------------------------ rules


def stop_when(is_bad):
    """The rule that keeps the model before the first row that is bad."""

    def rule(rows: list[dict]) -> int:
        return next((t - 1 for t in range(1, len(rows)) if is_bad(rows, t)), len(rows) - 1)

    return rule


def best_validation(rows: list[dict]) -> int:
    """After the last iteration: the model with the best validation accuracy, the first of a tie."""
    values = [row["validation"] for row in rows]
    return values.index(max(values))


def patience(rows: list[dict], patience: int = 1, column: str = "validation") -> int:
    """Stop when `patience` models in a row have not exceeded the best one, and keep that one."""
    best = 0
    for t in range(1, len(rows)):
        if rows[t][column] > rows[best][column]:
            best = t
        elif t - best == patience:
            break
    return best


patience_2 = functools.partial(patience, patience=2)


def falls(rows: list[dict], t: int) -> bool:
    """Whether validation accuracy fell."""
    return rows[t]["validation"] < rows[t - 1]["validation"]


def above(name: str, limit: float):
    """Whether a number of M_t exceeds `limit`."""
    return lambda rows, t: rows[t][name] > limit


RULES = {
    "keep the last model": lambda rows: len(rows) - 1,
    "best validation accuracy of all": best_validation,
    "patience 1": patience,
    "patience 2": patience_2,
    "validation accuracy falls": stop_when(falls),
    "KL to the previous model above 0.5 nats": stop_when(above("kl", 0.5)),
    "KL to the previous model above 1 nat": stop_when(above("kl", 1)),
    "KL to the previous model above 2 nats": stop_when(above("kl", 2)),
    "KL to the previous model grows": stop_when(lambda r, t: t > 1 and r[t]["kl"] > r[t - 1]["kl"]),
    "chosen completions lose probability": stop_when(lambda rows, t: rows[t]["chosen_change"] < 0),
    "validation falls, or KL above 2 nats": stop_when(
        lambda rows, t: falls(rows, t) or rows[t]["kl"] > 2
    ),
    "validation falls, and KL above 1 nat": stop_when(
        lambda rows, t: falls(rows, t) and rows[t]["kl"] > 1
    ),
    "over 15 % of the pairs differ in one line": stop_when(above("one_step", 0.15)),
}


# ----------------------------------------------------------------------------------------- scores


def regret(rows: list[dict], kept: int) -> float:
    """Test accuracy (points) that the kept model lies behind the best one of its run."""
    values = [row["test"] for row in rows]
    return 100 * (max(values) - values[kept])


def first_fall(rows: list[dict]) -> int | None:
    """The first model that lies FALL points of test accuracy or more below an earlier one."""
    values = [100 * row["test"] for row in rows]
    return next((t for t in range(1, len(rows)) if max(values[:t]) - values[t] >= FALL), None)


def scores(runs: list[dict], rules: dict = RULES) -> pandas.DataFrame:
    """One row per rule, scored on the runs that have its numbers; points, with 95 % intervals.

    `regret`: the loss against the best model of the run, at most `most`. `gain_over_last`: what the
    rule saves against keeping the last model. Of the `falls`, a rule warns `before` if it stops at
    an earlier model than the one that fell (`before_low` and `before_high` in %), and `at` if it
    stops at that one. `lead`: the mean number of iterations from the model at which it stops to the
    one that fell, over the falls that it stops before; empty if these are fewer than 2. No rule can
    stop before the `falls_at_m1`. `false_alarms`: runs without a fall that it stops, of
    `without_fall`.
    """
    return pandas.DataFrame([_score(name, rule, runs) for name, rule in rules.items()])


def interval_over_settings(runs: list[dict], values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of one value per run. Resamples settings, because their seeds are alike."""
    groups: dict[tuple, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault((run["model"], run["trial"]), []).append(value)
    sums, counts = np.array([(sum(group), len(group)) for group in groups.values()]).T
    rng, n = np.random.default_rng(0), len(groups)
    drawn = rng.integers(n, size=(evaluation.RESAMPLES, n))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(np.mean(values)), float(low), float(high)


def _score(name: str, rule, runs: list[dict]) -> dict:
    if "one line" in name:
        runs = [run for run in runs if run["rows"][1]["one_step"] is not None]
    rows = [run["rows"] for run in runs]
    kept, end = [rule(row) for row in rows], [len(row) - 1 for row in rows]
    lost = [regret(row, t) for row, t in zip(rows, kept, strict=True)]
    saved = [regret(row, t) - x for row, t, x in zip(rows, end, lost, strict=True)]
    made = {"rule": name, "runs": len(runs)}
    for column, values in (("regret", lost), ("gain_over_last", saved)):
        value, low, high = interval_over_settings(runs, values)
        made |= {column: value, f"{column}_low": low, f"{column}_high": high}
    made |= {"most": max(lost), "keeps_m0": kept.count(0)}
    seen = 2 if rule is patience_2 else 1  # models after the kept one when the rule stops
    stops = [t + seen if t + seen <= last else None for t, last in zip(kept, end, strict=True)]
    made["stops"] = sum(stop is not None for stop in stops)
    if rule is best_validation:  # it is not known before the run has ended
        return made | {"stops": 0}
    falls_of = [first_fall(row) for row in rows]
    fallen = [i for i, fall in enumerate(falls_of) if fall is not None]
    before = [stops[i] is not None and stops[i] < falls_of[i] for i in fallen]
    made |= {"falls": len(fallen), "before": sum(before)}
    made["at"] = sum(stops[i] == falls_of[i] for i in fallen)
    made["falls_at_m1"] = falls_of.count(1)
    if fallen:
        _, low, high = interval_over_settings([runs[i] for i in fallen], before)
        made |= {"before_low": 100 * low, "before_high": 100 * high}
    early = [i for i, is_early in zip(fallen, before, strict=True) if is_early]
    if len(early) > 1:
        lead = interval_over_settings(
            [runs[i] for i in early], [falls_of[i] - stops[i] for i in early]
        )
        made |= dict(zip(("lead", "lead_low", "lead_high"), lead, strict=True))
    calm = [stop for stop, fall in zip(stops, falls_of, strict=True) if fall is None]
    return made | {"false_alarms": sum(s is not None for s in calm), "without_fall": len(calm)}
