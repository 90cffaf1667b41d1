"""The loop: sample, grade, pair, train, evaluate, T times. The same call resumes a run.

    runs/NAME/
      profile.json  metrics.csv
      iteration_0/  evaluation/  samples/ graded/ pairs/  metrics.json           made with M_0
      iteration_1/  adapter/  evaluation/  samples/ graded/ pairs/  metrics.json     M_1, ...

`Folder` stores each artefact and does not make again what is there. `ops.run` passes a storage that
also survives kills within a stage, full disks and damaged files.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from pathlib import Path

import pandas
from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm

from irpo_utils import UserError, evaluation, grading, methods, pairs, sampling, tasks, training
from irpo_utils.profiles import Profile


def run(profile: Profile, out, keep=None, engine=None, progress: bool = True) -> list[dict]:
    """Iterative RPO with these settings in the run directory `out`; resumes what is there.

    keep: how artefacts are stored, by default `Folder(out)`. engine: how to compute, by default the
    profile's. Returns the rows of `metrics.csv`: `method`, `seed`, `iteration`, `split`, `metric`,
    `k`, `value`, `low`, `high`, `n`.
    """
    stages = Stages(methods.apply(profile), keep or Folder(out), engine, progress)
    p = stages.p
    stages.evaluate(0)
    for t in range(p.iterations):
        if stages.method.train is None:
            samples = stages.sample(t)
            graded = stages.grade(t, samples)
            stages.pair(t, graded)
        stages.train(t + 1)
        stages.evaluate(t + 1)
    return stages.keep.table(range(p.iterations + 1))


class Stages:
    """The stages of one run; each result is computed once and then read from `keep`."""

    def __init__(self, p: Profile, keep: Folder, engine=None, progress: bool = True):
        self.p, self.keep, self.method, self.task = (
            p,
            keep,
            methods.get(p.method),
            tasks.get(p.task),
        )
        self.train_questions = self.task.load("train", p.data).shuffle(seed=p.seed)
        self.eval_questions = first(self.task.load(p.eval_split, p.data), p.n_eval_questions)
        if self.method.examples:
            examples = self.task.load("train", p.data).select(range(self.method.examples))
            self.task = tasks.FewShot(self.task, list(examples))
        self.engine, self.progress = engine or find_engine(p.engine), progress
        self.history: list[Dataset] = []  # the pairs of all iterations so far
        keep.check(self)
        self.model, self.tokenizer = self.engine.load(p, keep.revision)
        keep.begin(self)

    def draw(self, questions, n: int, temperature: float, seed: int, top_p: float = 1.0) -> Dataset:
        """n completions per question of the model as it is."""
        p, parts = self.p, (self.model, self.tokenizer, questions, self.task, n, temperature)
        sizes = p.max_new_tokens, seed, p.sampling_batch_size
        return sampling.sample(*parts, top_p, *sizes, self.progress, self.engine)

    def sample(self, t: int) -> Dataset | None:
        """N completions of M_t per training question; None if the method needs none."""
        if not self.method.samples:
            return None
        # A method that starts from another one's M_1 trains on the samples of M_0.
        adapter = None if self.method.start and t == 0 else self.keep.adapter(t)

        def make(questions) -> Dataset:
            self.engine.use(self.model, adapter)
            p, temperature = self.p, self.p.temperature_of(t)
            return self.draw(questions, p.n_samples, temperature, self.seed(t, 1), p.top_p)

        return self.keep.dataset(t, "samples", make, over=self.questions(t))

    def grade(self, t: int, samples: Dataset | None) -> Dataset | None:
        """Reward 1 where the final answer equals the gold answer, or the method's own reward."""
        if samples is None:
            return None
        graded = self.keep.dataset(t, "graded", lambda: grading.grade(samples, self.task))
        return methods.reward(graded, self.method.reward)

    def pair(self, t: int, graded: Dataset | None) -> None:
        """K pairs per question, for training M_{t+1}."""

        def make() -> tuple[Dataset, dict]:
            p, questions, seed = self.p, self.questions(t), self.seed(t, 2)
            if graded is None:
                prompts, _ = self.prompts(questions)
                limits = p.max_length, p.max_pairs, seed
                return pairs.gold_pairs(questions, prompts, self.tokenizer, *limits)
            gold = pairs.gold_completions(questions, self.tokenizer) if p.gold else None
            options = p.max_length, p.max_pairs, p.deduplicate, p.pairing, seed
            return pairs.build_pairs(graded, p.k_pairs, gold, *options)

        preferences, counts = self.keep.dataset(t, "pairs", make)
        self.history.append(preferences)
        n = counts["questions"]
        rows = [{"metric": f"pairs_{key}", "value": value, "n": n} for key, value in counts.items()]
        self.report(t, rows)

    def train(self, t: int) -> None:
        """M_t from M_{t-1}, which is also the reference, and its pairs."""
        p, seed = self.p, self.seed(t, 3)

        def make(**extra) -> Dataset:
            self.engine.use(self.model, self.keep.adapter(t - 1))
            model = self.model, self.tokenizer
            if self.method.train:
                return self.method.train(*model, self.questions(t - 1), self.task, p, seed)
            preferences = concatenate_datasets(self.history if p.keep_pairs else self.history[-1:])
            options = {"trainer": self.engine.trainer(self.model), "loss": p.loss, "seed": seed}
            options |= {"batch_size": p.batch_size, "micro_batch_size": p.micro_batch_size}
            options |= {"num_train_epochs": p.epochs, "max_steps": p.max_steps}
            options |= {"warmup_steps": p.warmup_ratio, "lr_scheduler_type": p.lr_scheduler}
            options |= {"max_grad_norm": p.max_grad_norm, "optim": p.optimizer}
            options |= {"gradient_checkpointing": p.gradient_checkpointing}
            options |= {"disable_tqdm": not self.progress} | extra
            return training.train(*model, preferences, p.alpha, p.beta, p.learning_rate, **options)

        self.keep.train(t, make, self)

    def evaluate(self, t: int) -> None:
        """Accuracy of M_t: greedy, and over k samples per question."""
        p = self.p
        k = p.eval_samples_ends if t in (0, p.iterations) else p.eval_samples

        def make(questions):
            self.engine.use(self.model, self.keep.adapter(t))
            greedy = self.draw(questions, 1, 0.0, self.seed(0, 4))
            sampled = self.draw(questions, k, p.eval_temperature, self.seed(0, 4))
            return evaluation.graded(greedy, sampled, self.task)

        answers = self.keep.dataset(t, "evaluation", make, over=self.eval_questions)
        rows = evaluation.score(answers["greedy"], answers["sampled"], k)
        self.report(t, rows + self.keep.evaluated(t, self, answers))

    def report(self, t: int, rows: list[dict]) -> None:
        """Add rows to the metrics of iteration t."""
        p = self.p
        head = {"method": p.method, "seed": p.seed, "iteration": t, "split": p.eval_split}
        columns = {"metric": None, "k": 0, "value": None, "low": None, "high": None, "n": None}
        self.keep.metrics(t, [head | columns | row for row in rows])

    def questions(self, t: int) -> Dataset:
        """The training questions of iteration t."""
        available = len(self.train_questions)
        n = min(self.p.n_questions or available, available)
        start = t * n if self.p.fresh_questions else 0
        return self.train_questions.select([i % available for i in range(start, start + n)])

    def prompts(self, questions: Dataset):
        """The rendered prompts of the questions, as text and as token ids."""
        settings = self.task, self.p.max_new_tokens
        return sampling.render_prompts(self.model, self.tokenizer, questions, *settings)

    def seed(self, t: int, purpose: int) -> int:
        """Different random numbers for every iteration and purpose, the same when resumed."""
        return (self.p.seed * 1000 + t) * 10 + purpose


def find_engine(name: str):
    """The engine of that name, from the module of that name in `irpo_utils/engines`."""
    try:
        return importlib.import_module(f"irpo_utils.engines.{name}").Engine()
    except ModuleNotFoundError as error:
        raise UserError(f"There is no engine {name!r} ({error}). Use plain or cpu.") from error


class Folder:
    """The storage of a run: one folder per artefact, moved into place when it is complete."""

    revision: str | None = None  # commit of a hub model

    def __init__(self, out: str | Path):
        self.out = Path(out)

    def check(self, stages: Stages) -> None:
        """Called before the model is loaded: refuse a directory made with other settings."""
        self.start = Path(stages.p.start) if stages.p.start else None
        text, path = json.dumps(dataclasses.asdict(stages.p), indent=1), self.out / "profile.json"
        if path.exists() and path.read_text() != text:
            raise UserError(f"{self.out} was made with other settings. Choose another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def begin(self, stages: Stages) -> None:
        """Called when the model is loaded."""

    def folder(self, t: int) -> Path:
        """Where the artefacts of iteration t are."""
        return self.out / f"iteration_{t}"

    def adapter(self, t: int) -> Path | None:
        """The adapter of M_t; None is a zero adapter."""
        return self.folder(t) / "adapter" if t > 0 else self.start

    def dataset(self, t: int, name: str, make, over: Dataset | None = None):
        """The artefact from disk, or made by `make()`, or by `make(over)` where `over` is given."""
        place = self.folder(t) / name
        if not place.exists():
            content = make() if over is None else make(over)
            self.put(place, lambda folder: save(content, folder))
        return load(place)

    def train(self, t: int, make, stages: Stages) -> None:
        """Make the adapter of M_t with `make()`, which returns the training log."""
        if not self.adapter(t).exists():
            log = make()
            self.put(self.adapter(t), lambda folder: save_adapter(stages.model, log, folder))

    def put(self, place: Path, write) -> None:
        """Write a folder under another name, then move it: it is there as a whole or not at all."""
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        os.replace(partial, place)

    def evaluated(self, t: int, stages: Stages, answers) -> list[dict]:
        """Called after each evaluation; returns further rows for the metrics."""
        return []

    def metrics(self, t: int, rows: list[dict]) -> None:
        """Add rows to metrics.json of iteration t; a row replaces an older one of its kind."""
        path = self.folder(t) / "metrics.json"
        old = json.loads(path.read_text()) if path.exists() else []
        new = {(row["metric"], row["k"]): row for row in [*old, *rows]}
        path.write_text(json.dumps(list(new.values()), indent=0) + "\n")
        describe(t, {row["metric"]: row["value"] for row in rows})

    def table(self, iterations) -> list[dict]:
        """The metrics of all iterations, also written to metrics.csv."""
        paths = [self.folder(t) / "metrics.json" for t in iterations]
        rows = [row for path in paths for row in json.loads(path.read_text())]
        pandas.DataFrame(rows).to_csv(self.out / "metrics.csv", index=False)
        return rows


def describe(t: int, value: dict) -> None:
    """New metrics on the screen, in a line."""
    if "greedy" in value:
        tqdm.write(f"M_{t}: greedy {value['greedy']:.1%}, sampled {value['sampled']:.1%}")
    else:
        count = {name.removeprefix("pairs_"): number for name, number in value.items()}
        tqdm.write("     {pairs} pairs from {used} of {questions} questions".format(**count))


def first(data: Dataset, n: int | None) -> Dataset:
    """The first n rows, or all."""
    return data if n is None else data.select(range(min(n, len(data))))


def save(content, folder: Path) -> None:
    """A `Dataset` or `DatasetDict`, or (`Dataset`, counts)."""
    data, counts = content if isinstance(content, tuple) else (content, None)
    data.save_to_disk(str(folder))
    if counts is not None:
        (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def load(folder: Path):
    """What `save` wrote."""
    data, counts = load_from_disk(str(folder)), folder / "counts.json"
    return (data, json.loads(counts.read_text())) if counts.exists() else data


def save_adapter(model, log: Dataset, folder: Path) -> None:
    """The adapter in PEFT's format, and the training log next to it."""
    # Without the last argument PEFT looks for the base on the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    log.to_json(folder / "training_log.jsonl")
