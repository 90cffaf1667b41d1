"""The checks of notebooks 07 and 07b accept the solution and name typical mistakes; their questions are sound."""

import ast
import json
import math
import operator
import re
from pathlib import Path

import exercises
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("jupytext")

import checks_07 as checks  # noqa: E402

from irpo_utils import grading, tasks  # noqa: E402

COURSE, OPTIONAL = "07_real_models_on_one_gpu", "07b_what_the_data_must_be"
EXERCISES = {
    "minutes_lost": COURSE,
    "kv_cache_bytes": COURSE,
    "questions_needed": COURSE,
    "shared_runs": OPTIONAL,
    "renumbered_twins": OPTIONAL,
}


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined(EXERCISES[name], name, solved, re=re, math=math)


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
        (lambda n, h, g, d, r, c, b=2: 2 * n * h * d * r * c * b, "only `kv_heads` are stored"),
        (lambda n, h, g, d, r, c, b=2: n * g * d * r * c * b, "values are also stored"),
        (lambda n, h, g, d, r, c, b=2: n * h * d * r * c * b, "keys alone, and for every head"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * r * c, "You counted the numbers"),
        (lambda n, h, g, d, r, c, b=2: 4 * n * g * d * r * c, "Use `bytes_per_number`"),
        (lambda n, h, g, d, r, c, b=2: 16 * n * g * d * r * c * b, "is in bits"),
        (lambda n, h, g, d, r, c, b=2: 2 * g * d * r * c * b, "one layer"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * c * b, "one completion"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * r * b, "one position"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * r * c * b, "`head_dim` is missing"),
        (lambda n, h, g, d, r, c, b=2: 2 * n * g * d * r * c * b / 1e9, "Return bytes"),
        (lambda *case: 7, "your function returned"),
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
        (twins(numbers, fold=str), "Capitals and spacing still matter"),
        (twins(numbers, fold=str.casefold), "Spacing still matters"),
        (twins(numbers, fold=lambda text: "".join(text.split())), "Capitals still matter"),
        (twins(str), "with their numbers"),
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
            "True or False for every test row",
        ),
        (
            lambda train, test: [row for row in test if row["id"] in twins(numbers)(train, test)],
            "Return each row's `id`",
        ),
        (lambda train, test: twins(numbers)(train, test)[1:], "numbers included"),
        (lambda train, test: [row["id"] for row in test], "more than a number is different"),
        (
            lambda train, test: twins(numbers)(train, test)[:1] + twins(numbers)(train, test)[3:],
            "does not find",
        ),
    ],
)
def test_twins_name_the_mistake(wrong, words):
    assert words in checks.renumbered_twins(wrong)


def test_the_shorter_pattern_of_the_hint_is_accepted():
    assert checks.renumbered_twins(twins(lambda text: re.sub(r"\d[\d,.]*", "#", text))).startswith(
        "Right"
    )


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda gain, half, n: math.ceil(n * half / gain), "square the ratio"),
        (lambda gain, half, n: math.ceil(n * math.sqrt(half / gain)), "square root of the ratio"),
        (lambda gain, half, n: math.ceil(n * (gain / half) ** 2), "upside down"),
        (lambda gain, half, n: math.ceil(n * (2 * half / gain) ** 2), "doubled the half-width"),
        (lambda gain, half, n: math.ceil(n * (half / gain) ** 2) - n, "are missing"),
        (lambda gain, half, n: (half / gain) ** 2, "`n` is missing"),
        (lambda gain, half, n: int(n * (half / gain) ** 2), "rounded down"),
        (lambda gain, half, n: n * (half / gain) ** 2, "whole number"),
        (lambda gain, half, n: 7, "your function returned 7"),
    ],
)
def test_number_of_questions_names_the_mistake(wrong, words):
    assert words in checks.questions_needed(wrong)


def word_runs(words, last=1, more=0, fixed=None, give="id"):
    def function(train, test, n):
        n = fixed or n + more

        def found(row):
            listed = words(row["question"])
            return {tuple(listed[i : i + n]) for i in range(len(listed) - n + last)}

        known = {run for row in train for run in found(row)}
        rows = [row for row in test if found(row) & known]
        return [row["id"] for row in rows] if give == "id" else rows

    return function


def folded_words(text):
    return re.findall(r"\w+", text.casefold())


@pytest.mark.parametrize(
    "wrong, words",
    [
        (word_runs(str.split), "Capitals or punctuation still matter"),
        (word_runs(lambda text: re.findall(r"\w+", text)), "Capitals still matter"),
        (word_runs(lambda text: text.casefold().split()), "Punctuation still matters"),
        (word_runs(folded_words, more=-1), "one word too few"),
        (word_runs(folded_words, more=1), "one word too many"),
        (word_runs(folded_words, last=0), "skip the last run"),
        (word_runs(folded_words, fixed=13), "You used n = 13"),
        (word_runs(folded_words, give="rows"), "Return each row's `id`"),
        (lambda train, test, n: [row["id"] for row in train], "ids of training rows"),
        (lambda train, test, n: solution("shared_runs")(train, test, n)[::-1], "another order"),
        (lambda train, test, n: set(solution("shared_runs")(train, test, n)), "returned a set"),
        (lambda train, test, n: [row["id"] for row in test], "no 4 words in a row"),
        (lambda train, test, n: ["the same", "short"], "does not find 'a run of four'"),
    ],
)
def test_runs_of_words_name_the_mistake(wrong, words):
    assert words in checks.shared_runs(wrong)


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
        (lambda stages, at: walk(stages, at)[0], "the minutes since then"),
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
            "returns None",
        ),
        (lambda stages, at: 3, "minutes are lost; your function"),
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
