"""What notebook 03 needs and does not teach: graded completions of M_0, the HTML view, its figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import html
import json
from itertools import zip_longest

import numpy as np
import pandas as pd
from datasets import load_from_disk
from helpers_common import new_completions, run_with
from IPython.display import HTML
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from irpo_utils import plots
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, GREY, ORANGE

LEFT = 'style="text-align:left; white-space:pre-wrap"'
FATES = {"gives pairs": BLUE, "all incorrect": ORANGE, "all correct": GREY}


def graded_completions(name: str, profile):
    """(run, profile, graded) of iteration 0: your run, the shipped run, or new ones (run: None)."""
    artefact = "iteration_0/graded"
    if run := run_with(name, profile, artefact):
        return run, runs.read_profile(run), load_from_disk(str(run / artefact))
    return None, profile, new_completions(profile, 100)


def counts_per_iteration(run, counts: dict) -> pd.DataFrame:
    """The counts of `build_pairs` for every iteration of a run; without a run, these counts."""
    files = sorted(run.glob("iteration_*/pairs/counts.json")) if run else []
    rows = [json.loads(file.read_text()) for file in files] or [counts]
    return pd.DataFrame(rows).rename(index="M_{}".format)


# ------------------------------------------------------------------------------ two texts


def divergence(chosen: str, rejected: str) -> int | None:
    """Number of the first line in which the two differ; None if they are equal."""
    lines = enumerate(zip_longest(chosen.split("\n"), rejected.split("\n")))
    return next((i for i, (ours, theirs) in lines if ours != theirs), None)


def n_shared(chosen_ids, rejected_ids) -> int:
    """Tokens that both completions share before their first difference."""
    pairs = enumerate(zip(chosen_ids, rejected_ids, strict=False))
    shorter = min(len(chosen_ids), len(rejected_ids))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), shorter)


def visible(text: str) -> str:
    """`text` as HTML that shows exactly this text: model output never becomes markup."""
    return html.escape("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text))


def table_of(chosen: str, rejected: str) -> str:
    """An HTML table with a row per line; the first line that differs is marked."""
    differs, rows = divergence(chosen, rejected), []
    for i, texts in enumerate(zip_longest(chosen.split("\n"), rejected.split("\n"))):
        cells = "".join(
            "<td></td>" if text is None else f"<td {LEFT}><code>{visible(text)}</code></td>"
            for text in texts
        )
        mark = "<td></td>"
        if i == differs:
            style = "text-align:left; border-left:4px solid #D55E00"
            mark = f'<td style="{style}"><b>&#9664; they diverge here</b></td>'
        rows.append(f"<tr><td>{i}</td>{cells}{mark}</tr>")
    head = f"<tr><th>line</th><th {LEFT}>chosen</th><th {LEFT}>rejected</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def side_by_side(chosen: str, rejected: str) -> HTML:
    return HTML(table_of(chosen, rejected))


# ------------------------------------------------------------------------------ figures


def heat_map(graded, n_questions: int = 60):
    """A row per question, a column per sample, blue where correct; sorted by correct samples."""
    table = graded.to_pandas().pivot(index="id", columns="sample", values="correct")
    table = table.iloc[:n_questions].astype(int)
    table = table.loc[table.sum(axis=1).sort_values(kind="stable").index]
    figure, axes = plots.new_figure(5, 6)
    axes.imshow(table, aspect="auto", cmap=ListedColormap([ORANGE, BLUE]), vmin=0, vmax=1)
    axes.grid(False)
    n, rights = table.shape[1], table.sum(axis=1)
    for row in ((rights == 0).sum(), (rights < n).sum()):
        axes.axhline(row - 0.5, color="white", linewidth=4)
    axes.set(xlabel="sample", ylabel="question (sorted)", xticks=range(n))
    handles = [Patch(color=BLUE, label="correct"), Patch(color=ORANGE, label="incorrect")]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncol=2, frameon=False)
    figure.alt_text = (
        f"{len(table)} questions by {n} samples: {(rights == 0).sum()} questions have no correct "
        f"sample, {(rights == n).sum()} have only correct ones, and "
        f"{((rights > 0) & (rights < n)).sum()} have both and give pairs."
    )
    return figure


def fates(counts: pd.DataFrame, xlabel: str):
    """Stacked bars: the share of questions that give pairs, or have only one kind of completion."""
    shares = pd.DataFrame(
        {
            "gives pairs": counts.used / counts.questions,
            "all incorrect": counts.all_wrong / counts.questions,
            "all correct": counts.all_right / counts.questions,
        }
    )
    figure, axes = plots.new_figure(6.5, 3.2)
    bottom = np.zeros(len(shares))
    for name, colour in FATES.items():
        axes.bar(range(len(shares)), 100 * shares[name], bottom=bottom, color=colour, label=name)
        bottom += 100 * shares[name].to_numpy()
    axes.set_xticks(range(len(shares)), shares.index)
    axes.set(xlabel=xlabel, ylabel="questions (%)", ylim=(0, 100))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=3, frameon=False)
    figure.alt_text = "Questions by fate: " + "; ".join(
        f"{name}: " + ", ".join(f"{100 * row[fate]:.0f} % {fate}" for fate in FATES)
        for name, row in shares.iterrows()
    )
    return figure


def lost_questions(measured: dict[int, float]):
    """(1-p)^N + p^N over N for four p, and the measured share of questions without a pair."""
    figure, axes = plots.new_figure(7, 3.6)
    samples, lines = np.array([1, 2, 4, 8, 16, 30]), []
    for p, colour in zip((0.02, 0.1, 0.5, 0.95), plots.COLOURS[2:6], strict=True):
        lost = 100 * ((1 - p) ** samples + p**samples)
        lines.append(plots.draw_line(axes, samples, lost, f"p = {p}", colour))
    x, y = list(measured), [100 * share for share in measured.values()]
    points = axes.plot(x, y, "o", color=ORANGE, markersize=8, label="all questions of this run")
    axes.legend(handles=points, frameon=False)
    axes.set(xlabel="samples per question N", ylabel="questions without a pair (%)", ylim=(0, 102))
    figure = plots.finish(figure, "Questions without a pair", {"percent": lines})
    measurements = ", ".join(f"{b:.0f} at N = {a}" for a, b in zip(x, y, strict=True))
    figure.alt_text += f" Measured: {measurements}."
    return figure


def where_they_diverge(frame: pd.DataFrame):
    """Pairs by the line at which they diverge; colours: what the rejected completion does there."""

    def what(text: str, line: int) -> str:
        lines = text.split("\n")
        if line >= len(lines):
            return "ends"
        return "gives the answer" if "final answer" in lines[line].lower() else "goes on working"

    line = frame.line.clip(upper=5)
    kind = [what(text, i) for text, i in zip(frame.rejected, frame.line, strict=True)]
    counts = pd.crosstab(line, pd.Series(kind, index=frame.index))
    figure, axes = plots.new_figure(6.5, 3.2)
    bottom = np.zeros(len(counts))
    for name, colour in zip(counts.columns, (ORANGE, BLUE, GREY), strict=False):
        axes.bar(counts.index, counts[name], bottom=bottom, color=colour, label=name)
        bottom += counts[name].to_numpy()
    axes.set(xlabel="line at which the pair diverges", ylabel="pairs", xticks=counts.index)
    axes.legend(title="the rejected completion", frameon=False)
    figure.alt_text = "Pairs by the line at which they diverge: " + "; ".join(
        f"line {i}: " + ", ".join(f"{row[name]} where it {name}" for name in counts.columns)
        for i, row in counts.iterrows()
    )
    return figure
