"""A model whose layers are split over the processes (FSDP2), for bases that do not fit one GPU.

Training and scoring put a layer together when it is computed. Decoding would do so for every token,
so a vLLM server writes the completions. `scripts/run.py` adds this to a run, as `--shard true`.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from irpo_utils import UserError, models
from irpo_utils.scale import processes
from irpo_utils.training import IterativeRPOTrainer


def split(p, engine) -> ShardedEngine:
    """The engine of a profile with `shard`, around `engine`; `UserError` for what cannot be split."""
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
    return ShardedEngine(engine)


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

    class ShardedTrainer(trainer_class or IterativeRPOTrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            prepare = self.accelerator.prepare_model
            # FSDP2 adds up the gradients itself, and the weights are where they should be.
            as_it_is = {"device_placement": False, "evaluation_mode": True}
            self.accelerator.prepare_model = lambda model, **_: prepare(model, **as_it_is)

    return ShardedTrainer


class ShardedEngine(processes.SharedEngine):
    """An `engines.Engine` around another one: the model is split over the processes."""

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

    def decode(self, model, request, batch_size: int):
        return self.inner.decode(model, request, batch_size)

    def trainer(self, model):
        return sharded(self.inner.trainer(model))

    state_dict = staticmethod(whole_adapter)
