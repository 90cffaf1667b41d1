"""The engine of several processes, and its trainer: each does its share of a batch."""

from __future__ import annotations

import dataclasses
import math

import torch

from irpo_utils import logprobs
from irpo_utils.scale import processes
from irpo_utils.training import IterativeRPOTrainer


class SharedEngine:
    """An `engines.Engine` around another one: each process completes a share of the prompts."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)  # what is not defined here

    def load(self, p, revision: str | None = None, **options):
        processes.wait()  # connects the processes
        return self.inner.load(p, revision, **options)

    def decode(self, model, request, batch_size: int):
        """All completions of all processes in every process, in the order of the prompts."""
        # A process without a prompt takes the first one: engines may need all processes to decode.
        mine = processes.share(list(range(len(request.prompts)))) or [0]
        prompts, ids = ([column[i] for i in mine] for column in (request.prompts, request.ids))
        part = dataclasses.replace(request, prompts=prompts, ids=ids)
        found = [(mine[i], *rest) for i, *rest in self.inner.decode(model, part, batch_size)]
        unique = {(i, k): (i, k, *rest) for i, k, *rest in processes.gather(found)}
        yield from (unique[key] for key in sorted(unique))

    def trainer(self, model):
        return distributed(self.inner.trainer(model))


def distributed(trainer_class=None):
    """A subclass of an `IterativeRPOTrainer` with the same steps in any number of processes."""

    class DistributedTrainer(trainer_class or IterativeRPOTrainer):
        def __init__(self, model, **options):
            reference = torch.nn.Module()  # takes the place of TRL's second adapter
            reference.config = model.config
            super().__init__(model, ref_model=reference, **options)

        def _precompute_ref_logps(self, pairs, *_):
            """The pairs with the scores of the model as it is; TRL exchanges them through files."""
            prompts = list(pairs["prompt_ids"])
            for side in ("chosen", "rejected"):
                scores = self.score(prompts, list(pairs[f"{side}_ids"]))
                pairs = pairs.add_column(f"ref_{side}_logps", scores)
            return pairs

        def score(self, prompts, responses) -> list[float]:
            """`logprobs.score` with the rows shared between the processes."""
            part = processes.share(prompts), processes.share(responses)
            scores = logprobs.score(self.model.eval(), self.processing_class, *part)
            return processes.gather(scores)

        def _get_train_sampler(self, dataset=None):
            """The order by length, which must not depend on the number of processes."""
            passes = self.args.gradient_accumulation_steps
            self.args.gradient_accumulation_steps = passes * self.accelerator.num_processes
            try:
                return super()._get_train_sampler(dataset)
            finally:
                self.args.gradient_accumulation_steps = passes

        def _get_num_items_in_batch(self, batches, device):
            """Pairs in one optimiser step; also gives repeated pairs the weight 0.

            At the end of an epoch accelerate repeats pairs until all processes have equally many.
            They come last, and would make the last step depend on the number of processes.
            """
            n, micro = len(self.train_dataset), self.args.per_device_train_batch_size
            count, process = self.accelerator.num_processes, self.accelerator.process_index
            step = micro * count * self.args.gradient_accumulation_steps
            first = self.state.global_step % math.ceil(n / step) * step  # place in the epoch
            for i, batch in enumerate(batches):
                start = first + (i * count + process) * micro
                places = start + torch.arange(self.n_pairs(batch), device=device)
                batch["weights"] = (places < n).float()
            return min(step, n - first)

    return DistributedTrainer
