"""What each method makes of the same graded completions."""

import pytest
from datasets import Dataset

from irpo_utils import UserError, methods, models, pairs, profiles
from studies import baselines, few_shot

PAPERS = "irpo irpo_2x irpo_from_sft iterative_dpo dpo_from_sft star star_2x sft_gold".split()


def rows(*answers, gold="5"):
    return [
        {"id": "a", "completion": f"{i}", "extracted": answer, "correct": answer == gold}
        for i, answer in enumerate(answers)
    ]


def test_rewards():
    given = rows("5", "7", "7", None)
    assert baselines.by_majority(given) == [0, 1, 1, 0]
    assert baselines.by_majority(rows(None, None)) == [0, 0]
    assert baselines.never(given) == [0] * 4
    for row, logprob in zip(given, (-1.0, -8.0, -2.0, -4.0), strict=True):
        row |= {"logprob": logprob, "n_tokens": 4}
    assert baselines.by_own_likelihood(given) == [1, 0, 1, 0]


def test_random_labels_keep_the_number_of_correct_completions():
    drawn = set()
    for i in range(100):
        question = [row | {"id": f"q{i}"} for row in rows("5", "7", "7", None)]
        rewards = tuple(baselines.at_random(question))
        assert sum(rewards) == 1 and rewards == tuple(baselines.at_random(question))
        drawn.add(rewards)
    assert len(drawn) == 4  # the rewarded completion can be at any place


@pytest.fixture(scope="module")
def graded():
    made = []
    for question, answers in (("a", "5577"), ("b", "7775"), ("c", "7777")):
        for i, answer in enumerate(answers):
            row = {"id": question, "sample": i, "prompt": f"{question}?", "prompt_ids": [1]}
            row |= {"completion": f"{question}{i} {answer}", "completion_ids": [2, i]}
            row |= {"answer": "5", "extracted": answer, "correct": answer == "5"}
            made.append(row | {"logprob": -1.0 - i, "n_tokens": 2})
    return Dataset.from_list(made)


def chosen_and_rejected(name: str, graded):
    """The texts of the pairs that a method trains on."""
    method = methods.get(name)
    questions = [{"id": i, "solution": f"gold {i}", "question": f"{i}?"} for i in "abc"]
    tokenizer = models.load_tokenizer(str(models.FOLDERS["seed"]))
    gold = pairs.gold_completions(questions, tokenizer) if method.settings.get("gold") else None
    data, _ = pairs.build_pairs(methods.reward(graded, method.reward), k=4, gold=gold)
    return [(row["chosen"], row["rejected"]) for row in data]


def test_methods_train_on_what_they_say(graded):
    irpo = chosen_and_rejected("irpo", graded)
    assert irpo[:4] == [("a0 5", "a2 7"), ("a1 5", "a3 7")] * 2
    assert irpo[4:] == [("b3 5", f"b{i} 7") for i in (0, 1, 2, 0)]
    majority = chosen_and_rejected("self_consistency", graded)
    assert ("b0 7", "b3 5") in majority
    assert not any(chosen.startswith("c") for chosen, _ in majority)  # all agree
    likely = chosen_and_rejected("self_rewarding", graded)
    assert {chosen[1] for chosen, _ in likely} == {"0", "1"}  # the likelier half
    spin = chosen_and_rejected("spin", graded)
    assert {chosen for chosen, _ in spin} == {"gold a", "gold b", "gold c"} and len(spin) == 12
    shuffled = chosen_and_rejected("shuffled", graded)
    assert len(shuffled) == 8 and shuffled != irpo
    assert graded["correct"][:4] == [True, True, False, False]


def test_a_reward_sees_all_columns_of_one_question_at_a_time(graded):
    seen = []

    def reward(rows):
        seen.append([row["id"] for row in rows])
        assert set(rows[0]) == set(graded.column_names)
        return [len(row["completion"]) / 10 for row in rows]

    found = methods.reward(graded, reward)
    assert seen == [["a"] * 4, ["b"] * 4, ["c"] * 4] and found["reward"][:] == [0.4] * 12
    again = methods.reward(found.add_column("new", [0] * 12), lambda rows: [1] * len(rows))
    assert again["reward"][:] == [1.0] * 12
    for values in ([1], [1, 1, float("nan"), 1]):
        with pytest.raises(UserError, match="one finite number for each completion"):
            methods.reward(graded, lambda rows, values=values: values)


def test_a_reward_stays_with_its_completion_in_any_order_of_the_rows(graded):
    def by_sample(rows):
        return [10 * ord(row["id"]) + row["sample"] for row in rows]

    rewarded = methods.reward(graded.shuffle(seed=1), by_sample)
    assert rewarded["id"][:3] != ["a", "a", "a"]
    assert all(row["reward"] == 10 * ord(row["id"]) + row["sample"] for row in rewarded)


def test_gold_solutions_alone_are_paired_with_empty_completions(tokenizer):
    questions = [{"id": i, "solution": f"gold {i}", "question": "?"} for i in "ab"] + [{"id": "c"}]
    empty = Dataset.from_list(pairs.empty_completions(questions, ["x", "y", "z"], tokenizer))
    gold = pairs.gold_completions(questions, tokenizer)
    data, counts = pairs.build_pairs(empty, k=1, gold=gold)
    assert [(row["chosen"], row["rejected"]) for row in data] == [("gold a", ""), ("gold b", "")]
    assert counts["questions"] == 3 and counts["gold_winners"] == 2


# ---------------------------------------------------------------- settings


def test_a_method_fixes_settings_and_the_number_of_pairs():
    assert methods.apply(profiles.get("cpu", method="star")).loss == "sft"
    assert methods.apply(profiles.get("cpu", method="few_shot")).iterations == 0
    assert methods.apply(profiles.get("cpu", method="sft_gold")).iterations == 1
    assert methods.apply(profiles.get("cpu", method="irpo_2x", k_pairs=3)).k_pairs == 6
    assert methods.apply(profiles.get("cpu", method="irpo", k_pairs=3)).k_pairs == 3


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("sft_gold", {"iterations": 3}, "--method sft_gold fixes --iterations 1.*3 was given"),
        ("iterative_dpo", {"alpha": 5.0}, "--method iterative_dpo fixes --alpha 0.0"),
        ("star", {"loss": "dpo_nll_per_token"}, "--method star fixes --loss sft"),
    ],
)
def test_a_setting_that_contradicts_the_method_is_refused(method, change, message):
    with pytest.raises(UserError, match=message):
        profiles.get("cpu", method=method, **change)


def test_a_setting_that_repeats_what_the_method_fixes_is_accepted():
    assert profiles.get("cpu", method="iterative_dpo", alpha=0.0).alpha == 0
    assert profiles.get("cpu", method="sft_gold", iterations=1).iterations == 1


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_names_itself_its_source_and_fields_that_exist(name):
    method = methods.get(name)
    assert method.title and method.source
    assert methods.apply(profiles.get("smoke", method=name))
    assert method.start is None or method.start in methods.METHODS


def test_the_methods_of_the_paper_are_in_the_core():
    assert list(methods.METHODS)[: len(PAPERS)] == PAPERS


def test_an_unknown_method():
    with pytest.raises(UserError, match="no method 'ppo'.*irpo"):
        methods.get("ppo")


def test_few_shot_puts_worked_questions_before_each(task):
    train = task.load("train")
    few = few_shot.FewShot(task, [train[0], train[1]])
    prompt = few.prompt(train[2])
    assert prompt.endswith(task.prompt(train[2])) and train[0]["solution"] in prompt
    assert prompt.count("Question:") == 3
    assert few.extract("Final answer: 5") == "5" and few.name == "word_problems"
    with pytest.raises(UserError, match="no worked solutions"):
        few_shot.FewShot(task, [{"question": "x", "answer": "1"}])
