"""Accuracy per iteration of a real model on real questions: SmolLM2-135M on SVAMP, without a GPU.

    python scripts/real_curve.py --data FOLDER --jobs 2

1. M_0: SFT on gold solutions of GSM8K (profile `smollm2-135m-sft`).
2. The better of two learning rates for each method: one iteration with seed 0, on validation
   questions.
3. All iterations of each method with each seed (profile `smollm2-135m-cpu`), on test questions.

It takes hours, and the same command resumes. Finished runs are kept in OUT/real_curve_runs.jsonl.
One step can be made alone, for some methods: `--steps curve --methods irpo star --seeds 1`. The
curve then uses the better learning rate of the finished runs of step 2.
FOLDER has the questions of GSM8K and SVAMP; without it they come from the hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tqdm.auto import tqdm

from irpo_utils import UserError
from irpo_utils.ops import cli

NAME = "real_curve"
STEPS = ("m0", "learning_rate", "curve")
METHODS = ("irpo", "star", "iterative_dpo")
LEARNING_RATES = (1e-4, 3e-4)
SWEEP = {"iterations": 1, "eval_split": "validation"}
SEEDS = 2


def main(arguments: list[str]) -> None:
    """Make the runs that are missing, then the tables and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help="folder with the questions (default: from the hub)")
    add("--seeds", type=int, default=SEEDS, help="number of seeds (%(default)s)")
    add("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    add("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these steps (all)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these methods (all)")
    add("--small", action="store_true", help="a few questions for the miniature model, as a trial")
    add("--runs", default="runs/real_curve", help="folder of the run directories (%(default)s)")
    add("--out", default="figures", help="folder of tables and figures (%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.jobs, options.seeds) < 1:
        parser.error("--jobs and --seeds must be at least 1")
    cli.quiet_libraries()
    Study(options).run()


class Study:
    """The runs of this study, by trial and seed, and what is kept of them."""

    def __init__(self, options: argparse.Namespace):
        from studies import report

        self.options, self.runs, self.out = options, Path(options.runs), Path(options.out)
        self.records = report.Records(NAME, self.out)
        self.m0 = self.runs / "m0" / "sft_gold" / "seed_0"

    def run(self) -> None:
        """The chosen steps in turn; each needs the results of the previous one."""
        steps, chosen = self.options.steps, self.options.methods
        self.make({self.m0: self.profile(profile="smollm2-135m-sft", start=None)})
        if "learning_rate" in steps:
            trials = [trial for trial in self.sweep() if trial.method in chosen]
            self.make({self.folder(trial, 0): self.profile(trial, 0) for trial in trials})
        if "curve" in steps:
            trials = self.curve()
            self.make(
                {
                    self.folder(trial, seed): self.profile(trial, seed)
                    for seed in range(self.options.seeds)
                    for trial in trials
                    if trial.method in chosen
                }
            )
            self.write(trials)

    def sweep(self) -> list:
        """Every method at every learning rate."""
        from studies.trials import Trial

        return [
            Trial(method, {**SWEEP, "learning_rate": rate}, "learning_rate", f"{rate:g}")
            for method in METHODS
            for rate in LEARNING_RATES
        ]

    def curve(self) -> list:
        """Every method at its learning rate; the others are compared with Iterative RPO."""
        from studies.trials import Trial

        rates = {method: self.best_rate(method) for method in METHODS}
        missing = [method for method in self.options.methods if not rates[method]]
        if missing:
            raise UserError(
                f"{self.records.file} has no finished run of step 2, which chooses the learning "
                f"rate, for {', '.join(missing)}. Make it first: --steps learning_rate."
            )
        return [Trial(m, {"learning_rate": r}, against="irpo") for m, r in rates.items() if r]

    def best_rate(self, method: str) -> float | None:
        """The learning rate with the higher accuracy on validation questions; None before step 2.

        Accuracy is sampled: with few questions greedy decoding has ties.
        """
        accuracy = {}
        for trial in self.sweep():
            run = self.records.runs.get((trial.name, 0))
            rows = run["metrics"] if run and trial.method == method else []
            for row in rows:
                if (row["metric"], row["iteration"]) == ("sampled", 1):
                    accuracy[trial.settings["learning_rate"]] = row["value"]
        return max(accuracy, key=accuracy.get, default=None)

    def profile(self, trial=None, seed: int = 0, profile: str = "smollm2-135m-cpu", **changes):
        """The settings of a run."""
        from irpo_utils import profiles

        changes = {"start": str(self.m0 / "iteration_1" / "adapter"), "seed": seed} | changes
        if trial is not None:
            changes |= {"method": trial.method, **trial.settings}
        if self.options.small:
            changes |= {"task": "word_problems", "model": "seed", "dtype": "float32"}
            changes |= {"n_questions": 6, "n_eval_questions": 4, "eval_samples": 1}
            changes |= {"max_length": None}
            changes |= {} if trial is None or trial.factor else {"iterations": 2}
        return profiles.get(profile, data=self.options.data, **changes)

    def folder(self, trial, seed: int) -> Path:
        return self.runs / ("sweep" if trial.factor else "curve") / trial.name / f"seed_{seed}"

    def make(self, work: dict) -> None:
        """Make the runs of `work` that are not kept yet, and keep each as soon as it is done."""
        from studies import report, runner

        todo = {path: p for path, p in work.items() if not self.is_kept(path, p)}
        with tqdm(total=len(work), initial=len(work) - len(todo), desc="runs") as bar:
            for path in runner.run_all(todo, self.runs, self.options.jobs):
                record = report.run_record(path) | {"profile": self.settings(todo[path])}
                self.records.add(path.parent.name, todo[path].seed, record)
                bar.update()

    def is_kept(self, path: Path, profile) -> bool:
        kept = self.records.runs.get((path.parent.name, profile.seed))
        if kept and kept["profile"] != self.settings(profile):
            raise UserError(
                f"{self.records.file} has {path.parent.name} with other settings. Give another "
                "--out and --runs, or remove that line."
            )
        # The others start from the adapter of M_0, so its run directory must be there.
        return bool(kept) and (path != self.m0 or (path / "iteration_1" / "adapter").exists())

    def settings(self, profile) -> dict:
        """The settings without the place of the data, which differs from machine to machine."""
        from studies import trials

        return trials.portable(dataclasses.replace(profile, data=None), self.runs)

    def write(self, trials: list) -> None:
        """The tables, and the figure of greedy and sampled accuracy."""
        import pandas

        from irpo_utils import plots
        from studies import api, figures, report

        record = {"study": NAME, "rates": {t.method: t.settings["learning_rate"] for t in trials}}
        names = {trial.name for trial in trials}
        runs = {key: run for key, run in self.records.runs.items() if key[0] in names}
        means = report.means(trials, runs)
        means.to_csv(self.out / f"{NAME}_mean.csv", index=False)
        both = [report.paired(trials, runs, name).assign(metric=name) for name in report.ANSWERS]
        pandas.concat(both).to_csv(self.out / f"{NAME}_paired.csv", index=False)
        alone = []  # of one seed, so the interval is over questions
        for seed in sorted({seed for _, seed in runs}):
            of_seed = {key: run for key, run in runs.items() if key[1] == seed}
            there = [trial for trial in trials if (trial.name, seed) in of_seed]
            tables = [report.paired(there, of_seed, m).assign(metric=m) for m in report.ANSWERS]
            alone.append(pandas.concat(tables).assign(seed=seed))
        pandas.concat(alone).to_csv(self.out / f"{NAME}_by_seed.csv", index=False)
        table = report.write_table(NAME, trials, runs, self.out, record)
        titles = [api.method_title(name) for name in means.method]
        figure = figures.accuracy_of_methods(means.assign(method=titles))
        plots.save(figure, self.out, NAME, table, report.made_by(runs, record))
        print(f"Figure: {self.out / NAME}.png")


if __name__ == "__main__":
    sys.exit(cli.run_command(main, sys.argv[1:]))
