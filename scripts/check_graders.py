r"""Test the graders: real gold answers in many surface forms, incorrect and evasive answers, hostile text.

    IRPO_DATA=folder python scripts/check_graders.py                # up to 4,000 answers per task
    IRPO_DATA=folder python scripts/check_graders.py --count 500    # a short test; --out for another folder

Every answer is made from a real gold answer, so its correct grade is known. A second, independent reader grades it
(`other_number`, `other_letter`, `other_latex`), and so does the short rule that is most used elsewhere (`last_number`,
`last_letter`, `same_text`). Where ours and another disagree, `note` says why, by the form in which the answer was
made. The table is figures/grading.csv: `test`, `tried`, `held` (graded as expected,
or the disagreement is explained in `note`), `note`. figures/grading.json has the seed, versions and hardware, and
examples of every kind of disagreement.

    python scripts/check_graders.py --cases cases.jsonl             # your own labelled completions

A line of such a file has `task`, `completion`, `gold`, `correct` (the judgement of a fair human marker), `kind`, `sure`
(whether markers would agree), and perhaps `choices` and `question`. The table is figures/grading_cases.csv: a row per task,
kind and `sure`, and one with the kind "all" per task and `sure`; figures/grading_cases.json has command, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import re
import time
import unicodedata
from collections import Counter, defaultdict
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from irpo_utils import grading, tasks
from irpo_utils.ops.cli import quiet_libraries
from irpo_utils.ops.environment import environment
from irpo_utils.tasks import files, numbers, verifier
from irpo_utils.tasks import math as math_task
from studies import word_choices

CASES = Path(__file__).parents[1] / "tests" / "data" / "answers.jsonl"
COLUMNS = ("test", "tried", "held", "note")
CASE_COLUMNS = ("task", "kind", "n", "false_positives", "false_negatives", "sure")
SHARES = {"right": 0.4, "wrong": 0.4, "evasive": 0.2}  # of the answers of a task
BY_VALUE = (
    0.1,
    5000,
)  # of MATH's answers, and at most: four such kinds need the library's process, about 20 ms each
LIMIT = 1.0  # seconds of processor time for one hostile text, besides MATH's own limit

# --- numbers: spellings, forms, and a second reader ----------------------------------------------------------------


def spellings(value: Fraction) -> dict[str, str]:
    """Ways to write a number with at most four decimals."""
    plain = numbers.show(value)
    grouped = re.sub(r"\d+", lambda match: f"{int(match[0]):,}", plain, count=1)
    ways = {
        "plain": plain,
        "grouped": grouped,
        "zeros": plain + ("0" if "." in plain else ".00"),
        "fraction": f"{value.numerator}/{value.denominator}",
        "LaTeX fraction": f"{'-' * (value < 0)}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",
        "other minus": plain.replace("-", "−"),
        "no-break hyphen": plain.replace("-", "‑"),
        "full-width": plain.translate({ord(c): chr(ord(c) + 0xFEE0) for c in "0123456789.-"}),
        "Arabic digits": plain.translate(
            {ord("0") + i: chr(0x660 + i) for i in range(10)} | {ord("."): "٫"}
        ),
        "LaTeX groups": grouped.replace(",", "{,}"),
        "thin spaces": grouped.replace(",", "\\,"),
        "power of ten": f"{numbers.show(value / 1000)} \\times 10^{{3}}",
    }
    if value % 100 == 0 and value:
        ways["thousand"] = f"{numbers.show(value / 1000)} thousand"
    if value < 0:
        ways |= {"minus": f"minus {plain[1:]}", "negative": f"negative {plain[1:]}"}
    if value.denominator > 1 and value > 1:
        whole, rest = divmod(value, 1)
        ways["mixed"] = f"{whole} {rest.numerator}/{rest.denominator}"
    return ways


COMMITTED = {
    "bare": "{}",
    "full stop": "{}.",
    "bold": "**{}**",
    "formula": "${}$",
    "box": r"$\boxed{{{}}}$",
    "parentheses": r"\({}\)",
    "code": "`{}`",
    "GSM8K's mark": "#### {}",
    "tag": "{}</s>",
    "sentence": "The answer is {}.",
    "label": "Total: {}",
    "variable": "x = {}",
    "equation": "3 + 4 = 7 = {}",
    "about": "about {}",
    "approximately": "approximately {}",
    "rounded": "{} (rounded)",
    "unit": "{} eggs",
    "dollars": "{} dollars",
    "euro sign": "€{}",
    "per cent": "{}%",
    "rate": "{} miles per hour",
    "repeated": "{0} ({0})",
    "explained": "{}, I think.",
    "there are": "There are {} left",
    "area": "{} m^2",
    "or of things": "{} apples or pears",
    "not after it": "{} pupils who do not sing",
    "other final answer": "7\nNo, wait.\nFinal answer: {}",
}
EVASIVE = {
    "or": "{0} or {1}",
    "or, other first": "{1} or {0}",
    "between": "between {0} and {1}",
    "to": "{0} to {1}",
    "ratio": "{0}:{1}",
    "list": "{0}, {1}",
    "two sentences": "{0}. Or rather {1}.",
    "two variables": "x = {1}, y = {0}",
    "spaces": "{0} {0}",
    "tab": "{0}\t{0}",
    "pair": "({0}, {0})",
    "denied": "not {0}",
    "denied in a sentence": "The answer is not {0}.",
    "isn't": "It isn't {0}",
    "is wrong": "{0} is wrong",
    "struck out": "~~{0}~~",
    "more than": "more than {0}",
    "at least": "at least {0}",
    "or more": "{0} or more",
    "unequal": "x ≠ {0}",
    "greater": "x >= {0}",
    "half of": "half of {0}",
    "squared": "{0} squared",
    "power": "{0}^2",
    "sum": "{0} + {1}",
    "term": "x - {0}",
    "and a half": "{0} and a half",
    "cents in words": "{0} dollars and fifty cents",
    "word or number": "twelve or {0}",
    "thousands": "{0}k",
    "base": "{0}₂",
    "tens of thousands": "{0}万",
    "tolerance": "{0} ± 1",
    "root": "√{0}",
    "nothing": "I do not know",
}
# Why the second reader, which is lenient and knows few words, sees it another way; by the form of the answer.
WHY_NUMBERS = {
    "not after it": 'the second reader refuses every line with a "not"; ours knows that here it is about the pupils',
    "or of things": 'the second reader refuses every line with an "or"; ours sees that only one number is named',
    "struck out": "the second reader drops signs that it does not know",
    "half of": "the second reader does not know the word",
    "squared": "the second reader does not know the word",
    "is wrong": "the second reader does not know the word",
    "and a half": "the second reader reads digits only",
    "cents in words": "the second reader reads digits only",
    "thousands": "a number with a letter: the second drops letters",
    "word or number": 'the second reader reads digits only and drops the word before the "or"',
    "spaces": "the same number twice is one number to the second reader; ours wants a word between them",
    "tab": "the same number twice is one number to the second reader; ours wants a word between them",
    "pair": "the same number twice is one number to the second reader; ours wants a word between them",
    "term": "the second reader does not know variables",
    "base": "the second reader drops signs that it does not know",
    "tens of thousands": "the second reader drops signs that it does not know",
    "root": "the second reader drops signs that it does not know",
    "unequal": "the second reader drops signs that it does not know",
    "greater": "the second reader looks at the right side of an equals sign, whatever stands before it",
    "power of ten": "the second reader does not multiply",
    "mixed": "the second reader does not add",
    "two variables": "the second reader looks at the right side of the last equals sign only",
    "isn't": "the second reader does not know the word",
}
STOP_WORDS = {"or", "not", "between", "than", "least", "to", "rather", "more"}


def other_number(completion: str) -> Fraction | None:
    """A number reader written another way: tokens in place of one large pattern, few words, lenient."""
    line = re.split("final answer:", completion, flags=re.IGNORECASE)[-1].strip().split("\n")[0]
    line = (
        unicodedata.normalize("NFKC", line.replace("m^2", "").replace("₂", ""))
        .rpartition("=")[2]
        .lower()
    )
    line = (
        re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", line).replace("{,}", ",").replace("\\,", ",")
    )
    line = line.translate(str.maketrans(dict.fromkeys("−‐‑", "-") | {"٫": "."}))
    tokens = re.findall(r"\d[\d.,]*|[a-z]+|[-+/:^±(]", line)
    if STOP_WORDS & set(tokens):
        return None
    found, place = set(), 0
    while place < len(tokens):
        value = _plain_number(tokens[place])
        if value is None:
            place += 1
            continue
        start, after = place, tokens[place + 1 : place + 3]
        before = tokens[start - 1] if start else ""
        if after[:1] == ["/"] and len(after) > 1 and _plain_number(after[1]):
            value, place = value / _plain_number(after[1]), place + 2
        if tokens[place + 1 : place + 2] == ["thousand"]:
            value *= 1000
        follows = start > 1 and _plain_number(tokens[start - 2]) is not None
        if before in ("+", "^", "±") or before in ("-", ":") and follows:
            return None
        found.add(-value if before in ("-", "minus", "negative") else value)
        place += 1
    return found.pop() if len(found) == 1 else None


def _plain_number(token: str) -> Fraction | None:
    token = token.rstrip(".,")
    whole, point, decimals = token.partition(".")
    groups = whole.split(",")
    if not all(group.isdecimal() for group in groups) or (point and not decimals.isdecimal()):
        return None
    if len(groups) > 1 and (len(groups[0]) > 3 or any(len(group) != 3 for group in groups[1:])):
        return None
    digits = "".join(str(unicodedata.decimal(c)) for c in "".join(groups) + decimals)
    return Fraction(int(digits), 10 ** len(decimals))


def last_number(completion: str) -> Fraction | None:
    """The rule of many harnesses: the last number in the text, in plain digits with commas."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", completion)
    return Fraction(found[-1].replace(",", "")) if found else None


def why_last_number(kind: str, completion: str) -> str | None:
    """Why the last number is not what ours reads; None where there is no reason."""
    text = completion.rpartition("Final answer:")[2]
    if kind == "evasive":
        return "takes the last number, whatever is said of it"
    if re.search(r"[^\x00-\x7f]|frac|times|\d */ *\d|thousand|minus|negative|\{,\}|\\,", text):
        return "knows plain digits with commas only, and no sign in words"
    if len(re.findall(r"\d+", text.replace(",", "").replace(".", ""))) > 1:
        return "takes the last of several numbers"
    return None


def dressed(value: Fraction, rng: random.Random) -> tuple[str, str]:
    """(form, text) of a number in some spelling, with something around it."""
    spelling, text = rng.choice([*spellings(value).items()])
    form = rng.choice([*COMMITTED])
    text = COMMITTED[form].format(text)
    return (
        form
        if form in WHY_NUMBERS
        else spelling
        if spelling in WHY_NUMBERS
        else f"{form}, {spelling}",
        text,
    )


def number_answers(golds: list[Fraction], count: int, rng: random.Random):
    """(kind, form, completion, gold, whether it is right; None for evasive) of `count` answers."""
    for index in range(count):
        kind = rng.choices([*SHARES], [*SHARES.values()])[0]
        gold = golds[index % len(golds)]
        if rng.random() < 0.25:  # the real ones are mostly positive and whole
            gold = rng.choice((-gold, gold / 10, gold / 4, gold * 1000))
        off = rng.choice((1, -1, Fraction(1, 2), -2 * gold, 9 * gold, 10, Fraction(1, 100))) or 1
        value = gold if kind == "right" else gold + off
        if kind == "evasive":
            form = rng.choice([*EVASIVE])
            text = EVASIVE[form].format(numbers.show(abs(gold)), numbers.show(abs(gold) + 1))
        else:
            form, text = dressed(value, rng)
        yield (
            kind,
            form,
            f"3 + 4 = 7\nFinal answer: {text}",
            numbers.show(abs(gold) if kind == "evasive" else gold),
        )


def check_numbers(
    name: str, golds: list[Fraction], count: int, rng: random.Random, examples: dict
) -> list[dict]:
    """The rows of one task whose answers are numbers."""
    task, tally = tasks.get(name), Tally(name, WHY_NUMBERS, examples)
    for kind, form, completion, gold in number_answers(golds, count, rng):
        read = task.extract(completion)
        other = other_number(completion)
        right, last = task.is_correct(read, gold), last_number(completion)
        tally.add(
            kind,
            form,
            completion,
            read is None if kind == "evasive" else right == (kind == "right"),
            right == (other is not None and other == Fraction(gold)),
        )
        tally.compare(
            form, completion, right == (last == Fraction(gold)), why_last_number(kind, completion)
        )
    return tally.rows()


# --- the nearest option --------------------------------------------------------------------------------------------


def check_nearest(count: int, rng: random.Random, examples: dict) -> list[dict]:
    """The rows of word_choices: an option's number, right or wrong, and what lies within half a step of it, in all the forms."""
    task, tally = word_choices.TASK, Tally("word_choices", WHY_NUMBERS, examples)
    rows = [row for split in ("train", "validation", "test") for row in task.load(split)]
    for index in range(count):
        row, kind = rows[index % len(rows)], rng.choices([*SHARES], [*SHARES.values()])[0]
        values = [Fraction(choice) for choice in row["choices"]]
        place = "ABCD".index(row["answer"])
        if kind == "wrong":
            place = rng.choice([other for other in range(4) if other != place])
        near = (values[1] - values[0]) * Fraction(rng.randint(-49, 49), 100)
        text, form = numbers.show(values[place]), rng.choice([*EVASIVE])
        if kind == "evasive":
            text = EVASIVE[form].format(text, numbers.show(values[place] + 1))
        else:
            form, text = dressed(values[place] + rng.choice((0, near)), rng)
        completion = f"3 + 4 = 7\nFinal answer: {text}"
        read, other, last = (
            task.extract(completion, row),
            other_number(completion),
            last_number(completion),
        )
        right = read == row["answer"]
        tally.add(
            kind,
            form,
            f"{completion}  {row['choices']}",
            read is None if kind == "evasive" else right == (kind == "right"),
            right == (_nearest(other, values) == "ABCD".index(row["answer"])),
        )
        tally.compare(
            form,
            completion,
            right == (_nearest(last, values) == "ABCD".index(row["answer"])),
            why_last_number(kind, completion),
        )
    return tally.rows()


def _nearest(value: Fraction | None, values: list[Fraction]) -> int | None:
    """The place of the option nearest to a number, found by sorting."""
    if value is None:
        return None
    (first, place), (second, _), *_ = sorted(
        (abs(value - option), place) for place, option in enumerate(values)
    )
    return place if first < second else None


# --- letters -------------------------------------------------------------------------------------------------------

LETTER_FORMS = {
    "bare": "{0}",
    "small": "{1}",
    "parentheses": "({0})",
    "one parenthesis": "{0})",
    "full stop": "{0}.",
    "bold": "**({0})**",
    "box": r"$\boxed{{{0}}}$",
    "box with text": r"\boxed{{\text{{({0})}}}}",
    "sentence": "The answer is ({0}).",
    "option": "Option {0}",
    "correct": "The correct answer is {0}",
    "letter and text": "({0}) {2}",
    "dash": "{0} - {2}",
    "letter, text, full stop": "{0}. {2}.",
    "text": "{2}",
    "reason": "({0}), because the others do not fit",
    "text and reason": "{0}) {2}, because the others do not fit",
    "full-width": "（{3}）",
    "place": "{4}",
    "other final answer": "{5}\nNo, wait.\nFinal answer: {0}",
    "quotes": '"{0}"',
    "question mark": "{0}?",
}
LETTER_EVASIVE = {
    "or": "{0} or {5}",
    "or, small": "{1} or {6}",
    "comma": "({0}), ({5})",
    "comma, small": "{1}, {6}",
    "and": "{0} and {5}",
    "slash": "{0}/{5}",
    "denied": "not {0}",
    "is wrong": "{0} is wrong",
    "is not right": "({0}) is not right",
    "another's text": "({0}) {7}",
    "another's text and more": "{0}) {7}, because it fits",
    "two places": "{4}, {8}",
    "none": "none of them",
    "instruction": "(insert letter here)",
    "all": "all of the above",
    "but": "{0}, but perhaps {5}",
    "no such option": "F",
}
WHY_LETTERS = {
    "is wrong": "the second reader does not know the words",
    "is not right": "the second reader does not know the words",
    "text": "two options have the same text, or one is a letter or a number: ours asks which, or takes the letter",
    "place": "the options are numbers, so that a place is no name to ours",
    "another's text and more": "the second reader looks for another option's whole text only",
    "letter and text": "the text itself names a letter or begins as another option does: ours is in doubt, or the second is",
    "letter, text, full stop": "the text itself names a letter: the second reader is in doubt, ours has read it as the text",
    "dash": "the text itself names a letter: the second reader is in doubt, ours has read it as the text",
    "text and reason": "the text itself names a letter: the second reader is in doubt, ours has read it as the text",
}
FILLERS = {
    "the",
    "answer",
    "is",
    "option",
    "choice",
    "correct",
    "final",
    "my",
    "letter",
    "boxed",
    "text",
}


def other_letter(completion: str, choices: list[str]) -> str | None:
    """A reader of letters written another way: a list of words."""
    line = re.split("final answer:", completion, flags=re.IGNORECASE)[-1].strip().split("\n")[0]
    words, *texts = (
        [word.casefold() for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text))]
        for text in (line, *choices)
    )
    if words in texts and len("".join(words)) > 1:
        return "ABCDE"[texts.index(words)] if texts.count(words) == 1 else None
    while words and words[0] in FILLERS:
        words.pop(0)
    names = "abcde"[: len(choices)]
    if not words or len(words[0]) > 1 or words[0] not in names + "12345"[: len(choices)]:
        return None
    name = words[0] if words[0] in names else names[int(words[0]) - 1]
    rest = words[1:]
    if rest in [text for text, other in zip(texts, names) if other != name]:
        return None
    others = set(rest) & set(names) - {"a", name}
    if others or set(rest[:1]) & {"or", "and", "but", "not", "a", "1", "2", "3"}:
        return None
    return name.upper() if words[0] in names or len(rest) == 0 else None


def last_letter(completion: str) -> str | None:
    """The rule of many harnesses: the last single capital letter from A to E."""
    found = re.findall(r"\b([A-E])\b", completion)
    return found[-1] if found else None


def why_last_letter(kind: str, form: str, choices: list[str]) -> str | None:
    """Why the last capital letter is not what ours reads; None where there is no reason."""
    if kind == "evasive":
        return "takes the last letter, whatever is said of it"
    if form in ("small", "full-width", "place", "text"):
        return "knows capital letters only, no options by their text or place"
    if any(re.search(r"\b[A-E]\b", text) for text in choices):
        return "takes a letter in the text of an option for an answer"
    return None


def letter_answers(rows: list[dict], count: int, rng: random.Random):
    """(kind, form, completion, row) of `count` answers."""
    for index in range(count):
        row = rows[index % len(rows)]
        letters = "ABCDE"[: len(row["choices"])]
        kind = rng.choices([*SHARES], [*SHARES.values()])[0]
        name = row["answer"] if kind != "wrong" else rng.choice(letters.replace(row["answer"], ""))
        other = rng.choice(letters.replace(name, ""))
        forms = LETTER_EVASIVE if kind == "evasive" else LETTER_FORMS
        if any(
            text[:1].isdigit() for text in row["choices"]
        ):  # then a number is no name of a place
            forms = {form: text for form, text in forms.items() if "{4}" not in text}
        form, place, place_of_other = (
            rng.choice([*forms]),
            letters.index(name),
            letters.index(other),
        )
        if (
            form == "text" and row["choices"][place].strip() in letters
        ):  # its text is another option's letter, and letters win
            form = "bare"
        text = forms[form].format(
            name,
            name.lower(),
            row["choices"][place],
            chr(ord(name) + 0xFEE0),
            place + 1,
            other,
            other.lower(),
            row["choices"][place_of_other],
            place_of_other + 1,
        )
        yield kind, form, f"A is not it, nor is D.\nFinal answer: {text}", row


def check_letters(count: int, rng: random.Random, examples: dict) -> list[dict]:
    """The rows of ARC-Challenge."""
    task, tally = tasks.get("arc_challenge"), Tally("arc_challenge", WHY_LETTERS, examples)
    rows = [row for split in ("train", "validation", "test") for row in task.load(split)]
    for kind, form, completion, row in letter_answers(rows, count, rng):
        read, other = task.extract(completion, row), other_letter(completion, row["choices"])
        held = read is None if kind == "evasive" else (read == row["answer"]) == (kind == "right")
        shown, right = f"{completion}  {row['choices']}", read == row["answer"]
        tally.add(kind, form, shown, held, right == (other == row["answer"]))
        tally.compare(
            form,
            shown,
            right == (last_letter(completion) == row["answer"]),
            why_last_letter(kind, form, row["choices"]),
        )
    return tally.rows()


# --- LaTeX ---------------------------------------------------------------------------------------------------------

LATEX_FORMS = {
    "bare": "Final answer: {}",
    "formula": "Final answer: ${}$",
    "full stop": "Final answer: ${}$.",
    "box": r"Final answer: $\boxed{{{}}}$.",
    "box alone": r"So it is \boxed{{{}}}.",
    "parentheses": r"Final answer: \({}\)",
    "display": "Final answer:\n$${}$$",
    "sentence": "Final answer: The answer is ${}$.",
    "bold": "**Final Answer:** ${}$",
    "other final answer": "Final answer: $7$\nNo, wait.\nFinal answer: ${}$",
}
LATEX_SPELLINGS = {
    "as it is": lambda gold: gold,
    "dfrac": lambda gold: gold.replace("\\frac", "\\dfrac"),
    "no \\left": lambda gold: re.sub(r"\\(?:left|right)(?![a-zA-Z])\s*", "", gold),
    "spaces": lambda gold: (
        gold if re.search(r"text|\\!|\d,\d{3}", gold) else re.sub(r"(?<!\\)([+=,])", r" \1 ", gold)
    ),
    "a variable": lambda gold: gold if other_latex(gold) is None else f"k = {gold}",
    "display style": lambda gold: "\\displaystyle " + gold,
    "unit": lambda gold: (
        gold
        if other_latex(gold) is None or re.search(r"text|mbox|%|circ", gold)
        else gold + r"\text{ units}"
    ),
}
UNFINISHED_FORMS = {"plus nothing": "{}+0", "nothing plus": "0+{}", "plus one": "({})+1-1"}
LATEX_EVASIVE = {
    "or": "Final answer: ${0}$ or ${1}$",
    "denied": "Final answer: It is not ${0}$.",
    "denied box": r"It is not \boxed{{{0}}}.",
    "more than": "Final answer: more than ${0}$",
    "unequal": r"Final answer: $x \ne {0}$",
    "less": "Final answer: $x < {0}$",
    "another factor": r"Final answer: ${0}\pi^3$",
    "modulo": r"Final answer: ${0} \mod 7$",
    "dots": r"Final answer: ${0}, \ldots$",
    "million": "Final answer: ${0}$ million",
    "turned": "Final answer: $-({0})-1$",
    "nothing": "Final answer: I do not know",
    "base": "Final answer: ${0}_7$",
    "prime": "Final answer: ${0}'$",
}
WHY_LATEX = {
    "equal by value": "the second reader has no value for one of them (a set, an equation, a variable) and compares text; "
    "these are equal, but written otherwise",
    "not worked out": "the second reader compares values; ours refuses an operation that is left to do",
    "a word": "words count as text to ours whatever their capitals",
    "decimals": "the library works out an expression with decimals to 15 digits only; what differs in the last is not equal to ours",
}
DRESSING = re.compile(
    r"\\ |\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\d)?|\\[%$]|\^\s*\{?\\circ\}?|^\s*[a-z]\s*=|"
    r"(?<=\d),(?:\\! ?)?(?=\d{3})"
)  # units, signs, "x =", commas between thousands
TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|[-+*/^(){}\[\]])")


def other_latex(text: str) -> float | None:
    """The value of a closed LaTeX expression by recursive descent, without any library; None for anything else."""
    text = re.sub(
        r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,; %$]|[$]|\^\s*\{?\\circ\}?", "", text
    )
    text = re.sub(
        r"\\[td]frac",
        r"\\frac",
        re.sub(r"\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\d)?\s*$|\.\s*$", "", text),
    )
    text = re.sub(r"^\s*[a-z]\s*=", "", text).strip()
    text = (
        text if "(" in text else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    )  # (4,112) is a pair
    tokens, place = [], 0
    while place < len(text):
        match = None if "," in text else TOKEN.match(text, place)
        if match is None:
            return None
        tokens, place = [*tokens, match[1]], match.end()
    try:
        value = _sum(tokens)
    except (ValueError, IndexError, ZeroDivisionError, OverflowError, RecursionError, TypeError):
        return None
    return (
        value if not tokens and isinstance(value, (int, float)) and math.isfinite(value) else None
    )


def _sum(tokens: list[str]) -> float:
    value = _product(tokens)
    while tokens and tokens[0] in "+-":
        value += _product(tokens) if tokens.pop(0) == "+" else -_product(tokens)
    return value


def _product(tokens: list[str]) -> float:
    if tokens[0] in ("+", "-"):
        return (1 if tokens.pop(0) == "+" else -1) * _product(tokens)
    whole = tokens[0].isdecimal() and tokens[1:2] == ["\\frac"]  # a mixed number
    value = _power(tokens) + (_power(tokens) if whole else 0)
    while tokens and tokens[0] not in ("+", "-", ")", "}", "]"):
        if tokens[0] == "/":
            tokens.pop(0)
            value /= _power(tokens)
        else:
            if tokens[0] in ("*", "\\cdot", "\\times"):
                tokens.pop(0)
            value *= _power(tokens)
    return value


def _power(tokens: list[str]) -> float:
    value = _atom(tokens)
    if tokens and tokens[0] == "^":
        tokens.pop(0)
        exponent = _atom(tokens)
        if abs(exponent) > 300:
            raise ValueError
        value = value**exponent
    return value


def _atom(tokens: list[str], digit: bool = False) -> float:
    token = tokens.pop(0)
    if token in ("(", "{"):
        value = _sum(tokens)
        if tokens.pop(0) != {"(": ")", "{": "}"}[token]:
            raise ValueError
        return value
    if token == "\\frac":
        return _argument(tokens) / _argument(tokens)
    if token == "\\sqrt":
        root = 2.0
        if tokens[0] == "[":
            tokens.pop(0)
            root = _sum(tokens)
            tokens.pop(0)
        return _argument(tokens) ** (1 / root)
    return math.pi if token == "\\pi" else float(token)


def _argument(tokens: list[str]) -> float:
    """What follows \\frac or \\sqrt: braces, or one digit."""
    if tokens[0][:1].isdigit() and len(tokens[0]) > 1:
        tokens[:1] = [tokens[0][0], tokens[0][1:]]
    return _atom(tokens)


def expression(rng: random.Random, depth: int) -> tuple[str, str]:
    """A random closed expression twice: as briefly as LaTeX allows (3(4), \\frac12), and with all signs and brackets."""
    kind = (
        rng.choice(("sum", "product", "fraction", "root", "power", "number")) if depth else "number"
    )
    if kind == "number":
        leaf = rng.choice(("2", "3", "7", "12", "90", "0.5", "\\pi"))
        return leaf, leaf
    (brief, full), (brief2, full2) = expression(rng, depth - 1), expression(rng, depth - 1)
    if kind == "sum":
        sign = rng.choice("+-")
        return (
            f"{brief}{sign}{brief2 if sign == '+' else f'({brief2})'}",
            f"(({full}){sign}({full2}))",
        )
    if kind == "product":
        first = brief if re.fullmatch(r"[\d.]+|\\pi", brief) else f"({brief})"
        return f"{first}({brief2})", f"(({full})\\cdot({full2}))"
    if kind == "fraction":
        short = len(brief) == len(brief2) == 1
        return (
            f"\\frac{brief}{brief2}" if short else f"\\frac{{{brief}}}{{{brief2}}}",
            f"\\frac{{{full}}}{{{full2}}}",
        )
    number = rng.choice("2357")
    return (
        (f"\\sqrt{number}", f"\\sqrt{{{number}}}")
        if kind == "root"
        else (f"({brief})^2", f"(({full})\\cdot({full}))")
    )


def same_text(one: str, two: str) -> bool:
    """Equality of LaTeX as text, in the manner of the first graders of MATH."""

    def strip(text):
        text = re.sub(
            r"\\(left|right|!|,|;|displaystyle| )|\^\\circ|\^\{\\circ\}|\\?%|\\?\$|\s", "", text
        )
        return re.sub(r"\\[td]frac", r"\\frac", text).rstrip(".")

    return strip(one) == strip(two)


def neighbour(gold: str) -> str:
    """A wrong answer that looks like the gold one: its last digit (no unit's) changed, else one more term."""
    masked = re.sub(r"\\(?:text|mbox)\s*\{[^}]*\}(?:\^\d)?", lambda unit: " " * len(unit[0]), gold)
    digits = [place for place, character in enumerate(masked) if character.isdigit()]
    if not digits:
        return gold + "+1"
    return gold[: digits[-1]] + str((int(gold[digits[-1]]) + 1) % 10) + gold[digits[-1] + 1 :]


def math_golds(folder: Path) -> list[str]:
    """The different gold answers of all MATH files in the folder."""
    golds: dict[str, None] = {}
    for path in sorted((folder / "math").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            golds[row["answer"] if "answer" in row else math_task.last_boxed(row["solution"])] = (
                None
            )
    return [gold for gold in golds if gold]


def check_latex(golds: list[str], count: int, rng: random.Random, examples: dict) -> list[dict]:
    """The rows of MATH: layout, values, wrong neighbours, evasions, and pairs of gold answers against `other_latex`."""
    task, tally = tasks.get("math"), Tally("math", WHY_LATEX, examples)
    slow = min(int(BY_VALUE[0] * count), BY_VALUE[1])
    valued = [gold for gold in golds if other_latex(gold) is not None]

    def add(kind, form, completion, gold, expected):
        read = task.extract(completion)
        tally.add(
            kind,
            form,
            f"{completion}  (gold {gold})",
            task.is_correct(read, gold) == expected,
            None,
        )

    for index in range(count - 4 * slow):
        gold, form = golds[index % len(golds)], rng.choice([*LATEX_FORMS])
        spelling = rng.choice([*LATEX_SPELLINGS])
        add(
            "right",
            f"{form}, {spelling}",
            LATEX_FORMS[form].format(LATEX_SPELLINGS[spelling](gold)),
            gold,
            True,
        )
    for index in range(slow):
        gold, form = valued[index % len(valued)], rng.choice([*UNFINISHED_FORMS])
        bare = DRESSING.sub("", gold)
        add(
            "unfinished",
            form,
            f"Final answer: ${UNFINISHED_FORMS[form].format(bare.strip().rstrip('.'))}$",
            gold,
            False,
        )
        gold = golds[index % len(golds)]
        wrong = neighbour(gold)
        if not same_text(wrong, gold) and math_task.canonical(wrong) != math_task.canonical(gold):
            add("wrong", "neighbour", f"Final answer: ${wrong}$", gold, False)
        gold, form = golds[index % len(golds)], rng.choice([*LATEX_EVASIVE])
        if (
            re.search(r"(?:^|=)\s*0$", gold) or "text" in gold or "_" in gold
        ):  # 0 million is 0, also in "x = 0"
            form = "or"
        if form == "turned" and other_latex(gold) == -0.5:  # turned, it is itself
            form = "or"
        add("evasive", form, LATEX_EVASIVE[form].format(gold, neighbour(gold)), gold, False)
        one, two = rng.choice(golds), rng.choice(golds)
        if index % 3 == 0:  # golds of about the same length and start, as few others are near
            two = min(
                rng.sample(golds, 30),
                key=lambda text: (abs(len(text) - len(one)), text[:2] != one[:2]),
            )
        elif index % 3 == 1:
            two, one = expression(rng, 3)
            one = neighbour(one) if rng.random() < 0.5 else one
        ours = task.is_correct(task.extract(f"Final answer: ${two}$"), one)
        first, second = other_latex(one), other_latex(two)
        if first is None or second is None:
            theirs, form = (
                same_text(one, two),
                "a word" if re.fullmatch(r"[\\a-zA-Z{}() ]+", one) else "equal by value",
            )
        else:
            theirs, form = (
                abs(first - second) <= 1e-12 * abs(first),
                "decimals" if "." in one + two else "values" if ours else "not worked out",
            )
        tally.add("pair", form, f"{one}  and  {two}", None, ours == theirs)
        tally.compare(
            form,
            f"{one}  and  {two}",
            ours == same_text(one, two),
            "compares text: equal values, written otherwise" if ours else None,
        )
    return tally.rows()


# --- hostile text --------------------------------------------------------------------------------------------------

HOSTILE = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "2^{99999}",
    "(9^{9999})^{9999}",
    "x^{9999}-(x+1)^{9999}",
    "(x+y+z+w+1)^{99}",
    "99999!",
    "((9!)!)!",
    "1e999999999",
    "1e-999999999",
    "10^{10^{10}}",
    "9" * 5000,
    "0." + "0" * 5000 + "1",
    "1/" + "0" * 500,
    "1/0",
    r"\frac{1}{0}",
    r"\sum_{n=1}^{\infty} 1/n",
    r"\int_0^1 x^{x^x} dx",
    r"\prod_{k=1}^{99999} k",
    r"\binom{99999}{5000}",
    r"\gamma(99999999)",
    r"\log(0)",
    r"\sqrt{" * 7 + "x" + "}" * 7,
    r"\frac{" * 50,
    "{" * 200,
    "(" * 100 + "1" + ")" * 100,
    "[" * 5000,
    "\\" * 250,
    "$" * 400,
    "\\left(" * 60,
    r"\begin{pmatrix}" * 20,
    r"\tan \theta = 99\theta",
    "x^{17}+x^{13}+5=0",
    r"\sin(\cos(\tan(99999)))",
    "\x00",
    "\x001\x00",
    "1\x002",
    "\x1b[31m12",
    "\u202e21",
    "１２\u0338",
    "Ａ",
    "А",
    "𝟏𝟐\u200d",
    "①②",
    "一十二",
    "🙂",
    "1\ufe0f\u20e32\ufe0f\u20e3",
    "__import__('os').system('true')",
    "exit('12')",
    "<|im_end|>",
    "{{12}}",
    "%s%n",
    "Final answer:" * 50,
    "\n" * 500,
    " " * 5000,
]
UNITS = [
    "1",
    "1,",
    "1.",
    "1 ",
    "- ",
    "-",
    "1 / ",
    "1 = ",
    "x = 1, ",
    "one and ",
    "not the ",
    "half of ",
    "½",
    "²",
    "\\frac{1}{",
    "\\boxed{",
    "(A) ",
    "A, ",
    "B or ",
    "$",
    "**",
    "and ",
    "\\text{",
    "^{",
    "\\,",
    "{,}",
    "=",
    "\u2009",
    "is ",
    "minus ",
    "Final answer: ",
    "Final answer ",
    "\\left(",
    "a",
    "\t1",
    "…",
    "٣",
    "٫",
]
PIECES = [
    "1",
    "23",
    ",",
    ".",
    "-",
    "−",
    " ",
    "\\",
    "{",
    "}",
    "$",
    "frac",
    "\\frac",
    "\\sqrt",
    "^",
    "_",
    "=",
    "(",
    ")",
    "A",
    "b",
    "or",
    "not",
    "½",
    "²",
    "٤",
    "一",
    "\u0338",
    "\u202e",
    "\x00",
    "\n",
    "Final answer:",
    "\\boxed{",
    "text",
    "🙂",
    "%",
    "/",
    "e",
    "x",
]


def check_hostile(count: int, rng: random.Random) -> list[dict]:
    """No text makes a grader raise, hang or say "right": each has its limit in seconds of this and of MATH's process."""
    golds = {"gsm8k": "8713", "arc_challenge": "B", "math": r"\frac{\sqrt{8713}}{2}+x"}
    row, found = {"choices": ["red", "blue"]}, []
    texts = {
        "by hand": HOSTILE,
        "100,000 characters": [unit * (100_000 // len(unit)) for unit in UNITS],
        "random pieces": [
            "".join(rng.choices(PIECES, k=rng.randint(1, 60))) for _ in range(count // 20)
        ],
    }
    for name, gold in golds.items():
        task = tasks.get(name)
        for kind, of_kind in texts.items():
            held, slowest, longest = 0, 0.0, 0.0
            for text in of_kind:
                started, processor = time.perf_counter(), time.process_time()
                try:
                    right = any(
                        [
                            task.is_correct(task.extract(before + text, row), gold)
                            for before in ("Final answer: ", "")
                        ]
                    )
                    right = task.is_correct(text, gold) or right
                except Exception as error:
                    print(f"{name}: {text[:80]!r} raises {error!r}")
                    continue
                seconds, processor = time.perf_counter() - started, time.process_time() - processor
                slowest, longest = max(slowest, processor), max(longest, seconds)
                in_time = processor < LIMIT and (
                    name != "math" or seconds < 3 * verifier.PATIENCE * verifier.TIME_LIMIT
                )
                held += in_time and (
                    not right or name == "arc_challenge" and ("B" in text.upper() or "blue" in text)
                )
            note = f"not right, no exception, {1000 * slowest:.0f} ms of processor time at most"
            if name == "math":
                note += f", the library's process apart; with it {longest:.1f} s by the clock for three comparisons"
            found.append(
                {
                    "test": f"{name}: hostile text, {kind}",
                    "tried": len(of_kind),
                    "held": held,
                    "note": note,
                }
            )
    return found


# --- the table -----------------------------------------------------------------------------------------------------


class Tally:
    """Counts for one task: as expected or not by kind, and disagreements with the second reader by form."""

    LABELS = {
        "right": "right answers",
        "unfinished": "answers with an operation left to do",
        "wrong": "wrong answers",
        "evasive": "evasive, denied and unfinished answers",
    }

    def __init__(self, task: str, why: dict[str, str], examples: dict) -> None:
        self.task, self.why, self.examples = task, why, examples.setdefault(task, defaultdict(list))
        self.tried, self.held, self.failed = Counter(), Counter(), defaultdict(Counter)
        self.compared, self.differ, self.both = 0, Counter(), 0
        self.by_rule, self.reasons = 0, Counter()

    def add(self, kind: str, form: str, shown: str, held: bool | None, agrees: bool | None) -> None:
        """One answer: whether it was graded as expected, and whether the second reader agrees (None: not asked)."""
        if held is not None:
            self.tried[kind] += 1
            self.held[kind] += held
            if not held:
                self.failed[kind][form] += 1
                self._keep(f"not as expected: {kind}, {form}", shown)
        if agrees is not None:
            self.compared += 1
            if not agrees:
                self.differ[form] += 1
                self.both += held is False
                self._keep(f"second reader differs: {form}", shown)

    def compare(self, form: str, shown: str, agrees: bool, why: str | None) -> None:
        """Whether the short rule agrees, and if not, why."""
        self.by_rule += 1
        if not agrees:
            self.reasons[why or f"NOT EXPLAINED: {form}"] += 1
            self._keep(f"short rule differs: {why or 'NOT EXPLAINED'}", shown)

    def _keep(self, name: str, shown: str) -> None:
        if len(self.examples[name]) < 20:
            self.examples[name].append(shown)

    def rows(self) -> list[dict]:
        """One row for each kind of answer, and one for the comparison with the second reader."""
        rows = []
        for kind, label in self.LABELS.items():
            if self.tried[kind]:
                note = "; ".join(
                    f"NOT EXPLAINED: {form} ({count})"
                    for form, count in self.failed[kind].most_common()
                )
                rows.append(
                    {
                        "test": f"{self.task}: {label}",
                        "tried": self.tried[kind],
                        "held": self.held[kind],
                        "note": note,
                    }
                )
        differ = self.differ.most_common()
        note = "; ".join(
            f"{form} ({count}): {self.why.get(form, 'NOT EXPLAINED')}" for form, count in differ
        )
        if (
            note and self.task != "math"
        ):  # for pairs of MATH's answers the correct grade is not known
            note = f"Where they differ, ours is not as expected in {self.both}. {note}"
        held = self.compared - sum(count for form, count in differ if form not in self.why)
        rule = "; ".join(
            f"{'' if 'NOT' in why else 'it '}{why} ({count})"
            for why, count in self.reasons.most_common()
        )
        explained = self.by_rule - sum(
            count for why, count in self.reasons.items() if "NOT EXPLAINED" in why
        )
        return [
            *rows,
            {
                "test": f"{self.task}: against a second reader",
                "tried": self.compared,
                "held": held,
                "note": note,
            },
            {
                "test": f"{self.task}: against the short rule of many harnesses",
                "tried": self.by_rule,
                "held": explained,
                "note": f"Where they differ: {rule}" if rule else "",
            },
        ]


def completion_of(text: str) -> str:
    """A case is a whole completion if it has the marker, otherwise the text after it."""
    has_marker = re.search(r"final\s+answer", text, re.IGNORECASE)
    return text if has_marker else f"Some working: 3 + 4 = 7.\nFinal answer: {text}"


def check_kinds(path: Path, examples: dict) -> list[dict]:
    """One row for each kind of labelled answers: false positives and false negatives."""
    counts = defaultdict(Counter)
    for case in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        row = {"answer": case["gold"], "choices": case.get("choices"), "finished": True}
        row["question"] = case.get("question", "")
        for verdict in ("correct", "incorrect", "unread"):
            for text in case.get(verdict, []):
                row["completion"] = completion_of(text)
                correct = grading.grade_one(row, tasks.get(case["task"]))["correct"]
                found = (verdict == "correct", correct)
                counts[case["kind"]][found] += 1
                if found[0] != found[1]:
                    examples.setdefault(case["kind"], []).append(f"{text}  (gold {case['gold']})")
    rows = []
    for kind, count in counts.items():
        false_positives, false_negatives = count[False, True], count[True, False]
        wrong, right = count[False, False] + false_positives, count[True, True] + false_negatives
        note = f"false positives {false_positives} of {wrong}, false negatives {false_negatives} of {right}"
        held = wrong + right - false_positives - false_negatives
        rows.append({"test": f"kind: {kind}", "tried": wrong + right, "held": held, "note": note})
    return rows


def check_cases(path: Path) -> list[dict]:
    """Completions judged by a fair marker: false positives and negatives per task, kind and `sure`."""
    counts = defaultdict(Counter)
    for case in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        row = {**case, "answer": case["gold"], "finished": True}
        graded = grading.grade_one(row, tasks.get(case["task"]))["correct"]
        kind = re.sub(
            r"^[A-Z]\d+ ", "", case["kind"]
        )  # a kind may begin with a number, as "G2 ..."
        for name in ("all", kind):
            count = counts[case["task"], name, case["sure"]]
            count["n"] += 1
            count["false_positives"] += graded and not case["correct"]
            count["false_negatives"] += case["correct"] and not graded
    keys = sorted(counts, key=lambda key: (key[0], key[1] != "all", key[1], not key[2]))
    return [
        {name: counts[key][name] for name in CASE_COLUMNS}
        | dict(zip(("task", "kind", "sure"), key))
        for key in keys
    ]


def check(folder: Path, count: int, seed: int) -> tuple[list[dict], dict]:
    """(rows of the table, examples of what was not as expected or not agreed on)."""
    rng, examples = random.Random(seed), {}
    rows = check_kinds(CASES, examples.setdefault("kinds", {}))
    for name in ("word_problems", "gsm8k", "svamp"):
        data = None if name == "word_problems" else str(folder)  # those come with the repository
        answers = [
            raw
            for split in ("train", "validation", "test")
            for raw in tasks.get(name).load(split, data)["answer"]
        ]
        rows += check_numbers(
            name, [Fraction(answer) for answer in dict.fromkeys(answers)], count, rng, examples
        )
    rows += check_nearest(count, random.Random(seed), examples)
    rows += check_letters(count, rng, examples)
    rows += check_latex(math_golds(folder), count, rng, examples)
    return rows + check_hostile(count, rng), examples


def write(out: Path, name: str, columns: tuple[str, ...], rows: list[dict], record: dict) -> None:
    """A table as `name`.csv, and next to it `name`.json: how it was made."""
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    libraries = ("math-verify", "latex2sympy2_extended", "sympy")
    record = {
        "environment": environment(),
        "graders": {name: version(name) for name in libraries},
        **record,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (out / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=4_000, help="answers per task (default: 4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=Path, help="grade the labelled completions of this file")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    quiet_libraries()
    if options.cases:
        rows = check_cases(options.cases)
        write(options.out, "grading_cases", CASE_COLUMNS, rows, {})
        for row in (row for row in rows if row["kind"] == "all"):
            print(*(f"{name} {row[name]}" for name in CASE_COLUMNS), sep=", ")
        return
    folder = files.local_path("", None)
    if folder is None:
        raise SystemExit(
            "error: set IRPO_DATA to the folder with gsm8k/, svamp/, arc_challenge/ and math/."
        )
    started = time.perf_counter()
    rows, examples = check(folder, options.count, options.seed)
    record = {
        "seed": options.seed,
        "count": options.count,
        "seconds": round(time.perf_counter() - started),
        "examples": examples,
    }
    write(options.out, "grading", COLUMNS, rows, record)
    for row in rows:
        print(f"{row['held']:>7} of {row['tried']:>7}  {row['test']}")
    if any(row["held"] != row["tried"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
