"""ARC-Challenge: science questions with three to five options (Clark et al. 2018).

One raw row (files train.jsonl, test.jsonl, and validation.jsonl if there):

    {"id": "Mercury_7220990", "question": "Which factor will most likely cause a fever?",
     "choices": {"text": ["a leg muscle relaxing ...", "a bacterial population ...", ...],
                 "label": ["A", "B", "C", "D"]}, "answerKey": "B"}

Options are lettered by their place, also where the original labels are 1 to 4. The prompt is the
zero-shot prompt of the paper (appendix B.1). The paper also trains on ARC-Easy. Training questions
whose text is also a test question ("Which is a chemical change?") are left out.
"""

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
PATTERNS = answers.read_patterns("letters")
LETTER, BEHIND, OTHER = (PATTERNS[name][0][0] for name in ("letter", "behind", "other"))


def letter(text: str, choices: list[str] | None = None) -> str | None:
    """The one option that `text` names: "b", "(B)", "B) iron", "iron", or 2 for B; or None.

    A letter wins over an option that consists of the same letter, as letters are what the prompt
    asks for. None is read from two letters ("B or C", "b, c"), a letter with another option's text,
    a denied letter ("B is wrong"), the article in "A stronger force" unless this is option A, or a
    number where the options are numbers themselves.
    """
    options = dict(zip(ascii_uppercase, map(_clean, choices or [""] * 5), strict=False))
    text = text[: answers.MAX_LENGTH]
    # With and without "It is", which may begin an option's text.
    spellings = dict.fromkeys(_clean(text, phrases) for phrases in (False, True))
    for reader in (_by_text, _by_letter):
        for spelling in spellings:
            name = reader(spelling, options)
            if name is not None:  # "" is an ambiguous text: no other reader is asked
                return name or None
    return None


@functools.lru_cache(maxsize=10_000)  # every completion of a question needs the same options
def _clean(text: str, phrases: bool = False) -> str:
    text = answers.replace(PATTERNS["clean"], answers.unwrap(text, phrases))
    return " ".join(text.split()).strip(". ")


@functools.lru_cache(maxsize=10_000)
def _key(text: str) -> str:
    """What is compared of an option's text, capitals apart."""
    return answers.replace(PATTERNS["key"], text)


def _by_text(text: str, options: dict[str, str]) -> str | None:
    """The only option with this text, also as in "iron (B)"; "B" alone is left to `_by_letter`."""
    if match := BEHIND.fullmatch(text):
        name = match[2].upper()
        if _key(match[1]).casefold() == _key(options.get(name, "")).casefold():
            return name
    if _key(text).upper() in options:
        return None
    for form in (str, str.casefold):  # "Rr" and "RR" are two options
        names = [name for name in options if form(_key(options[name])) == form(_key(text))]
        if names:
            return names[0] if len(names) == 1 else ""
    return None


def _by_letter(text: str, options: dict[str, str]) -> str | None:
    """The letter that the text begins with, if the rest neither denies it nor names another."""
    match = LETTER.fullmatch(answers.replace(PATTERNS["rewritten"], text))
    if not match:
        return None
    name, end, rest = match[1].upper(), match[2].strip(), match[3].strip(" ([")
    is_place = name.isdigit()
    if is_place and not any(option[:1].isdigit() for option in options.values()):
        name = ascii_uppercase[int(name) - 1]
    if name not in options:
        return None
    begun = [own for own in options.values() if rest.casefold().startswith(own.casefold())]
    quoted = max(begun, key=lambda own: (len(own), rest.startswith(own)), default="")
    if quoted == options[name]:
        rest = rest[len(quoted) :]
    elif quoted and answers.found(PATTERNS["stop"], rest[len(quoted) :]):
        return ""
    rest = rest.strip(" .,:;()[]")
    if _key(rest).casefold() == _key(options[name]).casefold():  # B) type (C)
        return name
    others = {other.upper() for other in OTHER.findall(rest)} - {name}
    if others or is_place and re.search(r"\d", rest):  # 1, 2 and 4
        return None
    is_delimited = not rest or end or re.match(r"is\b", rest)
    return name if is_delimited and not answers.found(PATTERNS["denial"], rest) else None


def need_choices(choices: object) -> None:
    """Refuse what is not the texts of two to five options."""
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    need(texts and 2 <= len(choices) <= 5, "`choices` is not a list of two to five texts")


class ARCChallenge(FileTask):
    """Multiple-choice science; answers are letters."""

    name = "arc_challenge"
    hub, config = "allenai/ai2_arc", "ARC-Challenge"
    expected = "`question`, `choices` (with `text` and `label`) and `answerKey` (one of the labels)"

    def prompt(self, row: dict) -> str:
        """The paper's instruction, the question, one lettered option a line, and "Solution:"."""
        lettered = zip(ascii_uppercase, row["choices"], strict=False)
        options = "\n".join(f"({name}) {text}" for name, text in lettered)
        return PROMPT.format(question=row["question"], options=options)

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The letter after the last "Final answer:", or that of an option's text."""
        block = answers.after_final_answer(completion)
        return letter(block, (row or {}).get("choices")) if block else None

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """The same letter."""
        return extracted == answer

    def row(self, raw: dict) -> dict:
        """`choices` as a list of texts, `answer` as the letter of the correct one."""
        texts, labels, key = raw["choices"]["text"], raw["choices"]["label"], raw["answerKey"]
        need(raw["question"].strip(), "`question` is empty")
        need_choices(texts)
        need(len(texts) == len(labels), "`choices` needs a label for each text")
        need(key in labels, f"`answerKey` {key!r} is none of the labels")
        row = {"id": str(raw["id"]), "question": raw["question"]}
        return row | {"choices": texts, "answer": ascii_uppercase[labels.index(key)]}

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """The official splits; without validation.jsonl 15 % of train are held out."""
        test = self.read(path, "test")
        validation = without(self.read(path, "validation", optional=True), test)
        train = without(self.read(path, "train"), test, validation)
        if not validation:
            train, validation = hold_out(train)
        return {"train": train, "validation": validation, "test": test}


TASK = ARCChallenge()
