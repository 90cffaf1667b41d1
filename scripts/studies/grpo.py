"""GRPO (Shao et al. 2024, arXiv 2402.03300) with TRL's trainer, instead of pairs and DPO.

Importing this module adds it to the table of methods.

One iteration is one pass over the same questions with the same N. It uses about as many completions
as Iterative RPO: TRL leaves out a last batch that is not full. Every batch is sampled from the
current model, rewarded, learnt from once and discarded.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from irpo_utils import UserError, grading, iteration, models, sampling, training
from irpo_utils.methods import METHODS, Method
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes

COLUMNS = ["step", "loss", "reward", "grad_norm", "learning_rate", "tokens", "seconds"]


class Trainer(GRPOTrainer):
    """TRL's trainer with our sampling and grading, and two more columns in its log."""

    # It stops at numbers that are not finite, as the trainer of pairs does.
    _check_numbers = training.IterativeRPOTrainer._check_numbers
    overflows, starts_from_reference = 0, False

    def __init__(self, model, tokenizer, questions, task, p: Profile, config: GRPOConfig):
        prompts = [models.render_prompt(tokenizer, task.prompt(row)) for row in questions]
        self.questions, self.task = dict(zip(prompts, questions, strict=True)), task
        # A server does not have the weights of the current step, so the model itself samples.
        engine = iteration.plugin(f"engines.{'plain' if p.engine == 'vllm' else p.engine}").Engine()
        how = {"max_new_tokens": p.max_new_tokens, "batch_size": p.sampling_batch_size}
        how |= {"temperature": p.temperature_of(0), "top_p": p.top_p}
        self.draw = functools.partial(sampling.sample, engine=engine, progress=False, **how)
        self.seeds, self.started = itertools.count(config.seed * 10_000), time.perf_counter()
        super().__init__(
            model,
            lambda correct, **_: list(map(float, correct)),
            config,
            Dataset.from_dict({"prompt": list(self.questions)}),
            processing_class=tokenizer,
            rollout_func=self.rollout,
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(training.Bar)

    def rollout(self, prompts: list[str], _) -> dict:
        """N graded completions of each prompt, which comes N times in a row."""
        questions = [self.questions[prompt] for prompt in dict.fromkeys(prompts)]
        model, n = self.model.eval(), len(prompts) // len(questions)
        tokenizer, seed = self.processing_class, next(self.seeds)
        samples = self.draw(model, tokenizer, questions, self.task, n=n, seed=seed)
        self.model.train()
        self.sampled_tokens = sum(samples["n_tokens"])
        graded = grading.grade(samples, self.task)
        columns = {name: graded[name][:] for name in ("prompt_ids", "completion_ids", "correct")}
        return {"logprobs": None, **columns}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens"] = self.sampled_tokens
            logs["seconds"] = time.perf_counter() - self.started
        super().log(logs, start_time)
        if "loss" in logs:
            self._check_numbers(logs)


def train(model, tokenizer, questions, task, p: Profile, seed: int) -> Dataset:
    """Train the adapter of `model` in place by one pass of GRPO over the questions.

    `p.batch_size` counts questions per optimiser step, each with `p.n_samples` completions at the
    first temperature of the profile. `p.micro_batch_size` counts pairs, here two completions each;
    no result depends on it. There is no KL term. Advantages are divided by the standard deviation
    of their group. The loss is a mean over all tokens of the batch (in the paper first one per
    completion). Returns the log: one row per optimiser step, with the columns `COLUMNS`.
    Raises `UserError` for one completion per question, and in several processes.
    """
    check_group(p)
    with tempfile.TemporaryDirectory() as folder, training._restored(model) as trained:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `rollout_func` is experimental
            config = _config(model, p, seed, len(questions), folder)
            running = Trainer(model, tokenizer, questions, task, p, config)
        for parameter in trained:
            parameter.requires_grad_(True)
        running.train()
    log = [row for row in running.state.log_history if "tokens" in row]
    return Dataset.from_list(log).select_columns(COLUMNS)


def check_group(p: Profile) -> None:
    """Refuse one completion per question, and several processes."""
    if p.n_samples < 2 or processes.count() > 1:
        raise UserError(
            f"--method {p.method} compares the completions of a question in one process: "
            "--n-samples must be at least 2, and the command must run without a launcher such as "
            "torchrun."
        )


def _config(model, p: Profile, seed: int, n_questions: int, folder: str) -> GRPOConfig:
    batch = min(p.batch_size, n_questions) * p.n_samples  # completions
    micro = math.gcd(batch, 2 * p.micro_batch_size) if p.micro_batch_size else batch
    return GRPOConfig(
        output_dir=folder,
        learning_rate=p.learning_rate,
        num_train_epochs=1,
        num_generations=p.n_samples,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_completion_length=p.max_new_tokens,
        temperature=p.temperature_of(0),
        warmup_steps=p.warmup_ratio,
        lr_scheduler_type=p.lr_scheduler,
        max_grad_norm=p.max_grad_norm,
        optim=p.optimizer,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,  # the base has its dtype, and the adapter stays in fp32
        fp16=model.dtype == torch.float16 and model.device.type != "cpu",  # loss scaling
        use_cpu=model.device.type == "cpu",
        gradient_checkpointing=bool(p.gradient_checkpointing),
        dataloader_pin_memory=False,
    )


METHODS["grpo"] = Method("GRPO", "Shao et al. 2024, arXiv 2402.03300", samples=False, train=train)
