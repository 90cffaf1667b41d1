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
    return sampling.sample(
        *loaded, questions, task, **{"max_new_tokens": 60, "progress": False, **settings}
    )


def test_greedy_is_plain_generate_token_for_token(loaded, questions, task):
    model, tokenizer = loaded
    ours = draw(loaded, questions, task, n=1, temperature=0.0)
    for row in ours:
        ids = torch.tensor([row["prompt_ids"]])
        theirs = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
        )
        assert row["completion_ids"] == theirs[0, ids.shape[1] :].tolist()


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
    assert (
        draw(loaded, questions, task, n=4, seed=4)["completion_ids"][:]
        != whole["completion_ids"][:]
    )


def test_rows_that_take_turns_never_run_out_of_memory_for_their_keys(loaded, task, monkeypatch):
    """While hardly any row is free, columns go on being taken: those of rows long gone have to be dropped in time."""
    questions, settings = (
        task.load("validation").select(range(60)),
        dict(n=1, max_new_tokens=30, seed=5, temperature=1.5),
    )
    expected = draw(loaded, questions, task, batch_size=1, **settings)
    monkeypatch.setattr(sampling, "ROOM", 1)
    for share, size in ((1 / 4, 16), (3 / 8, 8)):
        monkeypatch.setattr(sampling, "FREE_SHARE", share)
        assert (
            draw(loaded, questions, task, batch_size=size, **settings)["completion_ids"][:]
            == expected["completion_ids"][:]
        )


def test_logprob_is_the_teacher_forced_one_at_temperature_1(loaded, questions, task):
    samples = draw(loaded, questions, task, n=4, temperature=1.7)
    model, _ = loaded
    for row in samples.select(range(0, 96, 7)):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        n = len(row["prompt_ids"])
        expected = sum(
            logps[n + i - 1, token].item() for i, token in enumerate(row["completion_ids"])
        )
        assert row["logprob"] == pytest.approx(expected, abs=1e-3)
    scored = models.score(*loaded, samples["prompt_ids"][:], samples["completion_ids"][:])
    assert np.allclose(scored, samples["logprob"][:], atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_first_two_tokens_are_distributed_as_the_model_says(loaded, questions, task, temperature):
    model, _ = loaded
    n = 3000
    samples = draw(
        loaded,
        questions.select([0]),
        task,
        n=n,
        batch_size=n,
        max_new_tokens=2,
        seed=11,
        temperature=temperature,
    )
    prompt = samples[0]["prompt_ids"]
    with torch.no_grad():
        first = torch.softmax(
            model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature, -1
        ).numpy()
    drawn = np.array([row[0] for row in samples["completion_ids"]])
    assert_frequencies(drawn, first)
    assert len(set(drawn.tolist())) > 5  # otherwise there would be little to compare
    common = int(np.bincount(drawn).argmax())
    with torch.no_grad():
        second = torch.softmax(
            model(input_ids=torch.tensor([[*prompt, common]])).logits[0, -1].double() / temperature,
            -1,
        ).numpy()
    assert_frequencies(
        np.array([row[1] for row in samples["completion_ids"] if row[0] == common]), second
    )


def assert_frequencies(drawn, probabilities):
    """Within four standard errors for every token of which at least five are expected, and for all others together."""
    common = np.flatnonzero(probabilities * len(drawn) >= 5)
    for tokens in [[token] for token in common] + [
        np.setdiff1d(np.arange(len(probabilities)), common)
    ]:
        p = probabilities[tokens].sum()
        assert abs(np.isin(drawn, tokens).mean() - p) <= 4 * np.sqrt(
            max(p * (1 - p), 1 / len(drawn)) / len(drawn)
        )


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.4)])
def test_next_tokens_follows_temperature_and_nucleus(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -float("inf")])
    p = np.exp(logits.double().numpy() / temperature)
    p /= p.sum()
    kept = np.zeros_like(p)
    for i in np.argsort(-p):  # the definition, one token at a time
        if kept.sum() < top_p:
            kept[i] = p[i]
    kept /= kept.sum()
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    tokens = sampling.next_tokens(logits.expand(len(u), -1), u, temperature, top_p).numpy()
    assert np.allclose(np.bincount(tokens, minlength=5) / len(u), kept, atol=1e-4)


def test_a_uniform_number_next_to_one_never_draws_an_impossible_token():
    logits = torch.tensor([[0.0, 0.0, -float("inf")]])
    assert (
        sampling.next_tokens(
            logits, torch.tensor([1 - 1e-12], dtype=torch.float64), 1.0, 1.0
        ).item()
        == 1
    )


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

    odd = Dataset.from_list(
        [{"id": "a", "question": "Ωμέγα 数学 \x00\x07 \u202e🙂", "answer": "1"}]
    )
    assert len(draw(loaded, odd, task, n=2)) == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n=0), "n = 0"),
        (dict(temperature=-1), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=5000), "context of 1024"),
    ],
)
def test_settings_out_of_range_are_refused(loaded, questions, task, settings, message):
    with pytest.raises(UserError, match=message):
        draw(loaded, questions, task, **settings)


def test_no_questions_is_refused(loaded, questions, task):
    with pytest.raises(UserError, match="no questions"):
        draw(loaded, questions.select([]), task)


def tiny(kind, tmp_path):
    """A model of random weights of another family than the seed model's, with the seed model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.SEED_MODEL)
    changes = {
        "gemma3_text": {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "qwen3": {"head_dim": 16},
    }.get(kind, {})
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return models.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_greedy_of_other_families_is_plain_generate(kind, task, questions, tmp_path):
    """With grouped heads, with a sliding window shorter than the text, and with rows refilled while others go on."""
    model, tokenizer = tiny(kind, tmp_path)
    ours = sampling.sample(
        model,
        tokenizer,
        questions,
        task,
        n=1,
        temperature=0.0,
        max_new_tokens=30,
        batch_size=6,
        progress=False,
    )
    for row in ours:
        ids = torch.tensor([row["prompt_ids"]])
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=30,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert row["completion_ids"] == theirs[0, ids.shape[1] :].tolist()


def test_samples_do_not_depend_on_the_number_of_cores(loaded, questions, task):
    """One loop per core, each with its share of the questions.

    Batches of other sizes are rounded otherwise, in the fifth or sixth digit. Where the random number of a draw falls so
    near to the border between two words, the completion may go another way: at most once or twice here.
    """
    threads = torch.get_num_threads()
    try:
        found = []
        for cores in (1, 2, 3):
            torch.set_num_threads(cores)
            found.append(draw(loaded, questions, task, n=4, batch_size=24)["completion_ids"][:])
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same = [a == b for a, b in zip(found[0], other, strict=True)]
        assert sum(same) >= 0.98 * len(same)


def test_an_error_in_one_loop_reaches_the_caller_and_ends_the_others(
    loaded, questions, task, monkeypatch
):
    def fail(*arguments):
        raise RuntimeError("no uniform numbers today")

    monkeypatch.setattr(sampling, "_uniforms", fail)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="today"):
        draw(loaded, questions, task, n=4)
    assert torch.get_num_threads() == threads


def test_every_row_is_used_again_while_questions_wait(loaded, questions, task, monkeypatch):
    """Steps of the whole batch stay near the number of tokens over the number of rows: no row idles while work waits."""
    model, _ = loaded
    widths = []
    forward = type(model).forward

    def counting(self, *arguments, **options):
        widths.append(tuple(options["input_ids"].shape))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = draw(loaded, questions, task, n=8, batch_size=32, seed=5)
    finally:
        torch.set_num_threads(threads)
    computed = sum(rows for rows, columns in widths if columns == 1)
    prefilled = sum(rows for rows, columns in widths if columns > 1)
    assert prefilled == len(questions)  # each prompt once, not once per sample
    assert sum(samples["n_tokens"]) <= computed < 1.6 * sum(samples["n_tokens"])
    lengths = samples["n_tokens"][:]
    assert computed < 0.8 * sum(
        32 * max(lengths[i : i + 32]) for i in range(0, len(lengths), 32)
    )  # if each batch waited


def test_multiplied_out_gives_the_same_numbers_and_leaves_no_trace(loaded, questions, task):
    model, _ = loaded
    ids = torch.tensor([draw(loaded, questions.select([0]), task, n=1)[0]["prompt_ids"]])
    lora = [p for name, p in model.named_parameters() if "lora_B" in name]
    kept = [p.data.clone() for p in lora]
    try:
        torch.manual_seed(0)
        for p in lora:
            p.data.normal_(std=0.05)
        layers = {name: id(module) for name, module in model.named_modules()}
        with torch.no_grad():
            apart = model(input_ids=ids).logits
            with models.multiplied_out(model):
                together = model(input_ids=ids).logits
                assert not any("lora_A" in name for name, _ in model.named_modules())
            assert {name: id(module) for name, module in model.named_modules()} == layers
            assert torch.equal(model(input_ids=ids).logits, apart)
            for p, old in zip(lora, kept):
                p.data.copy_(old)
            assert not torch.allclose(
                model(input_ids=ids).logits, apart, atol=1e-2
            )  # the adapter did matter
        assert torch.allclose(apart, together, atol=1e-4)
    finally:
        for p, old in zip(lora, kept):
            p.data.copy_(old)


def test_out_of_memory_means_fewer_at_once_and_the_same_completions(
    loaded, questions, task, monkeypatch
):
    expected = draw(loaded, questions, task, n=4, batch_size=48)
    real, sizes, calls = sampling.next_tokens, [], []

    def next_tokens(logits, *args):
        calls.append(len(logits))
        if len(logits) > 16 and len(calls) > 25:  # some completions are there by then
            sizes.append(len(logits))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(logits, *args)

    monkeypatch.setattr(sampling, "next_tokens", next_tokens)
    found = draw(loaded, questions, task, n=4, batch_size=48)
    assert (
        sizes
        and found["completion_ids"][:] == expected["completion_ids"][:]
        and found["id"][:] == expected["id"][:]
    )


def test_out_of_memory_with_one_question_says_what_to_lower(loaded, questions, task, monkeypatch):
    def next_tokens(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(sampling, "next_tokens", next_tokens)
    with pytest.raises(UserError, match="4 completions of a single question.*--n-samples"):
        draw(loaded, questions, task, n=4, batch_size=16)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_numbers_are_not_finite_is_refused(questions, task, temperature):
    model, tokenizer = models.load("seed")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(UserError, match="not finite.*--dtype"):
        sampling.sample(
            model,
            tokenizer,
            questions,
            task,
            n=1,
            temperature=temperature,
            max_new_tokens=4,
            progress=False,
        )
