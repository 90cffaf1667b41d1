"""What an artefact was made from, and whether that is what is there now."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from irpo_utils import UserError
from irpo_utils.ops import checksums


def is_there(place: Path, record: dict[str, str]) -> bool:
    """Whether an artefact is sound and was made from `record`; says so if there is another one."""
    found = checksums.read(place)
    if found is None:
        if place.exists():
            tqdm.write(f"{place} is damaged (its checksums do not match): it is made again.")
        return False
    if (made_from := found.get("inputs")) == record:
        return True
    if made_from is None:
        tqdm.write(f"{place} does not say what it was made from: it is made again.")
        return False
    names = {*record, *made_from}
    other = sorted(name for name in names if made_from.get(name) != record.get(name))
    tqdm.write(f"{place} was made from other {', '.join(other)}: it is made again.")
    return False


def inputs(run: Path) -> dict[str, str | None]:
    """What tells the model and the questions of this run from others of the same name."""
    path = run / "inputs.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, so it is unknown whether model and questions are still the same. "
            "Restore it, remove it if you are sure, or choose another --out."
        ) from error


def digest(questions: Dataset, ordered: bool = False) -> str:
    """One number for the questions and all that belongs to them, in this order or in any."""
    rows = [json.dumps(row, sort_keys=True) for row in questions]
    return checksums.of_text(json.dumps(rows if ordered else sorted(rows)))
