"""What notebook 02 needs and does not teach: graded completions, reading of equations, the figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pandas as pd
from datasets import load_from_disk
from helpers_common import ROOT, new_completions, run_with
from matplotlib.patches import FancyBboxPatch

from irpo_utils import plots, profiles, tasks
from irpo_utils.plots import BLUE, GREEN, GREY, INK, ORANGE
from irpo_utils.tasks import answers, numbers
from studies.significance import seed_and_question_interval

FIGURES = ROOT / "figures"
STUDY = FIGURES / "lenient_grader.csv"
BEHAVIOURS = ("no working", "partial working", "full working")
GRADERS = {"strict": BLUE, "within 20 %": GREEN, "partial credit": ORANGE}
MEASURES = {
    "correct": "sampled accuracy (%)",
    "no_working": "without working (%)",
    "partial": "partial working, incorrect (%)",
}
EQUATION = re.compile(
    r"(?<![-+*/x×=.\d])(?<![-+*/x×=]\s)"  # not in the middle of a longer sum
    r"(\d[\d,]*\.?\d*)\s*([-+*/x×])\s*\$?(\d[\d,]*\.?\d*)\s*=\s*\$?(-?\d[\d,]*\.?\d*)"
)


# ------------------------------------------------------------------------------ data


def graded_completions(name: str, profile):
    """Graded completions of M_0 for word problems: of your run, the shipped run, or new ones."""
    artefact, small = "iteration_0/graded", profiles.get("cpu")
    if profile.task == small.task and (run := run_with(name, profile, artefact)):
        return load_from_disk(str(run / artefact))
    run = run_with("cpu", small, artefact)
    return load_from_disk(str(run / artefact)) if run else new_completions(small, 200)


def with_questions(graded) -> pd.DataFrame:
    """The completions as a table, with `question` and `gold_steps` (equations of the solution)."""
    task = tasks.get("word_problems")
    rows = {row["id"]: row for split in ("train", "validation") for row in task.load(split)}
    table = graded.to_pandas()
    table["extracted"] = pd.Series(list(graded["extracted"]), dtype=object)  # None: no answer
    table["question"] = [rows[name]["question"] for name in table.id]
    table["gold_steps"] = [len(equations(rows[name]["solution"])) for name in table.id]
    return table


def labelled_forms() -> pd.DataFrame:
    """Completions in the forms that models use, each with a verdict by reading."""
    path = ROOT / "notebooks" / "data" / "graded_forms.jsonl"
    return pd.read_json(path, lines=True, dtype=False)


def records(forms: pd.DataFrame) -> list[dict]:
    """The rows as dicts, as a task gives them: None where a column has no value."""
    return forms.astype(object).where(forms.notna(), None).to_dict("records")


def last_line(completion: str) -> str:
    """The last line, or an empty text."""
    return completion.splitlines()[-1] if completion else ""


def grading_cases() -> pd.DataFrame:
    """Error counts of the package's graders on the second collection, per task."""
    cases = pd.read_csv(FIGURES / "grading_cases.csv")
    cases = cases[cases.kind == "all"].drop(columns="kind")
    cases["label"] = np.where(cases.sure, "clear", "debatable")
    return cases.drop(columns="sure").set_index("task")


def equations(completion: str) -> list[tuple]:
    """[(left, operator, right, result), ...] with exact numbers."""
    return [
        tuple(
            part if part in "-+*/x×" else Fraction(part.replace(",", "").rstrip("."))
            for part in match
        )
        for match in EQUATION.findall(completion)
    ]


def is_true(equation: tuple) -> bool:
    left, operator, right, result = equation
    if operator == "/":
        return right != 0 and left == result * right
    return result == {"+": left + right, "-": left - right}.get(operator, left * right)


def grader_study() -> pd.DataFrame:
    """A row per grader, iteration and measure: `value`, `low`, `high` (over seeds and questions).

    Iteration 0 is M_0, and is there for every grader.
    """
    records = pd.read_csv(STUDY)
    rows = []
    for grader in GRADERS:
        mine = records[records.grader.isin([grader, "none"])]
        for iteration, part in mine.groupby("iteration"):
            for name in ("correct", "near", "no_working", "partial"):
                shares = part.assign(share=part[name] / part.samples)
                matrix = shares.pivot(index="seed", columns="id", values="share").to_numpy()
                value, low, high = seed_and_question_interval(matrix)
                head = {"grader": grader, "iteration": iteration, "measure": name}
                rows.append(head | {"value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def differences(iteration: int, against: str = "strict") -> pd.DataFrame:
    """Each lenient grader minus the strict one, in points with 95 % intervals, same questions."""
    records = pd.read_csv(STUDY)
    records = records[records.iteration == iteration]
    records = records.assign(within=records.correct + records.near)
    rows = {}
    for grader in [name for name in GRADERS if name != against]:
        rows[grader] = {}
        for name, label in (MEASURES | {"within": "at most 20 % off (%)"}).items():
            share = records.assign(share=100 * records[name] / records.samples)
            mine, other = (
                share[share.grader == which].pivot(index="seed", columns="id", values="share")
                for which in (grader, against)
            )
            value, low, high = seed_and_question_interval((mine - other).to_numpy())
            rows[grader][label] = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return pd.DataFrame(rows).T


# ------------------------------------------------------------------------------ figures


def front_end(completion: str) -> plots.TextFigure:
    """One completion on its way through the grader: completion, block, unwrapped text, number."""
    block = answers.after_final_answer(completion)
    unwrapped = answers.read(completion)
    value = numbers.parse(unwrapped or "")
    stages = [
        ("completion", completion),
        ("1 marker, block", block),
        ("2 without wrapping", unwrapped),
        ("3 number", numbers.show(value) if value is not None else None),
    ]
    figure, axes = plots.new_figure(9, 1.9)
    axes.set(xlim=(0, 12.4), ylim=(0, 2.2))
    axes.axis("off")
    for i, ((name, text), left, width) in enumerate(
        zip(stages, (0, 4.3, 7.3, 10.3), (3.7, 2.4, 2.4, 1.7), strict=True)
    ):
        colour = GREY if i == 0 else BLUE
        box = FancyBboxPatch(
            (left + 0.1, 0.2), width, 1.4, boxstyle="round,pad=0.08", fc="white", ec=colour
        )
        axes.add_patch(box)
        axes.text(left + 0.1, 1.85, name, fontsize=9, color=colour, weight="bold")
        shown = "None" if text is None else text
        axes.text(
            left + 0.2,
            0.9,
            shown,
            fontsize=9,
            va="center",
            family="monospace",
            color=INK,
            parse_math=False,
        )
        if i:
            axes.annotate(
                "", (left, 0.9), (left - 0.45, 0.9), arrowprops={"arrowstyle": "->", "color": INK}
            )
    figure.alt_text = "A completion in the grader. " + "; ".join(
        f"{name}: {text!r}" for name, text in stages
    )
    return figure


def reasons(counts: dict[str, int]) -> plots.TextFigure:
    """How many completions got each reason."""
    figure, axes = plots.new_figure(7, 2.2)
    labels = {"ok": "correct", "wrong": "incorrect", "no_answer": "no readable answer"}
    counts = {labels.get(name, name): count for name, count in counts.items()}
    names, total = list(counts)[::-1], sum(counts.values())
    colours = {"correct": BLUE, "incorrect": ORANGE}
    axes.barh(names, [counts[name] for name in names], color=[colours.get(n, GREY) for n in names])
    for i, name in enumerate(names):
        axes.text(counts[name], i, f" {counts[name]} ({counts[name] / total:.1%})", va="center")
    axes.set(
        xlabel=f"number of completions of $M_0$ ({total} in total)",
        xlim=(0, 1.25 * max(counts.values())),
    )
    figure.alt_text = f"Reasons of {total} completions: " + ", ".join(
        f"{name} {count}" for name, count in counts.items()
    )
    return figure


def grader_errors(errors: pd.DataFrame, correct: pd.Series) -> plots.TextFigure:
    """False positives and false negatives of some graders (index), and the numbers of labels."""
    figure, axes = plots.new_figure(7, 2.8)
    places, height = np.arange(len(errors))[::-1], 0.38
    for shift, name, colour in (
        (height / 2, "false positives", ORANGE),
        (-height / 2, "false negatives", GREY),
    ):
        axes.barh(places + shift, errors[name], height, color=colour, label=name)
        for place, count in zip(places, errors[name], strict=True):
            axes.text(count, place + shift, f" {count}", va="center")
    axes.set_yticks(places, errors.index)
    labels = f"{correct.sum()} correct and {(~correct).sum()} incorrect"
    axes.set(xlabel=f"number of errors on {labels} labelled completions")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncol=2)
    figure.alt_text = f"Errors on {labels} labelled completions: " + "; ".join(
        f"{grader}: " + ", ".join(f"{row[name]} {name}" for name in errors.columns)
        for grader, row in errors.iterrows()
    )
    return figure


def behaviours(table: pd.DataFrame) -> plots.TextFigure:
    """Completions by what working they show, and whether they are correct."""
    counts = pd.crosstab(table.behaviour, table.correct).reindex(index=BEHAVIOURS, fill_value=0)
    counts = counts.reindex(columns=[True, False], fill_value=0)
    figure, axes = plots.new_figure(7, 2.4)
    names = list(BEHAVIOURS)[::-1]
    left = np.zeros(len(names))
    for correct, colour in ((True, BLUE), (False, ORANGE)):
        widths = counts.loc[names, correct].to_numpy()
        label = "correct" if correct else "incorrect"
        axes.barh(names, widths, left=left, color=colour, label=label)
        left += widths
    for i, name in enumerate(names):
        correct, incorrect = counts.loc[name, True], counts.loc[name, False]
        axes.text(left[i], i, f" {correct} correct of {correct + incorrect}", va="center")
    axes.set(xlabel="number of completions of $M_0$", xlim=(0, 1.35 * left.max()))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncol=2)
    figure.alt_text = "Completions by behaviour: " + "; ".join(
        f"{name}: {counts.loc[name, True]} correct, {counts.loc[name, False]} incorrect"
        for name in BEHAVIOURS
    )
    return figure


def share_with_interval(rows: pd.DataFrame, column: str) -> tuple[float, float, float]:
    """(share, low, high) of a true/false column; the bootstrap resamples the questions (`id`)."""
    groups = rows.groupby("id")[column]
    true, total = groups.sum().to_numpy(), groups.size().to_numpy()
    picks = np.random.default_rng(0).integers(len(total), size=(2000, len(total)))
    low, high = np.percentile(true[picks].sum(1) / total[picks].sum(1), (2.5, 97.5))
    return true.sum() / total.sum(), low, high


def luck(groups: dict[str, pd.DataFrame]) -> plots.TextFigure:
    """The lucky share of each group of rows with `id` and `lucky`, with 95 % intervals."""
    figure, axes = plots.new_figure(7.5, 2)
    said = []
    for i, rows in enumerate(groups.values()):
        share, low, high = (100 * x for x in share_with_interval(rows, "lucky"))
        error = [[share - low], [high - share]]
        axes.barh(-i, share, xerr=error, color=ORANGE, height=0.6, ecolor=INK, capsize=3)
        said.append(f"{share:.0f} % ({low:.0f} to {high:.0f}) of {len(rows)}")
        axes.text(high + 1, -i, f" {said[-1]}", va="center")
    axes.set_yticks([-i for i in range(len(groups))], list(groups))
    axes.set(xlabel="lucky: correct letter, incorrect number (%, 95 % interval)", xlim=(0, 100))
    figure.alt_text = "Correct letter with an incorrect number: " + "; ".join(
        f"{name}: {text}" for name, text in zip(groups, said, strict=True)
    )
    return figure


def what_graders_teach(study: pd.DataFrame) -> plots.TextFigure:
    """Accuracy and two behaviours per iteration, a line per grader, with 95 % intervals."""
    figure, panels = plots.new_figure(10.5, 3.4, panels=len(MEASURES))
    lines = {}
    for axes, (name, label) in zip(panels, MEASURES.items(), strict=True):
        lines[label] = []
        for grader, colour in GRADERS.items():
            rows = study[(study.grader == grader) & (study.measure == name)]
            band = 100 * rows.low.to_numpy(), 100 * rows.high.to_numpy()
            line = plots.draw_points(
                axes, rows.iteration, 100 * rows.value, grader, colour, band=band
            )
            lines[label].append(line)
        ticks = sorted(study.iteration.unique())
        axes.set_xticks(ticks, [f"$M_{t}$" for t in ticks])
        axes.set(ylabel=label, ylim=(0, 72))
    panels[0].legend(frameon=False, loc="upper left")
    figure.alt_text = "What graders teach, per iteration. " + " ".join(
        f"{label}: " + "; ".join(f"{line.label}: {line.numbers}" for line in group) + "."
        for label, group in lines.items()
    )
    return figure
