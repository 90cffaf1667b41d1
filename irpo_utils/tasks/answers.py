r"""Where a completion states its answer, and its formatting.

`read` finds the last "Final answer:", takes the block behind it and removes the wrapping: "24" is
left of "**Final answer**: $\boxed{24}$". Every task starts from here.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import Path

MAX_LENGTH = 1000  # characters of a block; a longer one is no answer
FENCE = re.compile(r"```\w*[ \t]*(?:\n|$)|```")
# What may span lines: as long as something is open, the next line belongs to the answer.
BEGIN = re.compile(r"\{|(?<!\\)\\[\[(]|\\begin\b|<[a-z]+>")
END = re.compile(r"\}|(?<!\\)\\[\])]|\\end\b|</[a-z]+>")
# x², x₁, 2½ and full-width characters
COMPOSED = {"[⁰¹²³⁴-⁹⁺⁻]+": "^{%s}", "[₀-₉]+": "_{%s}", "[¼-¾⅐-⅞]": " %s ", "[！-～]+": "%s"}


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


def replace(patterns: list, text: str, rounds: int = 1) -> str:
    """The text after the replacements one after the other, `rounds` times or until none is left."""
    for _ in range(rounds):
        before = text
        for pattern, new in patterns:
            text = pattern.sub(new, text).strip()
        if text == before:
            break
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
    rest = replace(PATTERNS["lead"], parts[-1][: 2 * MAX_LENGTH])
    lines = rest.split("\n")
    for end in range(1, len(lines) + 1):
        block = "\n".join(lines[:end])
        if not _is_open(block):
            break
    else:  # it is never closed
        block = lines[0]
    block = FENCE.sub("", block).strip()
    return block if 0 < len(block) <= MAX_LENGTH else None


def _is_open(block: str) -> bool:
    """Whether a display, a code fence, a brace or an environment begins in `block` only."""
    if block.strip() == "$" or block.count("$$") % 2 or block.count("```") % 2:
        return True
    return len(BEGIN.findall(block)) > len(END.findall(block))


def read(completion: str) -> str | None:
    """The final answer of a completion without its wrapping, or None where there is none."""
    return unwrap(after_final_answer(completion) or "") or None


@functools.lru_cache(maxsize=10_000)  # a gold answer is compared with many completions
def unwrap(text: str, phrases: bool = True) -> str:
    r"""`text` without boxes, delimiters, markup, quotes, and (if `phrases`) "The answer is".

    >>> unwrap(r"**The answer is $\boxed{\frac12}$.**"), unwrap("“B”"), unwrap("5, since 2+3=5")
    ('\\frac12', 'B', '5')
    """
    names = ("style", "markup", "phrase") if phrases else ("style", "markup")
    rules = [rule for name in names for rule in PATTERNS[name]]
    return replace(rules, symbols(text), rounds=4)  # a wrapping may be inside another


def symbols(text: str) -> str:
    """The text with ASCII digits, signs and blanks, x² as x^{2}, and no invisible characters."""
    if text.isascii() and text.isprintable():
        return text
    for characters, form in COMPOSED.items():
        text = re.sub(characters, lambda match, form=form: form % _normalised(match[0]), text)
    text = re.sub(r"[^\D0-9]", lambda digit: str(int(digit[0])), text)  # digits of any script
    return replace(PATTERNS["sign"], text)


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("⁄", "/")
