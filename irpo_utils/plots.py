"""The style and the parts of all figures, accuracy per iteration, and saving a figure.

The tables have the columns of metrics.csv unless a function says otherwise. A figure's `alt_text`
describes it with its numbers. The colours are Okabe and Ito's, for readers with any colour vision.
"""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from irpo_utils import UserError

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6A00", "#5F5F5F"]
BLUE, ORANGE, GREEN, *_, GREY = COLOURS
INK, PAPER = "#000000", "#FFFFFF"
PERCENT = (0, 102)  # limits of an axis, with room for the markers at 100
LOW_ACCURACY = 40  # %: below this, an axis up to 100 % would leave most of the figure empty


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
    numbers: str


ACCURACY_LINES = [  # metric, label, colour
    ("greedy", "greedy", BLUE),
    ("majority", "majority of {k}", GREEN),
    ("sampled", "sampled", ORANGE),
]


def accuracy_per_iteration(metrics: pd.DataFrame) -> TextFigure:
    """Greedy, majority and sampled accuracy of M_0 to M_T with 95 % intervals.

    The majority is left out if its k differs from iteration to iteration. Raises `UserError` for a
    table without greedy accuracy, and for one of several seeds, methods or splits.
    """
    questions = f"% of {metrics[metrics.metric == 'greedy'].n.max():.0f} questions"
    figure, axes = new_figure(6.6, 3.9)
    lines = []
    for metric, label, colour in ACCURACY_LINES:
        if ks := common_ks(metrics, metric, needed=metric == "greedy"):
            rows = metrics[(metrics.metric == metric) & (metrics.k == ks[-1])]
            lines.append(draw_metric(axes, rows, 100, label.format(k=ks[-1]), colour))
    label_iterations(axes, f"Accuracy ({questions})", PERCENT)
    return finish(figure, f"Accuracy per iteration ({questions})", {"": lines})


def label_iterations(axes, ylabel: str, ylim: tuple) -> None:
    """Label axes over iterations and limit y: `PERCENT` ends at 100, or above low data."""
    axes.set(xlabel="Iteration t (model $M_t$)", ylabel=ylabel, ylim=ylim)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ylim == PERCENT and axes.dataLim.y1 < LOW_ACCURACY:
        axes.set_ylim(0, max(1.25 * axes.dataLim.y1, LOW_ACCURACY / 2))


def draw_metric(axes, rows, scale: float, label: str, colour) -> Line:
    """The rows of one metric, one for each iteration, with their intervals as a band."""
    for column in [name for name in ("method", "split", "seed") if name in rows]:
        if rows[column].nunique() > 1:
            found = sorted(set(rows[column].tolist()))
            raise UserError(
                f"This figure shows one {column}, but the table has {', '.join(map(str, found))}. "
                f"Select the rows of one: metrics[metrics.{column} == {found[0]!r}]."
            )
    rows = rows.sort_values("iteration").astype({"low": float, "high": float})  # None is NaN
    value, *band = (scale * rows[name] for name in ("value", "low", "high"))
    line = draw_points(axes, rows.iteration, value, label, colour, band)
    each = (f"M_{row.iteration} {number_with_interval(row, scale)}" for _, row in rows.iterrows())
    return line._replace(numbers=", ".join(each))


def common_ks(metrics: pd.DataFrame, metric: str, needed: bool = False) -> list[int]:
    """The k that all iterations have; M_0 and the last model are evaluated with more samples."""
    rows = metrics[metrics.metric == metric]
    iterations = rows.groupby("k").iteration.nunique()
    ks = sorted(iterations.index[iterations == rows.iteration.nunique()])
    if needed and not ks:
        reason = "has different k in each iteration" if len(rows) else "is missing"
        names = ", ".join(sorted(set(metrics.metric)))
        raise UserError(f"The metric {metric} {reason}. The table has {names}.")
    return ks


def number_with_interval(row, scale: float) -> str:
    """For example "70.1 (65.9 to 74.0)"; the number alone if there is no interval."""
    digits = 1 if scale > 1 else 2
    value, low, high = (f"{scale * row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return value if "nan" in (low, high) else f"{value} ({low} to {high})"


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
    return Line(x, y, label, f"{y[0]:.1f} to {y[-1]:.1f}")


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
    """Add a legend to each panel, in the order in which the lines end, and the alt text."""
    sentences = []
    for axes, (name, lines) in zip(figure.axes, panels.items(), strict=True):
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            handles.sort(key=lambda line: -line.get_ydata()[-1])
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            axes.legend(handles=handles, frameon=False, fontsize=9, **beside)
        numbers = "; ".join(f"{line.label}: {line.numbers}".removeprefix(": ") for line in lines)
        sentences.append(f"{name}: {numbers}.".removeprefix(": "))
    figure.alt_text = f"{title}. {' '.join(sentences)}"
    return figure


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


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = BytesIO()
    metadata = {"Description": alt_text(figure), "Software": None}
    figure.savefig(buffer, format="png", dpi=dpi, metadata=metadata)
    return buffer.getvalue()
