r"""MATH: 12,500 competition problems with answers in LaTeX (Hendrycks et al. 2021).

One raw row (files test.jsonl, train.jsonl or train_8k.jsonl, and math500.jsonl if there):

    {"problem": "How many vertical asymptotes does the graph of $y=\\frac{2}{x^2+x-6}$ have?",
     "solution": "The denominator ... Therefore, the graph has $\\boxed{2}$ ...", ...}

(train_8k has `question` and `answer` instead, no solutions, and two rows with an empty answer,
which are left out.) Splits: `test` (5,000), `math500` (500 of them), and train less what is in
either, 15 % of it for validation. Prompt of the paper (appendix B.1) with four worked examples,
which the paper does not print: training questions, in no split, with our own solutions.

A completion's answer is read after the last "Final answer:", without one from the last \boxed.
An answer of equal value can still be refused: for a number the answer must also be a number (3^5 is
not accepted for 243), a formula copied from the question is no answer, and no operation may be left
to do that the gold answer does not have. Only then math-verify decides (`verifier`).
"""

import functools
import json
import os
import re
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.tasks import answers, numbers, verifier
from irpo_utils.tasks.base import SPLITS
from irpo_utils.tasks.files import FileTask, hold_out, need, question_hash, without

MAX_LENGTH, MAX_DEPTH = 300, 8  # characters and nested brackets of an answer that is compared
HEADER = (
    "Your task is to answer the last question below. Give step by step reasoning before you "
    "answer, and when you're ready to answer, please wrap your answer in \\boxed, and conclude "
    'using the format "Final answer: ..."\n\n'
)
# Our solutions of four training problems, by the start of the hash of the normalised question.
EXAMPLES = json.loads(Path(__file__).with_name("math_examples.json").read_text(encoding="utf-8"))
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra")
SUBJECTS += ("number_theory", "prealgebra", "precalculus")

# --- reading ----------------------------------------------------------------------------------

PATTERNS = answers.read_patterns("math", flags=re.NOFLAG)
FORMULA, BOX, NUMBER, APPROXIMATE, SIGN = (
    PATTERNS[name][0][0] for name in ("formula", "box", "number", "approximate", "sign")
)
CONTENT = answers.PATTERNS["content"][0][0]


@functools.lru_cache(maxsize=10_000)  # a gold answer is compared with many completions
def canonical(text: str) -> str:
    r"""One spelling for LaTeX that differs in layout, units or "x =" only.

    >>> canonical(r"$x = \dfrac{1}{2}$."), canonical(r"15,\!000 \text{ cm}^2"), canonical("(3,5)")
    ('0.5', '15000', '(3, 5)')
    """
    text = _tidy(text)
    values = [_number(part) for part in text.split(", ")]
    if all(values):  # "1/2 or 0.5" is one answer
        return ", ".join(dict.fromkeys(values))
    return answers.replace(PATTERNS["interval"], text)


def _tidy(text: str) -> str:
    """One layout for `text`, in which numbers stay as they are written."""
    rules = PATTERNS["tidy"] + PATTERNS["behind"]
    return answers.replace(rules, _exact(answers.unwrap(text)), rounds=3)


def _exact(text: str) -> str:
    r"""`text` without the decimal behind an exact value, as in "\frac13 \approx 0.333"."""
    if not (match := APPROXIMATE.fullmatch(text)):
        return text
    value, decimal = map(numbers.parse, match.groups())
    if value is None:  # as \ln 2, whose decimal is not checked
        return match[1]
    is_close = decimal is not None and abs(abs(value) - decimal) <= abs(value) / 100
    return match[1] if is_close else text


def _number(text: str) -> str | None:
    """The number that `text` is, without any word or symbol: "5x" and "5!" are not 5."""
    value = numbers.parse(text) if NUMBER.fullmatch(text) else None
    if value is None or (value.denominator == 1 and re.search(r"/|frac", text)):
        return None  # 6/2 still has a division to do
    return numbers.show(value)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox, or "\boxed 5"), or None."""
    *before, rest = BOX.split(text)
    match = CONTENT.match(rest[: answers.MAX_LENGTH]) if before else None
    return (match[1] or match[2] or "").strip() or None if match else None


def _last_box(completion: str) -> str | None:
    r"""The last box, unless the text before it changes it: "not \boxed{5}", "-\boxed{5}"."""
    before = "".join(BOX.split(completion)[-2:-1])
    line = answers.replace(PATTERNS["delimiter"], before[-MAX_LENGTH:].rpartition("\n")[2])
    if answers.found(PATTERNS["turned"], line) or numbers.denied(line.replace("#", "") + " #"):
        return None
    return last_boxed(completion)


def _in_block(block: str) -> str | None:
    """The answer in the block: its only formula, if the words around do not change it, or all."""
    if not FORMULA.search(block):  # then a box among words is a formula
        block = answers.replace(answers.PATTERNS["box"], block)
    formulas = FORMULA.findall(block)
    if not formulas and BOX.search(block):  # it is never closed
        return None
    around = FORMULA.sub("#", answers.replace(PATTERNS["mark"], block))
    if len(formulas) != 1 or re.search(r"[\d\\=]", around):
        return block
    if answers.found(PATTERNS["beside"], around) or numbers.doubtful(around):
        return None
    formula, after = formulas[0], around.partition("#")[2].strip(" .*_")
    if answers.found(PATTERNS["few_words"], after):
        return f"{formula} \\text{{ {after}}}"  # what may be a unit is compared
    return formula


@functools.lru_cache(maxsize=100)  # what was extracted is compared next
def _said(completion: str) -> str | None:
    """The answer as the completion writes it."""
    if answers.MARKER.search(completion):
        answer = _in_block(answers.after_final_answer(completion) or "")
    else:
        answer = _last_box(completion)
    return answer if answer and len(answer) <= 2 * MAX_LENGTH else None


# --- comparing --------------------------------------------------------------------------------


def _outside(text: str) -> str:
    """`text` with 1 for what is in brackets, up to `MAX_DEPTH` of them inside each other."""
    return answers.replace(PATTERNS["brackets"], text, rounds=MAX_DEPTH)


def _ends(text: str) -> tuple[str, str] | None:
    """The brackets of a pair or an interval: (1, 2) is not [1, 2], nor the two solutions 1, 2."""
    return (text[0], text[-1]) if "," in text and text[0] in "([" and text[-1] in ")]" else None


def _n_signs(text: str) -> int:
    r"""How many + and - are between terms; \pm is two of them."""
    return sum(2 if "pm" in sign else 1 for sign in SIGN.findall(text))


def unfinished(gold: str, answer: str) -> bool:
    """Whether the answer has an operation to do that the gold answer has not: 2x+3x for 5x."""
    if any(rule.search(answer) and not rule.search(gold) for rule, _ in PATTERNS["to_do"]):
        return True
    answer = re.sub(r"(?:(?<=[-+])|^)\(([^()]*)\)(?=[-+]|$)", r"\1", answer)  # (k+4)+(3k-2)
    gold, answer = (text[1:-1] if _ends(text) else text for text in (gold, answer))
    if "=" in gold or "frac" in gold and _n_signs(answer) <= _n_signs(gold):
        return False  # (x+2)/7 may be x/7 + 2/7
    return _n_signs(_outside(answer)) > _n_signs(_outside(gold))


def _last_side(answer: str) -> str:
    """The last side of a chain of equations, unless they are to be solved, as x^2 = 4."""
    *left, last = answer.split("=")
    for side in left:
        names = set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", side)))
        is_equation = len(names) == 1 and answers.found(PATTERNS["calculation"], side)
        if is_equation or (len(side) == 1 and side in last):  # x^2 = 4, x = 2x + 3
            return answer
    return canonical(last) if left and not re.search(r"[<>]|\\ne|\\not", answer) else answer


def _spelling(text: str) -> str:
    """What is compared as text: no blanks (but between digits), "4:30 PM" as 4:30pm."""
    return answers.replace(PATTERNS["spelling"], text)


def equal(gold: str, answer: str) -> bool:
    """Whether two texts of `canonical` are the same answer; when in doubt, they are not."""
    if _spelling(gold) == _spelling(answer):
        return True
    if "=" not in gold:
        answer = _last_side(answer)
    if not answers.found(PATTERNS["word"], answer):
        gold = canonical(answers.replace(PATTERNS["qualifier"], gold))
    if re.fullmatch("[A-Z]", gold):  # an option with what it says: (C) 5
        return answers.replace(PATTERNS["option"], answer) == gold
    without_unit = answers.replace(PATTERNS["short"], answer)
    ratios = (answers.replace(PATTERNS["ratio"], text) for text in (gold, without_unit))
    gold_number, number = map(_number, ratios)
    if gold_number:
        return gold_number == number
    if answers.found(PATTERNS["words"], gold) or answers.found(PATTERNS["words"], answer):
        return gold.casefold() == answer.casefold()  # to the library "cat" is "act"
    if not _comparable(gold, answer) or unfinished(gold, answer):
        return False
    try:
        return _equal_by_value(gold, answer)
    except TimeoutError:
        return False


def _comparable(gold: str, answer: str) -> bool:
    """Whether the library reads both texts as a reader does, in bounded time."""
    for text in (gold, answer):
        is_deep = re.search(r"[({\[]", _outside(text[:MAX_LENGTH]))
        if is_deep or len(text) > MAX_LENGTH or answers.found(PATTERNS["complex"], text):
            return False
    if _ends(gold) != _ends(answer) or answers.found(PATTERNS["unclear"], answer):
        return False
    if "_" in gold and "_" in answer:
        return False
    # To the library all false equations without a variable are equal; one to solve is no value.
    return bool(re.search("[a-z]", gold)) if "=" in gold else "=" not in answer


@functools.lru_cache(maxsize=100_000)  # an error is not remembered: there may be time the next time
def _equal_by_value(gold: str, answer: str) -> bool:
    return verifier.verifier(os.getpid()).equal(gold, answer)


@functools.lru_cache(maxsize=10_000)
def _formulas(question: str) -> frozenset[str]:
    """The formulas of a question, whole and side by side, in one layout."""
    found = FORMULA.findall(question)
    sides = [side for formula in found for side in re.split(r"=|\\[lg]eq?(?![a-z])|[<>,]", formula)]
    return frozenset(_layout(text) for text in found + sides if len(text) <= MAX_LENGTH)


def _layout(text: str) -> str:
    return answers.replace(PATTERNS["layout"], _spelling(_tidy(text)))


class MATH(FileTask):
    """Competition mathematics; answers are LaTeX."""

    name = "math"
    hub = "EleutherAI/hendrycks_math"
    expected = "`problem` and `solution` (with the answer in \\boxed{}), or `question` and `answer`"
    split_names = (*SPLITS, "math500")

    def prompt(self, row: dict) -> str:
        """The paper's instruction, the column `examples`, the question, and "Solution:"."""
        return f"{HEADER}{row.get('examples') or ''}Question: {row['question']}\nSolution:"

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        r"""The answer after the last "Final answer:", or without one in the last \boxed."""
        return canonical(_said(completion) or "") or None

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """The same answer by `equal`; a formula of `row["question"]` must be the gold text."""
        if extracted is None or len(extracted) > 2 * MAX_LENGTH:
            return False
        row, gold, given = row or {}, canonical(answer), canonical(extracted)
        said = _said(row.get("completion") or "")
        # Compared as written where that is known: 3/20 for a gold 0.15 may be copied.
        written, gold_written = (said, answer) if said else (given, gold)
        is_copied = _layout(written) in _formulas(row.get("question") or "")
        if is_copied and _layout(written) != _layout(gold_written):
            return False
        return equal(gold, given)

    def row(self, raw: dict) -> dict:
        r"""`answer` from the last \boxed where the row has none; `solution` ends in it."""
        question, solution = raw.get("problem") or raw["question"], raw.get("solution")
        answer = raw["answer"] if "answer" in raw else last_boxed(raw["solution"])
        need(question.strip(), "the question is empty")
        missing = "there is no answer, neither as a field nor in a \\boxed{} of the solution"
        need(isinstance(answer, str), missing)
        row = {"question": question, "answer": answer}
        if solution:
            row["solution"] = f"{solution.strip()}\nFinal answer: ${answer}$"
        return row

    def hub_sets(self, name: str) -> list[tuple[str, str | None, str]]:
        """On the hub each subject is a separate configuration, and MATH-500 a data set."""
        if name == "math500":
            return [("HuggingFaceH4/MATH-500", None, "test")]
        return [(self.hub, subject, name) for subject in SUBJECTS]

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """Test and MATH-500; train without these and the examples, 15 % of it for validation."""
        test, math500 = self.read(path, "test"), self.read(path, "math500", optional=True)
        name = "train_8k" if path and (path / "train_8k.jsonl").exists() else "train"
        answered = [row for row in self.read(path, name) if row["answer"].strip()]
        rows = {question_hash(row)[:16]: row for row in without(answered, test, math500)}
        if missing := EXAMPLES.keys() - rows:
            raise UserError(
                f"{len(missing)} of the four examples of the prompt of MATH are not in its "
                "training file; use the whole file, or --task jsonl for other questions."
            )
        shown = [(rows.pop(key)["question"], solution) for key, solution in EXAMPLES.items()]
        examples = "".join(f"Question: {asked}\nSolution: {told}\n" for asked, told in shown)
        train, validation = hold_out([*rows.values()])
        for part in (test, validation):  # the files go by subject, but the first rows must not
            part.sort(key=question_hash)
        parts = {"train": train, "validation": validation, "test": test, "math500": math500}
        return {name: [row | {"examples": examples} for row in parts[name]] for name in parts}


TASK = MATH()
