"""The engine of a GPU: decodes with a static cache and CUDA graphs, see docs/results/speed.md.

For a small model, Python needs more time to launch the kernels of a step than the GPU needs to run
them. A CUDA graph records the launches, LoRA and NF4 layers included, and replays them at once. Its
tensors keep their addresses and shapes. So there is a graph for each bucket: the first rows and
columns of one cache. The completions are those of the plain engine, up to rounding. On a CPU the
same steps are called directly. Training: `shared_prompt`.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from irpo_utils import sampling
from irpo_utils.engines import cpu, memory_is_full, shared_prompt

MOST_ROWS = 2400  # completions at once: a run stores as many at a time
FEWEST_ROWS = 64  # of a bucket: steps with fewer rows are hardly faster
CHUNK = 128  # the columns of a bucket are a multiple of this
CHECK = 16  # steps between two looks at which completions have ended
PREFILL = 16_384  # tokens of prompts that are computed at once
MEMORY = 0.7  # share of the free memory for the cache and the logits
LOGIT = 44  # bytes per row and word of the vocabulary: the logits, and what top-p makes of them


class Engine(shared_prompt.Engine):
    """Fast sampling on a GPU; where a static cache or a graph cannot work, it is the plain one."""

    static, refused, room = None, False, 0

    def decode(self, model, request: sampling.Request, batch_size: int):
        """As the plain engine; on a GPU in larger batches than `batch_size` if these fit."""
        n_prompts, columns, static = len(request.prompts), n_columns(request), self.static
        if static and (static.model is not model or static.columns < columns):
            self.close()
        if not self.static:
            self.room = 0 if self.refused else rows_that_fit(model, columns)
        rounds = math.ceil(n_prompts / max(1, max(batch_size, self.room) // request.n))
        equal = math.ceil(n_prompts / rounds)  # prompts in a batch
        yield from super().decode(model, request, equal * request.n)

    def decode_batch(self, model, request: sampling.Request, part: list[int]):
        """In the static cache; after any error but full memory the plain decoder takes over."""
        if not self.refused:
            try:
                if not self.static or self.static.rows < len(part) * request.n:
                    self.close()
                    self.static = Static(model, request, len(part) * request.n)
                return self.static.complete(request, part)
            except Exception as error:  # of any kind: it should not end a run on a rented GPU
                if memory_is_full(error):
                    raise
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                tqdm.write(f"The plain decoder is used, which is slower on a GPU ({reason}).")
            self.refused, self.room = True, 0
            self.close()
        return super().decode_batch(model, request, part)

    def close(self) -> None:
        """Free the memory of the cache and of the graphs."""
        self.static = None
        clear_device_cache(garbage_collection=True)


def rounded(columns: int) -> int:
    return CHUNK * math.ceil(columns / CHUNK)


def n_columns(request: sampling.Request) -> int:
    """Columns of the longest prompt with its completion."""
    return rounded(max(map(len, request.prompts)) + request.max_new_tokens)


def rows_that_fit(model, columns: int) -> int:
    """How many completions fit into a GPU's free memory, at most `MOST_ROWS`; 0 on a CPU."""
    if model.device.type != "cuda":
        return 0
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    column = 2 * c.num_hidden_layers * heads * size * model.dtype.itemsize
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    return min(MOST_ROWS, int(MEMORY * free / (columns * column + LOGIT * c.vocab_size)))


@torch.inference_mode()
def prefill(model, request: sampling.Request, part: list[int]):
    """Logits after the prompts `part`, and the keys and values of all layers, padded on the left.

    Keys and values are (prompts, heads, columns, size). `TypeError`: the model keeps others.
    """
    prompts, device = [request.prompts[i] for i in part], model.device
    width = max(map(len, prompts))
    ids = torch.tensor([[request.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)
    logits = sampling.next_logits(model, cache, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise TypeError(f"the model has a cache without keys ({type(layer).__name__})")
    return logits, [part for layer in cache.layers for part in (layer.keys, layer.values)]


class Layer(StaticLayer):
    """The cache of one layer in a bucket; a step writes it at `column`, a tensor (1,)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor):
        super().__init__(keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, column
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.cumulative_length, keys)
        self.values.index_copy_(2, self.cumulative_length, values)
        return self.keys, self.values


class Static:
    """The tensors of up to `rows` completions with up to `columns` tokens, and the graphs on them.

    `graphs`: bucket -> its graph; None until it is recorded, and on a CPU. A bucket is (rows,
    columns, temperature, top_p). `TypeError`: the model cannot be decoded like this.
    """

    @torch.inference_mode()
    def __init__(self, model, request: sampling.Request, rows: int):
        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=model.device)

        columns = n_columns(request)
        self.model, self.rows, self.columns, self.graphs = model, rows, columns, {}
        self.buckets = [rows >> i for i in range(8) if i == 0 or rows >> i >= FEWEST_ROWS]
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        _, parts = prefill(model, request, [0])
        self.cache = [
            zeros(rows, part.shape[1], columns, part.shape[3], dtype=part.dtype) for part in parts
        ]
        # Of each row: its newest token, the first column of its prompt, and its completion: a row
        # of the tensors below. The last of these is for rows without a completion.
        self.token, self.start, self.completion = zeros(rows), zeros(rows), zeros(rows)
        self.uniforms = zeros(rows + 1, columns, dtype=torch.double)
        self.tokens = zeros(rows + 1, columns)
        self.logprobs = zeros(rows + 1, columns, dtype=torch.float32)
        self.column, self.step = zeros(1), zeros(1)  # where to write the token, and the next draw

    @torch.inference_mode()
    def complete(self, request: sampling.Request, part: list[int]) -> list[tuple]:
        """(prompt, sample, tokens, finished, logprob) of n completions of each prompt of `part`."""
        n, new, width = request.n, request.max_new_tokens, len(request.prompts[part[0]])
        self.begin(request, part, width)
        rows = self.bucket(len(part) * n)
        with cpu.grouped(self.model.get_base_model()):
            for step in range(1, new):
                if step % CHECK == 0:
                    rows = self.compact(rows, step, request.ends)
                if rows == 0:
                    break
                self.advance(rows, rounded(width + step), request.temperature, request.top_p)
        found, logprobs = [], self.logprobs.double().cpu()
        for row, drawn in enumerate(self.tokens[: len(part) * n, :new].tolist()):
            ends = (i for i, token in enumerate(drawn, 1) if token in request.ends)
            tokens = drawn[: next(ends, new)]
            logprob = logprobs[row, : len(tokens)].sum().item()
            found.append((part[row // n], row % n, tokens, tokens[-1] in request.ends, logprob))
        return found

    def begin(self, request: sampling.Request, part: list[int], width: int) -> None:
        """Fill n rows per prompt, so that all prompts end at `width`, and draw a first token."""
        n, at_once, logits = request.n, max(1, PREFILL // width), []
        for i in range(0, len(part), at_once):
            last, parts = prefill(self.model, request, part[i : i + at_once])
            logits.append(last.repeat_interleave(n, 0))
            rows = slice(i * n, (i + len(last)) * n)
            for static, made in zip(self.cache, parts, strict=True):
                static[rows, :, width - made.shape[2] : width] = made.repeat_interleave(n, 0)
        n_rows, device = len(part) * n, self.start.device
        starts = torch.tensor([width - len(request.prompts[i]) for i in part], device=device)
        self.start.zero_()
        self.start[:n_rows] = starts.repeat_interleave(n)
        self.completion.fill_(self.rows)
        self.completion[:n_rows] = torch.arange(n_rows, device=device)
        uniforms = torch.from_numpy(np.concatenate([request.uniforms(i) for i in part])).to(device)
        self.uniforms[:n_rows, : request.max_new_tokens] = uniforms
        self.column.fill_(width)
        self.step.zero_()
        self.draw(torch.cat(logits), request.temperature, request.top_p)

    def draw(self, logits: torch.Tensor, temperature: float, top_p: float) -> None:
        """Draw the next token of the first rows from their logits (rows, vocabulary)."""
        at = self.completion[: len(logits)], self.step
        token = sampling.next_tokens(logits, self.uniforms[at], temperature, top_p)
        self.tokens[at] = token
        self.logprobs[at] = -torch.nn.functional.cross_entropy(logits, token, reduction="none")
        self.token[: len(logits)] = token
        self.step.add_(1)

    def call(self, rows: int, columns: int, temperature: float, top_p: float) -> None:
        """One step. Nothing in it waits for the GPU or depends on the value of a tensor."""
        parts = [part[:rows, :, :columns] for part in self.cache]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        cache = Cache(layers=[Layer(keys, values, self.column) for keys, values in pairs])
        start, ids = self.start[:rows, None], self.token[:rows, None]
        mask = torch.arange(columns, device=start.device) >= start  # the model hides later columns
        logits = sampling.next_logits(self.model, cache, ids, mask, self.column - start)
        self.column.add_(1)
        self.draw(logits, temperature, top_p)

    def advance(self, *bucket) -> None:
        """One step. The first in a bucket is called and warms up; later ones replay its graph."""
        if self.pool and bucket in self.graphs and self.graphs[bucket] is None:
            self.graphs[bucket] = self.record(*bucket)
        if graph := self.graphs.setdefault(bucket):
            graph.replay()
        else:
            self.call(*bucket)

    def record(self, *bucket) -> torch.cuda.CUDAGraph:
        """The graph of a step, which is not run."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context selects the model's GPU. It restores the stream after a failure.
            with torch.cuda.stream(torch.cuda.current_stream(self.model.device)):
                with torch.cuda.graph(graph, pool=self.pool):
                    self.call(*bucket)
        except RuntimeError as error:
            # PyTorch 2.11 still allocates to the pool, and draws no random numbers (private names).
            device = self.model.device.index
            with contextlib.suppress(RuntimeError, AttributeError, TypeError):
                torch._C._cuda_endAllocateToPool(device, self.pool)
                torch._C._cuda_releasePool(device, self.pool)
            with contextlib.suppress(RuntimeError, AttributeError, TypeError, IndexError):
                generator = torch.cuda.default_generators[device]
                generator.graphsafe_set_state(generator.clone_state())
            raise error.__context__ or error from None  # the end of a failed one raises another
        return graph

    def bucket(self, rows: int) -> int:
        """The smallest bucket with so many rows."""
        return min(size for size in self.buckets if size >= rows)

    def compact(self, rows: int, step: int, ends: list[int]) -> int:
        """Move the rows that have not ended into the smallest bucket; returns its rows, or 0."""
        completion = self.completion[:rows]
        ended = torch.isin(self.tokens[completion, :step], torch.tensor(ends).to(completion)).any(1)
        ended |= completion == self.rows
        alive = rows - int(ended.sum())
        fewer = self.bucket(alive) if alive else 0
        if 0 < fewer < rows:
            kept = ended.int().argsort(stable=True)[:fewer]
            for tensor in (self.token, self.start, self.completion, *self.cache):
                tensor[:fewer] = tensor[kept]
        return fewer
