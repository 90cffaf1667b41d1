"""The same question on both sides of a run is found and refused."""

import json

import pytest

from irpo_utils import UserError, profiles, tasks
from irpo_utils.ops import contamination, run

BEES = "How many legs do 3 bees and 12 flies have in all, if each of them has 6 legs and none of them has lost a leg?"


def rows(prefix, *questions):
    return [{"id": f"{prefix}-{i}", "question": question} for i, question in enumerate(questions)]


@pytest.mark.parametrize(
    "other, exact",
    [
        (BEES, 1),
        (BEES.replace(" ", "  \n"), 1),
        (BEES.upper(), 0),
        (BEES.replace("?", "??").replace(",", ";"), 0),
        (BEES.replace("3", "３"), 0),
    ],
)
def test_the_same_question_is_found_whatever_its_layout(other, exact):
    overlap = contamination.find(
        rows("train", "What is 1 + 1?", BEES), rows("test", "What is 1 + 2?", other)
    )
    assert (overlap.questions, overlap.normalised, overlap.exact, overlap.train_rows) == (
        2,
        1,
        exact,
        1,
    )
    assert overlap.examples == [{"train": "train-1", "evaluation": "test-1", "question": other}]


@pytest.mark.parametrize(
    "one, other",
    [
        ("Compute 3 + 4.", "Compute 3 - 4."),
        ("Is x^2 < 4?", "Is x^2 > 4?"),
        (r"$\cos 150^\circ$", r"$\cos(-150^\circ)$"),
        ("What is 12?", "What is 1 / 2?"),
        ("6 × 3", "6 ÷ 3"),
        ("6 × 3", "63"),
        ("6 − 3", "6 · 3"),
        ("x ≤ 3?", "x ≥ 3?"),
        ("3.5 + 1", "35 + 1"),
        ("Sort 1, 23.", "Sort 12, 3."),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("10% of 50", "10 of 50"),
        (BEES, BEES.replace("12", "13")),
        ("?", "!"),
    ],
)
def test_another_question_is_not_the_same(one, other):
    assert contamination.find(rows("a", one), rows("b", other)).normalised == 0


@pytest.mark.parametrize(
    "one, other",
    [
        (r"Solve $x^{2}=4$.", "Solve x^2 = 4"),
        ("One-half of 6?", "one half of 6"),
        (r"$\left( a-b \right)$", "(a - b)"),
        ("6 − 3 × 2", "6 - 3 * 2"),
        ("1,000 bees, 2 hives", "1000 bees; 2 hives"),
        (r"1{,}000 + 2", "1000+2"),
    ],
)
def test_latex_and_hyphens_are_layout(one, other):
    assert contamination.find(rows("a", one), rows("b", other)).normalised == 1


def test_thirteen_words_in_a_row_are_a_hint_and_no_refusal():
    longer = "Ann asks again. " + BEES.replace("lost a leg", "lost any")
    overlap = contamination.check(rows("train", BEES), rows("test", longer, "What is 1 + 1?"))
    assert (overlap.normalised, overlap.n_gram) == (0, 1) and "1 of 2" in contamination.describe(
        overlap
    )
    assert (
        contamination.find(
            rows("train", BEES), rows("test", "How many legs do 3 bees and 13 flies have in all?")
        ).n_gram
        == 0
    )


def test_refusal_names_count_examples_and_the_way_out():
    train, test = (
        rows("train", BEES, BEES + " ", "What is 1 + 1?"),
        rows("test", BEES, "What is 2 + 2?"),
    )
    with pytest.raises(
        UserError, match=r"1 of 2 evaluation questions.*train-\d is test-0.*2 rows.*--allow-overlap"
    ):
        contamination.check(train, test)
    assert "ARE training questions" in contamination.describe(
        contamination.check(train, test, allow=True)
    )


def test_math_train_8k_overlaps_the_test_set_and_not_math500(real_data):
    math = tasks.get("math")
    train, test, math500 = (
        math.read(real_data / "math", name) for name in ("train_8k", "test", "math500")
    )
    squeezed = {"".join(row["question"].split()) for row in test}
    assert (
        sum("".join(row["question"].split()) in squeezed for row in train) == 2937
    )  # as the data's own notes say
    overlap = contamination.find(train, test)
    assert (overlap.exact, overlap.normalised, overlap.train_rows) == (
        2936,
        2939,
        2939,
    )  # one test question is there twice
    assert contamination.find(train, math500).normalised == 0
    with pytest.raises(UserError, match="2939 of 5000 evaluation questions"):
        contamination.check(train, test)


@pytest.mark.parametrize("name", ["word_problems", "gsm8k", "svamp", "arc_challenge", "math"])
def test_splits_as_the_tasks_make_them_are_clean(name, request):
    data = None if name == "word_problems" else str(request.getfixturevalue("real_data"))
    task = tasks.get(name)
    for split in ("validation", "test"):
        contamination.check(task.load("train", data), task.load(split, data))


def test_a_run_on_its_own_test_questions_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(20)]
    for split, part in (("train", lines), ("validation", lines[:3]), ("test", lines[10:])):
        (folder / f"{split}.jsonl").write_text("\n".join(part))
    settings = profiles.get("smoke", task="jsonl", data=str(folder))
    with pytest.raises(
        UserError, match="10 of 10 evaluation questions are also training questions"
    ):
        run.run(settings, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
