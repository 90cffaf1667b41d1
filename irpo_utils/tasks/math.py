r"""MATH: 12,500 competition problems with answers in LaTeX (Hendrycks et al. 2021, EleutherAI/hendrycks_math).

One raw row (files test.jsonl, train.jsonl or train_8k.jsonl, and math500.jsonl if there):

    {"problem": "How many vertical asymptotes does the graph of $y=\\frac{2}{x^2+x-6}$ have?", "level": "Level 3",
     "solution": "The denominator ... Therefore, the graph has $\\boxed{2}$ vertical asymptotes."}

(train_8k has `question` and `answer` instead, no solutions, and two rows with an empty answer, which are left out.)
Splits: `test` (5,000), `math500` (500 of them), and train less what is in either, 15 % of it for validation. Prompt of
the paper (appendix B.1) with four worked examples from train, in the column `examples` of every row; they are in no
split. The paper does not print its four, and train_8k has no solutions: questions and answers are taken from the data
at load time, the solutions are our own, so that the prompt is the same from every source.

A completion's answer is read from the line of the last "Final answer:", without one from the last \boxed. Equality is
that of the library math-verify with more care: the brackets of pairs and intervals count, and so do number bases. What
the library passes over (5' and 5 \mod 7 are 5 to it) is refused. It runs in a process of its own that is ended after
`TIME_LIMIT` seconds of its own processor time (not by the clock: a busy machine must not make a right answer wrong) or at
`MEMORY_LIMIT` bytes, whatever thread the caller is in. No text reaches an evaluator of code: only the LaTeX grammar is
used, not the library's `parse_expr`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from importlib.util import find_spec
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import numbers
from irpo_utils.tasks.base import FINAL_ANSWER, SPLITS
from irpo_utils.tasks.files import (
    FileTask,
    convert_rows,
    hold_out,
    load_hub,
    need,
    normalise,
    without,
)

TIME_LIMIT = 3.0  # seconds of processor time for one comparison
PATIENCE = 20  # times as long by the clock, for a child that is not given the processor
START_LIMIT = 120.0  # seconds by the clock for starting the process that makes the comparisons
SIGPROF = getattr(
    signal, "SIGPROF", None
)  # how the kernel ends a child whose processor time is used up
MEMORY_LIMIT = 2 << 30  # bytes
MAX_LENGTH, MAX_DEPTH = (
    300,
    8,
)  # characters and nested brackets of an answer that is compared at all
NUMBER = re.compile(
    r"(-?\s*(?:[\d,./\s]|\\frac(?=[\d\s{])|[{}])+)(?:(?:\\text)?\s*\{?\s*"
    rf"({'|'.join(numbers.MAGNITUDES)})\s*\}}?)?",
    re.ASCII,
)
TOO_COMPLEX = re.compile(
    r"\d{31}|\^\s*\{?\s*[-+]?\d{5}|[)}\]]\s*\^\s*\{?\s*-?\d{3}|\^\s*\{[^{}]*\^|\^\s*[^\s{]\s*\^"
    r"|\d{5}\s*!|[!)}]\s*!|\\binom\D*\d{4}|\\(?:sum|prod|i*nt|lim)(?![a-z])"
)
# What the library reads as if it were not there, and what looks like a number to it and like two to a reader.
NOT_UNDERSTOOD = re.compile(
    r"'|\\(?:approx|equiv|l?dots|mod|phantom|[hv]space)(?![a-zA-Z])|[^\x20-\x7e]|(?<!frac)\d \d"
    r"|\d\s*\\(?:math|text)[a-z]*\s*\{\s*\d|(?<![\\a-zA-Z])(?:is|are|not|than)(?![a-zA-Z])"
    r"|\\(?:text[a-z]*|mbox|mathrm)\s*\{[^{}]{3,}\}\s*\S"
    r"|(?<![\\a-zA-Z{])(?!sqrt|sinh|cosh|tanh)[a-zA-Z]{4,}"
)
# A product without a sign, which the library takes for a mixed number, 3(4) for 7, or for a function, \pi(2).
PRODUCT = re.compile(r"(?:(?<=\))|(?<=\\pi)|(?<=\d)(?<![\^_]\d))\s*(?=\()|(?<=\))\s*(?=\d|\\frac)")
FORMULA = re.compile(r"(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)")
OPERATOR = re.compile(
    r"(?:[-+*/^<≠√]|(?<![=-])>|\\(?:neq?|not|leq?|geq?|lt|gt|pm|mp|times|cdot|sqrt))\s*$"
)
WORD, BASE = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*"), re.compile(r"[\dA-Z})]_")
SYMBOLS = str.maketrans(
    {
        **numbers.FULL_WIDTH,
        **dict.fromkeys("−–‐‑﹣", "-"),
        **dict.fromkeys("·⋅∙", "\\cdot "),
        "×": "\\times ",
        "÷": "/",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "±": "\\pm ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "’": "'",
        "\u200b": None,
        "\u2060": None,
        "\ufeff": None,
    }
)
HEADER = (
    "Your task is to answer the last question below. Give step by step reasoning before you answer, and when "
    "you're ready to answer, please wrap your answer in \\boxed, and conclude using the format "
    '"Final answer: ..."\n\n'
)
# Our solutions of four problems of the training split, found by the start of the hash of the normalised question.
EXAMPLES = {
    "8221f0850c6ab33a": r"As $\frac{1}{25} = 5^{-2}$, the exponents must agree: $2n + 1 = -2$. So $2n = -3$ and "
    r"$n = \boxed{-\frac{3}{2}}$.",
    "1a8eaad33bd5066e": r"The arrangement is fixed by the places of the three X. There are $\binom{5}{3} = 10$ ways to "
    r"choose them, all equally likely, and one of them reads XOXOX. The probability is "
    r"$\boxed{\frac{1}{10}}$.",
    "28de1bcdc7f65d48": r"From $\frac{4}{3} \pi r^3 = 36 \pi$ we get $r^3 = 27$, so $r = 3$. The surface area is "
    r"$4 \pi r^2 = 4 \pi \cdot 9 = \boxed{36\pi}$.",
    "9ff63d501b016959": r"We have $x = \rho \sin \phi \cos \theta = 4 \cdot 1 \cdot \frac{1}{2} = 2$, "
    r"$y = \rho \sin \phi \sin \theta = 4 \cdot 1 \cdot \left( -\frac{\sqrt{3}}{2} \right) = "
    r"-2 \sqrt{3}$ and $z = \rho \cos \phi = 0$. The point is $\boxed{(2, -2 \sqrt{3}, 0)}$.",
}
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
# Words behind a number that are no unit: they change it, or take it back; i and e are numbers.
NO_UNIT = (
    r"(?!\s*[ie]\s*\}|[^{}]*\b(?:log|sin|cos|tan|sec|csc|cot|exp|sqrt|pi|times|plus|minus|over|squared|cubed|"
    r"factorial|choose|mod|modulo|hundred|thousand|[a-z]*illion|not|never|wrong|incorrect|false|more|less|fewer|"
    r"than|is|was|are)\b)"
)
TIDY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf",?\\!\s*|\{{,\}}|{numbers.GROUPS}", ""),  # 15,\!000  15{,}000  15\,000
        (
            r"(?<!\\)\\(?:(?:left|right|displaystyle|quad)(?![a-zA-Z])|[,;:()\[\]$% ])|[$%]|^\*+|\*+$|[.\s]+$",
            " ",
        ),
        (r"π|(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"∞|(?<![a-zA-Z\\])infinity\b", r"\\infty "),
        (r"(?:√|(?<![a-zA-Z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}"),
        (r"\*\*", "^"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\\(?!frac|sqrt)[a-zA-Z]+|\w)", r"\\frac{\1}"),  # \frac\pi 2
        (r"(\\frac\{[^{}]*\})\s*(\\(?!frac|sqrt)[a-zA-Z]+|\w)", r"\1{\2}"),
        (r"_\s*(?:\{\s*\(?(\d+)\)?\s*\}|(\d))", r"_{\1\2}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " "),
        (
            r"^(?!.*(?:\b(?:not|never|cannot)\b|n't\b))[^\\\d${}()\[\]]*\b(?:is|are|equals)\b:?",
            "",
        ),  # "The answer is"
        (r"^\s*(?:minus|negative)\b", "-"),
        (r"\\(?:text|mathrm)\s*\{\s*([ie])\s*\}", r" \1"),
        (r"^\s*[a-zA-Z]\s*(?:=|\\in\b)(?=[^=]+$)", ""),  # x = 5, x \in [1, 2]
        (r",?\s*(?:\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
        (
            rf"(?<=[^\s(,])\s*\\(?:text[a-z]*|mbox|mathrm)\s*\{{{NO_UNIT}[^{{}}\d]*\}}(?:\s*\^\s*\{{?[23]\}}?)?\s*(?=$|,)",
            "",
        ),
        (rf"(?<=\d)\s+{NO_UNIT}[a-z]{{3,}}[a-z .]*(?=$|,)", ""),  # units: \text{ cm}^2, 5 dollars
        (r"^\s*\\(?:text|mbox|mathrm)[a-z]*\s*\{([^{}]*)\}\s*$", r"\1"),  # the answer is a word
        (r"^\s*\(\s*(?:\\text\s*\{\s*)?([A-Za-z])[\s}]*\)\s*$", r"\1"),  # (C)
        (
            r"\s*,\s+|\s+,|,(?!\d{3}(?!\d))|(?<=^[(\[]\d),|(?<=^[(\[]\d\d),|(?<=^[(\[]\d{3}),",
            ", ",
        ),  # the pair (4,112)
        (r"(?!(?<=\d)\s+\d)(?:(?<=[^,\s])\s+(?![a-zA-Z])|(?<![a-zA-Z,])\s+)", ""),
    )
)  # but "\pi x" and "1 1/2" need theirs


def boxed(text: str) -> str | None:
    r"""The content of the \boxed{...} (or \fbox, or "\boxed 5") that `text` starts with; None if it is never closed."""
    text = re.sub(r"^\\(?:f|boxed|fbox)(?:box)?\s*", "", text[:1000])
    if not text.startswith("{"):
        return re.split(r"[\s$.,]", text, maxsplit=1)[0] or None
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:place].strip() or None
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed in `text`, or None."""
    place = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    return boxed(text[place:]) if place >= 0 else None


def _final(rest: str) -> str | None:
    """The answer in what follows "Final answer:": its boxes, else its only formula among words, else its line."""
    rest = rest.lstrip()[: 10 * MAX_LENGTH]
    line = rest.split("\n", 1)[0]
    places = [match.start() for match in re.finditer(r"\\(?:boxed|fbox)", line)]
    if places:
        boxes = [boxed(rest[place:]) for place in places]
        after = "" if None in boxes else line[places[-1] :].partition(boxes[-1])[2].lstrip("} ")
        return (
            None
            if None in boxes or _denied(line[: places[0]]) or _changed("", after)
            else ", ".join(boxes)
        )
    if (
        line.count("{") > line.count("}") or "\\begin" in line and "\\end" not in line
    ):  # goes on below
        line = rest.split("\n\n", 1)[0]
    first, *others = [*FORMULA.finditer(line), None]
    if len(others) == 1:
        before, after = line[: first.start()], line[first.end() :]
        if not re.search(r"[\d\\=]", before + after) and not _changed(before, after):
            return first[1] or first[2]
    return line


def _last_box(completion: str) -> str | None:
    place = max(completion.rfind("\\boxed"), completion.rfind("\\fbox"))
    before = completion[max(place - MAX_LENGTH, 0) : max(place, 0)].rpartition("\n")[2]
    return None if _denied(before) else last_boxed(completion)


def _denied(before: str) -> bool:
    r"""Whether what stands before a box denies it or turns its sign: "not \boxed{5}". (Bounds are no matter there.)"""
    return bool(
        re.search(r"(?:[-√]|\\(?:neq?|not|sqrt))\s*$", before)
        or re.search(numbers.DENIED, f"{_words(before)}\0", re.IGNORECASE)
    )


def _changed(before: str, after: str) -> bool:
    """Whether the words or operators around a formula make another value of it: "not $5$", "-$5$", "$5$ million"."""
    return bool(
        OPERATOR.search(before)
        or re.match(r"\s*(?:[+*^<>!]|/\s*(?![a-z]))", after)
        or numbers.CHANGED.search(f"{_words(before)}\0{_words(after)}")
    )


def _words(text: str) -> str:
    return re.sub(r"[$*\0]+|\\[()\[\]]", " ", text[-MAX_LENGTH:])


def canonical(text: str) -> str:
    r"""One spelling for LaTeX that differs in layout, units or "x =" only; plain numbers as in `numbers.show`.

    >>> canonical(r"$x = \dfrac{1}{2}$."), canonical(r"15,\!000 \text{ cm}^2"), canonical(r"\left( 3, \pi \right)")
    ('0.5', '15000', '(3, \\pi)')
    """
    text = numbers.UNICODE_POWER.sub(
        lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text
    )
    text = re.sub(
        "[¼-¾⅐-⅞]",
        lambda match: re.sub(
            "(.+)⁄(.+)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", match[0])
        ),
        text,
    ).translate(SYMBOLS)
    for _ in range(3):  # what stood inside \\text{} may be tidied in turn
        text, before = " ".join(text.split()), text
        for pattern, replacement in TIDY:
            text = pattern.sub(replacement, text).strip()
        if text == before:
            break
    return _number(text) or text


def _number(text: str) -> str | None:
    """The number that `text` is, without any word or symbol around it (in MATH "5x" and "5!" are no 5)."""
    plain = NUMBER.fullmatch(text)
    value = numbers.parse(f"{plain[1]} {plain[2] or ''}") if plain else None
    return None if value is None else numbers.show(value)


def too_complex(text: str) -> bool:
    """Whether `text` is refused without a try: long, deeply nested, with a huge exponent, factorial or a sum."""
    depth = deepest = 0
    for character in text[:MAX_LENGTH]:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return len(text) > MAX_LENGTH or deepest > MAX_DEPTH or bool(TOO_COMPLEX.search(text))


def _ends(text: str) -> tuple[str, str] | None:
    """The brackets of a pair or an interval: (1, 2) is not [1, 2], nor the two solutions 1, 2."""
    return (text[0], text[-1]) if "," in text and text[0] in "([" and text[-1] in ")]" else None


def equal(gold: str, answer: str) -> bool:
    """Whether two texts of `canonical` are the same mathematical value; in doubt, or out of time, they are not."""
    try:
        return _settled(gold, answer)
    except NoVerdict:
        return False


class NoVerdict(Exception):
    """The child was ended before it had decided. Nothing is remembered then: the next time it may come to an end."""


@functools.lru_cache(maxsize=100_000)
def _settled(gold: str, answer: str) -> bool:
    if re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", gold) == re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer):
        return True
    if (
        not gold
        or not answer
        or _number(gold)
        and _number(answer)
        or too_complex(gold)
        or too_complex(answer)
    ):
        return False
    if (
        _ends(gold) != _ends(answer)
        or "_" in gold
        and "_" in answer
        or BASE.search(answer)
        and "_" not in gold
    ):
        return False
    if (
        "\\approx" in gold or "=" in gold and not re.search("[a-z]", gold)
    ):  # all false equations are equal to it
        return False
    if WORD.fullmatch(gold) or WORD.fullmatch(
        answer
    ):  # to the library "cat" is c*a*t, and so is "act"
        return gold.casefold() == answer.casefold()
    if NOT_UNDERSTOOD.search(answer):
        return False
    verdict = _verifier(os.getpid()).equal(gold, answer)
    if verdict is None:
        raise NoVerdict
    return verdict


class Verifier:
    """math-verify in a child process: one question a line, and the child is killed when it takes too long."""

    def __init__(self) -> None:
        self.lock, self.process, self.owner = threading.Lock(), None, os.getpid()
        atexit.register(self.stop)

    def equal(self, gold: str, answer: str) -> bool | None:
        """The library's verdict; None if it ran out of time or memory, or the child died. Safe from any thread."""
        with self.lock:
            for _ in range(
                2
            ):  # once more if the child had gone for another reason than this question
                if self.process is None:
                    self._start()
                reply, late = self._exchange(
                    json.dumps([gold, answer, TIME_LIMIT]) + "\n", PATIENCE * TIME_LIMIT
                )
                if reply in ("0", "1") or late:
                    break
        return {"1": True, "0": False}.get(reply)

    def _start(self) -> None:
        if find_spec("math_verify") is None:
            raise UserError(
                "The task math needs the library math-verify: pip install 'math-verify[antlr4_13_2]'."
            )
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "irpo_utils.tasks.math"],
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        if not self._exchange("", START_LIMIT)[0]:
            raise UserError(
                "The grader of the task math did not start; `python -m irpo_utils.tasks.math` says why."
            )

    def _exchange(self, line: str, limit: float) -> tuple[str, bool]:
        """Write a line, read a line: (reply, whether the time was up). Without a clear reply the child is ended."""
        late, reply = threading.Event(), ""
        timer = threading.Timer(limit, lambda process=self.process: (late.set(), process.kill()))
        timer.start()
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            reply = self.process.stdout.readline().strip()
        except OSError:  # the child is gone
            pass
        finally:  # also after Ctrl-C: an unread reply would be taken for the next question's
            timer.cancel()
            timer.join()
            if (late.is_set() or reply in ("", "?")) and self.stop() == -(SIGPROF or 0):
                late.set()
        return reply, late.is_set()

    def stop(self) -> int | None:
        """End the child, if this process started it; the result tells what ended it, as for `subprocess.Popen`."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return None
        process.kill()  # no effect on one that has ended by itself
        try:
            process.communicate()
        except OSError:  # what could not be written to it any more
            pass
        return process.returncode


@functools.lru_cache(maxsize=1)
def _verifier(process_id: int) -> Verifier:
    """One child for each process: after a fork two must not share one pipe."""
    return Verifier()


def _near(gold, answer) -> bool:
    """Equal to nine digits if both are numbers: the library looks at 15 decimals, to which 1/2^98 is 1/2^99."""
    from sympy import Expr

    if not all(isinstance(value, Expr) and value.is_number for value in (gold, answer)):
        return True
    gold, answer = gold.doit(), answer.doit()
    return bool(abs((gold - answer).evalf(30)) <= 1e-9 * abs(answer.evalf(30)))


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (
        ImportError,
        ValueError,
        OSError,
    ):  # not on Windows and not on every macOS: the time limit remains
        pass


def _short_of_memory() -> bool:
    """Whether this process has come near the limit; the library keeps quiet about a `MemoryError` of its own."""
    try:  # not `getrusage`, which counts what the parent had before the start
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return False
    return peak is not None and int(peak[1]) * 1024 > MEMORY_LIMIT // 2


def _limit_time(seconds: float) -> None:
    """The kernel ends this process when it has used so much processor time from now on, even in C code; 0 for never."""
    if SIGPROF is not None:  # not on Windows: there the clock alone decides
        signal.signal(SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve() -> None:
    """The child: reads [gold, answer, seconds] as JSON lines, answers 1 or 0 for each, or ? if memory was too short."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    _limit_memory()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    read = functools.partial(
        parse,
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )

    def same(gold: str, answer: str) -> str:
        try:
            gold, answer = (
                read("$" + PRODUCT.sub(r"\\cdot ", text) + "$") for text in (gold, answer)
            )
            equal = verify(gold, answer, timeout_seconds=None, raise_on_error=True) and _near(
                gold[0], answer[0]
            )
        except Exception as error:
            return "?" if isinstance(error, MemoryError) or _short_of_memory() else "0"
        return "1" if equal else "?" if _short_of_memory() else "0"

    same("x+1", "1+x")  # the first one imports more of the library: nobody's time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        _limit_time(seconds)
        verdict = same(gold, answer)
        _limit_time(0)
        print(verdict, file=replies, flush=True)


class MATH(FileTask):
    """Competition mathematics; answers are LaTeX."""

    name = "math"
    hub = "EleutherAI/hendrycks_math"
    expected = "`problem` and `solution` (with the answer in \\boxed{}), or `question` and `answer`"
    splits_known = (*SPLITS, "math500")

    def prompt(self, row: dict) -> str:
        """The paper's instruction, the four examples of the column `examples`, the question, and "Solution:"."""
        return f"{HEADER}{row.get('examples') or ''}Question: {row['question']}\nSolution:"

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        r"""The answer after the last "Final answer:", or without one in the last \boxed, in its canonical spelling."""
        parts = FINAL_ANSWER.split(numbers.unbold(completion))
        answer = _final(parts[-1]) if len(parts) > 1 else _last_box(completion)
        return canonical(answer) or None if answer and len(answer) <= 2 * MAX_LENGTH else None

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """The same value by `equal`; math-verify decides where the spelling differs."""
        short = extracted is not None and len(extracted) <= 2 * MAX_LENGTH
        return short and equal(canonical(answer), canonical(extracted))

    def row(self, raw: dict, index: int) -> dict:
        r"""`answer` is the last \boxed of the solution where the row does not have it; `solution` ends in it."""
        question, solution = raw.get("problem") or raw["question"], raw.get("solution")
        answer = raw["answer"] if "answer" in raw else last_boxed(raw["solution"])
        need(question.strip(), "the question is empty")
        need(
            isinstance(answer, str),
            "there is no answer, neither as a field nor in a \\boxed{} of the solution",
        )
        row = {"question": question, "answer": answer}
        return row | (
            {"solution": f"{solution.strip()}\nFinal answer: ${answer}$"} if solution else {}
        )

    def read(self, path: Path | None, name: str, optional: bool = False) -> list[dict]:
        """As for every task, but on the hub the subjects are one by one, and MATH-500 is a data set of its own."""
        if path is not None:
            local = "train_8k" if name == "train" and (path / "train_8k.jsonl").exists() else name
            return super().read(path, local, optional)
        if name == "math500":
            raw = load_hub(self.name, "HuggingFaceH4/MATH-500", None, "test")
        else:
            raw = [
                row for subject in SUBJECTS for row in load_hub(self.name, self.hub, subject, name)
            ]
        rows = convert_rows(enumerate(raw), f"{self.hub}, {name}, row ", self.row, self.expected)
        return [{"id": f"{self.name}-{name}-{index:05d}", **row} for index, row in enumerate(rows)]

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """Official test and MATH-500; train less what is in them and less the examples, 15 % for validation."""
        test, math500 = self.read(path, "test"), self.read(path, "math500", optional=True)
        train = [row for row in self.read(path, "train") if row["answer"].strip()]
        examples, train = self._take_examples(without(train, test, math500))
        train, validation = hold_out(train)
        parts = {"train": train, "validation": validation, "test": test, "math500": math500}
        return {
            name: [row | {"examples": examples} for row in rows] for name, rows in parts.items()
        }

    def _take_examples(self, train: list[dict]) -> tuple[str, list[dict]]:
        """(text of the worked examples, the other rows)."""
        found, rest = {}, []
        for row in train:
            key = hashlib.sha256(normalise(row["question"]).encode()).hexdigest()[:16]
            if key in EXAMPLES:
                found[key] = row
            else:
                rest.append(row)
        if len(found) < len(EXAMPLES):
            raise UserError(
                f"{len(EXAMPLES) - len(found)} of the four worked examples of MATH's prompt are not in its "
                "training file; take the whole file, or --task jsonl for other questions."
            )
        return "".join(
            f"Question: {found[key]['question']}\nSolution: {solution}\nFinal answer: "
            f"${found[key]['answer']}$\n"
            for key, solution in EXAMPLES.items()
        ), rest


TASK = MATH()

if __name__ == "__main__":
    serve()
