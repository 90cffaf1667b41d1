"""M_0 of the profile `cpu`, loaded once for all trainings of a small study."""

from __future__ import annotations

from irpo_utils import grading, profiles, sampling, tasks
from irpo_utils.ops import run as runs


class OneModel:
    """The model with its task and engine; trainings change its adapter in place."""

    def __init__(self):
        self.profile = profiles.get("cpu")
        self.task = tasks.get(self.profile.task)
        self.engine = runs.engine_of(self.profile)
        self.model, self.tokenizer = runs.load_model(self.profile)

    def draw(self, questions, seed: int, n: int, temperature: float = 1.0):
        """n graded completions per question, of the model as it is."""
        samples = sampling.sample(
            self.model,
            self.tokenizer,
            questions,
            self.task,
            n=n,
            temperature=temperature,
            max_new_tokens=self.profile.max_new_tokens,
            seed=seed,
            batch_size=self.profile.sampling_batch_size,
            progress=False,
            engine=self.engine,
        )
        return grading.grade(samples, self.task)
