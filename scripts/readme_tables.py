"""Write the tables of README.md and docs/results, and README's figure, from the files in figures/.

python scripts/readme_tables.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pandas

from irpo_utils import plots
from studies import api, figures, report, trials

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "figures"


def accuracy() -> str:
    """Mean over seeds of the default profile, with intervals, and what made it."""
    means = pandas.read_csv(FIGURES / "accuracy_per_iteration_mean.csv")
    metrics = pandas.read_csv(FIGURES / "accuracy_per_iteration.csv")
    record = json.loads((FIGURES / "accuracy_per_iteration.json").read_text())
    lines = [
        "| | greedy | sampled | unseen templates | majority of 8 | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for t in sorted(means.iteration.unique()):
        at = metrics[metrics.iteration == t]
        cells = [
            _interval(means[(means.iteration == t) & (means.metric == m)].iloc[0])
            for m in ("greedy", "sampled")
        ]
        cells += [
            f"{100 * at[at.metric == 'greedy_new_skeleton'].value.mean():.1f}",
            f"{100 * at[(at.metric == 'majority') & (at.k == 8)].value.mean():.1f}",
            f"{at[at.metric == 'mean_tokens'].value.mean():.0f}",
        ]
        lines.append(f"| M{t} | " + " | ".join(cells) + " |")
    run = record["runs"][0]
    lines += [
        "",
        f"Accuracy in % on {int(means.n.iloc[0])} test questions, mean over {len(record['seeds'])} seeds with 95 % "
        f"intervals over seeds and questions; unseen templates: greedy on the 150 questions whose template neither M0 nor "
        f"training has seen. One core of an {run['environment']['processor']} each, torch "
        f"{run['environment']['versions']['torch']}, commit {run['environment']['commit']}. "
        "Made with `python -m irpo_utils run --profile cpu --seed S --out runs/seed_S` for each seed and "
        f"`{record['command']}` (today `python scripts/plot.py`).",
    ]
    return "\n".join(lines)


def smollm2() -> str:
    """The real runs at small scale that figures/ holds, the one that was started from another after it."""
    return "\n\n".join(
        _real_run(path)
        for path in sorted(FIGURES.glob("smollm2_135m_*.csv"))
        if not path.stem.endswith("_mean")
    )


def real_curve() -> str:
    """Every method on real questions, iteration by iteration, and against M0 and Iterative RPO."""
    means, runs = (pandas.read_csv(FIGURES / f"real_curve{end}.csv") for end in ("_mean", ""))
    passing = runs[(runs.metric == "pass_at_k") & (runs.k == 8)]
    paired = pandas.read_csv(FIGURES / "real_curve_paired.csv").query("metric == 'sampled'")
    lines = ["| | seeds | greedy | sampled | pass@8 | sampled, above M0 | above Iterative RPO |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for (method, t), at in means.groupby(["method", "iteration"], sort=False):
        at = at.set_index("metric")
        if t == 0 and method != "irpo":
            continue  # all methods start from the same M0
        cells = [f"{api.method_title(method)}, M{t}" if t else "M0", str(at.seeds.iloc[0])]
        cells += [_interval(at.loc[name]) for name in ("greedy", "sampled")]
        found = passing[(passing.method == method) & (passing.iteration == t)]
        cells.append(f"{100 * found.value.mean():.1f}")
        rows = paired[(paired.method == method) & (paired.iteration == t)]
        from_m0 = rows[(rows.against == method) & (rows.against_iteration == 0)]
        from_irpo = rows[(rows.against == "irpo") & (method != "irpo")]
        for found in (from_m0, from_irpo):
            found = found.rename(columns={"low": "difference_low", "high": "difference_high"})
            cells.append(_difference(found.iloc[0]) if len(found) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def learning_rates() -> str:
    """One iteration of every method at every learning rate, on validation questions."""
    lines = (FIGURES / "real_curve_runs.jsonl").read_text().splitlines()
    rows = ["| | learning rate | M0, sampled | M1, sampled | M1, greedy | KL to M0 (nats) |"]
    rows += ["|---|---|---|---|---|---|"]
    for record in map(json.loads, lines):
        if "learning_rate" in record["trial"]:
            table = pandas.DataFrame(record["metrics"]).set_index(["metric", "iteration"])
            found = [("sampled", 0), ("sampled", 1), ("greedy", 1)]
            cells = [api.method_title(record["profile"]["method"])]
            cells += [f"{record['profile']['learning_rate']:g}"]
            cells += [_interval(table.loc[[key]].iloc[0]) for key in found]
            cells.append(f"{table.loc[[('kl_to_previous', 1)]].iloc[0].value:.1f}")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _real_run(path: Path) -> str:
    record, table = json.loads(path.with_suffix(".json").read_text()), pandas.read_csv(path)
    profile, run = record["profile"], record["runs"][0]
    lines = [
        f"| {profile['task']} | greedy | sampled | pass@k | tokens | answered | pairs for the next |",
        "|---|---|---|---|---|---|---|",
    ]
    for t, at in table.groupby("iteration"):
        at = at.set_index("metric")
        passing = at.loc[["pass_at_k"]].sort_values("k").iloc[-1]
        kept, used, asked = (
            at.value.get(f"pairs_{name}") for name in ("pairs", "used", "questions")
        )
        # Tables of before 2026-11-26 count the questions before `max_pairs` cut the pairs; here it was one pair a question.
        pairs = f"{kept:.0f} from {min(kept, used):.0f} of {asked:.0f} questions" if kept else ""
        cells = [
            _interval(at.loc["greedy"]),
            _interval(at.loc["sampled"]),
            f"{_interval(passing)} at k = {int(passing.k)}",
            f"{at.value['mean_tokens']:.0f}",
            f"{100 * (1 - at.value['no_answer_rate']):.0f}",
            pairs,
        ]
        lines.append(f"| M{t} | " + " | ".join(cells) + " |")
    means = pandas.read_csv(path.with_name(f"{path.stem}_mean.csv")).set_index("metric")
    gains = [
        f"{name} {100 * row.value:+.1f} points ({100 * row.low:+.1f} to {100 * row.high:+.1f})"
        for name in ("greedy", "sampled")
        if f"{name}_gain_over_M0" in means.index
        for row in [means.loc[f"{name}_gain_over_M0"]]
    ]
    lines += [
        "",
        f"Accuracy in % on {int(table[table.metric == 'greedy'].n.iloc[0])} test questions with 95 % intervals; answered: "
        "share of sampled completions with a final answer. "
        + (
            f"M{profile['iterations']} against M0, paired by question: {', '.join(gains)}. "
            if gains
            else ""
        )
        + f"{run['seconds'] / 60:.0f} minutes on {run['environment']['threads']} thread(s) of an "
        f"{run['environment']['processor']}. [Command and settings](../../figures/{path.stem}.json)",
    ]
    return "\n".join(lines)


def speed() -> str:
    """Ours against the plain recipe, stage by stage."""
    table = pandas.read_csv(FIGURES / "bench.csv")
    records = json.loads((FIGURES / "bench.json").read_text())
    lines = [
        "| stage | ours | plain | times faster | memory, ours | plain |",
        "|---|---|---|---|---|---|",
    ]
    for what, variant, rows in _side_by_side(table):
        ours, plain, ratio = (
            rows[rows.variant == f"{variant}{name}"].set_index("metric")
            for name in ("ours", _best_plain(rows, variant), "ours_vs_best_plain")
        )
        unit, metric = (
            ("s", "seconds") if what == "iteration" else ("tokens/s", "tokens_per_second")
        )
        cells = [f"{side.value[metric]:,.0f} {unit}" for side in (ours, plain)]
        cells += [f"{ratio.ratio[metric]:.1f} ({ratio.low[metric]:.1f}–{ratio.high[metric]:.1f})"]
        cells += [f"{side.value.peak_mb:,.0f} MB" for side in (ours, plain)]
        lines.append(
            f"| {what}{', ' + variant.rstrip('_') if variant else ''} | " + " | ".join(cells) + " |"
        )
    first = next(iter(records.values()))
    llama = table[table.variant.str.endswith("llama_cpp") & (table.metric == "tokens_per_second")]
    aside = "".join(
        f" llama.cpp samples the same completions one after another from the same 4-bit file at {row.value:,.0f} tokens/s "
        f"({row.low:,.0f}–{row.high:,.0f})."
        for row in llama.itertuples()
    )
    machine = f"{first['threads']} threads of an {first['processor']}, torch {first['versions']['torch']}."
    lines += [
        "",
        f"Median over the turns, with minimum and maximum.{aside} {machine} "
        + " ".join(f"`{command}`" for command in records),
    ]
    return "\n".join(lines)


def _side_by_side(table):
    judged = table[table.variant.str.endswith("ours_vs_best_plain")]
    for what, variant in judged[["what", "variant"]].drop_duplicates().itertuples(index=False):
        prefix = variant.removesuffix("ours_vs_best_plain")
        rows = table[(table.what == what) & table.variant.str.startswith(prefix)]
        yield what, prefix, rows if prefix else rows[~rows.variant.str.contains("smollm2")]


def _best_plain(rows, prefix: str) -> str:
    plain = rows[
        rows.variant.str.startswith(f"{prefix}plain") & (rows.metric == "tokens_per_second")
    ]
    return plain.sort_values("value").variant.iloc[-1].removeprefix(prefix)


COMPARISON_HEADER = [
    "| method | learning rate | greedy, M1 | difference from Iterative RPO | greedy, last "
    "| difference from Iterative RPO | sampled, last |",
    "|---|---|---|---|---|---|---|",
]


def comparison() -> str:
    """Methods with as many seeds as Iterative RPO, by accuracy; below them those with fewer."""
    means = pandas.read_csv(FIGURES / "comparison_mean.csv")
    record = json.loads((FIGURES / "comparison.json").read_text())
    runs = report.Records("comparison", FIGURES).runs
    greedy = means[means.metric == "greedy"]
    most = int(greedy[greedy.method == "irpo"].seeds.max())
    by_first = greedy[greedy.iteration == 1].sort_values("value", ascending=False)
    full, fewer = by_first[by_first.seeds == most], by_first[by_first.seeds < most]
    zero = means[(means.method == "irpo") & (means.iteration == 0)].set_index("metric")
    lines = [
        *COMPARISON_HEADER,
        f"| M0, zero-shot | | | | {_interval(zero.loc['greedy'])} M0 | | "
        f"{_interval(zero.loc['sampled'])} |",
    ]
    for name in ["few_shot", *full.method]:
        lines.append(_comparison_row(name, means[means.method == name], record["rates"]))
    lines += [
        "",
        f"Accuracy in % on {int(means.n.iloc[0])} test questions, mean over {most} seeds. "
        "Differences are in points, on the same questions and seeds. 95 % intervals are over seeds and "
        "questions; differences in italics are not resolved. The learning rate of each method is the best of three "
        "on the validation split; variants take that of the method that they are most like. "
        f"{record['runs']} runs on {', '.join(record['processors'])}. `{record['command']}`",
    ]
    if len(fewer):
        [seeds] = set(fewer.seeds.astype(int))
        lines += [
            "",
            f"The next table has the methods with {seeds} seeds. A mean depends on its seeds, so "
            f"they are not ranked with the others. The first row is Iterative RPO with the same "
            f"{seeds} seeds, and differences are from that row.",
            "",
            *COMPARISON_HEADER,
            _comparison_row("irpo", _first_seeds(means, runs, seeds), record["rates"]),
        ]
        for name in fewer.method:
            lines.append(_comparison_row(name, means[means.method == name], record["rates"]))
    return "\n".join(lines)


def _comparison_row(name: str, rows, rates: dict) -> str:
    """A method after one iteration and after its last; `rows`: its rows of `report.means`."""
    last = rows.iteration.max()
    first, end, sampled = (
        rows[(rows.iteration == t) & (rows.metric == metric)]
        for t, metric in ((1, "greedy"), (last, "greedy"), (last, "sampled"))
    )
    rate = rates.get(trials.TUNED_AS.get(name, name)) if last else ""
    cells = [api.method_title(name), str(rate)]
    cells += [_interval(first.iloc[0]), _difference(first.iloc[0])] if len(first) else ["", ""]
    if last != 1:
        cells += [f"{_interval(end.iloc[0])} M{last}", _difference(end.iloc[0])]
    else:
        cells += ["", ""]
    return f"| {' | '.join([*cells, _interval(sampled.iloc[0])])} |"


def _first_seeds(means, runs: dict, seeds: int):
    """The rows of Iterative RPO in `means`, computed from its first `seeds` seeds alone."""
    rows = []
    for row in means[means.method == "irpo"].to_dict("records"):
        if row["metric"] in report.ANSWERS:
            of = [
                report.accuracies(runs["irpo", seed], row["iteration"], row["metric"])
                for seed in range(seeds)
            ]
            value, low, high = api.seed_and_question_interval(of)
            rows.append(row | {"value": value, "low": low, "high": high, "seeds": seeds})
    return pandas.DataFrame(rows)


def _difference(row) -> str:
    if pandas.isna(row.difference):
        return ""
    text = f"{100 * row.difference:+.1f} ({100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f})"
    return f"*{text}*" if row.difference_low <= 0 <= row.difference_high else text


def growth() -> str:
    """Cost of sampling as the work grows."""
    table = pandas.read_csv(FIGURES / "bench_scaling.csv")
    lines = ["| grows | | tokens | seconds | peak memory | tokens/s |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        name = {"n": "N", "questions": "questions", "hidden": "parameters (M)"}[row.axis]
        x = f"{row.parameters / 1e6:.1f}" if row.axis == "hidden" else row.x
        cells = [
            name,
            x,
            f"{row.tokens:,}",
            f"{row.seconds:.1f}",
            f"{row.peak_mb:,.0f} MB",
            f"{row.tokens / row.seconds:,.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def reliability() -> str:
    """What was broken on purpose, and how often the run held."""
    table = pandas.read_csv(FIGURES / "reliability.csv")
    records = json.loads((FIGURES / "reliability.json").read_text())
    lines = ["| what was done | tried | held | |", "|---|---|---|---|"]
    lines += [
        f"| {row.test} | {row.tried} | {row.held} | {row.note} |" for row in table.itertuples()
    ]
    machines = dict.fromkeys(
        f"{record['cpus']} cores of {record['processor']}" for record in records.values()
    )
    commands = " ".join(f"`python scripts/studies/check_reliability.py {what}`" for what in records)
    return "\n".join([*lines, "", f"On {' and on '.join(machines)}. {commands}"])


def matrix() -> str:
    """On which versions the tests ran."""
    table = pandas.read_csv(FIGURES / "test_matrix.csv", dtype=str, keep_default_na=False)
    lines = ["| Python | libraries | tests | |", "|---|---|---|---|"]
    for row in table.itertuples():
        counts = (
            f"{row.passed} passed, {row.failed} failed, {row.skipped} skipped"
            if row.passed
            else row.result
        )
        lines.append(f"| {row.python} | {row.libraries}: {row.versions} | {counts} | {row.date} |")
    return "\n".join(lines)


def _interval(row) -> str:
    return f"{100 * row.value:.1f} ({100 * row.low:.1f}–{100 * row.high:.1f})"


def findings() -> str:
    """Five methods on the second model: after one iteration, and where validation is best."""
    results = pandas.read_csv(FIGURES / "lesson_results.csv")
    results = results[results.tuned & results.trial.str.startswith("misconceptions/")]
    means = pandas.read_csv(FIGURES / "lesson_mean.csv").query(
        "metric == 'greedy' and split == 'test'"
    )
    start = means[
        (means.model == "misconceptions") & (means.method == "irpo") & (means.iteration == 0)
    ]
    lines = [
        "| | M1 | best on validation | M1, difference | best, difference |",
        "|---|---|---|---|---|",
        f"| M0 (before) | {_interval(start.sort_values('seeds').iloc[-1])} | | | |",
    ]
    titles = {"irpo": "Iterative RPO", "dpo": "DPO without NLL", "rft": "Rejection-sampling SFT"}
    titles["sft_gold"] = "SFT on gold solutions"
    for method, title in titles.items():
        [row] = results[results.trial.str.split("/").str[1] == method].to_dict("records")
        cells = [title]
        for name in ("first", "chosen"):
            value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
            cells.append(_interval(SimpleNamespace(value=value, low=low, high=high)))
        for name in ("first", "chosen"):
            value, low, high = (row[f"{name}_gain{end}"] / 100 for end in ("", "_low", "_high"))
            gain = SimpleNamespace(difference=value, difference_low=low, difference_high=high)
            cells.append("" if method == "irpo" else _difference(gain))
        lines.append(f"| {' | '.join(cells)} |")
    shown = results[results.trial.str.split("/").str[1].isin(titles)]
    [seeds], [n] = set(shown.seeds), set(shown.questions)
    lines += [
        "",
        f"Greedy accuracy in % on {n} test questions with the second M0: mean of {seeds} seeds and "
        "95 % interval. *Best on validation*: of M0 to M4, chosen in each seed. *Difference*: points "
        "above Iterative RPO, paired by seed and question; in italics: not resolved. "
        "Validation accuracy at M4 (one seed) chose learning rates and β.",
    ]
    return "\n".join(lines)


def verdicts() -> str:
    """Every claim about the second model, with the paper's difference and the verdict."""
    table = pandas.read_csv(FIGURES / "lesson_verdicts.csv")
    lines = []
    for group, rows in table.groupby("group", sort=False):
        unit = "nats" if group == "log-probabilities" else "points"
        lines += [f"**{group[0].upper()}{group[1:]}**", ""]
        lines += [f"| claim | paper | here ({unit}) | seeds | verdict |", "|---|---|---|---|---|"]
        for row in rows.itertuples():
            here = f"{row.points:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
            paper = f"{row.paper:+.1f}" if math.isfinite(row.paper) else ""
            claim = row.claim.removesuffix(", nats)") + ")" if unit == "nats" else row.claim
            verdict = row.verdict if isinstance(row.verdict, str) else ""
            if not paper and unit == "points":  # a claim of ours
                ours = {"agrees": "holds", "disagrees": "the opposite holds"}
                verdict = ours.get(verdict, verdict)
            lines.append(f"| {claim} | {paper} | {here} | {row.seeds} | {verdict} |")
        lines.append("")
    return "\n".join(lines[:-1])


def rules() -> str:
    """What each stopping rule loses, and whether it warns before a fall."""
    table = pandas.read_csv(FIGURES / "lesson_rules.csv")
    names = "rule | runs | loses | at most | before the fall | lead (iterations) | at the fall"
    lines = [f"| {names} | false alarms |", "|---|---|---|---|---|---|---|---|"]
    for row in table.itertuples():
        cells = [
            row.rule,
            row.runs,
            f"{row.regret:.1f} ({row.regret_low:.1f}–{row.regret_high:.1f})",
        ]
        cells += [f"{row.most:.0f}"]
        if math.isnan(row.falls):
            cells += [""] * 4
        else:
            lead = f"{row.lead:.1f} ({row.lead_low:.1f}–{row.lead_high:.1f})"
            cells += [f"{row.before:.0f} of {row.falls:.0f}", "" if math.isnan(row.lead) else lead]
            cells += [f"{row.at:.0f}", f"{row.false_alarms:.0f} of {row.without_fall:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def gpu() -> str:
    """Each phase of the GPU reports that figures/ holds."""
    lines = ["| GPU | phase | result | seconds | measured | failed or crashed | not measured |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for path in sorted(FIGURES.glob("gpu_*.json")):
        report = json.loads(path.read_text())
        for name, phase in report["phases"].items():
            status = [record["status"] for record in phase["records"]]
            n_failed = status.count("failed") + status.count("crashed")
            n_rest = len(status) - status.count("done") - n_failed
            cells = [", ".join(report["environment"]["gpus"]) or "no GPU", name, phase["status"]]
            cells += [f"{phase['seconds']:.0f}", status.count("done"), n_failed, n_rest]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines if len(lines) > 2 else ["There is no report in `figures/` yet."])


TABLES = (
    accuracy,
    smollm2,
    speed,
    growth,
    comparison,
    reliability,
    matrix,
    findings,
    gpu,
    verdicts,
    rules,
    real_curve,
    learning_rates,
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]


def fill(text: str) -> str:
    """A page with every table block made anew."""
    for table in TABLES:
        name = table.__name__
        block = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.S)
        if block.search(text):
            made = table()
            text = block.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    return text


def headline() -> None:
    """Write README's figure: accuracy per iteration at two learning rates."""
    means = figures.of_two_learning_rates(FIGURES)
    record = {"command": "python scripts/readme_tables.py"}
    for name in ("accuracy_per_iteration", "comparison"):
        record[f"{name}.json"] = json.loads((FIGURES / f"{name}.json").read_text())
    plots.save(figures.accuracy_at_rates(means), FIGURES, "two_learning_rates", means, record)


if __name__ == "__main__":
    headline()
    for page in PAGES:
        page.write_text(fill(page.read_text()))
