"""Figures of training, comparisons, ablations and benchmarks, in the style of `irpo_utils.plots`.

A metrics table in, a `TextFigure` out; `UserError` for a table without what a figure draws.
"""

from __future__ import annotations

import textwrap
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from irpo_utils import UserError, plots
from irpo_utils.plots import BLUE, COLOURS, GREY, INK, ORANGE, PAPER, PERCENT, TextFigure
from studies.significance import t_quantile

CHOSEN, REJECTED = "logps/chosen", "logps/rejected"
LABELS = {"majority": "majority of {k}", "pass_at_k": "pass@{k}"}
COSTS = {  # column: what the axis divides it by, and its label
    "tokens": (1e6, "Sampled tokens (millions)"),
    "seconds": (60.0, "Wall-clock time (minutes)"),
}


def summarise(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per number of a table with several seeds: mean, 95 % interval, `n`, `seeds`.

    The half-width of the interval adds the spread between seeds (Student's t) and the mean
    half-width of the seeds' own intervals (questions) in quadrature, which is rather wide. If you
    have the completions, use `significance.seed_and_question_interval`.
    """
    table = metrics.astype({"low": float, "high": float})
    groups = table.groupby(metric_keys(table), sort=False, dropna=False)
    means = groups[["value", "low", "high", "n"]].mean()
    means["seeds"] = groups.size()
    between = groups["value"].sem() * [t_quantile(n - 1) if n > 1 else 0 for n in means.seeds]
    fraction = means.index.get_level_values("metric").map(_is_fraction)
    for side, sign in (("low", -1), ("high", 1)):
        own = (means[side] - means.value).abs()
        half_width = own.where(means.seeds == 1, np.hypot(between, own.fillna(0)))
        limit = means.value + sign * half_width
        means[side] = limit.where(~fraction, limit.clip(0, 1))
    return means.reset_index()


def metric_keys(metrics: pd.DataFrame) -> list[str]:
    """The columns of the table that tell one number from another, seeds aside."""
    return [name for name in ("method", "iteration", "split", "metric", "k") if name in metrics]


def accuracy_of_seeds(metrics: pd.DataFrame, means: pd.DataFrame | None = None) -> TextFigure:
    """`plots.accuracy_per_iteration` of the means over seeds, with the seeds as thin lines.

    `means`: rows as `finished_runs.collect` makes them; a metric that is not among them has no
    interval. By default the means of `summarise`.
    """
    if means is None:
        means = summarise(metrics)
    others = metrics[~metrics.metric.isin(means.metric)].groupby(metric_keys(metrics))
    table = pd.concat([means, others[["value", "n"]].mean().reset_index()])
    figure = plots.accuracy_per_iteration(table)
    [axes] = figure.axes
    for metric, _, colour in plots.ACCURACY_LINES:
        for k in plots.common_ks(table, metric)[-1:]:
            rows = metrics[(metrics.metric == metric) & (metrics.k == k)].sort_values("iteration")
            for seed, run in rows.groupby("seed"):
                thin = {"color": colour, "linewidth": 0.7, "alpha": 0.45}
                axes.plot(run.iteration, 100 * run.value, label=f"_seed {seed}", **thin)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.02 * axes.dataLim.y1))
    return figure


def of_two_learning_rates(folder: Path) -> pd.DataFrame:
    """Greedy accuracy of Iterative RPO with the default profile at two learning rates, M_0 to M_4.

    Means and intervals over five seeds from the result files in `folder`.
    """
    files = {"2e-5": "accuracy_per_iteration_mean.csv", "1e-4": "comparison_mean.csv"}
    tables = []
    for rate, file in files.items():
        table = pd.read_csv(folder / file).query("metric == 'greedy' and method == 'irpo'")
        tables.append(table[table.iteration <= 4].assign(learning_rate=rate))
    columns = ["learning_rate", "iteration", "split", "metric", "k", "value", "low", "high"]
    return pd.concat(tables).sort_values("iteration", kind="stable")[[*columns, "n", "seeds"]]


def accuracy_at_rates(means: pd.DataFrame) -> TextFigure:
    """Greedy accuracy per iteration, a line per learning rate; rows of `of_two_learning_rates`."""
    figure, axes = plots.new_figure(7, 3.6)
    lines = []
    for (rate, rows), colour in zip(means.groupby("learning_rate", sort=False), COLOURS):
        band = 100 * rows.low, 100 * rows.high
        label = f"learning rate {rate}"
        lines.append(plots.draw_points(axes, rows.iteration, 100 * rows.value, label, colour, band))
    [seeds] = set(means.seeds)
    axes.set(xlabel="Iteration t (model $M_t$)", ylabel="Greedy accuracy (%)", ylim=(0, 104))
    axes.set_xticks(sorted(set(means.iteration)))
    title = f"Accuracy per iteration, {seeds} seeds"
    return plots.finish(figure, title, {"accuracy in %": lines})


def accuracy_of_methods(means: pd.DataFrame) -> TextFigure:
    """Greedy and sampled accuracy per iteration, a line per method with its 95 % intervals.

    `means`: rows as `report.means` makes them, with the titles of the methods as `method`. The
    legend gives the number of `seeds` where there is such a column.
    """
    if means.empty or not {"greedy", "sampled"} <= set(means.metric):
        raise UserError("accuracy_of_methods needs the metrics greedy and sampled.")
    figure, both = plots.new_figure(9.6, 3.9, panels=2)
    panels, methods = {}, list(means.method.unique())
    for axes, metric in zip(both, ("greedy", "sampled"), strict=True):
        name = f"{metric.capitalize()} accuracy"
        panels[name] = []
        for i, (method, colour) in enumerate(zip(methods, cycle(COLOURS), strict=False)):
            rows = means[(means.metric == metric) & (means.method == method)]
            x = rows.iteration + 0.07 * (i - (len(methods) - 1) / 2)  # intervals side by side
            value, low, high = (100 * rows[column] for column in ("value", "low", "high"))
            axes.errorbar(x, value, (value - low, high - value), fmt="none", color=colour)
            label = method
            if "seeds" in rows:
                seeds = int(rows.seeds.max())
                label += f" ({seeds} seed{'s' if seeds > 1 else ''})"
            line = plots.draw_points(axes, x, value, label, colour)
            each = [
                f"M_{r.iteration} {plots.number_with_interval(r, 100)}" for _, r in rows.iterrows()
            ]
            panels[name].append(line._replace(numbers=", ".join(each)))
        plots.label_iterations(axes, "Accuracy (%)", PERCENT)
        axes.set_title(name, fontsize=10)
    figure = plots.finish(figure, "Accuracy per iteration (%)", panels)
    figure.axes[0].get_legend().remove()  # the second panel has the same lines
    return figure


def warning_numbers(metrics: pd.DataFrame) -> TextFigure:
    """Early signs of a collapse: KL(M_t || M_{t-1}) and log-probabilities of chosen completions."""
    chosen = [
        ("chosen_logp_per_token", None, "after training", BLUE),
        ("chosen_logp_per_token_before", None, "before", GREY),
    ]
    kl = [("kl_to_previous", None, "", BLUE)]
    panels = {
        "KL to the previous model": ("Nats per completion", (0, None), kl),
        "log-probability of chosen": ("Nats per token", (None, None), chosen),
    }
    return _over_iterations(summarise(metrics), "Warning numbers per iteration (nats)", panels)


def diversity(metrics: pd.DataFrame) -> TextFigure:
    """pass@k for every k that all iterations have, and distinct answers in k completions."""
    ks = plots.common_ks(metrics, "pass_at_k", needed=True)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.75, len(ks)))  # none too light
    solved = [("pass_at_k", k, f"pass@{k}", shade) for k, shade in zip(ks, shades, strict=True)]
    distinct = [("distinct_answers", None, "in {k} completions", BLUE)]
    panels = {
        "questions solved by one of k": ("Questions (%)", PERCENT, solved),
        "distinct answers": ("Answers per question", (0, None), distinct),
    }
    return _over_iterations(summarise(metrics), "Diversity per iteration", panels)


def _over_iterations(metrics: pd.DataFrame, title: str, panels: dict[str, tuple]) -> TextFigure:
    """A figure over iterations; raises `UserError` for a table without the first line of a panel.

    `panels`: title -> (y label, y limits, lines). A line is (metric, k, label, colour). With None
    for k it has the largest k that all iterations have; there may be none, except for the first
    line. With limits `PERCENT` values are fractions.
    """
    figure, _ = plots.new_figure(3.6 + 3 * len(panels), 3.9, panels=len(panels))
    drawn = {}
    for axes, (name, (ylabel, ylim, lines)) in zip(figure.axes, panels.items(), strict=True):
        drawn[name] = []
        for metric, k, label, colour in lines:
            if k is None and (ks := plots.common_ks(metrics, metric, needed=not drawn[name])):
                k = ks[-1]
            if k is not None:
                rows = metrics[(metrics.metric == metric) & (metrics.k == k)]
                scale = 100 if ylim == PERCENT else 1
                line = plots.draw_metric(axes, rows, scale, label.format(k=k), colour)
                drawn[name].append(line)
        plots.label_iterations(axes, ylabel, ylim)
        axes.set_title(name[:1].upper() + name[1:], fontsize=10)
    return plots.finish(figure, title, drawn)


def training_curves(logs: dict[str, pd.DataFrame]) -> TextFigure:
    """Log-probabilities of chosen and rejected over steps, and their difference (figures 2 to 4).

    `logs`: name of a run -> table with `step`, `logps/chosen` and `logps/rejected` (sums over a
    completion, nats), such as training_log.jsonl; each run gets a panel.
    """
    needed = {"step", CHOSEN, REJECTED}
    if not logs or not all(needed <= set(log) for log in logs.values()):
        raise UserError(f"training_curves needs a log with step, {CHOSEN} and {REJECTED}.")
    figure, (first, *others) = plots.new_figure(3.1 * len(logs) + 3.7, 3.6, panels=len(logs) + 1)
    panels, differences = {}, []
    for axes, colour, (name, log) in zip(figure.axes, cycle(COLOURS), logs.items(), strict=False):
        step, chosen, rejected = log["step"], log[CHOSEN], log[REJECTED]
        dashed = plots.draw_line(axes, step, rejected, "rejected", ORANGE, linestyle="--")
        panels[name] = [plots.draw_line(axes, step, chosen, "chosen", BLUE), dashed]
        differences.append(plots.draw_line(others[-1], step, chosen - rejected, name, colour))
    for axes in others[:-1]:
        axes.sharey(first)
    panels["chosen − rejected"] = differences
    for axes, name in zip(figure.axes, panels, strict=True):
        axes.set(title=textwrap.fill(name, 22, break_on_hyphens=False), xlabel="Optimiser step")
    first.set_ylabel("Log-probability of a completion (nats)")
    others[-1].set_ylabel("Difference (nats)")
    return plots.finish(figure, "Log-probabilities in training (nats), first and last step", panels)


def sweep(metrics: pd.DataFrame, x: str, xlabel: str, ylabel: str = "Share (%)") -> TextFigure:
    """Fractions (`value`, perhaps `low`, `high`) in % over the column `x`, a line per `metric`."""
    if metrics.empty or not {"metric", "value", x} <= set(metrics):
        raise UserError(f"sweep needs a table with metric, value and {x}.")
    figure, axes = plots.new_figure(6.6, 4.0)
    lines = []
    styles = zip(COLOURS, cycle(("-", "--", ":")), strict=False)
    for (colour, dashes), (name, rows) in zip(
        styles, metrics.groupby("metric", sort=False), strict=False
    ):
        rows = rows.sort_values(x)
        band = [100 * rows[side] for side in ("low", "high") if side in rows]
        lines.append(
            plots.draw_points(
                axes, rows[x], 100 * rows["value"], name, colour, band, linestyle=dashes
            )
        )
    axes.set_xticks(sorted(set(metrics[x])))
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=PERCENT)
    return plots.finish(figure, f"{ylabel} by {xlabel[0].lower()}{xlabel[1:]}", {"": lines})


def dot_plot(comparison: pd.DataFrame) -> TextFigure:
    """Accuracy by method with 95 % intervals, best on top, seeds as small dots (tables 1 and 2).

    One row per method, iteration, metric and k of the table: select what is to be compared. Rows
    with fewer seeds than others are below them, because means over other seeds have no rank there.
    """
    keys = metric_keys(comparison)
    groups = [group for _, group in comparison.groupby(keys, sort=False, dropna=False)]
    groups.sort(key=lambda group: (len(group), group["value"].mean()))
    figure, axes = plots.new_figure(7.4, 1.1 + 0.36 * len(groups))
    labels = [_row_label(group.iloc[0], comparison) for group in groups]
    most = max(map(len, groups))
    for i, group in enumerate(groups):
        if len(group) < most:
            labels[i] += f" ({len(group)} {'seed' if len(group) == 1 else 'seeds'})"
    descriptions = []
    for y, (label, group) in enumerate(zip(labels, groups, strict=True)):
        row = summarise(group).iloc[0]
        colour = BLUE if str(row.get("method")).startswith(("irpo", "Iterative RPO")) else GREY
        _draw_dot(axes, y, 100 * row[["value", "low", "high"]], colour, label)
        seeds = 100 * group["value"]
        below = [y - 0.22] * len(seeds)
        axes.plot(seeds, below, ".", color=colour, markersize=4, label=f"_seeds {label}")
        _annotate_right(axes, y, f"{100 * row['value']:.1f}")
        descriptions.append(f"{label} {plots.number_with_interval(row, 100)}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlim=(0, 100), ylim=(-0.6, len(labels) - 0.4), ylabel="Method")
    axes.set_xlabel("Accuracy (%), 95 % interval\nsmall dots: seeds")
    text = "; ".join(reversed(descriptions))
    figure.alt_text = f"Accuracy by method (%, with 95 % interval). {text}."
    return figure


def differences(means: pd.DataFrame, labels: list[str]) -> TextFigure:
    """Differences in accuracy from another trial on the same questions, with 95 % intervals.

    `means`: rows with `difference`, `difference_low`, `difference_high` (fractions of 1), the first
    one on top; `labels`: a name for each. Intervals that include zero are grey.
    """
    columns = ["difference", "difference_low", "difference_high"]
    if means.empty or not set(columns) <= set(means) or len(labels) != len(means):
        raise UserError(f"differences needs rows with {', '.join(columns)}, and a label for each.")
    figure, axes = plots.new_figure(7.4, 1.1 + 0.32 * len(means))
    descriptions, heights = [], range(len(means) - 1, -1, -1)
    for y, label, numbers in zip(heights, labels, 100 * means[columns].to_numpy(), strict=True):
        value, low, high = numbers
        clear = BLUE if value > 0 else ORANGE
        _draw_dot(axes, y, numbers, GREY if low <= 0 <= high else clear, label)
        _annotate_right(axes, y, f"{value:+.1f}")
        descriptions.append(f"{label} {value:+.1f} ({low:+.1f} to {high:+.1f})")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(list(heights), labels)
    axes.set(ylim=(-0.6, len(means) - 0.4), ylabel="Variant")
    axes.set_xlabel("Difference in accuracy (points), 95 % interval\ngrey: the interval includes 0")
    text = "; ".join(descriptions)
    figure.alt_text = f"Differences in accuracy (points, with 95 % interval). {text}."
    return figure


def accuracy_against_cost(
    comparison: pd.DataFrame, metric: str = "greedy", x: str = "tokens"
) -> TextFigure:
    """Accuracy of every method over its cost since M_0: the column `tokens` (sampled) or `seconds`.

    A line per method, a point per iteration, means over seeds.
    """
    rows = comparison[comparison.metric == metric]
    if rows.empty or x not in rows or x not in COSTS:
        raise UserError(f"The table has no metric {metric} with a column {x}.")
    unit, title = COSTS[x]
    figure, axes = plots.new_figure(7.2, 4.4)
    lines = []
    for i, (method, group) in enumerate(rows.groupby("method", sort=False)):
        means = group.groupby("iteration")[[x, "value"]].mean()
        colour, linestyle = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        cost, accuracy, label = means[x] / unit, 100 * means["value"], method.replace("_", " ")
        lines.append(plots.draw_points(axes, cost, accuracy, label, colour, linestyle=linestyle))
    name = f"{metric.capitalize()} accuracy (%)"
    axes.set(xlabel=title, ylabel=name, xlim=(0, None), ylim=(0, 100))
    return plots.finish(figure, f"{name} by {title.lower()}", {"": lines})


def heat_map(stability: pd.DataFrame, metric: str = "greedy", fall: float = 0.03) -> TextFigure:
    """Accuracy after the last iteration by learning rate and alpha, framed where it is stable.

    `stability`: metrics table with `learning_rate` and `alpha`; a cell is the mean over seeds.
    Stable: in no seed is the last iteration more than `fall` (fraction of 1) below the best one
    before it. A run that stopped early is not stable, and counts with its last accuracy.
    """
    rows = stability[stability.metric == metric]
    if rows.empty or not {"learning_rate", "alpha", "seed"} <= set(rows):
        raise UserError(f"heat_map needs the metric {metric} with learning_rate, alpha and seed.")
    index = ["alpha", "learning_rate", "seed"]
    runs = rows.pivot_table(index=index, columns="iteration", values="value")
    cells = ["alpha", "learning_rate"]
    falls = (runs.iloc[:, :-1].max(axis=1) - runs.iloc[:, -1]).fillna(1.0).groupby(cells).max()
    grid = 100 * runs.ffill(axis=1).iloc[:, -1].groupby(cells).mean().unstack()
    figure, axes = plots.new_figure(2.2 + 0.95 * grid.shape[1], 1.5 + 0.62 * grid.shape[0])
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto")
    descriptions = []
    for (alpha, rate), value in grid.stack().dropna().items():
        x, y = grid.columns.get_loc(rate), grid.index.get_loc(alpha)
        colour = INK if value > 47 else PAPER  # the dark half of the colour map needs light text
        axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour)
        stable = falls[alpha, rate] <= fall
        if stable:
            frame = {"fill": False, "linewidth": 2.5, "edgecolor": ORANGE}
            axes.add_patch(Rectangle((x - 0.44, y - 0.42), 0.88, 0.84, **frame))
        cell = f"alpha {alpha:g}, learning rate {_scientific(rate)}: {value:.1f}"
        descriptions.append(cell + (", stable" if stable else ""))
    axes.set_xticks(range(grid.shape[1]), [_scientific(rate) for rate in grid.columns])
    axes.set_yticks(range(grid.shape[0]), [f"{alpha:g}" for alpha in grid.index])
    axes.grid(False)
    model = f"M_{{{runs.columns[-1]}}}"
    axes.set_title(f"${model}$; framed: no fall over {100 * fall:g} points", fontsize=10)
    axes.set(xlabel="Learning rate", ylabel="α, weight of the NLL term")
    name = f"{metric.capitalize()} accuracy (%)"
    figure.colorbar(image, ax=axes).set_label(name, color=INK)
    figure.alt_text = f"{name} of M_{runs.columns[-1]}. {'; '.join(descriptions)}."
    return figure


def nll_map(cells: pd.DataFrame, title: str) -> TextFigure:
    """Accuracy (%) by learning rate and weight of the NLL term, with the number of seeds.

    `cells`: `row` (the weight as text; the first one at the bottom, RFT on top), `column` (the
    learning rate), `value` (fraction of 1) and `seeds`. A cell may be missing.
    """
    weights = sorted(set(cells.row) - {"RFT"}, key=lambda name: float(name.split("=")[-1]))
    rows, columns = [*weights, "RFT"], sorted(set(cells.column))
    table = cells.set_index(["row", "column"])
    grid = 100 * table.value.unstack().reindex(index=rows, columns=columns)
    figure, axes = plots.new_figure(2.6 + 1.2 * len(columns), 1.4 + 0.6 * len(rows))
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto")
    spoken = []
    for (row, column), value, count in zip(
        table.index, 100 * table.value, table.seeds, strict=True
    ):
        x, y = columns.index(column), rows.index(row)
        colour = INK if value > 47 else PAPER  # the dark half of the colours needs light text
        counted = f"{count} seed" if count == 1 else f"{count} seeds"
        style = {"ha": "center", "va": "center", "color": colour}
        axes.text(x, y + 0.1, f"{value:.0f}", **style)
        axes.text(x, y - 0.25, counted, fontsize=7, **style)
        spoken.append(f"{row} at {column:g}: {value:.1f} ({counted})")
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    axes.set(xlabel="Learning rate", title=title)
    figure.colorbar(image, ax=axes).set_label("Accuracy (%)", color=INK)
    figure.alt_text = (
        f"Accuracy (%) by learning rate and weight of the NLL term. {'; '.join(spoken)}."
    )
    return figure


def scaling(table: pd.DataFrame) -> TextFigure:
    """Time and memory of sampling over N, questions and model size, relative to the smallest point.

    Columns `axis`, `x`, `parameters`, `seconds`, `peak_mb`; dashed: growth in proportion.
    """
    columns = ["axis", "x", "parameters", "seconds", "peak_mb"]
    if table.empty or not set(columns) <= set(table):
        raise UserError(f"scaling needs a table with {', '.join(columns)}.")
    names = {
        "n": "Samples per question (N)",
        "questions": "Questions",
        "hidden": "Parameters (millions)",
    }
    figure, panels = plots.new_figure(9.6, 3.6, panels=len(names))
    drawn = {}
    for axes, (axis, title) in zip(panels, names.items(), strict=True):
        rows = table[table.axis == axis].sort_values("x")
        x = rows.parameters / 1e6 if axis == "hidden" else rows.x
        axes.plot(x, x / x.iloc[0], color=GREY, linewidth=1, linestyle="--", label="_proportional")
        time, memory = (rows[name] / rows[name].iloc[0] for name in ("seconds", "peak_mb"))
        drawn[title] = [
            plots.draw_points(axes, x, time, "time", BLUE),
            plots.draw_points(axes, x, memory, "memory", ORANGE),
        ]
        axes.set(xlabel=title, xscale="log", yscale="log")
        axes.set_xticks(list(x), [f"{at:.2g}" if axis == "hidden" else f"{at:g}" for at in x])
        axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
    panels[0].set_ylabel("Multiple of the smallest point")
    return plots.finish(figure, "Cost of sampling as the work grows", drawn)


def _is_fraction(metric: str) -> bool:
    fractions = ("greedy", "sampled", "majority", "pass_at_k")
    return metric in fractions or "_steps_" in metric or metric.endswith(("_rate", "_skeleton"))


def _draw_dot(axes, y: float, numbers, colour: str, label: str) -> None:
    """A dot at a value with a line for its interval; `numbers`: (value, low, high)."""
    value, low, high = numbers
    axes.plot([low, high], [y, y], color=colour, linewidth=2, label=f"_interval {label}")
    axes.plot(value, y, "o", color=colour, markersize=7, label=label)


def _annotate_right(axes, y: float, text: str) -> None:
    plots.annotate(axes, text, (1, y), xycoords=("axes fraction", "data"))


def _row_label(row, table: pd.DataFrame) -> str:
    """The method, with iteration, metric and k where the table has several of the method."""
    same = table[table.method == row["method"]]
    label = str(row["method"]).replace("_", " ")
    if same.iteration.nunique() > 1:
        label += f", iteration {row['iteration']}"
    if table.metric.nunique() > 1 or same.k.nunique() > 1:
        label += f", {LABELS.get(row['metric'], row['metric']).format(k=row['k'])}"
    return label


def _scientific(x: float) -> str:
    return np.format_float_scientific(x, trim="-", exp_digits=1)
