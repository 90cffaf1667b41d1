r"""Reading numbers as models write them, shared by the tasks whose answer is a number.

The rule is strict, because rewarding an incorrect answer teaches it. The answer must contain
exactly one number in digits. Words, a unit or a currency may surround it. `parse` returns None for
two different numbers ("12 or 13"), a calculation that is not carried out ("5 * x", "half of 36"), a
number that is denied or a bound ("not 36", "36 or more"), a number in words, and one that words
change ("36 dollars and fifty cents"). "About 36" is 36, "20%" is 20, "5 * 3 = 15 eggs" is 15.
"""

import re
import unicodedata
from fractions import Fraction

from irpo_utils.tasks import answers
from irpo_utils.tasks.base import Task

MAX_DIGITS = MAX_EXPONENT = 100
MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # of ten
PATTERNS = answers.read_patterns("numbers")
NUMBER = PATTERNS["number"][0][0]  # groups: sign, whole, top, bottom, exponent, magnitude


def parse(text: str) -> Fraction | None:
    """The one number that `text` states, exactly, or None (see above). Never raises; is fast."""
    if len(text) > answers.MAX_LENGTH:
        return None
    text = answers.replace(PATTERNS["latex"], answers.unwrap(text))
    text = _right_side(answers.replace(PATTERNS["minus"], text))
    if text is None or any(map(_unknown, text)):
        return None
    values = {_value(match) for match in NUMBER.finditer(text)}
    around = NUMBER.sub("#", text.replace("#", " "))
    if len(values) != 1 or answers.found(PATTERNS["signs"], around) or doubtful(around):
        return None
    return values.pop()


def doubtful(text: str) -> bool:
    """Whether the words around a number (#) deny it, bound it, or make another number of it."""
    return denied(text) or any(answers.found(PATTERNS[name], text) for name in ("bound", "changed"))


def denied(text: str) -> bool:
    """Whether the words around a number (#) say that it is not the answer."""
    return answers.found(PATTERNS["denied"], text)


def _unknown(character: str) -> bool:
    """Whether a character may change a number: a sign, a mark above a digit, a numeral like 万."""
    if character <= "~":
        return False
    numeral = character == "π" or unicodedata.numeric(character, None) is not None
    return numeral or unicodedata.category(character) in ("Mn", "Me", "Mc", "Sm", "Cf")


def _right_side(text: str) -> str | None:
    """What follows the last "="; None for "x >= 36", "not x = 36", and two answers in a line."""
    *before, last = text.split("=")
    for place, part in enumerate(before):
        *numbers, rest = re.split(r"\d", part)  # `rest` leads from the last number to the "="
        is_denied = denied(re.sub(r"\b[a-z]?\s*$", " #", part))
        if is_denied or re.search(r"[<>!+*/≤≥≠-]\s*$", part):
            return None
        another = answers.found(PATTERNS["second"], rest) if place else " or " in f"{rest} "
        if numbers and another:
            return None
    return last


def _value(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    exponent = int(re.sub(r"\s", "", match["exponent"] or "0"))
    if bottom == 0 or abs(exponent) > MAX_EXPONENT or (match["whole"] and top >= bottom):
        return None  # "1 5/2" is not understood
    value = (Fraction(match["whole"] or 0) + top / bottom) * Fraction(10) ** exponent
    value *= 10 ** MAGNITUDES.get((match["magnitude"] or "").lower(), 0)
    if len(show(value)) > MAX_DIGITS:  # an answer must be short enough to be read again
        return None
    return -value if "-" in (match["sign"] or "") else value


def show(value: Fraction) -> str:
    """One spelling per number, so that equal answers vote together: "1080.5", "-7", or "1/3"."""
    if value.denominator == 1 or 10**MAX_DIGITS % value.denominator:  # whole, or it never ends
        return str(value)
    places = next(n for n in range(1, MAX_DIGITS + 1) if 10**n % value.denominator == 0)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


class NumberTask(Task):
    """A task whose answers are numbers; gold answers may have commas, or "#### " before them."""

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The number after the last "Final answer:" in one fixed spelling, or None."""
        value = parse(answers.read(completion) or "")
        return None if value is None else show(value)

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """Equal as exact numbers: "0.50" is "1/2", "0.33" is not "1/3"."""
        value = parse(extracted or "")
        return value is not None and value == parse(answer.rsplit("####", 1)[-1])
