"""Statistics against closed forms, enumeration and simulation; scores of given completions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset

from irpo_utils import UserError, evaluation

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "successes, n", [(0, 10), (1, 10), (8, 10), (10, 10), (50, 100), (346, 500), (1, 1)]
)
def test_wilson_inverts_the_score_test(successes, n):
    """The ends are the proportions that a score test at 5 % just accepts."""

    def distance(p):
        return abs(successes / n - p) - 1.959964 * math.sqrt(p * (1 - p) / n)

    def end(outside, inside):
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if distance(middle) > 0 else (outside, middle)
        return inside

    low, high = evaluation.wilson_interval(successes, n)
    assert low == pytest.approx(end(0.0, successes / n), abs=1e-9)
    assert high == pytest.approx(end(1.0, successes / n), abs=1e-9)


def test_wilson_known_values_and_errors():
    assert evaluation.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluation.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert evaluation.wilson_interval(0, 7)[0] == 0.0 and evaluation.wilson_interval(7, 7)[1] == 1.0
    for successes, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(UserError):
            evaluation.wilson_interval(successes, n)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of 5 samples is 1 - 0.7^3; that of 1 - (1 - c/n)^3 is not."""
    p, n, k = 0.3, 5, 3
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * evaluation.pass_at_k(n, c, k)
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - 0.7**3)
    for arguments in ((4, 2, 5), (4, 5, 2), (4, 2, 0)):
        with pytest.raises(UserError):
            evaluation.pass_at_k(*arguments)


@pytest.mark.parametrize(
    "votes, credit",
    [
        (["7", "7", "8"], 1.0),
        (["8", "8", "7"], 0.0),
        (["7", "8"], 0.5),
        (["7", "8", "9"], 1 / 3),
        (["8", "9"], 0.0),
        ([None, None, None, "7"], 1.0),
        ([None, None, "7", "8", "8"], 0.0),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_majority_vote(votes, credit):
    assert evaluation.majority_vote(votes, lambda answer: answer == "7") == pytest.approx(credit)


def test_bootstrap_mean_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = evaluation.bootstrap_mean(values, seed=0)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert (
        evaluation.bootstrap_mean(values, seed=0)
        == (mean, low, high)
        != evaluation.bootstrap_mean(values, seed=1)
    )
    with pytest.raises(UserError):
        evaluation.bootstrap_mean([])


def test_bootstrap_mean_covers_the_truth(monkeypatch):
    monkeypatch.setattr(evaluation, "RESAMPLES", 300)
    rng = np.random.default_rng(2)
    intervals = [evaluation.bootstrap_mean(rng.random(60) < 0.3, seed=i)[1:] for i in range(300)]
    assert 0.90 <= np.mean([low <= 0.3 <= high for low, high in intervals]) <= 0.98


def test_paired_difference_is_b_minus_a_and_uses_the_pairing():
    rng = np.random.default_rng(3)
    a = rng.random(400) < 0.5
    b = a | (np.arange(400) < 20)  # b gains some of the first 20 and loses none
    difference, low, high = evaluation.paired_difference(a, b)
    assert difference == pytest.approx((b.sum() - a.sum()) / 400) and 0 < low < difference < high
    assert high - low == pytest.approx(
        2 * 1.96 * (b.astype(float) - a).std() / 20, rel=0.15
    )  # unpaired: 5 times that
    assert evaluation.paired_difference(b, a)[0] == -difference
    assert evaluation.paired_difference(a, a) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [0, 1])
def test_shares_that_are_all_equal_still_have_an_interval(value):
    row = evaluation.share_row("pass_at_k", [float(value)] * 100, 4)
    assert (row["low"], row["high"]) == pytest.approx(
        evaluation.wilson_interval(100 * value, 100)
    ) and row["k"] == 4
    assert row["high"] - row["low"] > 0.03
    mixed = [0.0, 0.25, 0.5] * 30
    assert evaluation.share_row("sampled", mixed) == evaluation.bootstrap_row("sampled", mixed)


# ---------------------------------------------------------------- graded completions


def graded(*questions):
    """One tuple per question: (id, [(extracted, correct, n_tokens, finished), ...])."""
    return Dataset.from_list(
        [
            {
                "id": name,
                "sample": i,
                "n_tokens": tokens,
                "finished": finished,
                "extracted": extracted,
                "correct": correct,
            }
            for name, rows in questions
            for i, (extracted, correct, tokens, finished) in enumerate(rows)
        ]
    )


RIGHT, WRONG = ("7", True, 10, True), ("8", False, 20, True)
NONE, CUT = (None, False, 4, True), (None, False, 80, False)
GREEDY = graded(("a", [RIGHT]), ("b", [WRONG]), ("c", [RIGHT]), ("d", [CUT]))
SAMPLED = graded(
    ("a", [RIGHT, RIGHT, WRONG, NONE]),
    ("b", [RIGHT, WRONG, NONE, CUT]),
    ("c", [WRONG, ("9", False, 20, True), WRONG, RIGHT]),
    ("d", [CUT] * 4),
)


def rows_by_name(rows):
    return {(row["metric"], row["k"]): row for row in rows}


def test_score_on_completions_made_by_hand():
    rows = rows_by_name(evaluation.score(GREEDY, SAMPLED, 4))
    expected = {
        ("greedy", 1): 2 / 4,
        ("sampled", 1): (2 + 1 + 1 + 0) / 16,
        ("mean_tokens", 1): (44 + 114 + 70 + 320) / 16,
        ("truncated_rate", 1): 5 / 16,
        ("no_answer_rate", 1): (1 + 2 + 0 + 4) / 16,
        ("majority", 4): (1 + 0.5 + 0 + 0) / 4,
        ("pass_at_k", 1): 4 / 16,
        ("pass_at_k", 2): (5 / 6 + 1 / 2 + 1 / 2 + 0) / 4,
        ("pass_at_k", 4): 3 / 4,
    }
    assert {key: row["value"] for key, row in rows.items()} == pytest.approx(expected)
    assert {row["n"] for row in rows.values()} == {4}
    assert all(list(row) == ["metric", "k", "value", "low", "high", "n"] for row in rows.values())
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert (rows["greedy", 1]["low"], rows["greedy", 1]["high"]) == evaluation.wilson_interval(2, 4)
    low, high = evaluation.bootstrap_mean([0.5, 0.25, 0.25, 0])[1:]
    assert (rows["sampled", 1]["low"], rows["sampled", 1]["high"]) == (low, high)


def test_score_takes_completions_in_any_order():
    rows = evaluation.score(GREEDY, SAMPLED, 4)
    reversed_rows = SAMPLED.select(list(reversed(range(16))))
    mixed = evaluation.score(GREEDY.select([2, 0, 3, 1]), reversed_rows, 4)
    assert [row["value"] for row in mixed] == [row["value"] for row in rows]


def test_score_refuses_completions_that_do_not_belong_together():
    for greedy, sampled, k in (
        (GREEDY, SAMPLED, 8),
        (GREEDY, SAMPLED.select(range(15)), 4),
        (SAMPLED, SAMPLED, 4),
        (GREEDY.select(range(3)), SAMPLED, 4),
        (GREEDY.select([]), SAMPLED.select([]), 4),
    ):
        with pytest.raises(UserError, match="one greedy and k"):
            evaluation.score(greedy, sampled, k)


def test_compare_matches_questions_by_id():
    a = graded(*((str(i), [RIGHT if i < 10 else WRONG]) for i in range(40)))
    b = graded(*((str(i), [RIGHT if 1 <= i < 19 else WRONG]) for i in reversed(range(40))))
    made = evaluation.compare(a, b)
    difference, low, high = (made[name] for name in ("difference", "low", "high"))
    assert difference == pytest.approx((18 - 10) / 40) and low < difference < high
    assert evaluation.compare(b, a)["difference"] == -difference
    with pytest.raises(UserError, match="37 questions are on one side"):
        evaluation.compare(a, b.select(range(3)))


def test_compare_takes_several_completions_per_question():
    mean = {"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}
    assert evaluation.correct_per_question(SAMPLED) == mean
    assert evaluation.compare(GREEDY, SAMPLED)["difference"] == pytest.approx(
        sum(mean.values()) / 4 - 2 / 4
    )


# ---------------------------------------------------------------- the stage


class SumTask:
    def prompt(self, row):
        return row["question"]

    def extract(self, completion, row=None):
        return completion if completion.isdigit() else None

    def is_correct(self, extracted, answer):
        return extracted == answer


def test_evaluate_samples_grades_and_scores(monkeypatch):
    """A sampler that is correct when greedy, and for every second sample otherwise."""
    calls = []

    def sample(model, tokenizer, questions, task, n=8, temperature=1.0, top_p=1.0, **options):
        calls.append((n, temperature, top_p, options))
        rows = []
        for question in questions:
            for i in range(n):
                correct = temperature == 0 or i % 2 == 1
                row = {**question, "sample": i, "prompt": "?", "prompt_ids": [1], "n_tokens": 3}
                row |= {"completion": question["answer"] if correct else "no", "finished": True}
                rows.append(row)
        return Dataset.from_list(rows)

    monkeypatch.setattr(evaluation, "sample", sample)
    questions = Dataset.from_list(
        [{"id": str(i), "question": "?", "answer": str(i)} for i in range(6)]
    )
    same = {"max_new_tokens": 9, "seed": 3, "batch_size": 2, "progress": False}
    result = evaluation.evaluate(
        "model", "tokenizer", questions, SumTask(), k=4, temperature=0.7, top_p=0.9, **same
    )
    assert calls == [(1, 0.0, 1.0, same), (4, 0.7, 0.9, same)]
    rows = rows_by_name(result.metrics)
    assert rows["greedy", 1]["value"] == 1 and rows["sampled", 1]["value"] == 0.5
    assert rows["no_answer_rate", 1]["value"] == 0.5
    assert rows["majority", 4]["value"] == 1
    assert len(result.greedy) == 6 and len(result.sampled) == 24
    assert "correct" in result.sampled.column_names
