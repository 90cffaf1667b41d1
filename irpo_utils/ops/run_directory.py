"""The storage of a long run: checksums, provenance, resumption within a stage, a lock.

Every artefact gets a list of checksums and a record of what it was made from, written last, and is
moved into place as a whole. A stage whose artefact is there, sound, and made from what is there now
is not computed again. Sampling and evaluation keep blocks, training keeps checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import time
from pathlib import Path

import pandas
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from safetensors import SafetensorError
from tqdm.auto import tqdm

from irpo_utils import UserError, iteration
from irpo_utils.ops import (
    checksums,
    drift,
    environment,
    export,
    statistics,
    storage,
    trainer,
    warnings,
)
from irpo_utils.ops.provenance import digest, inputs, is_there
from irpo_utils.ops.storage import read_profile
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
    """`storage.Folder` for long runs; several processes may share it, and the first one writes."""

    def __init__(self, out: str | Path, progress: bool = True):
        super().__init__(out)
        self.progress = progress
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self):
        """One run at a time; the lock is released with the process, also when it is killed."""
        from filelock import FileLock, Timeout

        if not processes.is_first():
            yield
            return
        lock = FileLock(self.out / ".lock")
        with disk_errors(self.out):
            try:
                lock.acquire(timeout=0)
            except Timeout as error:  # an OSError, but not of the disk
                raise UserError(
                    f"{self.out} is in use by another run. Wait for it, or choose another --out."
                ) from error
        with lock:
            yield

    # Settings and inputs

    def check(self, stages: iteration.Stages) -> None:
        """Write profile.json, or compare it with the settings of this run; find the start."""
        self.p, path = stages.p, self.out / "profile.json"
        new = dataclasses.asdict(self.p)
        if any(self.out.glob("iteration_*/*")):
            old = dataclasses.asdict(read_profile(self.out))
            differing = sorted(k for k in new if old[k] != new[k] and k not in MAY_CHANGE)
            if differing:
                listed = ", ".join(f"{k} ({old[k]!r} there, {new[k]!r} now)" for k in differing)
                raise UserError(
                    f"{self.out} was made with other settings: {listed}. Choose another --out, or "
                    "give the same settings to resume it."
                )
        self.write_json(path, new)
        self.start = self.folder(0) / "adapter" if self.p.start else None
        if self.p.start and checksums.read(self.start) is None:
            source = export.find_start(self.p)  # a mistake is found before the model is loaded
            self.put(self.start, functools.partial(export.copy_adapter, source))
        self.revision = export.commit_of(inputs(self.out).get("model"))

    def begin(self, stages: iteration.Stages) -> None:
        """Compare model and questions with those of the run; find prompts that are too long now."""
        train, evaluation = stages.train_questions, stages.eval_questions
        new = {
            "model": export.fingerprint(stages.model),
            "training questions": digest(train),
            "evaluation questions": digest(evaluation),
            "order of training questions": digest(train, ordered=True),
            "order of evaluation questions": digest(evaluation, ordered=True),
        }
        old = inputs(self.out)
        for name, value in new.items():
            if old.get(name) and value and old[name] != value:
                raise UserError(
                    f"The {name} of {self.out} changed since the run was started: --model or "
                    "--data now give something else. Restore it, or choose another --out."
                )
        self.write_json(self.out / "inputs.json", new)
        self.known, path = new, self.out / "environment.json"
        self.write_json(
            path, environment.record(path, stages.model, continues=not is_whole(self.out))
        )
        stages.prompts(evaluation)
        if stages.p.iterations and (stages.method.samples or stages.method.train):
            stages.prompts(stages.questions(0))

    # Artefacts

    def sources(self, t: int, name: str) -> list[Path]:
        """The artefacts that this one is made from, as far as they exist."""
        here, before = self.folder(t), self.folder(t - 1)
        pairs = [self.folder(i) / "pairs" for i in range(0 if self.p.keep_pairs else t - 1, t)]
        found = {
            "samples": [self.adapter(t)],
            "graded": [here / "samples"],
            "pairs": [here / "graded"],
            "evaluation": [self.adapter(t)],
            "drift": [self.adapter(t), self.adapter(t - 1) if t else None, before / "pairs"],
            "adapter": [*pairs, self.adapter(t - 1) if t else None],
        }[name]
        return [folder for folder in found if folder is not None and folder.exists()]

    def record(self, t: int, name: str) -> dict[str, str]:
        """Digests of the sources, and of the settings that the artefact depends on."""
        inputs = {str(f.relative_to(self.out)): checksums.digest(f) for f in self.sources(t, name)}
        fields = {field: getattr(self.p, field) for field in FIELDS[name].split()} | self.known
        if name == "samples":
            fields["temperature"] = self.p.temperature_of(t)
        if name == "evaluation":
            ends = t in (0, self.p.iterations)
            fields["k"] = self.p.eval_samples_ends if ends else self.p.eval_samples
        inputs[SETTINGS] = checksums.of_text(json.dumps(fields, sort_keys=True))
        return inputs

    def unfinished(self, t: int, name: str) -> Path:
        """Where a stage keeps what it has so far, until its artefact is complete."""
        made_from = checksums.of_text(json.dumps(self.record(t, name), sort_keys=True))[:8]
        return self.folder(t) / f".{name}.{made_from}.unfinished"

    def dataset(self, t: int, name: str, make, over: Dataset | None = None):
        """As `Folder.dataset`; with `over`, blocks of questions are stored one by one."""
        if over is not None:
            make = functools.partial(self._blocks, t, name, make, over)
        self.stage(t, name, make, storage.save)
        return super().dataset(t, name, make)

    def _blocks(self, t: int, name: str, make, over: Dataset):
        p, kept = self.p, self.unfinished(t, name)
        size = max(1, BLOCK // max(p.n_samples, p.eval_samples_ends + 1))
        parts = []
        for start in range(0, len(over), size):
            rows = over.select(range(start, min(start + size, len(over))))
            place = kept / f"block_{start:06d}_of_{size}"
            self._make(place, {}, functools.partial(make, rows), storage.save)
            parts.append(load_from_disk(str(place)))
        if isinstance(parts[0], DatasetDict):
            return DatasetDict({k: concatenate_datasets([p[k] for p in parts]) for k in parts[0]})
        return concatenate_datasets(parts)

    def train(self, t: int, make, stages: iteration.Stages) -> None:
        """As `Folder.train`, with checkpoints, warnings and probes."""
        weights = None

        def make_safely():
            nonlocal weights
            options = {}
            if not stages.method.train:
                warn = functools.partial(self.warn, t, "training")
                options = trainer.options(stages, self.unfinished(t, "adapter"), warn)
            log = make(**options)
            if hasattr(stages.engine, "state_dict"):  # all processes put a split model together
                weights = stages.engine.state_dict(stages.model)
            return log

        def save(log, folder: Path) -> None:
            storage.save_adapter(stages.model, log, folder, weights)
            config = json.loads((folder / "adapter_config.json").read_text())
            config["target_modules"] = sorted(config["target_modules"])  # a set without an order
            self.write_json(folder / "adapter_config.json", config)

        self.stage(t, "adapter", make_safely, save)
        log = self.adapter(t) / "training_log.jsonl"
        if log.exists():
            self.write(self.folder(t) / log.name, log.read_text())

    def stage(self, t: int, name: str, make, save) -> Path:
        """The folder of an artefact: made unless it is there, sound, and of the same origin."""
        place, kept, record = self.folder(t) / name, self.unfinished(t, name), self.record(t, name)
        self._make(place, record, make, save, kept)
        if processes.is_first():
            for folder in place.parent.glob(f".{name}.*unfinished"):
                shutil.rmtree(folder, ignore_errors=True)
        return place

    def _make(self, place: Path, record: dict, make, save, kept: Path | None = None) -> None:
        if processes.from_first(lambda: is_there(place, record)):
            return
        started = time.perf_counter() - (seconds_spent(kept) if kept else 0)
        content = make()
        processes.wait()  # others may still read what is in `kept`
        if processes.is_first():
            seconds = round(time.perf_counter() - started, 3)
            notes = {"seconds": seconds, "tokens": count_tokens(content), "inputs": record}
            self.put(place, functools.partial(save, content), notes)
        processes.wait()

    def put(self, place: Path, write, notes: dict | None = None) -> None:
        """As `Folder.put`, with checksums; a disk that is full leaves nothing behind."""

        def write_checked(folder: Path) -> None:
            write(folder)
            checksums.write(folder, notes or {})

        with disk_errors(place):
            shutil.rmtree(place, ignore_errors=True)
            super().put(place, write_checked)

    def write(self, path: Path, text: str) -> None:
        """Write a small file as a whole or not at all, unless it has this text already."""
        if not processes.is_first() or (path.exists() and path.read_bytes() == text.encode()):
            return
        partial = path.with_name(f".{path.name}.partial")
        with disk_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(text)
                os.replace(partial, path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise

    def write_json(self, path: Path, content) -> None:
        """`write`, as JSON."""
        self.write(path, json.dumps(content, indent=1) + "\n")

    # Tables and messages

    def evaluated(self, t: int, stages: iteration.Stages, answers) -> list[dict]:
        """Further metrics of the evaluation, and how far M_t moved from M_{t-1}."""
        greedy, sampled = answers["greedy"], answers["sampled"]
        k = len(sampled) // len(greedy)
        rows = statistics.further_rows(greedy, sampled, k, stages.eval_questions)
        if t > 0:
            rows += drift.rows(self.dataset(t, "drift", lambda: drift.measure(t, stages)))
        return rows

    def table(self, iterations) -> list[dict]:
        """The metrics of all iterations, also in metrics.csv; seconds and tokens in timing.csv."""
        paths = [self.folder(t) / "metrics.json" for t in iterations]
        rows = [row for path in paths if path.exists() for row in json.loads(path.read_text())]
        self.write(self.out / "metrics.csv", pandas.DataFrame(rows).to_csv(index=False))
        times = []
        for t in iterations:
            for file in sorted(self.folder(t).glob(f"*/{checksums.NAME}")):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: made again
                    record = json.loads(file.read_text())
                    row = {"iteration": t, "stage": file.parent.name}
                    times.append(row | {key: record[key] for key in ("seconds", "tokens")})
        self.write(self.out / "timing.csv", pandas.DataFrame(times).to_csv(index=False))
        return rows

    def metrics(self, t: int, rows: list[dict]) -> None:
        """As `Folder.metrics`; also brings the tables up to date and warns of a collapse."""
        path, value = self.folder(t) / "metrics.json", {row["metric"]: row["value"] for row in rows}
        try:
            old = json.loads(path.read_text())
        except (OSError, ValueError):
            old = []
        if "greedy" in value:  # a new evaluation replaces all of the old rows
            old = []
        new = {(row["metric"], row["k"]): row for row in [*old, *rows]}
        self.write(path, json.dumps(list(new.values()), indent=0) + "\n")
        self.table(range(t + 1))
        if not processes.is_first():
            return
        storage.describe(t, rows)
        if "kl_to_previous" in value:
            before = json.loads((self.folder(t - 1) / "metrics.json").read_text())
            known = {row["metric"]: row["value"] for row in before}
            for warning in warnings.of_evaluation(t, known, value):
                tqdm.write(f"     warning: {warning}")
                self.warn(t, "evaluation", warning)

    def warn(self, t: int, stage: str, text: str) -> None:
        """A line in iteration_t/warnings.jsonl, once."""
        path = self.folder(t) / "warnings.jsonl"
        line = json.dumps({"stage": stage, "warning": text}) + "\n"
        lines = path.read_text(errors="replace") if path.exists() else ""
        if line not in lines:
            self.write(path, lines + line)


def is_whole(run: Path) -> bool:
    """Whether a run has all its iterations, sound, made from one another, and in its table."""
    try:
        iterations = range(json.loads((run / "profile.json").read_text())["iterations"] + 1)
        for t in iterations:
            json.loads((run / f"iteration_{t}" / "metrics.json").read_text())
        listed = set(pandas.read_csv(run / "metrics.csv").iteration)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    needed = {run / f"iteration_{t}" / "evaluation" for t in iterations}
    needed |= {run / f"iteration_{t}" / "adapter" for t in iterations if t > 0}
    folders = needed | {file.parent for file in run.glob(f"iteration_*/*/{checksums.NAME}")}
    records = [checksums.read(folder) for folder in folders]
    if listed != set(iterations) or not all(records):
        return False
    sources = {k: v for record in records for k, v in record.get("inputs", {}).items()}
    sources.pop(SETTINGS, None)
    return all(checksums.digest(run / name) == value for name, value in sources.items())


def count_tokens(content) -> int | None:
    """Tokens sampled or trained on, for timing.csv."""
    if isinstance(content, DatasetDict):
        return sum(sum(part["n_tokens"]) for part in content.values())
    if isinstance(content, Dataset) and "tokens" in content.column_names:
        return sum(content["tokens"])
    if isinstance(content, Dataset) and "finished" in content.column_names:
        return None if "reason" in content.column_names else sum(content["n_tokens"])
    return None


def seconds_spent(unfinished: Path) -> float:
    """What earlier processes spent on a stage: blocks add up, a checkpoint holds all before it."""
    spent = {f.name: r["seconds"] for f in unfinished.glob("*") if (r := checksums.read(f))}
    blocks = sum(value for name, value in spent.items() if name.startswith("block"))
    checkpoints = [value for name, value in spent.items() if name.startswith("checkpoint")]
    return blocks + max(checkpoints, default=0.0)


@contextlib.contextmanager
def disk_errors(path: Path):
    """Turn a full or read-only disk into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write to {path}: {reason}. Choose another --out or free some space, then run "
            "the same command to resume."
        ) from error
