"""Where the questions of the benchmark tasks come from, and how they are split.

From the hub by default, or from a folder of JSONL files with the hub's columns: `data=` or, for all tasks at once, the
environment variable IRPO_DATA (then IRPO_DATA/<task>). Every row is checked as it is read. No question is in two
splits (what a folder of one's own, for `jsonl`, has in two files is left there, and `contamination` refuses it).
"""

from __future__ import annotations

import json
import os
import random
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from irpo_utils import UserError
from irpo_utils.tasks.base import SPLITS, Task

if TYPE_CHECKING:
    from datasets import Dataset

SIGNS = str.maketrans("−–×·⋅÷", "--***/")  # as they are typed elsewhere
LAYOUT = re.compile(r"(?:[^\w+\-*/^=<>!|≤≥≠√%]|_)+")  # what may differ in one and the same question
SEED = 0
HELD_OUT_SHARE = 0.15  # of train for validation, where a source has no validation split


def normalise(question: str) -> str:
    """Letters, numbers and signs of operation, case folded: questions that are equal in this form are the same question.

    x-1 is not x+1, 3.5 not 35, and "1 23" not "12 3"; but "$x^{2}$." is "x^2", and 1,000 is 1000.

    >>> normalise("What is  $x^{2} - 1$?"), normalise("what is x^2-1"), normalise("1,000 x 3.5, 2")
    ('whatisx^2-1', 'whatisx^2-1', '1000x3.5~2')
    """
    text = unicodedata.normalize("NFKC", question).translate(SIGNS)
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_]{2})", "", text)  # one-half is "one half", a - b stays
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text)
    return LAYOUT.sub(_between_digits, text).casefold() or "".join(question.split())


def _between_digits(gap: re.Match) -> str:
    """Nothing, but for what keeps two digits apart: a point stays, anything else becomes ~."""
    before, after = gap.string[gap.start() - 1 : gap.start()], gap.string[gap.end() : gap.end() + 1]
    return ("." if gap[0] == "." else "~") if before.isdigit() and after.isdigit() else ""


def without(rows: list[dict], *others: list[dict]) -> list[dict]:
    """`rows` less the questions of `others` and less repetitions, by `normalise`."""
    seen = {normalise(row["question"]) for other in others for row in other}
    return [
        row for row in rows if (key := normalise(row["question"])) not in seen and not seen.add(key)
    ]


def hold_out(rows: list[dict], count: int | None = None) -> tuple[list[dict], list[dict]]:
    """(rest, held out): `count` rows, or 15 %, drawn with a fixed seed; never more than 15 % of a small file."""
    share = int(HELD_OUT_SHARE * len(rows))
    held = set(random.Random(SEED).sample(range(len(rows)), min(count or share, share)))
    return [r for i, r in enumerate(rows) if i not in held], [
        r for i, r in enumerate(rows) if i in held
    ]


def need(condition: object, reason: str) -> None:
    """Say what is wrong with a row; `read_jsonl` adds the file and the line."""
    if not condition:
        raise ValueError(reason)


def convert_rows(
    raw_rows, where: str, convert: Callable[[dict, int], dict], expected: str
) -> list[dict]:
    """`convert(row, index)` of each (number, row); a row it does not understand is a `UserError` that names the row."""
    rows, ids = [], set()
    for number, raw in raw_rows:
        try:
            raw = json.loads(raw) if isinstance(raw, bytes) else raw
            need(isinstance(raw, dict), "not a JSON object")
            row = convert(raw, len(rows))
            need(row.get("id") not in ids, f"the id {row.get('id')!r} was there before")
            ids |= {row["id"]} if "id" in row else set()
            rows.append(row)
        except KeyError as error:
            reason = f"the field {error} is missing"
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error)
        else:
            continue
        raise UserError(
            f"{where}{number}: {reason}. Each line has to be one JSON object with {expected}; mend or "
            "delete that line and start again."
        )
    return rows


def read_jsonl(path: Path, convert: Callable[[dict, int], dict], expected: str) -> list[dict]:
    """The rows of one UTF-8 JSONL file (empty lines are skipped), or a `UserError` with file and line."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}. Check the path given to --data."
        ) from error
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    rows = convert_rows(numbered, f"{path}, line ", convert, expected)
    if not rows:
        raise UserError(
            f"{path} has no questions. Each line has to be one JSON object with {expected}."
        )
    return rows


def local_path(task: str, data: str | None) -> Path | None:
    """The file or folder to read, or None for the hub; a folder of all tasks is followed into the task's own."""
    base = data or os.environ.get("IRPO_DATA")
    if not base:
        return None
    path = Path(base).expanduser()
    path = path / task if (path / task).is_dir() or not data else path
    if not path.exists():
        raise UserError(
            f"There is no file or folder {path}. Check --data, or IRPO_DATA, under which each task has a "
            "folder of its name; without both the questions come from the hub."
        )
    return path


def load_hub(task: str, hub: str, config: str | None, split: str) -> list[dict]:
    """Rows of a hub data set, or a `UserError` that offers --data; code in the repository is never run."""
    import datasets

    try:
        return list(datasets.load_dataset(hub, config, split=split))
    except (
        Exception
    ) as error:  # no network, hub down, gated, renamed: each library version has its own classes
        raise UserError(
            f"Cannot load {hub} from the hub ({type(error).__name__}). Without a network give a folder of "
            f"JSONL files with the hub's columns: --data FOLDER, or IRPO_DATA with {task}/ in it."
        ) from error


class FileTask(Task):
    """A task read from the hub or from files: subclasses say what a raw row means and how the rows are split."""

    hub: str
    config: str | None = None
    expected: str  # the fields of a raw row, for error messages
    splits_known: tuple[str, ...] = SPLITS

    def row(self, raw: dict, index: int) -> dict:
        """One raw row as `question`, `answer` and more; raises `ValueError` or `KeyError` for a malformed one."""
        raise NotImplementedError

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """All splits, from a local folder or (None) from the hub."""
        raise NotImplementedError

    def read(self, path: Path | None, name: str, optional: bool = False) -> list[dict]:
        """The rows of `name`.jsonl in the folder, or of that split on the hub; `id` is added where a row has none."""
        if path is None:
            raw = enumerate(load_hub(self.name, self.hub, self.config, name))
            rows = convert_rows(raw, f"{self.hub}, {name}, row ", self.row, self.expected)
        elif optional and not (path / f"{name}.jsonl").exists():
            return []
        elif path.is_file():
            raise UserError(
                f"{path} is a file; the task {self.name} reads a folder with {name}.jsonl in it. For one "
                "file of your own questions take --task jsonl."
            )
        else:
            rows = read_jsonl(path / f"{name}.jsonl", self.row, self.expected)
        return [{"id": f"{self.name}-{name}-{index:05d}", **row} for index, row in enumerate(rows)]

    def load(self, split: str, data: str | None = None) -> Dataset:
        """Questions of one split with `id`, `question`, `answer` and what else the task has.

        `data` is a local folder (for `jsonl` also a file); otherwise IRPO_DATA, otherwise the hub. Raises `UserError`
        for an unknown split, missing or malformed data (with file and line), or where the hub cannot be reached.
        """
        from datasets import Dataset

        if split not in self.splits_known:
            raise UserError(
                f"There is no split {split!r} of {self.name}; take one of {', '.join(self.splits_known)}."
            )
        rows = self.splits(local_path(self.name, data))[split]
        if not rows:
            raise UserError(
                f"The split {split} of {self.name} is empty: too few questions, or the file is missing."
            )
        return Dataset.from_list(rows)
