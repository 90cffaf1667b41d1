"""The settings of a run: one plain dataclass, every field of which is a command-line option.

`smoke` and `cpu` are below. Profiles for real models are files in `recipes/`, one per model, with the
arithmetic in comments.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from irpo_utils import UserError, methods

RECIPES = Path(__file__).parent / "recipes"


def _option(default: Any, text: str):
    """A dataclass field with a help text for the command line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Profile:
    """All that a run depends on."""

    task: str = _option("word_problems", "the questions: word_problems, gsm8k, math, jsonl, ...")
    model: str = _option("seed", "M_0: a short name, a hub name or a folder")
    method: str = _option("irpo", "an entry of irpo_utils/methods.py, e.g. irpo or sft_gold")
    start: str | None = _option(
        None, "adapter folder or finished run to start from; none: the model"
    )
    data: str | None = _option(None, "local folder or file with the questions; none: the hub")
    seed: int = _option(0, "seed of the choice of questions, of sampling and of training")
    iterations: int = _option(4, "T: how often to sample, grade, pair and train")
    engine: str = _option("plain", "how to compute: plain, or a module of irpo_utils/engines")

    quantize: bool = _option(True, "keep the base in 4 bits (NF4, double quantisation)")
    dequantize: bool = _option(False, "unpack the 4-bit weights once: same numbers, more memory")
    shard: bool = _option(False, "split every layer over the processes of torchrun (FSDP2)")
    dtype: str | None = _option(
        None, "float32, bfloat16 or float16; none: what the device is good at"
    )
    lora_r: int = _option(16, "rank of the LoRA matrices")
    lora_alpha: int = _option(32, "LoRA scale times rank")
    pad_token: str | None = _option(None, "pad token for tokenizers that have none")

    n_questions: int | None = _option(600, "training questions per iteration; none: all")
    fresh_questions: bool = _option(
        False, "other questions in every iteration (the paper: the same)"
    )
    n_samples: int = _option(8, "N: completions per question and iteration")
    temperature: list[float] = _option([1.0], "per iteration; the last one is used from then on")
    top_p: float = _option(1.0, "nucleus sampling mass")
    max_new_tokens: int = _option(80, "longest completion in tokens")
    sampling_batch_size: int = _option(256, "completions decoded at once; lower it to save memory")

    k_pairs: int = _option(4, "K: pairs per question")
    gold: bool = _option(False, "add the gold solution to the chosen ones, as the paper on GSM8K")
    deduplicate: bool = _option(True, "leave out completions that repeat an earlier one")
    pairing: str = _option("wrap_around", "wrap_around (the paper) or random")
    keep_pairs: bool = _option(False, "train on the pairs of all iterations so far")
    max_length: int | None = _option(None, "drop pairs with more tokens than this")
    max_pairs: int | None = _option(None, "keep at most this many random pairs (the paper: 60,000)")

    loss: str = _option("dpo_nll", "an entry of training.LOSSES: dpo_nll, dpo_nll_per_token, sft")
    alpha: float = _option(1.0, "weight of the NLL term; 0 is DPO")
    beta: float = _option(0.1, "DPO's beta")
    reference: str = _option(
        "previous", "reference model: previous (M_t, the paper) or start (M_0)"
    )
    learning_rate: float = _option(2e-5, "peak learning rate of AdamW")
    epochs: float = _option(1.0, "passes over the pairs")
    max_steps: int = _option(-1, "exactly this many optimiser steps instead of epochs; -1: epochs")
    batch_size: int = _option(16, "pairs per optimiser step")
    micro_batch_size: int | None = _option(None, "pairs per forward pass; lower it to save memory")
    warmup_ratio: float = _option(0.1, "share of the steps in which the learning rate rises")
    lr_scheduler: str = _option("cosine", "schedule after warm-up, as named in transformers")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, slower")
    optimizer: str = _option("adamw_torch", "optimiser as named in transformers")
    probe: str | None = _option(
        None, "pairs whose log-probabilities are logged; none: the run's own"
    )
    probe_every: int | None = _option(None, "log them every so many steps; none: before and after")
    report_to: str = _option("none", "tensorboard, trackio, wandb or none")

    allow_overlap: bool = _option(False, "allow evaluation questions among the training questions")
    eval_split: str = _option("test", "split to evaluate on: choose settings on validation")
    n_eval_questions: int | None = _option(None, "questions of that split; none: all")
    eval_samples: int = _option(8, "completions per question for sampled accuracy and pass@k")
    eval_samples_ends: int = _option(32, "the same at M_0 and at the last iteration")
    eval_temperature: float = _option(1.0, "temperature of those completions")

    def __post_init__(self):
        """Refuse what cannot work, naming the option."""
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            self._need(value is None or value >= 1, name, "at least 1")
        for name in ("iterations", "seed", "alpha"):
            self._need(getattr(self, name) >= 0, name, "0 or more")
        for name in ("learning_rate", "beta", "max_grad_norm", "eval_temperature"):
            self._need(0 < getattr(self, name) < math.inf, name, "above 0")
        for name, known in CHOICES.items():
            self._need(getattr(self, name) in known, name, f"one of {', '.join(map(str, known))}")
        self._need(0 < self.epochs < math.inf, "epochs", "above 0")
        self._need(0 <= self.warmup_ratio < 1, "warmup_ratio", "a share of the steps below 1")
        self._need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._need(self.max_steps == -1 or self.max_steps > 0, "max_steps", "-1 or above 0")
        good = self.temperature and min(self.temperature) > 0
        self._need(good, "temperature", "one number above 0, or one per iteration")
        micro = self.micro_batch_size or self.batch_size
        self._need(
            self.batch_size % micro == 0, "batch_size", f"a multiple of the micro-batch, {micro}"
        )
        for name in ("data", "start", "model", "probe"):
            # `datasets` would take such a path for an address and write to another file.
            usable = not re.search("::|://", getattr(self, name) or "")
            self._need(usable, name, "a path without '::' and '://'")

    def _need(self, good, name: str, what: str) -> None:
        if not good:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(self, name)!r}: it must be {what}. "
                "`python -m irpo_utils run --help` says what it is for."
            )

    def temperature_of(self, iteration: int) -> float:
        """Sampling temperature when sampling from M_t."""
        return self.temperature[min(iteration, len(self.temperature) - 1)]


AT_LEAST_ONE = (
    "n_samples k_pairs batch_size max_new_tokens sampling_batch_size eval_samples eval_samples_ends "
    "n_questions n_eval_questions max_pairs max_length micro_batch_size lora_r lora_alpha probe_every"
).split()
CHOICES = {
    "pairing": ("wrap_around", "random"),
    "reference": ("previous", "start"),
    "dtype": (None, "float32", "bfloat16", "float16"),
    "eval_split": ("train", "validation", "test"),
}
PROFILES = {
    # Seconds on a CPU: for tests and for running a notebook through.
    "smoke": dict(
        engine="cpu",
        iterations=2,
        n_questions=60,
        n_samples=4,
        k_pairs=2,
        n_eval_questions=50,
        eval_samples=4,
        eval_samples_ends=4,
    ),
    # Minutes on a CPU: the default. Its settings were chosen on the validation split.
    "cpu": dict(engine="cpu"),
}


def names() -> list[str]:
    """The names of all profiles."""
    return [*PROFILES, *sorted(path.stem for path in RECIPES.glob("*.yaml"))]


def get(name: str, **changes) -> Profile:
    """The profile of that name with some fields changed."""
    if name not in names():
        raise UserError(f"There is no profile {name!r}. The profiles are {', '.join(names())}.")
    known = {f.name for f in dataclasses.fields(Profile)}
    if unknown := sorted(set(changes) - known):
        raise UserError(
            f"A profile has no field {', '.join(unknown)}. The fields are {', '.join(sorted(known))}."
        )
    recipe = RECIPES / f"{name}.yaml"
    base = Profile(**(PROFILES.get(name) or yaml.safe_load(recipe.read_text())))
    changed = {key: value for key, value in changes.items() if value != getattr(base, key)}
    methods.check_conflict(changes.get("method", base.method), changed)
    return dataclasses.replace(base, **changed)
