"""Reading and comparing answers: real gold answers in many surface forms, an independent grader, hostile text."""

import json
import os
import re
import signal
import sys
import threading
import time
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irpo_utils import grading, tasks
from irpo_utils.tasks import arc_challenge, math, numbers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

import check_graders  # noqa: E402

GSM8K, ARC, MATH, JSONL = (tasks.get(name) for name in ("gsm8k", "arc_challenge", "math", "jsonl"))
ANY_TEXT = st.text(max_size=300) | st.text(
    alphabet="0123456789.,-+/*^=$%{}()[]\\ efinalrsw:box\n−½²", max_size=300
)
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def right(task, line: str, answer: str, row: dict | None = None) -> bool:
    return task.is_correct(task.extract(f"Some working: 3 + 4 = 7.\n{line}", row), answer)


# --- grade ---------------------------------------------------------------------------------------------------------


def samples(*rows):
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"completion": text, "answer": "12", "finished": finished, "n_tokens": 3}
            for text, finished in rows
        ]
    )


def test_every_reason_and_the_columns():
    graded = grading.grade(
        samples(
            ("Final answer: 12", True),
            ("Final answer: 13", True),
            ("12", True),
            ("", True),
            ("Final answer: 12", False),
        ),
        GSM8K,
    )
    assert graded["reason"] == ["ok", "wrong", "no_answer", "no_answer", "truncated"]
    assert graded["correct"] == [True, False, False, False, False]
    assert graded["extracted"] == ["12", "13", None, None, None]
    assert graded["n_tokens"] == [3] * 5
    assert grading.count_reasons(graded) == {"ok": 1, "wrong": 1, "no_answer": 2, "truncated": 1}


def test_columns_keep_their_types_when_nothing_is_extracted_and_grading_twice_is_grading_once():
    for rows in (samples(("", True)), samples(("", True)).select([])):
        graded = grading.grade(grading.grade(rows, GSM8K), GSM8K)
        kinds = [graded.features[name].dtype for name in ("extracted", "correct", "reason")]
        assert kinds == ["string", "bool", "string"]
    assert grading.count_reasons(graded) == dict.fromkeys(grading.REASONS, 0)


def test_choices_reach_the_task():
    from datasets import Dataset

    rows = Dataset.from_list(
        [
            {
                "completion": "Final answer: blue",
                "answer": "B",
                "finished": True,
                "choices": ["red", "blue"],
            }
        ]
    )
    assert grading.grade(rows, ARC)["correct"] == [True]


# --- numbers -------------------------------------------------------------------------------------------------------

NUMBERS = {
    "42": "42",
    "42.": "42",
    " 42 eggs.": "42",
    "**42**": "42",
    "*42*": "42",
    "$42$": "42",
    r"\(42\)": "42",
    r"$\boxed{42}$.": "42",
    r"\text{42 eggs}": "42",
    "#### 42": "42",
    "(42)": "42",
    "`42`": "42",
    "42!": "42",
    "42</s>": "42",
    "<b>42</b>": "42",
    "The answer is 42.": "42",
    "x = 42": "42",
    "6 * 7 = 42": "42",
    "42 (42.0)": "42",
    "42 eggs. I hope it helps.": "42",
    "$1,080.50 in all": "1080.5",
    r"\$1,080.50": "1080.5",
    "1080.50 dollars": "1080.5",
    "€5": "5",
    "US$500": "500",
    "Rs.500": "500",
    "5%": "5",
    r"5\%": "5",
    "$5/hour": "5",
    "5 apples/day": "5",
    "12 m^2": "12",
    "12 m²": "12",
    "12cm3": "12",
    "-5": "-5",
    "−5": "-5",
    "–5": "-5",
    "- 5": "-5",
    "-$5": "-5",
    "$-5": "-5",
    "The change is -5 degrees": "-5",
    "+5": "5",
    ".5": "1/2",
    "0.50": "1/2",
    "1/2": "1/2",
    "½": "1/2",
    r"\frac{1}{2}": "1/2",
    r"\dfrac12": "1/2",
    r"-\frac{1}{2}": "-1/2",
    "2 1/2": "5/2",
    "2½": "5/2",
    r"2\frac{1}{2}": "5/2",
    "-1 1/2": "-3/2",
    "6/2": "3",
    "1/3": "1/3",
    "1.5e3": "1500",
    "1e-2": "1/100",
    "1.5 x 10^3": "1500",
    r"1.5 \times 10^{3}": "1500",
    "1.5 × 10³": "1500",
    "1{,}234": "1234",
    r"1\,234": "1234",
    "1\u202f234": "1234",
    "109.2 million": "109200000",
    "٤٢": "42",
    "４２": "42",
    "007": "7",
    "is 3": "3",
    "There are 3 apples": "3",
    "minus 5": "-5",
    "negative 5": "-5",
    "2 dozen": "2",
    "minus $5": "-5",
    "The change is minus 5.": "-5",
    "negative 5 degrees": "-5",
    "‑5": "-5",
    "-½": "-1/2",
    "about 36": "36",
    "approximately 36": "36",
    "≈ 36": "36",
    "36 (rounded)": "36",
    "36%": "36",
    "Total: 36": "36",
    "The answer is 3": "3",
    "There are 2 cats left": "2",
    "36 apples or pears": "36",
    "36 beds and tents": "36",
    "Those that are not eaten are 48 - 42 = 6": "6",
    "2x = 10, so x = 5": "5",
    "36 mp3 players": "36",
    "36 M&M's": "36",
    "36 pupils got B and above": "36",
    "87 aunt2": "87",
    "36 of them do not sing": "36",
    "36, I think": "36",
    "*36*": "36",
    "-36^\\circ": "-36",
    "３．５": "7/2",
    "٣٫٥": "7/2",
    "5 trillion": "5000000000000",
    "1.2 thousand": "1200",
    "36 per cent": "36",
    "36\u00a0eggs": "36",
    "5 in^2": "5",
    "1{,}234.50": "2469/2",
}
NO_NUMBERS = [
    "",
    "...",
    "-",
    "none",
    "12 or 13",
    "12 to 15",
    "12-15",
    "12–15",
    "12 - 15",
    "2 hours 30 minutes",
    "12:30",
    "3:3",
    "3/4/2020",
    "(3, 4)",
    "12,34",
    "12,12",
    "1,00,000",
    "1 234",
    "1.2.3",
    "5^2",
    "5²",
    "10^3",
    "5**2",
    "5 * x",
    "x - 5",
    "5 - 3",
    "3 × 3",
    "4 x 4",
    "√5",
    r"\sqrt{5}",
    "5π",
    r"5\pi",
    "x > 5",
    "5 ± 1",
    "12 and a half",
    "5k",
    "$5k",
    "5M",
    "3/0",
    "1e999",
    "4\x002",
    "4\t2",
    "5\\;6",
    "12\\,13",
    "12\u200913",
    "1 001",
    "1'001",
    "5 5",
    "(3, 3)",
    "5;5",
    "3**3",
    "5 hundred thousand",
    "1.5 e3",
    "1 5/2",
    "½5½",
    "\\frac{1}{2}3",
    "0,123",
    "1.234,50",
    "1.234.567",
    "3.(3)",
    "0.3\u0305",
    "5₂",
    "5万",
    "4️⃣4️⃣",
    "\u202e42",
    "— 42",
    "x -5",
    "x minus 5",
    "minus minus 5",
    "minus -5",
    "5 plus x",
    "5x^2",
    "5/x",
    # denied, or a bound: what a number is not says nothing of what it is
    "not 36",
    "The answer is not 36.",
    "It isn't 36",
    "It isn’t $36",
    "not x = 36",
    "cannot be 36",
    "never 36",
    "not negative 5",
    "36 is wrong",
    "36 is not the answer",
    "~~36~~",
    "more than 36",
    "less than 36",
    "at least 36",
    "over 36",
    "almost 36",
    "36 or more",
    "36 and up",
    "x > 36",
    "x >= 36",
    "x != 36",
    "x ≠ 36",
    "The answer is not x = 36",
    "It is not = 36",
    "\\neq 36",
    "all but 36",
    "5 degrees below zero",
    # two of them, or one that is not worked out
    "5 or 6",
    "between 5 and 6",
    "5 to 6",
    "x = 4, y = 5",
    "x = 5 or y = 6",
    "12 or x = 13",
    "1/2 of 10",
    "half of 36",
    "twice 36",
    "36 squared",
    "36 and two thirds",
    "36 dollars and 50 cents",
    "36 dollars and fifty cents",
    "twelve or 13",
    "13 or twelve",
    "two hundred 36",
    "36 point five",
    "5 to six",
    # words alone: "one" or "half" are too often no number
    "twelve",
    "minus five dollars",
    "thirty-six",
    "half a cup",
    "one of them",
    "①",
    "x5",
    "5 =",
    "5 = 12 or 13",
    "1_000",
    "--5",
    "1" * 1001,
    "[your answer]",
]


@pytest.mark.parametrize("text, value", NUMBERS.items())
def test_numbers_as_models_write_them(text, value):
    assert numbers.parse(text) == Fraction(value)
    assert right(GSM8K, f"Final answer: {text}", value) and right(
        GSM8K, f"**Final answer:** {text}", value
    )
    assert not right(GSM8K, f"Final answer: {text}", str(Fraction(value) + 1))


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_is_no_answer(text):
    assert GSM8K.extract(f"It is 5.\nFinal answer: {text}") is None


def test_only_the_last_final_answer_counts():
    assert GSM8K.extract("Final answer: 3\nNo, wait.\nfinal ANSWER :\n4") == "4"
    assert GSM8K.extract("**Final Answer**: 4") == "4"
    assert GSM8K.extract("Final answer: 3\nFinal answer: I do not know") is None
    assert (
        GSM8K.extract("#### 4") is None and GSM8K.extract("The answer is 4") is None
    )  # not the format asked for


def spellings(value: Fraction) -> list[str]:
    """Ways to write a number with at most four decimals."""
    plain = f"{Decimal(value.numerator) / Decimal(value.denominator):f}"
    grouped = re.sub(r"^(-?)(\d+)", lambda m: f"{m[1]}{int(m[2]):,}", plain)
    ways = [
        plain,
        grouped,
        f"${grouped}",
        f"**{plain}**",
        f"$\\boxed{{{grouped}}}$",
        f"{plain} eggs",
        plain.replace("-", "−"),
        f"{value.numerator}/{value.denominator}",
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"x = {plain}.",
    ]
    return ways + ([f"{plain}.00"] if value.denominator == 1 else [f"{plain}0"])


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
@RELAXED
def test_one_number_in_many_spellings_is_one_answer(number, places):
    value = Fraction(number, 10**places)
    extracted = {GSM8K.extract(f"Final answer: {text}") for text in spellings(value)}
    assert extracted == {numbers.show(value)}
    assert numbers.parse(numbers.show(value)) == value
    assert not GSM8K.is_correct(extracted.pop(), numbers.show(value + Fraction(1, 10**places)))


def independent_number(completion: str) -> Decimal | None:
    """A grader written another way: all but digits, signs and points is thrown away, one number must remain."""
    head, mark, tail = completion.lower().rpartition("final answer:")
    line = tail.split("\n")[0].replace("−", "-").replace("$-", "-")
    words = "".join(c if c in "0123456789.,-" else " " for c in line)
    found = {word.strip(".,").replace(",", "") for word in words.replace("- ", " ").split()} - {
        "",
        "-",
    }
    try:
        return Decimal(found.pop()) if mark and len(found) == 1 else None
    except InvalidOperation:
        return None


@given(
    st.integers(-(10**7), 10**7),
    st.sampled_from([0, 0, 1, -1, 10]),
    st.sampled_from(
        [
            "{}",
            "{:,}",
            "${:,}",
            "{} apples.",
            "**{}**",
            "{:,}.00",
            "{}.0",
            "\\boxed{{{}}}",
            "${}$",
            "x = {}",
            "{} or 99",
            "about {}",
            "{} ({})",
            "",
            "$ {} per day",
            "{}%",
            "{}, I think",
            "{} + 1 = 98",
            "no idea",
            "{:,}.5",
        ]
    ),
)
@RELAXED
def test_differential_against_an_independent_grader(gold, error, form):
    completion = f"We get 5.\nFinal answer: {form.format(gold + error, gold + error)}"
    ours, theirs = (
        GSM8K.is_correct(GSM8K.extract(completion), str(gold)),
        independent_number(completion),
    )
    if " + " in form:  # the one disagreement: we read the right-hand side of an equation
        assert ours == (gold == 98) and theirs is None
    else:
        assert ours == (theirs is not None and theirs == gold), completion


def gold_answers(real_data, name: str) -> list[str]:
    lines = (
        json.loads(line)
        for split in ("train", "test")
        if (real_data / name / f"{split}.jsonl").exists()
        for line in open(real_data / name / f"{split}.jsonl", encoding="utf-8")
    )
    return [
        row["answer"].split("####")[1] if name == "gsm8k" else str(row["Answer"]) for row in lines
    ]


@pytest.mark.parametrize("name, count", [("gsm8k", 8792), ("svamp", 1000)])
def test_every_real_gold_number_is_right_in_every_form_and_wrong_beside_it(real_data, name, count):
    golds, task = gold_answers(real_data, name), tasks.get(name)
    assert len(golds) == count
    for gold in dict.fromkeys(golds):
        value = Fraction(gold.strip().replace(",", ""))
        for form in spellings(value):
            assert right(task, f"Final answer: {form}", gold), (gold, form)
        assert task.is_correct(gold, f"#### {gold}")
        for neighbour in (value + 1, -value - 1, value * 10 + 1, value + Fraction(1, 2)):
            assert not right(task, f"Final answer: {spellings(neighbour)[1]}", gold), (
                gold,
                neighbour,
            )


def test_the_last_step_of_real_solutions_is_read(real_data):
    """Sentences written by people; of the rest nearly all name a second number, or another one than the gold answer."""
    read = []
    for line in open(real_data / "gsm8k/train.jsonl", encoding="utf-8"):
        solution, _, gold = json.loads(line)["answer"].rpartition("####")
        last = re.sub(r"<<.*?>>", "", solution).strip().split("\n")[-1]
        read.append(right(GSM8K, f"Final answer: {last}", gold))
    assert sum(read) / len(read) > 0.96


# --- letters -------------------------------------------------------------------------------------------------------

CHOICES = ["dry palms", "wet palms", "a stronger force", "C 14"]
NUMERIC, CARBON = ["4", "3", "2", "1"], ["C", "NO_{2}", "O_{2}", "CO"]
LETTERS = [
    (text, CHOICES, "B")
    for text in (
        "B",
        "b",
        "B.",
        "(B)",
        "(b)",
        "B)",
        "[B]",
        "**B**",
        "**(B)**",
        r"$\boxed{B}$",
        r"\text{(B)}",
        '"B"',
        "(B) wet palms",
        "B) wet palms.",
        "B. wet palms",
        "B: wet palms",
        "B wet palms",
        "wet palms",
        "Wet palms.",
        "Option B",
        "Answer: (B)",
        "The answer is B",
        "The correct answer is (B).",
        "B is correct",
        "B, because it is wet",
        "2",
        "(2)",
        "2.",
        "2) wet palms",
        "B;",
        "B!",
        "B - wet palms",
        "(B) – wet palms",
        "（Ｂ）",
        "B) wet palms, as sweat is a sign of fear",
        "(B) is the right one",
    )
]
LETTERS += [
    ("A stronger force", CHOICES, "C"),
    ("C 14", CHOICES, "D"),
    ("a", CHOICES, "A"),
    ("3", NUMERIC, "B"),
    ("B", NUMERIC, "B"),
    ("C", CARBON, "C"),
    ("CO", CARBON, "D"),
    ("Rr", ["RR", "Rr", "rr"], "B"),
    ("E", None, "E"),
    ("(C). The Moon only reflects light.", ["the stars", "the Moon", "the Sun"], "C"),
    ("E. coli", ["yeast", "mould", "E. coli", "algae", "moss"], "C"),
    ("D) vitamin C is needed", ["A 1", "B", "K", "vitamin C"], "D"),
]
NO_LETTERS = [
    (text, CHOICES)
    for text in (
        "",
        "B or C",
        "(B) and (C)",
        "B, C",
        "B/C",
        "A strange force",
        "B) dry palms",
        "E",
        "5",
        "(insert letter here)",
        "neither",
        "dry palms or wet palms",
        "not B",
        "4.5",
        "Bx",
        "b, c",
        "B. and d.",
        "a. b.",
        "2, 3",
        "1, 2 and 4",
        "B, 3",
        "B, or a",
        "B is wrong",
        "(B) is not right",
        "B isn't right",
        "B: no",
        "(B) dry palms, since sweat is a sign of fear",
        "B?",
        "В",
    )
] + [("rR", ["RR", "Rr", "rr"]), ("F", None)]


@pytest.mark.parametrize("text, choices, letter", LETTERS)
def test_letters_as_models_write_them(text, choices, letter):
    assert right(ARC, f"Final answer: {text}", letter, {"choices": choices})


@pytest.mark.parametrize("text, choices", NO_LETTERS)
def test_letters_in_doubt_are_no_answer(text, choices):
    assert ARC.extract(f"Final answer: {text}", {"choices": choices}) is None


def test_every_real_arc_answer_is_right_in_every_form_and_others_are_wrong(real_data):
    rows = [
        row for split in ("train", "validation", "test") for row in ARC.load(split, str(real_data))
    ]
    assert len(rows) == 946 + 166 + 1172
    ambiguous = 0
    for row in rows:
        for place, (letter, text) in enumerate(zip("ABCDE", row["choices"])):
            forms = [
                letter,
                letter.lower(),
                f"({letter})",
                f"{letter})",
                f"{letter}.",
                f"**({letter})**",
                f"({letter}) {text}",
                f"{letter}) {text}",
                f"$\\boxed{{{letter}}}$",
                f"The answer is ({letter})",
                f"Option {letter}",
            ]
            forms += (
                []
                if any(choice.strip()[:1].isdigit() for choice in row["choices"])
                else [str(place + 1)]
            )
            for form in forms:
                assert right(ARC, f"Final answer: {form}", row["answer"], row) == (
                    letter == row["answer"]
                ), (row, form)
            read = ARC.extract(f"Final answer: {text}", row)
            ambiguous += read != letter
            assert read in (letter, None) or len(text.strip(" .")) == 1, (row, text)
    assert ambiguous <= 12, "options that are equal but for case, or that are a letter themselves"


# --- MATH ----------------------------------------------------------------------------------------------------------

EQUAL = [
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    ("12, 13", "13 and 12"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("10", "10 cm"),
    (r"10\%", "10"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    ("3", "x = 3"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"36\pi", "36pi"),
    (r"36\pi", "36π"),
    (r"15,\!000", "15,000"),
    (r"90^\circ", "90"),
    (r"1\frac12", "1.5"),
    ("[1,2]", r"x \in [1, 2]"),
    (r"\sqrt{5}", "√5"),
    ("2^{10}", "1024"),
    (r"\$5", "5 dollars"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "\n$$\\begin{pmatrix}1\\\\2\\end{pmatrix}$$"),
    (r"\frac{1}{N+1}", r"\frac1{N+1}"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \pi/2 \right)"),
    ("1.5", "1 1/2"),
    ("5000000", r"5 \text{ million}"),
    ("-5", "minus 5"),
    ("1234_5", "1234_{5}"),
    ("1234_5", "1234"),
    ("12", "3(4)"),
    ("x^2", "x²"),
    (r"\frac12", "½"),
    ("42", "４２"),
    ("15000", r"15\,000"),
    (r"\text{Evelyn}", "evelyn"),
    ("x", "k = x"),
    (r"1.85\ \text{USD}", r"\$1.85"),
    (r"\frac \pi4 + 2 - \sqrt2", r"\frac{\pi}{4}+2-\sqrt{2}"),
    ("(4,112)", "(4, 112)"),
]
UNEQUAL = [
    ("12", "12 or 13"),
    ("(1,2)", "1,2"),
    ("1,2", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("5", "-5"),
    ("5", "5x"),
    ("1234_5", "1234_6"),
    (r"\frac13", "0.333333"),
    ("2", r"2\pi"),
    (r"36\pi", "113.097"),
    ("x", "y"),
    ("5", "6"),
    (r"\text{Saturday}", "Sunday"),
    (r"\sqrt{3}", r"\sqrt{5}"),
    ("5", r"\infty"),
    ("12,13", "12"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ("0.56 = 56\\%", "0.56 = 57\\%"),
    ("5", "5!"),
    ("5.5", "1 1/2"),
    ("23", "2 3"),
    ("1213", r"12\,13"),
    ("56", r"5\;6"),
    ("30", r"3\quad 0"),
    ("7", "3(4)"),
    ("5", "not 5"),
    ("5", "not $5$"),
    ("5", "The answer is not $5$."),
    ("5", r"It is not \boxed{5}"),
    ("5", "-$5$"),
    ("5", r"$-\boxed{5}$"),
    ("5", "more than $5$"),
    ("5", "$5$ million"),
    ("5", "5 million"),
    ("5", r"5 \text{ million}"),
    ("5", "5 times x"),
    ("5", "5 plus x"),
    ("5", "5 squared"),
    ("5", r"5 \text{ is wrong}"),
    ("5", "It is not true that x is 5"),
    ("5", "5'"),
    ("y = -2x", "It is not $y = -2x$"),
    ("x = 4", "more than $x = 4$"),
    ("5", "5_6"),
    ("5", r"5 \mod 7"),
    ("5", r"5, \ldots"),
    ("5", r"\phantom{5}"),
    ("5", r"5 \approx 6"),
    ("5", r"5\mathrm{i}"),
    ("12", "1\x002"),
    ("x", "x²"),
    ("5", "±5"),
    (r"\text{cat}", "act"),
    (r"\text{neither}", "either"),
    ("5", "x < 5"),
    ("5", r"x \ne 5"),
    ("5", "half of $5$"),
]


@pytest.mark.parametrize("gold, text", EQUAL)
def test_latex_that_means_the_same(gold, text):
    assert right(MATH, f"Final answer: {text}", gold) and right(
        MATH, f"So \\boxed{{{text.strip().strip('$')}}}.", gold
    )


@pytest.mark.parametrize("gold, text", UNEQUAL)
def test_latex_that_means_something_else(gold, text):
    assert not right(MATH, f"Final answer: {text}", gold)


def test_where_math_answers_are_read():
    assert MATH.extract("\\boxed{1}\nFinal answer: $\\frac{2}{3}$.\nThanks") == "2/3"
    assert MATH.extract("\\boxed{1} and then \\boxed{\\frac{2}{5}}") == "0.4"
    assert MATH.extract("Final answer: $\\boxed{1}$ and $\\boxed{2}$") == "1, 2"
    assert {MATH.extract(text) for text in ("Final answer: \\boxed{1", "2", "\\boxed")} == {None}
    assert (
        MATH.extract("Hence $y \\geq \\boxed{4}$, and at least \\boxed{5}") == "5"
    )  # a box says what the answer is


@pytest.fixture(scope="module")
def math_golds(real_data):
    rows = [
        json.loads(line)
        for name in ("test", "math500", "train_8k")
        for line in open(real_data / f"math/{name}.jsonl", encoding="utf-8")
    ]
    golds = [row["answer"] if "answer" in row else math.last_boxed(row["solution"]) for row in rows]
    assert (
        len(golds) == 5000 + 500 + 8523 and golds.count("") == 2
    )  # two rows of train_8k have none
    return [gold for gold in dict.fromkeys(golds) if gold]


def test_every_real_math_gold_is_right_in_every_form(math_golds):
    for form in (
        "Final answer: {}",
        "Final answer: ${}$.",
        "**Final answer:** $\\boxed{{{}}}$.",
        "It is \\boxed{{{}}}.",
        "Final answer: \\({}\\)",
        "Final Answer:\n$${}$$",
        "Final answer: The answer is ${}$.",
    ):
        wrong = [
            gold
            for gold in math_golds
            if not MATH.is_correct(MATH.extract(form.format(gold)), gold)
        ]
        assert not wrong, (form, wrong)


def neighbour(gold: str) -> str:
    """A wrong answer that looks like the gold one: its last digit (no unit's) changed, else one more term."""
    masked = re.sub(r"\\(?:text|mbox)\s*\{[^}]*\}(?:\^\d)?", lambda unit: " " * len(unit[0]), gold)
    digits = [place for place, character in enumerate(masked) if character.isdigit()]
    if not digits:
        return gold + "+1"
    return gold[: digits[-1]] + str((int(gold[digits[-1]]) + 1) % 10) + gold[digits[-1] + 1 :]


def string_equal(one: str, two: str) -> bool:
    """An independent comparison of strings in the manner of the first graders of MATH."""

    def strip(text):
        text = re.sub(r"\\text\{ .*", "", text)
        text = re.sub(r"\\(left|right|!|,|;| )|\^\\circ|\^\{\\circ\}|\\?%|\\?\$|\s", "", text)
        return re.sub(r"\\[td]frac", r"\\frac", text).removeprefix("x=").rstrip(".")

    return strip(one) == strip(two)


def test_a_wrong_neighbour_of_a_real_math_gold_is_wrong_and_a_respelt_one_right(math_golds):
    for gold in math_golds[::18]:  # the library takes about 20 ms for what is no plain number
        wrong = neighbour(gold)
        if not string_equal(wrong, gold) and math.canonical(wrong) != math.canonical(gold):
            assert not right(MATH, f"Final answer: ${wrong}$", gold), (gold, wrong)
        respelt = (
            gold.replace("\\frac", "\\dfrac")
            .replace(",\\! ", ",")
            .replace("\\left", "")
            .replace("\\right", "")
        )
        assert right(MATH, f"Final answer: ${respelt}$", gold), (gold, respelt)


def test_differential_against_string_equality(math_golds):
    """What strings call equal must be equal for us; where we alone say equal it is by a value, shown to be the same."""
    short = [gold for gold in math_golds if len(gold) < 12][:1500:5]
    for one, two in zip(short, short[1:]):
        assert not string_equal(one, two) or right(MATH, f"Final answer: {two}", one)
        if right(MATH, f"Final answer: {two}", one):
            assert math.canonical(one) == math.canonical(two), (
                f"{one} and {two} are equal by value: check by hand"
            )


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
    r"\sum_{n=1}^{\infty} 1/n",
    "{" * 200,
    "(" * 100 + "1" + ")" * 100,
    r"\frac{" * 50,
    r"\sqrt{" * 7 + "x" + "}" * 7,
    r"\gamma(99999999)",
    "1" * 5000,
    "1/0",
    r"\frac{1}{0}",
    r"\log(0)",
    "\x00",
    "\\" * 250,
    "$$$$",
    "\n" * 9,
    r"\boxed",
    "__import__('os').system('true')",
    "\u202e42",
    "Ａ",
    "🙂",
    "<|im_end|>",
    "Final answer:" * 50,
    "x" * 300,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_end_in_time_and_are_wrong(monkeypatch, text):
    monkeypatch.setattr(math, "TIME_LIMIT", 0.5)
    row = {"choices": ["red", "blue"], "answer": "12"}
    started = time.monotonic()
    for task, gold in ((GSM8K, "12"), (ARC, "B"), (MATH, r"\frac{\sqrt{3}}{2}+x"), (JSONL, "12")):
        assert not right(task, f"Final answer: {text}", gold, row)
        task.is_correct(text, gold)
    assert time.monotonic() - started < 30


@pytest.fixture
def verifier():
    """The child of this process, ready."""
    verifier = math._verifier(os.getpid())
    assert verifier.equal("x+y", "y+x")
    return verifier


SLOW = r"\gamma(99999999)"  # sums up for minutes, in memory that stays small


def test_the_math_child_is_replaced_after_a_time_out_and_works_in_threads(monkeypatch, verifier):
    monkeypatch.setattr(math, "TIME_LIMIT", 0.3)
    assert verifier.equal("x", SLOW) is None and verifier.process is None
    monkeypatch.setattr(math, "TIME_LIMIT", 30.0)
    verdicts: dict[int, bool] = {}

    def ask(i):
        verdicts[i] = verifier.equal(f"{i}\\sqrt{{3}}", f"\\sqrt{{{3 * i * i + i % 2}}}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 9)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert verdicts == {i: i % 2 == 0 for i in range(1, 9)}
    verifier.process.kill()  # as by the kernel when memory is short: the next question is asked again
    assert verifier.equal("2(x+1)", "2x+2")


@pytest.mark.skipif(
    not hasattr(signal, "SIGSTOP"), reason="no way to take the processor from a process"
)
def test_on_a_busy_machine_a_right_answer_stays_right(monkeypatch, verifier):
    """The child gets no processor for five times its limit, as on a machine with too much to do, and is in time."""
    monkeypatch.setattr(math, "TIME_LIMIT", 0.3)
    os.kill(verifier.process.pid, signal.SIGSTOP)
    timer = threading.Timer(1.5, os.kill, (verifier.process.pid, signal.SIGCONT))
    timer.start()
    started = time.monotonic()
    assert math.equal("3(x+1)", "3x+3") and time.monotonic() - started > 1.4
    timer.join()


@pytest.mark.skipif(
    not hasattr(signal, "SIGSTOP"), reason="no way to take the processor from a process"
)
def test_a_child_that_never_gets_the_processor_is_given_up_and_nothing_is_remembered(
    monkeypatch, verifier
):
    monkeypatch.setattr(math, "TIME_LIMIT", 0.1)
    monkeypatch.setattr(math, "PATIENCE", 5)
    os.kill(verifier.process.pid, signal.SIGSTOP)
    assert not math.equal("5(x+1)", "5x+5")
    monkeypatch.undo()
    assert math.equal("5(x+1)", "5x+5")


def test_a_time_out_is_not_remembered_and_a_verdict_is(monkeypatch, verifier):
    monkeypatch.setattr(math, "TIME_LIMIT", 0.1)
    known = math._settled.cache_info().currsize
    assert not math.equal("x", SLOW) and math._settled.cache_info().currsize == known
    monkeypatch.undo()
    assert math.equal("7(x+1)", "7x+7") and math._settled.cache_info().currsize == known + 1


@pytest.mark.parametrize(
    "first, second, verdict", [("", "", None), ("?", "?", None), ("", "1", True), ("?", "0", False)]
)
def test_a_child_that_dies_or_is_short_of_memory_is_asked_once_more_and_then_there_is_no_verdict(
    monkeypatch, verifier, first, second, verdict
):
    replies = [first, second]
    monkeypatch.setattr(verifier, "_exchange", lambda line, limit: (replies.pop(0), False))
    assert verifier.equal("x", "y") is verdict and not replies
    gold = "9x" + "+x" * ["", "?", "1", "0"].index(second) + "+1"
    monkeypatch.setattr(math.Verifier, "equal", lambda self, gold, answer: verdict)
    assert math.equal(gold, "9x") is bool(verdict)
    monkeypatch.setattr(math.Verifier, "equal", lambda self, gold, answer: True)
    assert math.equal(gold, "9x") is (verdict is not False)


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1,",
        "1.",
        "- ",
        "1 / ",
        "Final answer: ",
        "Final answer ",
        "\\boxed{",
        "\\frac{1}{",
        "(A) ",
        "$",
        "** ",
        "and ",
        "\\text{",
        "A",
        "\n",
        "½",
        "^{",
        " ",
    ],
)
def test_a_hundred_thousand_characters_take_no_second(unit):
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    for task in (GSM8K, ARC, MATH, JSONL):
        for completion in (text, f"Final answer: {text}", f"{text}Final answer: 12"):
            task.extract(completion, {"choices": ["red", "blue"], "answer": "x"})
    assert time.process_time() - started < 1


@given(ANY_TEXT)
@RELAXED
def test_what_was_read_is_read_again_as_the_same(text):
    """Votes count equal texts, so that an extracted answer must be its own spelling."""
    number = GSM8K.extract(f"Final answer: {text}")
    assert (
        number is None
        or GSM8K.extract(f"Final answer: {number}") == number
        and GSM8K.is_correct(number, number)
    )
    answer = MATH.extract(f"Final answer: {text}")
    assert answer is None or math.canonical(math.canonical(answer)) == math.canonical(answer)


@given(ANY_TEXT, st.sampled_from(["", "Final answer:", "Final answer: ", "\\boxed{"]))
@RELAXED
def test_no_text_makes_a_grader_raise(text, before):
    row = {"choices": ["red", text, "3"], "answer": text}
    for task in (GSM8K, ARC, JSONL):
        extracted = task.extract(before + text, row)
        assert extracted is None or isinstance(extracted, str) and extracted
        task.is_correct(extracted, "12"), task.is_correct(text, text)
    extracted = MATH.extract(before + text, row)
    assert extracted is None or MATH.is_correct(extracted, extracted)
    assert arc_challenge.letter(text) in (None, *"ABCDE")
    assert (
        not MATH.is_correct(text, "12")
        or math.canonical(text) == "12"
        or len(text) < math.MAX_LENGTH
    )


# --- the large test and its committed table ------------------------------------------------------------------------


def test_graders_hold_on_generated_forms_and_against_second_readers(real_data, monkeypatch):
    monkeypatch.setenv("IRPO_DATA", str(real_data))
    monkeypatch.setattr(check_graders, "BY_VALUE", (0.1, 60))
    monkeypatch.setattr(
        check_graders, "HOSTILE", HOSTILE[-12:]
    )  # all of them have their own test, above
    rows, examples = check_graders.check(
        real_data, 2000, seed=1
    )  # another one than the committed table's
    assert len(rows) == 40 and all(row["tried"] for row in rows)
    assert not [row for row in rows if row["held"] != row["tried"]], examples


def test_the_committed_table_holds_for_every_task():
    import csv

    rows = list(csv.DictReader((ROOT / "figures" / "grading.csv").open()))
    assert all(row["held"] == row["tried"] and "NOT EXPLAINED" not in row["note"] for row in rows)
    counts = {}
    for row in rows:
        name, _, what = row["test"].partition(": ")
        if what.endswith("answers") or "another expression" in what:
            counts[name] = counts.get(name, 0) + int(row["tried"])
    assert set(counts) == {
        "word_problems",
        "word_choices",
        "gsm8k",
        "svamp",
        "arc_challenge",
        "math",
    }
    assert all(count > 90_000 for count in counts.values())
