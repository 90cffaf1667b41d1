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
that of the library math-verify with more care: the brackets of pairs and intervals count, and so do number bases. It
runs in a process of its own that is ended after `TIME_LIMIT` seconds or at `MEMORY_LIMIT` bytes, whatever thread the
caller is in. No text reaches an evaluator of code: only the LaTeX grammar is used, not the library's `parse_expr`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import numbers
from irpo_utils.tasks.base import FINAL_ANSWER, SPLITS
from irpo_utils.tasks.files import FileTask, convert_rows, hold_out, load_hub, need, normalise, without

TIME_LIMIT, START_LIMIT = 3.0, 120.0        # seconds for one comparison, and for starting the process that makes them
MEMORY_LIMIT = 2 << 30                      # bytes
MAX_LENGTH, MAX_DEPTH = 300, 8              # characters and nested brackets of an answer that is compared at all
TOO_COMPLEX = re.compile(r"\d{31}|\^\s*\{?\s*[-+]?\d{5}|[)}\]]\s*\^\s*\{?\s*-?\d{3}|\^\s*\{[^{}]*\^|\^\s*[^\s{]\s*\^"
                         r"|\d{5}\s*!|[!)}]\s*!|\\binom\D*\d{4}|\\(?:sum|prod|i*nt|lim)(?![a-z])")
HEADER = ("Your task is to answer the last question below. Give step by step reasoning before you answer, and when "
          "you're ready to answer, please wrap your answer in \\boxed, and conclude using the format "
          '"Final answer: ..."\n\n')
# Our solutions of four problems of the training split, found by the start of the hash of the normalised question.
EXAMPLES = {
    "b6267e3ceb100368": r"As $\frac{1}{25} = 5^{-2}$, the exponents must agree: $2n + 1 = -2$. So $2n = -3$ and "
                        r"$n = \boxed{-\frac{3}{2}}$.",
    "1a8eaad33bd5066e": r"The arrangement is fixed by the places of the three X. There are $\binom{5}{3} = 10$ ways to "
                        r"choose them, all equally likely, and one of them reads XOXOX. The probability is "
                        r"$\boxed{\frac{1}{10}}$.",
    "28de1bcdc7f65d48": r"From $\frac{4}{3} \pi r^3 = 36 \pi$ we get $r^3 = 27$, so $r = 3$. The surface area is "
                        r"$4 \pi r^2 = 4 \pi \cdot 9 = \boxed{36\pi}$.",
    "b93d883d34aa20c9": r"We have $x = \rho \sin \phi \cos \theta = 4 \cdot 1 \cdot \frac{1}{2} = 2$, "
                        r"$y = \rho \sin \phi \sin \theta = 4 \cdot 1 \cdot \left( -\frac{\sqrt{3}}{2} \right) = "
                        r"-2 \sqrt{3}$ and $z = \rho \cos \phi = 0$. The point is $\boxed{(2, -2 \sqrt{3}, 0)}$."}
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
            "precalculus")
TIDY = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r",?\\!|\{,\}", ""),                                                       # 15,\!000  15{,}000
    (r"(?<!\\)\\(?:(?:left|right|displaystyle|quad)(?![a-zA-Z])|[,;:()\[\]$%])|[$%]|^\*+|\*+$|[.\s]+$", " "),
    (r"π|(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "), (r"∞|(?<![a-zA-Z\\])infinity\b", r"\\infty "),
    (r"(?:√|(?<![a-zA-Z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}"), (r"\*\*", "^"),
    (r"\\[dtc]frac", r"\\frac"), ("[−–]", "-"), (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " "),
    (r"^[^\\\d${}()\[\]]*\b(?:is|are|equals)\b:?", ""),                         # "The answer is"
    (r"^\s*[a-zA-Z]\s*(?:=|\\in\b)(?=[^=]+$)", ""),                             # x = 5, x \in [1, 2]
    (r",?\s*(?:\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (r"(?<=[^\s(,])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?[23]\}?)?\s*$", ""),     # a unit
    (r"(?<=\d)\s+(?!(?:log|sin|cos|tan|sec|csc|cot|exp|sqrt)\b)[a-z]{3,}[a-z .]*$", ""),      # 5 dollars
    (r"^\s*\\(?:text|mbox|mathrm)[a-z]*\s*\{([^{}]*)\}\s*$", r"\1"),           # the answer is a word
    (r"^\s*\(\s*(?:\\text\s*\{\s*)?([A-Za-z])[\s}]*\)\s*$", r"\1"),            # (C)
    (r"\s*,\s+|\s+,|,(?!\d{3}(?!\d))", ", "),
    (r"(?<=[^,\s])\s+(?![a-zA-Z])|(?<![a-zA-Z,])\s+", "")))                     # but "\pi x" needs its space


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
    rest = rest.lstrip()[:10 * MAX_LENGTH]
    line = rest.split("\n", 1)[0]
    boxes = [boxed(rest[match.start():]) for match in re.finditer(r"\\(?:boxed|fbox)", line)]
    if boxes:
        return None if None in boxes else ", ".join(boxes)
    if line.count("{") > line.count("}") or "\\begin" in line and "\\end" not in line:      # goes on below
        line = rest.split("\n\n", 1)[0]
    formulas = re.findall(r"(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)", line)
    words = re.sub(r"(?<!\\)\$[^$]+\$|\\\(.+?\\\)", "", line)
    return "".join(formulas[0]) if len(formulas) == 1 and not re.search(r"[\d\\=]", words) else line


def canonical(text: str) -> str:
    r"""One spelling for LaTeX that differs in layout, units or "x =" only; plain numbers as in `numbers.show`.

    >>> canonical(r"$x = \dfrac{1}{2}$."), canonical(r"15,\!000 \text{ cm}^2"), canonical(r"\left( 3, \pi \right)")
    ('0.5', '15000', '(3, \\pi)')
    """
    for _ in range(3):                      # what stood inside \\text{} may be tidied in turn
        text, before = " ".join(text.split()), text
        for pattern, replacement in TIDY:
            text = pattern.sub(replacement, text).strip()
        if text == before:
            break
    return _number(text) or text


def _number(text: str) -> str | None:
    """The number that `text` is, without any word or symbol around it (in MATH "5x" and "5!" are no 5)."""
    plain = re.fullmatch(r"-?\s*(?:[\d,./\s]|\\frac(?=[\d\s{])|[{}])+", text, re.ASCII)
    value = numbers.parse(text) if plain else None
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


@functools.lru_cache(maxsize=100_000)
def equal(gold: str, answer: str) -> bool:
    """Whether two texts of `canonical` are the same mathematical value; in doubt, or out of time, they are not."""
    if "".join(gold.split()) == "".join(answer.split()):
        return True
    if not gold or not answer or _number(gold) and _number(answer) or too_complex(gold) or too_complex(answer):
        return False
    if _ends(gold) != _ends(answer) or "_" in gold and "_" in answer:
        return False
    if "\\approx" in gold or "=" in gold and not re.search("[a-z]", gold):    # all false equations are equal to it
        return False
    return _verifier(os.getpid()).equal(gold, answer)


class Verifier:
    """math-verify in a child process: one question a line, and the child is killed when it takes too long."""

    def __init__(self) -> None:
        self.lock, self.process, self.owner = threading.Lock(), None, os.getpid()
        atexit.register(self.stop)

    def equal(self, gold: str, answer: str) -> bool:
        """The library's verdict; False for what it cannot do in time. Safe to call from any thread."""
        with self.lock:
            for _ in range(2):              # once more if the child had gone for another reason than this question
                if self.process is None:
                    self._start()
                reply, late = self._exchange(json.dumps([gold, answer]) + "\n", TIME_LIMIT)
                if reply or late:
                    break
        return reply == "1"

    def _start(self) -> None:
        if find_spec("math_verify") is None:
            raise UserError("The task math needs the library math-verify: pip install 'math-verify[antlr4_13_2]'.")
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "irpo_utils.tasks.math"], env=os.environ | {"PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
        if not self._exchange("", START_LIMIT)[0]:
            raise UserError("The grader of the task math did not start; `python -m irpo_utils.tasks.math` says why.")

    def _exchange(self, line: str, limit: float) -> tuple[str, bool]:
        """Write a line, read a line: (reply, whether the time was up). Without a reply the child is ended."""
        late, reply = threading.Event(), ""
        timer = threading.Timer(limit, lambda process=self.process: (late.set(), process.kill()))
        timer.start()
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            reply = self.process.stdout.readline().strip()
        except OSError:                     # the child is gone
            pass
        finally:                            # also after Ctrl-C: an unread reply would be taken for the next question's
            timer.cancel()
            timer.join()
            if late.is_set() or not reply:
                self.stop()
        return reply, late.is_set()

    def stop(self) -> None:
        """End the child, if this process started it."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            try:
                self.process.communicate()
            except OSError:                 # what could not be written to it any more
                pass
        self.process = None


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


def serve() -> None:
    """The child: reads [gold, answer] as JSON lines, answers 1 or 0 for each."""
    import logging
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):      # not on Windows and not on every macOS: the time limit remains
        pass
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                   # what a library prints is no reply
    print("ready", file=replies, flush=True)
    read = functools.partial(parse, extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback",
                             parsing_timeout=None)
    for line in sys.stdin:
        try:
            gold, answer = (read(f"${text}$") for text in json.loads(line))
            same = verify(gold, answer, timeout_seconds=None) and _near(gold[0], answer[0])
        except Exception:
            same = False
        print(int(same), file=replies, flush=True)


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
        answer = _final(parts[-1]) if len(parts) > 1 else last_boxed(completion)
        return canonical(answer) or None if answer and len(answer) <= 2 * MAX_LENGTH else None

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """The same value by `equal`; math-verify decides where the spelling differs."""
        return extracted is not None and equal(canonical(answer), canonical(extracted))

    def row(self, raw: dict, index: int) -> dict:
        r"""`answer` is the last \boxed of the solution where the row does not have it; `solution` ends in it."""
        question, solution = raw.get("problem") or raw["question"], raw.get("solution")
        answer = raw["answer"] if "answer" in raw else last_boxed(raw["solution"])
        need(question.strip(), "the question is empty")
        need(isinstance(answer, str), "there is no answer, neither as a field nor in a \\boxed{} of the solution")
        row = {"question": question, "answer": answer}
        return row | ({"solution": f"{solution.strip()}\nFinal answer: ${answer}$"} if solution else {})

    def read(self, path: Path | None, name: str, optional: bool = False) -> list[dict]:
        """As for every task, but on the hub the subjects are one by one, and MATH-500 is a data set of its own."""
        if path is not None:
            local = "train_8k" if name == "train" and (path / "train_8k.jsonl").exists() else name
            return super().read(path, local, optional)
        if name == "math500":
            raw = load_hub(self.name, "HuggingFaceH4/MATH-500", None, "test")
        else:
            raw = [row for subject in SUBJECTS for row in load_hub(self.name, self.hub, subject, name)]
        rows = convert_rows(enumerate(raw), f"{self.hub}, {name}, row ", self.row, self.expected)
        return [{"id": f"{self.name}-{name}-{index:05d}", **row} for index, row in enumerate(rows)]

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """Official test and MATH-500; train less what is in them and less the examples, 15 % for validation."""
        test, math500 = self.read(path, "test"), self.read(path, "math500", optional=True)
        train = [row for row in self.read(path, "train") if row["answer"].strip()]
        examples, train = self._take_examples(without(train, test, math500))
        train, validation = hold_out(train)
        parts = {"train": train, "validation": validation, "test": test, "math500": math500}
        return {name: [row | {"examples": examples} for row in rows] for name, rows in parts.items()}

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
            raise UserError(f"{len(EXAMPLES) - len(found)} of the four worked examples of MATH's prompt are not in its "
                            "training file; take the whole file, or --task jsonl for other questions.")
        return "".join(f"Question: {found[key]['question']}\nSolution: {solution}\nFinal answer: "
                       f"${found[key]['answer']}$\n" for key, solution in EXAMPLES.items()), rest


TASK = MATH()

if __name__ == "__main__":
    serve()
