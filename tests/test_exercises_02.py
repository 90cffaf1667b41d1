"""The checks of 02_grading accept the solution and name typical mistakes; the labelled completions are in order."""

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from irpo_utils import grading, tasks

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "scripts")]

import checks_02  # noqa: E402
import helpers_02  # noqa: E402

from make_notebooks import view  # noqa: E402

SOURCE = (ROOT / "notebooks/source/02_grading.py").read_text(encoding="utf-8")


def definitions(solved: bool) -> dict:
    """What the cells define on the way to the exercises' functions, in one of the two views."""
    names = "def after_marker|def numbers_in|def extract_number|def naive|def lucky_pairs|def sound"
    space = {"re": re, "Fraction": Fraction, "completions": []}
    space |= {"equations": helpers_02.equations, "is_true": helpers_02.is_true}
    for cell in view(SOURCE, solved).cells:
        if cell.cell_type == "code" and re.search(names, cell.source):
            exec(cell.source, space)
    return space


SOLVED = definitions(solved=True)


def test_solutions_are_right():
    assert checks_02.extract_number(SOLVED["extract_number"]).startswith("Right")
    assert checks_02.fooled(SOLVED["fooled"], SOLVED["naive"]).startswith("Right")
    assert checks_02.lucky_pairs(SOLVED["lucky_pairs"]).startswith("Right")
    assert checks_02.sound(SOLVED["sound"]).startswith("Right")


def test_unsolved_is_no_mistake():
    stubs = definitions(solved=False)
    for message in (
        checks_02.extract_number(stubs["extract_number"]),
        checks_02.fooled(stubs["fooled"], stubs["naive"]),
        checks_02.lucky_pairs(stubs["lucky_pairs"]),
        checks_02.sound(stubs["sound"]),
        checks_02.extract_number(None),
        checks_02.fooled(None, stubs["naive"]),
        checks_02.lucky_pairs(...),
        checks_02.sound(lambda *_: ...),
    ):
        assert message.startswith("Not solved yet")


@pytest.mark.parametrize("check", ["extract_number", "lucky_pairs", "sound"])
def test_a_forgotten_return_is_named(check):
    assert "is a `return` missing?" in getattr(checks_02, check)(lambda *_: None)


def number(text):
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return [Fraction(f.replace(",", "")) for f in found]


def last_line(text, flags=re.IGNORECASE):
    parts = re.split("final answer:", text, flags=flags)
    return parts[-1].strip().split("\n")[0] if len(parts) > 1 else ""


def one(found):
    return found.pop() if len(found) == 1 else None


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda text: (number(text) or [None])[-1], "took the last"),
        (lambda text: one(set(number(text))), "Only what follows the last"),
        (
            lambda text: (
                one(
                    set(
                        number(
                            re.split("final answer:", text + "\n", flags=2)[1]
                            .strip()
                            .split("\n")[0]
                        )
                    )
                )
                if "inal" in text
                else None
            ),
            "the last one counts",
        ),
        (lambda text: one(set(number(last_line(text, 0)))), "in upper and lower case"),
        (
            lambda text: one(set(number(last_line(text.replace("Final", "final"), 0)))),
            "Small and capital letters",
        ),
        (lambda text: one(set(re.findall(r"[\d.,-]*\d", last_line(text)))), "return a Fraction"),
        (lambda text: Fraction(re.findall(r"\d+", text)[-1]), "only its last part"),
        (
            lambda text: (number(last_line(text)) or [None])[0],
            "took the first. A hedge is no answer",
        ),
        (
            lambda text: (number(last_line(text)) or [None])[-1],
            "took the last. A hedge is no answer",
        ),
        (
            lambda text: (
                (found := number(last_line(text))) and found[0]
                if len({*number(last_line(text))[:: len(number(last_line(text))) - 1 or 1]}) == 1
                else None
            ),
            "one between them",
        ),
        (
            lambda text: one(
                {
                    Fraction(n.replace(",", ""))
                    for n in re.findall(r"-?[\d,]*\d(?:\.\d+)?", last_line(text))
                }
            ),
            "exactly three digits",
        ),
        (
            lambda text: (
                (number(last_line(text)) or [0])[0] if " or " not in last_line(text) else None
            ),
            "0 would be an answer",
        ),
        (lambda text: one({abs(n) for n in number(last_line(text))}), "minus is lost"),
        (lambda text: one({Fraction(n) for n in re.findall(r"-?\d+", last_line(text))}), "comma"),
        (lambda text: float(last_line(text)), "raised ValueError"),
        (42, "your function itself"),
    ],
)
def test_wrong_extractors(attempt, words):
    assert words in checks_02.extract_number(attempt)


def test_a_float_is_no_fraction():
    message = checks_02.extract_number(
        lambda text: (n := SOLVED["extract_number"](text)) and float(n)
    )
    assert "Return a Fraction" in message and not message.startswith("Right")


def test_an_extractor_that_stops_at_the_line_of_the_marker_or_at_a_slash_is_named():
    def same_line(text):
        found = re.split(r"final answer:", text, flags=re.IGNORECASE)[1:]
        return (
            SOLVED["extract_number"]("Final answer: " + found[-1].split("\n")[0]) if found else None
        )

    assert "the next line" in checks_02.extract_number(same_line)
    assert "1/3 is one number" in checks_02.extract_number(
        lambda text: None if "/3" in text else SOLVED["extract_number"](text)
    )


@pytest.mark.parametrize(
    "attempt, words",
    [
        ("Final answer: 42", "so does a reader"),
        ("The answer is 42.", "so does a reader"),
        ("The answer is 42", "so does a reader"),
        ("The answer is 42 eggs.", "so does a reader"),
        ("Answer: 42 dollars", "so does a reader"),
        ("So the answer is 42, as computed.", "so does a reader"),
        ("Final answer: 42 (not 41)", "so does a reader"),
        ("Final answer: 42 more eggs", "so does a reader"),
        ("Final answer: 42 and no more steps", "so does a reader"),
        ("The answer is 42, because 6*7=42.", "so does a reader"),
        ("Final answer: 41", "it reads 41"),
        ("42", "it reads None"),
        (42, "Write a completion"),
    ],
)
def test_completions_that_fool_nobody(attempt, words):
    message = checks_02.fooled(attempt, SOLVED["naive"])
    assert words in message and not message.startswith("Right")


@pytest.mark.parametrize(
    "attempt",
    [
        "Final answer: 42.5",
        "Final answer: 42 or 43",
        "An answer: 42?\nFinal answer: 43",
        "Final answer: not 42",
        "Final answer: more than 42",
        "Final answer: 42 or more",
        "My answer isn't 42 but one less",
        "Final answer: 42/7",
        "Final answer: 42 dozen",
        "Final answer: 42 is wrong",
    ],
)
def test_completions_that_fool(attempt):
    assert checks_02.fooled(attempt, SOLVED["naive"]).startswith("Right")


def test_fooled_with_a_broken_grader():
    assert "raised" in checks_02.fooled("Final answer: 42.5", lambda text: 1 / 0)


def usable(questions):
    return [q for q in questions if 0 < len(q) - q.count("incorrect") < len(q)]


def share(question):
    return question.count("lucky") / (question.count("lucky") + question.count("solved"))


def mean(values):
    return sum(values) / len(values)


def pooled(questions):
    return share([verdict for question in questions for verdict in question])


@pytest.mark.parametrize(
    "attempt, words",
    [
        (pooled, "among all rewarded completions"),
        (lambda qs: pooled(usable(qs)), "take the mean over questions"),
        (
            lambda qs: mean([share(q) for q in qs if q.count("incorrect") < len(q)]),
            "no rejected completion",
        ),
        (lambda qs: mean([share(q) for q in qs]), "skip it"),
        (lambda qs: sum(map(share, usable(qs))) / len(qs), "number of all questions"),
        (lambda qs: mean([q.count("lucky") / len(q) for q in usable(qs)]), "all completions of"),
        (lambda qs: 1 - mean([share(q) for q in usable(qs)]), "*solved*"),
        (lambda qs: mean(["lucky" in q for q in usable(qs)]), "have any lucky"),
        (lambda qs: sum(map(share, usable(qs))), "is a sum"),
        (lambda qs: 100 * mean([share(q) for q in usable(qs)]), "percentages"),
        (lambda qs: 0.3, "should give"),
        (lambda qs: "half", "should give"),
        (lambda qs, k: 0, "raised TypeError"),
    ],
)
def test_wrong_shares(attempt, words):
    message = checks_02.lucky_pairs(attempt)
    assert words in message and not message.startswith("Right")


def equations(text):
    return helpers_02.equations(text)


def true(e):
    return helpers_02.is_true(e)


@pytest.mark.parametrize(
    "attempt, words",
    [
        (
            lambda text, x: (
                x is not None
                and all(map(true, equations(text)))
                and (not equations(text) or equations(text)[-1][3] == Fraction(x))
            ),
            "without any equation",
        ),
        (
            lambda text, x: (
                x is not None and bool(equations(text)) and equations(text)[-1][3] == Fraction(x)
            ),
            "never check whether",
        ),
        (
            lambda text, x: (
                x is not None
                and bool(equations(text))
                and all(map(true, equations(text)))
                and equations(text)[0][3] == Fraction(x)
            ),
            "*first* equation",
        ),
        (lambda text, x: not SOLVED["sound"](text, x), "inverted the result"),
        (lambda text, x: True, "True for every"),
        (lambda text, x: False, "False for every"),
        (lambda text, x: SOLVED["sound"](text, x) or None, "Return False there"),
        (
            lambda text, x: None if equations(text) and x is not None else False,
            "is a `return` missing?",
        ),
        (
            lambda text, x: (
                bool(equations(text)) and x is not None and all(map(true, equations(text)))
            ),
            "do not compare the last result",
        ),
        (
            lambda text, x: (
                bool(equations(text))
                and x is not None
                and any(map(true, equations(text)))
                and equations(text)[-1][3] == Fraction(x)
            ),
            "not `any`",
        ),
        (
            lambda text, x: (
                bool(equations(text))
                and x is not None
                and true(equations(text)[-1])
                and equations(text)[-1][3] == Fraction(x)
            ),
            "the last equation alone",
        ),
        (
            lambda text, x: (
                bool(equations(text))
                and x is not None
                and all(map(true, equations(text)))
                and Fraction(x) in [e[3] for e in equations(text)]
            ),
            "an earlier equation gives",
        ),
        (
            lambda text, x: (
                bool(equations(text))
                and all(map(true, equations(text)))
                and equations(text)[-1][3] == Fraction(x)
            ),
            "raised TypeError",
        ),
        (
            lambda text, x: (
                bool(equations(text))
                and all(map(true, equations(text)))
                and str(equations(text)[-1][3]) == x
            ),
            "compare texts",
        ),
        (lambda text, x: "yes" if SOLVED["sound"](text, x) else "", "Return True or False"),
    ],
)
def test_wrong_soundness(attempt, words):
    message = checks_02.sound(attempt)
    assert words in message and not message.startswith("Right")


def test_equations_as_models_write_them():
    read = [
        [
            (f"{float(a):g}{op}{float(b):g}={float(c):g}", true((a, op, b, c)))
            for a, op, b, c in equations(text)
        ]
        for text in (
            "48/2 = 24 clips",
            "5 * $3 = $15.50.",
            "1,000 x 2 = 2,000.",
            "2*3+4=10",
            "2 * 3 + 4 = 10",
            "3-8=-5",
            "9/0=9",
            "x=5",
        )
    ]
    assert read == [
        [("48/2=24", True)],
        [("5*3=15.5", False)],
        [("1000x2=2000", True)],
        [],
        [],
        [("3-8=-5", True)],
        [("9/0=9", False)],
        [],
    ]


def test_labelled_completions():
    rows = [
        json.loads(line)
        for line in (ROOT / "notebooks/data/graded_forms.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert len(rows) >= 120 and len({row["id"] for row in rows}) == len(rows)
    assert {row["task"] for row in rows} == {"gsm8k", "arc_challenge", "math", "word_problems"}
    for row in rows:
        assert (
            row["verdict"] in ("correct", "incorrect")
            and row["question"]
            and row["form"]
            and row["reason"]
        )
        assert isinstance(row["finished"], bool) and (row["task"] == "arc_challenge") == (
            "choices" in row
        )
    for name in (
        "gsm8k",
        "arc_challenge",
        "word_problems",
    ):  # MATH needs seconds of another process
        task, mine = tasks.get(name), [row for row in rows if row["task"] == name]
        verdicts = [
            (row["verdict"] == "correct", grading.grade_one(row, task)["correct"]) for row in mine
        ]
        assert {right for right, _ in verdicts} == {True, False}
        assert sum(right == graded for right, graded in verdicts) > 0.5 * len(verdicts)
        assert all(task.is_correct(row["answer"], row["answer"]) for row in mine)


def test_graders_of_the_study():
    from studies import lenient_grader

    def rewards(completion, extracted, correct):
        row = {"completion": completion, "extracted": extracted, "answer": "100"}
        return [grader(row | {"correct": correct}) for grader in lenient_grader.GRADERS.values()]

    # strict, within 20 %, partial credit
    assert rewards("50*2=100\nFinal answer: 100", "100", True) == [True, True, True]
    assert rewards("Final answer: 120", "120", False) == [False, True, False]
    assert rewards("Final answer: 121", "121", False) == [False, False, False]
    assert rewards("25*2=50\nFinal answer: 7", "7", False) == [False, False, True]
    assert rewards("25*2=51\nFinal answer: 7", "7", False) == [False, False, False]
    assert rewards("25*2=50", None, False) == [False, False, True]


def test_study_has_every_chain_with_the_same_questions():
    table = helpers_02.pd.read_csv(helpers_02.STUDY)
    chains = table.groupby(["grader", "seed", "iteration"]).id.apply(list)
    assert len({tuple(ids) for ids in chains}) == 1
    assert {grader for grader, *_ in chains.index} == {"none", *helpers_02.GRADERS}
    assert table.seed.nunique() >= 3 and len(chains) == table.seed.nunique() * 7
    assert (table[["correct", "near", "no_working", "partial"]].max(axis=1) <= table.samples).all()
    assert (table.correct + table.near <= table.samples).all()
