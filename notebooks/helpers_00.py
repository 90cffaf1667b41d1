"""What notebook 00 needs and does not teach: finding a finished run, and its figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from irpo_utils import plots, profiles
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, GREEN, GREY, INK, ORANGE

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "figures"
STAGES = {"samples": "sampling", "graded": "grading", "pairs": "pairing", "adapter": "training"}


def finished_run(name: str) -> Path:
    """Your finished run of this profile, else the shipped one, else a new run of `smoke`."""
    for run in (ROOT / "runs" / name, ROOT / "notebooks" / "shipped_run"):
        if (run / "profile.json").exists():
            last = runs.read_profile(run).iterations
            if (run / f"iteration_{last}" / "metrics.json").exists():
                return run
    run = Path(tempfile.mkdtemp(), "smoke")
    runs.run(profiles.get("smoke"), run, progress=False)
    return run


def show(completion: str) -> str:
    """A completion on one line; of a long one the end."""
    return " / ".join(completion.splitlines())[-90:]


# ------------------------------------------------------------------------------ figures


def loop_diagram(question: str, completions: list[dict], n_pairs: int):
    """The six steps as boxes, with the numbers and the first pair of one question below."""
    n_samples, n_correct = len(completions), sum(row["correct"] for row in completions)
    figure, axes = plots.new_figure(9, 4)
    axes.set(xlim=(0, 100), ylim=(-9, 40))
    axes.axis("off")
    boxes = [
        ("1 sample", f"{n_samples} completions\nfrom $M_t$"),
        ("2 grade", f"{n_correct} correct,\n{n_samples - n_correct} incorrect"),
        ("3 pair", f"{n_pairs} pairs of\nchosen, rejected"),
        ("4 train", "DPO + NLL,\nreference $M_t$"),
        ("5 evaluate", "$M_{t+1}$ on\nother questions"),
    ]
    for i, (name, below) in enumerate(boxes):
        left = 1 + 20 * i
        box = FancyBboxPatch(
            (left, 16), 15, 9, boxstyle="round,pad=0.8", facecolor="#DCEBF7", edgecolor=BLUE
        )
        axes.add_patch(box)
        axes.text(left + 7.5, 20.5, name, ha="center", va="center", fontsize=11, color=INK)
        axes.text(left + 7.5, 9, below, ha="center", va="center", fontsize=9, color=INK)
        if i:
            axes.add_patch(_arrow((left - 4.2, 20.5), (left - 0.9, 20.5)))
    axes.add_patch(_arrow((88.5, 26), (8.5, 26), "arc3,rad=0.12"))
    axes.text(48, 36.5, "6 repeat: $M_{t+1}$ becomes $M_t$", ha="center", fontsize=10, color=INK)
    good, bad = (
        next(show(row["completion"]) for row in completions if row["correct"] is correct)
        for correct in (True, False)
    )
    axes.text(1, 1, f"the question: {question}", fontsize=8, color=INK, wrap=True)
    axes.text(1, -4, f"first pair, chosen:   {good}", fontsize=8, color=BLUE)
    axes.text(1, -8, f"first pair, rejected: {bad}", fontsize=8, color=ORANGE)
    figure.alt_text = (
        f"The loop of Iterative RPO for one question: {n_samples} completions are sampled, "
        f"{n_correct} are correct and {n_samples - n_correct} incorrect, they give {n_pairs} pairs, "
        "training makes M_(t+1), which is evaluated on other questions and samples next. "
        f"In the first pair the chosen completion is {good}, and the rejected one is {bad}."
    )
    return figure


def _arrow(start, end, style="arc3"):
    return FancyArrowPatch(
        start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=12, color=INK
    )


def lines_by_verdict(graded):
    """How many completions have 1, 2, ... lines, correct and incorrect ones."""
    table = graded.to_pandas()
    lines = table.completion.str.strip().str.count("\n").add(1).clip(upper=6)
    counts = pd.crosstab(lines, table.correct).reindex(columns=[True, False], fill_value=0)
    figure, axes = plots.new_figure(6.5, 3)
    axes.bar(counts.index, counts[True], color=BLUE, label="correct")
    axes.bar(counts.index, counts[False], bottom=counts[True], color=ORANGE, label="incorrect")
    names = [f"{n}" if n < 6 else "6 or more" for n in counts.index]
    axes.set_xticks(counts.index, names)
    axes.set(xlabel="number of lines in the completion", ylabel="number of completions")
    axes.legend(frameon=False)
    figure.alt_text = "Completions by number of lines: " + "; ".join(
        f"{name}: {row[True]} correct, {row[False]} incorrect"
        for name, (_, row) in zip(names, counts.iterrows(), strict=True)
    )
    return figure


def twenty_steps(log):
    """The log-probabilities of chosen and rejected completions over the steps."""
    table = log.to_pandas()
    assert table.loss_dpo.iloc[0] > table.loss_dpo.iloc[-1]
    figure, axes = plots.new_figure(6.5, 3)
    lines = [
        plots.draw_line(axes, table.step, table[f"logps/{side}"], side, colour)
        for side, colour in (("chosen", BLUE), ("rejected", ORANGE))
    ]
    axes.set(xlabel="optimiser step", ylabel="log-probability (nats)", xticks=range(2, 21, 2))
    axes.margins(x=0.02)
    return plots.finish(figure, "Four pairs in twenty steps", {"log-probability, nats": lines})


def toy(shares: list[float], accuracies: list[float], ceiling: float):
    """Share of careful completions and accuracy of the toy model over iterations."""
    figure, axes = plots.new_figure(6.5, 3)
    steps = range(len(shares))
    lines = [
        plots.draw_points(axes, steps, [100 * x for x in values], label, colour)
        for label, values, colour in (("careful", shares, GREEN), ("accuracy", accuracies, BLUE))
    ]
    axes.axhline(100 * ceiling, color=GREY, linestyle=":")
    axes.text(0, 100 * ceiling - 1, f"ceiling {100 * ceiling:.0f} %", va="top", color=GREY)
    axes.set(xlabel="iteration", ylabel="careful completions,\naccuracy (%)", ylim=(0, 104))
    axes.set_xticks(list(steps))
    return plots.finish(figure, f"Toy model, ceiling {100 * ceiling:.0f} %", {"percent": lines})


def two_learning_rates():
    """(figure, table): greedy accuracy of the `cpu` profile at two learning rates, five seeds."""
    sys.path.append(str(ROOT / "scripts"))  # the package `studies`
    from studies import figures

    means = figures.of_two_learning_rates(FIGURES)
    table = means.assign(
        text=[
            f"{100 * row.value:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
            for row in means.itertuples()
        ]
    ).pivot(index="iteration", columns="learning_rate", values="text")
    table = table[["2e-5", "1e-4"]].rename(index="M_{}".format).rename_axis(None, axis="index")
    return figures.accuracy_at_rates(means), table.rename_axis(None, axis="columns")
