"""Stage 4: train M_{t+1} from M_t on the preference pairs with DPO + NLL (Eq. 1 of the paper, v3).

    L = -log σ( β [log π_θ(w|x) - log π_t(w|x)] - β [log π_θ(l|x) - log π_t(l|x)] )  -  α log π_θ(w|x) / |w|

The log-ratios are sums over the response tokens. The NLL is divided by the length of its own response, then averaged
over the batch: TRL's `loss_type=["sigmoid", "sft"]` averages over all tokens of a micro-batch instead, so that long
winners count more. Prompt tokens are in neither term. Start and reference are both M_t.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from safetensors import SafetensorError
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from irpo_utils import UserError, checksums, models, processes


CHECKPOINT_SECONDS = 10.0  # between two checkpoints, at least
CHECKPOINT_SHARE = 0.02  # of the time may go into writing them
OF_REFERENCE = (
    "loss_dpo",
    "margin",
    "accuracy",
    "logratio_chosen",
)  # columns of the log that need a reference


def dpo_nll_loss(
    logps_chosen,
    logps_rejected,
    ref_logps_chosen,
    ref_logps_rejected,
    n_tokens_chosen,
    *,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of Eq. 1 per pair: (loss_dpo, loss_nll), each of shape (batch,); loss = loss_dpo + alpha * loss_nll.

    All arguments are tensors of shape (batch,): sums of log-probabilities over the response in nats, and the number
    of response tokens of the winner. `alpha` weighs the NLL term when the two are added; it does not scale what is
    returned.
    """
    ratio_chosen = logps_chosen - ref_logps_chosen
    ratio_rejected = logps_rejected - ref_logps_rejected
    loss_dpo = -logsigmoid(beta * (ratio_chosen - ratio_rejected))
    loss_nll = -logps_chosen / n_tokens_chosen
    return loss_dpo, loss_nll


@dataclass
class TrainingResult:
    """What `train` gives back: the model is trained in place, `log` has one row per optimiser step."""

    model: object
    log: Dataset
    probe_log: Dataset | None = None
    probe_pairs: int = 0
    summary: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    adapter: dict | None = None  # its weights, put together where the model is split over processes


def train(
    model,
    tokenizer,
    preferences,
    alpha: float = 1.0,
    beta: float = 0.1,
    dpo_weight: float = 1.0,
    learning_rate: float = 3e-5,
    *,
    epochs: float = 1.0,
    max_steps: int = -1,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    warmup_ratio: float = 0.1,
    lr_scheduler: str = "cosine",
    max_grad_norm: float = 1.0,
    nll_per: str = "sequence",
    seed: int = 0,
    probe=None,
    probe_every: int = 10,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw_torch",
    progress: bool = True,
    report_to: str = "none",
    log_dir=None,
    checkpoints: str | Path | None = None,
    reference=None,
    share_prompt: bool | None = None,
    warn: Callable = lambda warning: None,
) -> TrainingResult:
    """Train the adapter of `model` (M_t, from `models.load`) in place into M_{t+1}.

    preferences: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (see `pairs.build_pairs`); `batch_size` counts pairs.
    dpo_weight: weight of the DPO term; 0 with alpha 1 is SFT on the winners (STaR). alpha 0 is DPO.
    Pairs of similar length share a batch, and the batches of a stretch of training go from long to short: what the log
        shows from step to step is length as much as learning. To see learning, log a `probe`.
    micro_batch_size: pairs per forward pass; loss and gradients do not depend on it, but for `nll_per` "token".
    nll_per: "sequence" (the paper) or "token" (TRL's: a mean over all tokens of the micro-batch), for comparison.
    max_steps: exactly so many, in place of `epochs`; -1 for `epochs`.
    probe: a few fixed pairs whose log-probabilities are logged every `probe_every` steps, whatever is trained on.
    report_to: tensorboard, trackio, wandb; the files of TensorBoard lie in the folder `log_dir`, whose name the others take.
    checkpoints: folder in which training keeps its state now and then; a call with the same arguments and that folder goes
        on from the newest sound one, to the same weights. They are transformers' own, read without running code in them. A
        model that is split over processes keeps none.
    reference: a pair of lists, log-probabilities of the chosen and rejected responses under another reference than M_t.
    warn: called with a line for every sign of a collapse, at the step that shows it (see `collapse_signs`).
    share_prompt: one row per pair with the prompt computed once, or two rows; None: one row where the model allows it.

    Log columns: `step`, `loss`, `loss_dpo`, `loss_nll`, `logps_chosen`, `logps_rejected` (mean sums, nats), `nll_chosen`
    (nats per token), `margin` (reward margin, β included), `accuracy` (share of pairs with a positive margin),
    `logratio_chosen` (against M_t), `grad_norm`, `learning_rate`, `tokens` (of prompts and responses), `seconds` (since the
    start). With `dpo_weight` 0 there is no reference, and the columns of the DPO term are left out.
    Raises `UserError` for missing columns and for a loss or gradient that is not finite.
    """
    _check(preferences, alpha, dpo_weight, nll_per)
    check_names(lr_scheduler, optimizer, report_to)
    micro = pairs_at_once(batch_size, micro_batch_size)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    _fresh_adapter(model, seed)
    own_reference = dpo_weight > 0 and reference is None
    if (
        dpo_weight == 0
    ):  # SFT knows no reference, and scoring one would take time. Losers still go along, for the log alone.
        reference = ([math.nan] * len(preferences),) * 2
    chosen, rejected = reference or _kept_reference(
        checkpoints, lambda: reference_logps(model.eval(), tokenizer, preferences)
    )
    lengths = [sum(len(row[c]) for c in columns) for row in preferences.select_columns(columns)]
    data = (
        preferences.select_columns(columns)
        .add_column("ref_chosen_logps", chosen)
        .add_column("ref_rejected_logps", rejected)
        .add_column("length", lengths)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=str(log_dir or folder),
            run_name=str(log_dir) if log_dir else None,
            beta=beta,
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch_size // (micro * processes.count()),
            warmup_steps=warmup_ratio,
            lr_scheduler_type=lr_scheduler,
            max_grad_norm=max_grad_norm,
            optim=optimizer,
            weight_decay=0.0,
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=report_to,
            disable_tqdm=True,
            max_length=None,
            dataloader_pin_memory=False,
            precompute_ref_log_probs=True,
            bf16=False,
            fp16=needs_loss_scaling(model),
            use_cpu=model.device.type == "cpu",
            gradient_checkpointing=gradient_checkpointing,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
        )
        watch = Watch(
            progress,
            10 if config.fp16 else 0,
            "accuracy" if dpo_weight else "nll_chosen",
            lambda: trainer.save_batch(tokenizer),
            own_reference and (1e-3 if model.dtype == torch.float32 else 0.05),
            warn,
        )
        probing = [_Probe(probe, tokenizer, probe_every)] if probe is not None else []
        kept = (
            None if models.is_sharded(model) else checkpoints
        )  # of a split model there are none within a training
        callbacks = [watch, *probing, *([_Keep(Path(kept), watch, *probing)] if kept else [])]
        with left_as_it_was(model):
            trainer = IterativeRPOTrainer(
                model,
                config,
                data,
                tokenizer,
                alpha=alpha,
                dpo_weight=dpo_weight,
                nll_per=nll_per,
                share_prompt=share_prompt,
                callbacks=callbacks,
                checkpoints=checkpoints,
            )
            trainer.train(
                resume_from_checkpoint=processes.from_first(lambda: newest_checkpoint(kept))
            )
    model.eval()
    probe_log = Dataset.from_list(probing[0].rows) if probing else None
    return TrainingResult(
        model,
        Dataset.from_list(watch.rows),
        probe_log,
        len(probe) if probing else 0,
        _summary(watch.rows),
        watch.warnings,
        models.whole_adapter(model),
    )


def _kept_reference(folder: str | Path | None, score: Callable) -> tuple[list[float], list[float]]:
    """What `score()` gives, from `folder`/reference where it is there already: with a large model it takes half an hour."""
    place = Path(folder) / "reference" if folder else None
    there = processes.from_first(
        lambda: place and checksums.read(place) and json.loads((place / "logps.json").read_text())
    )
    if there:
        return tuple(there)
    started, scored = time.perf_counter(), score()
    if place and processes.is_first():
        with contextlib.suppress(OSError):  # a help, no result
            place.mkdir(parents=True, exist_ok=True)
            (place / "logps.json").write_text(json.dumps(scored))
            checksums.write(place, {"seconds": time.perf_counter() - started})
    return scored


def newest_checkpoint(folder: str | Path | None) -> str | None:
    """The newest checkpoint in `folder` that was written whole and is unchanged; None where there is none."""
    sound = (
        [path for path in Path(folder).glob("checkpoint-*") if checksums.read(path)]
        if folder
        else []
    )
    return str(max(sound, key=_step_of)) if sound else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def pairs_at_once(batch_size: int, micro_batch_size: int | None) -> int:
    """Pairs in a forward pass of one process; all processes and passes together make one batch, however many they are."""
    share, rest = divmod(batch_size, processes.count())
    if rest:
        raise UserError(
            f"batch_size = {batch_size} cannot be shared by {processes.count()} processes: it has to be a multiple."
        )
    micro = min(micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"batch_size = {batch_size} is not a multiple of micro_batch_size = {micro}"
            f"{f' times {processes.count()} processes' * (processes.count() > 1)}."
        )
    return micro


def reference_logps(model, tokenizer, preferences) -> tuple[list[float], list[float]]:
    """Log-probabilities (sums, nats) of the chosen and of the rejected responses under `model` as it is now.

    A response that stands in several pairs, as wrap-around makes them, is scored once.
    """
    keys = [
        (tuple(prompt), tuple(response))
        for side in ("chosen_ids", "rejected_ids")
        for prompt, response in zip(preferences["prompt_ids"], preferences[side])
    ]
    unique = list(dict.fromkeys(keys))
    scores = models.score(
        model,
        tokenizer,
        [list(prompt) for prompt, _ in unique],
        [list(response) for _, response in unique],
    )
    of = dict(zip(unique, scores, strict=True))
    return [of[key] for key in keys[: len(preferences)]], [
        of[key] for key in keys[len(preferences) :]
    ]


@contextlib.contextmanager
def adapter_as_it_was(model):
    """Keep TRL's trainers from changing the adapter of a PEFT model when they are made.

    They cast what is trained of a quantised model to bf16 (small steps would be rounded away), so nothing seems to be; and
    they may add a copy named "ref" (the reference is precomputed here, and the copy would break the next iteration).
    """
    trained = _trained(model)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def left_as_it_was(model):
    """Give the base model back its own forward, which TRL patches, and take off the hooks of gradient checkpointing.

    TRL and transformers each register one and keep track of the last alone: with every iteration there would be more.
    """
    base = model.get_base_model()
    forward, hooks = base.__dict__.get("forward"), set(base.get_input_embeddings()._forward_hooks)
    try:
        yield
    finally:
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.forward = forward
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
        for key in set(base.get_input_embeddings()._forward_hooks) - hooks:
            del base.get_input_embeddings()._forward_hooks[key]


class IterativeRPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with the paper's loss, trained on the very tokens that were sampled.

    What differs from the parent: the pairs come tokenised (text tokenised again can differ from what was sampled, and
    the parent appends EOS even where a completion was cut off); the reference is scored once, before the trainer is
    made; the NLL is normalised per sequence; and the loss is divided by the number of pairs of the
    whole batch, so that it does not depend on micro-batches or processes.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole batch itself

    def __init__(
        self,
        model,
        config,
        data,
        tokenizer,
        *,
        alpha,
        dpo_weight,
        nll_per,
        share_prompt,
        callbacks,
        checkpoints=None,
    ):
        self.checkpoints = checkpoints
        self.alpha, self.dpo_weight, self.nll_per = alpha, dpo_weight, nll_per
        self.pad_id = tokenizer.pad_token_id
        self.share_prompt = models.can_share_prompt(model) if share_prompt is None else share_prompt
        self._checkpoints = config.gradient_checkpointing
        with adapter_as_it_was(model):
            super().__init__(
                model=model,
                ref_model=_NoReference(model.config),
                args=config,
                train_dataset=data,
                processing_class=tokenizer,
                data_collator=self._collate,
                callbacks=callbacks,
            )
        if models.is_sharded(model):  # it adds up gradients by itself, and is where it should be
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # what transformers before 5.19 reads instead
        self._batch_log: list[dict] = []
        self._batch_inputs: list[
            dict
        ] = []  # of the optimiser step in hand, to be saved where its numbers are not finite
        self._fits: int | None = None  # pairs at once, once memory has run out

    def _get_output_dir(self, trial):
        return str(self.checkpoints or self.args.output_dir)  # logs lie elsewhere

    def _save_checkpoint(self, model, trial):
        """A checkpoint is a help, no result: where the disk is full, training goes on without."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(
                Path(self.checkpoints) / f"checkpoint-{self.state.global_step}", ignore_errors=True
            )
            tqdm.write(
                f"No checkpoint could be written ({str(error).splitlines()[0]}): training goes on without."
            )

    def _save(self, output_dir=None, state_dict=None):
        # Without the last argument PEFT looks for the base on the hub, to see whether its vocabulary was changed.
        self.model.save_pretrained(output_dir, safe_serialization=True, save_embedding_layers=False)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # already tokenised

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [
            "prompt_ids",
            "chosen_ids",
            "rejected_ids",
            "ref_chosen_logps",
            "ref_rejected_logps",
            "length",
        ]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset  # the reference is there: see `reference_logps`

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """B pairs as B rows that share their prompt, or as 2B rows, winners first, for models that cannot do that."""
        prompts, chosen, rejected = (
            [row[key] for row in rows] for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        if self.share_prompt:
            batch = models.pair_batch(prompts, chosen, rejected, self.pad_id, self.model.dtype)
        else:
            batch = models.pad_batch(prompts * 2, chosen + rejected, self.pad_id)
        batch["ref_chosen"] = torch.tensor([row["ref_chosen_logps"] for row in rows])
        batch["ref_rejected"] = torch.tensor([row["ref_rejected_logps"] for row in rows])
        batch["n_tokens_chosen"] = torch.tensor([len(ids) for ids in chosen])
        batch["tokens"] = torch.tensor(
            [sum(map(len, parts)) for parts in zip(prompts, chosen, rejected)]
        )
        return batch

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs in one optimiser step, over all micro-batches and processes.

        At the end of an epoch accelerate repeats pairs until every process has as many. The repeated ones come last, and weigh
        nothing: else a last batch that is not full would be another one for every number of processes.
        """
        n, batch_size = len(self.train_dataset), self._batch_size()
        first = (
            self.state.global_step % math.ceil(n / batch_size) * batch_size
        )  # of this step, in the epoch
        for i, batch in enumerate(batch_samples):
            part = i * self.accelerator.num_processes + self.accelerator.process_index
            place = (
                first
                + part * self.args.per_device_train_batch_size
                + torch.arange(len(batch["ref_chosen"]), device=device)
            )
            batch["weight"] = (place < n).float()
        return min(batch_size, n - first)

    def _get_train_sampler(self, dataset=None):
        """The parent's order by length; it asks for the pairs of a batch, which must not depend on the number of processes."""
        passes = self.args.gradient_accumulation_steps
        self.args.gradient_accumulation_steps = passes * self.accelerator.num_processes
        try:
            return _EpochByEpoch(super()._get_train_sampler(dataset), self._epoch, self.args.seed)
        finally:
            self.args.gradient_accumulation_steps = passes

    def _batch_size(self) -> int:
        """Pairs of an optimiser step over all micro-batches and processes."""
        return (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes
        )

    def _epoch(self) -> int:
        """The epoch that is under way, counted from 0, as the number of steps so far says."""
        return self.state.global_step // math.ceil(len(self.train_dataset) / self._batch_size())

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; when memory runs out, again as two halves, and all that follow in the size that fitted.

        Nothing of the step is lost and, but for `nll_per` "token", no number changes: the loss is a sum over pairs, and the
        gradients of the attempt that failed are taken back.
        """
        pairs = len(inputs["ref_chosen"])
        if self._fits and pairs > self._fits:
            return self._in_halves(model, inputs, num_items_in_batch)
        logged, before = (
            len(self._batch_log),
            [(p, None if p.grad is None else p.grad.clone()) for p in _trained(model)],
        )
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if (
                pairs == 1 or self.accelerator.num_processes > 1
            ):  # processes have to take the same steps
                raise UserError(_too_large(inputs, self._checkpoints)) from error
        # Outside of the except block, which would keep the tensors of the failed attempt alive.
        del self._batch_log[logged:]
        for parameter, gradient in before:
            parameter.grad = gradient
        clear_device_cache(garbage_collection=True)
        self._fits = pairs // 2
        tqdm.write(
            f"Out of memory with {pairs} pairs at once: going on with {self._fits} (--micro-batch-size {self._fits} "
            "would do so from the start). "
            + (
                "The loss is the same."
                if self.nll_per == "sequence"
                else "The mean over tokens is now one over these."
            )
        )
        return self._in_halves(model, inputs, num_items_in_batch)

    def _in_halves(self, model, inputs, num_items_in_batch):
        return sum(self.training_step(model, half, num_items_in_batch) for half in _halves(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.share_prompt:
            logps_chosen, logps_rejected = models.pair_logps(model, inputs)
        else:
            logps_chosen, logps_rejected = models.response_logps(model, inputs).sum(-1).chunk(2)
        ref_chosen, ref_rejected, lengths = (
            inputs["ref_chosen"],
            inputs["ref_rejected"],
            inputs["n_tokens_chosen"],
        )
        weight = inputs.get("weight", torch.ones_like(ref_chosen))
        loss_dpo, loss_nll = dpo_nll_loss(
            logps_chosen,
            logps_rejected,
            ref_chosen,
            ref_rejected,
            lengths,
            alpha=self.alpha,
            beta=self.beta,
        )
        if self.nll_per == "token":
            # A mean over all tokens of the micro-batch.
            loss_nll = -logps_chosen / ((weight * lengths).sum() / weight.sum().clamp(min=1))
        losses = (
            self.dpo_weight * loss_dpo + self.alpha * loss_nll
            if self.dpo_weight
            else self.alpha * loss_nll
        )
        pairs = num_items_in_batch or len(losses)
        self._batch_inputs.append(
            inputs
            | {"logps_chosen": logps_chosen.detach(), "logps_rejected": logps_rejected.detach()}
        )
        margin = self.beta * ((logps_chosen - ref_chosen) - (logps_rejected - ref_rejected))
        with torch.no_grad():
            self._batch_log.append(
                {
                    name: self.accelerator.gather(weight * value.detach()).sum().item()
                    for name, value in {
                        "pairs": torch.ones_like(losses),
                        "loss": losses,
                        "loss_dpo": loss_dpo,
                        "loss_nll": loss_nll,
                        "logps_chosen": logps_chosen,
                        "logps_rejected": logps_rejected,
                        "logratio_chosen": logps_chosen - ref_chosen,
                        "nll_chosen": -logps_chosen / lengths,
                        "margin": margin,
                        "accuracy": (margin > 0).float() + 0 * margin,
                        "tokens": inputs["tokens"],
                    }.items()
                }
            )
        # Data-parallel training averages gradients over processes: the factor undoes that.
        return (weight * losses).sum() / pairs * self.accelerator.num_processes

    def log(self, logs, start_time=None):
        """One row per optimiser step: means over its pairs."""
        if "loss" in logs and self._batch_log:
            total = {key: sum(row[key] for row in self._batch_log) for key in self._batch_log[0]}
            self._batch_log.clear()
            pairs = total.pop("pairs")
            tokens = total.pop("tokens")
            kept = {
                key: value / pairs
                for key, value in total.items()
                if self.dpo_weight or key not in OF_REFERENCE
            }
            logs = {
                **kept,
                "grad_norm": float(logs["grad_norm"]),
                "learning_rate": logs["learning_rate"],
                "tokens": int(tokens),
            }
        super(DPOTrainer, self).log(logs, start_time)
        self._batch_inputs.clear()

    def save_batch(self, tokenizer) -> Path | None:
        """The pairs of the step in hand as text with their numbers, for a look at what broke it."""
        if not self.checkpoints:
            return None
        rows = []
        for batch in self._batch_inputs:
            texts = tokenizer.batch_decode([ids[ids != self.pad_id] for ids in batch["input_ids"]])
            pairs = len(batch["ref_chosen"])
            numbers = {
                name: batch[name].tolist()
                for name in ("ref_chosen", "ref_rejected", "logps_chosen", "logps_rejected")
            }
            rows += [
                {
                    "texts": texts[i::pairs],
                    **{name: str(values[i]) for name, values in numbers.items()},
                }
                for i in range(pairs)
            ]
        path = Path(self.checkpoints) / "not_finite.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        return path


class _EpochByEpoch(torch.utils.data.Sampler):
    """A sampler whose order depends on the seed and the epoch alone: also where training goes on in the middle of one.

    The first epoch takes its order from the generator that the trainer has just seeded, which a resumed one has again;
    the library would give it to the others, too.
    """

    def __init__(self, sampler, epoch: Callable[[], int], seed: int):
        self.sampler, self.epoch, self.seed = sampler, epoch, seed

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        if self.epoch():
            self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)


class _NoReference(torch.nn.Module):
    """Stands for the reference in TRL's trainer, which would otherwise make one from a copy of the adapter and hash all weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config


def needs_loss_scaling(model) -> bool:
    """fp16 on a GPU: its small gradients would be rounded to nothing without the scaler of mixed-precision training."""
    return model.dtype == torch.float16 and model.device.type == "cuda"


def _trained(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _halves(batch: dict) -> list[dict]:
    """A batch of pairs as two; tensors with two rows a pair have all winners first, then all losers."""
    pairs = len(batch["ref_chosen"])
    parts = (range(pairs // 2), range(pairs // 2, pairs))

    def rows(value, part):
        if value.dim() == 0:
            return value
        return value[list(part) if len(value) == pairs else [*part, *(i + pairs for i in part)]]

    return [{key: rows(value, part) for key, value in batch.items()} for part in parts]


def _too_large(inputs, checkpoints: bool) -> str:
    pairs, columns = len(inputs["ref_chosen"]), inputs["input_ids"].shape[1]
    advice = ["a larger card"]
    if pairs > 1:
        advice.insert(0, "a smaller --micro-batch-size")
    if not checkpoints:
        advice.insert(0, "--gradient-checkpointing true")
    return (
        f"Out of memory in training with one micro-batch of {pairs} pair{'s' * (pairs > 1)}, {columns} columns wide. Nothing "
        f"finished is lost: the same command goes on with {' or '.join(advice)}. A smaller --max-length would do, too, but is "
        "another run and needs another --out."
    )


def collapse_signs(rows: list[dict], steps: int) -> list[str]:
    """What the last ten rows of a training log say of a collapse in progress, once warm-up is over."""
    last = rows[-10:]
    if len(rows) < max(20, steps // 5) or "accuracy" not in last[0]:
        return []
    accuracy, ratio = (
        sum(row[name] for row in last) / len(last) for name in ("accuracy", "logratio_chosen")
    )
    found = []
    if accuracy < 0.5:
        found.append(f"losers gain on winners: reward accuracy {accuracy:.2f} over ten steps")
    if ratio < -1:
        found.append(
            f"winners lose probability: {ratio:.1f} nats a response against M_t over ten steps. Lower --learning-rate, or "
            "raise --alpha"
        )
    return found


class Watch(TrainerCallback):
    """Keeps the log rows, draws the bar, and stops a run whose numbers are not finite or whose reference is not M_t.

    `patience`: gradients that may overflow in a row, as fp16's loss scaler looks for its scale by overflowing. `shown`:
    the column beside the loss. `ln2_within`: how far the first DPO term may be from ln 2, its value where both models are one.
    `warn` is told of every sign of a collapse as soon as it shows.
    """

    def __init__(
        self,
        progress: bool,
        patience: int = 0,
        shown: str = "accuracy",
        save_batch=None,
        ln2_within: float = 0,
        warn=lambda warning: None,
    ):
        self.rows, self.progress, self.patience, self.shown, self.overflows = (
            [],
            progress,
            patience,
            shown,
            0,
        )
        self.save_batch, self.ln2_within, self.warn, self.warnings = (
            save_batch,
            ln2_within,
            warn,
            [],
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not self.progress,
            leave=False,
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.shown not in logs:
            return  # the summary at the end
        row = {
            "step": state.global_step,
            **{key: value for key, value in logs.items() if key != "epoch"},
            "seconds": time.perf_counter() - self.started,
        }
        self.rows.append(row)
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss={row['loss']:.3f}, {self.shown}={row[self.shown]:.2f}")
        self.overflows = 0 if math.isfinite(float(row["grad_norm"])) else self.overflows + 1
        if not math.isfinite(row["loss"]) or self.overflows > self.patience:
            saved = self.save_batch() if self.save_batch else None
            raise UserError(
                f"Training stopped at step {state.global_step}: the loss is {row['loss']} and the gradient "
                f"norm {row['grad_norm']}. Lower --learning-rate, or train in a wider dtype."
                + (f" The pairs of that step are in {saved}." if saved else "")
            )
        # A margin of m nats moves the term by about beta m / 2, so that this is the same limit for beta = 0.1.
        if (
            self.ln2_within
            and row["step"] == 1
            and (
                abs(row["loss_dpo"] - math.log(2)) > self.ln2_within
                or abs(row["logratio_chosen"]) > 20 * self.ln2_within
            )
        ):
            raise UserError(
                f"The reference is not the model that training began with: the first DPO term is {row['loss_dpo']:.4f}, "
                f"not ln 2 = 0.6931, or the winners' log-ratio {row['logratio_chosen']:.4f}, not 0. A library changed the "
                "model between scoring and training: install the versions of requirements.lock, and see that nothing else "
                "uses the model meanwhile."
            )
        for warning in self.notice(self.rows, state.max_steps):
            tqdm.write(f"warning: {warning}")
            self.warn(warning)

    def notice(self, rows: list[dict], steps: int) -> list[str]:
        """The signs of a collapse in `rows` that are new, noted with their step."""
        known = {warning.split(":")[0] for warning in self.warnings}
        new = [
            f"{sign} (step {rows[-1]['step']})"
            for sign in collapse_signs(rows, steps)
            if sign.split(":")[0] not in known
        ]
        self.warnings += new
        return new

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class _Keep(TrainerCallback):
    """Asks for a checkpoint every now and then, adds to it what our own callbacks have seen, and takes that back up."""

    def __init__(self, folder: Path, *callbacks):
        self.folder, self.callbacks, self.saved, self.took = (
            folder,
            callbacks,
            time.perf_counter(),
            0.0,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            kept = self.folder / f"checkpoint-{state.global_step}" / "callbacks.json"
            for callback, rows in zip(self.callbacks, json.loads(kept.read_text()), strict=True):
                callback.rows[:] = rows
            watch = self.callbacks[0]
            watch.started -= watch.rows[-1]["seconds"]
            for end in range(1, len(watch.rows) + 1):  # what it has warned of before
                watch.notice(watch.rows[:end], state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = time.perf_counter()
        control.should_save = processes.from_first(
            lambda: self.asked - self.saved >= max(CHECKPOINT_SECONDS, self.took / CHECKPOINT_SHARE)
        )

    def on_save(self, args, state, control, **kwargs):
        processes.wait()  # each has written the state of its own random numbers
        self.saved, folder = time.perf_counter(), self.folder / f"checkpoint-{state.global_step}"
        if (
            not folder.exists() or not processes.is_first()
        ):  # it could not be written, or is another's to write
            return
        try:
            (folder / "callbacks.json").write_text(
                json.dumps([callback.rows for callback in self.callbacks])
            )
            checksums.write(folder, {"seconds": self.callbacks[0].rows[-1]["seconds"]})
        except OSError as error:  # a checkpoint is a help, no result
            shutil.rmtree(folder, ignore_errors=True)
            tqdm.write(
                f"No checkpoint could be written ({error.strerror}): training goes on without."
            )
            return
        older = [
            step
            for path in self.folder.glob("checkpoint-*")
            if (step := _step_of(path)) <= state.global_step
        ]
        for step in sorted(older)[
            :-2
        ]:  # by their steps: the library goes by dates, and a clock may be set back
            shutil.rmtree(self.folder / f"checkpoint-{step}", ignore_errors=True)
        self.took = time.perf_counter() - self.asked


class _Probe(TrainerCallback):
    """Log-probabilities of fixed pairs while something else is trained (the paper's figures 2 to 4)."""

    def __init__(self, pairs, tokenizer, every: int):
        self.pairs, self.tokenizer, self.every, self.rows = pairs, tokenizer, every, []

    def _measure(self, model, step):
        training, prompts = model.training, list(self.pairs["prompt_ids"])
        model.eval()
        row = {"step": step}
        for side in ("chosen", "rejected"):
            scores = models.score(model, self.tokenizer, prompts, list(self.pairs[f"{side}_ids"]))
            row[f"logps_{side}"] = sum(scores) / len(scores)
            row[f"nll_{side}"] = -sum(
                s / len(r) for s, r in zip(scores, self.pairs[f"{side}_ids"])
            ) / len(scores)
        self.rows.append(row)
        model.train(training)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.global_step:  # otherwise it goes on from a checkpoint
            self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, state.global_step)


def _fresh_adapter(model, seed: int) -> None:
    """Draw the A matrices of a zero adapter from `seed`; an adapter that was trained before is left as it is."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.lora_B["default"].weight.any() for layer in layers):
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.lora_A["default"].weight
        bound = 1 / math.sqrt(weight.shape[1])  # PEFT's own: Kaiming uniform with a = sqrt(5)
        models.assign(
            weight, torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
        )


def _check(preferences, alpha, dpo_weight, nll_per) -> None:
    missing = {"prompt_ids", "chosen_ids", "rejected_ids"} - set(preferences.column_names)
    if missing:
        raise UserError(
            f"The pairs lack the columns {', '.join(sorted(missing))}. Build them with pairs.build_pairs."
        )
    if len(preferences) == 0:
        raise UserError(
            "no pairs: there is nothing to train on. See the counts of pairs.build_pairs."
        )
    if (
        alpha < 0
        or dpo_weight < 0
        or alpha + dpo_weight == 0
        or nll_per not in ("sequence", "token")
    ):
        raise UserError(
            f"alpha = {alpha} and dpo_weight = {dpo_weight} must be 0 or more and not both 0; "
            f"nll_per = {nll_per!r} must be sequence or token."
        )


def check_names(lr_scheduler: str, optimizer: str, report_to: str) -> None:
    """Raise `UserError` for a schedule or optimiser that transformers does not know, or a logger that is not installed."""
    from transformers.training_args import OptimizerNames
    from transformers.trainer_utils import SchedulerType

    for option, value, known in (
        ("--lr-scheduler", lr_scheduler, SchedulerType),
        ("--optimizer", optimizer, OptimizerNames),
    ):
        if value not in {kind.value for kind in known}:
            raise UserError(
                f"{option} is {value!r}; transformers knows {', '.join(sorted(kind.value for kind in known))}."
            )
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(
            f"--report-to {report_to}: that package is not installed. `pip install {report_to}`, or leave it out."
        )


def _summary(rows: list[dict]) -> dict:
    """What the training cost, and the DPO term of the first step, which is ln 2 where the reference is M_t."""
    return {
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "seconds": rows[-1]["seconds"],
        "first_loss_dpo": rows[0].get("loss_dpo"),
    }
