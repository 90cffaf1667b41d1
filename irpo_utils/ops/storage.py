"""The plain storage of a run: one folder per artefact, moved into place when it is complete."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pandas
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm

from irpo_utils import UserError
from irpo_utils.iteration import Stages
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes


class Folder:
    """The storage of a run: one folder per artefact, which is not made again when it is there."""

    revision: str | None = None  # commit of a hub model

    def __init__(self, out: str | Path):
        check_path(out, "out")
        self.out = Path(out)

    def check(self, stages: Stages) -> None:
        """Called before the model is loaded: refuse a directory made with other settings."""
        self.start = Path(stages.p.start) if stages.p.start else None
        text, path = json.dumps(dataclasses.asdict(stages.p), indent=1), self.out / "profile.json"
        if path.exists() and path.read_text() != text:
            raise UserError(f"{self.out} was made with other settings. Choose another --out.")
        self.write(path, text)

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
        try:
            partial.mkdir(parents=True)
            write(partial)
            os.replace(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def write(self, path: Path, text: str) -> None:
        """Write a small file as a whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

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


def save_adapter(model, log: Dataset, folder: Path, weights: dict | None = None) -> None:
    """The adapter in PEFT's format, with the training log; weights: if not the model's."""
    # Without the last argument PEFT looks for the base on the hub.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set without an order
    path.write_text(json.dumps(config, indent=1) + "\n")
    log.to_json(folder / "training_log.jsonl")
