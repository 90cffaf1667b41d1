"""The storage of a long run: checksums, provenance, resumption within a stage, a lock.

Every artefact gets a list of checksums and a record of what it was made from, written last, and is
moved into place as a whole. A stage whose artefact is there, sound, and made from what is there now
is not computed again. Sampling and evaluation keep blocks, training keeps checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import shutil
import time
from pathlib import Path

import pandas
from datasets import Dataset, DatasetDict, concatenate_datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from irpo_utils import UserError, iteration, training
from irpo_utils.ops import checksums, drift, environment, export, storage, trainer, trial
from irpo_utils.ops import warnings as signs
from irpo_utils.ops.statistics import further_rows
from irpo_utils.scale import processes

BLOCK = 2400  # completions stored at a time: a kill costs one block at most
SETTINGS = "settings"  # in the record of an artefact, next to the folders that it was made from

# The settings that each artefact depends on, besides the artefacts that it is made from.
MODEL = "task seed quantize dequantize dtype pad_token max_new_tokens engine"
FIELDS = {
    "samples": f"{MODEL} n_questions fresh_questions n_samples top_p temperature",
    "graded": "task",
    "pairs": "task method seed k_pairs gold deduplicate pairing max_length max_pairs",
    "adapter": f"{MODEL} method lora_r lora_alpha n_questions fresh_questions n_samples "
    "temperature keep_pairs loss alpha beta reference learning_rate epochs max_steps batch_size "
    "warmup_ratio lr_scheduler max_grad_norm optimizer",
    "evaluation": f"{MODEL} eval_split n_eval_questions eval_temperature",
    "drift": f"{MODEL} eval_split n_eval_questions",
}
# No result depends on these beyond rounding, so they may change when a run is resumed.
MAY_CHANGE = (
    "sampling_batch_size micro_batch_size gradient_checkpointing report_to shard "
    "probe probe_every allow_overlap"
).split()


class RunDirectory(storage.Folder):
    """The storage of `iteration.run`: what is there is not made again. Processes may share it."""

    def lock(self):
        """A context in which no other run uses the directory; a killed process releases it."""
        if not processes.is_first():
            return contextlib.nullcontext()
        with storage.disk_errors(self.out):
            try:
                return FileLock(self.out / ".lock").acquire(timeout=0)
            except Timeout as error:  # an OSError, but not of the disk
                raise UserError(
                    f"{self.out} is in use by another run. Wait for it, or choose another --out."
                ) from error

    # Settings and inputs

    def check(self, stages: iteration.Stages) -> None:
        """Called before the model is loaded: refuse other settings, copy the adapter of M_0."""
        self.p, self.method, self.task = stages.p, stages.method, stages.task
        new = dataclasses.asdict(self.p)
        if any(self.out.glob("iteration_*/*")):
            old = dataclasses.asdict(storage.read_profile(self.out))
            differing = sorted(k for k in new if old[k] != new[k] and k not in MAY_CHANGE)
            if differing:
                listed = ", ".join(f"{k} ({old[k]!r} there, {new[k]!r} now)" for k in differing)
                raise UserError(
                    f"{self.out} was made with other settings: {listed}. Choose another --out, "
                    f"with --start {self.out} to go further, or give the same settings to resume."
                )
        self.write_json(self.out / "profile.json", new)
        if self.p.start:
            self.start = self.folder(0) / "adapter"
            if checksums.read(self.start) is None:
                source = export.find_start(self.p)  # a mistake is found before a model is loaded
                self.put(self.start, functools.partial(export.copy_adapter, source), {})
        self.revision = export.commit_of(storage.read_inputs(self.out).get("model"))

    def begin(self, stages: iteration.Stages) -> None:
        """Called when the model is loaded: compare model and questions with those of the run."""
        self.known = {"model": export.fingerprint(stages.model)}
        used = {"training": stages.train_questions, "evaluation": stages.eval_questions}
        for name, rows in used.items():
            self.known[f"{name} questions"] = checksums.of_questions(rows)
            self.known[f"order of {name} questions"] = checksums.of_questions(rows, ordered=True)
        old = storage.read_inputs(self.out)
        if processes.from_first(lambda: not old):  # else it passed when the run was started
            trial.check(stages.model, stages.tokenizer, stages.p, stages.engine)
        for name, value in self.known.items():
            if old.get(name) and value and old[name] != value:
                raise UserError(
                    f"The {name} of {self.out} changed since the run was started: --model or "
                    "--data now give something else. Restore it, or choose another --out."
                )
        self.write_json(self.out / "inputs.json", self.known)
        path, last = self.out / "environment.json", self.folder(self.p.iterations) / "metrics.json"
        finished = (self.out / "metrics.csv").exists() and last.exists()
        self.write_json(path, environment.record(path, stages.model, not finished))
        stages.prompts(stages.eval_questions)  # one that is too long is refused now
        if stages.p.iterations and (stages.method.samples or stages.method.train):
            stages.prompts(stages.questions(0))

    # Artefacts

    def record(self, t: int, name: str) -> dict[str, str]:
        """Digests of what an artefact is made from: other artefacts, and the settings it needs."""
        model, previous = self.adapter(t), self.adapter(t - 1) if t else None
        pairs = [self.folder(i) / "pairs" for i in range(0 if self.p.keep_pairs else t - 1, t)]
        sources = {
            "samples": [model],
            "graded": [self.folder(t) / "samples"],
            "pairs": [self.folder(t) / "graded"],
            "evaluation": [model],
            "drift": [model, previous, self.folder(t - 1) / "pairs"],
            "adapter": [*pairs, previous],
        }[name]
        made = [folder for folder in sources if folder is not None and folder.exists()]
        record = {str(folder.relative_to(self.out)): checksums.digest(folder) for folder in made}
        fields = {field: getattr(self.p, field) for field in FIELDS[name].split()} | self.known
        fields |= self.sources(name)
        if name == "samples":
            fields["temperature"] = self.p.temperature_of(t)
        if name == "evaluation":
            ends = t in (0, self.p.iterations)
            fields["k"] = self.p.eval_samples_ends if ends else self.p.eval_samples
        return record | {SETTINGS: checksums.of_text(json.dumps(fields, sort_keys=True))}

    def sources(self, name: str) -> dict[str, str]:
        """The source of the functions behind an artefact that a user may have edited."""
        prompt, loss = {"prompt": self.task.prompt}, training.LOSSES.get(self.p.loss)
        grading = {"extract": self.task.extract, "is_correct": self.task.is_correct}
        used = {"samples": prompt, "graded": grading, "evaluation": prompt | grading}
        used |= {"pairs": prompt | {"reward": self.method.reward}, "drift": prompt}
        used |= {"adapter": {"loss": loss, "train": self.method.train}}
        found = {}
        for role, function in used[name].items():
            module = getattr(function, "__module__", None) or ""
            is_ours = module.startswith(("irpo_utils.", "studies."))
            if role == "reward" or not is_ours:  # the records of all runs have the reward
                with contextlib.suppress(OSError, TypeError):  # none, typed at a prompt, a partial
                    found[role] = inspect.getsource(function)
        return found

    def is_there(self, place: Path, record: dict[str, str]) -> bool:
        """Whether an artefact was made from `record`; the first process decides for all."""
        fault = processes.from_first(lambda: checksums.fault(place, record))
        if fault and place.exists() and processes.is_first():
            tqdm.write(f"{place} {fault}: it is made again.")
        return fault is None

    def unfinished(self, place: Path, record: dict[str, str]) -> Path:
        """Where a stage keeps what it has so far, until its artefact is complete."""
        made_from = checksums.of_text(json.dumps(record, sort_keys=True))[:8]
        return place.with_name(f".{place.name}.{made_from}.unfinished")

    def dataset(self, t: int, name: str, make, over: Dataset | None = None):
        """The artefact from disk, or from `make()`: a `Dataset`, a `DatasetDict` or (data, counts).

        With the questions `over`, `make(questions)` is called for one block of them after another.
        """
        place, record = self.folder(t) / name, self.record(t, name)
        if not self.is_there(place, record):
            started = time.perf_counter()
            if over is None:
                content = make()
            else:
                blocks = self.blocks(self.unfinished(place, record), over)
                for block, questions in blocks.items():
                    if self.is_there(block, {}):
                        started -= checksums.read(block)["seconds"]
                        continue
                    begun = time.perf_counter()
                    write = functools.partial(storage.save, make(questions))
                    self.put(block, write, {"seconds": time.perf_counter() - begun})
                content = joined([storage.load(block) for block in blocks])
            if name == "graded":
                signs.report_unread(t, content, self.p)
            write = functools.partial(storage.save, content)
            self.put(place, write, notes(name, content, started, record))
        self.clear(place)
        return storage.load(place)

    def blocks(self, kept: Path, questions: Dataset) -> dict[Path, Dataset]:
        """The blocks of a stage: the folder of each in `kept`, and its questions."""
        size = max(1, BLOCK // max(self.p.n_samples, self.p.eval_samples_ends + 1))
        parts = [range(i, min(i + size, len(questions))) for i in range(0, len(questions), size)]
        return {kept / f"block_{rows[0]:06d}_of_{size}": questions.select(rows) for rows in parts}

    def train(self, t: int, make, stages: iteration.Stages) -> None:
        """Make the adapter of M_t with `make(**options)`, which returns the training log."""
        place, record = self.folder(t) / "adapter", self.record(t, "adapter")
        if not self.is_there(place, record):
            started, how = time.perf_counter(), {}
            stages.engine.close()
            if stages.method.train:
                log = make()
            else:
                kept = self.unfinished(place, record)
                if newest := trainer.newest_checkpoint(kept):
                    started -= checksums.read(Path(newest))["seconds"]
                warn = functools.partial(self.warn, t, "training")
                log, how = trainer.train(make, stages, kept, warn)
            weights = stages.engine.state_dict(stages.model)  # all processes must call this
            write = functools.partial(storage.save_adapter, stages.model, weights, log)
            self.put(place, write, how | notes("adapter", log, started, record))
        self.clear(place)
        log = place / "training_log.jsonl"
        if log.exists():
            self.write(self.folder(t) / log.name, log.read_text())

    def clear(self, place: Path) -> None:
        """Remove what a stage has kept, now that its artefact is complete."""
        if processes.is_first():
            for folder in place.parent.glob(f".{place.name}.*unfinished"):
                shutil.rmtree(folder, ignore_errors=True)

    # Tables and messages

    def evaluated(self, t: int, stages: iteration.Stages, answers) -> list[dict]:
        """Further metrics of the evaluation, and how far M_t moved from M_{t-1}."""
        rows = further_rows(answers, stages.eval_questions)
        if t > 0:
            rows += drift.rows(self.dataset(t, "drift", lambda: drift.measure(t, stages)))
        return rows

    def metrics(self, t: int, rows: list[dict]) -> None:
        """Add rows to metrics.json and metrics.csv, and report them.

        The rows of a new evaluation replace all that are there. Those of a replay change nothing.
        """
        value, old = {row["metric"]: row["value"] for row in rows}, self.known_metrics(t)
        if not all(row in old for row in rows):
            for later in range(t + 1, self.p.iterations + 1 if processes.is_first() else 0):
                (self.folder(later) / "metrics.json").unlink(missing_ok=True)  # of other models
            kept = [] if "greedy" in value else old
            new = {(row["metric"], row["k"]): row for row in [*kept, *rows]}
            text = json.dumps(list(new.values()), indent=0) + "\n"
            self.write(self.folder(t) / "metrics.json", text)
        self.table(range(self.p.iterations + 1))
        if processes.is_first():
            self.describe(t, value)

    def describe(self, t: int, value: dict[str, float]) -> None:
        """Print the main metrics of M_t, signs of a collapse, and which model to keep."""
        shown = "greedy sampled kl_to_previous pairs_pairs pairs_used pairs_questions".split()
        line = [f"{name} {value[name]:.4g}" for name in value if name in shown]
        tqdm.write(f"M_{t}: {', '.join(line)}")
        if t == 0 or "greedy" not in value:
            return
        before = [{row["metric"]: row["value"] for row in self.known_metrics(s)} for s in range(t)]
        for warning in signs.of_evaluation(t, before[-1], value):
            tqdm.write(f"     warning: {warning}")
            self.warn(t, "evaluation", warning)
        if self.p.eval_split == "validation":
            accuracy = [metrics["greedy"] for metrics in [*before, value]]
            tqdm.write(f"     {signs.of_validation(accuracy)}")

    def known_metrics(self, t: int) -> list[dict]:
        """The rows of metrics.json of iteration t; none if it is missing or damaged."""
        try:
            return json.loads((self.folder(t) / "metrics.json").read_text())
        except (OSError, ValueError):
            return []

    def table(self, iterations) -> list[dict]:
        """The metrics of all iterations, for metrics.csv; timing.csv has the cost of all stages."""
        times = []
        for t in iterations:
            for file in sorted(self.folder(t).glob(f"*/{checksums.NAME}")):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: made again
                    record = json.loads(file.read_text())
                    row = {"iteration": t, "stage": file.parent.name}
                    times.append(row | {key: record[key] for key in ("seconds", "tokens")})
        rows = [row for t in iterations for row in self.known_metrics(t)]
        for name, content in (("timing.csv", times), ("metrics.csv", rows)):
            self.write(self.out / name, pandas.DataFrame(content).to_csv(index=False))
        return rows

    def warn(self, t: int, stage: str, text: str) -> None:
        """A line in iteration_t/warnings.jsonl, once."""
        path = self.folder(t) / "warnings.jsonl"
        line = json.dumps({"stage": stage, "warning": text}) + "\n"
        lines = path.read_text(errors="replace") if path.exists() else ""
        if line not in lines:
            self.write(path, lines + line)


def joined(parts: list):
    """Several `Dataset`s or `DatasetDict`s, one after the other."""
    if isinstance(parts[0], DatasetDict):
        return DatasetDict({k: concatenate_datasets([p[k] for p in parts]) for k in parts[0]})
    return concatenate_datasets(parts)


def notes(name: str, content, started: float, record: dict) -> dict:
    """What is written with an artefact: its seconds and tokens, and what it was made from."""
    column = {"samples": "n_tokens", "evaluation": "n_tokens", "adapter": "tokens"}.get(name)
    parts = content.values() if isinstance(content, DatasetDict) else [content]
    tokens = sum(sum(part[column]) for part in parts) if column else None
    seconds = round(time.perf_counter() - started, 3)
    return {"seconds": seconds, "tokens": tokens, "inputs": record}
