"""What each method makes of the same graded completions."""

import json
import random

import pytest
from datasets import Dataset

from irpo_utils import UserError, methods, models, profiles, tasks


def rows(*answers, gold="5"):
    return [{"extracted": answer, "correct": answer == gold} for answer in answers]


def test_verdicts():
    rng = random.Random(0)
    given = rows("5", "7", "7", None)
    assert methods.by_gold(given, rng) == [True, False, False, False]
    assert methods.by_majority(given, rng) == [False, True, True, False]
    assert methods.by_majority(rows(None, None), rng) == [False, False]
    assert methods.never(given, rng) == [False] * 4
    scored = [
        row | {"logprob": logprob, "n_tokens": 4}
        for row, logprob in zip(given, (-1.0, -8.0, -2.0, -4.0))
    ]
    assert methods.by_own_likelihood(scored, rng) == [True, False, True, False]
    many = [{"id": "a", "extracted": str(i), "correct": i == 5} for i in range(1000)] + rows(None)
    lucky = methods.by_luck(many, rng)
    assert (
        lucky[5]
        and not lucky[-1]
        and 200 < sum(lucky) < 300
        and lucky == methods.by_luck(many, rng)
    )
    drawn = [tuple(methods.by_lot(given, rng)) for _ in range(200)]
    assert (
        all(sum(row) == 1 for row in drawn) and len(set(drawn)) == 4
    )  # as many winners, at any place


@pytest.fixture(scope="module")
def graded():
    made = []
    for question, answers in (("a", "5577"), ("b", "7775"), ("c", "7777")):
        for i, answer in enumerate(answers):
            made.append(
                {
                    "id": question,
                    "sample": i,
                    "prompt": f"{question}?",
                    "completion": f"{question}{i} {answer}",
                    "prompt_ids": [1],
                    "completion_ids": [2, i],
                    "answer": "5",
                    "extracted": answer,
                    "correct": answer == "5",
                    "logprob": -1.0 - i,
                    "n_tokens": 2,
                }
            )
    return Dataset.from_list(made)


def build(name, graded, **settings):
    questions = [{"id": i, "solution": f"gold {i}", "question": f"{i}?"} for i in "abc"]
    p = methods.apply(profiles.get("smoke", method=name, k_pairs=4, **settings))
    tokenizer = models.load_tokenizer(str(models.SEED_MODEL))
    method = methods.get(name)
    return method.build(
        graded, questions, tasks.get("word_problems"), tokenizer, p, 0, method.verdict
    )


def test_the_methods_train_on_what_they_say(graded):
    made = {
        name: [(row["chosen"], row["rejected"]) for row in build(name, graded)[0]]
        for name in ("irpo", "shuffled", "self_consistency", "self_rewarding", "spin", "sft_gold")
    }
    assert made["irpo"] == [("a0 5", "a2 7"), ("a1 5", "a3 7")] * 2 + [
        ("b3 5", f"b{i} 7") for i in (0, 1, 2, 0)
    ]
    assert ("b0 7", "b3 5") in made["self_consistency"] and not any(
        winner.startswith("c") for winner, _ in made["self_consistency"]
    )
    assert {winner[1] for winner, _ in made["self_rewarding"]} == {"0", "1"}  # the likelier half
    assert {winner for winner, _ in made["spin"]} == {"gold a", "gold b", "gold c"} and len(
        made["spin"]
    ) == 12
    assert made["sft_gold"] == [(f"gold {i}", "") for i in "abc"]
    assert len(made["shuffled"]) == 8 and made["shuffled"] != made["irpo"]
    assert graded["correct"][:4] == [True, True, False, False]  # what is on disk stays true


def test_what_a_method_fixes_wins_over_the_profile():
    assert methods.apply(profiles.get("cpu", method="star")).dpo_weight == 0
    assert methods.apply(profiles.get("cpu", method="iterative_dpo", alpha=5.0)).alpha == 0
    assert methods.apply(profiles.get("cpu", method="few_shot")).iterations == 0


def test_twice_the_pairs_are_twice_those_of_the_profile_however_often_it_is_applied():
    assert methods.doubled(profiles.get("cpu", method="irpo_2x", k_pairs=3)).k_pairs == 6
    assert methods.doubled(profiles.get("cpu", method="irpo", k_pairs=3)).k_pairs == 3
    once = methods.apply(methods.doubled(profiles.get("cpu", method="star_2x", k_pairs=3)))
    assert methods.apply(once).k_pairs == once.k_pairs == 6


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if method.start])
def test_a_method_that_begins_with_another_says_so(name, tmp_path):
    from irpo_utils import iteration

    with pytest.raises(
        UserError, match="begins with M_1 of the method star.*--method star.*--start"
    ):
        iteration.run(profiles.get("smoke", method=name), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    methods.check_start(profiles.get("smoke", method=name, start="runs/star"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_names_itself_its_source_and_fields_that_exist(name):
    method = methods.get(name)
    assert method.title and method.source and methods.apply(profiles.get("smoke", method=name))
    assert method.start is None or method.start in methods.METHODS


def test_an_unknown_method():
    with pytest.raises(UserError, match="no method 'ppo'.*irpo"):
        methods.get("ppo")


def test_few_shot_puts_worked_questions_before_each():
    from irpo_utils.tasks.base import FewShot

    task = tasks.get("word_problems")
    train = task.load("train")
    few = FewShot(task, [train[0], train[1]])
    prompt = few.prompt(train[2])
    assert (
        prompt.endswith(task.prompt(train[2]))
        and train[0]["solution"] in prompt
        and prompt.count("Question:") == 3
    )
    assert few.extract("Final answer: 5") == "5" and few.name == "word_problems"
    with pytest.raises(UserError, match="no worked solutions"):
        FewShot(task, [{"question": "x", "answer": "1"}])


def test_reference_and_kept_pairs_and_a_probe_of_other_pairs(tmp_path):
    """The settings of ablations do what they say in a run of two iterations."""
    from datasets import load_from_disk

    from irpo_utils import iteration

    small = dict(
        n_questions=24,
        n_samples=4,
        k_pairs=2,
        n_eval_questions=10,
        eval_samples=2,
        eval_samples_ends=2,
        learning_rate=3e-3,
    )
    logs = {}
    for name, changes in {
        "plain": {},
        "start": dict(reference="start"),
        "kept": dict(keep_pairs=True),
        "probed": dict(
            iterations=1, probe=str(tmp_path / "plain/iteration_1/pairs"), probe_every=1
        ),
    }.items():
        iteration.run(
            profiles.get("smoke", **{**small, **changes}), tmp_path / name, progress=False
        )
        last = max((tmp_path / name).glob("iteration_*/training_log.jsonl"))
        logs[name] = [json.loads(line) for line in last.read_text().splitlines()]
    assert logs["plain"][0]["loss_dpo"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(logs["start"][0]["loss_dpo"] - 0.6931) > 1e-3 and logs["start"][0]["margin"] != 0
    pairs = [
        len(load_from_disk(str(tmp_path / "plain" / f"iteration_{t}" / "pairs"))) for t in (0, 1)
    ]
    tokens = {name: sum(row["tokens"] for row in logs[name]) for name in ("plain", "kept")}
    assert tokens["kept"] > tokens["plain"] and -(-sum(pairs) // 16) == len(logs["kept"])
    probe = [
        json.loads(line)
        for line in (tmp_path / "probed/iteration_1/adapter/probe_log.jsonl")
        .read_text()
        .splitlines()
    ]
    assert [row["step"] for row in probe] == list(range(len(logs["probed"]) + 1))
    assert {"logps_chosen", "logps_rejected"} <= set(probe[0])


def test_grpo_goes_through_the_same_loop_and_learns_from_the_rewards(tmp_path):
    import pandas

    from irpo_utils import iteration

    profile = profiles.get(
        "smoke",
        method="grpo",
        n_questions=32,
        n_samples=8,
        iterations=1,
        n_eval_questions=10,
        eval_samples=2,
        eval_samples_ends=2,
        learning_rate=1e-3,
        warmup_ratio=0.0,
    )
    iteration.run(profile, tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "iteration_1"
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(0 <= row["reward"] <= 1 and row["tokens"] > 500 for row in log)
    assert (
        not (tmp_path / "run" / "iteration_0" / "samples").exists()
        and (folder / "adapter" / "adapter_model.safetensors").exists()
    )
    table = pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert (
        set(table.method) == {"grpo"}
        and abs(table[table.metric == "kl_to_previous"].value.iloc[0]) > 1e-3
    )


def test_grpo_leaves_the_model_as_it_was():
    from irpo_utils import grpo

    model, tokenizer = models.load("seed")
    task = tasks.get("word_problems")
    profile = profiles.get("smoke", n_samples=4, batch_size=4, max_new_tokens=30)
    grpo.train(
        model, tokenizer, task.load("train").select(range(4)), task, profile, 0, progress=False
    )
    assert (
        set(model.peft_config) == {"default"} and "forward" not in model.get_base_model().__dict__
    )
    assert all(
        p.dtype.is_floating_point and p.element_size() == 4
        for p in model.parameters()
        if p.requires_grad
    )


def test_grpo_learns_the_same_in_smaller_micro_batches():
    from irpo_utils import grpo

    task, logs = tasks.get("word_problems"), {}
    for micro in (None, 1):  # 16 completions of a step at once, or two by two
        model, tokenizer = models.load("seed")
        profile = profiles.get(
            "smoke", n_samples=4, batch_size=4, max_new_tokens=40, micro_batch_size=micro
        )
        logs[micro] = grpo.train(
            model, tokenizer, task.load("train").select(range(12)), task, profile, 0, progress=False
        ).log.to_pandas()
    assert len(logs[1]) == 3 and logs[1].reward.max() > 0 and logs[1].loss.abs().max() > 1e-3
    for name in ("loss", "reward", "grad_norm", "tokens"):
        assert logs[1][name].to_list() == pytest.approx(
            logs[None][name].to_list(), rel=1e-3, abs=1e-5
        )
