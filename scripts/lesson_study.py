"""The study behind the lesson: β, the NLL term, rejection-sampling fine-tuning and more, on a model
that errs in its working.

    python scripts/lesson_study.py beta --jobs 2          # one part; `all` runs all of them
    python scripts/lesson_study.py comparison --seeds 3   # the first three seeds
    python scripts/lesson_study.py beta --list            # what is finished and what is left

Each finished run is one line of `figures/lesson_runs.jsonl`. A run that is there is not made again,
so the same command resumes a study that was stopped. Runs are ordered by seed: the finished ones
are a complete grid for the first seeds. The part `plain` first makes the model that it needs.

After every iteration a line records: correctness per question on validation (greedy and sampled)
and on test (greedy); log-probabilities of the chosen and rejected completions of 256 held-out
pairs; KL to the previous model and to M0; nats per completion; how far training moved the pairs
that it trained on; and misconceptions in the completions. `scripts/lesson_report.py` turns the
lines into tables and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"  # run directories, and the completions of M0 that runs share
RUNS_FILE = ROOT / "figures" / "lesson_runs.jsonl"
PAIRS_FILE = ROOT / "figures" / "lesson_held_out_pairs.jsonl"
MODELS = {
    "misconceptions": "seed-misconceptions",
    "hasty": "seed",
    "plain": str(RUNS / "lesson_models" / "plain"),  # the same without words
}
ITERATIONS = 4
STEPS = 20  # optimiser steps per iteration, the same for all methods
# 160 questions with 6 completions give about 300 pairs of M0: 20 steps of 16 are about one epoch.
BASE = dict(
    task="word_problems",
    engine="cpu",
    iterations=ITERATIONS,
    n_questions=160,
    n_samples=6,
    k_pairs=3,
    max_steps=STEPS,
    batch_size=16,
    max_new_tokens=112,
    dequantize=True,
    eval_split="validation",
    n_eval_questions=300,
    eval_samples=1,
    eval_samples_ends=1,
)
TEST_QUESTIONS = 300
HELD_OUT_PAIRS = 256
KL_COMPLETIONS = 150
# Questions per step of GRPO: 160 questions in 20 steps, with as many completions as other methods.
GRPO_BATCH = 8

# Name here -> method of the package. The last two train once, for 1, 2, 3 and 4 times STEPS steps.
METHODS = {
    "irpo": "irpo",
    "dpo": "iterative_dpo",
    "rft": "star",
    "grpo": "grpo",
    "irpo_m0_samples": "irpo",
    "sft_gold": "sft_gold",
    "irpo_lucky": "irpo_lucky",
    "rft_lucky": "star_lucky",
}
NOT_ITERATIVE = ("irpo_m0_samples", "sft_gold")
WITH_PAIRS = ("irpo", "dpo", "irpo_m0_samples", "irpo_lucky")  # methods with a DPO term


@dataclass(frozen=True)
class Run:
    """One run of the study: a method with settings from one seed model and one seed."""

    method: str
    seed: int
    settings: dict = field(default_factory=dict, hash=False)
    model: str = "misconceptions"

    @property
    def trial(self) -> str:
        """The run without its seed, for example
        `misconceptions/irpo/beta=1/learning_rate=0.0003`."""
        parts = [f"{name}={show(value)}" for name, value in sorted(self.settings.items())]
        return "/".join([self.model, self.method, *parts])

    @property
    def key(self) -> str:
        """Identity of the run in the records."""
        return f"{self.trial}/seed={self.seed}"


def show(value) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------- parts of the study


def with_nll(beta: float, learning_rate: float, alpha: float, seed: int, model="misconceptions"):
    """Iterative RPO (alpha 1) or DPO without NLL (alpha 0)."""
    settings = {"beta": float(beta), "learning_rate": float(learning_rate)}
    return Run("irpo" if alpha else "dpo", seed, settings, model)


def beta_part(seeds: int, records: dict) -> list[Run]:
    """β against the learning rate, with and without the NLL term."""
    return [
        with_nll(beta, rate, alpha, seed)
        for seed in range(seeds)
        for rate in (3e-4, 1e-3)
        for beta in (1.0, 0.1, 0.3, 3.0)
        for alpha in (1, 0)
    ]


def core_part(seeds: int, records: dict) -> list[Run]:
    """The corners of the grid, and rejection-sampling fine-tuning at the same learning rates."""
    runs = []
    for seed in range(seeds):
        for rate in (3e-4, 1e-3):
            for beta in (1.0, 0.1):
                runs += [with_nll(beta, rate, 1, seed), with_nll(beta, rate, 0, seed)]
            runs.append(Run("rft", seed, {"learning_rate": rate}))
    return runs


def weights_part(seeds: int, records: dict) -> list[Run]:
    """Is it β, or the weight of the NLL term against the DPO term?

    The DPO gradient is proportional to β. With α = 1 the NLL term therefore weighs a tenth as
    much at β = 1 as at β = 0.1. These runs hold α / β at the value of the other β with α = 1.
    """
    return [
        Run("irpo", seed, {"beta": beta, "learning_rate": 3e-4, "alpha": alpha})
        for seed in range(seeds)
        for beta, alpha in ((1.0, 10.0), (0.1, 0.1))
    ]


def hasty_part(seeds: int, records: dict) -> list[Run]:
    """β on the first seed model, whose pairs share fewer tokens (`figures/lesson_pairs.csv`)."""
    return [
        with_nll(beta, rate, alpha, seed, "hasty")
        for seed in range(seeds)
        for rate in (3e-4, 1e-3)
        for beta in (0.1, 1.0)
        for alpha in (1, 0)
    ]


def plain_part(seeds: int, records: dict) -> list[Run]:
    """β on a model with the same misconceptions and no words around the equations: fewer nats per
    completion. At the learning rate where β matters on the model with words."""
    return [
        with_nll(beta, 1e-3, alpha, seed, "plain")
        for seed in range(seeds)
        for beta in (1.0, 0.1, 0.3, 3.0)
        for alpha in (1, 0)
    ]


RATES = {
    "irpo": (3e-4, 1e-3, 3e-3),
    "dpo": (3e-4, 1e-3, 3e-3),
    "rft": (3e-4, 1e-3, 3e-3),
    "irpo_m0_samples": (3e-4, 1e-3, 3e-3),
    "sft_gold": (3e-4, 1e-3, 3e-3),
    "grpo": (3e-4, 1e-3, 3e-3),
}
TUNED_BETA = ("irpo", "dpo")  # `beta` has their runs at four β
LADDER = [float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 3)]


def tuning_part(seeds: int, records: dict) -> list[Run]:
    """A learning rate for every method, judged after four iterations on validation; one seed.

    The search goes on until both neighbours of the best learning rate have been tried, and of the
    best β for methods that are tuned over it as well.
    """
    beta = best_beta(records)
    runs = []
    for method, rates in RATES.items():
        settings = {"beta": beta} if method in WITH_PAIRS else {}
        tried = [Run(method, 0, {**settings, "learning_rate": rate}) for rate in rates]
        if all(run.key in records for run in tried):
            best = best_settings(method, records)
            names = ("learning_rate", "beta") if method in TUNED_BETA else ("learning_rate",)
            tried += [
                Run(method, 0, {**best, name: value})
                for name in names
                for value in neighbours(best[name])
            ]
        runs += {run.key: run for run in tried}.values()
    return runs


def neighbours(value: float) -> list[float]:
    """The values below and above one of LADDER; one value at its ends."""
    i = LADDER.index(value)
    return LADDER[max(0, i - 1) : i] + LADDER[i + 1 : i + 2]


def comparison_part(seeds: int, records: dict) -> list[Run]:
    """Every method at its tuned settings."""
    tuned = {method: best_settings(method, records) for method in RATES}
    return [
        Run(method, seed, settings)
        for seed in range(seeds)
        for method, settings in tuned.items()
        if settings is not None
    ]


def new_completions_part(seeds: int, records: dict) -> list[Run]:
    """Training on the completions of M0 alone at the settings of Iterative RPO: where these methods
    differ in their learning rates, a difference between them is not one of completions."""
    settings = best_settings("irpo", records)
    return [Run("irpo_m0_samples", seed, settings) for seed in range(seeds) if settings]


def map_part(seeds: int, records: dict) -> list[Run]:
    """Learning rate x α at the best β; α = 1 and 0 are `irpo` and `dpo`, and RFT has no DPO
    term."""
    beta, runs = best_beta(records), []
    for seed in range(seeds):
        for rate in RATES["irpo"]:
            settings = {"beta": beta, "learning_rate": rate}
            runs += [Run("irpo", seed, settings), Run("dpo", seed, settings)]
            runs += [Run("irpo", seed, {**settings, "alpha": alpha}) for alpha in (0.3, 3.0)]
            runs.append(Run("rft", seed, {"learning_rate": rate}))
    return runs


# Settings that differ from those of the other runs; "lucky" differs in its reward.
REGIMES = {
    "few samples": {"n_samples": 3},
    "hot": {"temperature": [1.5]},
    "half": {"n_questions": 80},
    "lucky": {},
}


def regime_runs(regime: str, rate: float, beta: float, seed: int) -> tuple[Run, Run]:
    """Rejection-sampling fine-tuning and Iterative RPO in one regime."""
    settings = {**REGIMES.get(regime, {}), "learning_rate": rate}
    luck = "_lucky" if regime == "lucky" else ""
    return (Run(f"rft{luck}", seed, settings), Run(f"irpo{luck}", seed, settings | {"beta": beta}))


def regimes_part(seeds: int, records: dict) -> list[Run]:
    """When do rejected completions help? Pairs against chosen completions alone, with the same
    number of steps."""
    beta = best_beta(records)
    return [
        run
        for seed in range(min(seeds, 3))
        for regime in REGIMES
        for rate in (3e-4, 1e-3)
        for run in regime_runs(regime, rate, beta, seed)
    ]


def long_part(seeds: int, records: dict) -> list[Run]:
    """Eight iterations at the settings of the comparison."""
    return [
        Run(method, seed, {**best_settings(method, records), "iterations": 8})
        for seed in range(min(seeds, 3))
        for method in ("irpo", "rft", "dpo")
        if best_settings(method, records) is not None
    ]


PARTS = {
    "core": core_part,
    "weights": weights_part,
    "beta": beta_part,
    "tuning": tuning_part,
    "comparison": comparison_part,
    "new_completions": new_completions_part,
    "hasty": hasty_part,
    "plain": plain_part,
    "map": map_part,
    "regimes": regimes_part,
    "long": long_part,
}
SEEDS = {
    "core": 3,
    "weights": 3,
    "beta": 3,
    "comparison": 5,
    "new_completions": 5,
    "hasty": 3,
    "plain": 3,
    "map": 3,
    "regimes": 3,
    "long": 3,
}


def last_accuracy(record: dict, split: str = "validation") -> float:
    """Greedy accuracy after the last iteration; 0 for a run that stopped before."""
    last = record["iterations"][-1]
    complete = last["iteration"] == record["planned_iterations"]
    return share(last[split]["greedy"]) if complete else 0.0


def share(digits: str, of: int = 1) -> float:
    """Mean of a string of counts, one digit per question, as a share of `of`."""
    return sum(int(digit, 36) for digit in digits) / (len(digits) * of)


def best_beta(records: dict[str, dict]) -> float:
    """The β of tuned Iterative RPO; before its tuning, 1."""
    return (best_settings("irpo", records) or {"beta": 1.0})["beta"]


def best_settings(method: str, records: dict) -> dict | None:
    """The settings with the best final validation accuracy of seed 0; ties go to the better sampled
    accuracy."""
    found = {}
    for record in records.values():
        known = set(record["settings"]) <= {"beta", "learning_rate"}
        if (
            known
            and record["model"] == "misconceptions"
            and record["method"] == method
            and record["seed"] == 0
        ):
            last = record["iterations"][-1]["validation"]
            found[record["key"]] = (
                last_accuracy(record),
                share(last["sampled"], last["k"]),
                record["settings"],
            )
    if len(found) < 3:
        return None
    return max(found.values(), key=lambda row: row[:2])[2]


# ------------------------------------------------------------------------------------------ one run


def profile_of(run: Run, iterations: int, max_steps: int):
    """The profile of one run directory of a run."""
    from irpo_utils.profiles import Profile
    from studies import lucky  # noqa: F401 (adds the methods with lucky winners)

    settings = {**BASE, "model": MODELS[run.model], "method": METHODS[run.method], "seed": run.seed}
    settings |= run.settings | {"iterations": iterations, "max_steps": max_steps}
    if run.method == "grpo":
        settings |= {"batch_size": GRPO_BATCH, "max_steps": -1}
    return Profile(**settings)


def make(run: Run, folder: Path) -> list[dict]:
    """Make the run directories; one entry per iteration with the folders of its artefacts.

    Keys: `adapter` and `previous` (None: M0), `evaluation`, `pairs` that it was trained on (or
    None), `seconds`.
    """
    from irpo_utils import UserError
    from studies import api

    iterations = run.settings.get("iterations", ITERATIONS)
    made: list[dict] = []
    if run.method in NOT_ITERATIVE:
        jobs = [(folder / f"steps_{t}", 1, STEPS * t, t) for t in range(1, iterations + 1)]
    else:
        jobs = [(folder / "run", iterations, STEPS, None)]
    for place, count, steps, label in jobs:
        profile = profile_of(run, count, steps)
        share_m0(profile, place)
        started = time.time()
        try:
            api.run(profile, place, progress=False)
        except UserError as error:
            if not str(error).startswith(("no pairs", "Training stopped")):
                raise
            (folder / "stopped.txt").write_text(str(error))
        keep_m0(profile, place)
        seconds = round(time.time() - started, 1)
        for t in range(count + 1):
            place_t, before = place / f"iteration_{t}", place / f"iteration_{t - 1}"
            if not (place_t / "evaluation" / api.checksums.NAME).exists():
                break
            if label not in (None, 1) and t == 0:
                continue
            made.append(
                {
                    "iteration": t if label is None or t == 0 else label,
                    "adapter": place_t / "adapter" if t else None,
                    "previous": before / "adapter" if t > 1 else None,
                    "evaluation": place_t / "evaluation",
                    "pairs": before / "pairs" if t and (before / "pairs").exists() else None,
                    "seconds": seconds,
                }
            )
    return made


def m0_folder(profile) -> Path:
    """Where the completions of M0 are kept that runs with the same sampling share."""
    names = ("model", "seed", "n_questions", "n_samples", "temperature", "max_new_tokens")
    text = json.dumps([getattr(profile, name) for name in names])
    return RUNS / "lesson_m0" / f"{Path(profile.model).name}_{zlib.crc32(text.encode())}"


def share_m0(profile, place: Path) -> None:
    """Put the completions of M0 into a run directory; the run checks that they were made with its
    settings."""
    from studies import api

    if (place / "profile.json").exists() or not m0_folder(profile).exists():
        return
    api.prepare_run_directory(place, profile)
    stages = ["evaluation"]
    if profile.method not in ("sft_gold", "grpo"):
        stages += ["samples", "graded"]
    for stage in stages:
        source = m0_folder(profile) / stage
        if source.exists():
            shutil.copytree(source, place / "iteration_0" / stage)


def keep_m0(profile, place: Path) -> None:
    """Keep the completions of M0 of a run for others."""
    target = m0_folder(profile)
    for stage in ("samples", "graded", "evaluation"):
        source = place / "iteration_0" / stage
        if source.exists() and not (target / stage).exists():
            partial = target / f".{stage}.{os.getpid()}"
            shutil.copytree(source, partial)
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(partial, target / stage)
            shutil.rmtree(partial, ignore_errors=True)


class Meter:
    """Measures the models of a run: held-out pairs, KL, test accuracy, misconceptions."""

    def __init__(self, run: Run):
        from irpo_utils import sampling, tasks
        from irpo_utils.engines import cpu
        from studies import api

        self.run, self.base = run, profile_of(run, 1, STEPS)
        self.task = tasks.get(self.base.task)
        self.model, self.tokenizer = api.load_model(self.base)
        self.engine = cpu.Engine()
        self.test = self.task.load("test").select(range(TEST_QUESTIONS))
        questions = self.task.load("validation").select(range(self.base.n_eval_questions))
        self.questions = {row["id"]: row for row in questions}
        _, ids = sampling.render_prompts(
            self.model, self.tokenizer, questions, self.task, self.base.max_new_tokens
        )
        self.prompts = dict(zip(questions["id"], ids, strict=True))
        self.pairs = self.held_out_pairs()

    def held_out_pairs(self):
        """Pairs of M0 on new questions, one per question: the same for all runs of a seed model."""
        import random

        from datasets import Dataset

        from irpo_utils import grading, pairs, sampling
        from irpo_utils.tasks import word_problems

        rows = held_out_rows(self.run.model)
        if rows:
            return Dataset.from_list(rows)
        rng = random.Random("held-out pairs")
        known = {row["question"] for split in word_problems.all_splits().values() for row in split}
        drawn: dict[str, dict] = {}
        while len(drawn) < 600:
            row = word_problems.make_question(rng, "seen")
            if row["question"] not in known:
                drawn[row["question"]] = {"id": f"held-out-{len(drawn):04d}", **row}
        samples = sampling.sample(
            self.model,
            self.tokenizer,
            Dataset.from_list(list(drawn.values())),
            self.task,
            n=8,
            temperature=1.0,
            max_new_tokens=self.base.max_new_tokens,
            seed=7,
            progress=False,
            engine=self.engine,
        )
        made, _ = pairs.build_pairs(grading.grade(samples, self.task), k=1)
        made = made.select(range(min(HELD_OUT_PAIRS, len(made))))
        columns = ("id", "prompt", "chosen", "rejected")
        columns += ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{"model": self.run.model} | {c: row[c] for c in columns} for row in made]
        if not held_out_rows(self.run.model):
            with PAIRS_FILE.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return made

    def become(self, adapter: Path | None) -> None:
        self.engine.use(self.model, adapter)

    def score(self, prompts, completions) -> list[float]:
        from irpo_utils import logprobs

        return logprobs.score(self.model, self.tokenizer, list(prompts), list(completions))

    def measure(self, made: dict) -> dict:
        """The entry of one iteration in the record."""
        from datasets import load_from_disk

        evaluation = load_from_disk(str(made["evaluation"]))
        sampled, first = evaluation["sampled"], []
        seen: set[str] = set()
        for i, question in enumerate(sampled["id"]):
            if question not in seen and len(first) < KL_COMPLETIONS:
                seen.add(question)
                first.append(i)
        drawn = sampled.select(first)
        prompts, completions = [self.prompts[i] for i in drawn["id"]], drawn["completion_ids"][:]
        self.become(made["adapter"])
        own = drawn["logprob"][:]  # of the sampler, at temperature 1
        kept = m0_folder(self.base) / "measured.json"
        if made["adapter"] is None and kept.exists():
            return json.loads(kept.read_text())
        entry = {
            "iteration": made["iteration"],
            "validation": correct(evaluation, len(self.questions)),
            "test": self.on_test(),
            "chosen": rounded(self.score(self.pairs["prompt_ids"], self.pairs["chosen_ids"])),
            "rejected": rounded(self.score(self.pairs["prompt_ids"], self.pairs["rejected_ids"])),
            "nats": round(-sum(own) / len(own), 3),
            "unfinished": sum(not value for value in sampled["finished"]),
            "tokens": round(sum(map(len, completions)) / len(completions), 2),
            "misconceptions": {
                kind: self.misconceptions(evaluation[kind]) for kind in ("greedy", "sampled")
            },
        }
        if made["adapter"] is None:
            partial = kept.with_name(f".measured.{os.getpid()}")
            partial.write_text(json.dumps(entry))
            os.replace(partial, kept)
            return entry
        text = (made["adapter"] / "training_log.jsonl").read_text()
        log = [json.loads(line) for line in text.splitlines()]
        entry |= {"steps": len(log), "training_seconds": round(log[-1]["seconds"], 1)}
        entry["seconds"] = made["seconds"]
        entry |= training_margin(log, self.base.beta)
        if made["pairs"] is not None and self.run.method != "sft_gold":
            counts = json.loads((made["pairs"] / "counts.json").read_text())
            entry |= {"pairs": counts["pairs"], "questions_with_pairs": counts["used"]}
        self.become(made["previous"])
        previous = self.score(prompts, completions)
        entry["kl_previous"] = mean_and_error(own, previous)
        if made["previous"] is None:
            entry["kl_m0"] = entry["kl_previous"]
        else:
            self.become(None)
            m0 = self.score(prompts, completions)
            entry["kl_m0"] = mean_and_error(own, m0)
        return entry

    def on_test(self) -> dict:
        from irpo_utils import grading, sampling

        drawn = sampling.sample(
            self.model,
            self.tokenizer,
            self.test,
            self.task,
            n=1,
            temperature=0.0,
            max_new_tokens=self.base.max_new_tokens,
            progress=False,
            engine=self.engine,
        )
        graded = grading.grade(drawn, self.task)
        return {"greedy": "".join(str(int(value)) for value in graded["correct"])}

    def misconceptions(self, completions) -> dict:
        """Counts per misconception, of lines that show no working, and the share of lines per
        label."""
        from collections import Counter

        from studies import misconceptions

        rows = [self.questions[i] for i in completions["id"]]
        texts = completions["completion"][:]
        labels = Counter(
            label
            for row, text in zip(rows, texts, strict=True)
            for label in misconceptions.classify(row, text)
        )
        counts = misconceptions.count_misconceptions(rows, texts)
        return {
            "labels": dict(labels),
            "lines": {name: list(count.values()) for name, count in counts.items()},
        }


def held_out_rows(model: str) -> list[dict]:
    """The held-out pairs of a seed model that are on disk."""
    if not PAIRS_FILE.exists():
        return []
    rows = map(json.loads, PAIRS_FILE.read_text().splitlines())
    return [row for row in rows if row["model"] == model]


def correct(evaluation, n_questions: int) -> dict:
    """Correct completions per question: a digit each for greedy (of 1) and sampled (of k)."""
    counted = {}
    for kind in ("greedy", "sampled"):
        right = dict.fromkeys(evaluation[kind]["id"], 0)
        for question, value in zip(
            evaluation[kind]["id"], evaluation[kind]["correct"], strict=True
        ):
            right[question] += value
        counted[kind] = "".join(map(str, right.values()))
    counted["k"] = len(evaluation["sampled"]) // n_questions
    return counted


def rounded(values) -> list[float]:
    return [round(value, 2) for value in values]


def training_margin(log: list[dict], beta: float) -> dict:
    """Margin (nats, without β) and accuracy on the last five batches of a log with a DPO term."""
    rows, names = log[-5:], ("rewards/margins", "rewards/accuracies")
    if rows[0].get(names[0]) is None:
        return {}
    margin, accuracy = (sum(row[name] for row in rows) / len(rows) for name in names)
    return {"train_margin": round(margin / beta, 3), "train_accuracy": round(accuracy, 3)}


def mean_and_error(own, other) -> list[float]:
    """Mean difference of log-probabilities (an estimate of the KL divergence) and its standard
    error, nats."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    return [round(mean, 4), round((variance / n) ** 0.5, 4)]


def execute(run: Run, threads: int, command: str) -> dict:
    """Make and measure one run; the record of it."""
    import torch

    from irpo_utils.ops import drift
    from studies import api

    api.quiet_libraries()
    torch.set_num_threads(threads)
    drift.KL_QUESTIONS = drift.PAIRS = 1  # the study measures the KL divergence itself
    folder = RUNS / "lesson" / run.key.replace("/", "__")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with (folder / "output.txt").open("a") as file, contextlib.redirect_stdout(file):
        made = make(run, folder)
        meter = Meter(run)
        entries = [meter.measure(one) for one in made]
        environment = api.environment()
    stopped = folder / "stopped.txt"
    record = {
        "key": run.key,
        "trial": run.trial,
        "model": run.model,
        "method": run.method,
        "settings": run.settings,
        "seed": run.seed,
        "planned_iterations": run.settings.get("iterations", ITERATIONS),
        "stopped": stopped.read_text() if stopped.exists() else None,
        "seconds": round(time.time() - started, 1),
        "profile": dataclasses.asdict(profile_of(run, ITERATIONS, STEPS))
        | {"model": f"seed_model:{run.model}"},
        "environment": environment | {"command": command, "threads": threads},
        "iterations": entries,
    }
    shutil.rmtree(folder, ignore_errors=True)
    return record


# -------------------------------------------------------------------------------------- the command


def load_records(file: Path = RUNS_FILE) -> dict[str, dict]:
    """Finished runs by key."""
    if not file.exists():
        return {}
    rows = map(json.loads, file.read_text().splitlines())
    return {row["key"]: row for row in rows}


def _execute(run: Run, threads: int, command: str) -> tuple[str, dict | str]:
    import traceback

    try:
        return run.key, execute(run, threads, command)
    except Exception:  # one run that fails must not end the study
        return run.key, traceback.format_exc()


def study(
    parts: list[str], seeds: int | None, jobs: int, threads: int = 1, match: str = ""
) -> None:
    """Make the runs of these parts that are missing, `jobs` at a time, and append each to the
    records."""
    command = f"python scripts/lesson_study.py {' '.join(parts)} --jobs {jobs}"
    if any(run.model == "plain" for run in missing(parts, seeds, match)):
        make_plain_model()
    failed: set[str] = set()
    running: dict = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=6) as pool:
        while True:
            # The list is made anew after every run: later runs may depend on earlier results.
            todo = [run for run in missing(parts, seeds, match)]
            todo = [run for run in todo if run.key not in failed | set(running)]
            for run in todo[: jobs - len(running)]:
                running[run.key] = pool.apply_async(_execute, (run, threads, command))
                print(f"{time.strftime('%H:%M:%S')} started {run.key}", flush=True)
            if not running:
                break
            time.sleep(2)
            for key, result in list(running.items()):
                if not result.ready():
                    continue
                del running[key]
                _, record = result.get()
                if isinstance(record, str):
                    failed.add(key)
                    print(f"{key} failed:\n{record}", flush=True)
                    continue
                with RUNS_FILE.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{time.strftime('%H:%M:%S')} {summary(record)}", flush=True)


def make_plain_model() -> None:
    """Make the model of the part `plain`, ten minutes on 2 cores, unless it is there."""
    folder = Path(MODELS["plain"])
    if not (folder / "model.safetensors").exists():
        print(f"{time.strftime('%H:%M:%S')} making {folder}, ten minutes", flush=True)
        script = Path(__file__).with_name("make_misconceptions_model.py")
        options = ["--words", "0", "--out", str(folder)]
        subprocess.run([sys.executable, str(script), *options], check=True)


def missing(parts: list[str], seeds: int | None, match: str = "") -> list[Run]:
    """The runs of these parts that have no record and whose key contains `match`, each once."""
    records, runs = load_records(), {}
    for part in parts:
        for run in PARTS[part](seeds or SEEDS.get(part, 1), records):
            if run.key not in records and match in run.key:
                runs.setdefault(run.key, run)
    return list(runs.values())


def summary(record: dict) -> str:
    """One line per run: greedy validation accuracy, and KL to M0 at the end."""
    accuracy = [f"{100 * share(row['validation']['greedy']):.1f}" for row in record["iterations"]]
    last = record["iterations"][-1]
    kl = f", KL to M0 {last['kl_m0'][0]:.2f}" if "kl_m0" in last else ""
    return f"{record['key']}: {', '.join(accuracy)} %{kl}, {record['seconds']:.0f} s"


def main() -> None:
    """Read the options and run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--seeds", type=int, help="the first so many seeds of each part")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one process each")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--match", default="", help="only runs whose key contains this text")
    parser.add_argument("--list", action="store_true", help="show results and what is left")
    args = parser.parse_args()
    parts = list(PARTS) if "all" in args.parts else args.parts
    if args.list:
        for record in load_records().values():
            print(summary(record))
        for run in missing(parts, args.seeds, args.match):
            print(f"missing: {run.key}")
        return
    study(parts, args.seeds, args.jobs, args.threads, args.match)


if __name__ == "__main__":
    main()
