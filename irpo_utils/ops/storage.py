"""Files of a run: written as a whole or not at all, and read with errors that name the fix."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from datasets import Dataset, load_from_disk
from safetensors import SafetensorError

from irpo_utils import UserError
from irpo_utils.ops import checksums
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes


class Folder:
    """Where the artefacts of a run are, and how they are written."""

    revision: str | None = None  # commit of a hub model
    start: Path | None = None  # the adapter of M_0; None is a zero adapter

    def __init__(self, out: str | Path):
        check_path(out, "out")
        self.out = Path(out)

    def folder(self, t: int) -> Path:
        """Where the artefacts of iteration t are."""
        return self.out / f"iteration_{t}"

    def adapter(self, t: int) -> Path | None:
        """The adapter of M_t; None is a zero adapter."""
        return self.folder(t) / "adapter" if t > 0 else self.start

    def put(self, place: Path, write, about: dict) -> None:
        """Write a folder under another name, then move it: it is there as a whole or not at all.

        It gets checksums, and what is known `about` it. Of several processes the first one writes.
        """
        partial = place.with_name(f".{place.name}.partial")
        processes.wait()  # others may still read what is there
        if processes.is_first():
            try:
                with disk_errors(place):
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    write(partial)
                    checksums.write(partial, about)
                    shutil.rmtree(place, ignore_errors=True)
                    os.replace(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
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
            finally:
                partial.unlink(missing_ok=True)

    def write_json(self, path: Path, content) -> None:
        """`write`, as JSON."""
        self.write(path, json.dumps(content, indent=1) + "\n")


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
        settings = {name: value for name, value in settings.items() if name != "sampler"}
        per_token = settings.pop("nll_per", "sequence") == "token"
        loss = "dpo_nll_per_token" if per_token else "dpo_nll"
        settings |= {"engine": "cpu", "loss": loss if settings.pop("dpo_weight") else "sft"}
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


def save_adapter(model, weights: dict | None, log: Dataset, folder: Path) -> None:
    """The adapter in PEFT's format, with the training log; weights: of a model that is split."""
    # Without the last argument PEFT looks for the base on the hub.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set without an order
    path.write_text(json.dumps(config, indent=1) + "\n")
    log.to_json(folder / "training_log.jsonl")


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
