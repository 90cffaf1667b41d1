"""The loop: sample, grade, pair, train, evaluate, T times. The same call resumes a run.

    runs/NAME/
      profile.json  metrics.csv
      iteration_0/  evaluation/  samples/ graded/ pairs/  metrics.json          made with M_0
      iteration_1/  adapter/ training_log.jsonl  drift/ evaluation/  samples/ ...    M_1, and its data

`Folder` stores each artefact and does not make again what is there. `ops.run` passes a storage that
also survives kills within a stage, full disks and damaged files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pandas
from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm

from irpo_utils import (
    UserError,
    evaluation,
    grading,
    logprobs,
    methods,
    pairs,
    sampling,
    tasks,
    training,
)
from irpo_utils.profiles import Profile

KL_QUESTIONS = 256  # completions for the KL to the previous model, one per question
DRIFT_PAIRS = 128  # pairs whose log-probabilities are compared with the previous model


def run(profile: Profile, out, keep=None, engine=None, progress: bool = True) -> list[dict]:
    """Iterative RPO with these settings in the run directory `out`; resumes what is there.

    keep: how artefacts are stored, by default `Folder(out)`. engine: how to compute, by default the
    profile's. Returns the rows of `metrics.csv`: `method`, `seed`, `iteration`, `split`, `metric`,
    `k`, `value`, `low`, `high`, `n`.
    """
    stages = Stages(methods.apply(profile), keep or Folder(out), engine, progress)
    p, history = stages.p, []
    stages.evaluate(0)
    for t in range(p.iterations):
        if stages.method.train is None:
            samples = stages.sample(t)
            graded = stages.grade(t, samples)
            history.append(stages.pair(t, graded))
        stages.train(t + 1, history if p.keep_pairs else history[-1:])
        stages.evaluate(t + 1)
    return stages.keep.table(range(p.iterations + 1))


class Stages:
    """The stages of one run; each is computed once and then read from `keep`."""

    def __init__(self, p: Profile, keep: Folder, engine=None, progress: bool = True):
        self.p, self.keep, self.method = p, keep, methods.get(p.method)
        self.task = tasks.get(p.task)
        self.train_questions = self.task.load("train", p.data).shuffle(seed=p.seed)
        self.eval_questions = first(self.task.load(p.eval_split, p.data), p.n_eval_questions)
        if self.method.examples:
            examples = self.task.load("train", p.data).select(range(self.method.examples))
            self.task = tasks.base.FewShot(self.task, list(examples))
        self.engine = engine or sampling.find_engine(p.engine)
        keep.check(self)
        self.model, self.tokenizer = self.engine.load(p, keep.revision)
        keep.begin(self)
        self.options = {
            "max_new_tokens": p.max_new_tokens,
            "batch_size": p.sampling_batch_size,
            "progress": progress,
            "engine": self.engine,
        }

    def sample(self, t: int) -> Dataset | None:
        """N completions of M_t per training question; None if the method needs none."""
        if not self.method.samples:
            return None
        # A method that starts from another one's M_1 trains on the samples of M_0.
        adapter = None if self.method.start and t == 0 else self.keep.adapter(t)

        def draw(questions):
            self.engine.use(self.model, adapter)
            temperature, seed = self.p.temperature_of(t), self.seed(t, 1)
            settings = {"top_p": self.p.top_p, "seed": seed, **self.options}
            return self._sample(questions, self.p.n_samples, temperature, **settings)

        return self.keep.dataset(t, "samples", draw, over=self.questions(t))

    def _sample(self, questions, n: int, temperature: float, **settings) -> Dataset:
        return sampling.sample(
            self.model, self.tokenizer, questions, self.task, n, temperature, **settings
        )

    def grade(self, t: int, samples: Dataset | None) -> Dataset | None:
        """Reward 1 where the final answer equals the gold answer, or the method's own reward."""
        if samples is None:
            return None
        graded = self.keep.dataset(t, "graded", lambda: grading.grade(samples, self.task))
        return methods.reward(graded, self.method.reward)

    def pair(self, t: int, graded: Dataset | None) -> Dataset:
        """K pairs per question: what M_{t+1} is trained on."""
        (preferences, counts) = self.keep.dataset(t, "pairs", lambda: self._pair(t, graded))
        n = counts["questions"]
        rows = [{"metric": f"pairs_{key}", "value": value, "n": n} for key, value in counts.items()]
        self._report(t, rows)
        return preferences

    def _pair(self, t: int, graded: Dataset | None):
        p, questions = self.p, self.questions(t)
        if graded is None:
            prompts, _ = self.prompts(questions)
            preferences, counts = pairs.gold_pairs(questions, prompts, self.tokenizer, p.max_length)
        else:
            gold = pairs.gold_completions(questions, self.tokenizer) if p.gold else None
            preferences, counts = pairs.build_pairs(
                graded, p.k_pairs, gold, p.max_length, p.deduplicate, p.pairing, self.seed(t, 2)
            )
        if p.max_pairs is not None and len(preferences) > p.max_pairs:
            preferences = first(preferences.shuffle(seed=self.seed(t, 2)), p.max_pairs)
            used, gold = len(set(preferences["id"])), preferences["chosen_sample"][:].count(-1)
            counts |= {"pairs": p.max_pairs, "used": used, "gold_winners": gold}
        return preferences, counts

    def train(self, t: int, history: list[Dataset]) -> None:
        """M_t from M_{t-1}, which is also the reference."""
        p, seed = self.p, self.seed(t, 3)

        def make(**extra) -> Dataset:
            self.engine.use(self.model, self.keep.adapter(t - 1))
            parts = self.model, self.tokenizer
            if self.method.train:
                return self.method.train(*parts, self.questions(t - 1), self.task, p, seed)
            return training.train(
                *parts,
                self._with_reference(t, concatenate_datasets(history)),
                p.alpha,
                p.beta,
                p.learning_rate,
                batch_size=p.batch_size,
                micro_batch_size=p.micro_batch_size,
                loss=p.loss,
                **{"trainer": self.engine.trainer(self.model), "seed": seed} | extra,
                num_train_epochs=p.epochs,
                max_steps=p.max_steps,
                warmup_steps=p.warmup_ratio,
                lr_scheduler_type=p.lr_scheduler,
                max_grad_norm=p.max_grad_norm,
                gradient_checkpointing=p.gradient_checkpointing,
                optim=p.optimizer,
                disable_tqdm=not self.options["progress"],
            )

        self.history = history
        self.keep.train(t, make, self)

    def _with_reference(self, t: int, preferences: Dataset) -> Dataset:
        """The pairs; with the log-probabilities of M_0 if that is the reference."""
        if self.p.reference == "previous":
            return preferences
        self.engine.use(self.model, self.keep.adapter(0))
        for side in ("chosen", "rejected"):
            column = f"ref_{side}_logps"
            preferences = preferences.add_column(column, self._score(preferences, f"{side}_ids"))
        self.engine.use(self.model, self.keep.adapter(t - 1))
        return preferences

    def _score(self, rows: Dataset, column: str) -> list[float]:
        prompts, responses = list(rows["prompt_ids"]), list(rows[column])
        return logprobs.score(self.model, self.tokenizer, prompts, responses)

    def evaluate(self, t: int) -> None:
        """Accuracy of M_t with intervals, and how far it moved from M_{t-1}."""
        p = self.p
        k = p.eval_samples_ends if t in (0, p.iterations) else p.eval_samples

        def draw(questions):
            self.engine.use(self.model, self.keep.adapter(t))
            parts = self.model, self.tokenizer, questions, self.task, k, p.eval_temperature
            return evaluation.answers(*parts, seed=self.seed(0, 4), **self.options)

        answers = self.keep.dataset(t, "evaluation", draw, over=self.eval_questions)
        rows = evaluation.score(answers["greedy"], answers["sampled"], k, self.eval_questions)
        if t > 0:
            drift = self.keep.dataset(t, "drift", lambda: self._drift(t))
            rows += drift_rows(drift)
        self._report(t, rows)

    def _drift(self, t: int) -> Dataset:
        """Log-probabilities under M_t and M_{t-1} of M_t's samples and of the pairs it learnt from.

        Columns: `kind` (sample, chosen, rejected), `logp`, `logp_previous` (nats), `n_tokens`.
        """
        self.engine.use(self.model, self.keep.adapter(t))
        questions = first(self.eval_questions, KL_QUESTIONS)
        settings = {"seed": self.seed(t, 5), **self.options, "progress": False}
        parts = {"sample": (self._sample(questions, 1, 1.0, **settings), "completion_ids")}
        if self.method.train is None:
            preferences = first(concatenate_datasets(self.history), DRIFT_PAIRS)
            parts |= {side: (preferences, f"{side}_ids") for side in ("chosen", "rejected")}
        now = {kind: self._score(*part) for kind, part in parts.items()}
        self.engine.use(self.model, self.keep.adapter(t - 1))
        rows = []
        for kind, (data, column) in parts.items():
            lengths, before = map(len, data[column]), self._score(data, column)
            for logp, previous, n in zip(now[kind], before, lengths, strict=True):
                row = {"kind": kind, "logp": logp, "logp_previous": previous, "n_tokens": n}
                rows.append(row)
        self.engine.use(self.model, self.keep.adapter(t))
        return Dataset.from_list(rows)

    def _report(self, t: int, rows: list[dict]) -> None:
        """Add rows to the metrics of iteration t."""
        p = self.p
        head = {"method": p.method, "seed": p.seed, "iteration": t, "split": p.eval_split}
        tail = {"k": 0, "low": None, "high": None}
        self.keep.metrics(t, [head | tail | row for row in rows])

    def questions(self, t: int) -> Dataset:
        """The training questions of iteration t."""
        available = len(self.train_questions)
        n = min(self.p.n_questions or available, available)
        start = t * n if self.p.fresh_questions else 0
        return self.train_questions.select([i % available for i in range(start, start + n)])

    def prompts(self, questions: Dataset):
        """The rendered prompts of the questions, as text and as token ids."""
        new = self.p.max_new_tokens
        return sampling.render_prompts(self.model, self.tokenizer, questions, self.task, new)

    def seed(self, t: int, purpose: int) -> int:
        """Different random numbers for every iteration and purpose, the same when resumed."""
        return (self.p.seed * 1000 + t) * 10 + purpose


def drift_rows(drift: Dataset) -> list[dict]:
    """Metrics: KL(M_t || M_{t-1}) per completion in nats, and log-probability per token of the pairs."""
    table = drift.to_pandas()
    samples = table[table.kind == "sample"]
    rows = [evaluation.bootstrap_row("kl_to_previous", samples.logp - samples.logp_previous)]
    for side in ("chosen", "rejected"):
        part = table[table.kind == side]
        for name, logp in (("_before", part.logp_previous), ("", part.logp)):
            if len(part):
                value = float((logp / part.n_tokens).mean())
                name = f"{side}_logp_per_token{name}"
                rows.append({"metric": name, "value": value, "n": len(part)})
    return rows


class Folder:
    """The storage of a run: one folder per artefact, moved into place when it is complete."""

    revision: str | None = None  # commit of a hub model

    def __init__(self, out: str | Path):
        self.out = Path(out)

    def check(self, stages: Stages) -> None:
        """Called before the model is loaded: refuse a directory made with other settings."""
        text = json.dumps(dataclasses.asdict(stages.p), indent=1) + "\n"
        path = self.out / "profile.json"
        if path.exists() and path.read_text() != text:
            raise UserError(f"{self.out} was made with other settings. Choose another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.start = Path(stages.p.start) if stages.p.start else None

    def begin(self, stages: Stages) -> None:
        """Called when the model is loaded."""

    def folder(self, t: int) -> Path:
        """Where the artefacts of iteration t are."""
        return self.out / f"iteration_{t}"

    def adapter(self, t: int) -> Path | None:
        """The adapter of M_t; None is a zero adapter."""
        return self.folder(t) / "adapter" if t > 0 else self.start

    def dataset(self, t: int, name: str, make, over: Dataset | None = None):
        """The artefact, read from disk, or made by `make()`, or by `make(over)` where `over` is given."""
        place = self.folder(t) / name
        if not place.exists():
            content = make() if over is None else make(over)
            self.put(place, lambda folder: save(content, folder))
        return load(place)

    def train(self, t: int, make, stages: Stages) -> None:
        """Make the adapter of M_t by `make()`, which returns the training log, unless it is there."""
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

    def metrics(self, t: int, rows: list[dict]) -> None:
        """Add rows to metrics.json of iteration t; a row replaces an older one of its metric and k."""
        path = self.folder(t) / "metrics.json"
        old = json.loads(path.read_text()) if path.exists() else []
        new = {(row["metric"], row["k"]): row for row in [*old, *rows]}
        path.write_text(json.dumps(list(new.values()), indent=0) + "\n")
        self.report(t, {row["metric"]: row["value"] for row in rows})

    def table(self, iterations) -> list[dict]:
        """The metrics of all iterations, also written to metrics.csv."""
        paths = [self.folder(t) / "metrics.json" for t in iterations]
        rows = [row for path in paths for row in json.loads(path.read_text())]
        pandas.DataFrame(rows).to_csv(self.out / "metrics.csv", index=False)
        return rows

    def report(self, t: int, value: dict) -> None:
        """A line on the screen."""
        if "greedy" in value:
            line = f"M_{t}: greedy {value['greedy']:.1%}, sampled {value['sampled']:.1%}"
            if "kl_to_previous" in value:
                line += f"; KL to M_{t - 1} {value['kl_to_previous']:.2f} nats"
            tqdm.write(line)
        else:
            tqdm.write(
                f"     {value['pairs_pairs']} pairs from {value['pairs_used']} of "
                f"{value['pairs_questions']} questions ({value['pairs_all_right']} all correct, "
                f"{value['pairs_all_wrong']} all incorrect)"
            )


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
