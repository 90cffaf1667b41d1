"""Stage 4: train M_{t+1} from M_t on the preference pairs with DPO + NLL (Eq. 1 of the paper, v3).

    L = -log σ( β [log π_θ(w|x) - log π_t(w|x)] - β [log π_θ(l|x) - log π_t(l|x)] )  -  α log π_θ(w|x) / |w|

The log-ratios are sums over the response tokens. The NLL is divided by the length of its own
response, per sequence, then averaged over the batch. Prompt tokens are in neither term. Training
starts from M_t, and M_t is the reference.

TRL's `DPOTrainer` pads the batches, scores the reference, steps, logs and saves. Only the loss is
ours: TRL's `loss_type=["sigmoid", "sft"]` averages the NLL over all tokens of a micro-batch, so long
chosen responses count more than the paper's Eq. 1 says.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from irpo_utils import UserError, models

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# At the first step the policy is the reference, so log-ratios differ from 0 by rounding only: at most
# this share of a response's log-probability.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass
class PairLogps:
    """A batch of pairs as a loss sees it; every field is a tensor (batch,).

    `chosen`, `rejected`: log-probabilities summed over the response tokens, in nats; `ref_chosen`,
    `ref_rejected`: the same under the reference; `n_chosen`, `n_rejected`: response tokens.
    A loss in `CHOSEN_ONLY` gets `chosen` and `n_chosen`, and None for the rest.
    """

    chosen: torch.Tensor
    n_chosen: torch.Tensor
    rejected: torch.Tensor | None = None
    n_rejected: torch.Tensor | None = None
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None


def dpo_nll_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, *, alpha, beta):
    """The two terms of Eq. 1 per pair: (loss_dpo, loss_nll); the loss is loss_dpo + alpha * loss_nll.

    All arguments are tensors (batch,), see `PairLogps`. `alpha` does not scale what is returned.
    """
    ratio_chosen, ratio_rejected = chosen - ref_chosen, rejected - ref_rejected
    loss_dpo = -logsigmoid(beta * (ratio_chosen - ratio_rejected))
    loss_nll = -chosen / n_chosen
    return loss_dpo, loss_nll


def _dpo_nll(pairs: PairLogps, alpha: float, beta: float):
    loss_dpo, loss_nll = dpo_nll_loss(
        pairs.chosen,
        pairs.rejected,
        pairs.ref_chosen,
        pairs.ref_rejected,
        pairs.n_chosen,
        alpha=alpha,
        beta=beta,
    )
    return loss_dpo + alpha * loss_nll, {"loss_dpo": loss_dpo, "loss_nll": loss_nll}


def _dpo_nll_per_token(pairs: PairLogps, alpha: float, beta: float):
    """As TRL averages the NLL: over all tokens of the micro-batch. For comparison."""
    _, terms = _dpo_nll(pairs, alpha, beta)
    terms["loss_nll"] = -pairs.chosen / pairs.n_chosen.float().mean()
    return terms["loss_dpo"] + alpha * terms["loss_nll"], terms


def _sft(pairs: PairLogps, alpha: float, beta: float):
    """The NLL term alone: supervised fine-tuning on the chosen responses."""
    loss_nll = -pairs.chosen / pairs.n_chosen
    return alpha * loss_nll, {"loss_nll": loss_nll}


# A loss takes (pairs: PairLogps, alpha, beta) and returns the loss per pair and the terms to log.
LOSSES = {"dpo_nll": _dpo_nll, "dpo_nll_per_token": _dpo_nll_per_token, "sft": _sft}
CHOSEN_ONLY = {"sft"}  # losses that need neither the rejected responses nor a reference


class IterativeRPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on pairs that are already tokenised, with a loss from `LOSSES`.

    The loss is divided by the number of pairs of the whole batch, so that neither the loss nor the
    log depends on the micro-batch.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole batch

    def __init__(self, *args, loss: str, alpha: float, **options):
        self.loss_name, self.alpha = loss, alpha
        super().__init__(*args, **options)
        self.remove_callback(PrinterCallback)  # the bar of `Watch` replaces these two
        self.remove_callback(ProgressCallback)
        self.started = time.perf_counter()

    def _prepare_dataset(self, dataset, *args):
        return dataset  # the sampled tokens; text that is tokenised again can differ from them

    def _precompute_ref_logps(self, dataset, *args):
        given = "ref_chosen_logps" in dataset.column_names
        return dataset if given else super()._precompute_ref_logps(dataset, *args)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*IDS, "ref_chosen_logps", "ref_rejected_logps", "length"]

    def _get_num_items_in_batch(self, batches, device):
        """Pairs in one optimiser step, over all micro-batches and processes."""
        pairs = sum(self.n_pairs(batch) for batch in batches)
        return self.accelerator.gather(torch.tensor([pairs], device=device)).sum()

    def n_pairs(self, inputs) -> int:
        """Pairs in a micro-batch, which has two rows per pair."""
        return len(inputs["input_ids"]) // 2

    def n_tokens(self, inputs) -> torch.Tensor:
        """Tokens that the model processes in a micro-batch."""
        return inputs["attention_mask"].sum()

    def pair_logps(self, model, inputs) -> PairLogps:
        """From TRL's batch (2B, L): B rows with chosen responses, then B with the rejected ones."""
        names = ("input_ids", "attention_mask", "completion_mask")
        ids, attention, response = (inputs[name] for name in names)
        if self.loss_name in CHOSEN_ONLY:
            ids, attention, response = (x.chunk(2)[0] for x in (ids, attention, response))
        logps = model(
            input_ids=ids,
            attention_mask=attention,
            labels=ids.masked_fill(response == 0, -100),
            use_cache=False,
            fused_lm_head=True,  # TRL's head: per-token log-probabilities without the full logits
        ).log_probs.sum(1)
        if self.loss_name in CHOSEN_ONLY:
            return PairLogps(logps, response.sum(1))
        chosen, rejected = logps.chunk(2)
        n_chosen, n_rejected = response.sum(1).chunk(2)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return PairLogps(chosen, n_chosen, rejected, n_rejected, *reference)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs = self.pair_logps(model, inputs)
        loss, terms = LOSSES[self.loss_name](pairs, self.alpha, self.beta)
        weights = inputs.get("weights", torch.ones_like(loss))
        self._record({"loss": loss, **terms}, pairs, weights)
        self._metrics["train"]["tokens"].append(self.n_tokens(inputs))
        pairs_in_batch = len(loss) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, so each process multiplies by their number.
        return (weights * loss).sum() / pairs_in_batch * self.accelerator.num_processes

    @torch.no_grad()
    def _record(self, columns: dict, pairs: PairLogps, weights) -> None:
        """Keep one number per pair for `log`, without waiting for the GPU."""
        columns |= {"logps/chosen": pairs.chosen, "nll_chosen": -pairs.chosen / pairs.n_chosen}
        if pairs.rejected is not None:
            chosen = self.beta * (pairs.chosen - pairs.ref_chosen)
            rejected = self.beta * (pairs.rejected - pairs.ref_rejected)
            columns |= {
                "logps/rejected": pairs.rejected,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": (chosen > rejected).float(),
            }
        for name, values in columns.items():
            self._metrics["train"][name].append(torch.stack([weights * values, weights], 1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row per optimiser step: TRL averages over micro-batches, this over pairs."""
        metrics, gather = self._metrics["train"], self.accelerator.gather
        if metrics:
            logs["tokens"] = int(gather(torch.stack(metrics.pop("tokens"))).sum())
            logs["seconds"] = time.perf_counter() - self.started
            for name, parts in metrics.items():
                total, pairs = gather(torch.cat(parts)).sum(0).tolist()
                metrics[name] = [total / pairs]
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        # Without the last argument PEFT looks for the base on the hub.
        self.model.save_pretrained(output_dir, save_embedding_layers=False)


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

    pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (see `pairs.build_pairs`), and
        optionally `ref_chosen_logps`, `ref_rejected_logps` of another reference than M_t.
    batch_size: pairs per optimiser step. micro_batch_size: pairs per forward pass, on which the
        result does not depend (except with the loss "dpo_nll_per_token").
    loss: an entry of `LOSSES`; alpha weighs the NLL term, alpha = 0 is DPO.
    trainer: a subclass of `IterativeRPOTrainer`. callbacks: `transformers.TrainerCallback`s.
    config: further settings of TRL's `DPOConfig`, such as num_train_epochs, max_steps, seed, optim,
        and `resume_from_checkpoint`.

    Pairs of similar length share a batch. Log: one row per optimiser step with `step`, `loss`,
    `loss_dpo`, `loss_nll`, `rewards/chosen|rejected|margins|accuracies`, `logps/chosen|rejected`
    (mean sums, nats), `nll_chosen` (nats per token), `grad_norm`, `learning_rate`, `tokens`,
    `seconds`. Raises `UserError` for missing columns and numbers that are not finite.
    """
    _check(pairs, alpha, loss)
    draw_adapter(model, config.get("seed", 0))
    known = [name for name in pairs.column_names if name.endswith(("_ids", "_logps"))]
    lengths = [sum(map(len, row.values())) for row in pairs.select_columns(list(IDS))]
    data = pairs.select_columns(known).add_column("length", lengths)
    own_reference = loss not in CHOSEN_ONLY and "ref_chosen_logps" not in known
    checkpoint = config.pop("resume_from_checkpoint", None)
    with tempfile.TemporaryDirectory() as folder, _restored(model):
        with _fp32_adapter(model):
            running = (trainer or IterativeRPOTrainer)(
                model,
                args=_config(
                    model,
                    folder,
                    loss,
                    batch_size,
                    micro_batch_size,
                    {"beta": beta, "learning_rate": learning_rate, **config},
                ),
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[Watch(ROUNDING[model.dtype] if own_reference else None), *callbacks],
                loss=loss,
                alpha=alpha,
            )
        running.train(resume_from_checkpoint=checkpoint)
    model.eval()
    return Dataset.from_list([row for row in running.state.log_history if "tokens" in row])


def _config(model, folder, loss, batch_size, micro_batch_size, settings) -> DPOConfig:
    """`DPOConfig` with the defaults of this package, changed by `settings`."""
    defaults = {
        "output_dir": folder,
        "precompute_ref_log_probs": loss not in CHOSEN_ONLY,
        "precompute_ref_batch_size": 64,
        "max_length": None,  # `build_pairs` has dropped what is too long
        "weight_decay": 0.0,
        "warmup_steps": 0.1,  # share of the steps
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,  # the base has its dtype, and the adapter stays in fp32
        # Gradients of an fp16 base would be rounded to 0 without loss scaling.
        "fp16": model.dtype == torch.float16 and model.device.type == "cuda",
        "use_cpu": model.device.type == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    config = DPOConfig(**(defaults | settings))
    config.per_device_train_batch_size, config.gradient_accumulation_steps = micro_batches(
        batch_size, micro_batch_size, config.world_size
    )
    config.data_seed = config.seed
    return config


def micro_batches(batch_size: int, micro_batch_size: int | None, processes: int = 1):
    """(pairs per forward pass of one process, passes per optimiser step)."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise UserError(
            f"batch_size = {batch_size} must be a multiple of the number of processes, {processes}."
        )
    micro = min(micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"batch_size = {batch_size} must be a multiple of micro_batch_size = {micro} times the "
            f"number of processes, {processes}."
        )
    return micro, share // micro


class Watch(TrainerCallback):
    """The progress bar, and two reasons to stop: numbers that are not finite, a wrong reference.

    rounding: relative error allowed at the first step, where the policy is the reference; None if
    the pairs bring another reference.
    """

    def __init__(self, rounding: float | None):
        self.rounding, self.overflows = rounding, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=args.disable_tqdm,
            leave=False,
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "tokens" not in logs:
            return  # the summary at the end
        self.bar.update()
        self.bar.set_postfix(loss=logs["loss"], nll=logs["nll_chosen"])
        finite = math.isfinite(logs["grad_norm"])
        self.overflows = 0 if finite else self.overflows + 1
        # The loss scaling of fp16 looks for its scale by overflowing a few times.
        if not math.isfinite(logs["loss"]) or self.overflows > (10 if args.fp16 else 0):
            raise UserError(
                f"Training stopped at step {state.global_step}: the loss is {logs['loss']} and the "
                f"gradient norm {logs['grad_norm']}. Lower --learning-rate, or use a wider --dtype."
            )
        if self.rounding is not None and state.global_step == 1:
            self._check_reference(logs, args.beta)

    def _check_reference(self, logs, beta: float) -> None:
        for side in ("chosen", "rejected"):
            ratio = abs(logs[f"rewards/{side}"]) / beta
            if ratio > self.rounding * (1 + abs(logs[f"logps/{side}"])):
                raise UserError(
                    f"The reference is not the model that training started from: the {side} responses "
                    f"have a log-ratio of {ratio:.4f} nats at the first step, not 0. Install the "
                    "versions of requirements.lock, and let nothing else use the model during training."
                )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


@contextlib.contextmanager
def _fp32_adapter(model):
    """Keep TRL from rounding the adapter of a quantised model to bf16, where small steps vanish.

    TRL casts the parameters that require gradients when the trainer is made.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _restored(model):
    """Undo what training leaves on the model: TRL's patched forward, its copy of M_t, and hooks."""
    base = model.get_base_model()
    hooks = base.get_input_embeddings()._forward_hooks
    before, forward = set(hooks), base.__dict__.get("forward")
    try:
        yield
    finally:
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.forward = forward
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        base.gradient_checkpointing_disable()
        for key in set(hooks) - before:
            del hooks[key]


def draw_adapter(model, seed: int) -> None:
    """Draw the A matrices of a zero adapter from `seed`; leave a trained adapter as it is."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.lora_B["default"].weight.any() for layer in layers):
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.lora_A["default"].weight
        bound = 1 / math.sqrt(weight.shape[1])  # as PEFT: Kaiming uniform with a = sqrt(5)
        value = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
        models.assign(weight, value)


def _check(pairs, alpha: float, loss: str) -> None:
    if missing := sorted(set(IDS) - set(pairs.column_names)):
        raise UserError(
            f"The pairs lack the columns {', '.join(missing)}. Build them with pairs.build_pairs."
        )
    if len(pairs) == 0:
        raise UserError(
            "no pairs: there is nothing to train on. See the counts of pairs.build_pairs."
        )
    if loss not in LOSSES or alpha < 0:
        raise UserError(
            f"loss = {loss!r} must be one of {', '.join(LOSSES)}, and alpha = {alpha} at least 0."
        )
