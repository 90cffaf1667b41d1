"""Folders with a list of checksums, written last, and a record of what they were made from."""

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


def fault(folder: Path, inputs: dict[str, str]) -> str | None:
    """Why an artefact is not what would be made from `inputs` now; None if it is."""
    if (record := read(folder)) is None:
        return "is damaged (its checksums do not match)"
    made_from = record.get("inputs", {})
    names = sorted({*inputs, *made_from})
    other = [name for name in names if made_from.get(name) != inputs.get(name)]
    return f"was made from other {', '.join(other)}" if other else None


def digest(folder: Path) -> str:
    """One number for the data of a folder with checksums; "" for any other.

    Tables and weights only: other files hold times, which differ when the same data are made again.
    """
    if (record := read(folder)) is None:
        return ""
    data = {name: value for name, value in record["sha256"].items() if name.endswith(DATA)}
    return of_text(json.dumps(data, sort_keys=True))


def of_questions(questions, ordered: bool = False) -> str:
    """One number for the questions and all that belongs to them, in this order or in any."""
    rows = [json.dumps(row, sort_keys=True) for row in questions]
    return of_text(json.dumps(rows if ordered else sorted(rows)))


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
