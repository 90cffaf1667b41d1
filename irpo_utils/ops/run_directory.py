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
import shutil
import time
from pathlib import Path

import pandas
from datasets import Dataset, DatasetDict, concatenate_datasets
from filelock import FileLock, Timeout
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
    trial,
)
from irpo_utils.ops import warnings as signs
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

    def __init__(self, out: str | Path):
        super().__init__(out)
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)

    def lock(self):
        """A context in which no other run uses the directory; a killed process releases it."""
        if not processes.is_first():
            return contextlib.nullcontext()
        with disk_errors(self.out):
            try:
                return FileLock(self.out / ".lock").acquire(timeout=0)
            except Timeout as error:  # an OSError, but not of the disk
                raise UserError(
                    f"{self.out} is in use by another run. Wait for it, or choose another --out."
                ) from error

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
        if processes.from_first(lambda: not old):  # else it passed when the run was started
            trial.check(stages.model, stages.tokenizer, stages.p, stages.engine)
        for name, value in new.items():
            if old.get(name) and value and old[name] != value:
                raise UserError(
                    f"The {name} of {self.out} changed since the run was started: --model or "
                    "--data now give something else. Restore it, or choose another --out."
                )
        self.write_json(self.out / "inputs.json", new)
        self.known, path = new, self.out / "environment.json"
        self.write_json(path, environment.record(path, stages.model, not is_whole(self.out)))
        stages.prompts(evaluation)
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
        if name == "samples":
            fields["temperature"] = self.p.temperature_of(t)
        if name == "evaluation":
            ends = t in (0, self.p.iterations)
            fields["k"] = self.p.eval_samples_ends if ends else self.p.eval_samples
        return record | {SETTINGS: checksums.of_text(json.dumps(fields, sort_keys=True))}

    def unfinished(self, t: int, name: str) -> Path:
        """Where a stage keeps what it has so far, until its artefact is complete."""
        made_from = checksums.of_text(json.dumps(self.record(t, name), sort_keys=True))[:8]
        return self.folder(t) / f".{name}.{made_from}.unfinished"

    def dataset(self, t: int, name: str, make, over: Dataset | None = None):
        """As `Folder.dataset`; with `over`, blocks of questions are stored one by one."""
        place, record, kept = self.folder(t) / name, self.record(t, name), self.unfinished(t, name)
        if not is_there(place, record):
            started = time.perf_counter() - seconds_spent(kept)
            if over is None:
                content = make()
            else:
                blocks = self.blocks(kept, over)
                for block, questions in blocks.items():
                    if not is_there(block, {}):
                        begun = time.perf_counter()
                        rows = make(questions)
                        about = notes("block", rows, begun, {})
                        self.put(block, functools.partial(storage.save, rows), about)
                content = joined([storage.load(block) for block in blocks])
            unread = signs.of_graded(t, content, self.p) if name == "graded" else None
            if unread and processes.is_first():
                tqdm.write(f"     {unread}")
            about = notes(name, content, started, record)
            self.put(place, functools.partial(storage.save, content), about)
        self.clear(t, name)
        return storage.load(place)

    def blocks(self, kept: Path, questions: Dataset) -> dict[Path, Dataset]:
        """The blocks of a stage: the folder of each in `kept`, and its questions."""
        size = max(1, BLOCK // max(self.p.n_samples, self.p.eval_samples_ends + 1))
        parts = [range(i, min(i + size, len(questions))) for i in range(0, len(questions), size)]
        return {kept / f"block_{rows[0]:06d}_of_{size}": questions.select(rows) for rows in parts}

    def train(self, t: int, make, stages: iteration.Stages) -> None:
        """As `Folder.train`, with checkpoints, warnings and probes."""
        place, record = self.folder(t) / "adapter", self.record(t, "adapter")
        if not is_there(place, record):
            kept, options = self.unfinished(t, "adapter"), {}
            started = time.perf_counter() - seconds_spent(kept)
            if not stages.method.train:
                warn = functools.partial(self.warn, t, "training")
                options = trainer.options(stages, kept, warn)
            log, weights = make(**options), None
            if hasattr(stages.engine, "state_dict"):  # all processes put a split model together
                weights = stages.engine.state_dict(stages.model)
            save = functools.partial(storage.save_adapter, stages.model, log, weights=weights)
            self.put(place, save, notes("adapter", log, started, record))
        self.clear(t, "adapter")
        log = place / "training_log.jsonl"
        if log.exists():
            self.write(self.folder(t) / log.name, log.read_text())

    def clear(self, t: int, name: str) -> None:
        """Remove what a stage has kept, now that its artefact is complete."""
        if processes.is_first():
            for folder in self.folder(t).glob(f".{name}.*unfinished"):
                shutil.rmtree(folder, ignore_errors=True)

    def put(self, place: Path, write, about: dict | None = None) -> None:
        """As `Folder.put`, with checksums and what is known `about` the artefact."""

        def write_checked(folder: Path) -> None:
            write(folder)
            checksums.write(folder, about or {})

        processes.wait()  # others may still read what the stage has kept
        if processes.is_first():
            with disk_errors(place):
                shutil.rmtree(place, ignore_errors=True)
                super().put(place, write_checked)
        processes.wait()

    def write(self, path: Path, text: str) -> None:
        """As `Folder.write`, in the first process, unless the file has this text already."""
        if processes.is_first() and not (path.exists() and path.read_bytes() == text.encode()):
            with disk_errors(path):
                super().write(path, text)

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
        """As `Folder.table`; also the seconds and tokens of all stages in timing.csv."""
        times = []
        for t in iterations:
            for file in sorted(self.folder(t).glob(f"*/{checksums.NAME}")):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: made again
                    record = json.loads(file.read_text())
                    row = {"iteration": t, "stage": file.parent.name}
                    times.append(row | {key: record[key] for key in ("seconds", "tokens")})
        self.write(self.out / "timing.csv", pandas.DataFrame(times).to_csv(index=False))
        return super().table(iterations)

    def metrics(self, t: int, rows: list[dict]) -> None:
        """As `Folder.metrics`; also warns of a collapse."""
        super().metrics(t, rows)
        value = {row["metric"]: row["value"] for row in rows}
        if "kl_to_previous" in value and processes.is_first():
            before = {row["metric"]: row["value"] for row in self.known_metrics(t - 1)}
            for warning in signs.of_evaluation(t, before, value):
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
        folders = [run / f"iteration_{t}" for t in iterations]
        for folder in folders:
            json.loads((folder / "metrics.json").read_text())
        listed = set(pandas.read_csv(run / "metrics.csv").iteration)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    artefacts = {file.parent for file in run.glob(f"iteration_*/*/{checksums.NAME}")}
    artefacts |= {folder / "evaluation" for folder in folders}
    artefacts |= {folder / "adapter" for folder in folders[1:]}
    records = [checksums.read(artefact) for artefact in artefacts]
    if listed != set(iterations) or not all(records):
        return False
    sources = {k: v for record in records for k, v in record.get("inputs", {}).items()}
    sources.pop(SETTINGS, None)
    return all(checksums.digest(run / name) == value for name, value in sources.items())


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
