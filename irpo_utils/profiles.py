"""The settings of a run: one dataclass, every field of which is a command-line option.

A profile is a file in `recipes/` that changes some of the defaults below: `smoke` (seconds on a
CPU), `cpu` (minutes, the default), and one per real model, with the arithmetic in comments.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from irpo_utils import UserError, methods

RECIPES = Path(__file__).parent / "recipes"
AT_LEAST = {
    0: "seed iterations alpha warmup_ratio",
    1: "lora_r lora_alpha n_questions n_samples max_new_tokens sampling_batch_size k_pairs "
    "max_length max_pairs batch_size micro_batch_size probe_every n_eval_questions eval_samples "
    "eval_samples_ends",
}
CHOICES = {
    "pairing": ("wrap_around", "random"),
    "reference": ("previous", "start"),
    "dtype": (None, "float32", "bfloat16", "float16"),
    "eval_split": ("train", "validation", "test", "math500"),
    "report_to": ("none", "tensorboard", "trackio", "wandb"),
}


def _option(default, help_text: str):
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help_text})


@dataclass
class Profile:
    """All that a run depends on."""

    task: str = _option("word_problems", "the questions: word_problems, gsm8k, math, jsonl, ...")
    model: str = _option("seed", "M_0: a short name, a hub name or a folder")
    method: str = _option("irpo", "an entry of methods.METHODS, e.g. irpo; scripts/run.py has more")
    start: str | None = _option(None, "adapter folder or finished run to start from")
    data: str | None = _option(None, "local folder or file with the questions; none: the hub")
    seed: int = _option(0, "seed of the choice of questions, of sampling and of training")
    iterations: int = _option(4, "T: how often to sample, grade, pair and train")
    engine: str = _option("plain", "how to compute: plain, or a module of irpo_utils/engines")

    quantize: bool | None = _option(True, "base in NF4 (4 bits); none: on a GPU only if needed")
    dequantize: bool = _option(False, "unpack the 4-bit weights once: same numbers, more memory")
    shard: bool = _option(False, "split every layer over processes (FSDP2, scripts/run.py)")
    dtype: str | None = _option(None, "float32, bfloat16, float16; none: the device's best")
    lora_r: int = _option(16, "rank of the LoRA matrices")
    lora_alpha: int = _option(32, "LoRA scale times rank")
    pad_token: str | None = _option(None, "pad token for tokenizers that have none")

    n_questions: int | None = _option(600, "training questions per iteration; none: all")
    fresh_questions: bool = _option(False, "other questions per iteration, until all were used")
    n_samples: int = _option(8, "N: completions per question and iteration")
    temperature: list[float] = _option([1.0], "per iteration; the last one is used from then on")
    top_p: float = _option(1.0, "nucleus sampling mass")
    max_new_tokens: int = _option(80, "longest completion in tokens")
    sampling_batch_size: int = _option(256, "completions at once; N if that is more")

    k_pairs: int = _option(4, "K: pairs per question")
    gold: bool = _option(False, "add the gold solution to the chosen ones, as the paper on GSM8K")
    deduplicate: bool = _option(True, "leave out completions that repeat an earlier one")
    pairing: str = _option("wrap_around", "wrap_around (the paper) or random")
    keep_pairs: bool = _option(False, "train on the pairs of all iterations so far")
    max_length: int | None = _option(None, "drop pairs with more tokens than this")
    max_pairs: int | None = _option(None, "keep this many random pairs (the paper: 60,000)")

    loss: str = _option("dpo_nll", "an entry of training.LOSSES, e.g. dpo_nll or sft")
    alpha: float = _option(1.0, "weight of the NLL term; 0 is DPO")
    beta: float = _option(0.1, "DPO's beta")
    reference: str = _option("previous", "previous (M_t, the paper) or start (M_0)")
    learning_rate: float = _option(2e-5, "peak learning rate of AdamW")
    epochs: float = _option(1.0, "passes over the pairs")
    max_steps: int = _option(-1, "exactly this many optimiser steps instead of epochs")
    batch_size: int = _option(16, "pairs per optimiser step")
    micro_batch_size: int | None = _option(None, "pairs per forward pass; none: what fits a GPU")
    warmup_ratio: float = _option(0.1, "share of the steps with rising learning rate")
    lr_scheduler: str = _option("cosine", "schedule after warm-up, as named in transformers")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    gradient_checkpointing: bool | None = _option(None, "recompute activations; none: if needed")
    optimizer: str = _option("adamw_torch", "optimiser as named in transformers")
    probe: str | None = _option(None, "pairs whose log-probabilities are logged; none: the run's")
    probe_every: int | None = _option(None, "log them every so many steps (scripts/run.py)")
    report_to: str = _option("none", "tensorboard, trackio, wandb or none")

    allow_overlap: bool = _option(False, "allow evaluation questions among the training ones")
    eval_split: str = _option("test", "split to evaluate on; choose settings on validation")
    n_eval_questions: int | None = _option(None, "questions of that split; none: all")
    eval_samples: int = _option(8, "completions per question for sampled accuracy, pass@k")
    eval_samples_ends: int = _option(32, "the same at M_0 and at the last iteration")
    eval_temperature: float = _option(1.0, "temperature of those completions")

    def __post_init__(self):
        """Refuse what cannot work, naming the option."""
        for name, known in CHOICES.items():
            self._need(getattr(self, name) in known, name, f"one of {', '.join(map(str, known))}")
        for name, kind in {option.name: str(option.type) for option in fields(self)}.items():
            if isinstance(value := getattr(self, name), str):
                self._need("str" in kind, name, f"of type {kind}")
                # `datasets` would write such a path to another file.
                self._need(not re.search("::|://", value), name, "without '::' and '://'")
        for low, listed in AT_LEAST.items():
            for name in listed.split():
                value = getattr(self, name)
                self._need(value is None or low <= value < math.inf, name, f"at least {low}")
        for name in ("learning_rate", "beta", "max_grad_norm", "eval_temperature", "epochs"):
            self._need(0 < getattr(self, name) < math.inf, name, "above 0")
        self._need(self.alpha > 0 or self.loss != "sft", "alpha", "above 0 with --loss sft")
        given = self.temperature if isinstance(self.temperature, list) else []
        good = given and all(0 < t < math.inf for t in given)
        self._need(good, "temperature", "a list of one number above 0, or of one per iteration")
        self._need(self.max_steps == -1 or self.max_steps > 0, "max_steps", "-1 or above 0")
        self._need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._need(self.warmup_ratio < 1, "warmup_ratio", "a share below 1")
        micro = self.micro_batch_size or self.batch_size
        self._need(self.batch_size % micro == 0, "batch_size", f"a multiple of {micro}")

    def _need(self, good, name: str, what: str) -> None:
        if not good:
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            raise UserError(f"{option} is {value!r}: it must be {what}. See `run --help`.")

    def temperature_of(self, iteration: int) -> float:
        """Sampling temperature when sampling from M_t."""
        return self.temperature[min(iteration, len(self.temperature) - 1)]


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def get(name: str, **changes) -> Profile:
    """The profile of that name with some fields changed."""
    if name not in names():
        raise UserError(f"There is no profile {name!r}. The profiles are {', '.join(names())}.")
    known = sorted(Profile.__annotations__)
    if unknown := sorted(set(changes) - set(known)):
        raise UserError(f"There is no setting {', '.join(unknown)}, only {', '.join(known)}.")
    base = Profile(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    methods.check_conflict(changes.get("method", base.method), changes)
    return replace(base, **changes)
