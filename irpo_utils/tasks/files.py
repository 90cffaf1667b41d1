"""Where the questions of the benchmark tasks come from, and how they are split.

From the hub by default, or from a folder of JSONL files with the hub's columns: `data=` or, for all
tasks at once, the environment variable IRPO_DATA (then IRPO_DATA/<task>). Every row is checked as
it is read. No question is in two splits, except in your own files: `contamination` reports those.
"""

import hashlib
import json
import os
import random
import re
import unicodedata
from decimal import Decimal
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import answers
from irpo_utils.tasks.base import SPLITS, Task

PATTERNS = answers.read_patterns("questions", flags=re.NOFLAG)
SEED = 0
HELD_OUT_SHARE = 0.15  # of train for validation, where a source has no validation split
ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, RecursionError)  # raised by `row`


def normalise(question: str) -> str:
    """Letters, numbers and signs of operation, case folded: equal questions are equal in this form.

    x-1 is not x+1, 3.5 not 35, and "1 23" not "12 3"; but "$x^{2}$." is "x^2", and 1,000 is 1000.

    >>> normalise("What is  $x^{2} - 1$?"), normalise("what is x^2-1"), normalise("1,000 x 3.5, 2")
    ('whatisx^2-1', 'whatisx^2-1', '1000x3.5~2')
    """
    text = answers.replace(PATTERNS["layout"], unicodedata.normalize("NFKC", question))
    return text.casefold() or "".join(question.split())


def question_hash(row: dict) -> str:
    """A hash that equal questions share (64 hexadecimal digits)."""
    return hashlib.sha256(normalise(row["question"]).encode()).hexdigest()


def without(rows: list[dict], *others: list[dict]) -> list[dict]:
    """`rows` less the questions of `others` and less repetitions, by `normalise`."""
    seen, kept = {normalise(row["question"]) for other in others for row in other}, []
    for row in rows:
        question = normalise(row["question"])
        if question not in seen:
            kept.append(row)
        seen.add(question)
    return kept


def hold_out(rows: list[dict], count: int | None = None) -> tuple[list[dict], list[dict]]:
    """(rest, held out): `count` rows drawn with a fixed seed, but never more than 15 %."""
    share = int(HELD_OUT_SHARE * len(rows))
    held = set(random.Random(SEED).sample(range(len(rows)), min(count or share, share)))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def need(condition: object, reason: str) -> None:
    """Say what is wrong with a row; `FileTask.convert` adds the file and the line."""
    if not condition:
        raise ValueError(reason)


def _decimal(text: str) -> Decimal:
    """A JSON number as it is written: as a float, 0.00005 would become the text 5e-05."""
    number = Decimal(text)
    need(number.is_finite(), f"{text} is not a number")
    need(not number or abs(number.adjusted()) <= 300, f"the number {text} is out of range")
    return number


def local_path(task: str, data: str | None) -> Path | None:
    """The file or folder to read, or None for the hub; below a folder of all tasks, the task's."""
    folder = data or os.environ.get("IRPO_DATA")
    if not folder:
        return None
    path = Path(folder).expanduser()
    path = path / task if (path / task).is_dir() or not data else path
    if not path.exists():
        raise UserError(
            f"There is no file or folder {path}. Check --data, or IRPO_DATA, under which each task "
            "has a folder of its name; without both the questions come from the hub."
        )
    return path


class FileTask(Task):
    """A task read from the hub or from files.

    A subclass has `row(raw)`, which makes `question`, `answer` and more from a raw row, and
    `splits(path)`: all splits from a local folder or (None) from the hub.
    """

    hub: str
    config: str | None = None
    expected: str  # the fields of a raw row, for error messages
    split_names: tuple[str, ...] = SPLITS

    def hub_sets(self, name: str) -> list[tuple[str, str | None, str]]:
        """(data set, configuration, split) on the hub, whose rows make up the split `name`."""
        return [(self.hub, self.config, name)]

    def convert(self, raw_rows, where: str, prefix: str) -> list[dict]:
        """`row` of each (number, raw row), with an `id`; `UserError` names a refused row."""
        rows: dict[str, dict] = {}
        for number, raw in raw_rows:
            try:
                if isinstance(raw, bytes):
                    raw = json.loads(raw, parse_float=_decimal, parse_constant=_decimal)
                need(isinstance(raw, dict), "not a JSON object")
                text = json.dumps(raw, ensure_ascii=False, default=str)
                need(not re.search("[\ud800-\udfff]", text), "a text has half of a surrogate pair")
                row = {"id": f"{prefix}-{len(rows):05d}", **self.row(raw)}
                need(row["id"] not in rows, f"the id {row['id']!r} was there before")
            except MALFORMED as error:
                reason = f"the field {error} is missing" if isinstance(error, KeyError) else error
                raise UserError(
                    f"{where} {number}: {reason}. Each line has to be one JSON object with "
                    f"{self.expected}; fix or delete that line, then run the command again."
                ) from error
            rows[row["id"]] = row
        return [*rows.values()]

    def read_file(self, path: Path, prefix: str) -> list[dict]:
        """The rows of a UTF-8 JSONL file, empty lines apart; `UserError` with file and line."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror}. Check --data.") from error
        wide = "UTF-16 or UTF-32" if b"\0" in content[:8] else None
        if encoding := ENCODINGS.get(content[:2], wide):
            raise UserError(f"{path} is {encoding}; save it as plain JSONL text in UTF-8.")
        lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1)
        filled = ((number, line) for number, line in lines if line.strip())
        if rows := self.convert(filled, f"{path}, line", prefix):
            return rows
        raise UserError(f"{path} has no questions. Each line needs {self.expected}.")

    def read(self, path: Path | None, name: str, optional: bool = False) -> list[dict]:
        """The rows of `name`.jsonl in the folder, or of that split on the hub."""
        prefix = f"{self.name}-{name}"
        if path is None:
            raw_rows = (row for hub_set in self.hub_sets(name) for row in self._load_hub(*hub_set))
            return self.convert(enumerate(raw_rows), f"{self.hub}, {name}, row", prefix)
        if path.is_file():
            raise UserError(
                f"{path} is a file; the task {self.name} reads a folder with {name}.jsonl in it. "
                "For one file with your own questions use --task jsonl."
            )
        file = path / f"{name}.jsonl"
        return [] if optional and not file.exists() else self.read_file(file, prefix)

    def _load_hub(self, hub: str, config: str | None, split: str):
        """Rows of a data set on the hub, whose code is never run; `UserError` offers --data."""
        import datasets

        try:
            return datasets.load_dataset(hub, config, split=split)
        except Exception as error:  # no network, gated, renamed: each library has its own classes
            raise UserError(
                f"Cannot load {hub} from the hub ({type(error).__name__}). Without a network give "
                "a folder of JSONL files with the hub's columns: --data FOLDER, or IRPO_DATA with "
                f"{self.name}/ in it."
            ) from error

    def load(self, split: str, data: str | None = None):
        """The `Dataset` of one split with unique `id`, `question`, `answer` and the task's columns.

        `data` is a local folder (for `jsonl` also a file); otherwise IRPO_DATA, otherwise the hub.
        Raises `UserError` for an unknown split and for missing or malformed data.
        """
        from datasets import Dataset

        if split not in self.split_names:
            known = ", ".join(self.split_names)
            raise UserError(f"There is no split {split!r} of {self.name}; use one of {known}.")
        if rows := self.splits(local_path(self.name, data))[split]:
            names = dict.fromkeys(name for row in rows for name in row)
            return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
        raise UserError(f"The split {split} of {self.name} is empty: too few questions or no file.")
