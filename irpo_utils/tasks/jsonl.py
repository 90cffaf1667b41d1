"""Your own questions: one JSONL file, or train.jsonl, validation.jsonl and test.jsonl.

One line:

    {"question": "How many legs have three spiders?", "answer": "24"}

`answer` is a number, a short text, or with `choices` (a list of two to five texts) a letter or one
of the texts. `solution` (a worked solution) and `id` are optional. One file is split 80/10/10 by a
hash of the normalised question, so that a question stays in its split when others are added.
Repetitions within a file are dropped; where two files of a folder share questions, `contamination`
stops the run.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from decimal import Decimal
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import answers, arc_challenge, gsm8k, numbers
from irpo_utils.tasks.base import SPLITS
from irpo_utils.tasks.files import FileTask, need, normalise, read_jsonl, without


def _is_number(answer: str) -> bool:
    letters = re.search(r"[^\W\d_]", re.sub(r"(?<=\d)[eE](?=[-+]?\d)", "", answer))
    return not letters and numbers.parse(answer) is not None


def _plain(text: str) -> str:
    """What is compared of a text: lower case, no wrapping or article, no blanks around signs."""
    text = answers.unwrap(unicodedata.normalize("NFKC", text))
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^[\[{](.*)[\]}]$|^\(([^(),]*)\)$", r"\1\2", text).casefold()
    text = re.sub(r"(?<=[a-z])(?:_\{?(\d+)\}?|!$)", r"\1", text)  # H_2O
    text = re.sub(r"^(?:an?|the)\s+(?=\w)", "", text)
    text = re.sub(r"(?<=\d)(?:\.0+(?!\d)|,(?=\d{3}(?!\d)))", "", text)  # 5.0 km, 1,000 people
    text = re.sub(r"\s*([,=+*/<>])\s*|(?<=\d)\s+(?=[a-z])", r"\1", text)
    return " ".join(text.split()).strip(" .")


def _split_of(row: dict) -> str:
    share = int(hashlib.sha256(normalise(row["question"]).encode()).hexdigest(), 16) % 10
    return "train" if share < 8 else "validation" if share == 8 else "test"


class JSONL(FileTask):
    """Bring your own questions; GSM8K's prompt, or ARC's where a question has choices."""

    name = "jsonl"
    expected = "`question` and `answer` (and perhaps `solution`, `choices`, `id`)"

    def prompt(self, row: dict) -> str:
        """The prompt of ARC for a question with `choices`, otherwise that of GSM8K."""
        return (arc_challenge.TASK if row.get("choices") else gsm8k.TASK).prompt(row)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """A letter if there are choices, a number where the gold answer is one, or the text."""
        row = row or {}
        if row.get("choices"):
            return arc_challenge.TASK.extract(completion, row)
        if _is_number(row.get("answer", "")):
            return gsm8k.TASK.extract(completion)
        block = answers.after_final_answer(completion)
        return (_plain(block) or None) if block else None

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """Equal as numbers if the gold answer is one, else as text; "Paris (capital)" is Paris."""
        if extracted is None:
            return False
        if _is_number(answer):
            return gsm8k.TASK.is_correct(extracted, answer)
        given, gold = _plain(extracted), _plain(answer)
        return gold in (given, re.sub(r"\s*\([^()]*\)$", "", given))

    def row(self, raw: dict, index: int) -> dict:
        """The row with text in every field, and a letter if there are choices."""
        question, answer, choices = raw["question"], raw["answer"], raw.get("choices")
        need(isinstance(question, str) and question.strip(), "`question` is empty or not text")
        is_number = isinstance(answer, (int, float, Decimal)) and not isinstance(answer, bool)
        need(isinstance(answer, str) or is_number, "`answer` is not text or a number")
        answer = f"{answer:f}" if isinstance(answer, Decimal) else str(answer).strip()
        need(_plain(answer), "`answer` is empty")
        need("\n" not in answer, "`answer` has several lines; only one is compared")
        need(len(answer) <= answers.MAX_LENGTH, f"`answer` is over {answers.MAX_LENGTH} characters")
        if choices is not None:
            texts = isinstance(choices, list) and all(isinstance(c, str) for c in choices)
            need(texts and 2 <= len(choices) <= 5, "`choices` is not a list of two to five texts")
            answer = arc_challenge.letter(answer, choices)
            need(answer, "`answer` is none of the choices")
        solution = raw.get("solution")
        need(isinstance(solution, (str, type(None))), "`solution` is not text")
        row = {"question": question, "answer": answer, "solution": solution, "choices": choices}
        return row if raw.get("id") is None else row | {"id": str(raw["id"])}

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """The three files of a folder, or one file split 80/10/10; no empty columns."""
        if path is None:
            raise UserError(
                "The task jsonl needs questions: --data FILE, a JSONL file with one object per "
                f"line that has {self.expected}."
            )
        if path.is_dir():
            parts = {name: self.read(path, name) for name in SPLITS}
        else:
            rows = read_jsonl(path, self, path.stem)
            parts = {name: [row for row in rows if _split_of(row) == name] for name in SPLITS}
        rows = [row for part in parts.values() for row in part]
        empty = {key for key in ("solution", "choices") if not any(row[key] for row in rows)}
        return {
            name: [{k: v for k, v in row.items() if k not in empty} for row in without(part)]
            for name, part in parts.items()
        }


TASK = JSONL()
