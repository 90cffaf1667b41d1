"""The engine of a CPU: sampling about five times, training about twice as fast as the plain way.

Sampling: a completion that has ended makes room for one that waits (continuous batching, Yu et
al. 2022); keys and values are written in place; one loop runs per core; and in fp32 each layer is
merged into one matrix while sampling. Training: `shared_prompt`. The completions are those of the
plain decoder, up to rounding.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft.tuners.lora import LoraLayer
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask

from irpo_utils import UserError, logprobs, sampling
from irpo_utils.engines import Engine as PlainEngine
from irpo_utils.engines import shared_prompt

FREE_SHARE = 1 / 8  # slots are filled again, or dropped, when this share of them is free
PREFILL = 32  # prompts that go through the model at once: more memory than a step of all rows
ROOM = 16  # columns that no row needs any more before they are dropped
MERGED_BYTES = 2**31  # most memory for merged matrices


class Engine(PlainEngine):
    """Fast sampling and training on a CPU; it also works on a GPU."""

    def load(self, p, revision: str | None = None, **options):
        """The plain model with attention that reads grouped keys where they are."""
        model, tokenizer = super().load(p, revision, **options)
        if p.dequantize:
            dequantize(model)
        if model.device.type == "cpu":
            model.get_base_model().set_attn_implementation("grouped")
        # For the last positions of a batch as a slice, PyTorch would multiply row by row, with a
        # copy of the whole output matrix for every row.
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        return model, tokenizer

    def trainer(self, model):
        """Pairs that share their prompt, for models that allow a mask of our own."""
        return shared_prompt.SharedPromptTrainer if shared_prompt.possible(model) else None

    def decode(self, model, request: sampling.Request, batch_size: int):
        """Completions as they end; on a CPU one loop per core, each with a share of the prompts.

        Cores that share one small matrix spend their time waiting for each other.
        """
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        cores = min(torch.get_num_threads() if model.device.type == "cpu" else 1, len(order))
        with merged(model):
            if cores > 1:
                yield from _on_every_core(model, request, order, batch_size, cores)
            else:
                yield from _retried(model, request, order, batch_size)


def _contiguous(module, inputs):
    return (inputs[0].contiguous(), *inputs[1:])


def grouped_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs
):
    """Attention as matmul, softmax, matmul; query (rows, heads, queries, size).

    key and value have kv_heads instead of heads. On a CPU the backward pass is twice as fast as
    that of the fused kernel. The library's "eager" copies keys and values for every head of a
    group, which costs more than the attention; here the queries of a group are stacked instead.
    """
    rows, heads, queries, size = query.shape
    kv_heads, columns = key.shape[1:3]
    scores = (query.reshape(rows, kv_heads, -1, size) @ key.transpose(2, 3)) * scaling
    scores = scores.view(rows, kv_heads, heads // kv_heads, queries, columns)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :columns]
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    out = weights.view(rows, kv_heads, -1, columns) @ value
    return out.view(rows, heads, queries, size).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)


def dense_weight(layer) -> torch.Tensor:
    """The weight matrix of a linear layer, dequantised if it is in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.data
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, state)


def plain_linear(weight: torch.Tensor, bias) -> torch.nn.Linear:
    """A frozen linear layer around an existing matrix, without a copy."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = torch.nn.Parameter(weight, requires_grad=False), bias
    return layer


def dequantize(model) -> None:
    """Replace every NF4 layer under the adapter by a plain one with the weights it stands for."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base = layer.base_layer
            layer.base_layer = plain_linear(dense_weight(base).to(model.dtype), base.bias)


@contextlib.contextmanager
def merged(model):
    """Inside, each layer is the one matrix W + (alpha / r) B A; afterwards all is as before.

    Exact up to rounding in fp32, and for a zero adapter in any dtype. Otherwise nothing changes,
    and also if the matrices need more than `MERGED_BYTES`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    trained = {name for name, layer in layers.items() if layer.lora_B["default"].weight.any()}
    size = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    if (model.dtype != torch.float32 and trained) or size > MERGED_BYTES:
        yield
        return
    try:
        for name, layer in layers.items():
            weight = dense_weight(layer.base_layer)
            if name in trained:
                weight = weight + layer.get_delta_weight("default").detach()
            model.set_submodule(name, plain_linear(weight, layer.base_layer.bias))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _on_every_core(model, request, order: list[int], batch_size: int, cores: int):
    """One decoding loop per core, in threads."""
    parts: list[list] = [[] for _ in range(cores)]
    stop, threads = threading.Event(), torch.get_num_threads()

    def on_one_core(core: int) -> None:
        torch.set_num_threads(1)
        for row in _retried(model, request, order[core::cores], max(1, batch_size // cores)):
            parts[core].append(row)
            if stop.is_set():
                return

    try:
        with ThreadPoolExecutor(cores) as pool:
            loops = [pool.submit(on_one_core, core) for core in range(cores)]
            try:
                for part, loop in zip(parts, loops, strict=True):
                    while not loop.done() or part:
                        if part:
                            yield part.pop()
                        else:
                            _wait(loop)
                    loop.result()
            finally:
                stop.set()  # Ctrl-C or an error in one loop ends the others
    finally:
        torch.set_num_threads(threads)


def _wait(loop, seconds: float = 0.05) -> None:
    with contextlib.suppress(TimeoutError):
        loop.exception(timeout=seconds)


def _retried(model, request, order: list[int], batch_size: int):
    """`_decode`, with half the batch each time that memory runs out; nothing is drawn twice."""
    waiting: dict[int, list] = {i: [] for i in order}  # completions of prompts that are not done
    while waiting:
        try:
            for completion in _decode(model, request, list(waiting), batch_size):
                rows = waiting[completion[0]]
                rows.append(completion)
                if len(rows) == request.n:
                    yield from waiting.pop(completion[0])
            return
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size <= request.n:
                raise UserError(
                    f"Out of memory with the {request.n} completions of a single question. Lower "
                    "--n-samples or --max-new-tokens, or use a GPU with more memory."
                ) from error
        waiting = {i: [] for i in waiting}
        clear_device_cache(garbage_collection=True)
        batch_size //= 2
        tqdm.write(f"Out of memory: continuing with --sampling-batch-size {batch_size}.")


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, columns, head size), in memory taken once.

    The library's own layer is copied as a whole for every new token, which on a CPU costs more than
    the model itself.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        """Called by the model: append these columns, return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms, self.end = [key_states, value_states], key_states.shape[-2]
        else:
            start, self.end = self.end, self.end + key_states.shape[-2]
            for room, new in zip(self.rooms, (key_states, value_states), strict=True):
                # Not a slice, which past the end of the memory would be empty without an error.
                room.narrow(2, start, new.shape[2]).copy_(new)
        self.keys, self.values = (room[:, :, : self.end] for room in self.rooms)
        return self.keys, self.values

    def reserve(self, copies, columns: int) -> None:
        for i, old in enumerate(self.rooms):
            rows, heads, size = len(copies), old.shape[1], old.shape[3]
            if i == 0 and old.device.type == "cpu":
                # A CPU multiplies one query by all keys twice as fast with keys column by column.
                room = old.new_empty(rows, heads, size, columns).transpose(2, 3)
            else:
                room = old.new_empty(rows, heads, columns, size)
            room[:, :, : self.end] = old[copies]
            self.rooms[i] = room

    def keep(self, rows, first: int) -> None:
        for i, room in enumerate(self.rooms):
            kept = room[:, :, first : self.end][rows].clone()
            self.rooms[i] = room[: len(kept)]
            self.rooms[i][:, :, : self.end - first] = kept
        self.end -= first
        self.keys, self.values = (room[:, :, : self.end] for room in self.rooms)

    def put(self, slots, other: SlotLayer, copies) -> None:
        for room, new in zip(self.rooms, other.rooms, strict=True):
            room.narrow(2, self.end - other.end, other.end)[slots] = new[copies]


class SlotCache(Cache):
    """A cache whose rows come and go; all end in the same column, and `mask` marks columns."""

    def __init__(self, mask: torch.Tensor):
        super().__init__(layer_class_to_replicate=SlotLayer)
        self.mask = mask

    def reserve(self, copies, columns: int) -> None:
        """From one row per prompt to these copies of them, with memory for this many columns."""
        self.mask = self.mask[copies]
        for layer in self.layers:
            layer.reserve(copies, columns)

    def keep(self, rows, first: int = 0) -> None:
        """Keep these rows, in this order, from column `first` on."""
        self.mask = self.mask[:, first:][rows]
        for layer in self.layers:
            layer.keep(rows, first)

    def put(self, slots, other: SlotCache, copies) -> None:
        """Put copies of the rows of `other` (prompts) into slots, ending in the last column."""
        self.mask[slots] = 0
        self.mask[slots, self.mask.shape[1] - other.mask.shape[1] :] = other.mask[copies]
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.put(slots, new, copies)


@dataclass
class Rows:
    """Completions in progress, one per row; each field is a tensor of that many rows."""

    completion: torch.Tensor  # prompt * n + sample, or -1 when it was handed out
    token: torch.Tensor  # the newest one, not yet in the cache
    position: torch.Tensor  # of that token
    n_tokens: torch.Tensor
    tokens: torch.Tensor  # (rows, max_new_tokens)
    uniforms: torch.Tensor  # (rows, max_new_tokens)
    logprob: torch.Tensor
    ended: torch.Tensor  # by an end token
    over: torch.Tensor  # by an end token or by length

    def keep(self, rows) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def put(self, slots, other: Rows) -> None:
        for field in fields(self):
            getattr(self, field.name)[slots] = getattr(other, field.name)

    def hand_out(self, order: list[int], n: int):
        """(prompt, sample, tokens, finished, logprob) of every completion that is over, once."""
        ready = (self.over & (self.completion >= 0)).nonzero().squeeze(-1)
        names = ("completion", "tokens", "n_tokens", "ended", "logprob")
        columns = [getattr(self, name)[ready].tolist() for name in names]
        for i, tokens, length, ended, logprob in zip(*columns, strict=True):
            yield order[i // n], i % n, tokens[:length], ended, logprob
        self.completion[ready] = -1


@torch.inference_mode()
def _begin(model, request, part: list[int], first: int):
    """n rows per prompt of `part`, all but the last prompt token cached; `first`: its number."""
    prompts, n = [request.prompts[i] for i in part], request.n
    beginnings, device = [ids[:-1] for ids in prompts], model.device
    batch = logprobs.pad_batch(beginnings, [[]] * len(prompts), request.pad_id, device)
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name][:, :-1] for name in names}
    cache = SlotCache(inputs["attention_mask"])
    model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    copies = torch.arange(len(prompts), device=device).repeat_interleave(n)
    u = torch.from_numpy(np.concatenate([request.uniforms(i) for i in part])).to(device)
    zero = torch.zeros_like(copies)
    rows = Rows(
        completion=first * n + torch.arange(len(copies), device=device),
        token=torch.tensor([ids[-1] for ids in prompts], device=device)[copies],
        position=torch.tensor([len(ids) - 1 for ids in prompts], device=device)[copies],
        n_tokens=zero.clone(),
        tokens=torch.zeros_like(u, dtype=torch.long),
        uniforms=u,
        logprob=torch.zeros_like(u[:, 0]),
        ended=zero.bool(),
        over=zero.bool(),
    )
    return rows, cache, copies


@torch.inference_mode()
def _decode(model, request, order: list[int], batch_size: int):
    """Completions of the prompts in `order` (longest first) as they end."""
    n = request.n
    slots = min(max(1, batch_size // n), len(order)) * n
    begun = min(slots // n, PREFILL)
    rows, cache, copies = _begin(model, request, order[:begun], 0)
    filling = torch.arange(slots, device=model.device) % len(copies)  # the rest begin as free slots
    rows.keep(filling)
    rows.over[len(copies) :], rows.completion[len(copies) :] = True, -1
    columns = len(request.prompts[order[0]]) + request.max_new_tokens + ROOM
    cache.reserve(copies[filling], columns)
    while True:
        free = rows.over.nonzero().squeeze(-1)
        waiting = order[begun : begun + min(len(free) // n, PREFILL)]
        enough = len(free) >= FREE_SHARE * len(rows.over)
        change = enough and (bool(waiting) or begun >= len(order))
        if change:
            yield from rows.hand_out(order, n)
            if waiting:  # new rows begin with the last token of their prompt
                new, new_cache, copies = _begin(model, request, waiting, begun)
                rows.put(free[: len(copies)], new)
                cache.put(free[: len(copies)], new_cache, copies)
                begun += len(waiting)
            elif len(free) == len(rows.over):
                return
            else:
                alive = (~rows.over).nonzero().squeeze(-1)
                rows.keep(alive)
                cache.keep(alive)
        if change or cache.mask.shape[1] == columns:
            first = int(cache.mask[~rows.over].any(0).long().argmax())
            if first >= ROOM:  # columns that no row needs any more
                cache.keep(slice(None), first)
        _step(model, request, rows, cache)


def _step(model, request, rows: Rows, cache: SlotCache) -> None:
    """One token for every row that is not over."""
    cache.mask = torch.cat([cache.mask, torch.ones_like(cache.mask[:, :1])], 1)
    logits = model(
        input_ids=rows.token[:, None],
        attention_mask=cache.mask,
        position_ids=rows.position[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    alive = (~rows.over).nonzero().squeeze(-1)
    logits, at = logits.float()[alive], rows.n_tokens[alive]
    token = sampling.next_tokens(
        logits, rows.uniforms[alive, at], request.temperature, request.top_p
    )
    chosen = logits.gather(-1, token[:, None]).squeeze(-1)
    rows.logprob[alive] += (chosen - logits.logsumexp(-1)).double()
    rows.tokens[alive, at] = rows.token[alive] = token
    rows.n_tokens[alive] += 1
    rows.position[alive] += 1
    rows.ended[alive] = torch.isin(token, torch.tensor(request.ends, device=token.device))
    rows.over = rows.ended | (rows.n_tokens == request.max_new_tokens)
