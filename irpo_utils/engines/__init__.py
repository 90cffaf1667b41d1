"""Engines: the plain one is here; the other modules have faster ones."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from tqdm.auto import tqdm

from irpo_utils import UserError, models, sampling


class Engine:
    """The plain way to load, sample and train; the modules of this folder have subclasses."""

    most = math.inf  # largest batch in completions, once memory has run out

    def load(self, p, revision: str | None = None, **options):
        """The model and the tokenizer of a profile: M_0. options: others of `models.load`."""
        settings = {"quantize": p.quantize is not False}
        settings |= {n: getattr(p, n) for n in ("lora_r", "lora_alpha", "pad_token", "dtype")}
        model, tokenizer = models.load(p.model, revision=revision, **settings | options)
        if p.dequantize:
            dequantize(model)
        # The adapter computes in fp32. Next to a base in 16 bits, TF32 is exact enough on a GPU.
        tf32 = model.device.type != "cpu" and model.dtype != torch.float32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        return model, tokenizer

    def use(self, model, adapter) -> None:
        """Turn the model into the M_t of the folder `adapter` (None: M_0)."""
        models.set_adapter(model, adapter)

    def close(self) -> None:
        """End what only `decode` needs, which starts it again: before training, after the run."""

    def decode(self, model, request: sampling.Request, batch_size: int):
        """Yield (prompt, sample, tokens, finished, logprob) of every completion, in any order.

        If memory runs out, the remaining completions and later calls use half the batch size.
        """
        waiting = list(range(len(request.prompts)))
        while waiting:
            size, drawn = min(batch_size, self.most), set()
            try:
                left = part_of(request, waiting)
                for i, *rest in sampling.decode(model, left, size, self.decode_batch):
                    drawn.add(waiting[i])
                    yield waiting[i], *rest
                return
            except RuntimeError as error:
                if not memory_is_full(error):
                    raise
                if size <= request.n:
                    raise UserError(
                        f"Out of memory with the {request.n} completions of a single question. "
                        "Lower --n-samples or --max-new-tokens, or use a GPU with more memory."
                    ) from error
            waiting = [i for i in waiting if i not in drawn]
            self.close()
            clear_device_cache(garbage_collection=True)
            self.most = min(self.most, size // 2)  # another core may have lowered it
            tqdm.write(f"Out of memory: continuing with --sampling-batch-size {self.most}.")

    def decode_batch(self, model, request: sampling.Request, part: list[int]):
        """The completions of the prompts `part`, all at once."""
        return sampling.decode_batch(model, request, part)

    def trainer(self, model):
        """The class that trains this model, or None for `training.IterativeRPOTrainer`."""
        return None

    def state_dict(self, model) -> dict | None:
        """The adapter's full weights where the model is split; None: the model has them."""
        return None


def plain_linear(weight: torch.Tensor, bias) -> torch.nn.Linear:
    """A frozen linear layer around an existing matrix, without a copy."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = torch.nn.Parameter(weight, requires_grad=False), bias
    return layer


def is_linear(layer) -> bool:
    """Whether a LoRA layer is on a linear layer, and not on fused experts or a Conv1D."""
    return isinstance(layer, LoraLayer) and isinstance(layer.base_layer, torch.nn.Linear)


def dequantize(model) -> None:
    """Replace every NF4 layer under the adapter by a plain one with its dequantised weights."""
    for layer in filter(is_linear, model.modules()):
        weight = dequantize_module_weight(layer.base_layer).to(model.dtype)
        layer.base_layer = plain_linear(weight, layer.base_layer.bias)


def part_of(request: sampling.Request, rows: list[int]) -> sampling.Request:
    """The request for these of its prompts alone."""
    prompts, ids = ([column[i] for i in rows] for column in (request.prompts, request.ids))
    return dataclasses.replace(request, prompts=prompts, ids=ids)


def memory_is_full(error: Exception) -> bool:
    """Whether PyTorch or CUDA itself has run out of memory, as CUDA may while it records."""
    of_cuda = re.search("(?i)out of memory|STATUS_ALLOC_FAILED", str(error))
    return should_reduce_batch_size(error) or (isinstance(error, RuntimeError) and bool(of_cuda))
