"""Settings of a run as one plain dataclass, one instance per machine and task. Every field is a command-line option."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from irpo_utils import UserError


# What the artefacts of each stage depend on, beside the model, the questions and what the stage works on.
SAMPLING = (
    "task",
    "seed",
    "quantize",
    "dequantize",
    "dtype",
    "pad_token",
    "n_questions",
    "fresh_questions",
    "n_samples",
    "top_p",
    "max_new_tokens",
    "sampler",
)
EVALUATION = (
    "task",
    "seed",
    "quantize",
    "dequantize",
    "dtype",
    "pad_token",
    "max_new_tokens",
    "eval_split",
    "n_eval_questions",
    "eval_temperature",
    "sampler",
)
PAIRING = (
    "task",
    "method",
    "seed",
    "k_pairs",
    "gold",
    "deduplicate",
    "pairing",
    "max_length",
    "max_pairs",
)
TRAINING = (
    "task",
    "method",
    "seed",
    "quantize",
    "dequantize",
    "dtype",
    "pad_token",
    "lora_r",
    "lora_alpha",
    "n_questions",
    "fresh_questions",
    "n_samples",
    "temperature",
    "max_new_tokens",
    "keep_pairs",
    "alpha",
    "beta",
    "dpo_weight",
    "reference",
    "nll_per",
    "learning_rate",
    "epochs",
    "max_steps",
    "batch_size",
    "warmup_ratio",
    "lr_scheduler",
    "max_grad_norm",
    "optimizer",
)
# What may change when a run is gone on with: no result depends on it beyond rounding (of micro_batch_size with nll_per=sequence).
MAY_CHANGE = (
    "sampling_batch_size",
    "micro_batch_size",
    "gradient_checkpointing",
    "report_to",
    "shard",
)


def _option(default: Any, text: str):
    """A dataclass field with a help text for the command line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Profile:
    """All that a run depends on. The names are those of the stages' arguments."""

    task: str = _option(
        "word_problems", "word_problems, word_choices, gsm8k, svamp, arc_challenge, math or jsonl"
    )
    model: str = _option("seed", "short name, hub name or folder of M_0")
    method: str = _option(
        "irpo",
        "what the model is trained on: an entry of irpo_utils/methods.py, e.g. irpo or sft_gold",
    )
    start: str | None = _option(
        None, "adapter folder or finished run to begin with as M_0; none: the model as it is"
    )
    data: str | None = _option(
        None,
        "local folder or file with the questions; otherwise the hub (the word_ tasks need none)",
    )
    seed: int = _option(0, "seed of the choice of questions, of sampling and of training")
    iterations: int = _option(4, "T: how often to sample, grade, pair and train")

    quantize: bool = _option(True, "keep the base in 4 bits (NF4, double quantisation)")
    dequantize: bool = _option(
        False, "unpack the 4-bit weights once: same numbers, more memory, faster on a CPU"
    )
    shard: bool = _option(
        False, "split every layer over the processes of torchrun (FSDP2): for a model past one card"
    )
    dtype: str | None = _option(
        None, "float32, bfloat16 or float16; none: what the device is good at"
    )
    lora_r: int = _option(16, "rank of the LoRA matrices")
    lora_alpha: int = _option(32, "LoRA scale times rank")
    pad_token: str | None = _option(None, "pad token for tokenizers that have none")

    n_questions: int | None = _option(600, "training questions per iteration; none: all")
    fresh_questions: bool = _option(
        False, "other questions in every iteration; the paper keeps one fixed set"
    )
    n_samples: int = _option(8, "N: completions per question and iteration")
    temperature: list[float] = _option(
        [1.0], "sampling temperature per iteration; the last one serves all that follow"
    )
    top_p: float = _option(1.0, "nucleus sampling mass")
    max_new_tokens: int = _option(80, "longest completion in tokens")
    sampling_batch_size: int = _option(
        256, "completions decoded at once; lower it when memory runs out"
    )

    sampler: str = _option(
        "transformers", "who writes the completions: transformers, or vllm, a server at VLLM_URL"
    )

    k_pairs: int = _option(4, "K: pairs per question")
    gold: bool = _option(False, "add the gold solution to the winners, as the paper does on GSM8K")
    deduplicate: bool = _option(
        True, "leave out completions that repeat one of the same question and verdict"
    )
    pairing: str = _option("wrap_around", "wrap_around (the paper) or random")
    keep_pairs: bool = _option(
        False, "train on the pairs of all iterations so far, not on the newest alone"
    )
    max_length: int | None = _option(None, "drop pairs with more tokens than this")
    max_pairs: int | None = _option(
        None, "keep at most this many pairs, drawn at random (the paper: 60,000)"
    )

    alpha: float = _option(1.0, "weight of the NLL term")
    beta: float = _option(0.1, "DPO's beta")
    dpo_weight: float = _option(1.0, "weight of the DPO term; 0 trains on the winners alone")
    reference: str = _option(
        "previous", "reference of the DPO term: previous (M_t, the paper) or start (M_0)"
    )
    nll_per: str = _option("sequence", "normalise the NLL per sequence (the paper) or per token")
    learning_rate: float = _option(2e-5, "peak learning rate of AdamW")
    epochs: float = _option(1.0, "passes over the pairs")
    max_steps: int = _option(
        -1, "train for exactly this many optimiser steps, whatever epochs says; -1: for the epochs"
    )
    batch_size: int = _option(16, "pairs per optimiser step")
    micro_batch_size: int | None = _option(
        None, "pairs per forward pass; lower it when memory runs out"
    )
    warmup_ratio: float = _option(0.1, "share of the steps in which the learning rate rises")
    lr_scheduler: str = _option("cosine", "schedule after warm-up")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    gradient_checkpointing: bool = _option(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    optimizer: str = _option(
        "adamw_torch", "transformers' name of the optimiser, e.g. paged_adamw_8bit on a GPU"
    )
    probe: str | None = _option(
        None, "pairs of another run whose log-probabilities are logged; none: the run's own"
    )
    probe_every: int | None = _option(
        None, "log them every so many steps; none: before and after training"
    )
    report_to: str = _option("none", "tensorboard, trackio, wandb or none")

    allow_overlap: bool = _option(
        False, "go on although evaluation questions are among the training questions"
    )
    eval_split: str = _option(
        "test", "split to evaluate on; choose settings on validation, report on test"
    )
    n_eval_questions: int | None = _option(None, "questions of that split; none: all")
    eval_samples: int = _option(
        8, "completions per question for sampled accuracy, majority vote and pass@k"
    )
    eval_samples_ends: int = _option(32, "the same at M_0 and at the last iteration")
    eval_temperature: float = _option(1.0, "temperature of those completions")

    def __post_init__(self):
        """Refuse what cannot work, naming the field."""
        for name in (
            "n_samples",
            "k_pairs",
            "batch_size",
            "max_new_tokens",
            "sampling_batch_size",
            "eval_samples",
            "eval_samples_ends",
        ):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1. "
                    "`python -m irpo_utils run --help` says what it counts."
                )
        for name in (
            "n_questions",
            "n_eval_questions",
            "max_pairs",
            "max_length",
            "micro_batch_size",
            "lora_r",
            "lora_alpha",
            "probe_every",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1, or left out."
                )
        sound = {
            "learning_rate": self.learning_rate > 0,
            "epochs": 0 < self.epochs < math.inf,
            "beta": self.beta > 0,
            "alpha": self.alpha >= 0,
            "dpo_weight": self.dpo_weight >= 0 and self.alpha + self.dpo_weight > 0,
            "seed": self.seed >= 0,
            "warmup_ratio": 0 <= self.warmup_ratio < 1,
            "max_grad_norm": self.max_grad_norm > 0,
            "top_p": 0 < self.top_p <= 1,
            "max_steps": self.max_steps == -1 or self.max_steps > 0,
            "eval_temperature": self.eval_temperature > 0,
            "nll_per": self.nll_per in ("sequence", "token"),
            "pairing": self.pairing in ("wrap_around", "random"),
            "sampler": self.sampler in ("transformers", "vllm"),
            "reference": self.reference in ("previous", "start"),
            "iterations": self.iterations >= 0,
        }
        for name, good in sound.items():
            if not good:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}, which cannot work. "
                    "`python -m irpo_utils run --help` says what it is for."
                )
        if not self.temperature or min(self.temperature) <= 0:
            raise UserError(
                f"--temperature is {self.temperature}: give one number above 0, or one per iteration."
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batch-size {self.micro_batch_size}."
            )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError(f"--dtype is {self.dtype!r}: it must be float32, bfloat16 or float16.")
        if self.eval_split not in ("train", "validation", "test"):
            raise UserError(f"--eval-split is {self.eval_split!r}: it must be validation or test.")

    def temperature_of(self, iteration: int) -> float:
        """Sampling temperature when sampling from M_t."""
        return self.temperature[min(iteration, len(self.temperature) - 1)]


def _gpu(model: str, **changes) -> Profile:
    """A real model on GSM8K with the paper's K, temperatures and loss, at a size for one card.

    7,473 - 1,000 held out = 6,473 questions; 2,000 of them x 10 samples x about 200 tokens = 4 M tokens an iteration.
    """
    settings = dict(
        task="gsm8k",
        model=model,
        n_questions=2000,
        n_samples=10,
        temperature=[0.8, 0.8, 1.3, 1.3],
        max_new_tokens=400,
        sampling_batch_size=320,
        k_pairs=10,
        gold=True,
        max_length=1024,
        max_pairs=8000,
        learning_rate=5e-6,
        micro_batch_size=4,
        gradient_checkpointing=True,
        optimizer="paged_adamw_8bit",
        eval_temperature=0.8,
    )
    return Profile(**{**settings, **changes})


PROFILES: dict[str, Profile] = {
    # Seconds on a CPU: for tests and for running a notebook through.
    "smoke": Profile(
        iterations=2,
        n_questions=60,
        n_samples=4,
        k_pairs=2,
        n_eval_questions=50,
        eval_samples=4,
        eval_samples_ends=4,
    ),
    # Minutes on a CPU: the default. Settings chosen on the validation split, see figures/LOG.md.
    "cpu": Profile(),
    # A real model on real questions without a GPU, in two runs. First SFT on short gold solutions of GSM8K, as
    # SmolLM2-135M as it is hardly ever comes to an answer: 1,000 of them x 180 tokens.
    "smollm2-135m-sft": Profile(
        task="gsm8k",
        model="smollm2-135m",
        method="sft_gold",
        dtype="bfloat16",
        dequantize=True,
        iterations=1,
        n_questions=None,
        max_length=200,
        max_pairs=1000,
        learning_rate=2e-4,
        micro_batch_size=4,
        max_new_tokens=128,
        sampling_batch_size=128,
        n_eval_questions=100,
        eval_samples=1,
        eval_samples_ends=1,
        eval_temperature=0.7,
    ),
    # Then three iterations from there on SVAMP: 80 questions x 16 samples x 60 tokens each, 80,000 tokens.
    "smollm2-135m-cpu": Profile(
        task="svamp",
        model="smollm2-135m",
        start="runs/smollm2-135m-sft",
        dtype="bfloat16",
        dequantize=True,
        iterations=3,
        n_questions=80,
        n_samples=16,
        temperature=[0.7],
        max_new_tokens=128,
        sampling_batch_size=128,
        k_pairs=8,
        learning_rate=1e-4,
        batch_size=8,
        micro_batch_size=4,
        n_eval_questions=200,
        eval_samples=2,
        eval_samples_ends=4,
        eval_temperature=0.7,
    ),
    "smollm2-135m": _gpu("smollm2-135m", micro_batch_size=8, learning_rate=2e-5),
    "smollm2-360m": _gpu("smollm2-360m", learning_rate=1e-5),
    "smollm2-1.7b": _gpu(
        "smollm2-1.7b", sampling_batch_size=120
    ),  # no grouped queries: 0.2 MB of cache a token
    "qwen2.5-0.5b": _gpu("qwen2.5-0.5b", learning_rate=1e-5),
    "qwen2.5-1.5b": _gpu("qwen2.5-1.5b"),
    "qwen3-0.6b": _gpu("qwen3-0.6b", learning_rate=1e-5, sampling_batch_size=160),
    "llama-3.2-1b": _gpu("llama-3.2-1b", pad_token="<|finetune_right_pad_id|>"),
    "llama-3.2-3b": _gpu(
        "llama-3.2-3b",
        pad_token="<|finetune_right_pad_id|>",
        micro_batch_size=2,
        sampling_batch_size=160,
    ),
    "gemma-3-1b": _gpu("gemma-3-1b"),
    "llama-3.1-8b": _gpu(
        "llama-3.1-8b",
        pad_token="<|finetune_right_pad_id|>",
        micro_batch_size=1,
        sampling_batch_size=120,
    ),
    # The protocol as published (section 3.1), for reading and for those who can: 5000 steps of 16. What differs: the paper
    # trains all weights, this is QLoRA; it takes the best checkpoint of at most 5000 steps by 1,000 held-out training
    # questions, this the last one; and schedule and warm-up, on which it is silent, are ours.
    "paper": Profile(
        task="gsm8k",
        model="llama-2-70b-chat",
        quantize=True,
        pad_token="<unk>",
        n_questions=None,
        n_samples=30,
        temperature=[0.8, 0.8, 1.3, 1.3],
        max_new_tokens=1024,
        k_pairs=10,
        gold=True,
        deduplicate=False,
        max_length=2048,
        max_pairs=60_000,
        learning_rate=7e-7,
        max_steps=5000,
        micro_batch_size=1,
        gradient_checkpointing=True,
        sampling_batch_size=60,
        eval_temperature=0.8,
        eval_samples=32,
    ),
}


def get(name: str, **changes) -> Profile:
    """The profile of that name with some fields changed; raises `UserError` for an unknown name or field."""
    if name not in PROFILES:
        raise UserError(f"There is no profile {name!r}. The profiles are {', '.join(PROFILES)}.")
    known = {f.name for f in dataclasses.fields(Profile)}
    if unknown := sorted(set(changes) - known):
        raise UserError(
            f"A profile has no field {', '.join(unknown)}. The fields are {', '.join(sorted(known))}."
        )
    return dataclasses.replace(PROFILES[name], **changes)
