"""ARC-Challenge: science questions with three to five options (Clark et al. 2018).

One raw row (files train.jsonl, test.jsonl, and validation.jsonl if there):

    {"id": "Mercury_7220990", "question": "Which factor will most likely cause a fever?",
     "choices": {"text": ["a leg muscle relaxing ...", "a bacterial population ...", ...],
                 "label": ["A", "B", "C", "D"]}, "answerKey": "B"}

Options are lettered by their place, also where the original labels are 1 to 4. Prompt of the paper
(appendix B.1), zero-shot. The paper trains on ARC-Easy as well; here it is ARC-Challenge alone. Of
the training questions those whose text is also a test question ("Which is a chemical change?", with
other options) are left out.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from string import ascii_uppercase

from irpo_utils.tasks import answers
from irpo_utils.tasks.files import FileTask, hold_out, need, without

PROMPT = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and "
    "when you're ready to answer, conclude using the format "
    '"Final answer: (insert letter here)"\n\n'
    "Question: {question}\n{options}\nSolution:"
)
ORDINALS = "first second third fourth fifth 1st 2nd 3rd 4th 5th".split()
INTRODUCTION = r"(?:(?:the|correct|right|best|answer|option|choice|letter|is)\b[\s:]*)*"
LETTER = re.compile(
    rf"{INTRODUCTION}[(\[{{]?\s*([a-e1-9])\s*(?:[)\]}}.,:;!?]+(?!\d)|[-=]>|\||[-–—](?=\s)|(?=\s+\S)|$)\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
# A letter behind the option's text: "wet palms (B)", "wet palms, option B".
BEHIND = re.compile(
    r"(.*?\w)[\s,.:;-]*(?:[(\[]\s*([a-e])\s*[)\]]|,\s*(?:option|choice)\s([a-e])|\s-\s(?-i:([A-E]))$)",
    re.IGNORECASE,
)
# The option that was not taken: "B (not A)", "B instead of C".
REJECTED = re.compile(
    r"(?<=\S)\s*\(?\b(?:not|and not|instead of|rather than)\s+(?:option\s)?"
    r"\(?(?:[A-E]|[a-e](?=\)|$))\b\)*",
    re.ASCII,
)
# What follows a letter takes it back: "is wrong", "is not right", "can't be", or nothing but "no".
DENIAL = re.compile(
    r"(?:(?:is|was|can|could|does|would)\s*(?:not\b|n't)|cannot|(?:\w+\s+){0,2}(?:wrong|incorrect|false|"
    r"impossible|unlikely|ruled\sout|eliminated)\b|(?:not?|never)\W*$)",
    re.IGNORECASE,
)
# Another letter that stands alone ("B, or c"), unless it may be the article "a"; or "B, 3".
OTHER = re.compile(
    r"\(([a-e])\)|(?<![\w'])([b-e])(?!\w)|(?<![\w'])(a)(?!\w|\s+\w)|(?<=\s)(?-i:(A)\b)|^(?:or\s+)?([1-9])$",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=10_000)  # the options of a question are read with every completion
def _clean(text: str, phrases: bool = False) -> str:
    text = answers.unwrap(re.sub(r"\(insert letter here\):?", "", text), phrases)
    text = re.sub(r"\\(?:text[a-z]*|math[a-z]*|mbox)|[{}_]", "", text)
    return " ".join(text.split()).strip(". ")


def _key(text: str, fold: bool = True) -> str:
    """What is compared of an option's text: "2.0 kg" is "2kg", "10 degrees Celsius" is "10°C"."""
    text = re.sub(r"\s*(?:°|degrees?)\s*([cCfF])(?:elsius|ahrenheit)?\b", r"°\1", text)
    text = re.sub(r"(\d)\.0+(?!\d)", r"\1", text)
    text = re.sub(
        r"\b(none|all|both|neither) of (?:the above|these|those)\b",
        r"\1 of the above",
        text,
        flags=re.I,
    )
    text = re.sub(r"[\s(\[\])]+", "", text)
    return text.casefold() if fold else text


def letter(text: str, choices: list[str] | None = None) -> str | None:
    """The one option that `text` names: "b", "(B)", "B) iron", "iron", or 2 for B; or None.

    A letter wins over an option that consists of the same letter, as letters are what the prompt
    asks for. In doubt are two letters ("B or C", "b, c"), a letter with another option's text, one
    that is denied ("B is wrong"), the article in "A stronger force" unless this is option A, and a
    number where the options are numbers themselves.
    """
    options = [_clean(choice) for choice in choices or ()]
    letters = ascii_uppercase[: len(options) or 5]
    plain, stripped = (_clean(text[: answers.MAX_LENGTH], phrases) for phrases in (False, True))
    for spelling in (plain, stripped):  # in full, as "E. coli" or "C 14"; it may begin with "It is"
        place = _place(spelling, options)
        if place is not None and len(_key(spelling)) > 2:
            return letters[place] if place >= 0 else None
    for spelling in (plain, stripped):
        match = LETTER.fullmatch(REJECTED.sub("", spelling))
        named = _named(match, match[0], letters, options) if match else None
        if named is not None:
            return named or None
    place = _place(stripped, options)
    if place is None:
        return _behind(stripped, letters, options) if options else None
    return letters[place] if place >= 0 else None


def _place(text: str, options: list[str]) -> int | None:
    """The place of the option with this text; -1 for one of several, None if there is none."""
    for fold in (False, True):  # "Rr" and "RR" are different options in genetics
        places = [i for i, option in enumerate(options) if _key(option, fold) == _key(text, fold)]
        if places:
            return places[0] if len(places) == 1 else -1
    return None


def _behind(text: str, letters: str, options: list[str]) -> str | None:
    """The option whose text has its letter behind it, or named by place: "the second"."""
    match = BEHIND.fullmatch(text)
    name = (match[2] or match[3] or match[4]).upper() if match else ""
    if name and name in letters and _key(match[1]) == _key(options[letters.index(name)]):
        return name
    word = re.sub(r"^the\s|\s(?:option|choice|one|answer)$", "", text.casefold())
    place = ORDINALS.index(word) % 5 if word in ORDINALS else len(letters)
    return letters[place] if place < len(letters) else None


def _named(match: re.Match, text: str, letters: str, options: list[str]) -> str | None:
    """The letter that the text begins with, "" if it has the text of another option, or None."""
    name, rest = match[1].upper(), match[2].strip(" ([")
    if name.isdigit():
        if any(option[:1].isdigit() for option in options) or int(name) > len(letters):
            return None
        name = letters[int(name) - 1]
    if name not in letters:
        return None
    own = options[letters.index(name)] if options else ""
    copied = _copied(rest, options, str) or _copied(rest, options, str.casefold)
    if copied not in (
        "",
        own,
    ):  # another option's text, unless it begins a sentence about something else
        if re.match(r"\W*(?:$|(?:because|since|as|is|or|and)\b)|[.,;:]", rest[len(copied) :]):
            return ""
        copied = ""
    rest = rest[len(copied) :].strip(" .,:;()[]")
    if not rest or _key(rest) == _key(own):
        return name
    delimited = copied or text[match.end(1) : match.start(2)].strip() or re.match(r"is\b", rest)
    others = {other.upper() for found in OTHER.findall(rest) for other in found if other} - {name}
    if match[1].isdigit():  # "1, 2 and 4"
        others |= set(re.findall(r"\d", rest))
    return name if delimited and not others and not DENIAL.match(rest) else None


def _copied(text: str, options: list[str], same) -> str:
    """The longest option that `text` begins with, in whole words."""
    begun = (option for option in options if option and same(text).startswith(same(option)))
    whole = (option for option in begun if not text[len(option) : len(option) + 1].isalnum())
    return max(whole, key=len, default="")


class ARCChallenge(FileTask):
    """Multiple-choice science; answers are letters."""

    name = "arc_challenge"
    hub, config = "allenai/ai2_arc", "ARC-Challenge"
    expected = "`question`, `choices` (with `text` and `label`) and `answerKey` (one of the labels)"

    def prompt(self, row: dict) -> str:
        """The paper's instruction, the question, one lettered option a line, and "Solution:"."""
        options = "\n".join(
            f"({name}) {text}" for name, text in zip(ascii_uppercase, row["choices"], strict=False)
        )
        return PROMPT.format(question=row["question"], options=options)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The letter after the last "Final answer:", or that of an option's text."""
        block = answers.after_final_answer(completion)
        return letter(block, (row or {}).get("choices")) if block else None

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
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
        """The official splits; without validation.jsonl 15 % of train are held out."""
        test = self.read(path, "test")
        validation = without(self.read(path, "validation", optional=True), test)
        train = without(self.read(path, "train"), test, validation)
        if not validation:
            train, validation = hold_out(train)
        return {"train": train, "validation": validation, "test": test}


TASK = ARCChallenge()
