"""Your own questions: one JSONL file, or train.jsonl, validation.jsonl and test.jsonl.

One line:

    {"question": "How many legs have three spiders?", "answer": "24"}

`answer` is a number ("24", not "24 apples"), a short text that is compared as text (LaTeX too), or
with `choices` (a list of two to five texts) a letter or one of the texts. `solution` (a worked
solution) and `id` are optional. One file is split 80/10/10 by a hash of the normalised question, so
that a question stays in its split when others are added. Repetitions within a file are dropped;
questions that two files share stop the run.
"""

import functools
import re
import unicodedata
from decimal import Decimal
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import answers, arc_challenge, gsm8k, numbers
from irpo_utils.tasks.base import SPLITS
from irpo_utils.tasks.files import FileTask, need, question_hash, without

PATTERNS = answers.read_patterns("texts")


@functools.lru_cache(maxsize=10_000)  # gold answers are asked for again with every completion
def _is_number(answer: str) -> bool:
    return not re.search(r"[^\W\d_eE]", answer) and numbers.parse(answer) is not None


@functools.lru_cache(maxsize=10_000)
def _plain(text: str) -> str:
    """What is compared of a text: lower case, no wrapping or article, no blanks around signs."""
    text = answers.unwrap(unicodedata.normalize("NFKC", text))
    return answers.replace(PATTERNS["text"], text.casefold())


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
        text = _plain(answers.after_final_answer(completion) or "")
        is_open = "(" in row.get("answer", "")  # else what is in brackets would divide the votes
        return (text if is_open else answers.replace(PATTERNS["aside"], text)) or None

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """Equal as numbers if the gold answer is one, else as text; "Paris (capital)" is Paris."""
        if _is_number(answer):
            return gsm8k.TASK.is_correct(extracted, answer)
        given, gold = _plain(extracted or ""), _plain(answer)
        return bool(given) and gold in (given, answers.replace(PATTERNS["aside"], given))

    def row(self, raw: dict) -> dict:
        """The row with text in every field, and a letter if there are choices."""
        question, answer = raw["question"], raw["answer"]
        solution, choices, given_id = raw.get("solution"), raw.get("choices"), raw.get("id")
        need(isinstance(question, str) and question.strip(), "`question` is empty or not text")
        need(solution is None or isinstance(solution, str), "`solution` is not text")
        is_number = isinstance(answer, (int, float, Decimal)) and not isinstance(answer, bool)
        need(isinstance(answer, str) or is_number, "`answer` is not text or a number")
        answer = f"{answer:f}" if isinstance(answer, Decimal) else str(answer).strip()
        need(_plain(answer), "`answer` is empty")
        need("\n" not in answer, "`answer` has several lines; only one is compared")
        need(len(answer) <= answers.MAX_LENGTH, f"`answer` is over {answers.MAX_LENGTH} characters")
        if choices is not None:
            arc_challenge.need_choices(choices)
            answer = arc_challenge.letter(answer, choices)
            need(answer, "`answer` is none of the choices")
        if solution and not answers.MARKER.search(solution):  # as the prompt asks, and gsm8k does
            solution = f"{solution.strip()}\nFinal answer: {answer}"
        row = {"question": question, "answer": answer, "solution": solution, "choices": choices}
        row["id"] = None if given_id is None else str(given_id)
        return {name: value for name, value in row.items() if value is not None}

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """The three files of a folder, or one file split 80/10/10."""
        if path is None:
            raise UserError(f"The task jsonl needs --data FILE, JSON lines with {self.expected}.")
        if path.is_dir():
            return {name: without(self.read(path, name)) for name in SPLITS}
        parts = {name: [] for name in SPLITS}
        for row in without(self.read_file(path, path.stem)):
            tenth = int(question_hash(row), 16) % 10  # of ten parts the last two are held out
            parts["test" if tenth == 9 else "validation" if tenth == 8 else "train"].append(row)
        return parts


TASK = JSONL()
