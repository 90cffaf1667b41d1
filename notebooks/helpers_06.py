"""What notebooks 06 and 06b need and do not teach: result tables, model output, and the figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from irpo_utils import evaluation, grading, models, plots, sampling
from irpo_utils.ops import run as runs
from irpo_utils.plots import BLUE, COLOURS, GREEN, GREY, INK, ORANGE
from studies import figures, stopping

ROOT = Path(__file__).resolve().parents[1]
# Methods of the comparison with five seeds, under the names that the notebooks use.
NAMES = {
    "irpo": "Iterative RPO",
    "iterative_dpo": "DPO without NLL",
    "star": "RFT",
    "sft_gold": "SFT on gold solutions",
    "irpo_2x": "Iterative RPO, twice the pairs",
    "irpo_from_sft": "Iterative RPO from RFT",
    "dpo_from_sft": "DPO from RFT",
    "star_2x": "RFT, twice the data",
    "shuffled": "Random labels",
    "spin": "Gold vs. sampled (SPIN-style)",
    "grpo": "GRPO",
    "self_consistency": "Majority as reward",
    "self_rewarding": "Own likelihood as reward",
}
LESSON = {  # methods of the second seed model's study: name, colour
    "irpo": ("Iterative RPO", BLUE),
    "dpo": ("DPO without NLL", ORANGE),
    "rft": ("RFT", GREEN),
    "sft_gold": ("SFT on gold solutions", GREY),
    "irpo_m0_samples": ("Iterative RPO, completions of M0 only", COLOURS[3]),
    "grpo": ("GRPO", COLOURS[5]),
}
COMPARED = ("Iterative RPO", "DPO without NLL", "RFT", "SFT on gold solutions")
TRIALS = {  # trials of that study whose log-probabilities are drawn: name, colour, line
    "irpo/beta=1/learning_rate=0.0003": ("Iterative RPO, β = 1, 3e-4", BLUE, "-"),
    "irpo/beta=0.1/learning_rate=0.001": ("Iterative RPO, β = 0.1, 1e-3", BLUE, "--"),
    "dpo/beta=1/learning_rate=0.0003": ("DPO without NLL, β = 1, 3e-4", ORANGE, "-"),
    "dpo/beta=0.1/learning_rate=0.001": ("DPO without NLL, β = 0.1, 1e-3", ORANGE, "--"),
    "rft/learning_rate=0.0003": ("RFT, 3e-4", GREEN, ":"),
}


# ------------------------------------------------------------------------------ result tables


def read(name: str) -> pd.DataFrame:
    """figures/`name`.csv; the columns `factor` and `level` are text also where they look like numbers."""
    return pd.read_csv(ROOT / f"figures/{name}.csv", dtype={"factor": str, "level": str})


def final(rows: pd.DataFrame, metrics=("greedy",)) -> pd.DataFrame:
    """The last iteration of every trial of a study that was compared with another trial."""
    rows = rows[rows.metric.isin(metrics) & rows.difference.notna()]
    trials = rows.groupby(["method", "factor", "level"], dropna=False)
    return rows[rows.iteration == trials.iteration.transform("max")]


def in_words(claim: str) -> str:
    """A claim of lesson_claims.csv or lesson_verdicts.csv under the names of the notebooks."""
    claim = claim.replace("rejection-sampling SFT", "RFT")
    for name, letter in {"alpha": "α", "beta": "β"}.items():
        claim = re.sub(rf"\b{name} (?=\d)", f"{letter} = ", claim)
    return claim


def settings_in_words(settings: str) -> str:
    """ "beta=0.3/learning_rate=0.0003" as "β = 0.3, learning rate = 0.0003"."""
    for old, new in {"/": ", ", "_": " ", "alpha": "α", "beta": "β", "=": " = "}.items():
        settings = settings.replace(old, new)
    return settings


def ablation_in_words(factor: str, level: str) -> str:
    """A changed setting of the ablations, with the name that a reader knows."""
    words = {
        "reference start": "reference $M_0$",
        "gold true": "gold solutions added",
        "keep_pairs true": "earlier pairs kept",
        "nll_per token": "NLL per token of the batch",
        "pairing random": "random pairing",
        "fresh_questions true": "new questions each iteration",
        "deduplicate false": "duplicates kept",
    }
    names = {"alpha": "α", "beta": "β", "n_samples": "N", "k_pairs": "K"}
    setting = f"{factor} {level}"
    return words.get(setting, f"{names.get(factor, factor)} = {level}")


def claims(name: str = "lesson_claims") -> pd.DataFrame:
    """The claims of a result file with paired differences in points; no verdict: an empty text.

    Claims of ours, for which the paper has no number, hold or do not; the paper has no part in it.
    """
    table = read(name)
    names = {side: table[side].map(_named) for side in ("a", "b")}
    table = table.assign(claim=table.claim.map(in_words), verdict=table.verdict.fillna(""), **names)
    ours = ~np.isfinite(table.paper) & (table.get("group", "") != "log-probabilities")
    own_words = {"agrees": "holds", "disagrees": "the opposite holds"}
    table["verdict"] = table.verdict.where(~ours, table.verdict.replace(own_words))
    return table


def _named(side: str) -> str:
    """ "star M3" as "RFT M3"; a side that does not begin with a method stays as it is."""
    method, *rest = side.split(" ")
    return " ".join([NAMES.get(method, method), *rest])


def with_interval(row) -> str:
    """For example "+3.7 (+1.1 to +6.6)"."""
    return f"{row.points:+.1f} ({row.low:+.1f} to {row.high:+.1f})"


def claims_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Claim, the paper's difference if there is one, the difference here with its interval, the seeds
    in which the claim holds, and the verdict."""
    here = [with_interval(row) for row in rows.itertuples()]
    lowers = rows.paper < 0  # a claim that something falls
    on_its_side = rows.seeds_above_zero.where(~lowers, rows.seeds - rows.seeds_above_zero)
    seeds_of = [f"{n} of {total}" for n, total in zip(on_its_side, rows.seeds, strict=True)]
    paper = [f"{value:+.1f}" if np.isfinite(value) else "" for value in rows.paper]
    columns = {"paper": paper} if any(paper) else {}
    columns |= {"here (95 %)": here, "seeds on its side": seeds_of}
    return pd.DataFrame(columns | {"verdict": list(rows.verdict)}, index=list(rows.claim))


def per_iteration(table: pd.DataFrame, begins: str, contains: str = "") -> pd.DataFrame:
    """The claims with these texts and the column `iteration` (M1 to M4)."""
    rows = table[table.claim.str.startswith(begins) & table.claim.str.contains(contains)]
    return rows.assign(iteration=[int(re.search(r"M(\d)", text)[1]) for text in rows.claim])


def of_second_model(name: str = "lesson_mean", model: str = "misconceptions") -> pd.DataFrame:
    """A table of the second seed model's study with the column `trial`: method and settings.

    `model`: "plain" for the one that writes equations alone.
    """
    table = read(name)
    table = table[table.model == model]
    return table.assign(trial=table.method + "/" + table.settings.str.replace(" ", "/"))


def tuning_of_second_model() -> pd.DataFrame:
    """What the tuning of the four compared methods measured: a row per learning rate and β.

    `value`, `low`, `high`: greedy accuracy of M_4 on validation questions in %, seed 0, 95 %.
    `answers`: 1 or 0 for each of these questions, the same ones in all rows.
    """
    rows = []
    for run in stopping.records("lesson"):
        settings, method = run["settings"], LESSON.get(run["method"], ("",))[0]
        if run["model"] != "misconceptions" or run["seed"] or method not in COMPARED:
            continue
        if set(settings) <= {"learning_rate", "beta"} and len(run["iterations"]) == 5:
            answers = [int(mark) for mark in run["iterations"][4]["validation"]["greedy"]]
            solved, n = sum(answers), len(answers)
            low, high = evaluation.wilson_interval(solved, n)
            rate, beta = settings["learning_rate"], settings.get("beta")
            rows.append((method, rate, beta, 100 * solved / n, 100 * low, 100 * high, answers))
    columns = ["method", "learning_rate", "beta", "value", "low", "high", "answers"]
    return pd.DataFrame(rows, columns=columns)


def tuned_methods() -> pd.DataFrame:
    """One row per method of that study at its tuned settings, with its test accuracy in %.

    "best on validation": the iteration with the best validation accuracy, for each seed.
    """
    table = read("lesson_results")
    table = table[table.tuned & table.trial.str.startswith("misconceptions/")]
    table = table.assign(trial=table.trial.str.split("/", n=1).str[1])
    order = {method: i for i, method in enumerate(LESSON)}
    table = table.sort_values("trial", key=lambda t: t.str.split("/").str[0].map(order))
    for name in ("last", "chosen"):
        ends = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
        text = [f"{100 * x:.1f} ({100 * low:.1f} to {100 * high:.1f})" for x, low, high in ends]
        table[name] = text
    table["method"] = [LESSON[trial.split("/")[0]][0] for trial in table.trial]
    table["settings"] = [settings_in_words(trial.split("/", 1)[1]) for trial in table.trial]
    names = {"last": "M4", "chosen": "best on validation", "chosen_iterations": "its iterations"}
    shown = ["settings", "seeds", *names.values()]
    table = table.rename(columns=names)
    return table.set_index("method")[["trial", *shown]]


def of_eight_iterations(tuned: pd.DataFrame) -> pd.DataFrame:
    """The methods of `tuned_methods` that ran for eight iterations, with the trials that did."""
    rows = tuned.loc[["Iterative RPO", "RFT", "DPO without NLL"], ["trial"]]
    return rows.assign(trial=rows.trial.str.replace("learning_rate", "iterations=8/learning_rate"))


def how_far(means: pd.DataFrame) -> pd.DataFrame:
    """How far the first iteration of Iterative RPO went, by learning rate and β: δ of held-out pairs, the share of
    them past 3/β (where the DPO gradient has a tenth of its start), and the KL to M_0."""
    names = {
        "margin": "δ of held-out pairs (nats)",
        "saturated_share": "of them past 3/β (%)",
        "kl_m0": "KL (nats)",
    }
    shown = {}
    for rate in (0.0003, 0.001):
        for beta in (0.1, 0.3, 1, 3):
            trial = f"irpo/beta={beta:g}/learning_rate={rate:g}"
            rows = means[(means.trial == trial) & (means.iteration == 1)].set_index("metric")
            if len(rows):
                values = {names[name]: rows.value[name] for name in names}
                values["of them past 3/β (%)"] *= 100
                shown[f"{rate:g}", f"β = {beta:g}"] = values
    table = pd.DataFrame(shown).T.round(1)
    return table.rename_axis(["learning rate", ""])


def nats(means: pd.DataFrame) -> float:
    """Nats of a completion of M_0: the mean negative log-probability, over all trials."""
    return means[(means.metric == "nats") & (means.iteration == 0)].value.mean()


# ------------------------------------------------------------------------------ completions of M_0


def graded_completions(profile, task, n_questions: int, n: int):
    """(questions, graded, tokenizer): completions of M_0 for some training questions."""
    questions = task.load("train", profile.data).shuffle(seed=profile.seed)
    questions = questions.select(range(n_questions))
    model, tokenizer = runs.load_model(profile)
    drawn = sampling.sample(
        model,
        tokenizer,
        questions,
        task,
        n=n,
        temperature=profile.temperature_of(0),
        max_new_tokens=profile.max_new_tokens,
        seed=profile.seed,
        batch_size=profile.sampling_batch_size,
        progress=False,
    )
    return questions, grading.grade(drawn, task), tokenizer


def by_hand(questions: list[dict], written: list[tuple], task):
    """Graded rows of hand-written completions: (question id, text, log-probability)."""
    from datasets import Dataset

    tokenizer, rows = models.load_tokenizer(models.find("seed")), []
    of_id = {question["id"]: question for question in questions}

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for number, (name, text, logprob) in enumerate(written):
        prompt = models.render_prompt(tokenizer, task.prompt(of_id[name]))
        ids = encode(text) + [tokenizer.eos_token_id]
        rows.append(
            {
                "id": name,
                "sample": number % 4,
                "prompt": prompt,
                "prompt_ids": encode(prompt),
                "completion": text,
                "completion_ids": ids,
                "n_tokens": len(ids),
                "finished": True,
                "logprob": logprob,
                "answer": of_id[name]["answer"],
            }
        )
    return grading.grade(Dataset.from_list(rows), task)


# ------------------------------------------------------------------------------ figures


def _dot(axes, y: float, value: float, low: float, high: float, colour: str) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=2, label="_interval")
    axes.plot(value, y, "o", color=colour, markersize=7, label="_value")


def _rows_axis(axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels) - 1, -1, -1), labels)
    axes.set(ylim=(-0.6, len(labels) - 0.4))


def tuning_curves(tuned: pd.DataFrame) -> plots.TextFigure:
    """Validation accuracy over the learning rate, a line per method; rows of `tuning_of_second_model`."""
    figure, axes = plots.new_figure(6.6, 3.6)
    lines = []
    for method, colour in LESSON.values():
        rows = tuned[tuned.method == method].sort_values("learning_rate")
        if rows.empty:
            continue
        x = rows.learning_rate * 1.04 ** (len(lines) - 1.5)
        axes.vlines(x, rows.low, rows.high, color=colour, linewidth=1, alpha=0.6)
        line = plots.draw_points(axes, x, rows.value, method, colour)
        numbers = ", ".join(
            f"{row.value:.1f} ({row.low:.1f} to {row.high:.1f}) at {row.learning_rate:g}"
            for row in rows.itertuples()
        )
        lines.append(line._replace(numbers=numbers))
    rates = sorted(set(tuned.learning_rate))
    axes.set(xscale="log", xlabel="Learning rate", ylim=(0, 102))
    axes.set_ylabel("Validation accuracy of $M_4$ (%), 95 % intervals")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    return plots.finish(figure, "Validation accuracy (%) by learning rate", {"": lines})


def eight_iterations(metrics: pd.DataFrame) -> plots.TextFigure:
    """Greedy accuracy per iteration: seeds as thin lines, their mean as a thick one."""
    figure, axes = plots.new_figure(7.6, 4.0)
    lines = []
    for method, colour in (("irpo", BLUE), ("star", GREEN), ("iterative_dpo", ORANGE)):
        rows = metrics[(metrics.method == method) & (metrics.metric == "greedy")]
        for _, run in rows.groupby("seed"):
            axes.plot(run.iteration, 100 * run.value, color=colour, linewidth=0.8, alpha=0.5)
        means = 100 * rows.groupby("iteration").value.mean()
        lines.append(plots.draw_points(axes, means.index, means, NAMES[method], colour))
    axes.set(xlabel="Iteration t (model $M_t$)", ylim=(0, 100))
    axes.set_ylabel("Greedy accuracy on the test split (%)\nthin: seeds, thick: mean")
    title = "Greedy accuracy (%), M_0 to M_8, means over seeds"
    return plots.finish(figure, title, {"": lines})


def gains(panels: dict[str, pd.DataFrame]) -> plots.TextFigure:
    """Paired differences (points) per iteration with 95 % intervals; title -> rows of `per_iteration`."""
    figure, axes = plots.new_figure(4.6 * len(panels), 3.4, panels=len(panels))
    sentences = []
    for panel, (title, rows) in zip(axes, panels.items(), strict=True):
        for row in rows.itertuples():
            panel.plot([row.iteration] * 2, [row.low, row.high], color=BLUE, linewidth=2)
            panel.plot(row.iteration, row.points, "o", color=BLUE, markersize=7)
            white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line at 0
            at = (row.iteration, row.points)
            plots.annotate(panel, f"{row.points:+.1f}", at, offset=8, bbox=white)
        panel.axhline(0, color=INK, linewidth=1)
        panel.set(title=title, xlim=(0.6, 4.7), xlabel="Iteration t (model $M_t$)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        numbers = "; ".join(f"M{row.iteration} {with_interval(row)}" for row in rows.itertuples())
        sentences.append(f"{title}: {numbers}.")
    ends = [(panel.dataLim.y0, panel.dataLim.y1) for panel in axes]
    for panel in axes:
        panel.set_ylim(1.1 * min(low for low, _ in ends), 1.1 * max(high for _, high in ends))
    axes[0].set_ylabel("Difference in accuracy (points)")
    figure.alt_text = f"Paired differences in accuracy (points). {' '.join(sentences)}"
    return figure


def forest(rows: pd.DataFrame) -> plots.TextFigure:
    """Claims with the difference here (dot, 95 % interval) and the paper's (diamond), if it has a
    number."""
    colours = {"agrees": BLUE, "disagrees": ORANGE, "not resolved": GREY}
    figure, axes = plots.new_figure(9.6, 1.2 + 0.5 * len(rows))
    spoken = []
    for y, row in zip(range(len(rows) - 1, -1, -1), rows.itertuples(), strict=True):
        _dot(axes, y, row.points, row.low, row.high, colours.get(row.verdict, GREEN))
        plots.annotate(axes, row.verdict, (1, y), xycoords=("axes fraction", "data"))
        paper = "no number in the paper"
        if np.isfinite(row.paper):
            axes.plot(row.paper, y, "D", color=INK, markersize=5, fillstyle="none")
            paper = f"paper {row.paper:+.1f}"
        spoken.append(f"{row.claim}: {with_interval(row)}, {paper}, {row.verdict}")
    axes.axvline(0, color=INK, linewidth=1)
    _rows_axis(axes, [textwrap.fill(claim, 36) for claim in rows.claim])
    axes.set_xlabel("Difference in accuracy (points); diamond: the paper")
    figure.alt_text = f"Claims of the paper and differences here (points). {'; '.join(spoken)}."
    return figure


def lesson_map() -> plots.TextFigure:
    """Accuracy of M_4 of the second seed model by learning rate and α."""
    return figures.nll_map(read("lesson_map"), "$M_4$ of the second model, β = 0.3")


def lesson_accuracy(means: pd.DataFrame, tuned: pd.DataFrame) -> plots.TextFigure:
    """Test accuracy per iteration of the second seed model, 95 % intervals, a line per method."""
    rows = means[(means.metric == "greedy") & (means.split == "test")]
    figure, axes = plots.new_figure(8.2, 4.4)
    lines = []
    for i, (method, colour) in enumerate(LESSON.values()):
        if method not in tuned.index:
            continue
        points = rows[rows.trial == tuned.trial[method]].sort_values("iteration")
        if points.empty:
            continue
        x, y = points.iteration + 0.05 * (i - 2.5), 100 * points.value
        axes.vlines(x, 100 * points.low, 100 * points.high, color=colour, linewidth=1, alpha=0.6)
        label = f"{method} ({seeds(int(points.seeds.max()))})"
        line = plots.draw_points(axes, x, y, label, colour)
        numbers = (
            f"M{row.iteration} {100 * row.value:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
            for row in points.itertuples()
        )
        lines.append(line._replace(numbers=", ".join(numbers)))
    axes.set(xlabel="Iteration t (model $M_t$)", ylabel="Accuracy (%)", ylim=(30, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return plots.finish(figure, "Test accuracy (%) of the second seed model", {"": lines})


def _one_legend(figure: plots.TextFigure, columns: int) -> plots.TextFigure:
    """The same figure with one legend below instead of one in each panel."""
    for axes in figure.axes:
        axes.get_legend().remove()
    handles, names = figure.axes[0].get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 9, "handlelength": 3.5}  # long enough to show dashes
    figure.legend(handles, names, ncols=columns, loc="outside lower center", **style)
    return figure


def seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def beta_map(panels: dict[str, tuple[pd.DataFrame, float]], iteration=4) -> plots.TextFigure:
    """Accuracy of M_t against β with and without the NLL term; title -> means, learning rate."""
    figure, axes = plots.new_figure(9.0, 4.0, panels=len(panels))
    spoken = {}
    for panel, (title, (means, rate)) in zip(axes, panels.items(), strict=True):
        rows = means[(means.metric == "greedy") & (means.split == "test")]
        rows = rows[rows.iteration == iteration]
        lines = spoken[title] = []
        for method, dashes in (("irpo", "-"), ("dpo", "--")):
            name, colour = LESSON[method]
            trials = {
                f"{method}/beta={beta:g}/learning_rate={rate:g}": beta for beta in (0.1, 0.3, 1, 3)
            }
            points = rows[rows.trial.isin(trials)]
            points = points.assign(beta=points.trial.map(trials)).sort_values("beta")
            x = points.beta * (0.97 if method == "irpo" else 1.03)
            panel.vlines(
                x, 100 * points.low, 100 * points.high, color=colour, linewidth=1, alpha=0.6
            )
            line = plots.draw_points(panel, x, 100 * points.value, name, colour, linestyle=dashes)
            numbers = (
                f"β = {row.beta:g} {100 * row.value:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f}; "
                f"{seeds(row.seeds)})"
                for row in points.itertuples()
            )
            lines.append(line._replace(numbers=", ".join(numbers)))
        panel.set(title=title, xlabel="β", xscale="log", ylim=(0, 100))
        panel.set_xticks([0.1, 0.3, 1, 3], labels=["0.1", "0.3", "1", "3"])
    axes[0].set_ylabel(f"Accuracy of $M_{iteration}$ (%)")
    figure = plots.finish(figure, f"Test accuracy of M{iteration} (%) against beta", spoken)
    return _one_legend(figure, columns=2)


def accuracy_against_kl() -> plots.TextFigure:
    """Validation accuracy of M_0 to M_4 of the second seed model over the mean KL to M_0."""
    table = read("lesson_kl")
    figure, axes = plots.new_figure(7.6, 4.0)
    lines = []
    for method, (name, colour) in LESSON.items():
        points = table[table.method == method].sort_values("iteration")
        line = plots.draw_points(axes, points.kl_m0, 100 * points.value, name, colour)
        numbers = (f"{100 * row.value:.1f} at {row.kl_m0:.2f}" for row in points.itertuples())
        lines.append(line._replace(numbers=", ".join(numbers)))
    axes.set(xlabel="KL to $M_0$ (nats per completion; log scale above 1)")
    axes.set_ylabel("Accuracy on validation (%)")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 0.5, 1, 2, 5, 10], labels=["0", "0.5", "1", "2", "5", "10"])
    axes.set_xlim(-0.02, 13)
    return plots.finish(figure, "Validation accuracy (%) by KL to M0 (nats)", {"": lines})


def misconceptions(table: pd.DataFrame, tuned: pd.DataFrame) -> plots.TextFigure:
    """Share of lines that follow a misconception where it applies, per iteration; two methods."""
    shown = {tuned.trial[name]: name for name in ("Iterative RPO", "RFT")}
    figure, axes = plots.new_figure(4.6 * len(shown) + 2.6, 3.8, panels=len(shown))
    sentences, handles = [], None
    for panel, (key, title) in zip(axes, shown.items(), strict=True):
        rows, spoken = table[table.trial == key], []
        for colour, (metric, points) in zip(COLOURS, rows.groupby("metric", sort=False)):
            name, values = metric.removeprefix("follows: "), 100 * points.value
            plots.draw_points(panel, points.iteration, values, name, colour)
            spoken.append(f"{name}: {', '.join(f'{value:.1f}' for value in values)}")
        title = f"{title} ({seeds(int(rows.seeds.max()))})"
        panel.set(title=title, xlabel="Iteration t (model $M_t$)", ylim=(0, 60))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.sharey(axes[0])
        sentences.append(f"{title}: {'; '.join(spoken)}.")
        handles = panel.get_legend_handles_labels()
    axes[0].set_ylabel("Lines with the error, where it applies (%)")
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside right center")
    figure.alt_text = f"Misconceptions per iteration, M0 to M4 (%). {' '.join(sentences)}"
    return figure


def lesson_log_probabilities(table: pd.DataFrame) -> plots.TextFigure:
    """Change since M0 of chosen and rejected held-out completions (nats), 95 % intervals."""
    figure, axes = plots.new_figure(9.6, 4.4, panels=2)
    panels = {}
    for panel, side in zip(axes, ("chosen", "rejected"), strict=True):
        lines = panels[side] = []
        for key, (name, colour, dashes) in TRIALS.items():
            rows = table[(table.trial == f"misconceptions/{key}") & (table.metric == side)]
            label = f"{name} ({seeds(rows.seeds.max())})"
            x = rows.iteration + 0.07 * (len(lines) - (len(TRIALS) - 1) / 2)
            panel.vlines(x, rows.low, rows.high, color=colour, linewidth=1)
            line = plots.draw_points(panel, x, rows.value, label, colour, linestyle=dashes)
            last = rows.iloc[-1]
            numbers = f"M4 {last.value:+.2f} ({last.low:+.2f} to {last.high:+.2f})"
            lines.append(line._replace(numbers=numbers))
        panel.axhline(0, color=INK, linewidth=0.8)
        panel.set(title=side, xlabel="Iteration t (model $M_t$)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("Change since M0 (nats per completion)")
    figure = plots.finish(figure, "Log-probabilities of held-out completions since M0", panels)
    return _one_legend(figure, columns=3)
