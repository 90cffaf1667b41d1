"""GRPO (Shao et al. 2024, arXiv 2402.03300) by TRL's own trainer, beside the methods that learn from pairs.

One iteration is one pass over the same questions with the same N: about as many completions as Iterative RPO draws (TRL
leaves out a last batch that is not full), but every batch of them comes from the model as it is by then, is rewarded,
learnt from once and thrown away.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings

from datasets import Dataset
from transformers import PrinterCallback

from irpo_utils import grading, sampling, training
from irpo_utils.profiles import Profile


def train(
    model, tokenizer, questions, task, p: Profile, seed: int, progress: bool = True
) -> training.TrainingResult:
    """Train the adapter of `model` in place by one pass of GRPO over the questions, rewards from `grading`.

    `p.batch_size` counts questions in an optimiser step, each with `p.n_samples` completions, drawn by
    `sampling.sample` at the first temperature of the profile; `p.micro_batch_size`, in pairs, is two completions each in a
    forward pass, and no result depends on it. No KL term; advantages are divided by the standard deviation of their
    group; the loss is a mean over all tokens of the batch (where Shao et al. take one per completion first). Log
    columns: `step`, `loss`, `reward` (mean), `grad_norm`, `learning_rate`, `tokens` (sampled), `seconds`.
    """
    from trl import GRPOConfig, GRPOTrainer

    by_prompt = {sampling.render_prompt(tokenizer, task.prompt(row)): row for row in questions}
    calls, tokens = itertools.count(), []

    def rollout(prompts: list[str], trainer) -> dict:
        """N completions of each prompt of the batch, which comes N times in a row."""
        unique = list(dict.fromkeys(prompts))
        rows = Dataset.from_list([by_prompt[prompt] for prompt in unique])
        drawn = sampling.sample(
            model.eval(),
            tokenizer,
            rows,
            task,
            n=len(prompts) // len(unique),
            temperature=p.temperature_of(0),
            top_p=p.top_p,
            max_new_tokens=p.max_new_tokens,
            seed=seed * 10_000 + next(calls),
            batch_size=p.sampling_batch_size,
            progress=False,
        )
        model.train()
        tokens.append(sum(drawn["n_tokens"]))
        graded = grading.grade(drawn, task)
        return {
            "prompt_ids": graded["prompt_ids"][:],
            "completion_ids": graded["completion_ids"][:],
            "logprobs": None,
            "correct": graded["correct"][:],
        }

    in_a_step = min(p.batch_size, len(by_prompt)) * p.n_samples
    at_once = math.gcd(in_a_step, 2 * p.micro_batch_size) if p.micro_batch_size else in_a_step
    with (
        tempfile.TemporaryDirectory() as folder,
        training.left_as_it_was(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # that rollout functions are new
        config = GRPOConfig(
            output_dir=folder,
            learning_rate=p.learning_rate,
            num_train_epochs=1,
            num_generations=p.n_samples,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=in_a_step // at_once,
            max_completion_length=p.max_new_tokens,
            temperature=p.temperature_of(0),
            top_p=p.top_p,
            warmup_steps=p.warmup_ratio,
            lr_scheduler_type=p.lr_scheduler,
            max_grad_norm=p.max_grad_norm,
            optim=p.optimizer,
            weight_decay=0.0,
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            fp16=False,
            use_cpu=model.device.type == "cpu",
            gradient_checkpointing=p.gradient_checkpointing,
            dataloader_pin_memory=False,
        )
        watch = training.Watch(progress, shown="reward")
        with training.adapter_as_it_was(model):
            trainer = GRPOTrainer(
                model,
                lambda correct, **_: [float(right) for right in correct],
                config,
                Dataset.from_dict({"prompt": list(by_prompt)}),
                processing_class=tokenizer,
                callbacks=[watch],
                rollout_func=rollout,
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    rows = [
        {
            "step": row["step"],
            "loss": row["loss"],
            "reward": row["reward"],
            "grad_norm": row["grad_norm"],
            "learning_rate": row["learning_rate"],
            "tokens": count,
            "seconds": row["seconds"],
        }
        for row, count in zip(watch.rows, tokens, strict=True)
    ]
    summary = {"steps": len(rows), "tokens": sum(tokens), "seconds": rows[-1]["seconds"]}
    return training.TrainingResult(model, Dataset.from_list(rows), summary=summary)
