"""What notebooks 04 and 04b need and do not teach: the model, its pairs, and the figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from datasets import load_from_disk
from helpers_common import ROOT, new_completions, run_with
from matplotlib.patches import FancyBboxPatch, Patch

from irpo_utils import models, pairs, plots
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, GREEN, GREY, INK, ORANGE
from studies.significance import seed_and_question_interval

STUDY = ROOT / "figures" / "pair_log_probabilities.jsonl"
HELD_OUT = ROOT / "figures" / "pair_log_probabilities_pairs.jsonl"
STYLES = {"DPO": (ORANGE, ":"), "DPO + NLL": (BLUE, "-"), "SFT": (GREEN, "--")}


# ------------------------------------------------------------------------------ model and pairs


def first_pairs(name: str, profile):
    """The pairs of M_0: of the reader's run of this profile, else of the shipped run, else new."""
    artefact = "iteration_0/pairs"
    if run := run_with(name, profile, artefact):
        return load_from_disk(str(run / artefact))
    return pairs.build_pairs(new_completions(profile, 64), k=profile.k_pairs)[0]


def load_m0(profile):
    """M_0 with its tokenizer, and the trainer class for it."""
    model, tokenizer = runs.load_model(profile)
    models.set_adapter(model, None)
    return model, tokenizer, runs.engine_of(profile).trainer(model)


def show(pair: dict) -> None:
    """Print the question, the chosen and the rejected completion."""
    question = pair["prompt"].split("Question: ")[-1].split("\nSolution")[0]
    print("question\n  " + question)
    for side in ("chosen", "rejected"):
        print(side + "\n  " + pair[side].strip().replace("\n", "\n  "))


# ------------------------------------------------------------------------------ the study's file


def study() -> list[dict]:
    """The runs of scripts/studies/pair_log_probabilities.py."""
    return [json.loads(line) for line in STUDY.read_text().splitlines()]


def held_out_pairs() -> list[dict]:
    """The 256 pairs on which they were measured."""
    return [json.loads(line) for line in HELD_OUT.read_text().splitlines()]


def changes(records, method: str, learning_rate: float, side: str, at: int = -1) -> np.ndarray:
    """Log-probability of every held-out pair after training minus before, (seeds, pairs), nats."""
    chosen = [
        record[side]
        for record in sorted(records, key=lambda record: record["seed"])
        if (record["method"], record["learning_rate"]) == (method, learning_rate)
    ]
    return np.array([np.subtract(values[at], values[0]) for values in chosen])


def interval(values) -> str:
    """Mean over seeds and pairs, its 95 % interval, and whether the values rise or fall."""
    mean, low, high = seed_and_question_interval(values)
    verdict = "rises" if low > 0 else "falls" if high < 0 else "not resolved"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}) {verdict}"


def claim(text: str, values, expected: str) -> None:
    """Print a claim, the change (seeds, pairs) that it is about, and whether the data agree."""
    change, verdict = interval(values).split(") ")
    agrees = {expected: "yes", "not resolved": "not resolved"}.get(verdict, f"no, it {verdict}")
    print(f"  {text:48} {change + ')':26} {agrees}")


# ------------------------------------------------------------------------------ figures of 04


def loss_and_slope(betas=(0.05, 0.1, 0.5)) -> plots.TextFigure:
    """-log sigma(beta * delta), and the size of its slope."""
    figure, (left, right) = plots.new_figure(9.6, 3.6, panels=2)
    delta = np.linspace(-40, 40, 161)
    losses, slopes = [], []
    for beta, colour in zip(betas, (GREEN, BLUE, ORANGE), strict=True):
        name, h = f"β = {beta}", beta * delta
        loss = plots.draw_line(left, delta, np.logaddexp(0, -h), name, colour)
        slope = plots.draw_line(right, delta, beta / (1 + np.exp(h)), name, colour)
        losses.append(loss._replace(numbers=f"{loss.y[0]:.2f} at -40, {loss.y[-1]:.2f} at 40"))
        slopes.append(slope._replace(numbers=f"{slope.y[0]:.3f} at -40, {slope.y[-1]:.3f} at 40"))
    left.plot(0, np.log(2), "o", color=INK, markersize=6)
    plots.annotate(left, "ln 2 at δ = 0", (0, np.log(2)), offset=8, va="bottom")
    left.set(xlabel="δ (nats)", ylabel="−log σ(βδ)", ylim=(0, 6))
    right.set(xlabel="δ (nats)", ylabel="Size of the slope, β σ(−βδ)")
    title = "DPO loss of a pair over δ; ln 2 = 0.69 at δ = 0 for every β"
    return plots.finish(figure, title, {"loss": losses, "size of the slope": slopes})


def gradient_arrows(beta: float, deltas=(-20.0, 0.0, 20.0)) -> plots.TextFigure:
    """How far one pair raises its chosen and lowers its rejected log-probability."""
    figure, axes = plots.new_figure(6.6, 3.4)
    sizes = []
    for i, delta in enumerate(deltas):
        size = beta / (1 + np.exp(beta * delta))
        sizes.append(f"{size:.3f} at δ = {delta:.0f}")
        for x, sign, colour in ((i - 0.13, 1, BLUE), (i + 0.13, -1, ORANGE)):
            style = {"arrowstyle": "-|>", "color": colour, "linewidth": 3, "mutation_scale": 13}
            style |= {"shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, sign * size), (x, 0), arrowprops=style)
        plots.annotate(axes, f"{size:.3f}", (i - 0.13, size / 2), offset=-38)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlim=(-0.6, len(deltas) - 0.4), ylim=(-1.1 * beta, 1.1 * beta))
    order = {-1: "in reverse order", 0: "equal", 1: "in the correct order"}
    names = [f"δ = {x:.0f}\nimplied rewards\n{order[int(np.sign(x))]}" for x in deltas]
    axes.set_xticks(range(len(deltas)), names)
    axes.set_ylabel("Minus the gradient (per nat)")
    handles = [Patch(color=BLUE, label="chosen"), Patch(color=ORANGE, label="rejected")]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    figure.alt_text = (
        "Arrows: a pair raises its chosen and lowers its rejected log-probability with equal "
        f"size, β σ(−βδ): {', '.join(sizes)}."
    )
    return figure


def toy_probabilities(runs: dict[str, np.ndarray]) -> plots.TextFigure:
    """Probabilities of the three toy completions over training; name -> (steps, 3)."""
    figure, axes = plots.new_figure(4.4 * len(runs) + 0.8, 3.4, panels=len(runs))
    panels = {}
    for panel, (name, rows) in zip(axes, runs.items(), strict=True):
        styles = (("chosen", BLUE), ("rejected", ORANGE), ("third", GREY))
        lines = [
            plots.draw_line(panel, range(len(rows)), 100 * rows[:, i], label, colour)
            for i, (label, colour) in enumerate(styles)
        ]
        panel.set(title=name, xlabel="Step", ylim=(0, 102))
        panels[name] = lines
    axes[0].set_ylabel("Probability (%)")
    title = "Probabilities (%) of three completions in a toy model, first and last step"
    return plots.finish(figure, title, panels)


def padding_grid(batch: dict, words: list[str]) -> plots.TextFigure:
    """The token grid of `pad_batch`: padding, prompt and completion, and which logits are used."""
    ids, attention = batch["input_ids"], batch["attention_mask"]
    rows, columns = ids.shape
    first = columns - batch["response_mask"].shape[1]
    figure, axes = plots.new_figure(1.0 * columns + 0.6, 0.62 * rows + 1.5)
    colours = {"padding": "#EEEEEE", "prompt": "#BFDDF0", "completion": "#F6CBA6"}
    for row in range(rows):
        for column in range(columns):
            used = bool(attention[row, column])
            kind = "padding" if not used else "prompt" if column < first else "completion"
            place = (column - 0.46, row - 0.42)
            shape = FancyBboxPatch(place, 0.92, 0.84, "round,pad=0,rounding_size=0.08")
            shape.set(facecolor=colours[kind], edgecolor=GREY, linewidth=0.6)
            axes.add_patch(shape)
            word = words[int(ids[row, column])]
            axes.text(column, row, word, ha="center", va="center", fontsize=10, color=INK)
    for column in range(first - 1, columns - 1):  # these logits predict the next column
        style = {"arrowstyle": "-|>", "color": GREY, "connectionstyle": "arc3,rad=-0.35"}
        axes.annotate("", (column + 1, -0.5), (column, -0.5), arrowprops=style)
    axes.text(first - 0.5, -1.12, "logits predict the next column", ha="left", fontsize=9)
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -1.3))
    axes.set_xticks(range(columns), [f"column {i}" for i in range(columns)], fontsize=8)
    axes.set_yticks(range(rows), [f"row {i}" for i in range(rows)])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    handles = [Patch(facecolor=c, edgecolor=GREY, label=k) for k, c in colours.items()]
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    masks = "; ".join(" ".join(map(str, row)) for row in batch["response_mask"].tolist())
    figure.alt_text = (
        f"{rows} rows of {columns} columns. Prompts end in column {first - 1}, completions begin "
        f"in column {first}. Mask of the completion columns: {masks}. The logits of columns "
        f"{first - 1} to {columns - 2} predict columns {first} to {columns - 1}."
    )
    return figure


def batches_and_probe(log, probed, beta: float) -> plots.TextFigure:
    """Left: the terms of every training batch. Right: the same pairs throughout, change and margin."""
    figure, (left, middle, right) = plots.new_figure(12, 3.6, panels=3)
    batches = [
        plots.draw_line(left, log["step"], log[column], name, colour)
        for column, name, colour in (
            ("loss_dpo", "DPO term", BLUE),
            ("loss_nll", "NLL term", GREEN),
        )
    ]
    batches = [line._replace(numbers=f"{line.y[0]:.2f} to {line.y[-1]:.2f}") for line in batches]
    changes = {
        side: probed[f"logps/{side}"] - probed[f"logps/{side}"].iloc[0]
        for side in ("chosen", "rejected")
    }
    sides = [
        plots.draw_line(middle, probed["step"], changes[side], side, colour)
        for side, colour in (("chosen", BLUE), ("rejected", ORANGE))
    ]
    h = beta * (changes["chosen"] - changes["rejected"])
    margin = plots.draw_line(right, probed["step"], h, "margin", INK)
    middle.axhline(0, color=GREY, linewidth=0.8)
    left.set(title="Training batches", ylabel="Loss per pair", ylim=(0, None))
    middle.set(title="Probe", ylabel="Change of log-probability (nats)")
    right.set(title="Probe", ylabel="Mean reward margin βδ")
    for axes in figure.axes:
        axes.set_xlabel("Optimiser step")
    panels = {"Training batches": batches, "Change on the probe": sides, "Margin": [margin]}
    return plots.finish(figure, "A training run, first and last", panels)


def chosen_with_band(records, rates) -> plots.TextFigure:
    """Change of the chosen completions over steps, with 95 % intervals over seeds and pairs."""
    figure, axes = plots.new_figure(4.6 * len(rates) + 1.2, 3.8, panels=len(rates))
    panels = {}
    for panel, rate in zip(axes, rates, strict=True):
        lines = []
        for method, (colour, dashes) in reversed(STYLES.items()):  # the dotted line on top
            of_method = [r for r in records if (r["method"], r["learning_rate"]) == (method, rate)]
            steps = of_method[0]["steps"]
            rows = [
                seed_and_question_interval(changes(records, method, rate, "chosen", at))
                for at in range(len(steps))
            ]
            mean, low, high = np.array(rows).T
            panel.fill_between(steps, low, high, color=colour, alpha=0.08, linewidth=0)
            for edge in (low, high):
                panel.plot(steps, edge, color=colour, linewidth=0.8, linestyle=dashes)
            line = plots.draw_line(panel, steps, mean, method, colour, linestyle=dashes)
            numbers = f"{mean[-1]:.2f} ({low[-1]:.2f} to {high[-1]:.2f})"
            lines.append(line._replace(numbers=numbers))
        panel.axhline(0, color=INK, linewidth=0.8)
        panel.set(title=f"learning rate {rate:.0e}", xlabel="Optimiser step")
        panels[f"learning rate {rate:.0e}"] = lines
    axes[0].set_ylabel("Change of chosen (nats)")
    title = "Mean change of the chosen log-probability, last step with its 95 % interval (nats)"
    return plots.finish(figure, title, panels)


def change_histogram(records, rate: float, methods=tuple(STYLES)) -> plots.TextFigure:
    """The change of every chosen completion, with counts on a log axis; mean and median marked."""
    figure, axes = plots.new_figure(3.8 * len(methods), 3.6, panels=len(methods))
    sentences = []
    everything = np.concatenate([changes(records, m, rate, "chosen").ravel() for m in methods])
    bins = np.linspace(np.floor(everything.min()), np.ceil(everything.max()), 41)
    for panel, method in zip(axes, methods, strict=True):
        values = changes(records, method, rate, "chosen").ravel()
        panel.hist(values, bins=bins, color=STYLES[method][0], log=True)
        mean, median = values.mean(), np.median(values)
        panel.axvline(mean, color=INK, linewidth=1.5, label=f"mean {mean:+.2f}")
        panel.axvline(
            median, color=INK, linewidth=1.5, linestyle=":", label=f"median {median:+.2f}"
        )
        panel.legend(frameon=False, fontsize=9, loc="upper left")
        panel.set(title=f"{method}, {rate:.0e}", xlabel="Change of a chosen completion (nats)")
        panel.sharey(axes[0])
        sentences.append(
            f"{method}: mean {mean:.2f}, median {median:.2f}, smallest {values.min():.1f}, "
            f"largest {values.max():.1f}, {100 * (values > 0).mean():.0f} % rise."
        )
    axes[0].set_ylabel("Completions × seeds (log scale)")
    figure.alt_text = f"Change per chosen completion (nats). {' '.join(sentences)}"
    return figure


# ------------------------------------------------------------------------------ figures of 04b


def nf4_levels(scaled: torch.Tensor, levels: torch.Tensor) -> plots.TextFigure:
    """The sixteen levels over a histogram of weights that are divided by the absmax of a block."""
    figure, axes = plots.new_figure(7.6, 3.6)
    share = axes.hist(scaled.flatten().numpy(), bins=81, density=True, color="#BFDDF0")[0]
    for level in levels.tolist():
        axes.axvline(level, color=ORANGE, linewidth=1.4)
    handles = [Patch(color="#BFDDF0", label="weights"), Patch(color=ORANGE, label="levels")]
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=2, loc="outside upper center")
    axes.set(xlabel="Weight / absmax of its block", ylabel="Density", xlim=(-1.05, 1.05))
    near = ((scaled.abs() < 0.5).float().mean() * 100).item()
    inner = int((levels.abs() < 0.5).sum())
    figure.alt_text = (
        f"Histogram of scaled weights, highest density {share.max():.1f}; {near:.0f} % lie between "
        f"-0.5 and 0.5, and so do {inner} of the {len(levels)} levels of NF4."
    )
    return figure


def lora_diagram(d_in: int, d_out: int, r: int) -> plots.TextFigure:
    """A linear layer with its adapter: the frozen weight, and A and B next to it."""
    figure, axes = plots.new_figure(6.6, 3.8)
    boxes = {
        f"input x\n({d_in})": (0.05, 0.42, 0.14, 0.16, "#EEEEEE"),
        f"W, frozen, 4 bits\n({d_out}, {d_in})": (0.36, 0.62, 0.30, 0.28, "#BFDDF0"),
        f"A, trained\n({r}, {d_in})": (0.32, 0.12, 0.17, 0.20, "#F6CBA6"),
        f"B, trained\n({d_out}, {r})": (0.56, 0.12, 0.17, 0.20, "#F6CBA6"),
        f"output y\n({d_out})": (0.84, 0.42, 0.14, 0.16, "#EEEEEE"),
    }
    for text, (x, y, width, height, colour) in boxes.items():
        shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.02")
        shape.set(facecolor=colour, edgecolor=GREY)
        axes.add_patch(shape)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)
    arrows = [
        ((0.19, 0.52), (0.36, 0.76)),
        ((0.19, 0.48), (0.32, 0.22)),
        ((0.49, 0.22), (0.56, 0.22)),
        ((0.66, 0.76), (0.77, 0.55)),
        ((0.73, 0.22), (0.77, 0.45)),
        ((0.79, 0.50), (0.84, 0.50)),
    ]
    for start, end in arrows:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK})
    axes.text(0.775, 0.50, "+", ha="center", va="center", fontsize=16)
    axes.text(0.77, 0.27, "× a / r", ha="left", va="center", fontsize=10)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    figure.alt_text = (
        f"A LoRA layer: the input of size {d_in} goes through the frozen 4-bit weight of shape "
        f"({d_out}, {d_in}) and, in parallel, through A ({r}, {d_in}) and B ({d_out}, {r}), whose "
        f"product is scaled by a / r; the sum is the output of size {d_out}."
    )
    return figure
