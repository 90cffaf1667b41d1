"""Sampling against plain `generate` and against the model's own probabilities."""

import numpy as np
import pytest
import torch

from irpo_utils import UserError, models, sampling, tasks


@pytest.fixture(scope="module")
def loaded():
    return models.load("seed")


@pytest.fixture(scope="module")
def task():
    return tasks.get("word_problems")


@pytest.fixture(scope="module")
def questions(task):
    return task.load("validation").select(range(24))


def draw(loaded, questions, task, **settings):
    return sampling.sample(*loaded, questions, task, **{"max_new_tokens": 60, "progress": False, **settings})


def test_greedy_is_plain_generate_token_for_token(loaded, questions, task):
    model, tokenizer = loaded
    ours = draw(loaded, questions, task, n=1, temperature=0.0)
    for row in ours:
        ids = torch.tensor([row["prompt_ids"]])
        theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
        assert row["completion_ids"] == theirs[0, ids.shape[1]:].tolist()


def test_prompt_is_the_chat_template_round_the_tasks_prompt(loaded, questions, task):
    row = draw(loaded, questions.select([0]), task, n=1)[0]
    assert row["prompt"] == f"<|user|>{task.prompt(questions[0])}<|end|><|assistant|>"
    assert row["prompt_ids"] == loaded[1](row["prompt"], add_special_tokens=False).input_ids
    assert row["prompt_ids"].count(loaded[1].eos_token_id) == 1


def test_rows_come_in_the_order_of_the_questions(loaded, questions, task):
    samples = draw(loaded, questions, task, n=3)
    assert samples["id"][:] == [q["id"] for q in questions for _ in range(3)]
    assert samples["sample"][:] == [0, 1, 2] * len(questions)
    assert samples["answer"][:] == [q["answer"] for q in questions for _ in range(3)]


def test_a_completion_does_not_depend_on_its_batch(loaded, questions, task):
    """Any cut into chunks gives the same samples: that is what makes a run resumable and shardable."""
    whole = draw(loaded, questions, task, n=4, batch_size=96, seed=3)
    small = draw(loaded, questions, task, n=4, batch_size=4, seed=3)
    part = draw(loaded, questions.select([7, 2]), task, n=4, seed=3)
    assert whole["completion_ids"][:] == small["completion_ids"][:]
    assert part["completion_ids"][:4] == whole["completion_ids"][28:32]
    assert draw(loaded, questions, task, n=4, seed=4)["completion_ids"][:] != whole["completion_ids"][:]


def test_logprob_is_the_teacher_forced_one_at_temperature_1(loaded, questions, task):
    samples = draw(loaded, questions, task, n=4, temperature=1.7)
    model, _ = loaded
    for row in samples.select(range(0, 96, 7)):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        n = len(row["prompt_ids"])
        expected = sum(logps[n + i - 1, token].item() for i, token in enumerate(row["completion_ids"]))
        assert row["logprob"] == pytest.approx(expected, abs=1e-3)
    scored = models.score(*loaded, samples["prompt_ids"][:], samples["completion_ids"][:])
    assert np.allclose(scored, samples["logprob"][:], atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_first_two_tokens_are_distributed_as_the_model_says(loaded, questions, task, temperature):
    model, _ = loaded
    n = 3000
    samples = draw(loaded, questions.select([0]), task, n=n, batch_size=n, max_new_tokens=2, seed=11, temperature=temperature)
    prompt = samples[0]["prompt_ids"]
    with torch.no_grad():
        first = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature, -1).numpy()
    drawn = np.array([row[0] for row in samples["completion_ids"]])
    assert_frequencies(drawn, first)
    assert len(set(drawn.tolist())) > 5          # otherwise there would be little to compare
    common = int(np.bincount(drawn).argmax())
    with torch.no_grad():
        second = torch.softmax(model(input_ids=torch.tensor([[*prompt, common]])).logits[0, -1].double() / temperature, -1).numpy()
    assert_frequencies(np.array([row[1] for row in samples["completion_ids"] if row[0] == common]), second)


def assert_frequencies(drawn, probabilities):
    """Within four standard errors for every token of which at least five are expected, and for all others together."""
    common = np.flatnonzero(probabilities * len(drawn) >= 5)
    for tokens in [[token] for token in common] + [np.setdiff1d(np.arange(len(probabilities)), common)]:
        p = probabilities[tokens].sum()
        assert abs(np.isin(drawn, tokens).mean() - p) <= 4 * np.sqrt(max(p * (1 - p), 1 / len(drawn)) / len(drawn))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.4)])
def test_next_tokens_follows_temperature_and_nucleus(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -float("inf")])
    p = np.exp(logits.double().numpy() / temperature)
    p /= p.sum()
    kept = np.zeros_like(p)
    for i in np.argsort(-p):                            # the definition, one token at a time
        if kept.sum() < top_p:
            kept[i] = p[i]
    kept /= kept.sum()
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    tokens = sampling.next_tokens(logits.expand(len(u), -1), u, temperature, top_p).numpy()
    assert np.allclose(np.bincount(tokens, minlength=5) / len(u), kept, atol=1e-4)


def test_a_uniform_number_next_to_one_never_draws_an_impossible_token():
    logits = torch.tensor([[0.0, 0.0, -float("inf")]])
    assert sampling.next_tokens(logits, torch.tensor([1 - 1e-12], dtype=torch.float64), 1.0, 1.0).item() == 1


def test_eos_is_there_only_if_it_was_sampled(loaded, questions, task):
    eos = loaded[1].eos_token_id
    samples = draw(loaded, questions, task, n=4, max_new_tokens=12)
    assert any(samples["finished"]) and not all(samples["finished"])
    for row in samples:
        assert (row["completion_ids"][-1] == eos) == row["finished"]
        assert eos not in row["completion_ids"][:-1]
        assert row["n_tokens"] == len(row["completion_ids"]) <= 12
        assert row["finished"] or row["n_tokens"] == 12
        assert "<|" not in row["completion"]


def test_text_of_other_scripts_and_control_characters_can_be_read(loaded, task):
    from datasets import Dataset
    odd = Dataset.from_list([{"id": "a", "question": "Ωμέγα 数学 \x00\x07 \u202e🙂", "answer": "1"}])
    assert len(draw(loaded, odd, task, n=2)) == 2


@pytest.mark.parametrize("settings, message", [
    (dict(n=0), "n = 0"), (dict(temperature=-1), "temperature"), (dict(top_p=0), "top_p"), (dict(top_p=1.5), "top_p"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(max_new_tokens=5000), "context of 1024"),
])
def test_settings_out_of_range_are_refused(loaded, questions, task, settings, message):
    with pytest.raises(UserError, match=message):
        draw(loaded, questions, task, **settings)


def test_no_questions_is_refused(loaded, questions, task):
    with pytest.raises(UserError, match="no questions"):
        draw(loaded, questions.select([]), task)
