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
ORDINALS = "first second third fourth fifth 1st 2nd 3rd 4th 5th".split()
PATTERNS = answers.read_patterns("letters")
LETTER, BEHIND, OTHER = (PATTERNS[name][0][0] for name in ("letter", "behind", "other"))


def letter(text: str, choices: list[str] | None = None) -> str | None:
    """The one option that `text` names: "b", "(B)", "B) iron", "iron", or 2 for B; or None.

    A letter wins over an option that consists of the same letter, as letters are what the prompt
    asks for. None is read from two letters ("B or C", "b, c"), a letter with another option's text,
    a denied letter ("B is wrong"), the article in "A stronger force" unless this is option A, or a
    number where the options are numbers themselves.
    """
    options = [_clean(choice) for choice in choices or ()]
    letters = ascii_uppercase[: len(options) or 5]
    text = text[: answers.MAX_LENGTH]
    spellings = dict.fromkeys(_clean(text, phrases) for phrases in (False, True))
    # Texts come first, as in "E. coli" or "C 14"; but "B" is a letter. Each reader returns a
    # letter, "" if the text is ambiguous, or None to leave it to the next reader.
    for reader in (_by_long_text, _by_letter, _by_text, _by_letter_behind, _by_place):
        for spelling in spellings:  # with and without "It is", which may begin an option's text
            found = reader(spelling, letters, options)
            if found is not None:
                return found or None
    return None


@functools.lru_cache(maxsize=10_000)  # every completion of a question needs the same options
def _clean(text: str, phrases: bool = False) -> str:
    text = answers.replace(PATTERNS["clean"], answers.unwrap(text, phrases))
    return " ".join(text.split()).strip(". ")


@functools.lru_cache(maxsize=10_000)
def _key(text: str) -> str:
    """What is compared of an option's text, capitals apart."""
    return answers.replace(PATTERNS["key"], text)


def _by_long_text(text: str, letters: str, options: list[str]) -> str | None:
    return _by_text(text, letters, options) if len(_key(text)) > 2 else None


def _by_text(text: str, letters: str, options: list[str]) -> str | None:
    """The option with this text, with the same capitals if there are two ("Rr" and "RR")."""
    for form in (str, str.casefold):
        keys, key = [form(_key(option)) for option in options], form(_key(text))
        if key in keys:
            return letters[keys.index(key)] if keys.count(key) == 1 else ""
    return None


def _by_letter(text: str, letters: str, options: list[str]) -> str | None:
    """The letter that the text begins with, if the rest neither denies it nor names another."""
    match = LETTER.fullmatch(answers.replace(PATTERNS["rejected"], text))
    if not match:
        return None
    name, end, rest = match[1].upper(), match[2].strip(), match[3].strip(" ([")
    is_place = name.isdigit()
    if is_place and not any(option[:1].isdigit() for option in options):
        name = letters[int(name) - 1 : int(name)]
    if not name or name not in letters:
        return None
    own = options[letters.index(name)] if options else ""
    quoted = _quoted(rest, options)
    if quoted not in ("", own):
        if answers.found(PATTERNS["stop"], rest[len(quoted) :]):
            return ""
        quoted = ""
    rest = rest[len(quoted) :].strip(" .,:;()[]")
    if not rest or _key(rest).casefold() == _key(own).casefold():
        return name
    others = {other.upper() for other in OTHER.findall(rest)}
    if is_place:  # "1, 2 and 4"
        others |= set(re.findall(r"\d", rest))
    delimited = quoted or end or re.match(r"is\b", rest)
    is_clear = delimited and not others - {name} and not answers.found(PATTERNS["denial"], rest)
    return name if is_clear else None


def _quoted(text: str, options: list[str]) -> str:
    """The longest option that `text` begins with, in whole words."""
    for same in (str, str.casefold):
        begun = [option for option in options if option and same(text).startswith(same(option))]
        whole = [option for option in begun if not text[len(option) : len(option) + 1].isalnum()]
        if whole:
            return max(whole, key=len)
    return ""


def _by_letter_behind(text: str, letters: str, options: list[str]) -> str | None:
    """The option whose text has its letter behind it."""
    match = BEHIND.fullmatch(text)
    name = (match[2] or match[3] or match[4]).upper() if match else ""
    named = dict(zip(letters, options, strict=False)).get(name)
    is_own = named is not None and _key(match[1]).casefold() == _key(named).casefold()
    return name if is_own else None


def _by_place(text: str, letters: str, options: list[str]) -> str | None:
    """The option named by its place: "the second"."""
    word = re.sub(r"^the\s|\s(?:option|choice|one|answer)$", "", text.casefold())
    place = ORDINALS.index(word) % 5 if word in ORDINALS else len(options)
    return letters[place] if place < len(options) else None


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
        return extracted == answer

    def row(self, raw: dict, index: int) -> dict:
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
