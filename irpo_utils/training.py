"""Stage 4: train M_{t+1} from M_t on the preference pairs with DPO + NLL (Eq. 1 of the paper, v3).

    L = - log σ( β [log M_θ(w|x) - log M_t(w|x)] - β [log M_θ(l|x) - log M_t(l|x)] )
        - α log M_θ(w|x) / |w|

The log-ratios are sums over the response tokens. The NLL is divided by the length of its response,
then averaged over the batch. Prompt tokens are in neither term. M_t is the start and the reference.

TRL's `DPOTrainer` pads the batches, scores the reference, steps, logs and saves. Only the loss is
ours: TRL's `loss_type=["sigmoid", "sft"]` averages the NLL over all tokens of a micro-batch, so
long chosen responses count more than in Eq. 1.
"""

import contextlib
import math
import os
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch.nn.functional import logsigmoid
from torch.nn.init import kaiming_uniform_
from transformers import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer

from irpo_utils import UserError, models

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
# Settings of TRL that would change nothing here, or break the log.
REPLACED = ["loss_type", "label_smoothing", "max_length", "logging_steps"]
REPLACED += ["per_device_train_batch_size", "gradient_accumulation_steps"]
# At the first step log-ratios are rounding errors, at most this share of a log-probability.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass
class PairLogps:
    """A batch of pairs as a loss sees it; every field is a tensor (batch,).

    `chosen`, `rejected`: log-probabilities summed over the response tokens, in nats; `ref_...`: the
    same under the reference; `n_...`: response tokens. A loss in `CHOSEN_ONLY` gets the first two.
    """

    chosen: torch.Tensor
    n_chosen: torch.Tensor
    rejected: torch.Tensor | None = None
    n_rejected: torch.Tensor | None = None
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None


def dpo_nll_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, *, beta):
    """The two terms of Eq. 1 per pair, (loss_dpo, loss_nll): the loss is loss_dpo + alpha loss_nll.

    All arguments but `beta` are tensors (batch,), see `PairLogps`.
    """
    ratio_chosen, ratio_rejected = chosen - ref_chosen, rejected - ref_rejected
    loss_dpo = -logsigmoid(beta * (ratio_chosen - ratio_rejected))
    loss_nll = -chosen / n_chosen
    return loss_dpo, loss_nll


def _dpo_nll(pairs: PairLogps, alpha: float, beta: float):
    logps = pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected
    loss_dpo, loss_nll = dpo_nll_loss(*logps, pairs.n_chosen, beta=beta)
    return loss_dpo + alpha * loss_nll, {"loss_dpo": loss_dpo, "loss_nll": loss_nll}


def _sft(pairs: PairLogps, alpha: float, beta: float):
    """The NLL term alone: supervised fine-tuning on the chosen responses."""
    loss_nll = -pairs.chosen / pairs.n_chosen
    return alpha * loss_nll, {"loss_nll": loss_nll}


# A loss takes (pairs: PairLogps, alpha, beta) and returns the loss per pair and the terms to log.
LOSSES = {"dpo_nll": _dpo_nll, "sft": _sft}
CHOSEN_ONLY = {"sft"}  # losses that need neither the rejected responses nor a reference


class IterativeRPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on pairs that are already tokenised, with a loss from `LOSSES`.

    The loss is divided by the pairs of the whole batch, so that micro-batches change no result.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole batch
    starts_from_reference = True

    def __init__(self, *args, loss: str, alpha: float, **options):
        self.loss_name, self.alpha = loss, alpha
        super().__init__(*args, **options)
        self.remove_callback(PrinterCallback)  # `Bar` replaces these, which print every log row
        if self.pop_callback(ProgressCallback):
            self.add_callback(Bar)
        self.started, self.overflows = time.perf_counter(), 0

    def _prepare_dataset(self, dataset, *args):
        return dataset  # the sampled tokens; text that is tokenised again can differ from them

    def _precompute_ref_logps(self, *args):
        quiet = {"TQDM_DISABLE": "1"} if self.args.disable_tqdm else {}
        with mock.patch.dict(os.environ, quiet):  # the only switch that TRL has for this bar
            return super()._precompute_ref_logps(*args)

    def _get_num_items_in_batch(self, batches, device):
        """Pairs in one optimiser step, over all micro-batches and processes."""
        pairs = sum(self.n_pairs(batch) for batch in batches)
        return self.accelerator.gather(torch.tensor([pairs], device=device)).sum()

    def n_pairs(self, inputs) -> int:
        return len(inputs["input_ids"]) // 2  # two rows per pair

    def n_tokens(self, inputs) -> torch.Tensor:
        """Tokens of each pair that the model processes, (B,): the prompt once per response."""
        per_row = inputs["attention_mask"].sum(1).view(2, -1)
        return per_row[0] if self.loss_name in CHOSEN_ONLY else per_row.sum(0)

    def pair_logps(self, model, inputs) -> PairLogps:
        """From TRL's batch (2B, L): B rows with chosen responses, then B with the rejected ones."""
        names = ("input_ids", "attention_mask", "completion_mask")
        rows = self.n_pairs(inputs) * (1 if self.loss_name in CHOSEN_ONLY else 2)
        ids, attention, response = (inputs[name][:rows] for name in names)
        batch = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        labels = ids.masked_fill(response == 0, -100)
        # TRL's head gives per-token log-probabilities without the full logits.
        logps = model(**batch, labels=labels, fused_lm_head=True).log_probs.sum(1)
        if self.loss_name in CHOSEN_ONLY:
            return PairLogps(logps, response.sum(1))
        (chosen, rejected), (n_chosen, n_rejected) = logps.chunk(2), response.sum(1).chunk(2)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return PairLogps(chosen, n_chosen, rejected, n_rejected, *reference)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs = self.pair_logps(model, inputs)
        result = LOSSES[self.loss_name](pairs, self.alpha, self.beta)
        if not isinstance(result, tuple) or result[0].shape != pairs.chosen.shape:
            what = f"The loss {self.loss_name!r} must return"
            raise UserError(f"{what} (one number per pair, dict of terms to log); see LOSSES.")
        loss, terms = result
        # Several processes repeat pairs to fill a batch; these have weight 0.
        weights = inputs.get("weights", torch.ones_like(loss))
        self._record({"loss": loss, **terms}, pairs, weights)
        self._metrics["train"]["tokens"].append((weights * self.n_tokens(inputs)).sum())
        in_batch = len(loss) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, so each process multiplies by their number.
        return (weights * loss).sum() / in_batch * self.accelerator.num_processes

    @torch.no_grad()
    def _record(self, columns: dict, pairs: PairLogps, weights) -> None:
        """Keep one number per pair for `log`, without waiting for the GPU."""
        columns |= {"logps/chosen": pairs.chosen, "nll_chosen": -pairs.chosen / pairs.n_chosen}
        if pairs.rejected is not None:
            chosen = self.beta * (pairs.chosen - pairs.ref_chosen)
            rejected = self.beta * (pairs.rejected - pairs.ref_rejected)
            columns |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
            columns |= {"rewards/margins": chosen - rejected, "logps/rejected": pairs.rejected}
            columns |= {"rewards/accuracies": (chosen > rejected).float()}
        for name, values in columns.items():
            self._metrics["train"][name].append(torch.stack([weights * values, weights], 1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row per optimiser step: TRL averages over micro-batches, this over pairs."""
        metrics, gather = self._metrics["train"], self.accelerator.gather
        if "tokens" not in metrics:  # the summary at the end
            return super().log(logs, start_time)
        logs["tokens"] = int(gather(torch.stack(metrics.pop("tokens"))).sum())
        logs["seconds"] = time.perf_counter() - self.started
        for name, parts in metrics.items():
            total, pairs = gather(torch.cat(parts)).sum(0).tolist()
            metrics[name] = [total / pairs]
        super().log(logs, start_time)
        self._check_numbers(logs)

    def _check_numbers(self, logs: dict[str, float]) -> None:
        """Stop if numbers are not finite, or if the reference is not what training starts from."""
        step = self.state.global_step
        self.overflows = 0 if math.isfinite(logs["grad_norm"]) else self.overflows + 1
        # The loss scaling of fp16 looks for its scale by overflowing a few times.
        if not math.isfinite(logs["loss"]) or self.overflows > (10 if self.args.fp16 else 0):
            raise UserError(
                f"Training stopped at step {step}: the loss is {logs['loss']}, the gradient norm "
                f"{logs['grad_norm']}. Lower --learning-rate, or use a wider --dtype."
            )
        if step == 1 and self.starts_from_reference and "rewards/chosen" in logs:
            for side in ("chosen", "rejected"):
                ratio, size = abs(logs[f"rewards/{side}"]) / self.beta, abs(logs[f"logps/{side}"])
                if ratio > ROUNDING[self.model.dtype] * (1 + size):
                    raise UserError(
                        "The reference is not the model that training starts from: at step 1 the "
                        f"{side} responses have a log-ratio of {ratio:.4f} nats, not 0. Install "
                        "the versions of requirements.lock, and use the model for nothing else."
                    )


class Bar(ProgressCallback):
    """transformers' progress bar, with two numbers next to it instead of a printed row per step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "nll_chosen" in logs:
            self.training_bar.set_postfix(loss=logs["loss"], nll=logs["nll_chosen"])


def train(
    model,
    tokenizer,
    pairs,
    alpha: float = 1.0,
    beta: float = 0.1,
    learning_rate: float = 3e-5,
    *,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    loss: str = "dpo_nll",
    trainer: type[IterativeRPOTrainer] | None = None,
    callbacks=(),
    **config,
) -> Dataset:
    """Train the adapter of `model` (M_t) in place into M_{t+1}; returns the training log.

    pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (see `pairs.build_pairs`).
    batch_size: pairs per optimiser step. micro_batch_size: pairs at once, with the same result.
    loss: an entry of `LOSSES`; alpha weighs the NLL term, alpha = 0 is DPO.
    trainer: a subclass of `IterativeRPOTrainer`. callbacks: `transformers.TrainerCallback`s.
    config: other settings of TRL's `DPOConfig`: max_steps, seed, resume_from_checkpoint, ...

    Log: one row per optimiser step with `step`, `loss`, `loss_dpo`, `loss_nll`, `logps/chosen`,
    `logps/rejected` (mean sums, nats), `rewards/chosen|rejected|margins|accuracies`, `nll_chosen`
    (nats per token), `grad_norm`, `learning_rate`, `tokens`, `seconds`.
    Raises `UserError` for missing columns, useless settings and numbers that are not finite.
    """
    if missing := sorted(set(IDS) - set(pairs.column_names)):
        raise UserError(f"The pairs lack {', '.join(missing)}. Use pairs.build_pairs.")
    if len(pairs) == 0:
        raise UserError("no pairs: there is nothing to train on.")
    if loss not in LOSSES:
        raise UserError(f"loss = {loss!r} must be one of {', '.join(LOSSES)}.")
    if alpha < 0 or (alpha == 0 and loss == "sft"):
        raise UserError(f"alpha = {alpha} must be at least 0, and above 0 with loss = 'sft'.")
    if beta <= 0:
        raise UserError(f"beta = {beta} must be above 0.")
    if replaced := [name for name in REPLACED if name in config]:
        ours = "loss=, batch_size=, micro_batch_size=, or max_length= of build_pairs"
        raise UserError(f"{', '.join(replaced)} cannot be set. Use {ours}.")
    draw_adapter(model, config.get("seed", 0))
    # A copy in memory: TRL caches reference log-probabilities next to a dataset's file.
    data = Dataset(pairs.select_columns(IDS).with_format("arrow")[:])
    data = data.add_column("length", [sum(map(len, row.values())) for row in data])
    config |= {"beta": beta, "learning_rate": learning_rate}
    with tempfile.TemporaryDirectory() as folder, _restored(model) as trained:
        args = _config(model, {"output_dir": folder} | config, loss, batch_size, micro_batch_size)
        given = {"train_dataset": data, "processing_class": tokenizer, "callbacks": list(callbacks)}
        given |= {"args": args, "loss": loss, "alpha": alpha}
        running = (trainer or IterativeRPOTrainer)(model, **given)
        for parameter in trained:
            parameter.requires_grad_(True)
        torch.manual_seed(args.seed)  # the order of the pairs, whatever was scored before
        running.train(resume_from_checkpoint=args.resume_from_checkpoint)
    rows = [row for row in running.state.log_history if "tokens" in row]
    return Dataset.from_list([dict(sorted(row.items())) for row in rows])  # as in a checkpoint


def _config(model, settings: dict, loss: str, batch_size: int, micro_batch_size) -> DPOConfig:
    """`DPOConfig` with the defaults of this package, changed by `settings`."""
    on_cpu = model.device.type == "cpu"
    defaults = {
        "num_train_epochs": 1.0,
        "seed": 0,
        "train_sampling_strategy": "group_by_length",
        "warmup_steps": 0.1,  # a share of the steps
        "lr_scheduler_type": "cosine",
        "max_length": None,  # `build_pairs` has dropped what is too long
        "remove_unused_columns": False,
        "precompute_ref_log_probs": loss not in CHOSEN_ONLY,
        # On a CPU large batches do not fit into the cache, and more of them is padding.
        "precompute_ref_batch_size": 16 if on_cpu else 64,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would wait for the GPU at every micro-batch
        "save_strategy": "no",
        # The base has its dtype, the adapter stays in fp32; fp16 scales the loss.
        "bf16": False,
        "fp16": model.dtype == torch.float16 and not on_cpu,
        "use_cpu": on_cpu,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    config = DPOConfig(**(defaults | settings))
    share = max(batch_size // config.world_size, 1)
    micro = min(micro_batch_size or share, share)
    if batch_size < 1 or batch_size % (micro * config.world_size):
        raise UserError(
            f"batch_size = {batch_size} must be a multiple of micro_batch_size = {micro} times the "
            f"number of processes, {config.world_size}."
        )
    config.per_device_train_batch_size, config.gradient_accumulation_steps = micro, share // micro
    return config


@contextlib.contextmanager
def _restored(model):
    """Hide the trained parameters from a new trainer; afterwards undo what training leaves behind.

    TRL rounds the parameters of a quantised model that require gradients to bf16, where small steps
    vanish. It also patches the forward of the base, and adds a copy of M_t as the adapter "ref".
    """
    base, trained = model.get_base_model(), [p for p in model.parameters() if p.requires_grad]
    hooks = base.get_input_embeddings()._forward_hooks
    before, forward = set(hooks), base.__dict__.get("forward")
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield trained
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.forward = forward
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        base.gradient_checkpointing_disable()
        for key in set(hooks) - before:
            del hooks[key]
        model.eval()


def draw_adapter(model, seed: int) -> None:
    """Draw the A matrices of a zero adapter from `seed`, as PEFT does; leave a trained one."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.lora_B["default"].weight.any() for layer in layers):
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.lora_A["default"].weight
        value = kaiming_uniform_(torch.empty(weight.shape), a=5**0.5, generator=generator)
        models.assign(weight, value)
