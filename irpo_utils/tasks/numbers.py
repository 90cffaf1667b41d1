r"""Reading numbers as models write them, shared by the tasks whose answer is a number.

The rule is strict, because a reward for a wrong answer teaches it: the line after the last "Final answer:" must hold
one number, perhaps with words, a unit or a currency around it. Two different numbers ("12 or 13", "2 hours 30
minutes"), a sum that was not worked out ("5 * x") or a number that is not understood ("1,23", "5^2") are no answer.
Of an equation ("5 * 3 = 15 eggs") the part after the last "=" counts. A percent sign is a unit: "20%" is 20.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from irpo_utils.tasks.base import Task, after_final_answer

MAX_LINE, MAX_EXPONENT = 1000, 100      # characters, powers of ten: what is longer or larger is no answer
MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
CHARACTERS = str.maketrans({**dict.fromkeys("−–—﹣－", "-"), **dict.fromkeys("×·∙⋅", "*"), **dict.fromkeys("⁄÷", "/"),
                            **dict.fromkeys("$€£¥₹%\u00a0", " "),                # currencies, percent, no-break space
                            **dict.fromkeys("\u2009\u202f\u2060\u200b", None)})  # thin and zero-width spaces
LATEX = (
    (r"\\[,;:!]|\{,\}(?=\d)", lambda match: "," if "{" in match[0] else ""),    # 1\,234  1{,}234
    (r"\\([%$#&_])", " "),
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),                                       # 2\frac{1}{2} is two and a half
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))",
     lambda match: f"{match[1] or match[3]}/{match[2] or match[4]}"),
    (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
    (r"\\(?:boxed|fbox|mbox|text[a-z]*|math[a-z]*|left|right|displaystyle|approx|quad|\(|\)|\[|\]|\\)", " "),
    (r"[{}`#]|\*\*|__|\\ |<[|/]?\w{1,20}[|/]?>", " "),                          # and tags: </s>, <b>
)
UNIT_POWER = re.compile(r"(?<=[a-zA-Z])(?<![\d.][eE])\s?\^?\s?[23](?![\d.,])")  # m^2, cm3, but not 1e3
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?![.,]?\d)"
NUMBER = re.compile(
    rf"(?P<sign>^\s*[-+]\s*|(?<![^\s(\[:=~≈])[-+])?(?<![\w^])(?<!\d[.,])"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{_PLAIN})(?:\s*/\s*(?P<bottom>{_PLAIN}))?"
    rf"(?:(?:[eE]|\s*[x*]\s*10\s*\^\s*)(?P<exponent>[-+]?\s*\d+))?(?:\s*(?P<magnitude>{'|'.join(MAGNITUDES)})\b)?",
    re.ASCII | re.IGNORECASE)
# What must not stand in what is left when the numbers are taken out (each number leaves a \0): digits that were not
# understood, operators beside a number, roots and other symbols, "and a half", "5k".
LEFTOVER = re.compile(r"\d|[-+*/^<>≤≥±√:]\s*\0|\0\s*(?:[+*^<>≤≥±√]|/\s*(?![a-z])|x\s*\0|k\b)|[√π∞\\]"
                      r"|\band\s+(?:an?\s+|one\s+)?(?:half|third|quarter)", re.ASCII | re.IGNORECASE)
UNICODE_POWER = re.compile("[⁰¹²³⁴-⁹⁻]+")


def _clean(text: str) -> str:
    """ASCII digits and signs, no LaTeX or Markdown around them."""
    text = UNICODE_POWER.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[½⅓⅔¼-¾⅕-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    digits = (str(unicodedata.decimal(c, c)) for c in text if c >= " ")
    text = "".join(digits).translate(CHARACTERS)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    return UNIT_POWER.sub("", text).strip(" *_")


def _value(match: re.Match) -> Fraction | None:
    top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    exponent = int(re.sub(r"\s", "", match["exponent"] or "0"))
    if bottom == 0 or abs(exponent) > MAX_EXPONENT:
        return None
    value = (Fraction(match["whole"] or 0) + top / bottom) * Fraction(10) ** exponent
    value *= MAGNITUDES.get((match["magnitude"] or "").lower(), 1)
    return -value if "-" in (match["sign"] or "") else value


def parse(text: str) -> Fraction | None:
    """The one number that `text` states, exactly, or None (see the rule above). Never raises, linear in the text.

    >>> parse("**$1,080.50** in all"), parse("12 or 13"), parse("3 + 4 = 7 eggs.")
    (Fraction(2161, 2), None, Fraction(7, 1))
    """
    if len(text) > MAX_LINE:
        return None
    text = _clean(text).rsplit("=", 1)[-1]
    values = {_value(match) for match in NUMBER.finditer(text)}
    if len(values) != 1 or LEFTOVER.search(NUMBER.sub("\0", text)):
        return None
    return values.pop()


def show(value: Fraction) -> str:
    """One spelling for each number, so that equal answers vote together: "1080.5", "-7", or "1/3" if it never ends."""
    bottom, places = value.denominator, 0
    while bottom % 10 == 0 or bottom % 5 == 0 or bottom % 2 == 0:
        bottom, places = bottom // (10 if bottom % 10 == 0 else 5 if bottom % 5 == 0 else 2), places + 1
    if bottom > 1 or not places:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def unbold(completion: str) -> str:
    """The completion with "**Final Answer**:" as "Final Answer:"."""
    return re.sub(r"(final answer)\s*\*\*\s*:", r"\1:", completion, flags=re.IGNORECASE)


def final_line(completion: str) -> str | None:
    """The line after the last "Final answer:", also where just these words are bold."""
    return after_final_answer(unbold(completion))


class NumberTask(Task):
    """A task whose answers are numbers; its gold answers may have commas or GSM8K's "#### " before them."""

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The number on the line after the last "Final answer:" in one fixed spelling, or None."""
        line = final_line(completion)
        value = None if line is None else parse(line)
        return None if value is None else show(value)

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """Equal as exact numbers: "0.50" is "1/2", "0.33" is not "1/3"."""
        value = None if extracted is None else parse(extracted)
        return value is not None and value == parse(answer.rsplit("####", 1)[-1])
