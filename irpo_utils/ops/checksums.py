"""Folders with a list of checksums, written last, which shows whether they are whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

NAME = "checksums.json"
DATA = (".arrow", ".safetensors")


def write(folder: Path, record: dict) -> None:
    """Write `record` and the checksum of every file in `folder`."""
    sums = {
        str(file.relative_to(folder)): of_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != NAME
    }
    # A kill on the way leaves no valid JSON, and so a folder that is not sound.
    (folder / NAME).write_text(json.dumps({**record, "sha256": sums}, indent=1))


def read(folder: Path) -> dict | None:
    """The record of a folder whose files are all there, unchanged; None for any other."""
    try:
        record = json.loads((folder / NAME).read_text())
        sound = all(of_file(folder / name) == value for name, value in record["sha256"].items())
        return record if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def digest(folder: Path) -> str:
    """One number for the data of a folder with checksums; "" for any other.

    Tables and weights only: other files hold times, which differ when the same data are made again.
    """
    try:
        sums = json.loads((folder / NAME).read_text())["sha256"]
        data = {name: value for name, value in sums.items() if name.endswith(DATA)}
        return of_text(json.dumps(data, sort_keys=True))
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
