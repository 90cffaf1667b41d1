"""Figures of a run: a table of metrics in, a matplotlib figure out.

The tables have the columns of metrics.csv unless a function says otherwise. Every function returns
a `TextFigure`, whose `alt_text` describes it with its numbers, and raises `UserError` for a table
without what it draws. The colours are Okabe and Ito's, for readers with any colour vision.
"""

from __future__ import annotations

import json
import math
import os
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from irpo_utils import UserError
from irpo_utils.ops.student import t_quantile

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6A00", "#5F5F5F"]
BLUE, ORANGE, GREEN, *_, GREY = COLOURS
INK, PAPER = "#000000", "#FFFFFF"
PERCENT = (0, 102)  # limits of an axis, with room for the markers at 100
LOW_ACCURACY = 40  # %: below this, an axis up to 100 % would leave most of the figure empty
LABELS = {
    "majority": "majority of {k}",
    "pass_at_k": "pass@{k}",
    "distinct_answers": "in {k} completions",
    "mean_tokens": "sampled",
    "greedy_mean_tokens": "greedy",
    "kl_to_previous": "",
    "chosen_logp_per_token": "after training",
    "chosen_logp_per_token_before": "before",
}
CHOSEN, REJECTED = "logps/chosen", "logps/rejected"


class TextFigure(Figure):
    """A figure with a description, which notebooks show as the `alt` text of its PNG."""

    alt_text: str = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": _png(self, dpi=110)}, {"image/png": {"alt": self.alt_text}}


class Line(NamedTuple):
    """A drawn line: its points in units of the axes, and its numbers for the alt text."""

    x: np.ndarray
    y: np.ndarray
    label: str
    colour: str
    numbers: str


def summarise(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per number of a table with several seeds: mean, 95 % interval, `n`, `seeds`.

    The half-width of the interval adds the spread between seeds (Student's t) and the mean
    half-width of the seeds' own intervals (questions) in quadrature, which is rather wide. Where
    you have the completions, use `evaluation.seed_and_question_interval`.
    """
    keys, rows = metric_keys(metrics), []
    for _, group in metrics.groupby(keys, sort=False, dropna=False):
        first, value, seeds = group.iloc[0], group["value"].mean(), len(group)
        bounds = group[["low", "high"]].astype(float)
        half_widths = bounds.sub(group["value"], axis=0).abs().mean()
        if seeds > 1:
            between = t_quantile(seeds - 1) * group["value"].std() / math.sqrt(seeds)
            half_widths = np.hypot(between, half_widths.fillna(0))
        limits = (0, 1) if _is_fraction(first["metric"]) else (-np.inf, np.inf)
        low, high = np.clip([value - half_widths["low"], value + half_widths["high"]], *limits)
        numbers = {"value": value, "low": low, "high": high, "n": first.get("n"), "seeds": seeds}
        rows.append({**first[keys], **numbers})
    return pd.DataFrame(rows)


def accuracy_per_iteration(metrics: pd.DataFrame, intervals=None) -> TextFigure:
    """Greedy, majority and sampled accuracy of M_0 to M_T, seeds as thin lines, 95 % intervals.

    `intervals`: means with `low` and `high` by `metric` and `iteration`, instead of `summarise`.
    """
    questions = f"% of {metrics[metrics.metric == 'greedy'].n.max():.0f} questions"
    colours = {"greedy": BLUE, "majority": GREEN, "sampled": ORANGE}
    panels = {"": (f"Accuracy ({questions})", PERCENT, colours)}
    title = f"Accuracy per iteration ({questions})"
    return _over_iterations(metrics, title, panels, intervals=intervals)


def accuracy_by_steps(metrics: pd.DataFrame) -> TextFigure:
    """Greedy accuracy on questions that need 2, 3, ... steps (`greedy_steps_2`, ...)."""
    names = [name for name in metrics.metric.unique() if name.startswith("greedy_steps_")]
    names = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
    if not names:
        raise UserError(
            "There is no metric greedy_steps_...: the questions have no column `steps`."
        )
    panels = {"": ("Greedy accuracy (%)", PERCENT, shades(names))}
    title = "Greedy accuracy by number of steps and iteration (%)"
    return _over_iterations(metrics, title, panels, show_seeds=False)


def lengths_per_iteration(metrics: pd.DataFrame) -> TextFigure:
    """Mean length of sampled and of greedy completions per iteration, in tokens."""
    colours = {"mean_tokens": ORANGE, "greedy_mean_tokens": BLUE}
    panels = {"": ("Length (tokens per completion)", (0, None), colours)}
    return _over_iterations(metrics, "Mean length per iteration (tokens per completion)", panels)


def warning_numbers(metrics: pd.DataFrame) -> TextFigure:
    """Early signs of a collapse: KL(M_t || M_{t-1}) and log-probabilities of chosen completions."""
    kl, chosen = "KL to the previous model", "log-probability of chosen"
    colours = {"chosen_logp_per_token": BLUE, "chosen_logp_per_token_before": GREY}
    panels = {
        kl: ("Nats per completion", (0, None), {"kl_to_previous": BLUE}),
        chosen: ("Nats per token", (None, None), colours),
    }
    return _over_iterations(metrics, "Warning numbers per iteration (nats)", panels)


def diversity(metrics: pd.DataFrame) -> TextFigure:
    """pass@k for every k that all iterations have, and distinct answers in k completions."""
    solved = shades([("pass_at_k", k) for k in _common_ks(metrics, "pass_at_k", needed=True)])
    panels = {
        "questions solved by one of k": ("Questions (%)", PERCENT, solved),
        "distinct answers": ("Answers per question", (0, None), {"distinct_answers": BLUE}),
    }
    return _over_iterations(metrics, "Diversity per iteration", panels, show_seeds=False)


def training_curves(logs: dict[str, pd.DataFrame]) -> TextFigure:
    """Log-probabilities of chosen and rejected over steps, and their difference (figures 2 to 4).

    `logs`: name of a run -> table with `step`, `logps/chosen` and `logps/rejected` (sums over a
    completion, nats), such as training_log.jsonl; each run gets a panel.
    """
    needed = {"step", CHOSEN, REJECTED}
    if not logs or not all(needed <= set(log) for log in logs.values()):
        raise UserError(f"training_curves needs a log with step, {CHOSEN} and {REJECTED}.")
    figure, (first, *others) = new_figure(3.1 * len(logs) + 3.7, 3.6, panels=len(logs) + 1)
    panels, differences = {}, []
    for axes, colour, (name, log) in zip(figure.axes, cycle(COLOURS), logs.items(), strict=False):
        step, chosen, rejected = log["step"], log[CHOSEN], log[REJECTED]
        dashed = draw_line(axes, step, rejected, "rejected", ORANGE, linestyle="--")
        panels[name] = [draw_line(axes, step, chosen, "chosen", BLUE), dashed]
        differences.append(draw_line(others[-1], step, chosen - rejected, name, colour))
    for axes in others[:-1]:
        axes.sharey(first)
    panels["chosen − rejected"] = differences
    for axes, name in zip(figure.axes, panels, strict=True):
        axes.set(title=name, xlabel="Optimiser step")
    first.set_ylabel("Log-probability of a completion (nats)")
    others[-1].set_ylabel("Difference (nats)")
    return finish(figure, "Log-probabilities in training (nats), first and last step", panels)


def next_tokens(probabilities: pd.DataFrame) -> TextFigure:
    """Probabilities of the next token as bars: a row per token, a column (panel) per setting."""
    tokens, settings = probabilities.shape
    figure, _ = new_figure(2.4 * settings + 0.9, 1.1 + 0.3 * tokens, panels=settings)
    descriptions = []
    for panel, (name, column) in zip(figure.axes, probabilities.items(), strict=True):
        panel.barh(range(tokens), 100 * column, color=BLUE)
        for y, value in enumerate(100 * column):
            annotate(panel, f"{value:.1f}", (value, y), offset=4)
        labels = probabilities.index if panel is figure.axes[0] else [""] * tokens
        panel.set_yticks(range(tokens), labels)
        panel.set(title=name, xlabel="Probability (%)", xlim=(0, 118))
        panel.invert_yaxis()
        values = ", ".join(f"{token} {100 * value:.1f}" for token, value in column.items())
        descriptions.append(f"{name}: {values}.")
    figure.axes[0].set_ylabel("Next token")
    figure.alt_text = f"Probability of the next token (%). {' '.join(descriptions)}"
    return figure


def sweep(metrics: pd.DataFrame, x: str, xlabel: str, ylabel: str = "Share (%)") -> TextFigure:
    """Fractions (`value`, perhaps `low`, `high`) in % over the column `x`, a line per `metric`."""
    if metrics.empty or not {"metric", "value", x} <= set(metrics):
        raise UserError(f"sweep needs a table with metric, value and {x}.")
    figure, axes = new_figure(6.6, 4.0)
    lines = []
    for colour, (name, rows) in zip(COLOURS, metrics.groupby("metric", sort=False), strict=False):
        rows = rows.sort_values(x)
        band = [100 * rows[side] for side in ("low", "high") if side in rows]
        lines.append(draw_points(axes, rows[x], 100 * rows["value"], name, colour, band))
    axes.set_xticks(sorted(set(metrics[x])))
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 102))
    return finish(figure, f"{ylabel} by {xlabel[0].lower()}{xlabel[1:]}", {"": lines})


def alt_text(figure: Figure) -> str:
    """The description of a figure with its numbers, for the `alt` of a page."""
    return getattr(figure, "alt_text", "")


def save(figure: Figure, folder: str | Path, name: str, data: pd.DataFrame, record: dict) -> None:
    """Write `name`.svg, .png, .csv (`data`: the numbers) and .json (`record`: how they were made).

    The alt text is the title of the SVG, and in the PNG's metadata and the JSON. Equal figures give
    equal files, and no partial file is left. Raises `UserError` if `folder` cannot be written.
    """
    text, svg = alt_text(figure), BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Title": text})
    record = json.dumps({**record, "alt_text": text}, indent=1, ensure_ascii=False)
    contents = {
        "svg": svg.getvalue().replace(b"<svg ", b'<svg role="img" ', 1),
        "png": _png(figure, dpi=150),
        "csv": data.to_csv(index=False).encode(),
        "json": f"{record}\n".encode(),
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            partial = Path(folder) / f".{name}.{suffix}.partial"
            partial.write_bytes(content)
            os.replace(partial, Path(folder) / f"{name}.{suffix}")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Cannot write the figure {name} to {folder}: {reason}.") from error


# Parts of figures; scripts/studies/figures.py uses them as well.


def new_figure(width: float, height: float, panels: int = 1):
    """(figure, axes) of that size in inches, without pyplot; a list of axes for several panels."""
    figure = TextFigure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.grid(color="#DDDDDD", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, axes if panels > 1 else axes[0]


def draw_line(axes, x, y, label, colour, **style) -> Line:
    """One line without markers."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    axes.plot(x, y, color=colour, label=label, linewidth=2, markersize=5, **style)
    return Line(x, y, label, colour, f"{y[0]:.1f} to {y[-1]:.1f}")


def draw_points(axes, x, y, label, colour, band=(), **style) -> Line:
    """A line with a marker and a number for each point; `band`: (low, high) of the intervals."""
    if len(band) == 2:
        axes.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
    line = draw_line(axes, x, y, label, colour, marker="o", **style)
    points = zip(line.x, line.y, strict=True)
    return line._replace(numbers=", ".join(f"{y:.1f} at {x:.3g}" for x, y in points))


def annotate(axes, text: str, point, offset: float = 7, **options) -> None:
    """Text to the right of a point, `offset` points (1/72 inch) away."""
    options = {"color": INK, "fontsize": 9, "va": "center", "annotation_clip": False, **options}
    axes.annotate(text, point, xytext=(offset, 0), textcoords="offset points", **options)


def finish(figure: TextFigure, title: str, panels: dict[str, list[Line]]) -> TextFigure:
    """Name the lines at their ends and set the alt text; the axes must have their limits by now."""
    sentences = []
    for axes, (name, lines) in zip(figure.axes, panels.items(), strict=True):
        _name_line_ends(axes, lines)
        numbers = "; ".join(f"{line.label}: {line.numbers}".removeprefix(": ") for line in lines)
        sentences.append(f"{name}: {numbers}.".removeprefix(": "))
    figure.alt_text = f"{title}. {' '.join(sentences)}"
    return figure


def number_with_interval(row, scale: float) -> str:
    """For example "70.1 (65.9 to 74.0)"; the number alone where there is no interval."""
    digits = 1 if scale > 1 else 2
    value, low, high = (f"{scale * row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return value if "nan" in (low, high) else f"{value} ({low} to {high})"


def metric_keys(metrics: pd.DataFrame) -> list[str]:
    """The columns of the table that tell one number from another, seeds aside."""
    return [name for name in ("method", "iteration", "split", "metric", "k") if name in metrics]


def shades(names: list) -> dict:
    """A colour for each name, in order from dark to light, none too light for white paper."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.75, len(names)))
    return dict(zip(names, colours, strict=True))


def _over_iterations(metrics, title: str, panels: dict[str, tuple], **options) -> TextFigure:
    """A figure over iterations; `options`: of `_draw_metric`.

    `panels`: name -> (y label, y limits, colours of the metrics or of (metric, k)). In a panel, all
    metrics but the first are left out if not every iteration has them. Axes in per cent end at 100,
    or above the data if these are all below `LOW_ACCURACY`.
    """
    figure, _ = new_figure(3.6 + 3 * len(panels), 3.9, panels=len(panels))
    drawn = {}
    for axes, (name, (ylabel, ylim, colours)) in zip(figure.axes, panels.items(), strict=True):
        lines = drawn[name] = []
        for key, colour in colours.items():
            metric, k = key if isinstance(key, tuple) else (key, None)
            if not lines or _common_ks(metrics, metric):
                lines.append(_draw_metric(axes, metrics, metric, colour, k, **options))
        axes.set(xlabel="Iteration t (model $M_t$)", ylabel=ylabel, ylim=ylim)
        axes.set_title(name[:1].upper() + name[1:], fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ylim == PERCENT and axes.dataLim.y1 < LOW_ACCURACY:
            axes.set_ylim(0, max(1.25 * axes.dataLim.y1, LOW_ACCURACY / 2))
    return finish(figure, title, drawn)


def _draw_metric(axes, metrics, metric, colour, k=None, intervals=None, show_seeds=True) -> Line:
    """A metric over iterations: mean over seeds, its interval as a band, seeds as thin lines."""
    k = _common_ks(metrics, metric, needed=True)[-1] if k is None else k
    rows = metrics[(metrics.metric == metric) & (metrics.k == k)].sort_values("iteration")
    for column in {"method", "split"} & set(rows):
        if rows[column].nunique() > 1:
            found = ", ".join(sorted(set(rows[column])))
            raise UserError(
                f"This figure shows one {column}, but the table has {found}. Select the rows of "
                f"one: metrics[metrics.{column} == {rows[column].iloc[0]!r}]."
            )
    means = summarise(rows)
    if intervals is not None and (intervals.metric == metric).any():
        means = intervals[intervals.metric == metric].sort_values("iteration")
    scale = 100 if _is_fraction(metric) else 1
    label = f"{metric.rpartition('_')[2]} steps" if "_steps_" in metric else metric
    label = LABELS.get(metric, label).format(k=k)
    if show_seeds and "seed" in rows:
        thin = {"color": colour, "linewidth": 0.7, "alpha": 0.45}
        for seed, one in rows.groupby("seed"):
            axes.plot(one.iteration, scale * one.value, label=f"_seed {seed}", **thin)
    band = [scale * means[side].astype(float) for side in ("low", "high")]
    line = draw_points(axes, means.iteration, scale * means.value, label, colour, band)
    rows = means.to_dict("records")
    numbers = (f"M_{row['iteration']} {number_with_interval(row, scale)}" for row in rows)
    return line._replace(numbers=", ".join(numbers))


def _name_line_ends(axes, lines: list[Line]) -> None:
    """Each line's name at its right end, moved up or down where two names would overlap.

    Where lines end at different x, the names are right of the axes, with thin lines to the ends.
    """
    lines = sorted(lines, key=lambda line: line.y[-1])
    low, high = axes.get_ylim()
    row = (high - low) * 13 / (72 * 0.78 * axes.figure.get_figheight())  # a row of text
    rows = row * np.arange(len(lines))
    heights = np.maximum.accumulate([line.y[-1] for line in lines] - rows) + rows  # a row apart
    heights = np.minimum(heights, high - rows[::-1])
    ends = {line.x[-1] for line in lines}
    names_at = axes.get_xlim()[1] if len(ends) > 1 else max(ends, default=0)
    for line, height in zip(lines, heights, strict=True):
        if len(ends) > 1:
            x, y = [line.x[-1], names_at], [line.y[-1], height]
            axes.plot(x, y, color=line.colour, linewidth=0.6, clip_on=False, zorder=1, label="_to")
        darker = [0.6 * part for part in to_rgb(line.colour)]
        outline = [withStroke(linewidth=2.5, foreground=PAPER)]
        annotate(axes, line.label, (names_at, height), color=darker, path_effects=outline)


def _common_ks(metrics: pd.DataFrame, metric: str, needed: bool = False) -> list[int]:
    """The k that all iterations have; M_0 and the last model are evaluated with more samples."""
    rows = metrics[metrics.metric == metric]
    per_iteration = [set(group.k) for _, group in rows.groupby("iteration")]
    ks = sorted(set.intersection(*per_iteration)) if per_iteration else []
    if needed and not ks:
        reason = "has different k in each iteration" if len(rows) else "is missing"
        names = ", ".join(sorted(set(metrics.metric)))
        raise UserError(f"The metric {metric} {reason}. The table has {names}.")
    return ks


def _is_fraction(metric: str) -> bool:
    fractions = ("greedy", "sampled", "majority", "pass_at_k")
    return metric in fractions or "_steps_" in metric or metric.endswith(("_rate", "_skeleton"))


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = BytesIO()
    metadata = {"Description": alt_text(figure), "Software": None}
    figure.savefig(buffer, format="png", dpi=dpi, metadata=metadata)
    return buffer.getvalue()
