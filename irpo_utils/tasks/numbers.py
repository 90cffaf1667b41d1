r"""Reading numbers as models write them, shared by the tasks whose answer is a number.

The rule is strict, because a reward for a wrong answer teaches it: the line after the last "Final answer:" must hold
one number in digits, perhaps with words, a unit or a currency around it. No answer is

- two different numbers ("12 or 13", "2 hours 30 minutes", "x = 4, y = 5");
- a sum that was not worked out ("5 * x", "half of 36", "10^3") or a number that is not understood ("1,23", "1 234");
- a number that is denied or only a bound ("not 36", "more than 36", "36 or more"): what it is not says nothing of what
  it is. "About 36" does name 36, and counts;
- a number in words. "One", "half" or "a second" are too often no number, so words are not read, but where they change
  a number in digits ("36 dollars and fifty cents", "thirteen or 14") there is no answer either.

Of an equation ("5 * 3 = 15 eggs") the part after the last "=" counts. "Minus 5" and "negative 5" are -5. A percent
sign is a unit: "20%" is 20, and 0.2 is not.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from irpo_utils.tasks.base import Task, after_final_answer

MAX_LINE, MAX_DIGITS, MAX_EXPONENT = (
    1000,
    100,
    100,
)  # of a line, a number, a power of ten; more is no answer
MAGNITUDES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
COUNTS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    "(?:twen|thir|for|fif|six|seven|eigh|nine)ty|half|halves|third|quarter|dozen|"
    + "|".join(MAGNITUDES)
)
FULL_WIDTH = {0xFEE0 + ascii_code: chr(ascii_code) for ascii_code in range(0x21, 0x7F)}
CHARACTERS = str.maketrans(
    {
        **FULL_WIDTH,
        **dict.fromkeys("−–‐‑‒﹣－⁻➖", "-"),
        "―": "—",  # a long dash is no minus
        **dict.fromkeys("×·∙⋅", "*"),
        **dict.fromkeys("⁄÷∕", "/"),
        "٫": ".",
        "٬": ",",
        "’": "'",
        **dict.fromkeys("$€£¥₹₽₩%％＄￥٪", " "),
    }
)  # currencies and per cent are units
HARMLESS = "≈∼≃≅→⇒⟹∴"  # symbols that may stand beside an answer; others have an unknown meaning
STRANGE, MARK = "\x01", "\x02"  # what these and combining marks become
GROUPS = r"(?<=\d)(?<!\d{4})(?:[\u2009\u202f]|\\,)(?=\d{3}(?!\d))"  # thin spaces: 1\,234
LATEX = (
    (GROUPS + r"|\\!", ""),
    (r"\{,\}(?=\d)", ","),
    (r"\\[,;:%$#&_]|\^\s*\{?\s*\\circ\s*\}?", " "),  # 1{,}234  15,\!000
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),  # 2\frac{1}{2} is two and a half
    (
        r"\\[dtc]?frac\s*(?:\{\s*([^{}\s]*)\s*\}\s*\{\s*([^{}\s]*)\s*\}|(\d)\s*(\d))",
        lambda match: f"{match[1] or match[3]}/{match[2] or match[4]} ",
    ),
    (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
    (
        r"\\(?:boxed|fbox|mbox|text[a-z]*|math[a-z]*|underline|left|right|displaystyle|approx|quad|[()\[\]\\])",
        " ",
    ),
    (r"[{}`#]|\*\*|__|\\ |<[|/]?[a-zA-Z]\w{0,19}[|/]?>", " "),  # and tags: </s>, <b>
    (r"(?<![\w*])\*([^\s*][^*]*)\*(?![\w*])", r" \1 "),  # *36*
    (
        r"(?<![a-zA-Z])(m|[a-zA-Z]{2,})\s?\^\s?[23](?![\d.,])|\b(\d*\s?(?:[cdkm]?m|in|ft))[23]\b",
        r"\1\2",
    ),  # m^2, 12cm3
    (
        rf"\b(?!(?:or|and|to|is|are|by|of|at|than|times|{'|'.join(MAGNITUDES)})\d)([a-zA-Z]{{2,}})[23]\b",
        r"\1",
    ),
)  # mp3, CO2
_PLAIN = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?![.,]?\d)"  # "0,123" is no 123
)
NUMBER = re.compile(
    rf"(?P<sign>^\s*[-+]\s*|(?<![^\s(\[:=~≈])(?<!\b[b-z]\s)[-+])?(?<![\w^\u00c0-\u024f\u0370-\u052f])(?<!\d[.,])"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{_PLAIN})(?:\s*/\s*(?P<bottom>{_PLAIN}))?"
    rf"(?:(?:[eE]|\s*[x*]\s*10\s*\^\s*)(?P<exponent>[-+]?\s*\d+))?(?:\s*(?P<magnitude>{'|'.join(MAGNITUDES)})\b)?",
    re.ASCII | re.IGNORECASE,
)
# "Minus" is a sign where nothing is there to be subtracted from: at the start, or after these.
SIGN_WORDS = re.compile(
    r"\bnegative\s+(?=[\d.])|((?:^|[\"'(\[:=~≈,]|\b(?:is|are|was|be|of|at|to|equals?|answer|about|around|"
    r"approximately|exactly))\s*)\bminus\s+(?=[\d.])",
    re.ASCII | re.IGNORECASE,
)
_ON = (
    r"(?:\s+(?:be|been|equals?|is|are|have|has|to|of|the|an?|as|many|much|total|answer|number|exactly|quite|really|"
    r"just|only|even|about|around|approximately))*\s+\0"
)
DENIED = rf"(?:\b(?:not|never|cannot)|n't){_ON}|\b(?:minus|negative)\s+\0"
# What must not stand in what is left when the numbers are taken out (each number leaves a \0).
LEFTOVER = re.compile(
    "|".join(
        (
            rf"[\d\\π{STRANGE}]|\0{MARK}",  # digits, commands, symbols not understood
            r"[-+*/^<>—]\s*\0|\0\s*(?:[+*^<>]|/\s*(?![a-z])|/\s*[nxyz]\b|x\s*\0)",  # an operator beside a number
            r"\0[^a-z\0(]*\0|\0[^\sa-z\0]*\(\s*\0|\0\s*\)\s*\(",  # the same number twice, no word between: "3:3", "3 3"
        )
    ),
    re.ASCII | re.IGNORECASE,
)
# Words beside a number that make another one of it, or none; `math` looks for them beside a formula as well.
CHANGED = re.compile(
    "|".join(
        (
            rf"\0\s*(?:k\b|(?-i:[MB]\b)(?!&)|bn\b|mn\b|{'|'.join(MAGNITUDES)}|point\b|squared|cubed|factorial|halved|doubled|tripled)",
            r"\b(?:half|thirds?|quarters?|fifths?|tenths?|percent\s+of|double|twice|triple|root)(?:\s+(?:of|the|as|many|much))*\s+\0",
            r"\bplus\s+\0|\0\s*(?:minus|plus)\b|\0[^\0]*\b(?:below|under)\s+zero\b",
            rf"\b(?:{COUNTS})(?:\s+(?:and|or|to|times|point))*[\s-]+\0",  # "twelve or 13"
            rf"\0\s+to\s+(?:{COUNTS})\b|\0[^\0]*\b(?:and|or|times)\s+(?:an?\s+)?(?:{COUNTS})s?\b",  # "12 and a half"
            rf"\b(?:than|except|excluding|without|but|almost|nearly|over|under|above|below|beyond|least|most|up\s+to){_ON}",
            r"\0(?:\s+[a-z]+){,2}\s+(?:or|and)\s+(?:more|less|fewer|greater|higher|lower|older|younger|above|below|over|up)\b",
            rf"{DENIED}|~~\s*\0|\0[^\0]*\b(?:is|are|was)\s*(?:not|n't)\s+(?:the|it|my|our|what|right|correct|true)\b",
            r"\0[^\0]*\b(?:is|are|was|seems|looks)\s+(?:wrong|incorrect|false|impossible|too)\b",
        )
    ),
    re.ASCII | re.IGNORECASE,
)
# Between two equations: another answer ("x = 4, y = 5"), unless it is the next step ("2x = 10, so x = 5").
SECOND = r"(?:[,;]\s|\b(?:or|and)\b)(?!\s*(?:so|thus|therefore|hence|then|we|which|this|that|giving|or|and)\b)"
UNICODE_POWER = re.compile("[⁰¹²³⁴-⁹⁻]+")


def _character(c: str) -> str:
    """ASCII for digits and blanks of all scripts, nothing for what is invisible, `STRANGE` or `MARK` for the unknown."""
    if c.isspace() or c < " " or c == "\x7f":
        return c if c in "\u2009\u202f" else " "
    if c < "\x7f" or c in HARMLESS:
        return c
    category, digit = unicodedata.category(c), unicodedata.decimal(c, None)
    if digit is not None:
        return str(digit)
    if category[0] == "M":
        return MARK
    if (
        category == "Sm" or c in "\u202d\u202e" or unicodedata.numeric(c, None) is not None
    ):  # 5₂, ①, 5万; reversed
        return STRANGE
    return "" if category == "Cf" else c


def _clean(text: str) -> str:
    """ASCII digits and signs, no LaTeX or Markdown around them."""
    text = UNICODE_POWER.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: unicodedata.normalize("NFKC", match[0]) + " ", text)
    text = "".join(map(_character, text.translate(CHARACTERS)))
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    text = re.sub("[\u2009\u202f]", " ", text).strip(" *_")
    return SIGN_WORDS.sub(lambda match: f"{match[1] or ''}-", text)


def _right_side(text: str) -> str | None:
    """What follows the last "=" of an equation; None for "x >= 36", "not x = 36", and the two of "x = 4, y = 5"."""
    *before, last = text.split("=")
    for place, part in enumerate(before):
        *numbers, rest = re.split(r"\d", part)  # `rest` leads from the last number to the "="
        if re.search(rf"[<>!+*/{STRANGE}-]\s*$", part):
            return None
        if re.search(DENIED, re.sub(r"\b[a-z]?\s*$", " \0", part), re.IGNORECASE):
            return None
        if numbers and re.search(SECOND if place else r"\bor\b", rest, re.IGNORECASE):
            return None
    return last


def _value(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    exponent = int(re.sub(r"\s", "", match["exponent"] or "0"))
    if (
        bottom == 0 or abs(exponent) > MAX_EXPONENT or match["whole"] and top >= bottom
    ):  # "1 5/2" is not seen
        return None
    value = (Fraction(match["whole"] or 0) + top / bottom) * Fraction(10) ** exponent
    value *= MAGNITUDES.get((match["magnitude"] or "").lower(), 1)
    if (
        len(show(value)) > MAX_DIGITS
    ):  # what is read has to be short enough to be read again: 1e100 is not
        return None
    return -value if "-" in (match["sign"] or "") else value


def parse(text: str) -> Fraction | None:
    """The one number that `text` states, exactly, or None (see the rule above). Never raises, takes milliseconds.

    >>> parse("**$1,080.50** in all"), parse("12 or 13"), parse("3 + 4 = 7 eggs."), parse("not 7")
    (Fraction(2161, 2), None, Fraction(7, 1), None)
    """
    text = _right_side(_clean(text)) if len(text) <= MAX_LINE else None
    if text is None:
        return None
    values = {_value(match) for match in NUMBER.finditer(text)}
    rest = NUMBER.sub("\0", text)
    return (
        values.pop()
        if len(values) == 1 and not LEFTOVER.search(rest) and not CHANGED.search(rest)
        else None
    )


def show(value: Fraction) -> str:
    """One spelling for each number, so that equal answers vote together: "1080.5", "-7", or "1/3" if it never ends."""
    bottom, places = value.denominator, 0
    while bottom % 10 == 0 or bottom % 5 == 0 or bottom % 2 == 0:
        bottom, places = (
            bottom // (10 if bottom % 10 == 0 else 5 if bottom % 5 == 0 else 2),
            places + 1,
        )
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
