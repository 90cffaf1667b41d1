"""The trainer of several processes: each computes the gradients of its share of a batch."""

from __future__ import annotations

import math

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from irpo_utils import logprobs
from irpo_utils.training import IterativeRPOTrainer


def score(model, tokenizer, prompts, responses) -> list[float]:
    """`logprobs.score` with the rows shared between the processes."""
    state = PartialState()
    with state.split_between_processes(list(range(len(prompts)))) as part:
        mine = list(part)
    # Processes with parts of one model need the same number of batches. That depends on the number
    # of rows and on the longest response, so the longest one fills up every part.
    longest = max(range(len(prompts)), key=lambda i: len(responses[i]))
    room = math.ceil(len(prompts) / state.num_processes) + 1
    rows = [*mine, *[longest] * (room - len(mine))]
    columns = [[column[i] for i in rows] for column in (prompts, responses)]
    scores = logprobs.score(model, tokenizer, *columns)[: len(mine)]
    return gather_object(scores) if state.num_processes > 1 else scores


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
                parts = self.processing_class, prompts, list(pairs[f"{side}_ids"])
                scores = score(self.model.eval(), *parts)
                pairs = pairs.add_column(f"ref_{side}_logps", scores)
            return pairs

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
            processes, process = self.accelerator.num_processes, self.accelerator.process_index
            step = micro * processes * self.args.gradient_accumulation_steps
            first = self.state.global_step % math.ceil(n / step) * step  # place in the epoch
            for i, batch in enumerate(batches):
                start = first + (i * processes + process) * micro
                places = start + torch.arange(self.n_pairs(batch), device=device)
                batch["weights"] = (places < n).float()
            return min(step, n - first)

    return DistributedTrainer
