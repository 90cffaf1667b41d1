"""The engine of a CPU: samples and trains faster than the plain one, see docs/results/speed.md.

Sampling: the plain decoder, with one batch per core at a time, attention that does not copy keys
and values, and in fp32 each layer merged into one matrix. The completions are those of the plain
engine, up to rounding. Training: `shared_prompt`.
"""

from __future__ import annotations

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.tuners.lora import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from irpo_utils import sampling
from irpo_utils.engines import is_linear, part_of, plain_linear, shared_prompt

MERGED_BYTES = 2**31  # most memory for merged matrices
IN_THE_MASK = ("is_causal", "position_ids", "sliding_window", "use_cache")  # nothing to add


class Engine(shared_prompt.Engine):
    """Fast sampling and training on a CPU; it also works on a GPU."""

    def load(self, p, revision: str | None = None, **options):
        """The plain model with attention that reads grouped keys where they are."""
        model, tokenizer = super().load(p, revision, **options)
        if model.device.type == "cpu":
            use_grouped_attention(model.get_base_model())
        # For the last positions of a batch as a slice, PyTorch would multiply row by row, with a
        # copy of the whole output matrix for every row.
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        return model, tokenizer

    def decode(self, model, request: sampling.Request, batch_size: int):
        """As the plain engine; on a CPU in parts, one per core at a time.

        Cores that share one small matrix spend their time waiting for each other.
        """
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        threads = torch.get_num_threads()
        cores = min(threads if model.device.type == "cpu" else 1, len(order))
        if any(isinstance(module, ParamWrapper) for module in model.modules()):
            cores = 1  # PEFT changes fused experts while they compute
        with merged(model):
            if cores == 1:
                yield from super().decode(model, request, batch_size)
                return
            rounds = math.ceil(len(order) * request.n / batch_size)
            size = math.ceil(len(order) / (rounds * cores))  # prompts in a part
            parts = [order[start : start + size] for start in range(0, len(order), size)]
            decode = super().decode

            def on_one_core(part: list[int]) -> list[tuple]:
                drawn = decode(model, part_of(request, part), max(1, batch_size // cores))
                return [(part[i], *rest) for i, *rest in drawn]

            try:
                with ThreadPoolExecutor(cores, None, torch.set_num_threads, (1,)) as pool:
                    for drawn in pool.map(on_one_core, parts):
                        yield from drawn
            finally:
                torch.set_num_threads(threads)  # for threads that start later


def _contiguous(module, inputs):
    return (inputs[0].contiguous(), *inputs[1:])


def grouped_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs
):
    """Attention as matmul, softmax, matmul; query (rows, heads, queries, size).

    key and value have kv_heads instead of heads. On a CPU the backward pass is twice as fast as
    that of the fused kernel. The library's "eager" copies keys and values for every head of a
    group, which costs more than the attention; here the queries of a group are stacked instead.
    Raises `TypeError` for an argument that may change the result, such as attention sinks.
    """
    for name, given in kwargs.items():
        if name not in IN_THE_MASK and given is not None and given is not False:
            raise TypeError(f"grouped attention has no argument {name!r}")
    if query.dtype == torch.float16:  # products with large keys, as of Qwen2.5, exceed its range
        query, scaling = query * scaling, 1.0
    rows, heads, queries, size = query.shape
    kv_heads, columns = key.shape[1:3]
    scores = (query.reshape(rows, kv_heads, -1, size) @ key.transpose(2, 3)) * scaling
    scores = scores.view(rows, kv_heads, heads // kv_heads, queries, columns)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :columns]
    weights = torch.softmax(scores, -1).to(query.dtype)  # 16 bits: computed in fp32, rounded once
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    out = weights.view(rows, kv_heads, -1, columns) @ value
    return out.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def grouped_mask(*args, dtype=torch.float32, **options):
    """As the library's `eager_mask`, which may copy a number from the host, as no graph can."""
    visible = sdpa_mask(*args, **options | {"allow_is_causal_skip": False})
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", grouped_mask)


@contextlib.contextmanager
def grouped(base):
    """Inside the context the base computes with `grouped_attention`."""
    library = base.config._attn_implementation
    base.set_attn_implementation("grouped")
    try:
        yield
    finally:
        base.set_attn_implementation(library)


def use_grouped_attention(base) -> None:
    """Let the base compute with `grouped_attention`, unless it needs an argument of another one."""
    try:
        with grouped(base), torch.no_grad():
            base(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        base.set_attn_implementation("grouped")
    except TypeError as error:
        library, kind = base.config._attn_implementation, base.config.model_type
        tqdm.write(
            f"The attention of {kind} is the library's {library!r}, which is slower: {error}."
        )


@contextlib.contextmanager
def merged(model):
    """Inside the context each layer is one matrix W + (alpha / r) B A; afterwards it is restored.

    Exact up to rounding in fp32, and for a zero adapter in any dtype. Otherwise nothing changes,
    and also if the matrices need more than `MERGED_BYTES`.
    """
    layers = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    trained = {name for name, layer in layers.items() if layer.lora_B["default"].weight.any()}
    size = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    if (model.dtype != torch.float32 and trained) or size > MERGED_BYTES:
        yield
        return
    try:
        for name, layer in layers.items():
            weight = dequantize_module_weight(layer.base_layer)
            if name in trained:
                weight = weight + layer.get_delta_weight("default").detach()
            model.set_submodule(name, plain_linear(weight, layer.base_layer.bias))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
