"""The loss against an independent implementation, the trainer against both, and QLoRA against its dequantised twin."""

import copy
import json
import math
import os
import re

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from datasets import Dataset

from irpo_utils import UserError, models, training


def loss_in_numpy(chosen, rejected, ref_chosen, ref_rejected, lengths, alpha, beta):
    """Eq. 1 written anew: plain numpy float64, one pair at a time, the sigmoid spelled out."""
    total = []
    for w, l, rw, rl, n in zip(chosen, rejected, ref_chosen, ref_rejected, lengths):
        h = beta * (np.float64(w) - rw) - beta * (np.float64(l) - rl)
        dpo = np.log1p(np.exp(-h)) if h > 0 else -h + np.log1p(np.exp(h))
        total.append(dpo - alpha * w / n)
    return np.array(total)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.1), (0.25, 1.0), (5.0, 0.5), (0.0, 0.1)])
def test_loss_equals_an_independent_implementation_in_float64(alpha, beta):
    rng = np.random.default_rng(0)
    values = -rng.uniform(0, 400, size=(4, 64))
    lengths = rng.integers(1, 300, size=64)
    dpo, nll = training.dpo_nll_loss(
        *map(torch.from_numpy, values), torch.from_numpy(lengths), alpha=alpha, beta=beta
    )
    expected = loss_in_numpy(*values, lengths, alpha, beta)
    assert torch.allclose(dpo + alpha * nll, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_gradients_equal_the_derivatives_of_equation_1():
    rng = np.random.default_rng(1)
    w, l, rw, rl = (torch.from_numpy(-rng.uniform(5, 60, size=16)) for _ in range(4))
    n, alpha, beta = torch.from_numpy(rng.integers(3, 40, size=16)), 0.7, 0.3
    w.requires_grad_(), l.requires_grad_()
    dpo, nll = training.dpo_nll_loss(w, l, rw, rl, n, alpha=alpha, beta=beta)
    (dpo + alpha * nll).sum().backward()
    s = 1 / (1 + np.exp((beta * ((w - rw) - (l - rl))).detach().numpy()))  # σ(-h)
    assert np.allclose(w.grad.numpy(), -beta * s - alpha / n.numpy(), atol=1e-6)
    assert np.allclose(l.grad.numpy(), beta * s, atol=1e-6)


def test_each_nll_is_divided_by_its_own_length():
    """The paper's normaliser; over all tokens of the batch the long winner would weigh five times as much."""
    zero = torch.zeros(2)
    _, nll = training.dpo_nll_loss(
        torch.tensor([-60.0, -300.0]), zero, zero, zero, torch.tensor([60, 300]), alpha=1, beta=0.1
    )
    assert nll.tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def loaded():
    return models.load("seed")


@pytest.fixture()
def model(loaded):
    """The seed model with a zero adapter, whatever a test before did to it."""
    models.set_adapter(loaded[0], None)
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def preferences(tokenizer):
    """Eleven pairs of unequal lengths; eleven is a multiple of no micro-batch but one."""
    from irpo_utils.sampling import render_prompt

    rows = []
    for i in range(11):
        prompt = render_prompt(
            tokenizer,
            f"Question: Mia has {i + 12} shells. {'Mia finds 5 more. ' * (i % 4)}How many?\nSolution:",
        )
        chosen = (
            "".join(f"{i + 12 + 5 * j}+5={i + 17 + 5 * j}\n" for j in range(i % 4))
            + f"Final answer: {i + 12 + 5 * (i % 4)}"
        )
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        rows.append(
            {
                "prompt_ids": encode(prompt),
                "chosen_ids": encode(chosen) + [tokenizer.eos_token_id],
                "rejected_ids": encode(f"Final answer: {i}")
                + ([tokenizer.eos_token_id] if i % 2 else []),
            }
        )
    return Dataset.from_list(rows)


def logp_one_by_one(model, prompt, response):
    """Log-probability of a response with no batching, no padding and no helper of the package."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids).logits[0].double()
    return sum(
        torch.log_softmax(logits[len(prompt) + i - 1], -1)[token]
        for i, token in enumerate(response)
    )


def expected_loss(model, preferences, reference, alpha, beta):
    total = 0
    for row, (rw, rl) in zip(preferences, reference):
        w = logp_one_by_one(model, row["prompt_ids"], row["chosen_ids"])
        l = logp_one_by_one(model, row["prompt_ids"], row["rejected_ids"])
        h = beta * ((w - rw) - (l - rl))
        total = total + torch.log1p(torch.exp(-h)) - alpha * w / len(row["chosen_ids"])
    return total / len(preferences)


def reference_of(model, preferences):
    with torch.no_grad():
        return [
            (
                logp_one_by_one(model, r["prompt_ids"], r["chosen_ids"]).item(),
                logp_one_by_one(model, r["prompt_ids"], r["rejected_ids"]).item(),
            )
            for r in preferences
        ]


def plain_training(model, preferences, reference, steps, learning_rate, alpha, beta, warmup):
    """Full-batch training spelled out with AdamW: losses before each step, and the first gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses, first = [], None
    for step in range(steps):
        loss = expected_loss(model, preferences, reference, alpha, beta)
        losses.append(loss.item())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        first = norm.item() if first is None else first
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warmup)
        optimizer.step(), optimizer.zero_grad()
    return losses, first


@pytest.mark.parametrize("micro_batch_size", [1, 4, None])
def test_trainer_minimises_equation_1_whatever_the_micro_batch(
    model, tokenizer, preferences, micro_batch_size
):
    twin = copy.deepcopy(model)
    training._fresh_adapter(twin, seed=5)
    reference = reference_of(twin, preferences)
    expected, norm = plain_training(twin, preferences, reference, 4, 1e-3, 1.0, 0.1, warmup=1)

    # 12 and not 11 pairs a batch: eleven pairs then are micro-batches of 1 x 11, 4 + 4 + 3, or 11
    result = training.train(
        model,
        tokenizer,
        preferences,
        alpha=1.0,
        beta=0.1,
        learning_rate=1e-3,
        epochs=4,
        batch_size=12,
        micro_batch_size=micro_batch_size,
        warmup_ratio=0.25,
        lr_scheduler="constant_with_warmup",
        seed=5,
        progress=False,
    )
    assert np.allclose(result.log["loss"][:], expected, rtol=0, atol=1e-4)
    assert result.log["grad_norm"][0] == pytest.approx(norm, rel=1e-4)
    assert (
        expected[-1] < expected[0] - 0.01
    )  # something was learnt, so that the comparison means something


@pytest.mark.parametrize("share_prompt", [True, False])
def test_gradients_of_the_trainers_loss_equal_those_of_the_independent_one(
    model, tokenizer, preferences, share_prompt
):
    """Every LoRA gradient, and not the norm alone, from the trainer's own collator and loss."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter.data, std=0.02, generator=torch.Generator().manual_seed(4)
            )
    reference = [
        (w - 0.5, l + 0.25) for w, l in reference_of(model, preferences)
    ]  # not M_t: the DPO term then counts
    model.zero_grad()
    expected_loss(model, preferences, reference, 0.7, 0.3).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    data = (
        preferences.add_column("ref_chosen_logps", [w for w, _ in reference])
        .add_column("ref_rejected_logps", [l for _, l in reference])
        .add_column("length", [1] * len(preferences))
    )
    config = training.DPOConfig(
        output_dir="unused",
        beta=0.3,
        report_to="none",
        save_strategy="no",
        max_length=None,
        precompute_ref_log_probs=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    with training.left_as_it_was(model):
        trainer = training.IterativeRPOTrainer(
            model,
            config,
            data,
            tokenizer,
            alpha=0.7,
            dpo_weight=1.0,
            nll_per="sequence",
            share_prompt=share_prompt,
            callbacks=[],
        )
        model.zero_grad()
        for rows in (
            data.to_list()[:3],
            data.to_list()[3:],
        ):  # two micro-batches of one batch of eleven pairs
            trainer.compute_loss(model, trainer._collate(rows), num_items_in_batch=11).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-5), name
    assert max(g.abs().max() for g in expected.values()) > 1e-2


def test_a_trainer_that_fails_to_start_leaves_the_model_as_it_was(
    model, tokenizer, preferences, monkeypatch
):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no logger")

    with monkeypatch.context() as m:
        m.setattr("transformers.Trainer.create_accelerator_and_postprocess", fail)
        with pytest.raises(RuntimeError, match="no logger"):
            training.train(model, tokenizer, preferences, progress=False)
    assert (
        set(model.peft_config) == {"default"} and "forward" not in model.get_base_model().__dict__
    )
    training.train(model, tokenizer, preferences, learning_rate=1e-4, progress=False)


def test_micro_batches_do_not_change_training_over_several_batches(model, tokenizer, preferences):
    """Eleven pairs in batches of four: the last batch has three, the batches are grouped by length."""
    logs = []
    for micro_batch_size in (1, 2, 4):
        models.set_adapter(model, None)
        logs.append(
            training.train(
                model,
                tokenizer,
                preferences,
                learning_rate=1e-3,
                epochs=2,
                batch_size=4,
                seed=2,
                micro_batch_size=micro_batch_size,
                progress=False,
            ).log
        )
    for key in ("loss", "loss_dpo", "loss_nll", "logps_chosen", "margin", "grad_norm", "tokens"):
        assert len(logs[0]) == 6 and np.allclose(
            logs[0][key][:], logs[2][key][:], rtol=0, atol=1e-4
        ), key
        assert np.allclose(logs[1][key][:], logs[2][key][:], rtol=0, atol=1e-4), key


def test_the_prompt_is_computed_once_or_twice_with_the_same_result(model, tokenizer, preferences):
    logs = []
    for share_prompt in (True, False):
        models.set_adapter(model, None)
        logs.append(
            training.train(
                model,
                tokenizer,
                preferences,
                learning_rate=1e-3,
                epochs=3,
                batch_size=4,
                seed=2,
                share_prompt=share_prompt,
                progress=False,
            ).log
        )
    for key in ("loss", "logps_chosen", "logps_rejected", "grad_norm"):
        assert np.allclose(logs[0][key][:], logs[1][key][:], rtol=0, atol=1e-4), key


def test_dpo_term_is_ln_2_at_the_first_step_of_every_iteration_and_not_later(
    model, tokenizer, preferences
):
    for _ in range(2):  # the second time the adapter is not zero, and is its own reference
        log = training.train(
            model, tokenizer, preferences, learning_rate=1e-3, epochs=4, progress=False
        ).log
        assert log["loss_dpo"][0] == pytest.approx(math.log(2), abs=1e-5)
        assert log["loss_dpo"][-1] < 0.65


def test_no_trace_of_the_trainer_stays_on_the_model(model, tokenizer, preferences):
    training.train(model, tokenizer, preferences, learning_rate=1e-4, progress=False)
    assert set(model.peft_config) == {"default"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert "forward" not in model.get_base_model().__dict__


def test_small_steps_are_not_rounded_away(model, tokenizer, preferences):
    """With the adapter in bf16, as TRL casts it, a step of 1e-6 would change next to nothing."""
    training._fresh_adapter(model, seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    for _ in range(2):  # lora_A has no gradient before lora_B has left zero
        training.train(
            model, tokenizer, preferences, learning_rate=1e-6, warmup_ratio=0.0, progress=False
        )
    moved = [
        (p != before[n]).float().mean().item() for n, p in model.named_parameters() if n in before
    ]
    assert np.mean(moved) > 0.9


def test_sft_raises_only_the_winners(model, tokenizer, preferences):
    result = training.train(
        model,
        tokenizer,
        preferences,
        dpo_weight=0.0,
        alpha=1.0,
        learning_rate=1e-3,
        epochs=6,
        progress=False,
    )
    assert np.allclose(result.log["loss"][:], result.log["loss_nll"][:], atol=1e-6)
    assert result.log["nll_chosen"][-1] < result.log["nll_chosen"][0]
    assert not set(training.OF_REFERENCE) & set(
        result.log.column_names
    )  # SFT has no reference, and scores none


def test_probe_measures_fixed_pairs_while_other_pairs_are_trained_on(model, tokenizer, preferences):
    probe = preferences.select([0, 3])
    expected = [logp_one_by_one(model, r["prompt_ids"], r["chosen_ids"]).item() for r in probe]
    result = training.train(
        model,
        tokenizer,
        preferences.select(range(4, 11)),
        learning_rate=1e-3,
        epochs=5,
        probe=probe,
        probe_every=2,
        progress=False,
    )
    assert result.probe_log["step"][:] == [0, 2, 4, 5]
    assert result.probe_log["logps_chosen"][0] == pytest.approx(np.mean(expected), abs=1e-3)
    assert result.probe_log["logps_chosen"][-1] != result.probe_log["logps_chosen"][0]


def test_gradients_through_nf4_equal_those_of_the_dequantised_twin(model, preferences):
    training._fresh_adapter(model, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter.data, std=0.02, generator=torch.Generator().manual_seed(4)
            )
    twin = copy.deepcopy(model)
    layers = [
        (name, layer)
        for name, layer in twin.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]
    assert len(layers) == 28  # seven linear layers in each of four blocks
    for name, layer in layers:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, plain)
    reference = reference_of(model, preferences)
    for m in (model, twin):
        m.zero_grad()
        expected_loss(m, preferences.select(range(4)), reference, 1.0, 0.1).backward()
    twins = dict(twin.named_parameters())
    compared = [(p.grad, twins[n].grad) for n, p in model.named_parameters() if p.requires_grad]
    assert len(compared) == 56 and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in compared
    )
    assert max(a.abs().max() for a, _ in compared) > 1e-3


def test_trl_still_averages_the_nll_over_all_tokens():
    """Why the trainer has a loss of its own. When this fails, TRL has changed: see whether its loss is now Eq. 1."""
    import inspect

    from trl import DPOTrainer

    assert "chosen_per_token_logps[chosen_mask.bool()].mean()" in inspect.getsource(
        DPOTrainer._compute_loss
    )


def test_same_seed_same_adapter(model, tokenizer, preferences):
    weights = []
    for _ in range(2):
        models.set_adapter(model, None)
        training.train(
            model,
            tokenizer,
            preferences,
            learning_rate=1e-3,
            epochs=2,
            batch_size=4,
            seed=9,
            progress=False,
        )
        weights.append(
            {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(alpha=-1.0), "alpha"),
        (dict(alpha=0.0, dpo_weight=0.0), "not both 0"),
        (dict(nll_per="batch"), "nll_per"),
        (dict(batch_size=6, micro_batch_size=4), "multiple"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, tokenizer, preferences, change, message):
    with pytest.raises(UserError, match=message):
        training.train(model, tokenizer, preferences, progress=False, **change)


def test_pairs_without_ids_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="chosen_ids"):
        training.train(model, tokenizer, Dataset.from_list([{"prompt_ids": [1]}]), progress=False)


def test_a_loss_that_is_not_finite_stops_training(model, tokenizer, preferences):
    broken = preferences.select(range(4))
    with pytest.raises(UserError, match="Training stopped at step"):
        training.train(model, tokenizer, broken, beta=float("nan"), progress=False)


def out_of_memory_above(monkeypatch, limit):
    """The trainer's loss, which runs out of memory half-way through the backward pass of more than `limit` pairs."""
    real, tried = training.IterativeRPOTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        pairs = len(inputs["ref_chosen"])
        tried.append(pairs)
        loss = real(self, model, inputs, *args, **kwargs)
        if pairs > limit:
            loss.backward()  # gradients and a row of the log are there already
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(training.IterativeRPOTrainer, "compute_loss", compute_loss)
    return tried


@pytest.mark.parametrize("share_prompt", [True, False])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(
    model, tokenizer, preferences, monkeypatch, share_prompt
):
    settings = dict(
        learning_rate=1e-3, batch_size=8, epochs=2, progress=False, share_prompt=share_prompt
    )
    expected = training.train(model, tokenizer, preferences, **settings)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    models.set_adapter(model, None)
    with monkeypatch.context() as context:
        tried = out_of_memory_above(context, 3)
        found = training.train(model, tokenizer, preferences, **settings)
    assert tried[:4] == [8, 4, 2, 2] and 8 not in tried[1:] and max(tried[2:]) <= 3
    for name in ("loss", "loss_dpo", "loss_nll", "grad_norm", "margin"):
        assert found.log[name][:] == pytest.approx(expected.log[name][:], rel=1e-4, abs=1e-6), name
    assert found.log["tokens"][:] == expected.log["tokens"][:]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter, weights[name], atol=1e-5), name


def test_out_of_memory_with_one_pair_says_what_to_lower(model, tokenizer, preferences, monkeypatch):
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(
        UserError,
        match="micro-batch of 1 pair,.*the same command goes on with --gradient-checkpointing true or a "
        "larger card.*--max-length",
    ):
        training.train(model, tokenizer, preferences, batch_size=4, progress=False)


def test_gradient_checkpointing_gives_the_same_adapter_and_leaves_no_hooks(
    model, tokenizer, preferences
):
    embedding = model.get_input_embeddings()
    hooks = len(embedding._forward_hooks)
    expected = training.train(model, tokenizer, preferences, learning_rate=1e-3, progress=False)
    models.set_adapter(model, None)
    found = training.train(
        model,
        tokenizer,
        preferences,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        progress=False,
    )
    assert found.log["loss"][:] == pytest.approx(expected.log["loss"][:], rel=1e-5)
    assert found.log["grad_norm"][:] == pytest.approx(expected.log["grad_norm"][:], rel=1e-4)
    assert (
        len(embedding._forward_hooks) == hooks
        and not model.get_base_model().is_gradient_checkpointing
    )


def test_a_logger_finds_the_training_in_the_folder_that_is_named(
    model, tokenizer, preferences, tmp_path
):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = training.train(
        model,
        tokenizer,
        preferences,
        batch_size=4,
        report_to="tensorboard",
        log_dir=tmp_path / "logs",
        progress=False,
    )
    [events] = (tmp_path / "logs").rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events.parent)).Reload()
    assert [round(e.value, 5) for e in read.Scalars("train/loss_dpo")] == [
        round(x, 5) for x in result.log["loss_dpo"]
    ]


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 2.0, "dpo_weight": 0.0},
        {"epochs": 3.0, "batch_size": 3},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"epochs": 9.0, "learning_rate": 1e-2, "alpha": 0.0},
    ],
)
def test_training_that_was_killed_goes_on_to_the_same_weights(
    preferences, tmp_path, monkeypatch, options
):
    """From the newest sound checkpoint: one that was damaged or half written is passed over."""
    probe, settings = (
        preferences.select(range(4)),
        dict(learning_rate=1e-3, batch_size=4, seed=3, progress=False, probe_every=2) | options,
    )

    def trained(**more):
        model, tokenizer = models.load("seed")
        return training.train(model, tokenizer, preferences, probe=probe, **settings, **more)

    whole = trained()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 1e9)
    steps, folder = len(whole.log), tmp_path / "unfinished"
    kill_at, log = max(3, steps - 1), training.Watch.on_log

    def dying(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        for path in folder.glob("checkpoint-*"):  # a clock that is set back an hour at every step
            os.utime(path, (1.7e9 - 3600 * int(path.name.partition("-")[2]),) * 2)
        if state.global_step == kill_at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Watch, "on_log", dying)
        trained(checkpoints=folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != "reference")
    assert sorted(names) == sorted(
        f"checkpoint-{kill_at - i}" for i in (1, 2)
    )  # the newest; disk space does not grow
    newest = training.newest_checkpoint(folder)
    weights = next(
        path for path in (folder / newest).iterdir() if path.name == "adapter_model.safetensors"
    )
    weights.write_bytes(weights.read_bytes()[:-1])
    assert training.newest_checkpoint(folder) not in (None, newest)
    scored = []
    monkeypatch.setattr(training, "reference_logps", lambda *arguments: scored.append(arguments))
    again = trained(checkpoints=folder)
    assert not scored  # nor is the reference computed a second time
    assert [row["step"] for row in again.log] == list(range(1, steps + 1))
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(again.log) == drop(whole.log) and drop(again.probe_log) == drop(whole.probe_log)
    assert again.warnings == whole.warnings and bool(whole.warnings) == (
        settings["learning_rate"] > 1e-3
    )
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_log_that_shows_a_collapse_is_named_and_a_healthy_one_is_not():
    healthy = [{"accuracy": 0.8, "logratio_chosen": 0.5}] * 30
    assert training.collapse_signs(healthy, 30) == []
    falling = healthy + [{"accuracy": 0.9, "logratio_chosen": -3.0}] * 10
    assert [text.split(":")[0] for text in training.collapse_signs(falling, 40)] == [
        "winners lose probability"
    ]
    losing = healthy + [{"accuracy": 0.3, "logratio_chosen": 0.5}] * 10
    assert [text.split(":")[0] for text in training.collapse_signs(losing, 40)] == [
        "losers gain on winners"
    ]
    assert training.collapse_signs(falling[-10:], 400) == []  # too early to tell
    assert training.collapse_signs([{"nll_chosen": 1.0}] * 40, 40) == []  # SFT has no reference


def test_a_collapse_is_named_while_it_happens(model, tokenizer, preferences, capsys):
    """At the step that shows it, not at the end, which a collapse may not reach."""
    told = []

    class Stopped(Exception):
        pass

    def stop(warning):
        told.append(warning)
        raise Stopped

    with pytest.raises(Stopped):
        training.train(
            model,
            tokenizer,
            preferences,
            learning_rate=1e-2,
            alpha=0.0,
            epochs=30.0,
            batch_size=4,
            progress=False,
            warn=stop,
        )
    step = int(re.search(r"\(step (\d+)\)", told[0])[1])
    assert (
        "winners lose probability" in told[0]
        and 18 <= step < 60
        and told[0] in "".join(capsys.readouterr())
    )


def test_numbers_that_are_not_finite_leave_the_batch_to_look_at(
    model, loaded, preferences, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        training, "dpo_nll_loss", lambda chosen, *rest, **options: (chosen * float("nan"), chosen)
    )
    with pytest.raises(
        UserError,
        match="Training stopped at step 1.*The pairs of that step are in .*not_finite.json",
    ):
        training.train(
            model,
            loaded[1],
            preferences,
            batch_size=4,
            micro_batch_size=2,
            progress=False,
            checkpoints=tmp_path / "kept",
        )
    rows = json.loads((tmp_path / "kept" / "not_finite.json").read_text())
    assert len(rows) == 4 and all(
        "Question" in row["texts"][0] and "Final answer" in row["texts"][0] for row in rows
    )
    assert all(float(row["logps_chosen"]) < 0 for row in rows)


def test_a_reference_that_is_not_the_model_at_the_start_is_refused(
    model, tokenizer, preferences, monkeypatch
):
    real = training.reference_logps

    def of_another(*arguments):
        chosen, rejected = real(*arguments)
        return [value + 0.1 * (i + 1) for i, value in enumerate(chosen)], rejected

    monkeypatch.setattr(training, "reference_logps", of_another)
    with pytest.raises(UserError, match="reference is not the model.*not ln 2"):
        training.train(model, tokenizer, preferences, progress=False)
    models.set_adapter(model, None)
    monkeypatch.setattr(
        training,
        "reference_logps",
        lambda *arguments: [[value + 1 for value in side] for side in real(*arguments)],
    )
    with pytest.raises(
        UserError, match="winners' log-ratio -1.0"
    ):  # off by as much on both sides: the loss does not show it
        training.train(model, tokenizer, preferences, progress=False)
    models.set_adapter(model, None)
    given = of_another(model, tokenizer, preferences)
    assert len(
        training.train(model, tokenizer, preferences, reference=given, progress=False).log
    )  # another one on purpose
    models.set_adapter(model, None)
    assert len(
        training.train(model, tokenizer, preferences, dpo_weight=0, progress=False).log
    )  # none at all


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    model, loaded, preferences, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(
        type(model),
        "save_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    result = training.train(
        model, loaded[1], preferences, batch_size=4, progress=False, checkpoints=tmp_path / "kept"
    )
    said = capsys.readouterr()
    assert (
        "No checkpoint could be written ([Errno 28] No space left on device)" in said.out + said.err
    )
    assert len(result.log) == -(-len(preferences) // 4) and not list(
        (tmp_path / "kept").glob("checkpoint-*")
    )


def test_a_disk_that_fills_between_the_files_of_a_checkpoint(
    model, loaded, preferences, tmp_path, monkeypatch, capsys
):
    from irpo_utils import checksums

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(
        checksums, "write", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    result = training.train(
        model, loaded[1], preferences, batch_size=4, progress=False, checkpoints=tmp_path / "kept"
    )
    said = capsys.readouterr()
    assert "No checkpoint could be written (No space left on device)" in said.out + said.err
    assert len(result.log) == -(-len(preferences) // 4) and not list(
        (tmp_path / "kept").glob("checkpoint-*")
    )
