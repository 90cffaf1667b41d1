"""What notebook 05 needs and does not teach: a small model to train, finished runs, and figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import load_from_disk
from helpers_06 import LESSON, NAMES, settings_in_words

from irpo_utils import plots, profiles, tasks
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, GREY, INK, ORANGE
from studies import stopping
from studies.stopping import records

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "figures"
WARNINGS = (  # rules of scripts/studies/stopping.py that section 8 shows
    "patience 1",
    "patience 2",
    "KL to the previous model above 1 nat",
    "KL to the previous model above 2 nats",
    "chosen completions lose probability",
    "over 15 % of the pairs differ in one line",
)
SMALL = {
    "iterations": 2,
    "n_questions": 24,
    "n_samples": 4,
    "k_pairs": 2,
    "gold": False,
    "eval_split": "validation",
    "n_eval_questions": 16,
    "eval_samples": 2,
    "eval_samples_ends": 2,
}


# ------------------------------------------------------------------------------ runs


def small_profile(name: str):
    """The profile `name` with few questions and a learning rate that shows in two iterations."""
    return profiles.get(name, **SMALL, learning_rate=10 * profiles.get(name).learning_rate)


def load_m0(profile):
    """(model, tokenizer, task, training questions, options of `sample`, options of `train`)."""
    model, tokenizer = runs.load_model(profile)
    engine, task = runs.engine_of(profile), tasks.get(profile.task)
    questions = task.load("train", profile.data).shuffle(seed=profile.seed)
    draw = {
        "temperature": 1.0,
        "max_new_tokens": profile.max_new_tokens,
        "batch_size": profile.sampling_batch_size,
        "engine": engine,
        "progress": False,
    }
    fit = {
        "trainer": engine.trainer(model),
        "batch_size": profile.batch_size,
        "micro_batch_size": profile.micro_batch_size,
        "optim": profile.optimizer,
        "gradient_checkpointing": profile.gradient_checkpointing,
        "disable_tqdm": True,
    }
    return model, tokenizer, task, questions.select(range(profile.n_questions)), draw, fit


def finished_run(name: str) -> Path:
    """Your finished run of this profile, else the shipped one, else a new small one."""
    wanted = profiles.get(name)
    for run in (ROOT / "runs" / name, ROOT / "notebooks" / "shipped_run"):
        if (run / "profile.json").exists():
            found = runs.read_profile(run)
            complete = (run / f"iteration_{found.iterations}" / "metrics.json").exists()
            if complete and (found.model, found.task) == (wanted.model, wanted.task):
                return run
    run = Path(tempfile.mkdtemp(), "small")
    runs.run(small_profile(name), run, progress=False)
    return run


def greedy_completions(run: Path, settings):
    """(graded greedy completions of M_0 ... M_T, the evaluation questions by id)."""
    folders = [run / f"iteration_{t}/evaluation/greedy" for t in range(settings.iterations + 1)]
    asked = tasks.get(settings.task).load(settings.eval_split, settings.data)
    return [load_from_disk(str(folder)) for folder in folders], {row["id"]: row for row in asked}


def lines_of_working(evaluated) -> pd.DataFrame:
    """Lines before the final answer: a row per question, a column per model."""
    columns = {}
    for t, graded in enumerate(evaluated):
        table = graded.to_pandas().set_index("id")
        columns[f"M_{t}"] = table.completion.str.strip().str.count("\n")
    return pd.DataFrame(columns)


def steps_needed(asked: dict, ids) -> pd.Series:
    """Steps of the solution of each question, "all" where the task does not say."""
    return pd.Series([asked[i].get("steps", "all") for i in ids], index=ids, name="steps needed")


def learned_question(evaluated, lines: pd.DataFrame) -> int:
    """Position of a question that only the last model solves, with the most stages on the way."""
    first, last = evaluated[0]["correct"], evaluated[-1]["correct"]
    stages = lines.loc[evaluated[0]["id"]].nunique(axis=1).tolist()
    keys = [(end and not begin, stage) for begin, end, stage in zip(first, last, stages)]
    return max(range(len(keys)), key=keys.__getitem__)


# ------------------------------------------------------------------------------ studies


def correct(bits: str) -> list[int]:
    """1 or 0 per question from the text in which the studies store it."""
    return [int(bit) for bit in bits]


def greedy_matrix(trial: str, iteration: int) -> np.ndarray:
    """Correct greedy completions of the comparison study, (seeds, questions)."""
    of_trial = sorted((r for r in records("comparison") if r["trial"] == trial), key=_seed)
    return np.array([correct(r["answers"][str(iteration)]["greedy"]) for r in of_trial])


def pairs_used(trial: str, iterations) -> list[int]:
    """Pairs that each seed of the comparison study trained on in these iterations."""
    of_trial = sorted((r for r in records("comparison") if r["trial"] == trial), key=_seed)
    return [int(sum(_metric(r, "pairs_pairs")[t] for t in iterations)) for r in of_trial]


def _seed(record: dict) -> int:
    return record["seed"]


def _metric(record: dict, name: str) -> dict[int, float]:
    """Iteration -> value of one metric of a record."""
    rows = record["metrics"]
    return {row["iteration"]: row["value"] for row in rows if row["metric"] == name}


def shipped_runs() -> list[dict]:
    """Finished runs to try rules on: those of `stopping.finished_runs`, with a `name` for readers."""
    found = []
    for run in stopping.finished_runs():
        method, _, settings = run["trial"].partition("/")
        name = NAMES.get(method, "")
        if run["study"] == "lesson":
            name = LESSON[method.removesuffix("_lucky")][0]
            name += ", lucky winners, " if method.endswith("_lucky") else ", "
            name += settings_in_words(settings)
            name += "" if run["model"] == "misconceptions" else f", model {run['model']}"
        found.append(run | {"name": name})
    return found


def warnings_of_rules() -> pd.DataFrame:
    """For some rules of lesson_rules.csv: falls that they warn of, and runs stopped without one."""
    table = pd.read_csv(FIGURES / "lesson_rules.csv").set_index("rule")
    rows = {}
    for name in WARNINGS:
        row = table.loc[name]
        share = f"{100 * row.before / row.falls:.0f} %"
        early = f"{share} ({row.before_low:.0f} to {row.before_high:.0f}) of {row.falls:.0f}"
        lead = f"{row.lead:.1f} ({row.lead_low:.1f} to {row.lead_high:.1f})"
        false = f"{row.false_alarms:.0f} of {row.without_fall:.0f}"
        rows[name] = {
            "before the fall": early,
            "lead (iterations)": "" if np.isnan(row.lead) else lead,
            "at the fall": f"{row['at']:.0f}",
            "false alarms": false,
        }
    return pd.DataFrame(rows).T


def twins() -> list[dict]:
    """Runs of the second model at β = 0.1 and 3e-4, with the NLL term and without it."""
    settings = {"beta": 0.1, "learning_rate": 3e-4}
    return [
        record | {"name": {"dpo": "without NLL", "irpo": "with NLL"}[record["method"]]}
        for record in records("lesson")
        if record["settings"] == settings and record["model"] == "misconceptions"
    ]


def a_fall_and_its_twin() -> pd.DataFrame:
    """M_3 and M_4 of two runs that differ in the NLL term: what the trainer and the test say."""
    rows = {}
    for record in twins():
        if record["seed"] == 0:
            for entry in record["iterations"][3:]:
                rows[f"{record['name']}, M_{entry['iteration']}"] = {
                    "reward accuracy in training": entry["train_accuracy"],
                    "reward margin in training": entry["train_margin"],
                    "KL to the previous model (nats)": entry["kl_previous"][0],
                    "tokens per completion": entry["tokens"],
                    "test accuracy (%)": 100 * np.mean(correct(entry["test"]["greedy"])),
                }
    columns = [f"{name}, M_{t}" for name in ("without NLL", "with NLL") for t in (3, 4)]
    return pd.DataFrame(rows)[columns]


def last_steps(test) -> pd.DataFrame:
    """From M_3 to M_4 in all these runs: change of test accuracy, p value of `test`, and KL.

    `test` takes the correct answers of both models, per question, and returns a dict with `p`.
    """
    rows = {}
    for record in sorted(twins(), key=lambda record: (record["method"], record["seed"])):
        before, after = (correct(entry["test"]["greedy"]) for entry in record["iterations"][3:5])
        rows[f"{record['name']}, seed {record['seed']}"] = {
            "change (points)": 100 * (np.mean(after) - np.mean(before)),
            "p": test(before, after)["p"],
            "KL to M_3 (nats)": record["iterations"][4]["kl_previous"][0],
        }
    return pd.DataFrame(rows).T


def stability_table() -> pd.DataFrame:
    """Greedy accuracy (%) of M_1 and M_2 with intervals, for alpha 0 and 1 and two learning rates."""
    table = pd.read_csv(FIGURES / "stability_mean.csv")
    rows = {}
    for rate in (1e-4, 3e-4):
        for alpha in (0, 1):
            chosen = table[
                (table.factor == f"alpha={alpha}")
                & (table.level == rate)
                & (table.metric == "greedy")
            ].set_index("iteration")
            cells = {
                f"M_{t}": "{value:.1f} ({low:.1f} to {high:.1f})".format(
                    **(100 * chosen.loc[t, ["value", "low", "high"]].astype(float))
                )
                for t in (1, 2)
            }
            rows[f"{rate:.0e}, alpha = {alpha}"] = {**cells, "seeds": int(chosen.seeds.iloc[0])}
    return pd.DataFrame(rows).T


# ------------------------------------------------------------------------------ figures


def control(columns: dict[str, np.ndarray]) -> plots.TextFigure:
    """Accuracy per seed as joined dots; `columns`: name -> (seeds, questions)."""
    figure, axes = plots.new_figure(6.5, 3.6)
    values = 100 * np.array([matrix.mean(1) for matrix in columns.values()])  # (columns, seeds)
    axes.plot(values, color=GREY, linewidth=0.8, marker="o", markersize=4)
    means = values.mean(1)
    for x, mean in enumerate(means):
        axes.plot([x - 0.12, x + 0.12], [mean, mean], color=BLUE, linewidth=3)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        plots.annotate(axes, f"{mean:.1f}", (x + 0.12, mean), bbox=white)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set(
        ylabel="Greedy accuracy (%)\ndots: seeds, bars: means", xlim=(-0.4, len(columns) - 0.4)
    )
    numbers = "; ".join(f"{name}: {mean:.1f}" for name, mean in zip(columns, means))
    numbers = numbers.replace("\n", " ").replace("$", "")
    figure.alt_text = (
        f"Greedy accuracy in %, {values.shape[1]} seeds as joined dots, bars are means. {numbers}."
    )
    return figure


def stability() -> plots.TextFigure:
    """Accuracy, and KL to the previous model, at two learning rates without and with the NLL term."""
    figure, panels = plots.new_figure(9.6, 3.8, panels=2)
    styles = {
        (1e-4, 0): ("1e-4, α = 0", BLUE, ":"),
        (1e-4, 1): ("1e-4, α = 1", BLUE, "-"),
        (3e-4, 0): ("3e-4, α = 0", ORANGE, ":"),
        (3e-4, 1): ("3e-4, α = 1", ORANGE, "-"),
    }
    sentences = []
    for axes, metric, scale in zip(panels, ("greedy", "kl_to_previous"), (100, 1), strict=True):
        for (rate, alpha), (name, colour, dashes) in styles.items():
            wanted = f"irpo_alpha={alpha}_{rate:g}"
            found = [_metric(r, metric) for r in records("stability") if r["trial"] == wanted]
            steps = sorted(found[0])
            values = scale * np.array([[one[t] for t in steps] for one in found])
            axes.plot(steps, values.T, color=colour, linestyle=dashes, linewidth=0.7, alpha=0.6)
            mean = values.mean(0)
            axes.plot(
                steps, mean, color=colour, linestyle=dashes, linewidth=2.5, marker="o", label=name
            )
            numbers = ", ".join(f"{y:.1f} at M_{t}" for t, y in zip(steps, mean))
            sentences.append(f"{metric} {name} ({len(found)} seeds): {numbers}.")
        axes.set(xlabel="Iteration t (model $M_t$)", xticks=steps)
    panels[0].set(ylabel="Greedy accuracy (%)", ylim=(0, 102))
    panels[1].set(ylabel="KL to the previous model (nats)", yscale="log")
    handles, names = panels[0].get_legend_handles_labels()
    names = [f"learning rate {name}" for name in names]
    figure.legend(handles, names, frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    figure.alt_text = f"Means over seeds, thin lines are seeds. {' '.join(sentences)}"
    return figure


def regrets(table: pd.DataFrame) -> plots.TextFigure:
    """A dot per run and rule (columns of `table`, points), a bar for each mean."""
    figure, axes = plots.new_figure(7.6, 0.55 * len(table.columns) + 1.2)
    rng, sentences = np.random.default_rng(0), []
    for y, name in enumerate(table.columns):
        values = table[name].to_numpy()
        height = y + rng.uniform(-0.22, 0.22, len(values))
        axes.plot(values, height, "o", color=BLUE, markersize=4, alpha=0.5)
        axes.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=INK, linewidth=2)
        sentences.append(f"{name}: mean {values.mean():.1f}, largest {values.max():.1f}")
    axes.set_yticks(range(len(table.columns)), table.columns)
    axes.invert_yaxis()
    axes.set_xlabel("Test accuracy lost against the best iteration of the run (points)")
    figure.alt_text = f"Loss of each rule in points, {len(table)} runs. {'; '.join(sentences)}."
    return figure
