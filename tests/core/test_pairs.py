"""Pairing against footnote 2 of the paper; what is left out is counted."""

import math

import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from irpo_utils import UserError, pairs


def graded(letters: dict[str, str], texts: dict[str, list[str]] | None = None) -> Dataset:
    """Rows from strings such as {"q1": "wlw"}: w has reward 1, l has reward 0."""
    return rewarded(
        {name: [float(x == "w") for x in text] for name, text in letters.items()}, texts
    )


def rewarded(rewards: dict[str, list[float]], texts=None) -> Dataset:
    rows = []
    for question, values in rewards.items():
        for i, value in enumerate(values):
            row = {"id": question, "sample": i, "reward": value, "correct": value == 1}
            row |= {"prompt": f"ask {question}", "prompt_ids": [1, 2, 3]}
            text = (texts or {}).get(question, [f"{question} sample {i}"] * len(values))[i]
            rows.append(row | {"completion": text, "completion_ids": [10 + i, 4]})
    return Dataset.from_list(rows)


def sample_pairs(data, question="q"):
    rows = (row for row in data if row["id"] == question)
    return [(row["chosen_sample"], row["rejected_sample"]) for row in rows]


# ---------------------------------------------------------------- the walk of the paper


def test_both_sets_are_walked_in_parallel_and_wrap_around():
    data, counts = pairs.build_pairs(graded({"q": "wlwll"}), k=5)
    # Chosen 0, 2 and rejected 1, 3, 4: each set begins again at its own end.
    assert sample_pairs(data) == [(0, 1), (2, 3), (0, 4), (2, 1), (0, 3)]
    assert counts["pairs"] == 5 and counts["repeated"] == 0


def test_number_of_distinct_pairs_is_the_smaller_of_k_and_the_least_common_multiple():
    for n_chosen in range(1, 8):
        for n_rejected in range(1, 8):
            for k in (1, 4, 10, 20):
                walk = pairs.walk(n_chosen, n_rejected, k)
                assert len(walk) == k
                assert len(set(walk)) == min(k, math.lcm(n_chosen, n_rejected))


def test_a_repeated_pair_is_kept_as_in_the_paper_and_counted():
    data, counts = pairs.build_pairs(graded({"q": "wl"}), k=3)
    assert sample_pairs(data) == [(0, 1)] * 3 and counts["repeated"] == 2


def test_ids_and_texts_are_those_of_the_samples():
    [row] = pairs.build_pairs(graded({"q": "lw"}), k=1)[0]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("ask q", "q sample 1", "q sample 0")
    assert row["prompt_ids"] == [1, 2, 3]
    assert (row["chosen_ids"], row["rejected_ids"]) == ([11, 4], [10, 4])


def test_questions_without_both_kinds_are_dropped_and_counted():
    data, counts = pairs.build_pairs(graded({"a": "www", "b": "lll", "c": "wl"}), k=1)
    assert set(data["id"]) == {"c"}
    expected = {"questions": 3, "used": 1, "all_right": 1, "all_wrong": 1}
    assert {name: counts[name] for name in expected} == expected


def test_random_pairing_is_another_draw_that_the_seed_fixes():
    data = graded({f"q{i}": "wwwlll" for i in range(20)})
    first, _ = pairs.build_pairs(data, k=4, pairing="random", seed=1)
    again, _ = pairs.build_pairs(data, k=4, pairing="random", seed=1)
    walked, _ = pairs.build_pairs(data, k=4)
    assert first.to_list() == again.to_list() != walked.to_list()


# ---------------------------------------------------------------- rewards that are not 0 or 1


def test_every_chosen_completion_has_a_higher_reward_than_every_rejected_one():
    data, counts = pairs.build_pairs(rewarded({"q": [0.2, 0.9, -3.0, 0.8]}), k=4)
    rewards = {0: 0.2, 1: 0.9, 2: -3.0, 3: 0.8}
    chosen, rejected = ({i for i in data[f"{side}_sample"]} for side in ("chosen", "rejected"))
    assert min(rewards[i] for i in chosen) > max(rewards[i] for i in rejected)
    assert chosen | rejected == {0, 1, 2, 3} and counts["used"] == 1


@pytest.mark.parametrize(
    "value, count", [(2.5, "all_right"), (0.5, "all_right"), (0.4, "all_wrong")]
)
def test_equal_rewards_give_no_pair(value, count):
    data = concatenate_datasets([rewarded({"q": [value] * 3}), graded({"r": "wl"})])
    found, counts = pairs.build_pairs(data, k=2)
    assert set(found["id"]) == {"r"} and counts[count] == 1


def test_the_reward_counts_and_not_whether_the_answer_is_correct():
    data = rewarded({"q": [0.0, 1.0]}).map(lambda row: {"correct": not row["correct"]})
    assert sample_pairs(pairs.build_pairs(data, k=1)[0]) == [(1, 0)]


REWARDS = st.one_of(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6),
    st.lists(st.floats(-1048576, 1048576, width=32), min_size=1, max_size=6),
)


@settings(max_examples=50, deadline=None)
@given(REWARDS, st.integers(1, 7))
def test_pairs_of_any_rewards(rewards, k):
    """Chosen above rejected; for rewards of 0 and 1 exactly the walk of the paper."""
    data = concatenate_datasets([rewarded({"q": rewards}), graded({"r": "wl"})])
    found = sample_pairs(pairs.build_pairs(data, k=k)[0])
    assert all(rewards[chosen] > rewards[rejected] for chosen, rejected in found)
    assert len(found) == (k if len(set(rewards)) > 1 else 0)
    if set(rewards) == {0.0, 1.0}:
        ones = [i for i, reward in enumerate(rewards) if reward == 1]
        zeros = [i for i, reward in enumerate(rewards) if reward == 0]
        assert found == [(ones[i % len(ones)], zeros[i % len(zeros)]) for i in range(k)]


# ---------------------------------------------------------------- gold solutions


GOLD = [{"id": "a", "completion": "gold", "completion_ids": [7, 4]}]


def test_the_gold_solution_is_the_first_chosen_one():
    data, counts = pairs.build_pairs(graded({"a": "ll", "b": "wl"}), k=2, gold=GOLD)
    assert sample_pairs(data, "a") == [(-1, 0), (-1, 1)]
    assert data.filter(lambda row: row["id"] == "a")["chosen_ids"][:] == [[7, 4]] * 2
    assert counts["gold_winners"] == 2 and counts["all_wrong"] == 0


def test_gold_without_an_incorrect_completion_makes_no_pair():
    _, counts = pairs.build_pairs(graded({"a": "ww", "b": "wl"}), k=2, gold=GOLD)
    assert counts["all_right"] == 1 and counts["used"] == 1


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    "letters, advice", [("ww", "for 2 and.*harder"), ("ll", "for 2; .*--gold")]
)
def test_no_pairs_says_so_and_what_to_try(letters, advice):
    with pytest.raises(UserError, match=f"no pairs: of 2 questions.*{advice}"):
        pairs.build_pairs(graded({"a": letters, "b": letters}))


def test_duplicate_texts_are_left_out_and_counted():
    data = graded({"q": "wwlll"}, {"q": ["same", "same", "x", "y", "x"]})
    kept, counts = pairs.build_pairs(data, k=3)
    assert sample_pairs(kept) == [(0, 2), (0, 3), (0, 2)] and counts["duplicates"] == 2
    assert pairs.build_pairs(data, k=3, deduplicate=False)[1]["duplicates"] == 0


def test_the_same_text_may_be_chosen_once_and_rejected_once():
    """A grader that contradicts itself is not hidden here."""
    data, counts = pairs.build_pairs(graded({"q": "wl"}, {"q": ["same", "same"]}), k=1)
    assert counts["duplicates"] == 0 and len(data) == 1


def test_over_long_pairs_are_dropped_and_counted():
    def lengthen(row):
        long = row["id"] == "a" and not row["correct"]
        return {"completion_ids": [9] * 50 if long else row["completion_ids"]}

    data = graded({"a": "wl", "b": "wl"}).map(lengthen)
    kept, counts = pairs.build_pairs(data, k=2, max_length=20)
    assert set(kept["id"]) == {"b"} and counts["over_long"] == 2 and counts["used"] == 1


def test_a_completion_without_tokens_is_left_out():
    data = graded({"a": "wll"}).map(
        lambda row: {"completion_ids": [] if row["sample"] == 1 else row["completion_ids"]}
    )
    kept, counts = pairs.build_pairs(data, k=2)
    assert sample_pairs(kept, "a") == [(0, 2), (0, 2)] and counts["empty"] == 1


def test_two_questions_with_the_same_id_are_refused():
    """Otherwise a pair would join a completion with the prompt of the other question."""
    data = graded({"q": "wl"})
    other = data.map(lambda row: {"prompt": "ask another"})
    with pytest.raises(UserError, match="1 ids|2 ids occur more than once.*'q'"):
        pairs.build_pairs(concatenate_datasets([data, other]))


def test_at_most_max_pairs_are_kept_at_random():
    data = graded({f"q{i}": "wl" for i in range(20)})
    few, counts = pairs.build_pairs(data, k=1, max_pairs=8, seed=1)
    assert len(few) == 8 and counts["pairs"] == counts["used"] == 8
    assert few["id"][:] == pairs.build_pairs(data, k=1, max_pairs=8, seed=1)[0]["id"][:]
    assert few["id"][:] != pairs.build_pairs(data, k=1, max_pairs=8, seed=2)[0]["id"][:]
