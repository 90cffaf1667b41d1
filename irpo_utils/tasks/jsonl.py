"""Questions of your own: one JSONL file, or a folder with train.jsonl, validation.jsonl and test.jsonl.

One line:

    {"question": "How many legs have three spiders?", "answer": "24"}

`answer` is a number, a short text, or with `choices` (a list of two to five texts) a letter or one of the texts;
`solution` (a worked solution for SFT or as an extra winner) and `id` are optional. One file is split 80/10/10 by a hash
of the normalised question, so that a question stays in its split when others are added. Repetitions within a
file are dropped; where two files of a folder share questions, `contamination` refuses the run.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import arc_challenge, gsm8k, numbers
from irpo_utils.tasks.files import FileTask, need, normalise, read_jsonl, without

EXPECTED = "`question` and `answer` (and perhaps `solution`, `choices`, `id`)"


def _is_number(answer: str) -> bool:
    return not re.search(r"[^\W\d_]", answer) and numbers.parse(answer) is not None


def _plain(text: str) -> str:
    return " ".join(text.replace("**", "").strip(" .$*`\"'").split()).casefold()


def _split_of(row: dict) -> str:
    share = int(hashlib.sha256(normalise(row["question"]).encode()).hexdigest(), 16) % 10
    return "train" if share < 8 else "validation" if share == 8 else "test"


class JSONL(FileTask):
    """Bring your own questions; GSM8K's prompt, or ARC's where a question has choices."""

    name = "jsonl"
    expected = EXPECTED

    def prompt(self, row: dict) -> str:
        """The prompt of ARC for a question with `choices`, otherwise that of GSM8K."""
        return (arc_challenge.TASK if row.get("choices") else gsm8k.TASK).prompt(row)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """A letter for a question with choices, a number where the gold answer is one, otherwise the text."""
        row = row or {}
        if row.get("choices"):
            return arc_challenge.TASK.extract(completion, row)
        if _is_number(row.get("answer", "")):
            return gsm8k.TASK.extract(completion)
        line = numbers.final_line(completion)
        return (
            (_plain(line) or None) if line is not None and len(line) <= numbers.MAX_LINE else None
        )

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """Equal as numbers if the gold answer is one without words, otherwise as text but for case and full stop."""
        if extracted is None:
            return False
        return (
            gsm8k.TASK.is_correct(extracted, answer)
            if _is_number(answer)
            else _plain(extracted) == _plain(answer)
        )

    def row(self, raw: dict, index: int) -> dict:
        """The row with every field as text, and a letter for an answer that is one of the choices."""
        question, answer, choices = raw["question"], raw["answer"], raw.get("choices")
        need(isinstance(question, str) and question.strip(), "`question` is empty or not text")
        need(
            isinstance(answer, (str, int, float)) and not isinstance(answer, bool),
            "`answer` is not text or a number",
        )
        answer = str(answer).strip()
        need(_plain(answer), "`answer` is empty")
        if choices is not None:
            need(
                isinstance(choices, list)
                and 2 <= len(choices) <= 5
                and all(isinstance(c, str) for c in choices),
                "`choices` is not a list of two to five texts",
            )
            answer = arc_challenge.letter(answer, choices)
            need(answer, "`answer` is none of the choices")
        need(isinstance(raw.get("solution", ""), (str, type(None))), "`solution` is not text")
        row = {
            "question": question,
            "answer": answer,
            "solution": raw.get("solution"),
            "choices": choices,
        }
        return row | ({"id": str(raw["id"])} if raw.get("id") is not None else {})

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """The three files of a folder, or one file split 80/10/10; columns that no row has are left out."""
        if path is None:
            raise UserError(
                "The task jsonl needs questions: --data FILE, a JSONL file with one object a line that has "
                f"{EXPECTED}."
            )
        if path.is_dir():
            parts = {name: self.read(path, name) for name in ("train", "validation", "test")}
        else:
            rows = [
                {"id": f"{path.stem}-{i:05d}", **r}
                for i, r in enumerate(read_jsonl(path, self.row, EXPECTED))
            ]
            parts = {
                name: [row for row in rows if _split_of(row) == name]
                for name in ("train", "validation", "test")
            }
        rows = [row for part in parts.values() for row in part]
        empty = {key for key in ("solution", "choices") if not any(row[key] for row in rows)}
        return {
            name: [
                {key: value for key, value in row.items() if key not in empty}
                for row in without(part)
            ]
            for name, part in parts.items()
        }


TASK = JSONL()
