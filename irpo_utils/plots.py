"""A result in, a matplotlib figure out. Tables are pandas with the columns of the metrics table unless told otherwise.

Every function returns a `TextFigure`: a notebook shows it once (pyplot knows nothing of it), and `alt_text` describes
it with its numbers. `save` writes a figure beside its numbers and what made them. All raise `UserError` for a table
without what they draw. The background is opaque, so that pages in dark and light themes show the same figure. Colours
are Okabe and Ito's, which people with any colour vision tell apart, and lines are named where they end.
"""

from __future__ import annotations

import json
import math
import os
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from irpo_utils import UserError
from irpo_utils.ops.statistics import t_quantile

BLUE, ORANGE, GREEN, PINK, SKY, BROWN, GREY = CYCLE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#8A6A00",
    "#5F5F5F",
)
INK, PAPER = "#000000", "#FFFFFF"
LOW = 40  # %: below this an axis to 100 would leave most of the figure empty
NAMES = {
    "majority": "majority of {k}",
    "pass_at_k": "pass@{k}",
    "distinct_answers": "among {k}",
    "mean_tokens": "sampled",
    "greedy_mean_tokens": "greedy",
}


class TextFigure(Figure):
    """A figure with a text for those who cannot see it; notebooks show it as a PNG with that text as its `alt`."""

    alt_text: str = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": _png(self, dpi=110)}, {"image/png": {"alt": self.alt_text}}


class Line(NamedTuple):
    """A line that was drawn: its points in the units of the axis, its name and colour, and its numbers in words."""

    x: np.ndarray
    y: np.ndarray
    label: str
    colour: str
    words: str = ""


def summarise(metrics: pd.DataFrame) -> pd.DataFrame:
    """A metrics table of several seeds -> one row per number: mean over seeds, 95 % interval, `n`, `seeds`.

    The interval adds the spread between seeds (Student's t) and the seeds' own intervals (questions) in quadrature. It
    errs on the wide side: where the completions are at hand take `evaluation.seed_and_question_interval`. With one
    seed it is that seed's own.
    """
    rows = []
    for _, group in metrics.groupby(_keys(metrics), sort=False, dropna=False):
        first, value, n = group.iloc[0], group["value"].mean(), len(group)
        between = t_quantile(n - 1) * group["value"].std() / math.sqrt(n) if n > 1 else math.nan
        own = [
            (group[side].astype(float) - group["value"]).abs().mean() for side in ("low", "high")
        ]
        down, up = (half if n == 1 else math.hypot(between, np.nan_to_num(half)) for half in own)
        bounds = (0, 1) if _is_fraction(first["metric"]) else (-np.inf, np.inf)
        low, high = np.clip([value - down, value + up], *bounds)
        rows.append(
            {
                **first[_keys(metrics)],
                "value": value,
                "low": low,
                "high": high,
                "n": first.get("n"),
                "seeds": n,
            }
        )
    return pd.DataFrame(rows)


def accuracy_per_iteration(
    metrics: pd.DataFrame, intervals: pd.DataFrame | None = None
) -> TextFigure:
    """Greedy, majority (if all iterations have it at one k) and sampled accuracy of M_0..M_T: mean with 95 % interval,
    single seeds thin.

    `intervals`: means with `low` and `high` by `metric` and `iteration`, in place of `summarise`'s wider ones. The axis goes
    to 100 %, or a little above the data where these stay under `LOW`.
    """
    figure, axes = _figure(6.6, 4.2)
    lines = [
        _line(axes, metrics, m, colour, intervals)
        for m, colour in (("greedy", BLUE), ("majority", GREEN), ("sampled", ORANGE))
        if m != "majority" or _shared_ks(metrics, m)
    ]
    of = (
        f"{metrics.loc[metrics.metric == 'greedy', 'n'].max():.0f} questions"
        if "n" in metrics
        else "questions"
    )
    _iterations(axes, f"Right answers (% of {of})", percent=True)
    if axes.dataLim.y1 < LOW:
        axes.set_ylim(
            0, max(1.25 * axes.dataLim.y1, LOW / 2)
        )  # nor should a hundredth look like much
    return _finish(figure, f"Right answers per iteration (% of {of})", [lines])


def accuracy_by_steps(metrics: pd.DataFrame) -> TextFigure:
    """Greedy accuracy of questions with 2, 3, ... steps of working, per iteration (metrics `greedy_steps_2`, ...)."""
    names = sorted(
        {m for m in metrics.metric if m.startswith("greedy_steps_")},
        key=lambda m: int(m.split("_")[-1]),
    )
    if not names:
        raise UserError(
            "There is no metric greedy_steps_... in this table: the questions had no column `steps`."
        )
    figure, axes = _figure(6.6, 4.2)
    lines = [
        _line(axes, metrics, name, colour, label=f"{name.split('_')[-1]} steps", seeds=False)
        for name, colour in zip(names, _shades(len(names)))
    ]
    _iterations(axes, "Right answers, greedy (%)", percent=True)
    return _finish(figure, "Right answers, greedy, by steps of working and iteration (%)", [lines])


def lengths_per_iteration(metrics: pd.DataFrame) -> TextFigure:
    """Mean length of greedy and of sampled completions per iteration, in tokens."""
    figure, axes = _figure(6.6, 3.6)
    lines = [
        _line(axes, metrics, m, colour)
        for m, colour in (("greedy_mean_tokens", BLUE), ("mean_tokens", ORANGE))
        if m == "mean_tokens" or _has(metrics, m)
    ]
    _iterations(axes, "Length (tokens per completion)")
    axes.set_ylim(bottom=0)
    return _finish(figure, "Mean length per iteration (tokens per completion)", [lines])


def warning_numbers(metrics: pd.DataFrame) -> TextFigure:
    """What announces a collapse: KL(M_t || M_{t-1}), and the winners' log-probability per token before and after."""
    figure, (left, right) = _figure(9.6, 3.6, 2)
    moved = [_line(left, metrics, "kl_to_previous", BLUE, label="")]
    _iterations(left, "KL to the model before\n(nats per completion)")
    left.set_ylim(bottom=0)
    winners = [
        _line(right, metrics, m, colour, label=label)
        for m, colour, label in (
            ("chosen_logp_per_token", BLUE, "after training"),
            ("chosen_logp_per_token_before", GREY, "before"),
        )
        if not label == "before" or _has(metrics, m)
    ]
    _iterations(right, "Winners' log-probability\n(nats per token)")
    return _finish(
        figure,
        "Warning numbers per iteration",
        [moved, winners],
        [
            "KL to the model before (nats per completion)",
            "winners' log-probability (nats per token)",
        ],
    )


def diversity(metrics: pd.DataFrame) -> TextFigure:
    """pass@k for every k that all iterations have, and distinct answers among k samples, per iteration."""
    figure, (left, right) = _figure(9.6, 3.8, 2)
    ks = _common_ks(metrics, "pass_at_k")
    chances = [
        _line(left, metrics, "pass_at_k", colour, k=k, seeds=False)
        for k, colour in zip(ks, _shades(len(ks)))
    ]
    _iterations(left, "Questions solved by one of k (%)", percent=True)
    distinct = [_line(right, metrics, "distinct_answers", BLUE)]
    _iterations(right, "Distinct answers per question")
    right.set_ylim(bottom=0)
    return _finish(
        figure,
        "Diversity per iteration",
        [chances, distinct],
        ["questions (%)", "distinct answers"],
    )


def training_curves(logs: dict[str, pd.DataFrame], window: int = 1) -> TextFigure:
    """Log-probabilities of chosen and rejected over steps, one panel a run, and their gap (the paper's figures 2-4).

    `logs`: run name -> table with `step`, `logps_chosen`, `logps_rejected` (sums over a response, nats), such as
    `training_log.jsonl` or a probe's log. `window`: running mean over that many rows, with the rows as a shade.
    """
    if not logs or any(
        not {"step", "logps_chosen", "logps_rejected"} <= set(log) for log in logs.values()
    ):
        raise UserError(
            "training_curves needs at least one log, with step, logps_chosen and logps_rejected."
        )
    figure, axes = _figure(3.1 * (len(logs) + 1) + 0.6, 3.6, len(logs) + 1)
    panels = []
    for panel, (name, log) in zip(axes, logs.items()):
        if panels:
            panel.sharey(axes[0])
        panels.append(
            [
                _curve(
                    panel, log["step"], log[f"logps_{side}"], side, colour, window, linestyle=style
                )
                for side, colour, style in (("chosen", BLUE, "-"), ("rejected", ORANGE, "--"))
            ]
        )
    panels.append(
        [
            _curve(
                axes[-1],
                log["step"],
                log["logps_chosen"] - log["logps_rejected"],
                name,
                colour,
                window,
            )
            for (name, log), colour in zip(logs.items(), CYCLE)
        ]
    )
    for panel, title in zip(axes, [*logs, "chosen − rejected"]):
        panel.set(title=title, xlabel="Optimiser step")
    axes[0].set_ylabel("Log-probability of a response (nats)")
    axes[-1].set_ylabel("Gap (nats)")
    return _finish(
        figure,
        "Log-probabilities in training (nats), first and last step",
        panels,
        [*logs, "chosen − rejected"],
    )


def dot_plot(comparison: pd.DataFrame) -> TextFigure:
    """Methods as dots with 95 % intervals, best on top, seeds as small dots: the paper's tables 1 and 2 as a figure.

    One line per method, iteration, metric and k of the table: leave in it what is to be compared.
    """
    groups = [group for _, group in comparison.groupby(_keys(comparison), sort=False, dropna=False)]
    groups = sorted(groups, key=lambda group: group["value"].mean())
    figure, axes = _figure(7.4, 1.1 + 0.36 * len(groups))
    labels, words = [_row_name(group.iloc[0], comparison) for group in groups], []
    for y, (label, group) in enumerate(zip(labels, groups)):
        row = summarise(group).iloc[0]
        colour = BLUE if str(row.get("method")).startswith(("irpo", "Iterative RPO")) else GREY
        axes.plot(
            [100 * row["low"], 100 * row["high"]],
            [y, y],
            color=colour,
            linewidth=2,
            label=f"_interval {label}",
        )
        axes.plot(
            100 * group["value"],
            [y - 0.22] * len(group),
            ".",
            color=colour,
            ms=4,
            label=f"_seeds {label}",
        )
        axes.plot(100 * row["value"], y, "o", color=colour, markersize=7, label=label)
        axes.annotate(
            f"{100 * row['value']:.1f}",
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
        words.append(f"{label} {_number(row, 100)}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(
        xlim=(0, 100),
        ylim=(-0.6, len(labels) - 0.4),
        ylabel="Method",
        xlabel="Right answers (%). Line: 95 % interval; small dots: seeds",
    )
    figure.alt_text = f"Right answers by method (%, with 95 % interval). {'; '.join(words[::-1])}."
    return figure


def differences(means: pd.DataFrame, label: list[str]) -> TextFigure:
    """Gains and losses against another trial on the same questions, a dot a row with its 95 % interval around zero.

    `means`: rows with `difference`, `difference_low`, `difference_high` (fractions of 1), first row on top; `label` names
    them. Intervals that hold zero are grey: the two sides cannot be told apart.
    """
    columns = ["difference", "difference_low", "difference_high"]
    if means.empty or not set(columns) <= set(means) or len(label) != len(means):
        raise UserError(
            "differences needs rows with difference, difference_low and difference_high, and a name for each."
        )
    figure, axes = _figure(7.4, 1.1 + 0.32 * len(means))
    words, places = [], range(len(means) - 1, -1, -1)
    for y, name, (value, low, high) in zip(places, label, 100 * means[columns].to_numpy()):
        colour = GREY if low <= 0 <= high else BLUE if value > 0 else ORANGE
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(value, y, "o", color=colour, markersize=7)
        axes.annotate(
            f"{value:+.1f}",
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
        words.append(f"{name} {value:+.1f} ({low:+.1f} to {high:+.1f})")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(list(places), label)
    axes.set(
        ylim=(-0.6, len(means) - 0.4),
        ylabel="Compared",
        xlabel="Difference (points), 95 % interval; grey: within noise",
    )
    figure.alt_text = f"Differences in points, with 95 % interval. {'; '.join(words)}."
    return figure


def accuracy_against_tokens(
    comparison: pd.DataFrame, metric: str = "greedy", x: str = "tokens"
) -> TextFigure:
    """Accuracy of every method against its cost: the column `tokens` (sampled) or `seconds`, totals since M_0.

    The points of a line are the method's iterations, averaged over seeds.
    """
    rows = comparison[comparison.metric == metric]
    if rows.empty or x not in rows:
        raise UserError(f"There is no metric {metric} with a column {x} in this table.")
    figure, axes = _figure(7.2, 4.4)
    unit, title = {
        "tokens": (1e6, "Sampled tokens (millions)"),
        "seconds": (60.0, "Wall-clock time (minutes)"),
    }[x]
    lines = []
    for i, (method, group) in enumerate(rows.groupby("method", sort=False)):
        means = group.groupby("iteration")[[x, "value"]].mean()
        line = _curve(
            axes,
            means[x] / unit,
            100 * means["value"],
            method.replace("_", " "),
            CYCLE[i % len(CYCLE)],
            marker="o",
            linestyle=("-", "--", ":")[i // len(CYCLE) % 3],
        )
        lines.append(
            line._replace(
                words=", ".join(f"{y:.1f} at {cost:.3g}" for cost, y in zip(line.x, line.y))
            )
        )
    axes.set(xlabel=title, ylabel=f"Right answers, {metric} (%)", xlim=(0, None), ylim=(0, 100))
    return _finish(figure, f"Right answers, {metric} (%), by {title.lower()}", [lines])


def heat_map(stability: pd.DataFrame, metric: str = "greedy", fall: float = 0.03) -> TextFigure:
    """Accuracy of the last iteration by learning rate and alpha, mean over seeds, with a frame where it is stable.

    `stability`: metrics table with `learning_rate` and `alpha`. Stable: in no seed does the last iteration lie more
    than `fall` (fraction of 1) below the best one before it.
    """
    rows = stability[stability.metric == metric]
    if rows.empty or not {"learning_rate", "alpha", "seed"} <= set(rows):
        raise UserError(
            f"heat_map needs the metric {metric} with the columns learning_rate, alpha and seed."
        )
    runs = rows.pivot_table(
        index=["alpha", "learning_rate", "seed"], columns="iteration", values="value"
    )
    # A run that could not go on has no last iteration: that is not stable either, and its last accuracy is what counts.
    falls = (
        (runs.iloc[:, :-1].max(axis=1) - runs.iloc[:, -1]).fillna(1.0).groupby(level=[0, 1]).max()
    )
    grid = 100 * runs.ffill(axis=1).iloc[:, -1].groupby(level=[0, 1]).mean().unstack()
    figure, axes = _figure(2.2 + 0.95 * grid.shape[1], 1.5 + 0.62 * grid.shape[0])
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto")
    words = []
    for (alpha, rate), value in grid.stack().dropna().items():
        x, y, stable = (
            grid.columns.get_loc(rate),
            grid.index.get_loc(alpha),
            not falls[alpha, rate] > fall,
        )
        axes.text(
            x, y, f"{value:.0f}", ha="center", va="center", color=INK if value > 47 else PAPER
        )
        if stable:
            axes.add_patch(
                Rectangle(
                    (x - 0.44, y - 0.42), 0.88, 0.84, fill=False, linewidth=2.5, edgecolor=ORANGE
                )
            )
        words.append(
            f"alpha {alpha:g}, learning rate {_power(rate)}: {value:.1f}{', stable' if stable else ''}"
        )
    axes.set_xticks(range(grid.shape[1]), [_power(rate) for rate in grid.columns])
    axes.set_yticks(range(grid.shape[0]), [f"{alpha:g}" for alpha in grid.index])
    axes.grid(False)
    axes.set(
        xlabel="Learning rate",
        ylabel="α, weight of the NLL term",
        title=f"$M_{{{runs.columns[-1]}}}$; framed: no fall over {100 * fall:g} points",
    )
    figure.colorbar(image, ax=axes).set_label(f"Right answers, {metric} (%)", color=INK)
    figure.alt_text = f"Right answers of M_{runs.columns[-1]}, {metric} (%). {'; '.join(words)}."
    return figure


def next_tokens(probabilities: pd.DataFrame) -> TextFigure:
    """Probabilities of the next token as bars: one row per token, one column and panel per setting."""
    figure, panels = _figure(
        2.4 * probabilities.shape[1] + 0.9, 1.1 + 0.3 * len(probabilities), probabilities.shape[1]
    )
    words, places = [], range(len(probabilities))
    for axes, (name, column) in zip(
        panels if isinstance(panels, list) else [panels], probabilities.items()
    ):
        axes.barh(places, 100 * column, color=BLUE)
        for y, value in enumerate(100 * column):
            axes.annotate(
                f"{value:.1f}",
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_yticks(
            places, probabilities.index if axes is figure.axes[0] else [""] * len(places)
        )
        axes.set(title=name, xlabel="Probability (%)", xlim=(0, 118))
        axes.invert_yaxis()
        words.append(
            f"{name}: "
            + ", ".join(f"{token} {100 * value:.1f}" for token, value in column.items())
            + "."
        )
    figure.axes[0].set_ylabel("Next token")
    figure.alt_text = f"Probability of the next token (%). {' '.join(words)}"
    return figure


def sweep(metrics: pd.DataFrame, x: str, xlabel: str, ylabel: str = "Share (%)") -> TextFigure:
    """Shares (`value`, drawn in %, with `low` and `high` if there) against a setting in column `x`, a line per `metric`."""
    if metrics.empty or not {"metric", "value", x} <= set(metrics):
        raise UserError(f"sweep needs a table with metric, value and {x}.")
    figure, axes = _figure(6.6, 4.0)
    lines = []
    for (name, group), colour in zip(metrics.groupby("metric", sort=False), CYCLE):
        group = group.sort_values(x)
        if {"low", "high"} <= set(group):
            axes.fill_between(
                group[x],
                100 * group["low"],
                100 * group["high"],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
        line = _curve(axes, group[x], 100 * group["value"], name, colour, marker="o")
        lines.append(
            line._replace(words=", ".join(f"{y:.1f} at {at:g}" for at, y in zip(line.x, line.y)))
        )
    axes.set_xticks(sorted(set(metrics[x])))
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 102))
    return _finish(figure, f"{ylabel} by {xlabel[0].lower()}{xlabel[1:]}", [lines])


def scaling(table: pd.DataFrame) -> TextFigure:
    """Time and peak memory against N, questions and size of the model, as multiples of the smallest point of each.

    Columns `axis`, `x`, `parameters`, `seconds`, `peak_mb`; the dashed line is what grows in proportion.
    """
    if table.empty or not {"axis", "x", "parameters", "seconds", "peak_mb"} <= set(table):
        raise UserError(
            "scaling needs a table with axis, x, parameters, seconds and peak_mb, as `bench scaling` writes it."
        )
    figure, panels = _figure(9.6, 3.6, 3)
    names = {
        "n": "Samples per question (N)",
        "questions": "Questions",
        "hidden": "Parameters (millions)",
    }
    drawn = []
    for axes, (axis, title) in zip(panels, names.items()):
        group = table[table.axis == axis].sort_values("x")
        x = group.parameters / 1e6 if axis == "hidden" else group.x
        axes.plot(x, x / x.iloc[0], color=GREY, linewidth=1, linestyle="--", label="_proportional")
        lines = [
            _curve(axes, x, group[column] / group[column].iloc[0], name, colour, marker="o")
            for column, name, colour in (("seconds", "time", BLUE), ("peak_mb", "memory", ORANGE))
        ]
        lines = [
            line._replace(words=", ".join(f"{y:.1f} at {at:.3g}" for at, y in zip(line.x, line.y)))
            for line in lines
        ]
        axes.set(
            xlabel=title,
            ylabel="Times the smallest" if axis == "n" else "",
            xscale="log",
            yscale="log",
        )
        axes.set_xticks(list(x), [f"{at:.2g}" if axis == "hidden" else f"{at:g}" for at in x])
        axes.set_xticks([], minor=True)
        ticks = [1, 2, 4, 8, 16]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
        drawn.append(lines)
    return _finish(figure, "Cost of sampling as the work grows", drawn, tuple(names.values()))


def alt_text(figure: Figure) -> str:
    """The description of a figure with its numbers, for a cell's text or a page's `alt`."""
    return getattr(figure, "alt_text", "")


def save(figure: Figure, folder: str | Path, name: str, data: pd.DataFrame, record: dict) -> None:
    """Write `name`.svg, .png, .csv (`data`, what was drawn) and .json (`record`, what made it) into `folder`.

    The alt text is the SVG's title, stands in the PNG's metadata and in the JSON. Equal figures make equal files, and
    a file is there whole or not at all.
    """
    svg = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(
            svg, format="svg", metadata={"Date": None, "Creator": None, "Title": alt_text(figure)}
        )
    record = (
        json.dumps({**record, "alt_text": alt_text(figure)}, indent=1, ensure_ascii=False) + "\n"
    )
    files = {
        "svg": svg.getvalue().replace(b"<svg ", b'<svg role="img" ', 1),
        "png": _png(figure, dpi=150),
        "csv": data.to_csv(index=False).encode(),
        "json": record.encode(),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            partial = folder / f".{name}.{suffix}.partial"
            partial.write_bytes(content)
            os.replace(partial, folder / f"{name}.{suffix}")
    except OSError as error:
        raise UserError(
            f"The figure {name} could not be written to {folder} ({error.strerror or error}). Free some "
            "space or choose another folder."
        ) from error


def _figure(width: float, height: float, panels: int = 1):
    """(figure, axes) of that size in inches, without pyplot; a list of axes if there are several panels."""
    figure = TextFigure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.grid(color="#DDDDDD", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, (axes[0] if panels == 1 else list(axes))


def _line(axes, metrics, metric, colour, intervals=None, label=None, k=None, seeds=True) -> Line:
    """Mean over seeds of one metric against the iteration, a band for its interval, and single seeds as thin lines."""
    k = _common_ks(metrics, metric)[-1] if k is None else k
    rows = metrics[(metrics.metric == metric) & (metrics.k == k)]
    for column in ("method", "split"):
        if column in rows and rows[column].nunique() > 1:
            raise UserError(
                f"This figure shows one {column}, the table has {', '.join(sorted(set(rows[column])))}: "
                f"take the rows of one, such as metrics[metrics.{column} == {rows[column].iloc[0]!r}]."
            )
    exact = intervals is not None and _has(intervals, metric)
    means = (intervals[intervals.metric == metric] if exact else summarise(rows)).sort_values(
        "iteration"
    )
    x, scale = means.iteration.to_numpy(), 100 if _is_fraction(metric) else 1
    label = NAMES.get(metric, metric).format(k=k) if label is None else label
    for seed, one in (
        rows.sort_values("iteration").groupby("seed") if seeds and "seed" in rows else ()
    ):
        axes.plot(
            one.iteration,
            scale * one.value,
            color=colour,
            linewidth=0.7,
            alpha=0.45,
            label=f"_seed {seed}",
        )
    low, high = (scale * means[side].astype(float) for side in ("low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        x,
        scale * means.value,
        color=colour,
        linewidth=2.2,
        marker="o",
        markersize=4.5,
        label=label or metric,
    )
    words = ", ".join(
        f"M_{row['iteration']} {_number(row, scale)}" for row in means.to_dict("records")
    )
    return Line(x, scale * means.value.to_numpy(), label, colour, words)


def _curve(axes, x, y, label, colour, window=1, **style) -> Line:
    """One line; with a window the points stay as a shade behind their running mean."""
    x, y = np.asarray(x, float), pd.Series(np.asarray(y, float))
    if window > 1:
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3, label="_rows")
        y = y.rolling(window, min_periods=1, center=True).mean()
    axes.plot(x, y, color=colour, linewidth=2, markersize=5, label=label, **style)
    return Line(x, y.to_numpy(), label, colour, f"{y.iloc[0]:.1f} to {y.iloc[-1]:.1f}")


def _iterations(axes, ylabel: str, percent: bool = False) -> None:
    axes.set(xlabel="Iteration t (model $M_t$)", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.set_ylim(0, 102)  # room for the marks of what reaches 100


def _finish(figure: TextFigure, title: str, panels: list[list[Line]], names=("",)) -> TextFigure:
    """Names at the line ends (the limits are set by now), and the alt text; `names` says what each panel shows."""
    said = []
    for axes, lines, name in zip(figure.axes, panels, names):
        _name_ends(axes, lines)
        said.append(
            f"{name}: " * bool(name)
            + "; ".join(f"{x.label}: " * bool(x.label) + x.words for x in lines)
            + "."
        )
    figure.alt_text = f"{title}. " + " ".join(said)
    return figure


def _name_ends(axes, lines: list[Line]) -> None:
    """Each line's name at its right end, moved apart where lines end close together.

    Where lines end at different places, their names stand in a column beside the axes, each with a thin line to its end.
    """
    low, high = axes.get_ylim()
    gap = (
        (high - low) * 13 / (72 * 0.78 * axes.figure.get_figheight())
    )  # one row of text, in units of the axis
    lines = sorted(lines, key=lambda line: line.y[-1])
    heights = [line.y[-1] for line in lines]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], high if i == len(heights) - 1 else heights[i + 1] - gap)
    ends = [line.x[-1] for line in lines]
    column = axes.get_xlim()[1] if max(ends, default=0) > min(ends, default=0) else None
    for line, height in zip(lines, heights):
        if column is not None:
            axes.plot(
                [line.x[-1], column],
                [line.y[-1], height],
                color=line.colour,
                linewidth=0.6,
                label=f"_to {line.label}",
                clip_on=False,
                zorder=1,
            )
        axes.annotate(
            line.label,
            (line.x[-1] if column is None else column, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=[0.6 * part for part in to_rgb(line.colour)],
            annotation_clip=False,
            path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
        )


def _number(row, scale: float) -> str:
    """ "70.1 (65.9 to 74.0)"."""
    value, low, high = (
        f"{scale * row[name]:.{1 if scale > 1 else 2}f}" for name in ("value", "low", "high")
    )
    return value if "nan" in (low, high) else f"{value} ({low} to {high})"


def _row_name(row, table: pd.DataFrame) -> str:
    """The method, with the iteration, metric and k where the table has several."""
    name, same = str(row["method"]).replace("_", " "), table[table.method == row["method"]]
    if same.iteration.nunique() > 1:
        name += f", iteration {row['iteration']}"
    if table.metric.nunique() > 1 or same.k.nunique() > 1:
        name += f", {NAMES.get(row['metric'], row['metric']).format(k=row['k'])}"
    return name


def _keys(metrics: pd.DataFrame) -> list[str]:
    return [name for name in ("method", "iteration", "split", "metric", "k") if name in metrics]


def _has(metrics: pd.DataFrame, metric: str) -> bool:
    return bool((metrics.metric == metric).any())


def _shared_ks(metrics: pd.DataFrame, metric: str) -> list[int]:
    rows = metrics[metrics.metric == metric]
    return (
        sorted(set.intersection(*(set(group.k) for _, group in rows.groupby("iteration"))))
        if len(rows)
        else []
    )


def _common_ks(metrics: pd.DataFrame, metric: str) -> list[int]:
    """The k that all iterations have: more samples are drawn of M_0 and of the last one than of the others."""
    if not _has(metrics, metric):
        raise UserError(
            f"There is no metric {metric} in this table. It has: {', '.join(sorted(set(metrics.metric)))}."
        )
    ks = _shared_ks(metrics, metric)
    if not ks:
        raise UserError(
            f"The iterations have {metric} at different k, and none at one that all share."
        )
    return sorted(ks)


def _is_fraction(metric: str) -> bool:
    return (
        metric in ("greedy", "sampled", "majority", "pass_at_k")
        or metric.startswith("greedy_steps_")
        or metric.endswith(("_rate", "_skeleton"))
    )


def _power(x: float) -> str:
    return np.format_float_scientific(x, trim="-", exp_digits=1)


def _shades(n: int) -> list:
    """n colours in order from dark to light, none too light for white paper."""
    return list(matplotlib.colormaps["viridis"](np.linspace(0.05, 0.75, n)))


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = BytesIO()
    figure.savefig(
        buffer, format="png", dpi=dpi, metadata={"Description": alt_text(figure), "Software": None}
    )
    return buffer.getvalue()
