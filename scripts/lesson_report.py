"""Tables and figures of the lesson from `figures/lesson_runs.jsonl` (see `lesson_study.py`).

    python scripts/lesson_report.py

`lesson_mean.csv`: every metric per method, settings and iteration, with 95 % intervals over seeds
and questions. `lesson_results.csv`: test accuracy at the last iteration and at the one that
validation chooses. `lesson_verdicts.csv`: claims of the paper, the result here, and a verdict that
the script computes. `lesson_rules.csv`: stopping rules. `lesson_pairs.csv`: how alike the
completions of the held-out pairs are. `lesson_*.png/svg`: figures with their data;
those whose runs are not there yet are left out.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

import lesson_study as study
from irpo_utils import evaluation, plots
from studies import figures as drawings
from studies import lesson_statistics as lesson
from studies import misconceptions, significance, stopping

FIGURES = Path(__file__).resolve().parents[1] / "figures"
TITLES = {
    "irpo": "Iterative RPO",
    "dpo": "DPO without NLL",
    "rft": "rejection-sampling SFT",
    "grpo": "GRPO",
    "irpo_m0_samples": "Iterative RPO on M0's samples",
    "sft_gold": "SFT on gold solutions",
}
COLOURS = dict(zip(TITLES, plots.COLOURS, strict=False))
BETA_COLOURS = dict(zip((0.1, 0.3, 1.0, 3.0), plots.COLOURS[1:], strict=False))
MAIN = "misconceptions"
MIN_SEEDS = 2  # for a verdict
GAIN = {"": "points", "_low": "low", "_high": "high", "_seeds": "seeds"}  # column: of a gain


# ---------------------------------------------------------------------------------- reading records


def by_trial(records: dict[str, dict]) -> dict[str, dict[int, dict]]:
    """Trial -> seed -> record."""
    trials: dict[str, dict[int, dict]] = {}
    for record in records.values():
        trials.setdefault(record["trial"], {})[record["seed"]] = record
    return trials


def entry(record: dict, t: int) -> dict | None:
    """What was measured of M_t, or None where the run has no M_t."""
    return next((row for row in record["iterations"] if row["iteration"] == t), None)


def correctness(runs: dict[int, dict], t: int, split: str, kind: str) -> dict[int, list[float]]:
    """Seed -> correctness per question of M_t."""
    found = {}
    for seed, record in runs.items():
        measured = entry(record, t)
        if measured:
            of = measured[split]["k"] if kind == "sampled" else 1
            found[seed] = lesson.per_question(measured[split][kind], of)
    return found


def changes(runs: dict[int, dict], t: int, side: str) -> dict[int, list[float]]:
    """Seed -> change of the log-probability of each held-out completion from M0 to M_t, nats."""
    found = {}
    for seed, record in runs.items():
        measured, start = entry(record, t), entry(record, 0)
        if measured and start:
            pairs = zip(measured[side], start[side], strict=True)
            found[seed] = [now - then for now, then in pairs]
    return found


def held_out_margins(runs: dict[int, dict], t: int) -> dict[int, list[float]]:
    """Seed -> how much iteration t raised chosen over rejected held-out completions (nats)."""
    found = {}
    for seed, record in runs.items():
        now, before = entry(record, t), entry(record, t - 1)
        if now and before and record["method"] not in study.NOT_ITERATIVE:
            found[seed] = lesson.margins(now, before)
    return found


def iterations_of(runs: dict[int, dict]) -> list[int]:
    """The iterations that at least one run has."""
    return sorted({row["iteration"] for record in runs.values() for row in record["iterations"]})


# ----------------------------------------------------------------------------------- table of means


def interval_row(matrix: dict[int, list[float]], metric: str, split: str) -> dict:
    """Mean and interval over seeds and questions (or pairs)."""
    value, low, high = significance.seed_and_question_interval(list(matrix.values()))
    row = {"metric": metric, "split": split, "value": value, "low": low, "high": high}
    return row | {"seeds": len(matrix)}


def scalar_row(values: list[float], metric: str, errors: list[float] | None = None) -> dict:
    """Mean over seeds with Student's interval; of one seed the interval of its own standard
    error."""
    mean, n = float(np.mean(values)), len(values)
    half = math.nan
    if n > 1:
        half = significance.t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    elif errors:
        half = evaluation.Z * errors[0]
    return {
        "metric": metric,
        "split": "",
        "value": mean,
        "low": mean - half,
        "high": mean + half,
        "seeds": n,
    }


def metrics_of(runs: dict[int, dict], t: int) -> list[dict]:
    """All metric rows of M_t of one trial."""
    rows = [
        interval_row(correctness(runs, t, split, kind), kind, split)
        for split, kind in (("validation", "greedy"), ("validation", "sampled"), ("test", "greedy"))
    ]
    found = [measured for record in runs.values() if (measured := entry(record, t))]
    for side in ("chosen", "rejected"):
        change = changes(runs, t, side)
        if change and t:
            rows.append(interval_row(change, f"{side}_logp_change", "held-out pairs"))
            up = {seed: [float(x > 0) for x in values] for seed, values in change.items()}
            rows.append(interval_row(up, f"{side}_share_up", "held-out pairs"))
    for name in ("nats", "tokens"):
        rows.append(scalar_row([row[name] for row in found], name))
    for name in ("kl_previous", "kl_m0"):
        values = [row[name] for row in found if name in row]
        if values:
            rows.append(scalar_row([v[0] for v in values], name, [v[1] for v in values]))
    moved = held_out_margins(runs, t)
    if moved:
        rows.append(interval_row(moved, "margin", "held-out pairs"))
    if moved and next(iter(runs.values()))["method"] in study.WITH_PAIRS:
        beta = next(iter(runs.values()))["profile"]["beta"]
        weights = {s: [lesson.gradient_weight(m, beta) for m in row] for s, row in moved.items()}
        rows.append(interval_row(weights, "gradient_weight", "held-out pairs"))
        gone = {seed: [lesson.saturated(m, beta) for m in values] for seed, values in moved.items()}
        rows.append(interval_row(gone, "saturated_share", "held-out pairs"))
    for name in ("train_margin", "train_accuracy", "pairs", "questions_with_pairs"):
        values = [row[name] for row in found if name in row]
        if values:
            rows.append(scalar_row(values, name))
    for name in misconceptions.NAMES:
        counts = [row["misconceptions"]["sampled"]["lines"][name] for row in found]
        applies, follows = (sum(count[i] for count in counts) for i in (0, 1))
        if applies:  # all seeds together: the interval is over lines
            low, high = evaluation.wilson_interval(follows, applies)
            made = {"metric": f"follows: {name}", "split": "validation", "value": follows / applies}
            rows.append(made | {"low": low, "high": high, "seeds": len(found)})
    return rows


def mean_table(trials: dict[str, dict[int, dict]]) -> pd.DataFrame:
    """The table of means, one row per trial, iteration and metric."""
    rows = []
    for trial, runs in sorted(trials.items()):
        record = next(iter(runs.values()))
        head = {
            "model": record["model"],
            "method": record["method"],
            "settings": " ".join(trial.split("/")[2:]),
        }
        for t in iterations_of(runs):
            rows += [head | {"iteration": t} | row for row in metrics_of(runs, t)]
    columns = ["model", "method", "settings", "iteration", "metric", "split"]
    return pd.DataFrame(rows)[[*columns, "value", "low", "high", "seeds"]]


def chosen(record: dict) -> dict:
    """The iteration of a run with the best greedy accuracy on validation; the first of a tie."""
    return max(record["iterations"], key=lambda row: study.share(row["validation"]["greedy"]))


def results_table(records: dict[str, dict]) -> pd.DataFrame:
    """Test accuracy of M_1, of the last iteration, and of the one that validation chooses for each
    seed, and what each is above that of tuned Iterative RPO on the same seeds and questions.

    `tuned`: whether these are the settings that the tuning of the method chose.
    """
    trials, rows = by_trial(records), []
    tuned = {trial_name(method, settings_of(method, records)) for method in TITLES}
    irpo = trials.get(trial_name("irpo", settings_of("irpo", records)), {})
    picks = {
        "first": lambda record: entry(record, 1) or record["iterations"][-1],
        "last": lambda record: record["iterations"][-1],
        "chosen": chosen,
    }
    for trial, runs in sorted(trials.items()):
        row = {"trial": trial, "seeds": len(runs), "tuned": trial in tuned}
        for name, pick in picks.items():
            picked = {seed: pick(record) for seed, record in runs.items()}
            matrix, other = (test_answers(of, pick) for of in (runs, irpo))
            row["questions"] = len(next(iter(matrix.values())))
            made = interval_row(matrix, name, "test")
            row |= {name: made["value"], f"{name}_low": made["low"], f"{name}_high": made["high"]}
            row[f"{name}_iterations"] = " ".join(
                str(picked[s]["iteration"]) for s in sorted(picked)
            )
            if runs is not irpo and set(matrix) & set(other):
                gain = lesson.paired_interval(other, matrix)
                row |= {f"{name}_gain{end}": gain[key] for end, key in GAIN.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def test_answers(runs: dict[int, dict], pick) -> dict[int, list[float]]:
    """Seed -> correctness per test question of the iteration that `pick` picks from a run."""
    return {s: lesson.per_question(pick(run)["test"]["greedy"]) for s, run in runs.items()}


def pair_table(pairs: list[dict]) -> pd.DataFrame:
    """How alike the completions of the held-out pairs are, one row per seed model, means in %.

    `tokens`: share of the tokens of both completions that have a partner in the other one
    (`difflib`, in order). `before`: share of the chosen completion's equations that come before the
    first one that differs. `first` and `token`: share of the pairs with the same first equation,
    and with the same first token.
    """
    rows: dict[str, list] = {}
    for pair in pairs:
        same = difflib.SequenceMatcher(None, pair["chosen_ids"], pair["rejected_ids"], False)
        chosen, rejected = (
            [match[0] for match in misconceptions.EQUATION.finditer(pair[side])]
            for side in ("chosen", "rejected")
        )
        equal = [a == b for a, b in zip(chosen, rejected, strict=False)] + [False]
        before = equal.index(False) / max(1, len(chosen))
        token = pair["chosen_ids"][0] == pair["rejected_ids"][0]
        rows.setdefault(pair["model"], []).append((same.ratio(), before, equal[0], token))
    table = {model: 100 * np.mean(values, axis=0) for model, values in rows.items()}
    table = pd.DataFrame(table, index=["tokens", "before", "first", "token"]).T.rename_axis("model")
    table.insert(0, "pairs", [len(rows[model]) for model in table.index])
    return table.reset_index()


# ----------------------------------------------------------------------------------------- verdicts


def trial_name(method: str, settings: dict, model: str = MAIN) -> str:
    """The name of a trial as in the records."""
    return study.Run(method, 0, settings, model).trial


def settings_of(method: str, records: dict[str, dict]) -> dict:
    """The tuned settings of a method; before its tuning is finished, those of the core part."""
    core = {"learning_rate": 3e-4} | ({"beta": 1.0} if method in study.WITH_PAIRS else {})
    return study.best_settings(method, records) or core


def decide(gain: dict, paper: float) -> str:
    """The verdict on a difference; one seed decides nothing, and nan: no claim of the paper."""
    if math.isnan(paper):
        return ""
    if gain["seeds"] < MIN_SEEDS:
        return lesson.VERDICTS[3]
    return lesson.verdict(gain["low"], gain["high"], paper)


def claims(records: dict[str, dict]) -> list[dict]:
    """The comparisons: group, claim, trial and iteration of a and b, the paper's difference (points).

    Where the paper gives a direction and no number, `paper` is infinite with its sign. Where it
    does not compare, `paper` is nan.
    """
    tuned = {method: settings_of(method, records) for method in TITLES}
    groups = {
        "comparison": comparison_claims(tuned),
        "NLL term": nll_claims(),
        "map": map_claims(tuned["irpo"]["beta"]),
        "regimes": regime_claims(tuned["irpo"]["beta"]),
        "eight iterations": long_claims(tuned),
        "beta": beta_claims(),
    }
    return [
        {"group": group} | dict(zip(("claim", "a", "b", "paper"), row, strict=True))
        for group, rows in groups.items()
        for row in rows
    ]


def comparison_claims(tuned: dict[str, dict]):
    """Every method at its tuned settings against Iterative RPO."""
    name = {method: trial_name(method, settings) for method, settings in tuned.items()}
    irpo = name["irpo"]
    for t, gain in ((1, 17.5), (2, 4.9), (3, 3.1), (4, 0.5)):
        yield f"Iterative RPO gains in iteration {t}", (irpo, t - 1), (irpo, t), gain
    for t in (1, 2, 3, 4):
        paper = 7.9 if t == 1 else math.inf
        claim = f"Iterative RPO beats rejection-sampling SFT (M{t})"
        yield claim, (name["rft"], t), (irpo, t), paper
    for t, paper in ((1, 11.3), (4, math.inf)):
        claim = f"Iterative RPO beats DPO without NLL, each at its settings (M{t})"
        yield claim, (name["dpo"], t), (irpo, t), paper
    near = trial_name("dpo", {"beta": 1.0, "learning_rate": 3e-4})
    for t in (1, 4):
        yield (
            f"Iterative RPO beats DPO without NLL with beta 1 (M{t})",
            (near, t),
            (irpo, t),
            math.inf,
        )
    control = trial_name("irpo_m0_samples", tuned["irpo"])  # at the learning rate of Iterative RPO
    for t, paper in ((2, 3.2), (4, math.inf)):
        claim = f"new completions beat more steps on those of M0, at equal settings (M{t})"
        yield claim, (control, t), (irpo, t), paper
    claim = "new completions beat more steps on those of M0, each at its settings (M4)"
    yield claim, (name["irpo_m0_samples"], 4), (irpo, 4), math.inf
    claim = "Iterative RPO beats SFT on gold solutions (M1)"
    yield claim, (name["sft_gold"], 1), (irpo, 1), 9.6
    yield "Iterative RPO beats GRPO (M4)", (name["grpo"], 4), (irpo, 4), math.nan


def nll_claims():
    """Iterative RPO against DPO without NLL at the same β and learning rate, on all models."""
    for model in study.MODELS:
        where = "" if model == MAIN else f"{model} model, "
        for beta in (0.1, 0.3, 1.0, 3.0):
            for rate in (3e-4, 1e-3):
                settings = {"beta": beta, "learning_rate": rate}
                without, having = (trial_name(m, settings, model) for m in ("dpo", "irpo"))
                for t, paper in ((1, 11.3), (4, math.inf)):
                    claim = (
                        f"the NLL term helps ({where}beta {beta:g}, learning rate {rate:g}, M{t})"
                    )
                    yield claim, (without, t), (having, t), paper
    large = {"beta": 1.0, "learning_rate": 3e-4}
    for t in (1, 4):
        claim = f"at beta 1 the NLL term helps with ten times the weight (M{t})"
        ten = trial_name("irpo", large | {"alpha": 10.0})
        yield claim, (trial_name("dpo", large), t), (ten, t), math.inf


def map_claims(beta: float):
    """The weight of the NLL term at each learning rate; a small and a large one against none."""
    for rate in study.RATES["irpo"]:
        at = {"beta": beta, "learning_rate": rate}
        without, rft = trial_name("dpo", at), trial_name("rft", {"learning_rate": rate})
        weights = {"1": trial_name("irpo", at), "3": trial_name("irpo", at | {"alpha": 3.0})}
        for weight, trial in weights.items():
            claim = f"alpha {weight} beats alpha 0 (learning rate {rate:g}, M4)"
            yield claim, (without, 4), (trial, 4), math.inf
        claim = f"alpha 3 beats rejection-sampling SFT (learning rate {rate:g}, M4)"
        yield claim, (rft, 4), (weights["3"], 4), math.inf


def regime_claims(beta: float):
    """Pairs against chosen completions alone, with the same questions, steps and learning rate."""
    for regime in ("all questions", *study.REGIMES):
        for rate in (3e-4, 1e-3):
            rft, irpo = (run.trial for run in study.regime_runs(regime, rate, beta, 0))
            for t in (1, 4):
                claim = f"rejected completions help: {regime} (learning rate {rate:g}, M{t})"
                yield claim, (rft, t), (irpo, t), math.inf


def long_claims(tuned: dict[str, dict]):
    """Eight iterations: what the last four add, and the comparison at the end."""
    name = {m: trial_name(m, tuned[m] | {"iterations": 8}) for m in ("irpo", "rft", "dpo")}
    for method, trial in name.items():
        yield f"{TITLES[method]} gains after iteration 4 (M8)", (trial, 4), (trial, 8), math.nan
    for method in ("rft", "dpo"):
        claim = f"Iterative RPO beats {TITLES[method]} after eight iterations (M8)"
        yield claim, (name[method], 8), (name["irpo"], 8), math.inf


def beta_claims():
    """Is a large β better than the paper's 0.1? On all models, with and without the NLL term."""
    for model in study.MODELS:
        for rate in (3e-4, 1e-3):
            for method in ("irpo", "dpo"):
                for beta in (1.0, 3.0):
                    small, large = (
                        trial_name(method, {"beta": b, "learning_rate": rate}, model)
                        for b in (0.1, beta)
                    )
                    where = f"{model} model, {TITLES[method]}, learning rate {rate:g}, M4"
                    claim = f"beta {beta:g} beats beta 0.1 ({where})"
                    yield claim, (small, 4), (large, 4), math.inf


def verdict_table(records: dict[str, dict], split: str = "test") -> pd.DataFrame:
    """Claims whose runs are there, with the paired difference in greedy accuracy and the
    verdict."""
    trials, rows = by_trial(records), []
    for claim in claims(records):
        (a, t_a), (b, t_b) = claim["a"], claim["b"]
        if a not in trials or b not in trials:
            continue
        first = correctness(trials[a], t_a, split, "greedy")
        second = correctness(trials[b], t_b, split, "greedy")
        if not set(first) & set(second):
            continue
        gain = lesson.paired_interval(first, second)
        rows.append(
            {
                "group": claim["group"],
                "claim": claim["claim"],
                "a": f"{a} M{t_a}",
                "b": f"{b} M{t_b}",
                **gain,
                "paper": claim["paper"],
                "verdict": decide(gain, claim["paper"]),
            }
        )
    return pd.DataFrame(rows + log_probability_verdicts(records) + interactions(records))


def log_probability_verdicts(records: dict[str, dict]) -> list[dict]:
    """The paper's figures 2 and 3: directions of the log-probabilities after one iteration."""
    trials, rows = by_trial(records), []
    for rate in (3e-4, 1e-3):
        settings = [("rft", {"learning_rate": rate}, "chosen", 1)]
        settings += [("rft", {"learning_rate": rate}, "rejected", 1)]
        for beta in (0.1, 1.0):
            at = {"beta": beta, "learning_rate": rate}
            settings += [("irpo", at, "chosen", 1), ("dpo", at, "chosen", -1)]
            settings += [("irpo", at, "rejected", -1)]
        for method, at, side, sign in settings:
            word = "raises" if sign > 0 else "lowers"
            where = ", ".join(f"{name.replace('_', ' ')} {at[name]:g}" for name in at)
            claim = f"{TITLES[method]} {word} {side} completions ({where}, M1, nats)"
            name = trial_name(method, at)
            rows += direction(trials.get(name), side, sign, claim, name)
    return rows


def direction(runs, side: str, sign: int, claim: str, name: str) -> list[dict]:
    """One row: the mean change of the held-out completions of one side, in nats."""
    change = changes(runs, 1, side) if runs else {}
    if not change:
        return []
    value, low, high = significance.seed_and_question_interval(list(change.values()))
    return [
        {
            "group": "log-probabilities",
            "claim": claim,
            "a": f"{name} M0",
            "b": f"{name} M1",
            "points": value,
            "low": low,
            "high": high,
            "seeds": len(change),
            "seeds_above_zero": sum(sum(values) > 0 for values in change.values()),
            "paper": sign * math.inf,
            "verdict": decide({"low": low, "high": high, "seeds": len(change)}, sign * math.inf),
        }
    ]


def interactions(records: dict[str, dict]) -> list[dict]:
    """Differences of two differences, paired by seed and question."""
    trials, rows = by_trial(records), []
    for rate in (3e-4, 1e-3):
        for t in (1, 4):
            gains = []
            for beta in (1.0, 0.1):
                settings = {"beta": beta, "learning_rate": rate}
                gains.append(gain_of(trials, ("dpo", settings), ("irpo", settings), t))
            claim = (
                f"the NLL term helps more at beta 0.1 than at beta 1 (learning rate {rate:g}, M{t})"
            )
            names = [f"gain of the NLL term at beta {beta}" for beta in (1, 0.1)]
            rows += interaction("NLL term", claim, names, gains)
        for method, t in itertools.product(("irpo", "dpo"), (1, 4)):
            small, large = ((method, {"beta": b, "learning_rate": rate}) for b in (0.1, 1.0))
            gains = [gain_of(trials, small, large, t, model) for model in (MAIN, "plain")]
            claim = (
                "beta 1 gains more over beta 0.1 where completions have fewer nats "
                f"({TITLES[method]}, learning rate {rate:g}, M{t})"
            )
            names = [f"gain of beta 1 on the {model} model" for model in (MAIN, "plain")]
            rows += interaction("beta", claim, names, gains)
    return rows


def gain_of(trials: dict, a: tuple, b: tuple, t: int, model: str = MAIN) -> dict:
    """Seed -> what `b` gains over `a` on each test question; both are (method, settings)."""
    sides = (trials.get(trial_name(*side, model), {}) for side in (a, b))
    before, after = (correctness(runs, t, "test", "greedy") for runs in sides)
    return {
        seed: [y - x for x, y in zip(before[seed], after[seed], strict=True)]
        for seed in set(before) & set(after)
    }


def interaction(group: str, claim: str, names: list[str], gains: list[dict]) -> list[dict]:
    """One row: the second gain minus the first; none if no seed has both."""
    if not set(gains[0]) & set(gains[1]):
        return []
    gain = lesson.paired_interval(*gains)
    row = {"group": group, "claim": claim, "a": names[0], "b": names[1], **gain}
    return [row | {"paper": math.inf, "verdict": decide(gain, math.inf)}]


# ------------------------------------------------------------------------------------------ figures


def panels(rows: int, columns: int, width: float, height: float):
    """A figure with a grid of axes in the style of the package."""
    figure = plots.TextFigure(figsize=(width, height), layout="constrained", facecolor="#FFFFFF")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.grid(color="#DDDDDD", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, axes


def iterations_axis(panel) -> None:
    """Name the axis of iterations and put its marks on whole numbers."""
    panel.set_xlabel("Iteration t (model $M_t$)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def line(panel, rows: pd.DataFrame, label: str, colour: str, scale: float = 1, **style) -> str:
    """One metric against the iteration with its band; the numbers in words."""
    rows = rows.sort_values("iteration")
    panel.fill_between(
        rows.iteration, scale * rows.low, scale * rows.high, color=colour, alpha=0.12, linewidth=0
    )
    panel.plot(
        rows.iteration,
        scale * rows.value,
        color=colour,
        label=label,
        linewidth=2,
        marker="o",
        markersize=4,
        **style,
    )
    numbers = ", ".join(f"{scale * value:.1f}" for value in rows.value)
    return f"{label}: {numbers}"


def beta_figure(means: pd.DataFrame, model: str):
    """Validation accuracy per iteration by β, with and without the NLL term."""
    means = means[(means.model == model) & means.method.isin(("irpo", "dpo"))]
    means = means[(means.metric == "greedy") & (means.split == "validation")]
    rates = [r for r in (3e-4, 1e-3) if (means.settings.str.endswith(f"learning_rate={r:g}")).any()]
    if not rates:
        return None
    figure, axes = panels(1, len(rates), 4.6 * len(rates) + 1.2, 4.2)
    words, drawn = [], []
    for panel, rate in zip(axes[0], rates, strict=True):
        said = []
        for beta, colour in BETA_COLOURS.items():
            for method, style in (("irpo", "-"), ("dpo", "--")):
                rows = means[
                    (means.method == method)
                    & (means.settings == f"beta={beta:g} learning_rate={rate:g}")
                ]
                if len(rows):
                    label = f"β = {beta:g}" + ("" if method == "irpo" else ", no NLL")
                    said.append(line(panel, rows, label, colour, 100, linestyle=style))
                    drawn.append(rows)
        panel.set_title(f"learning rate {rate:g}", fontsize=10)
        panel.set_ylim(0, 100)
        iterations_axis(panel)
        words.append(f"Learning rate {rate:g}: " + "; ".join(said))
    axes[0][0].set_ylabel("Validation accuracy, greedy (%)")
    axes[0][-1].legend(
        fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3
    )
    figure.alt_text = "Accuracy per iteration by beta. " + ". ".join(words) + "."
    return figure, pd.concat(drawn)


def log_probability_figure(trials: dict[str, dict[int, dict]], shown: list[tuple[str, str]]):
    """Change of chosen and rejected held-out completions: means with bands, and histograms at
    M1."""
    shown = [(title, name) for title, name in shown if name in trials]
    if not shown:
        return None
    figure, axes = panels(2, len(shown), 3.6 * len(shown), 6.4)
    words, rows = [], []
    bins = np.linspace(-8, 8, 33)
    for column, (title, name) in enumerate(shown):
        runs = trials[name]
        for side, colour in (("chosen", plots.BLUE), ("rejected", plots.ORANGE)):
            points = []
            for t in iterations_of(runs):
                change = changes(runs, t, side)
                made = interval_row(change, side, "held-out pairs")
                points.append({"iteration": t, "trial": name, **made})
            frame = pd.DataFrame(points)
            rows.append(frame)
            words.append(f"{title}, {line(axes[0][column], frame, side, colour)}")
            first = np.concatenate([np.array(v) for v in changes(runs, 1, side).values()])
            axes[1][column].hist(
                np.clip(first, bins[0], bins[-1]),
                bins,
                weights=np.full(len(first), 100 / len(first)),
                color=colour,
                alpha=0.5,
                label=side,
            )
            words.append(f"M1 {side} rises for {100 * (first > 0).mean():.0f} %")
        axes[0][column].set_title(title, fontsize=10)
        iterations_axis(axes[0][column])
        axes[1][column].set_xlabel("Change from M0 to M1 (nats)")
        axes[0][column].axhline(0, color="#5F5F5F", linewidth=0.8)
        axes[1][column].axvline(0, color="#5F5F5F", linewidth=0.8)
    low = min(axis.get_ylim()[0] for axis in axes[0])
    high = max(axis.get_ylim()[1] for axis in axes[0])
    for axis in axes[0]:
        axis.set_ylim(low, high)
    axes[0][0].set_ylabel("Change of log-probability from M0 (nats)")
    axes[1][0].set_ylabel("Held-out completions (%)")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.alt_text = "Log-probabilities of held-out pairs. " + "; ".join(words) + "."
    return figure, pd.concat(rows)


def misconception_figure(means: pd.DataFrame, shown: list[tuple[str, str, str]]):
    """How often each misconception is followed where it applies, per iteration."""
    means = means[(means.model == MAIN) & means.metric.str.startswith("follows: ")]
    shown = [
        (title, method, settings)
        for title, method, settings in shown
        if len(means[(means.method == method) & (means.settings == settings)])
    ]
    if not shown:
        return None
    figure, axes = panels(1, len(shown), 3.6 * len(shown) + 2.4, 3.8)
    words, drawn = [], []
    for panel, (title, method, settings) in zip(axes[0], shown, strict=True):
        rows = means[(means.method == method) & (means.settings == settings)]
        drawn.append(rows)
        said = [
            line(panel, rows[rows.metric == f"follows: {name}"], name, colour, 100)
            for name, colour in zip(misconceptions.NAMES, plots.COLOURS, strict=False)
        ]
        panel.set_title(title, fontsize=10)
        panel.set_ylim(0, 65)
        iterations_axis(panel)
        words.append(f"{title}: " + "; ".join(said))
    axes[0][0].set_ylabel("Lines that follow the misconception,\nof those where it applies (%)")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.alt_text = "Misconceptions per iteration. " + ". ".join(words) + "."
    return figure, pd.concat(drawn)


def kl_figure(means: pd.DataFrame, tuned: dict[str, dict]):
    """Validation accuracy against KL from M0 and against optimiser steps, one curve per method."""
    means = means[means.model == MAIN]
    figure, axes = panels(1, 2, 10.4, 4.2)
    words, drawn = [], []
    for method, settings in tuned.items():
        text = " ".join(trial_name(method, settings).split("/")[2:])
        rows = means[(means.method == method) & (means.settings == text)]
        greedy = rows[(rows.metric == "greedy") & (rows.split == "validation")]
        kl = rows[rows.metric == "kl_m0"].set_index("iteration").value
        if greedy.empty or kl.empty:
            continue
        greedy = greedy.sort_values("iteration")
        distance = [0.0 if t == 0 else kl.get(t, math.nan) for t in greedy.iteration]
        label, style = TITLES[method], {"marker": "o", "markersize": 4, "linewidth": 2}
        colour = COLOURS[method]
        axes[0][0].plot(distance, 100 * greedy.value, color=colour, label=label, **style)
        steps = study.STEPS * greedy.iteration
        axes[0][1].plot(steps, 100 * greedy.value, color=colour, label=label, **style)
        drawn.append(greedy.assign(kl_m0=distance))
        words.append(
            f"{label}: "
            + ", ".join(
                f"{100 * value:.1f} % at {far:.2f} nats"
                for value, far in zip(greedy.value, distance, strict=True)
            )
        )
    if not drawn:
        return None
    axes[0][0].set(xlabel="KL from M0 (nats per completion)", ylabel="Validation accuracy (%)")
    axes[0][1].set(xlabel="Optimiser steps")
    axes[0][1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.alt_text = "Accuracy against KL from M0. " + "; ".join(words) + "."
    return figure, pd.concat(drawn)


def map_figure(means: pd.DataFrame, beta: float):
    """Test accuracy of M4 by learning rate and weight of the NLL term at one β."""
    rows = means[(means.model == MAIN) & (means.metric == "greedy") & (means.split == "test")]
    rows = rows[rows.iteration == study.ITERATIONS]
    cells = []
    for rate in study.RATES["irpo"]:
        at = {"beta": beta, "learning_rate": rate}
        trials = {
            "α = 0": ("dpo", at),
            "α = 1": ("irpo", at),
            "RFT": ("rft", {"learning_rate": rate}),
        }
        trials |= {f"α = {alpha:g}": ("irpo", at | {"alpha": alpha}) for alpha in (0.3, 3.0)}
        for row, (method, settings) in trials.items():
            text = " ".join(trial_name(method, settings).split("/")[2:])
            found = rows[(rows.method == method) & (rows.settings == text)]
            cells.append(found.assign(row=row, column=rate))
    data = pd.concat(cells)
    if data.groupby("row").size().max() < 2 or data.row.nunique() < 5:
        return None
    return drawings.nll_map(data, f"$M_{study.ITERATIONS}$, β = {beta:g}"), data


def long_figure(means: pd.DataFrame, tuned: dict[str, dict]):
    """Test accuracy over eight iterations, one line per method."""
    rows = means[(means.model == MAIN) & (means.metric == "greedy") & (means.split == "test")]
    figure, axes = panels(1, 1, 7.0, 4.0)
    words, drawn = [], []
    for method in ("irpo", "rft", "dpo"):
        text = " ".join(trial_name(method, tuned[method] | {"iterations": 8}).split("/")[2:])
        found = rows[(rows.method == method) & (rows.settings == text)]
        if len(found):
            words.append(line(axes[0][0], found, TITLES[method], COLOURS[method], 100))
            drawn.append(found)
    if not drawn:
        return None
    axes[0][0].set_ylabel("Test accuracy, greedy (%)")
    iterations_axis(axes[0][0])
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.alt_text = "Accuracy over eight iterations. " + "; ".join(words) + "."
    return figure, pd.concat(drawn)


def figures(records: dict, means: pd.DataFrame) -> dict:
    """Name -> (figure, data) of every figure whose runs are there."""
    trials = by_trial(records)
    settings = {method: settings_of(method, records) for method in TITLES}
    at = {"beta": 1.0, "learning_rate": 3e-4}
    far = {"beta": 0.1, "learning_rate": 1e-3}
    shown = [
        ("Iterative RPO, β = 1, 3e-4", trial_name("irpo", at)),
        ("DPO without NLL, β = 1, 3e-4", trial_name("dpo", at)),
        ("Iterative RPO, β = 0.1, 1e-3", trial_name("irpo", far)),
        ("DPO without NLL, β = 0.1, 1e-3", trial_name("dpo", far)),
        ("Rejection-sampling SFT, 3e-4", trial_name("rft", {"learning_rate": 3e-4})),
    ]
    by_method = [
        (TITLES[method], method, " ".join(trial_name(method, settings[method]).split("/")[2:]))
        for method in ("irpo", "rft")
    ]
    made = {
        "lesson_beta": beta_figure(means, MAIN),
        "lesson_beta_hasty": beta_figure(means, "hasty"),
        "lesson_beta_plain": beta_figure(means, "plain"),
        "lesson_log_probabilities": log_probability_figure(trials, shown),
        "lesson_misconceptions": misconception_figure(means, by_method),
        "lesson_kl": kl_figure(means, settings),
        "lesson_map": map_figure(means, settings["irpo"]["beta"]),
        "lesson_long": long_figure(means, settings),
    }
    return {name: both for name, both in made.items() if both is not None}


def main(arguments: list[str] | None = None) -> None:
    """Write all tables and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args(arguments)
    records = study.load_records()
    if not records:
        raise SystemExit("error: no finished runs; run scripts/lesson_study.py first")
    trials = by_trial(records)
    means = mean_table(trials)
    means.to_csv(args.out / "lesson_mean.csv", index=False, float_format="%.5g")
    results = results_table(records)
    results.to_csv(args.out / "lesson_results.csv", index=False, float_format="%.4f")
    verdicts = verdict_table(records)
    verdicts.to_csv(args.out / "lesson_verdicts.csv", index=False, float_format="%.4f")
    pairs = [json.loads(line) for line in study.PAIRS_FILE.read_text().splitlines()]
    pair_table(pairs).to_csv(args.out / "lesson_pairs.csv", index=False, float_format="%.1f")
    rules = stopping.scores(stopping.finished_runs(args.out))
    rules.to_csv(args.out / "lesson_rules.csv", index=False, float_format="%.4f")
    environment = next(iter(records.values()))["environment"]
    for name, (figure, data) in figures(records, means).items():
        record = {
            "command": "python scripts/lesson_report.py",
            "runs": len(records),
            "seconds": round(sum(record["seconds"] for record in records.values())),
            "commits": sorted({record["environment"]["commit"] for record in records.values()}),
            "environment": environment,
        }
        plots.save(figure, args.out, name, data, record)
    with pd.option_context(
        "display.width", 200, "display.max_rows", 500, "display.max_colwidth", 90
    ):
        print(results.to_string(index=False))
        print(verdicts[["claim", "points", "low", "high", "seeds", "paper", "verdict"]].to_string())
        print(rules.to_string(index=False))


if __name__ == "__main__":
    main()
