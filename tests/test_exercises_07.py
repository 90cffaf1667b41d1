"""The checks of notebook 07 accept the solution, and tell a typical wrong answer what is wrong with it; its questions are sound."""

import ast
import json
import operator
import re
from pathlib import Path

import exercises
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("jupytext")

import checks_07 as checks  # noqa: E402

from irpo_utils import grading, tasks  # noqa: E402


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined("07_real_models_on_one_gpu", name, solved, re=re)


EXERCISES = ("kv_cache_bytes", "renumbered_twins", "minutes_lost")


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_stubs_are_unsolved(name):
    check = getattr(checks, name)
    assert check(solution(name)).startswith("Right")
    assert check(solution(name, solved=False)).startswith("Not solved yet")
    for nothing in (None, ..., lambda *arguments: ...):
        assert check(nothing).startswith("Not solved yet")
    assert "is a `return` missing?" in check(lambda *arguments: None)


@pytest.mark.parametrize("name", EXERCISES)
def test_checks_never_raise(name):
    def broken(*arguments):
        raise KeyError("question")

    check = getattr(checks, name)
    assert "KeyError: 'question'" in check(broken)
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: {"x": None},
        lambda *a: float("nan"),
        lambda *a: (1, 2, 3),
        lambda *a: [None],
        lambda *a: -1,
        lambda *a: [{}],
        lambda *a: True,
    ):
        assert not check(odd).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda n, h, g, d, r, c, b=2: 2 * n * h * d * r * c * b, "share theirs"),
        (lambda n, h, g, d, r, c, b=2: n * g * d * r * c * b, "values are stored, too"),
        (lambda n, h, g, d, r, c, b=2: n * h * d * r * c * b, "keys alone, and for every head"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * r * c, "number of numbers"),
        (lambda n, h, g, d, r, c, b=2: 4 * n * g * d * r * c, "whatever `bytes_per_number` says"),
        (lambda n, h, g, d, r, c, b=2: 16 * n * g * d * r * c * b, "in bits"),
        (lambda n, h, g, d, r, c, b=2: 2 * g * d * r * c * b, "one block"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * c * b, "one completion"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * r * b, "one position"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * r * c * b, "`head_dim` is missing"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * r * c * b / 1e9, "Return bytes"),
        (lambda *case: 7, "it should be"),
    ],
)
def test_cache_names_the_mistake(wrong, words):
    assert words in checks.kv_cache_bytes(wrong)


def twins(mask, fold=lambda text: "".join(text.split()).casefold(), give="test"):
    def function(train, test):
        forms = [{fold(mask(row["question"])): row["id"] for row in rows} for rows in (train, test)]
        if give == "train":
            return [forms[0][form] for form in forms[0] if form in forms[1]]
        return [row["id"] for row in test if fold(mask(row["question"])) in forms[0]]

    return function


def numbers(text):
    return re.sub(r"\d+(?:[.,]\d+)*", "#", text)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (twins(lambda text: re.sub(r"\d", "#", text)), "digit by digit"),
        (twins(lambda text: re.sub(r"\d", "#", text), fold=str), "digit by digit, and capitals"),
        (twins(lambda text: re.sub(r"\d+", "#", text)), "1,200 became two marks with a comma"),
        (
            twins(lambda text: re.sub(r"\d+", "#", text), fold=str),
            "1,200 became two marks, and capitals",
        ),
        (twins(lambda text: re.sub(r"\d+(?:,\d+)*", "#", text)), "2.5 became two marks"),
        (twins(numbers, fold=str), "Capitals or spacing still matter"),
        (twins(numbers, fold=str.casefold), "Capitals or spacing still matter"),
        (twins(str), "as they are"),
        (twins(lambda text: re.sub(r"\d+(?:[.,]\d+)*", "", text)), "left no mark"),
        (twins(numbers, give="train"), "training rows"),
        (
            lambda train, test: (
                set(twins(numbers)(train, test))
                and sorted(twins(numbers)(train, test), reverse=True)
            ),
            "another order",
        ),
        (lambda train, test: len(twins(numbers)(train, test)), "Return a list"),
        (
            lambda train, test: [row["id"] in twins(numbers)(train, test) for row in test],
            "verdict for every test row",
        ),
        (
            lambda train, test: [row for row in test if row["id"] in twins(numbers)(train, test)],
            "Return their `id`",
        ),
        (lambda train, test: twins(numbers)(train, test)[1:], "the worst"),
        (lambda train, test: [row["id"] for row in test], "should not"),
        (
            lambda train, test: twins(numbers)(train, test)[:1] + twins(numbers)(train, test)[3:],
            "does not catch",
        ),
    ],
)
def test_fourth_net_names_the_mistake(wrong, words):
    assert words in checks.renumbered_twins(wrong)


def test_the_shorter_pattern_of_the_hint_is_accepted():
    assert checks.renumbered_twins(twins(lambda text: re.sub(r"\d[\d,.]*", "#", text))).startswith(
        "Right"
    )


def walk(stages, killed_at):
    """(minutes that are safe, length of the stage under way)"""
    safe = 0
    for _, minutes in stages:
        if safe + minutes > killed_at:
            return safe, minutes
        safe += minutes
    return safe, 0


def boundary_lost(stages, killed_at):
    safe = 0
    for _, minutes in stages:
        if safe + minutes >= killed_at:
            return killed_at - safe
        safe += minutes
    return 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda stages, at: at, "since the start of the run"),
        (lambda stages, at: walk(stages, at)[0], "the time since then"),
        (lambda stages, at: at - walk(stages, at)[0], "After the end"),
        (lambda stages, at: walk(stages, at)[1], "whole length"),
        (
            lambda stages, at: (
                walk(stages, at)[1] - (at - walk(stages, at)[0]) if walk(stages, at)[1] else 0
            ),
            "still needed",
        ),
        (boundary_lost, "compare with `>`"),
        (lambda stages, at: solution("minutes_lost")(stages, at) / 60, "Return minutes"),
        (
            lambda stages, at: next(
                (
                    at - sum(m for _, m in stages[:i])
                    for i in range(len(stages))
                    if sum(m for _, m in stages[: i + 1]) > at
                ),
                None,
            ),
            "returns nothing",
        ),
        (lambda stages, at: 3, "minutes are lost"),
    ],
)
def test_interruption_names_the_mistake(wrong, words):
    assert words in checks.minutes_lost(wrong)


# The questions

QUESTIONS = [
    json.loads(line)
    for line in (ROOT / "notebooks" / "data" / "easy_questions.jsonl").read_text().splitlines()
]
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(text: str) -> float:
    """Of two numbers with a sign of operation between them, such as "3 * 4"."""
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.BinOp)
    return OPERATORS[type(node.op)](node.left.value, node.right.value)


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["id"])
def test_every_answer_follows_from_the_question_by_arithmetic(row):
    """Each number of the working stands in the question or was worked out before; each equation is true; the last one is the answer."""
    equations = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", row["solution"])
    assert 1 <= len(equations) <= 2 and row["solution"].count("=") == len(equations)
    known = set(re.findall(r"\d+", row["question"]))
    for left, right in equations:
        assert value_of(left) == int(right), left
        assert set(re.findall(r"\d+", left)) <= known, left
        known.add(right)
    used = {number for left, _ in equations for number in re.findall(r"\d+", left)}
    assert used == set(re.findall(r"\d+", row["question"])) | {right for _, right in equations[:-1]}
    assert equations[-1][1] == row["answer"] and row["solution"].endswith(
        f"\nFinal answer: {row['answer']}"
    )


def test_questions_are_sixty_or_so_different_ones_that_the_grader_reads():
    from irpo_utils.tasks import files

    assert 55 <= len(QUESTIONS) <= 70 and len({row["id"] for row in QUESTIONS}) == len(QUESTIONS)
    assert len({files.normalise(re.sub(r"\d+", "#", row["question"])) for row in QUESTIONS}) == len(
        QUESTIONS
    )
    task = tasks.get("jsonl")
    for row in QUESTIONS:
        completion = {"completion": row["solution"], "answer": row["answer"], "finished": True}
        assert grading.grade_one(completion, task)["correct"], row["id"]


def test_no_question_is_on_both_sides_of_a_run():
    from irpo_utils.ops import contamination

    task, file = tasks.get("jsonl"), str(ROOT / "notebooks" / "data" / "easy_questions.jsonl")
    rows = {split: task.load(split, file) for split in ("train", "validation", "test")}
    assert sum(map(len, rows.values())) == len(QUESTIONS) and min(map(len, rows.values())) >= 5
    assert (
        contamination.check(rows["train"], rows["validation"]).n_gram
        == contamination.check(rows["train"], rows["test"]).n_gram
        == 0
    )


def test_questions_are_none_of_the_benchmarks(real_data):
    """Written for the notebook: in no file of GSM8K or SVAMP."""
    from irpo_utils.ops import contamination

    for name in ("gsm8k", "svamp"):
        for split in ("train", "test"):
            overlap = contamination.find(tasks.get(name).load(split, str(real_data)), QUESTIONS)
            assert (overlap.normalised, overlap.n_gram) == (0, 0)
