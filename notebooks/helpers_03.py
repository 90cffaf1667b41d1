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

from irpo_utils import pairs, plots
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, GREEN, GREY, ORANGE

LEFT = 'style="text-align:left; white-space:pre-wrap"'
# What the rejected completion does where a pair diverges, and the colour of its bars.
KINDS = {
    "answers before the working is complete": ORANGE,
    "writes another equation": BLUE,
    "gives another answer at the same line": GREEN,
    "writes an equation; chosen gives its answer": GREY,
}
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
    return pd.DataFrame(rows).rename(index="$M_{}$".format)


def quarters_by_prompt_length(table: pd.DataFrame) -> pd.DataFrame:
    """The counts of `build_pairs` for each quarter of the questions, sorted by prompt length."""
    by_question = table.groupby("id").agg(prompt=("prompt_ids", "first"), share=("correct", "mean"))
    order = by_question.prompt.map(len).rank(method="first")
    quarter = pd.qcut(order, 4, labels=["shortest", "second", "third", "longest"])
    shares = by_question.share.groupby(quarter, observed=True)
    counts = pd.DataFrame(
        {
            "questions": shares.size(),
            "all_wrong": shares.agg(lambda share: (share == 0).sum()),
            "all_right": shares.agg(lambda share: (share == 1).sum()),
        }
    )
    return counts.assign(used=counts.questions - counts.all_wrong - counts.all_right)


def walk_table(chosen: list, rejected: list, k: int) -> str:
    """The k pairs of `pairs.walk` as a table: a column per pair, counted from 1."""
    walked = pairs.walk(len(chosen), len(rejected), k)
    rows = {
        "pair": range(1, k + 1),
        "chosen": [chosen[i] for i, _ in walked],
        "rejected": [rejected[j] for _, j in walked],
    }
    return "\n".join(f"{name:10}" + "".join(f"{x:4}" for x in row) for name, row in rows.items())


def numbers(result, *names: str) -> str:
    """The numbers of an exercise's result, each with its name; a note while it is not solved."""
    if result is ... or result is None:
        return "solve the exercise first"
    return ", ".join(f"{value:.0f} {name}" for value, name in zip(result, names, strict=True))


# ------------------------------------------------------------------------------ two texts


def divergence(chosen: str, rejected: str) -> int | None:
    """Number of the first line in which the two differ; None if they are equal."""
    lines = enumerate(zip_longest(chosen.split("\n"), rejected.split("\n")))
    return next((i for i, (ours, theirs) in lines if ours != theirs), None)


def _is_answer(text: str, line: int) -> bool:
    lines = text.split("\n")
    return line < len(lines) and "final answer" in lines[line].lower()


def kind_of_divergence(chosen: str, rejected: str, line: int) -> str:
    """What the rejected completion does at the line where the two diverge, an entry of KINDS."""
    answers = _is_answer(chosen, line), _is_answer(rejected, line)
    kinds = {(False, True): 0, (False, False): 1, (True, True): 2, (True, False): 3}
    return list(KINDS)[kinds[answers]]


def with_divergence(preferences) -> pd.DataFrame:
    """The pairs with `line`, counted from 0, where they diverge, and the `kind` of divergence."""
    frame = preferences.to_pandas()
    texts = list(zip(frame.chosen, frame.rejected, strict=True))
    frame["line"] = [divergence(*two) for two in texts]
    frame["kind"] = [kind_of_divergence(*two, i) for two, i in zip(texts, frame.line, strict=True)]
    return frame


def latest(frame: pd.DataFrame, kind: str) -> pd.Series:
    """The first of the pairs that diverge last, of this kind if there are any."""
    of_kind = frame[frame.kind == kind]
    return frame.loc[(of_kind if len(of_kind) else frame).line.idxmax()]


def kinds_of_divergence(frame: pd.DataFrame) -> str:
    """A table: kinds of divergence, in the first line and later."""
    where = frame.line.gt(0).map({False: "first line", True: "later"})
    table = pd.crosstab(frame.kind, where, margins=True, margins_name="all")
    return table.reindex([*KINDS, "all"], fill_value=0).rename_axis(None, axis=1).to_string()


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
        rows.append(f"<tr><td>{i + 1}</td>{cells}{mark}</tr>")
    head = f"<tr><th>line</th><th {LEFT}>chosen</th><th {LEFT}>rejected</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def side_by_side(chosen: str, rejected: str) -> HTML:
    return HTML(table_of(chosen, rejected))


# ------------------------------------------------------------------------------ figures


def heat_map(graded, n_questions: int = 60):
    """A row per question, a column per completion, blue where correct; sorted, at equal distances."""
    table = graded.to_pandas().pivot(index="id", columns="sample", values="correct")
    table = table.astype(int).loc[table.sum(axis=1).sort_values(kind="stable").index]
    table = table.iloc[:: max(1, len(table) // n_questions)]
    figure, axes = plots.new_figure(5, 6)
    axes.imshow(table, aspect="auto", cmap=ListedColormap([ORANGE, BLUE]), vmin=0, vmax=1)
    axes.grid(False)
    n, rights = table.shape[1], table.sum(axis=1)
    for row in ((rights == 0).sum(), (rights < n).sum()):
        axes.axhline(row - 0.5, color="white", linewidth=4)
    axes.set(xlabel="completion", ylabel="question (sorted)", xticks=range(n))
    handles = [Patch(color=BLUE, label="correct"), Patch(color=ORANGE, label="incorrect")]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncol=2, frameon=False)
    figure.alt_text = (
        f"{len(table)} questions by {n} completions: {(rights == 0).sum()} questions have no correct "
        f"one, {(rights == n).sum()} have only correct ones, and "
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
    samples, lines = np.arange(1, 31), []
    for p, colour in zip((0.02, 0.1, 0.5, 0.95), plots.COLOURS[2:6], strict=True):
        lost = 100 * ((1 - p) ** samples + p**samples)
        lines.append(plots.draw_line(axes, samples, lost, f"p = {p}", colour))
    x, y = list(measured), [100 * share for share in measured.values()]
    axes.plot(x, y, "o", color=ORANGE, markersize=8, label="all questions of this run")
    axes.set(xlabel="completions per question N", ylabel="questions without a pair (%)")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    formulas = "; ".join(f"{line.label}: {line.y[0]:.0f} to {line.y[-1]:.0f}" for line in lines)
    measurements = ", ".join(f"{b:.0f} at N = {a}" for a, b in zip(x, y, strict=True))
    figure.alt_text = (
        f"Questions without a pair (%), N = 1 to 30. {formulas}. Measured: {measurements}."
    )
    return figure


def where_they_diverge(frame: pd.DataFrame):
    """Pairs by the line at which they diverge; colours: what the rejected completion does there."""
    line = frame.line.clip(upper=5) + 1
    counts = pd.crosstab(line, frame.kind).reindex(columns=list(KINDS), fill_value=0)
    figure, axes = plots.new_figure(7, 3.6)
    bottom = np.zeros(len(counts))
    for name, colour in KINDS.items():
        axes.bar(counts.index, counts[name], bottom=bottom, color=colour, label=name)
        bottom += counts[name].to_numpy()
    names = [f"{i} or later" if i == 6 else str(i) for i in counts.index]
    axes.set(xlabel="line at which the pair diverges", ylabel="pairs")
    axes.set_xticks(counts.index, names)
    axes.legend(title="the rejected completion", frameon=False, fontsize=9)
    figure.alt_text = "Pairs by the line at which they diverge: " + "; ".join(
        f"line {names[n]}: " + ", ".join(f"{row[name]} {name}" for name in KINDS)
        for n, (_, row) in enumerate(counts.iterrows())
    )
    return figure
