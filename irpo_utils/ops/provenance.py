"""What an artefact was made from, and whether that is what is there now."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from irpo_utils import UserError
from irpo_utils.ops import checksums
from irpo_utils.scale import processes


def is_there(place: Path, record: dict[str, str]) -> bool:
    """Whether an artefact is sound and was made from `record`; says so if there is another one.

    The first process decides, so that all do the same.
    """
    return processes.from_first(lambda: _is_there(place, record))


def _is_there(place: Path, record: dict[str, str]) -> bool:
    if not place.exists():
        return False
    if (found := checksums.read(place)) is None:
        fault = "is damaged (its checksums do not match)"
    elif (made_from := found.get("inputs")) is None:
        fault = "does not say what it was made from"
    elif made_from != record:
        names = {*record, *made_from}
        other = sorted(name for name in names if made_from.get(name) != record.get(name))
        fault = f"was made from other {', '.join(other)}"
    else:
        return True
    tqdm.write(f"{place} {fault}: it is made again.")
    return False


def inputs(run: Path) -> dict[str, str | None]:
    """Identifies the model and the questions of this run among others of the same name."""
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
