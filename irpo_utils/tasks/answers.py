r"""Where a completion states its answer, and what is only wrapped around it.

`read` finds the last "Final answer:", takes the block behind it and removes the wrapping: "24" is
left of "**Final answer**: $\boxed{24}$". Every task starts from here.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

MAX_LENGTH = 1000  # characters of a block; a longer one is no answer
FENCE = re.compile(r"```\w*[ \t]*(?:\n|$)|```")
# Pairs that may span lines: as long as one is open, the next line belongs to the answer.
OPENED = (("{", "}"), (r"(?<!\\)\\\[", r"(?<!\\)\\\]"), (r"\\begin\b", r"\\end\b"))
RAISED, LOWERED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+"), re.compile("[₀-₉]+")
FRACTION = re.compile("[¼-¾⅐-⅞]")


def read_patterns(name: str, flags=re.IGNORECASE | re.DOTALL) -> dict[str, list]:
    """The patterns of `name`.txt in this folder by name, as pairs (pattern, what replaces a match).

    A line is a name, a pattern, and perhaps => "replacement". <other> in a pattern is any of the
    patterns of the name `other` above it.
    """
    sources, patterns = {}, {}
    for line in Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("//"):
            continue
        key, rest = line.split(maxsplit=1)
        pattern, _, new = rest.partition(" => ")
        for other, source in sources.items():
            pattern = pattern.replace(f"<{other}>", f"(?:{source})")
        sources[key] = f"{sources[key]}|{pattern}" if key in sources else pattern
        patterns.setdefault(key, []).append((re.compile(pattern, flags), new[1:-1]))
    return patterns


def found(patterns: list, text: str) -> bool:
    """Whether any of the patterns of a name is in the text."""
    return any(pattern.search(text) for pattern, _ in patterns)


def replace(patterns: list, text: str) -> str:
    """The text after the replacements of a name, one after the other."""
    for pattern, new in patterns:
        text = pattern.sub(new, text).strip()
    return text


PATTERNS = read_patterns("answers")
MARKER = re.compile("|".join(pattern.pattern for pattern, _ in PATTERNS["marker"]), re.IGNORECASE)


def after_final_answer(completion: str) -> str | None:
    """What follows the last "Final answer:", on its line or in a display or code block; or None.

    >>> after_final_answer("Final answer: 3\\nNo, wait.\\nFinal answer: 4\\nI hope it helps.")
    '4'
    """
    parts = MARKER.split(completion)
    if len(parts) == 1:
        return None
    rest = re.sub(r"^[\s*_}]{0,99}(?:</\w{1,9}>|\n>)?\s*", "", parts[-1][: 2 * MAX_LENGTH])
    lines = rest.split("\n")
    block = lines[0]
    for line in lines[1:]:
        if not _is_open(block):
            break
        block += "\n" + line
    block = FENCE.sub("", lines[0] if _is_open(block) else block).strip()
    return block if 0 < len(block) <= MAX_LENGTH else None


def _is_open(block: str) -> bool:
    """Whether a display, a code fence, a brace or an environment begins in `block` only."""
    if block.strip() == "$" or block.count("$$") % 2 or block.count("```") % 2:
        return True
    counts = ((len(re.findall(sign, block)) for sign in pair) for pair in OPENED)
    return any(begun > ended for begun, ended in counts)


def read(completion: str) -> str | None:
    """The final answer of a completion without its wrapping, or None where there is none."""
    block = after_final_answer(completion)
    return (unwrap(block) or None) if block else None


def unwrap(text: str, phrases: bool = True) -> str:
    r"""`text` without boxes, delimiters, markup, quotes, and (if `phrases`) "The answer is".

    >>> unwrap(r"**The answer is $\boxed{\frac12}$.**"), unwrap("“B”"), unwrap("5, since 2+3=5")
    ('\\frac12', 'B', '5')
    """
    text = strip_commands(symbols(text), PATTERNS["style"])
    text = replace(PATTERNS["spacing"], text)
    for _ in range(4):  # a wrapping may be inside another
        before, text = text, replace(PATTERNS["markup"], text)
        text = replace(PATTERNS["phrase"], text) if phrases else text
        if text == before:
            break
    return text


def symbols(text: str) -> str:
    """The text with ASCII digits, signs and blanks, x² as x^{2}, and no invisible characters."""
    text = RAISED.sub(lambda match: f"^{{{_plain(match[0])}}}", text)
    text = LOWERED.sub(lambda match: f"_{{{_plain(match[0])}}}", text)
    text = FRACTION.sub(lambda match: f" {_plain(match[0])} ", text)
    return "".join(map(_ascii, replace(PATTERNS["sign"], text)))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("⁄", "/")


def _ascii(character: str) -> str:
    if " " < character <= "~":
        return character
    category = unicodedata.category(character)
    if category == "Nd":  # a digit of any script
        return str(unicodedata.decimal(character))
    if category in ("Sc", "Cc") or character.isspace():
        return "$" if category == "Sc" else " "
    if "！" <= character <= "～":  # full-width forms
        return unicodedata.normalize("NFKC", character)
    # Text that runs backwards is no answer: its marks stay, and the comparisons do not know them.
    return "" if category == "Cf" and character not in "\u202d\u202e" else character


def braces(text: str, place: int) -> int | None:
    """Where the brace that opens at `place` is closed, or None."""
    depth = 0
    for end in range(place, len(text)):
        if text[end] == "{":
            depth += 1
        elif text[end] == "}":
            depth -= 1
        if depth == 0:
            return end
    return None


def strip_commands(text: str, commands: list) -> str:
    r"""The text with \name{content} as content, for the commands that the patterns find."""
    for command, _ in commands:
        while match := command.search(text):
            end = braces(text, match.end())
            after = "" if end is None else text[end + 1 :]
            text = text[: match.start()] + text[match.end() + 1 : end] + after
    return text
