"""The loss against an independent one, the trainer against both, and NF4 against its twin."""

import copy
import inspect
import math

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from core_settings import randomise
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOTrainer

from irpo_utils import UserError, models, training
from irpo_utils.engines.shared_prompt import SharedPromptTrainer

TRAINERS = pytest.mark.parametrize("trainer", [None, SharedPromptTrainer], ids=["plain", "shared"])
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0}


def train(*arguments, **settings):
    return training.train(*arguments, **{"disable_tqdm": True} | settings)


def with_reference(trainer, change):
    """A trainer class whose reference log-probabilities are changed by `change`."""

    class Other(trainer or training.IterativeRPOTrainer):
        def compute_ref_log_probs(self, model, inputs):
            return change(*super().compute_ref_log_probs(model, inputs))

    return Other


def trained(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- the loss


def loss_in_numpy(chosen, rejected, ref_chosen, ref_rejected, lengths, alpha, beta):
    """Eq. 1 written anew: numpy in float64, one pair at a time, the sigmoid spelled out."""
    total = []
    values = zip(chosen, rejected, ref_chosen, ref_rejected, lengths, strict=True)
    for w, x, rw, rx, n in values:
        h = beta * (np.float64(w) - rw) - beta * (np.float64(x) - rx)
        dpo = np.log1p(np.exp(-h)) if h > 0 else -h + np.log1p(np.exp(h))
        total.append(dpo - alpha * w / n)
    return np.array(total)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.1), (0.25, 1.0), (5.0, 0.5), (0.0, 0.1)])
def test_loss_equals_an_independent_implementation_in_float64(alpha, beta):
    rng = np.random.default_rng(0)
    values = -rng.uniform(0, 400, size=(4, 64))
    lengths = rng.integers(1, 300, size=64)
    arguments = *map(torch.from_numpy, values), torch.from_numpy(lengths)
    dpo, nll = training.dpo_nll_loss(*arguments, beta=beta)
    expected = torch.from_numpy(loss_in_numpy(*values, lengths, alpha, beta))
    assert torch.allclose(dpo + alpha * nll, expected, rtol=0, atol=1e-6)


def test_gradients_equal_the_derivatives_of_equation_1():
    rng = np.random.default_rng(1)
    w, x, rw, rx = (torch.from_numpy(-rng.uniform(5, 60, size=16)) for _ in range(4))
    n, alpha, beta = torch.from_numpy(rng.integers(3, 40, size=16)), 0.7, 0.3
    w.requires_grad_(), x.requires_grad_()
    dpo, nll = training.dpo_nll_loss(w, x, rw, rx, n, beta=beta)
    (dpo + alpha * nll).sum().backward()
    s = 1 / (1 + np.exp((beta * ((w - rw) - (x - rx))).detach().numpy()))  # σ(-h)
    assert np.allclose(w.grad.numpy(), -beta * s - alpha / n.numpy(), atol=1e-6)
    assert np.allclose(x.grad.numpy(), beta * s, atol=1e-6)


def test_each_nll_is_divided_by_its_own_length():
    """Divided by all tokens of the batch, the long response would weigh five times as much."""
    zero, chosen = torch.zeros(2), torch.tensor([-60.0, -300.0])
    lengths = torch.tensor([60, 300])
    _, nll = training.dpo_nll_loss(chosen, zero, zero, zero, lengths, beta=0.1)
    assert nll.tolist() == [1.0, 1.0]


def test_trl_averages_the_nll_over_all_tokens():
    """Why the trainer has its own loss. If this fails, see whether TRL's loss is now Eq. 1."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert "chosen_per_token_logps[chosen_mask.bool()].mean()" in source


# ---------------------------------------------------------------- the trainer


def logp_one_by_one(model, prompt, response):
    """Log-probability of a response without batching, padding and helpers of the package."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    logps = torch.log_softmax(logits, -1)
    return sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))


def expected_loss(model, preferences, reference, alpha, beta):
    total = 0
    for row, (rw, rx) in zip(preferences, reference, strict=True):
        w = logp_one_by_one(model, row["prompt_ids"], row["chosen_ids"])
        x = logp_one_by_one(model, row["prompt_ids"], row["rejected_ids"])
        h = beta * ((w - rw) - (x - rx))
        total = total + torch.log1p(torch.exp(-h)) - alpha * w / len(row["chosen_ids"])
    return total / len(preferences)


@torch.no_grad()
def reference_of(model, preferences):
    return [
        tuple(
            logp_one_by_one(model, row["prompt_ids"], row[side]).item()
            for side in ("chosen_ids", "rejected_ids")
        )
        for row in preferences
    ]


def plain_training(model, preferences, steps, learning_rate):
    """Full-batch training spelled out: the loss before each step, and the first gradient norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    reference, losses, norms = reference_of(model, preferences), [], []
    for _ in range(steps):
        loss = expected_loss(model, preferences, reference, alpha=1.0, beta=0.1)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step(), optimizer.zero_grad()
    return losses, norms[0]


@pytest.fixture(scope="module")
def expected_training(loaded, preferences):
    twin = copy.deepcopy(loaded[0])
    models.set_adapter(twin, None)
    training.draw_adapter(twin, seed=5)
    return plain_training(twin, preferences, 2, 1e-3)


@TRAINERS
@pytest.mark.parametrize("micro_batch_size", [1, 4, None])
def test_the_trainer_minimises_equation_1_with_any_micro_batch(
    model, tokenizer, preferences, expected_training, trainer, micro_batch_size
):
    expected, norm = expected_training
    # Batches of 12: the eleven pairs are micro-batches of 11 times 1, 4 + 4 + 3, or 11.
    log = train(
        model,
        tokenizer,
        preferences,
        learning_rate=1e-3,
        num_train_epochs=2,
        batch_size=12,
        micro_batch_size=micro_batch_size,
        seed=5,
        trainer=trainer,
        **CONSTANT,
    )
    assert np.allclose(log["loss"][:], expected, rtol=0, atol=1e-4)
    assert log["grad_norm"][0] == pytest.approx(norm, rel=1e-4)
    assert expected[-1] < expected[0] - 0.01  # something was learnt


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimiser step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@TRAINERS
def test_every_gradient_equals_the_independent_one(model, tokenizer, preferences, trainer):
    """The reference is not M_t here, so that the DPO term counts."""
    randomise(model)
    reference = [(w - 0.5, x + 0.25) for w, x in reference_of(model, preferences)]
    model.zero_grad()
    expected_loss(model, preferences, reference, 0.7, 0.3).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    gradients = Gradients()
    other = with_reference(trainer, lambda chosen, rejected: (chosen - 0.5, rejected + 0.25))
    other.starts_from_reference = False
    settings = {"batch_size": 12, "micro_batch_size": 4, "max_grad_norm": 1e9, "trainer": other}
    train(model, tokenizer, preferences, 0.7, 0.3, callbacks=[gradients], **settings)
    for name, gradient in gradients.kept.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name
    assert max(g.abs().max() for g in expected.values()) > 1e-2


@TRAINERS
def test_micro_batches_do_not_change_training_over_several_batches(
    model, tokenizer, preferences, trainer
):
    """Eleven pairs in batches of four, grouped by length: the last batch has three."""
    logs = []
    for micro_batch_size in (1, 4):
        models.set_adapter(model, None)
        settings = {"batch_size": 4, "micro_batch_size": micro_batch_size, "trainer": trainer}
        logs.append(
            train(model, tokenizer, preferences, learning_rate=1e-3, seed=2, **CONSTANT, **settings)
        )
    columns = "loss loss_dpo loss_nll logps/chosen rewards/margins grad_norm"
    for key in [*columns.split(), "tokens"]:
        assert len(logs[0]) == 3
        assert np.allclose(logs[0][key][:], logs[1][key][:], rtol=0, atol=2e-4), key


def test_both_trainers_give_the_same_log_and_adapter(model, tokenizer, preferences):
    logs, weights = [], []
    for trainer in (None, SharedPromptTrainer):
        models.set_adapter(model, None)
        settings = {"learning_rate": 1e-3, "batch_size": 4, "seed": 2, "trainer": trainer}
        logs.append(train(model, tokenizer, preferences, **settings))
        weights.append(trained(model))
    for key in ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "grad_norm"):
        assert np.allclose(logs[0][key][:], logs[1][key][:], rtol=0, atol=2e-4), key
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-4), name


@TRAINERS
def test_first_step_has_margin_zero_from_an_adapter_that_is_not_zero(
    model, tokenizer, preferences, trainer
):
    """Also when the same pairs are trained on again: the reference is M_t, not what it was."""
    randomise(model)
    for _ in range(2):
        settings = {"learning_rate": 1e-3, "num_train_epochs": 3, "trainer": trainer}
        log = train(model, tokenizer, preferences, **settings, **CONSTANT)
        assert log["loss_dpo"][0] == pytest.approx(math.log(2), abs=1e-5)
        assert log["rewards/margins"][0] == pytest.approx(0, abs=1e-4)
        assert log["loss_dpo"][-1] < 0.68


def test_log_has_the_names_of_trl_where_trl_has_one(model, tokenizer, preferences):
    log = train(model, tokenizer, preferences, batch_size=4)
    assert log["step"][:] == [1, 2, 3]
    ours = {"loss_dpo", "loss_nll", "nll_chosen", "tokens", "seconds"}
    trls = {"loss", "grad_norm", "learning_rate", "epoch", "logps/chosen", "logps/rejected"}
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert set(log.column_names) >= ours | trls | rewards
    chosen = log["rewards/chosen"][-1] - log["rewards/rejected"][-1]
    assert log["rewards/margins"][-1] == pytest.approx(chosen, abs=1e-6)


@TRAINERS
def test_sft_computes_nothing_for_the_rejected_responses(model, tokenizer, preferences, trainer):
    """The tokens that go through the embedding are those of the prompts and chosen responses."""
    tokens = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].numel())
    )
    # One pair per batch: no padding to the length of other pairs.
    settings = {"loss": "sft", "micro_batch_size": 1, "batch_size": 11, "num_train_epochs": 2}
    settings |= {"learning_rate": 1e-3, "trainer": trainer}
    log = train(model, tokenizer, preferences, **settings, **CONSTANT)
    hook.remove()
    used = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in preferences)
    longer = sum(max(0, len(r["rejected_ids"]) - len(r["chosen_ids"])) for r in preferences)
    assert 2 * used <= sum(tokens) <= 2 * (used + longer + len(preferences))
    assert log["tokens"][:] == [used, used]
    assert log["nll_chosen"][-1] < log["nll_chosen"][0]
    assert not [name for name in log.column_names if "rejected" in name or "margins" in name]
    assert np.allclose(log["loss"][:], log["loss_nll"][:], atol=1e-6)


def test_tokens_of_the_log_are_those_of_the_batch(model, tokenizer, preferences):
    both = ("chosen_ids", "rejected_ids")
    prompts = sum(map(len, preferences["prompt_ids"]))
    responses = sum(len(ids) for side in both for ids in preferences[side])
    for trainer, copies in ((None, 2), (SharedPromptTrainer, 1)):
        log = train(model, tokenizer, preferences, batch_size=11, trainer=trainer)
        assert log["tokens"][:] == [copies * prompts + responses]


# ---------------------------------------------------------------- the reference


@pytest.fixture()
def hinge(monkeypatch):
    """A loss that is 1 and not ln 2 where the margin is 0."""

    def loss(pairs, alpha, beta):
        margin = pairs.chosen - pairs.ref_chosen - pairs.rejected + pairs.ref_rejected
        return torch.relu(1 - beta * margin), {}

    monkeypatch.setitem(training.LOSSES, "hinge", loss)


@pytest.mark.parametrize(
    "trainer, loss", [(None, "dpo_nll"), (None, "hinge"), (SharedPromptTrainer, "hinge")]
)
def test_a_wrong_reference_is_refused_with_every_loss(
    model, tokenizer, preferences, hinge, trainer, loss
):
    """Both sides are off by one nat here, which neither the margin nor the DPO loss shows."""
    wrong = with_reference(trainer, lambda chosen, rejected: (chosen + 1, rejected + 1))
    with pytest.raises(UserError, match="reference is not the model.*[01].[09]... nats, not 0"):
        train(model, tokenizer, preferences, loss=loss, trainer=wrong)


def test_a_right_reference_is_accepted_with_another_loss(model, tokenizer, preferences, hinge):
    randomise(model)
    log = train(model, tokenizer, preferences, loss="hinge")
    assert log["loss"][0] == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def in_bf16():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        return models.load("seed", quantize=False, dtype="bfloat16")


@TRAINERS
def test_in_bf16_a_right_reference_is_accepted_and_a_wrong_one_refused(
    in_bf16, preferences, trainer
):
    model, tokenizer = in_bf16
    assert model.dtype == torch.bfloat16
    models.set_adapter(model, None)
    randomise(model)
    log = train(model, tokenizer, preferences, batch_size=4, trainer=trainer)
    assert log["loss_dpo"][0] == pytest.approx(math.log(2), abs=2e-2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    models.set_adapter(model, None)
    wrong = with_reference(trainer, lambda *sides: tuple(1.2 * logps - 1 for logps in sides))
    with pytest.raises(UserError, match="reference is not the model"):
        train(model, tokenizer, preferences, batch_size=4, trainer=wrong)


def test_another_reference_is_accepted_from_a_trainer_that_says_so(model, tokenizer, preferences):
    other = with_reference(None, lambda chosen, rejected: (chosen - 2, rejected + 1))
    other.starts_from_reference = False
    log = train(model, tokenizer, preferences, trainer=other)
    assert log["rewards/margins"][0] == pytest.approx(0.1 * 3, abs=1e-4)


# ---------------------------------------------------------------- the adapter


@TRAINERS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_leaves_no_trace_but_the_adapter(
    model, tokenizer, preferences, trainer, checkpointing
):
    embedding = model.get_input_embeddings()
    hooks = len(embedding._forward_hooks)
    settings = {"gradient_checkpointing": checkpointing, "trainer": trainer}
    train(model, tokenizer, preferences, **settings)
    assert set(model.peft_config) == {"default"} and not model.training
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert "forward" not in model.get_base_model().__dict__
    assert len(embedding._forward_hooks) == hooks
    assert not model.get_base_model().is_gradient_checkpointing


def test_a_trainer_that_fails_to_start_leaves_the_model_as_it_was(
    model, tokenizer, preferences, monkeypatch
):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no logger")

    name = "transformers.Trainer.create_accelerator_and_postprocess"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no logger"):
        patch.setattr(name, fail)
        train(model, tokenizer, preferences)
    assert set(model.peft_config) == {"default"}
    assert "forward" not in model.get_base_model().__dict__
    assert len(train(model, tokenizer, preferences))


def test_gradient_checkpointing_gives_the_same_log(model, tokenizer, preferences):
    logs = []
    for checkpointing in (False, True):
        models.set_adapter(model, None)
        settings = {"learning_rate": 1e-3, "gradient_checkpointing": checkpointing}
        logs.append(train(model, tokenizer, preferences, batch_size=4, **settings))
    for key in ("loss", "grad_norm"):
        assert logs[1][key][:] == pytest.approx(logs[0][key][:], rel=1e-4), key


def test_small_steps_are_not_rounded_away(model, tokenizer, preferences):
    """In bf16, to which TRL casts an adapter, a step of 1e-6 would change next to nothing."""
    training.draw_adapter(model, seed=0)
    before = {n: p for n, p in trained(model).items() if "lora_A" in n}
    for _ in range(2):  # lora_A has no gradient before lora_B has left zero
        train(model, tokenizer, preferences, learning_rate=1e-6, **CONSTANT)
    after = trained(model)
    moved = [(after[name] != weight).float().mean().item() for name, weight in before.items()]
    assert np.mean(moved) > 0.9


def test_the_same_seed_gives_the_same_adapter(model, tokenizer, preferences):
    weights = []
    for seed in (9, 9, 10):
        models.set_adapter(model, None)
        train(model, tokenizer, preferences, learning_rate=1e-3, batch_size=4, seed=seed)
        weights.append(trained(model))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not all(torch.equal(weights[0][n], weights[2][n]) for n in weights[0])


def test_gradients_through_nf4_equal_those_of_the_dequantised_twin(model, preferences):
    randomise(model)
    twin = copy.deepcopy(model)
    modules = twin.named_modules()
    layers = [(name, m) for name, m in modules if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 28  # seven linear layers in each of four blocks
    for name, layer in layers:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        twin.set_submodule(name, plain)
    few = preferences.select(range(4))
    reference = reference_of(model, few)
    for m in (model, twin):
        m.zero_grad()
        expected_loss(m, few, reference, 1.0, 0.1).backward()
    twins = dict(twin.named_parameters())
    compared = [(p.grad, twins[n].grad) for n, p in model.named_parameters() if p.requires_grad]
    assert len(compared) == 56
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in compared)
    assert max(a.abs().max() for a, _ in compared) > 1e-3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alpha": -1.0}, "alpha = -1.0 must be at least 0"),
        ({"alpha": 0.0, "loss": "sft"}, "above 0 with loss = 'sft'"),
        ({"beta": 0.0}, "beta = 0.0 must be above 0"),
        ({"loss": "ppo"}, "loss = 'ppo' must be one of dpo_nll, sft"),
        ({"loss_type": ["ipo"]}, "loss_type cannot be set. Use loss="),
        ({"label_smoothing": 0.1}, "label_smoothing cannot be set"),
        ({"max_length": 4}, "max_length= of build_pairs"),
        ({"logging_steps": 3}, "logging_steps cannot be set"),
        ({"per_device_train_batch_size": 2}, "batch_size=, micro_batch_size="),
        ({"gradient_accumulation_steps": 2}, "batch_size=, micro_batch_size="),
        ({"batch_size": 6, "micro_batch_size": 4}, "multiple"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, tokenizer, preferences, change, message):
    with pytest.raises(UserError, match=message):
        train(model, tokenizer, preferences, **change)


@pytest.mark.parametrize(
    "loss", [lambda pairs, alpha, beta: pairs.chosen, lambda p, a, b: (p.chosen.mean(), {})]
)
def test_a_loss_that_does_not_return_what_is_needed_is_named(
    model, tokenizer, preferences, monkeypatch, loss
):
    monkeypatch.setitem(training.LOSSES, "mine", loss)
    with pytest.raises(UserError, match="loss 'mine' must return .one number per pair, dict"):
        train(model, tokenizer, preferences, loss="mine")


def test_pairs_without_ids_or_rows_are_refused(model, tokenizer, preferences):
    with pytest.raises(UserError, match="chosen_ids"):
        train(model, tokenizer, Dataset.from_list([{"prompt_ids": [1]}]))
    with pytest.raises(UserError, match="no pairs"):
        train(model, tokenizer, preferences.select([]))


def test_a_loss_that_is_not_finite_stops_training(model, tokenizer, preferences):
    with pytest.raises(UserError, match="Training stopped at step 1: the loss is nan"):
        train(model, tokenizer, preferences.select(range(4)), beta=float("nan"))
