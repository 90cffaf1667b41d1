"""Pairing against the paper's footnote 2, and what is left out is counted."""

import pytest
from datasets import Dataset

from irpo_utils import UserError, pairs


def graded(verdicts: dict[str, str], texts: dict[str, list[str]] | None = None) -> Dataset:
    """Rows from strings such as {"q1": "wlw"}: w a winner, l a loser."""
    rows = []
    for question, letters in verdicts.items():
        for i, letter in enumerate(letters):
            text = texts[question][i] if texts and question in texts else f"{question} sample {i}"
            rows.append(
                {
                    "id": question,
                    "sample": i,
                    "prompt": f"ask {question}",
                    "prompt_ids": [1, 2, 3],
                    "completion": text,
                    "completion_ids": [10 + i, 4],
                    "correct": letter == "w",
                }
            )
    return Dataset.from_list(rows)


def sample_pairs(data, question="q"):
    return [(r["chosen_sample"], r["rejected_sample"]) for r in data if r["id"] == question]


def test_both_sets_are_walked_in_parallel_and_wrap_around():
    data, counts = pairs.build_pairs(graded({"q": "wlwll"}), k=5)
    # winners 0, 2 and losers 1, 3, 4: the zip begins each set again at its own end
    assert sample_pairs(data) == [(0, 1), (2, 3), (0, 4), (2, 1), (0, 3)]
    assert counts["pairs"] == 5 and counts["repeated"] == 0


def test_number_of_distinct_pairs_is_the_smaller_of_k_and_the_least_common_multiple():
    import math

    for winners in range(1, 8):
        for losers in range(1, 8):
            for k in (1, 4, 10, 20):
                assert len(set(pairs.walk(winners, losers, k))) == min(k, math.lcm(winners, losers))
                assert len(pairs.walk(winners, losers, k)) == k


def test_a_repeated_pair_is_kept_as_in_the_paper_and_counted():
    data, counts = pairs.build_pairs(graded({"q": "wl"}), k=3)
    assert sample_pairs(data) == [(0, 1)] * 3
    assert counts["repeated"] == 2


def test_ids_and_texts_are_those_of_the_samples():
    data, _ = pairs.build_pairs(graded({"q": "lw"}), k=1)
    row = data[0]
    assert (row["chosen"], row["rejected"]) == ("q sample 1", "q sample 0")
    assert (row["chosen_ids"], row["rejected_ids"], row["prompt_ids"]) == (
        [11, 4],
        [10, 4],
        [1, 2, 3],
    )
    assert row["prompt"] == "ask q"


def test_questions_without_both_kinds_are_dropped_and_counted():
    data, counts = pairs.build_pairs(graded({"a": "www", "b": "lll", "c": "wl"}), k=1)
    assert set(data["id"]) == {"c"}
    assert (counts["questions"], counts["used"], counts["all_right"], counts["all_wrong"]) == (
        3,
        1,
        1,
        1,
    )


@pytest.mark.parametrize("letters, advice", [("ww", "too easy"), ("ll", "too weak")])
def test_no_pairs_says_so_and_what_to_try(letters, advice):
    with pytest.raises(UserError, match=f"no pairs.*{advice}"):
        pairs.build_pairs(graded({"a": letters, "b": letters}))


def test_textual_duplicates_are_left_out_and_counted():
    data = graded({"q": "wwlll"}, {"q": ["same", "same", "x", "y", "x"]})
    kept, counts = pairs.build_pairs(data, k=3)
    assert sample_pairs(kept) == [(0, 2), (0, 3), (0, 2)]
    assert counts["duplicates"] == 2
    _, counts = pairs.build_pairs(data, k=3, deduplicate=False)
    assert counts["duplicates"] == 0


def test_the_same_text_may_win_once_and_lose_once():
    data, counts = pairs.build_pairs(graded({"q": "wl"}, {"q": ["same", "same"]}), k=1)
    assert (
        counts["duplicates"] == 0 and len(data) == 1
    )  # a grader that contradicts itself is not hidden here


def test_gold_chain_is_the_first_winner_and_saves_a_question_without_any():
    gold = [{"id": "b", "completion": "gold", "completion_ids": [7, 4]}]
    data, counts = pairs.build_pairs(graded({"a": "wl", "b": "ll"}), k=2, gold=gold)
    assert sample_pairs(data, "b") == [(-1, 0), (-1, 1)]
    assert data.filter(lambda r: r["id"] == "b")["chosen_ids"][:] == [[7, 4]] * 2
    assert counts["gold_winners"] == 2 and counts["all_wrong"] == 0


def test_gold_without_a_loser_makes_no_pair():
    gold = [{"id": "a", "completion": "gold", "completion_ids": [7, 4]}]
    _, counts = pairs.build_pairs(graded({"a": "ww", "b": "wl"}), k=2, gold=gold)
    assert counts["all_right"] == 1 and counts["used"] == 1


def test_over_long_pairs_are_dropped_and_counted():
    data = graded({"a": "wl", "b": "wl"})
    long = data.map(
        lambda r: {
            "completion_ids": [9] * 50
            if r["id"] == "a" and not r["correct"]
            else r["completion_ids"]
        }
    )
    kept, counts = pairs.build_pairs(long, k=2, max_length=20)
    assert set(kept["id"]) == {"b"} and counts["over_long"] == 2 and counts["used"] == 1


def test_a_completion_without_tokens_is_left_out():
    data = graded({"a": "wll"}).map(
        lambda r: {"completion_ids": [] if r["sample"] == 1 else r["completion_ids"]}
    )
    kept, counts = pairs.build_pairs(data, k=2)
    assert sample_pairs(kept, "a") == [(0, 2), (0, 2)] and counts["empty"] == 1


def test_random_pairing_is_another_draw_that_the_seed_fixes():
    data = graded({f"q{i}": "wwwlll" for i in range(20)})
    first, _ = pairs.build_pairs(data, k=4, pairing="random", seed=1)
    again, _ = pairs.build_pairs(data, k=4, pairing="random", seed=1)
    walked, _ = pairs.build_pairs(data, k=4)
    assert first.to_list() == again.to_list() != walked.to_list()
