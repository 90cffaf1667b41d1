"""Settings and helpers that several tests of the core import."""

import torch

# A run of a few seconds in which the adapter learns something.
TINY = {
    "n_questions": 8,
    "n_samples": 4,
    "k_pairs": 2,
    "iterations": 1,
    "max_new_tokens": 48,
    "n_eval_questions": 4,
    "eval_samples": 2,
    "eval_samples_ends": 2,
    "batch_size": 4,
    "warmup_ratio": 0.0,
    "learning_rate": 1e-3,
}


def randomise(model, seed: int = 4) -> None:
    """Give the adapter weights that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02, generator=generator)
