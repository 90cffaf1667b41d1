"""The plain storage of a run: one folder per artefact, moved into place when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import pandas
from datasets import Dataset, load_from_disk
from safetensors import SafetensorError
from tqdm.auto import tqdm

from irpo_utils import UserError
from irpo_utils.iteration import Stages
from irpo_utils.ops import checksums
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes


class Folder:
    """The storage of a run: one folder per artefact, which is not made again when it is there."""

    revision: str | None = None  # commit of a hub model
    may_change: Collection[str] = ()  # settings that a directory may be resumed without

    def __init__(self, out: str | Path):
        check_path(out, "out")
        self.out = Path(out)

    def check(self, stages: Stages) -> None:
        """Called before the model is loaded: refuse a directory made with other settings."""
        new = dataclasses.asdict(stages.p)
        if any(self.out.glob("iteration_*/*")):
            old = dataclasses.asdict(read_profile(self.out))
            differing = sorted(k for k in new if old[k] != new[k] and k not in self.may_change)
            if differing:
                listed = ", ".join(f"{k} ({old[k]!r} there, {new[k]!r} now)" for k in differing)
                raise UserError(
                    f"{self.out} was made with other settings: {listed}. Choose another --out, or "
                    "give the same settings to resume it."
                )
        self.write_json(self.out / "profile.json", new)
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
        """The artefact from disk, or made by `make()`, or by `make(over)` where `over` is given.

        It is a `Dataset`, a `DatasetDict`, or (`Dataset`, counts).
        """
        place = self.folder(t) / name
        if not place.exists():
            content = make() if over is None else make(over)
            self.put(place, functools.partial(save, content))
        return load(place)

    def train(self, t: int, make, stages: Stages) -> None:
        """Make the adapter of M_t with `make()`, which returns the training log."""
        if not self.adapter(t).exists():
            self.put(self.adapter(t), adapter_writer(stages, make()))

    def put(self, place: Path, write, about: dict | None = None) -> None:
        """Write a folder under another name, then move it: it is there as a whole or not at all.

        It gets a list of checksums, with what is known `about` it. Of several processes the first
        one writes.
        """
        partial = place.with_name(f".{place.name}.partial")
        processes.wait()  # others may still read what is there
        if processes.is_first():
            try:
                with disk_errors(place):
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    write(partial)
                    checksums.write(partial, about or {})
                    shutil.rmtree(place, ignore_errors=True)
                    os.replace(partial, place)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        processes.wait()

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

    def evaluated(self, t: int, stages: Stages, answers) -> list[dict]:
        """Called after each evaluation; returns further rows for the metrics."""
        return []

    def metrics(self, t: int, rows: list[dict]) -> None:
        """Add rows to metrics.json of iteration t and to metrics.csv, and show the main ones.

        The rows of a new evaluation replace all that are there.
        """
        evaluated = any(row["metric"] == "greedy" for row in rows)
        old = [] if evaluated else self.known_metrics(t)
        new = {(row["metric"], row["k"]): row for row in [*old, *rows]}
        self.write(self.folder(t) / "metrics.json", json.dumps(list(new.values()), indent=0) + "\n")
        self.table(range(t + 1))
        if processes.is_first():
            shown = "greedy sampled kl_to_previous pairs_pairs pairs_used pairs_questions".split()
            line = [f"{row['metric']} {row['value']:.4g}" for row in rows if row["metric"] in shown]
            tqdm.write(f"M_{t}: {', '.join(line)}")

    def known_metrics(self, t: int) -> list[dict]:
        """The rows of metrics.json of iteration t; none if it is missing or damaged."""
        try:
            return json.loads((self.folder(t) / "metrics.json").read_text())
        except (OSError, ValueError):
            return []

    def table(self, iterations) -> list[dict]:
        """The metrics of all iterations, also written to metrics.csv."""
        rows = [row for t in iterations for row in self.known_metrics(t)]
        self.write(self.out / "metrics.csv", pandas.DataFrame(rows).to_csv(index=False))
        return rows


def check_path(path, option: str) -> None:
    """`datasets` takes a path with "::" or "://" for an address and would write to another file."""
    if "::" in str(path) or "://" in str(path):
        raise UserError(f"--{option} is {str(path)!r}: it must be a path without '::' and '://'.")


def read_profile(run: str | Path) -> Profile:
    """The settings of a run directory, also of one made before an option was renamed."""
    path = Path(run) / "profile.json"
    try:
        return profile_from(dict(json.loads(path.read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{run} is not a run directory: {path} is missing or damaged. Restore it, or make a "
            "run with `python -m irpo_utils run --out DIR`."
        ) from error


def read_inputs(run: str | Path) -> dict[str, str | None]:
    """Identifies the model and the questions of this run among others of the same name."""
    path = Path(run) / "inputs.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, so it is unknown whether model and questions are still the same. "
            "Restore it, remove it if you are sure, or choose another --out."
        ) from error


def profile_from(settings: dict) -> Profile:
    """The profile with these settings, which may have the names of version 0.1."""
    if "dpo_weight" in settings:
        settings = dict(settings)
        served = settings.pop("sampler", "transformers") == "vllm"
        per_token = settings.pop("nll_per", "sequence") == "token"
        chosen_only = settings.pop("dpo_weight") == 0
        settings["engine"] = "vllm" if served else "cpu"
        settings["loss"] = "dpo_nll_per_token" if per_token else "dpo_nll"
        settings["loss"] = "sft" if chosen_only else settings["loss"]
    return Profile(**settings)


def save(content, folder: Path) -> None:
    """A `Dataset` or `DatasetDict`, or (`Dataset`, counts)."""
    data, counts = content if isinstance(content, tuple) else (content, None)
    data.save_to_disk(str(folder))
    if counts is not None:
        (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def load(place: Path):
    """What `save` wrote."""
    data, counts = load_from_disk(str(place)), place / "counts.json"
    return (data, json.loads(counts.read_text())) if counts.exists() else data


def adapter_writer(stages: Stages, log: Dataset):
    """A function that writes the adapter in PEFT's format, with the training log, into a folder.

    All processes must call this: they put the weights of a split model together.
    """
    model, weights = stages.model, stages.engine.state_dict(stages.model)

    def write(folder: Path) -> None:
        # Without the last argument PEFT looks for the base on the hub.
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty model card
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])  # a set without an order
        path.write_text(json.dumps(config, indent=1) + "\n")
        log.to_json(folder / "training_log.jsonl")

    return write


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
