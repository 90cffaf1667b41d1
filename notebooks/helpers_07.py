"""What notebooks 07 and 07b need and do not teach: runs to read or to kill, and the figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import load_from_disk
from helpers_common import finished_stages  # noqa: F401

from irpo_utils import UserError, evaluation, models, plots, tasks
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, GREEN, GREY, INK, ORANGE

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "figures"
EASY_QUESTIONS = str(ROOT / "notebooks" / "data" / "easy_questions.jsonl")
CURVE = "real_curve"  # the real runs in figures/
METHODS = {"irpo": "Iterative RPO", "star": "RFT", "iterative_dpo": "DPO without NLL"}
TINY = "--iterations 1 --n-questions 24 --n-eval-questions 20 --eval-samples-ends 2".split()


# ------------------------------------------------------------------------------ machines


def driver() -> str:
    """Name, driver and memory of the first GPU as nvidia-smi reports them."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver here: the cells below run on the CPU"
    asked = "name,driver_version,memory.total"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    return (found.stdout or found.stderr).strip().split("\n")[0]


def start_run(out: Path) -> subprocess.Popen:
    """`python -m irpo_utils run` with the miniature model, in a separate process."""
    command = [sys.executable, "-m", "irpo_utils", "run", "--profile", "smoke", *TINY]
    command += ["--out", str(out), "--quiet", "--ignore-plan"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def wait_for_stage(process: subprocess.Popen, stage: Path, seconds: float = 600) -> None:
    """Return when the run has stored this stage, or has ended."""
    end = time.monotonic() + seconds
    while not (stage / "checksums.json").exists() and process.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{stage.name} was not finished within {seconds:.0f} seconds")
        time.sleep(0.02)


# ------------------------------------------------------------------------------ models and runs


def two_blocks(name: str) -> str:
    """A folder with the first two blocks of a model, or "seed" if the model is not here.

    It has the model's tokenizer and chat template, and its completions make no sense.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        path, folder = models.find(name), tempfile.mkdtemp()
        AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=2).save_pretrained(folder)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    except OSError:
        return "seed"
    return folder


def own_run(*names: str) -> Path | None:
    """The first of your runs `runs/NAME` that has results; it need not be finished."""
    found = [ROOT / "runs" / name for name in names]
    return next((run for run in found if (run / "metrics.csv").exists()), None)


def stored(name: str) -> tuple[pd.DataFrame, dict]:
    """(metrics, record) of a run in figures/; the record has its settings and its environment."""
    record = json.loads((FIGURES / f"{name}.json").read_text())
    return pd.read_csv(FIGURES / f"{name}.csv"), record


def result(run: Path | None) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """(metrics, paired gains in points, description) of your run; None: of the stored run."""
    if run is None:
        return stored_curve()
    metrics, settings = pd.read_csv(run / "metrics.csv"), vars(runs.read_profile(run))
    gains = _gains(run, int(metrics.iteration.max()))
    return metrics, gains, f"{described(settings, metrics)}\n(runs/{run.name})"


def described(settings: dict, metrics: pd.DataFrame) -> str:
    """The size of a run in words."""
    asked = metrics[metrics.metric == "greedy"].n.iloc[0]
    return (
        f"{settings['model']} on {settings['task']}: {settings['n_questions']} training questions "
        f"x {settings['n_samples']} samples, {asked:.0f} {settings['eval_split']} questions, seed "
        f"{settings['seed']}, learning rate {settings['learning_rate']:g}, from "
        f"{settings['start'] or 'the published model'}"
    )


def stored_curve() -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Like `result`: Iterative RPO with seed 0 in figures/real_curve*."""
    table = pd.read_csv(FIGURES / f"{CURVE}.csv")
    metrics = table[(table.method == "irpo") & (table.seed == 0)]
    lines = map(json.loads, (FIGURES / f"{CURVE}_runs.jsonl").read_text().splitlines())
    record = next(line for line in lines if (line["trial"], line["seed"]) == ("irpo", 0))
    made, minutes = record["environment"], metrics.seconds.max() / 60
    source = f"figures/{CURVE}.csv, {minutes:.0f} minutes on {made['threads']} core of an "
    source += made["processor"]
    paired, last = pd.read_csv(FIGURES / f"{CURVE}_by_seed.csv"), metrics.iteration.max()
    rows = paired[(paired.method == "irpo") & (paired.against == "irpo") & (paired.seed == 0)]
    rows = rows.assign(whole=rows.against_iteration != rows.iteration - 1)
    rows = rows[~rows.whole | ((rows.against_iteration == 0) & (rows.iteration == last))]
    gains = [
        _gain(row.metric, row.against_iteration, row.iteration, (row.difference, row.low, row.high))
        for row in rows.sort_values(["metric", "whole", "iteration"]).itertuples()
    ]
    return metrics, pd.DataFrame(gains), f"{described(record['profile'], metrics)}\n({source})"


def _gains(run: Path, last: int) -> pd.DataFrame:
    """Each step of a run and its whole, paired by question."""
    steps = [(t - 1, t) for t in range(1, last + 1)] + ([(0, last)] if last > 1 else [])
    rows = []
    for metric in ("greedy", "sampled"):
        correct = []
        for t in range(last + 1):
            graded = load_from_disk(str(run / f"iteration_{t}" / "evaluation" / metric))
            correct.append(list(evaluation.correct_per_question(graded).values()))
        for a, b in steps:
            rows.append(_gain(metric, a, b, evaluation.paired_difference(correct[a], correct[b])))
    return pd.DataFrame(rows)


def _gain(metric: str, before: int, after: int, interval) -> dict:
    points, low, high = (100 * float(x) for x in interval)
    numbers = {"gain (points)": points, "low": low, "high": high}
    verdict = "resolved" if low > 0 or high < 0 else "not resolved"
    return {"accuracy": metric, "models": f"M_{before} to M_{after}", **numbers, "": verdict}


def curve_of_methods() -> plots.TextFigure:
    """Greedy and sampled accuracy of every method of the stored study, means over its seeds."""
    sys.path.append(str(ROOT / "scripts"))  # the package `studies`
    from studies import figures

    means = pd.read_csv(FIGURES / f"{CURVE}_mean.csv")
    return figures.accuracy_of_methods(means.assign(method=means.method.map(METHODS)))


def ahead_of_others(metric: str = "sampled") -> pd.DataFrame:
    """Iterative RPO minus each other method in points, paired by question, by seed.

    The rows of all seeds together resample seeds and questions.
    """
    together = pd.read_csv(FIGURES / f"{CURVE}_paired.csv")
    together = together[together.seeds > 1].assign(seed="all")
    table = pd.concat([pd.read_csv(FIGURES / f"{CURVE}_by_seed.csv"), together])
    rows = table[(table.metric == metric) & (table.method == "irpo") & (table.against != "irpo")]
    shown = {
        "accuracy": rows.metric,
        "Iterative RPO minus": rows.against.map(METHODS),
        "model": "M_" + rows.iteration.astype(str),
        **{name: 100 * rows[name] for name in ("difference", "low", "high")},
        "seed": rows.seed,
        "": np.where((rows.low > 0) | (rows.high < 0), "resolved", "not resolved"),
    }
    return (
        pd.DataFrame(shown)
        .sort_values(
            ["Iterative RPO minus", "seed", "model"], key=lambda column: column.astype(str)
        )
        .reset_index(drop=True)
    )


def last_completions(*found: Path | None):
    """Graded greedy completions of the last model of the first run that is there."""
    run = next(run for run in found if run is not None)
    last = int(pd.read_csv(run / "metrics.csv").iteration.max())
    return load_from_disk(str(run / f"iteration_{last}" / "evaluation" / "greedy"))


# ------------------------------------------------------------------------------ figures


def memory_bars(table: pd.DataFrame) -> plots.TextFigure:
    """Stacked bars: a row of `table` (bytes) is a stage, a column is a part of memory."""
    figure, axes = plots.new_figure(8.4, 0.55 * len(table) + 1.3)
    left, colours = np.zeros(len(table)), (BLUE, GREY, GREEN, "#CC79A7", ORANGE)
    for (part, column), colour in zip(table.items(), colours, strict=True):
        width = column.fillna(0).to_numpy() / 1e9
        axes.barh(range(len(table)), width, left=left, color=colour, label=part, height=0.65)
        left += width
    for y, end in enumerate(left):
        plots.annotate(axes, f"{end:.1f}", (end, y), offset=4)
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    axes.set(xlabel="Memory (GB)", xlim=(0, 1.08 * left.max()))
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=len(table.columns),
        loc="lower right",
        bbox_to_anchor=(1, 1),
    )
    sentences = []
    for name, row in table.iterrows():
        parts = ", ".join(f"{part} {x / 1e9:.1f}" for part, x in row.dropna().items())
        sentences.append(f"{name}: {parts}.")
    figure.alt_text = f"Memory in GB by part. {' '.join(sentences)}"
    return figure


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def hours_bars(table: pd.DataFrame) -> plots.TextFigure:
    """Planned hours: a panel for each profile (column), a bar for each GPU; NaN does not fit."""
    width = 3.4 * len(table.columns) + 1.2
    figure, panels = plots.new_figure(width, 0.34 * len(table) + 1.2, panels=len(table.columns))
    sentences = []
    for axes, (name, column) in zip(panels, table.items(), strict=True):
        axes.barh(range(len(table)), column.fillna(0), color=BLUE, height=0.65)
        texts = ["does not fit" if np.isnan(x) else duration(x) for x in column]
        for y, (hours, text) in enumerate(zip(column.fillna(0), texts, strict=True)):
            plots.annotate(axes, text, (hours, y), offset=4)
        axes.set_yticks(range(len(table)), table.index if axes is panels[0] else [""] * len(table))
        axes.invert_yaxis()
        axes.set(title=name, xlabel="Planned hours", xlim=(0, 1.35 * column.max()))
        named = ", ".join(f"{gpu} {text}" for gpu, text in zip(table.index, texts, strict=True))
        sentences.append(f"{name}: {named}.")
    figure.alt_text = f"Planned hours of a whole run. {' '.join(sentences)}"
    return figure


def signs(found: dict[str, pd.DataFrame]) -> plots.TextFigure:
    """Four signs of trouble over iterations, a line for each run (name -> metrics)."""
    figure, panels = plots.new_figure(11.5, 3.1, panels=4)
    shares = {
        "Completions without an answer (%)": "no_answer_rate",
        "Completions cut off (%)": "truncated_rate",
        "Questions with pairs (%)": None,
        "KL to the previous model (nats)": "kl_to_previous",
    }
    sentences = []
    for axes, (title, metric) in zip(panels, shares.items(), strict=True):
        for (name, metrics), colour in zip(found.items(), (BLUE, ORANGE, GREEN), strict=False):
            line = _sign(metrics, metric)
            axes.plot(line.index, line, marker="o", color=colour, linewidth=2, label=name)
            numbers = ", ".join(f"M_{t} {y:.1f}" for t, y in line.items())
            sentences.append(f"{title}, {name}: {numbers}.")
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.08)
        top = None if metric == "kl_to_previous" else 102
        axes.set(xlabel="Model $M_t$", ylim=(0, top))
        last = max(int(metrics.iteration.max()) for metrics in found.values())
        axes.set(xticks=range(last + 1), xlim=(-0.2, last + 0.2))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, ncols=len(found), loc="outside lower center")
    figure.alt_text = f"Signs of trouble. {' '.join(sentences)}"
    return figure


def _sign(metrics: pd.DataFrame, metric: str | None) -> pd.Series:
    """Values by iteration, shares in %; None: the share of questions that give pairs."""
    of = {name: rows.set_index("iteration").value for name, rows in metrics.groupby("metric")}
    if metric is None:
        return 100 * of["pairs_used"] / of["pairs_questions"]
    scale = 1 if metric == "kl_to_previous" else 100
    return scale * of.get(metric, pd.Series(dtype=float))


def survived(cosines: dict[str, float]) -> plots.TextFigure:
    """How much of the trained change is left in each format, as bars."""
    figure, axes = plots.new_figure(6.2, 2.3)
    axes.barh(list(cosines), list(cosines.values()), color=BLUE, height=0.6)
    for y, value in enumerate(cosines.values()):
        plots.annotate(axes, f"{value:.2f}", (max(value, 0), y), offset=4)
    axes.invert_yaxis()
    axes.set(xlabel="Cosine between the trained change and the stored one", xlim=(0, 1.12))
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in cosines.items())
    figure.alt_text = f"Cosine between the trained and the stored change: {numbers}."
    return figure


def gaps(table: pd.DataFrame, values: dict[str, np.ndarray]) -> plots.TextFigure:
    """Memory gaps: a dot for each text, a bar for each mean with its interval."""
    figure, axes = plots.new_figure(7.4, 0.6 * len(table) + 1.2)
    rng = np.random.default_rng(0)
    for y, (name, row) in enumerate(table.iterrows()):
        height = y + rng.uniform(-0.25, 0.25, len(values[name]))
        axes.plot(values[name], height, "o", color=GREY, markersize=3.5, alpha=0.5)
        axes.plot([row.low, row.high], [y, y], color=BLUE, linewidth=3)
        axes.plot([row.iloc[0]], [y], "o", color=BLUE, markersize=7, markeredgecolor=INK)
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("Memory gap (nats per digit)")
    numbers = "; ".join(
        f"{name}: {row.iloc[0]:.2f} ({row.low:.2f} to {row.high:.2f})"
        for name, row in table.iterrows()
    )
    figure.alt_text = f"Mean memory gap in nats per digit with 95 % intervals. {numbers}."
    return figure


# ------------------------------------------------------------------------------ texts of 07b

FACTS = [
    "Columbus sailed across the Atlantic in 1492.",
    "The Second World War ended in 1945.",
    "Apollo 11 landed on the Moon on July 20, 1969.",
    "The French Revolution began in 1789.",
    "The Berlin Wall fell on November 9, 1989.",
    "The Titanic sank on April 15, 1912.",
    "The number pi is about 3.14159265.",
    "There are 365 days in a year and 24 hours in a day.",
    "Water boils at 100 degrees Celsius, or 212 degrees Fahrenheit.",
    "The square root of 144 is 12.",
    "A right angle has 90 degrees and a full circle has 360 degrees.",
    "William Shakespeare was born in 1564 and died in 1616.",
    "The First World War began in 1914.",
    "The Norman conquest of England took place in 1066.",
    "A marathon is 42.195 kilometres long.",
    "The Declaration of Independence was adopted on July 4, 1776.",
]


def probed_texts(written_here: list[str], n: int) -> dict[str, list[str]]:
    """At most n texts of each kind; GSM8K's questions only where they can be loaded."""
    texts = {"known facts": FACTS[:n], "questions of this course": written_here[:n]}
    for split in ("test", "train"):
        try:
            rows = tasks.get("gsm8k").load(split)["question"]
        except UserError:
            print("GSM8K is not here: set IRPO_DATA to a folder with it, or use a network")
            break
        texts[f"GSM8K {split}"] = [text for text in rows if any(map(str.isdigit, text))][:n]
    return texts


def leaky_folder(splits: dict) -> Path:
    """A folder of questions whose test file begins with five training questions."""
    folder = Path(tempfile.mkdtemp())
    leaked = [*splits["train"].select(range(5)), *splits["test"]]
    for name, rows in {**splits, "test": leaked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
