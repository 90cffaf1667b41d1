"""ARC-Challenge: grade-school science questions with three to five options (Clark et al. 2018, allenai/ai2_arc).

One raw row (files train.jsonl, test.jsonl, and validation.jsonl if there):

    {"id": "Mercury_7220990", "question": "Which factor will most likely cause a person to develop a fever?",
     "choices": {"text": ["a leg muscle relaxing ...", "a bacterial population ...", ...],
                 "label": ["A", "B", "C", "D"]}, "answerKey": "B"}

Options are lettered by their place, also where the original labels are 1 to 4. Prompt of the paper (appendix B.1),
zero-shot. The paper trains on ARC-Easy as well; here it is ARC-Challenge alone. Of the training questions those whose
text is also a test question ("Which is a chemical change?", with other options) are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import ascii_uppercase

from irpo_utils.tasks.files import FileTask, hold_out, need, without
from irpo_utils.tasks.numbers import FULL_WIDTH, final_line

PROMPT = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're "
    'ready to answer, conclude using the format "Final answer: (insert letter here)"\n\n'
    "Question: {question}\n{options}\nSolution:"
)
INTRODUCTION = r"(?:(?:the|my|correct|right|best|final|answer|option|choice|letter|is)\b[\s:]*)*"
LETTER = re.compile(
    rf"{INTRODUCTION}[(\[]?\s*([a-e1-9])\s*(?:[)\].,:;!]+(?!\d)|[-–—](?=\s)|(?=\s+\S)|$)\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
CHARACTERS = str.maketrans(FULL_WIDTH | {"’": "'"})
# What follows a letter takes it back: "is wrong", "is not right", "can't be", or nothing but "no".
DENIAL = re.compile(
    r"(?:(?:is|was|can|could|does|would)\s*(?:not\b|n't)|cannot|(?:\w+\s+){0,2}(?:wrong|incorrect|false|"
    r"impossible)\b|(?:not?|never)\W*$)",
    re.IGNORECASE,
)
# Another letter that stands alone ("B, or c"), unless it may be the article "a"; or nothing but another place ("B, 3").
OTHER = re.compile(
    r"\(([a-e])\)|(?<![\w'])([b-e])(?!\w)|(?<![\w'])(a)(?!\w|\s+\w)|(?<=\s)(?-i:(A)\b)|^(?:or\s+)?([1-9])$",
    re.IGNORECASE,
)


def _clean(text: str) -> str:
    text = re.sub(
        r"\\(?:boxed|text[a-z]*|math[a-z]*|left|right|[()\[\]])|[$*{}`\"]",
        " ",
        text.translate(CHARACTERS),
    )
    return " ".join(text.split()).rstrip(". ")


def letter(text: str, choices: list[str] | None = None) -> str | None:
    """The one option that `text` names: "b", "(B)", "B) iron", "Option B", "iron", or 2 for B; None in doubt.

    A letter wins over an option that consists of the same letter, as letters are what the prompt asks for. In doubt
    are two letters ("B or C", "b, c"), a letter with another option's text, one that is denied ("B is wrong"), the
    article in "A stronger force" unless this is option A, and a number where the options are numbers themselves.
    """
    text, options = _clean(text[:1000]), [_clean(choice) for choice in choices or ()]
    letters = ascii_uppercase[: len(options) or 5]
    match = LETTER.fullmatch(text)
    written = (
        text.casefold() in map(str.casefold, options) and len(text) > 2
    )  # in full, as "E. coli" or "C 14"
    named = not written and match and _named(match, text, letters, options)
    if named:
        return named
    for same in (str, str.casefold):  # "Rr" and "RR" are different options in genetics
        places = [i for i, option in enumerate(options) if same(option) == same(text)]
        if places:
            return letters[places[0]] if len(places) == 1 else None
    return None


def _named(match: re.Match, text: str, letters: str, options: list[str]) -> str | None:
    name, rest = match[1].upper(), match[2].strip()
    if name.isdigit():
        if any(option[:1].isdigit() for option in options) or int(name) > len(letters):
            return None
        name = letters[int(name) - 1]
    if name not in letters:
        return None
    own = options[letters.index(name)] if options else ""
    copied = next(
        (found for same in (str, str.casefold) if (found := _copied(rest, options, same))), ""
    )
    if copied not in (
        "",
        own,
    ):  # another option's text, unless it begins a sentence about something else
        if re.match(r"\W*(?:$|(?:because|since|as|is|or|and)\b)|[.,;:]", rest[len(copied) :]):
            return None
        copied = ""
    rest = rest[len(copied) :].strip(" .,:;()")
    if not rest:
        return name
    delimited = (
        copied
        or text[match.end(1) : match.start(2)].strip()
        or re.match(r"(?:is|because|since)\b", rest)
    )
    others = {other.upper() for found in OTHER.findall(rest) for other in found if other} - {name}
    others |= set(re.findall(r"\d", rest)) if match[1].isdigit() else set()  # "1, 2 and 4"
    return name if delimited and not others and not DENIAL.match(rest) else None


def _copied(text: str, options: list[str], same) -> str:
    """The longest option that `text` begins with, in whole words."""
    begun = (option for option in options if same(text).startswith(same(option)))
    return max(
        (option for option in begun if not text[len(option) : len(option) + 1].isalnum()),
        key=len,
        default="",
    )


class ARCChallenge(FileTask):
    """Multiple-choice science; answers are letters."""

    name = "arc_challenge"
    hub, config = "allenai/ai2_arc", "ARC-Challenge"
    expected = "`question`, `choices` (with the lists `text` and `label`) and `answerKey` (one of the labels)"

    def prompt(self, row: dict) -> str:
        """The paper's instruction, the question, one lettered option a line, and "Solution:"."""
        options = "\n".join(
            f"({name}) {text}" for name, text in zip(ascii_uppercase, row["choices"])
        )
        return PROMPT.format(question=row["question"], options=options)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The letter on the line after the last "Final answer:"; `row["choices"]` lets an option's text count too."""
        line = final_line(completion)
        return None if line is None else letter(line, (row or {}).get("choices"))

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """The same letter."""
        return extracted is not None and extracted == answer

    def row(self, raw: dict, index: int) -> dict:
        """`choices` as a list of texts, `answer` as the letter of the right one's place."""
        texts, labels = raw["choices"]["text"], raw["choices"]["label"]
        need(raw["question"].strip(), "`question` is empty")
        need(
            len(texts) == len(labels) and 2 <= len(texts) <= 5,
            "`choices` needs two to five texts, a label each",
        )
        need(
            all(isinstance(text, str) for text in texts), "`choices` has an option that is not text"
        )
        need(raw["answerKey"] in labels, f"`answerKey` {raw['answerKey']!r} is none of the labels")
        return {
            "id": str(raw["id"]),
            "question": raw["question"],
            "choices": list(texts),
            "answer": ascii_uppercase[labels.index(raw["answerKey"])],
        }

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """The official splits; a local folder without validation.jsonl gives 15 % of train for it."""
        test = self.read(path, "test")
        validation = without(self.read(path, "validation", optional=True), test)
        train = without(self.read(path, "train"), test, validation)
        if not validation:
            train, validation = hold_out(train)
        return {"train": train, "validation": validation, "test": test}


TASK = ARCChallenge()
