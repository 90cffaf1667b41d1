"""Statistics over several seeds, McNemar's test, and the further metrics of a run."""

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset

from irpo_utils import UserError, evaluation
from irpo_utils.ops import statistics
from studies import finished_runs, significance


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (0, 5), (3, 3), (1, 9), (4, 7), (5, 4)])
def test_mcnemar_by_enumeration_of_coin_tosses(only_a, only_b):
    """p is the share of all 2^d tosses of d discordant questions that are at least as uneven."""
    a = [1] * only_a + [0] * only_b + [1] * 6 + [0] * 4
    b = [0] * only_a + [1] * only_b + [1] * 6 + [0] * 4
    d, difference = only_a + only_b, abs(only_a - only_b)
    tosses = itertools.product((0, 1), repeat=d)
    uneven = [abs(2 * sum(toss) - d) >= difference for toss in tosses]
    counts = {"only_a": only_a, "only_b": only_b, "both": 6, "neither": 4}
    p = pytest.approx(sum(uneven) / len(uneven))
    assert significance.mcnemar(a, b) == {"p": p, **counts}


def test_mcnemar_on_many_questions_is_near_the_normal_approximation():
    a, b = [True] * 900 + [False] * 1100, [False] * 900 + [True] * 1100
    z = (200 - 1) / math.sqrt(2000)  # with continuity correction
    expected = math.erfc(z / math.sqrt(2))
    assert significance.mcnemar(a, b)["p"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("a, b", [([1, 0], [1]), ([], []), ([0.5, 1.0], [1, 0])])
def test_mcnemar_refuses_what_it_cannot_compare(a, b):
    with pytest.raises(UserError):
        significance.mcnemar(a, b)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 9, 10, 11, 15, 30, 200])
def test_t_quantile_holds_95_percent_of_the_density(degrees):
    gammas = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    constant = math.exp(gammas) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, significance.t_quantile(degrees), 200_001)
    density = constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=2e-4)


def test_the_interval_if_only_seeds_differ_is_students():
    seeds = np.array([0.40, 0.45, 0.52, 0.55, 0.61])
    matrix = seeds[:, None] + np.tile([-0.5, 0.5], 5000)
    mean, low, high = significance.seed_and_question_interval(matrix)
    assert mean == pytest.approx(seeds.mean())
    assert high - low == pytest.approx(2 * 2.776 * seeds.std(ddof=1) / math.sqrt(5), rel=0.1)


@pytest.mark.parametrize("n_seeds", [1, 5])
def test_the_interval_if_only_questions_differ_is_the_normal_one(n_seeds):
    questions = (np.random.default_rng(4).random(400) < 0.6).astype(float)
    matrix = np.repeat(questions[None], n_seeds, axis=0)
    mean, low, high = significance.seed_and_question_interval(matrix)
    assert mean == pytest.approx(questions.mean())
    assert high - low == pytest.approx(2 * 1.96 * questions.std() / 20, rel=0.06)


@pytest.mark.parametrize("seed_spread, question_spread", [(0.10, 0.0), (0.02, 0.35)])
def test_the_interval_covers_the_mean_over_all_runs(monkeypatch, seed_spread, question_spread):
    monkeypatch.setattr(evaluation, "RESAMPLES", 250)
    rng, hits = np.random.default_rng(5), []
    for i in range(250):
        of_seeds = seed_spread * rng.standard_normal((5, 1))
        p = 0.5 + of_seeds + question_spread * rng.choice([-1, 1], (1, 200))
        _, low, high = significance.seed_and_question_interval(rng.random((5, 200)) < p, seed=i)
        hits.append(low <= 0.5 <= high)
    # Without the stretch for few seeds the first case has about 0.87.
    assert 0.91 <= np.mean(hits) <= 0.995


def test_the_interval_stays_in_range_and_refuses_ragged_input():
    matrix = np.ones((2, 50))
    matrix[0, :20] = 0
    _, low, high = significance.seed_and_question_interval(matrix.tolist())
    assert 0 <= low and high <= 1
    for wrong in ([], [[]], [[1, 0], [1]]):
        with pytest.raises(UserError, match="same questions"):
            significance.seed_and_question_interval(wrong)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shares_that_are_all_equal_have_an_interval(value):
    row = finished_runs.share_row("greedy", [[value] * 40] * 3)
    assert (row["low"], row["high"]) == evaluation.wilson_interval(int(40 * value), 40)


# ---- further metrics


def graded(*questions) -> Dataset:
    """One tuple per question: (id, [(extracted, correct, n_tokens, finished), ...])."""
    names, rows = ("extracted", "correct", "n_tokens", "finished"), []
    for question, completions in questions:
        for i, values in enumerate(completions):
            rows.append({"id": question, "sample": i} | dict(zip(names, values, strict=True)))
    return Dataset.from_list(rows)


RIGHT, WRONG = ("7", True, 10, True), ("8", False, 20, True)
NONE, CUT = (None, False, 4, True), (None, False, 80, False)


def by_name(rows) -> dict:
    return {(row["metric"], row["k"]): row for row in rows}


def test_further_metrics_of_completions_made_by_hand():
    greedy = graded(("a", [RIGHT]), ("b", [WRONG]), ("c", [RIGHT]), ("d", [CUT]))
    sampled = graded(
        ("a", [RIGHT, RIGHT, WRONG, NONE]),
        ("b", [RIGHT, WRONG, NONE, CUT]),
        ("c", [WRONG, ("9", False, 20, True), WRONG, RIGHT]),
        ("d", [CUT] * 4),
    )
    kinds = (("a", 2, False), ("b", 3, True), ("c", 3, False), ("d", 3, True))
    questions = [{"id": i, "steps": steps, "new_skeleton": new} for i, steps, new in kinds]
    rows = by_name(statistics.further_rows({"greedy": greedy, "sampled": sampled}, questions))
    expected = {
        ("greedy_mean_tokens", 1): (10 + 20 + 10 + 80) / 4,
        ("greedy_truncated_rate", 1): 1 / 4,
        ("distinct_answers", 4): (2 + 2 + 3 + 0) / 4,
        ("greedy_seen_skeleton", 1): 1.0,
        ("greedy_new_skeleton", 1): 0.0,
        ("greedy_steps_2", 1): 1.0,
        ("greedy_steps_3", 1): 1 / 3,
    }
    assert {key: row["value"] for key, row in rows.items()} == pytest.approx(expected)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert rows["greedy_steps_3", 1]["n"] == 3
    plain = by_name(
        statistics.further_rows({"greedy": greedy, "sampled": sampled}, [{"id": i} for i in "abcd"])
    )
    assert set(plain) == {key for key in expected if "steps" not in key[0] and "skel" not in key[0]}
    again = evaluation.score(greedy, sampled, 4)
    assert not set(rows) & set(by_name(again))  # no number has two rows


def test_votes_are_also_counted_at_8_so_that_runs_with_another_k_compare():
    """20 samples: two blocks of 8 (one correct by 8:0, one incorrect by 5:3), and 4 left over."""
    sampled = graded(("a", [RIGHT] * 8 + [WRONG] * 5 + [RIGHT] * 3 + [WRONG] * 4))
    greedy = graded(("a", [RIGHT]))
    rows = by_name(statistics.further_rows({"greedy": greedy, "sampled": sampled}, [{"id": "a"}]))
    assert rows["majority", 8]["value"] == 0.5 and ("majority", 20) not in rows
    assert rows["distinct_answers", 8]["value"] == 1.5
    assert rows["distinct_answers", 20]["value"] == 2
