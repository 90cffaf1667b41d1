"""A model whose layers are split over the processes (FSDP2), for bases that do not fit one GPU.

Training and scoring put a layer together when it is computed. Decoding would do so for every token,
so a vLLM server writes the completions. `engine` makes this of a run with `--shard true`.
"""

from __future__ import annotations

import math

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cluster import shared
from irpo_utils import UserError, logprobs, models
from irpo_utils.scale import processes


def engine(p, alone) -> shared.SharedEngine:
    """The engine of several processes, from that of one: with whole copies, or split by `shard`.

    Raises `UserError` for what cannot be split.
    """
    if not p.shard:
        return shared.SharedEngine(alone)
    if processes.count() == 1:
        raise UserError(
            "--shard true splits the model over several processes, but there is only one. Start "
            "them with `torchrun --nproc_per_node 8 scripts/run.py ...`, or leave --shard out."
        )
    if p.engine != "vllm":
        raise UserError(
            "A model that is split over processes cannot decode: it would wait for all of them at "
            "every token. Let a server write the completions with --engine vllm."
        )
    if "8bit" in p.optimizer or "paged" in p.optimizer:
        raise UserError(
            f"--optimizer {p.optimizer} cannot split its state over processes. Use --optimizer "
            "adamw_torch: split, its state is small."
        )
    return ShardedEngine(alone)


def shard_layers(model, device: str) -> None:
    """Keep 1/n of each weight, of base and adapter, on the device of each process, in place.

    A GPU then holds its part and one whole layer. All processes must do the same number of forward
    passes at the same time.
    """
    processes.wait()  # connects them
    for layer in model.get_base_model().get_decoder().layers:  # a GPU never holds all of them whole
        fully_shard(layer.to(device))
    fully_shard(model.to(device))


def whole_adapter(model) -> dict[str, torch.Tensor]:
    """The adapter's full weights by name. All processes must call it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trained.items()}


def sharded(trainer_class=None):
    """A subclass of an `IterativeRPOTrainer` for a model that is split already."""

    class ShardedTrainer(shared.distributed(trainer_class)):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            prepare = self.accelerator.prepare_model
            # FSDP2 adds up the gradients itself, and the weights are where they should be.
            as_it_is = {"device_placement": False, "evaluation_mode": True}
            self.accelerator.prepare_model = lambda model, **_: prepare(model, **as_it_is)

        def score(self, prompts, responses) -> list[float]:
            """As for whole copies, but with the same number of batches in every process.

            That number depends on the number of rows and on the longest response, so the longest
            one fills up every part.
            """
            mine = processes.share(list(range(len(prompts))))
            longest = max(range(len(prompts)), key=lambda i: len(responses[i]))
            room = math.ceil(len(prompts) / processes.count()) + 1
            rows = [*mine, *[longest] * (room - len(mine))]
            columns = [[column[i] for i in rows] for column in (prompts, responses)]
            scores = logprobs.score(self.model.eval(), self.processing_class, *columns)
            return processes.gather(scores[: len(mine)])

    return ShardedTrainer


class ShardedEngine(shared.SharedEngine):
    """A `SharedEngine` whose model is split over the processes."""

    def load(self, p, revision: str | None = None, **options):
        """The model is loaded on the CPU, and each process moves its part to its GPU."""
        device = models.default_device()
        dtype = models.default_dtype(device, p.dtype)
        # FSDP2 splits floating-point weights only, so NF4 bytes must be stored as such.
        options |= {"nf4_options": {"bnb_4bit_quant_storage": dtype}, "device": "cpu"}
        dtype = str(dtype).removeprefix("torch.")
        model, tokenizer = self.inner.load(p, revision, dtype=dtype, **options)
        shard_layers(model, device)
        return model, tokenizer

    def trainer(self, model):
        return sharded(self.inner.trainer(model))

    state_dict = staticmethod(whole_adapter)
