"""Stage 1: draw N chain-of-thought completions per question from M_t (section 2 of the paper).

Four things make this several times faster than `generate(num_return_sequences=N)` at the same distribution. The prompt
runs through the model once and its cache is copied to the N samples. A completion that has ended makes room for one
that waits (continuous batching, Yu et al. 2022), longest prompts first; when none waits, it leaves the batch. Keys and
values are written in place. And where numbers are in fp32, base and adapter are multiplied out into one matrix a layer.

Every token is drawn with a uniform number of its own, fixed by (seed, question id, sample, position): a completion
does not depend on which others shared its batch, so a run can be cut into chunks anywhere and gives the same samples;
several processes share the questions.
"""

from __future__ import annotations

import hashlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from irpo_utils import UserError, models, processes

FREE_SHARE = (
    1 / 8
)  # slots are filled anew, or dropped, once this share of them is free: both have a price
PREFILL = (
    32  # prompts that go through the model at once, which takes more memory than a step of all rows
)
ROOM = 16  # columns that may be of no use any more before they are dropped


def sample(
    model,
    tokenizer,
    questions,
    task,
    n: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
    server=None,
):
    """N completions per question: a `Dataset` of `len(questions) * n` rows in the order of the questions.

    Columns: `id`, `sample` (0..n-1), `prompt`, `completion`, `prompt_ids`, `completion_ids` (the very tokens, EOS only
    if it was sampled), `n_tokens`, `finished` (ended by EOS), `logprob` (sum over `completion_ids` under M_t at
    temperature 1, nats), `answer`, and `choices` if the questions have them.
    `temperature` 0 is greedy; `batch_size` counts completions, not questions. `server`: a `vllm_server.Server` that
    writes in the place of `model`, which may then be of no use but to name its context. Raises `UserError` for settings out of
    range, an empty data set, a prompt that leaves no room in the model's context, and a model whose logits are not finite.
    """
    from datasets import Dataset

    _check(questions, n, temperature, top_p, max_new_tokens)
    prompts, prompt_ids = prompts_of(model, tokenizer, questions, task, max_new_tokens)

    questions, mine = list(questions), processes.share(list(range(len(prompts))))
    order = sorted(mine, key=lambda i: -len(prompt_ids[i]))
    rows: list[dict | None] = [None] * (len(prompts) * n)
    bar = tqdm(
        total=len(mine) * n, desc="sampling", unit="completion", disable=not progress, leave=False
    )

    def keep(i: int, k: int, tokens: list[int], finished: bool, logprob: float) -> None:
        if not math.isfinite(logprob):
            raise UserError(
                "The model's logits are not finite, so that its completions mean nothing. Where they are computed in "
                "float16, give --dtype bfloat16 or float32; otherwise its weights are broken."
            )
        bar.update(rows[i * n + k] is None)
        rows[i * n + k] = {
            "id": questions[i]["id"],
            "sample": k,
            "prompt": prompts[i],
            "completion": tokenizer.decode(tokens, skip_special_tokens=True),
            "prompt_ids": prompt_ids[i],
            "completion_ids": tokens,
            "n_tokens": len(tokens),
            "finished": finished,
            "logprob": logprob,
            "answer": questions[i]["answer"],
            **({"choices": questions[i]["choices"]} if "choices" in questions[i] else {}),
        }

    def collect(part: list[int], batch_size: int, stop) -> None:
        numbers = lambda j: _uniforms(seed, questions[part[j]]["id"], n, max_new_tokens)
        for j, k, tokens, finished, logprob in _decode(
            model,
            tokenizer,
            [prompt_ids[i] for i in part],
            n,
            temperature,
            top_p,
            batch_size,
            numbers,
        ):
            keep(part[j], k, tokens, finished, logprob)
            if stop.is_set():
                return

    def decode(part: list[int], batch_size: int, stop) -> None:
        """Fewer at once each time that memory runs out; what is there already is not drawn again."""
        while part and not stop.is_set():
            try:
                return collect(part, batch_size, stop)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if batch_size <= n:
                    raise UserError(
                        f"Out of memory with the {n} completions of a single question. Lower --n-samples or "
                        "--max-new-tokens, or take a larger card."
                    ) from error
            clear_device_cache(garbage_collection=True)
            batch_size //= 2
            tqdm.write(
                f"Out of memory: going on with {batch_size} completions at once (see --sampling-batch-size)."
            )
            part = [i for i in part if None in rows[i * n : (i + 1) * n]]

    with bar:
        if server:
            for j, drawn in server.complete(
                [prompt_ids[i] for i in mine],
                [questions[i]["id"] for i in mine],
                n,
                temperature,
                top_p,
                max_new_tokens,
                seed,
                models.end_tokens(model, tokenizer),
            ):
                for k, (tokens, finished, logprob) in enumerate(drawn):
                    keep(mine[j], k, tokens, finished, logprob)
        else:
            with models.multiplied_out(model):
                _on_every_core(decode, order, batch_size, model.device.type)
    return Dataset.from_list(processes.gather([row for row in rows if row is not None]))


def prompts_of(
    model, tokenizer, questions, task, max_new_tokens: int
) -> tuple[list[str], list[list[int]]]:
    """The questions' prompts as text and as tokens; `UserError` for one that leaves no room in the model's context."""
    prompts = [render_prompt(tokenizer, task.prompt(row)) for row in questions]
    ids = tokenizer(prompts, add_special_tokens=False).input_ids  # the template has its own BOS
    context, longest = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        max(map(len, ids)),
    )
    if context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"The longest prompt has {longest} tokens; with {max_new_tokens} new ones it does not fit into "
            f"the model's context of {context}. Lower --max-new-tokens or leave out the longest questions."
        )
    return prompts, ids


def render_prompt(tokenizer, text: str) -> str:
    """The user's turn in the model's chat template, up to where the answer begins; control tokens in `text` are disarmed.

    Two things that some templates would decide by themselves are fixed: the date (Llama 3.2 prints today's, so that the
    same run would differ tomorrow) and hidden thinking (Qwen3, whose answers would be cut off). Others ignore them.
    """
    turn = {"role": "user", "content": models.plain_text(tokenizer, text)}
    return tokenizer.apply_chat_template(
        [turn],
        tokenize=False,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
        enable_thinking=False,
    )


def next_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """One token per row by inverting the cumulative distribution at a uniform number; (rows, vocabulary) -> (rows,).

    Nucleus sampling (Holtzman et al. 2020) keeps the smallest set of most probable tokens whose mass reaches `top_p`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ranked)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # The first token whose cumulative mass exceeds the threshold, which rounding must not put on the last edge itself.
    threshold = torch.minimum(
        uniforms.unsqueeze(-1).to(total) * total, total.nextafter(torch.zeros_like(total))
    )
    # Where numbers are not finite the result lies outside; `sample` notices by the log-probability.
    return (
        torch.searchsorted(cumulative, threshold, right=True)
        .squeeze(-1)
        .clamp_(max=logits.shape[-1] - 1)
    )


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, of shape (rows, heads, columns, head size), in memory that is taken once.

    The library's own layer is copied whole for every new token, which on a CPU costs more than the model itself.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        """Called by the model: append these columns, give back all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms, self.end = [key_states, value_states], key_states.shape[-2]
        else:
            start, self.end = self.end, self.end + key_states.shape[-2]
            for room, new in zip(self.rooms, (key_states, value_states)):
                # Not a slice: past the end of the memory that would be empty, and the new column lost without a word.
                room.narrow(2, start, new.shape[2]).copy_(new)
        self.keys, self.values = (room[:, :, : self.end] for room in self.rooms)
        return self.keys, self.values

    def reserve(self, copies, columns: int) -> None:
        for i, old in enumerate(self.rooms):
            shape = (len(copies), old.shape[1], columns, old.shape[3])
            # Keys lie column beside column on a CPU: it multiplies one query by all of them twice as fast that way.
            across = i == 0 and old.device.type == "cpu"
            self.rooms[i] = (
                old.new_empty(*shape[:2], *shape[:1:-1]).transpose(2, 3)
                if across
                else old.new_empty(shape)
            )
            self.rooms[i][:, :, : self.end] = old[copies]

    def keep(self, rows, first: int) -> None:
        for i, room in enumerate(self.rooms):
            kept = room[:, :, first : self.end][rows].clone()
            self.rooms[i] = room[: len(kept)]
            self.rooms[i][:, :, : self.end - first] = kept
        self.end -= first
        self.keys, self.values = (room[:, :, : self.end] for room in self.rooms)

    def put(self, slots, other: SlotLayer, copies) -> None:
        for room, new in zip(self.rooms, other.rooms):
            room.narrow(2, self.end - other.end, other.end)[slots] = new[copies]


class SlotCache(Cache):
    """A cache whose rows come and go. All rows end in the same column; `mask` tells which columns belong to a row."""

    def __init__(self, mask: torch.Tensor):
        super().__init__(layer_class_to_replicate=SlotLayer)
        self.mask = mask

    def reserve(self, copies, columns: int) -> None:
        """From one row per prompt to these copies of them, with memory for this many columns."""
        self.mask = self.mask[copies]
        for layer in self.layers:
            layer.reserve(copies, columns)

    def keep(self, rows, first: int = 0) -> None:
        """Leave these rows, in this order, from column `first` on."""
        self.mask = self.mask[:, first:][rows]
        for layer in self.layers:
            layer.keep(rows, first)

    def put(self, slots, other: SlotCache, copies) -> None:
        """Put these copies of the rows of `other`, which holds prompts alone, into these places, ending in the last column."""
        self.mask[slots] = 0
        self.mask[slots, self.mask.shape[1] - other.mask.shape[1] :] = other.mask[copies]
        for layer, new in zip(self.layers, other.layers):
            layer.put(slots, new, copies)


def _on_every_core(decode, order: list[int], batch_size: int, device: str) -> None:
    """On a CPU one loop per core, each with a share of the prompts: cores that work together on one small matrix
    spend their time waiting for each other. On a GPU one loop."""
    cores = min(torch.get_num_threads() if device == "cpu" else 1, len(order))
    stop = threading.Event()
    if cores <= 1:
        return decode(order, batch_size, stop)

    def on_one_core(part: list[int]) -> None:
        torch.set_num_threads(1)
        decode(part, max(1, batch_size // cores), stop)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores) as pool:
            loops = [pool.submit(on_one_core, order[core::cores]) for core in range(cores)]
            try:
                for loop in loops:
                    loop.result()
            finally:
                stop.set()  # Ctrl-C or an error in one ends the others, too
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Rows:
    """Completions under way, one a row; each field is a tensor of that many rows."""

    completion: torch.Tensor  # prompt * n + sample, or -1 once it was handed out
    token: torch.Tensor  # the newest one, not yet in the cache
    position: torch.Tensor  # of that token
    n_tokens: torch.Tensor
    tokens: torch.Tensor  # (rows, max_new_tokens)
    uniforms: torch.Tensor  # (rows, max_new_tokens)
    logprob: torch.Tensor
    ended: torch.Tensor  # by EOS
    over: torch.Tensor  # by EOS or by length

    def keep(self, rows) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def put(self, slots, other: _Rows) -> None:
        for field in fields(self):
            getattr(self, field.name)[slots] = getattr(other, field.name)

    def hand_out(self, n: int):
        """(prompt, sample, token ids, finished, log-probability) of every completion that is over, once."""
        ready = (self.over & (self.completion >= 0)).nonzero().squeeze(-1)
        for i, tokens, length, ended, logprob in zip(
            *(
                getattr(self, name)[ready].tolist()
                for name in ("completion", "tokens", "n_tokens", "ended", "logprob")
            )
        ):
            yield i // n, i % n, tokens[:length], ended, logprob
        self.completion[ready] = -1


@torch.inference_mode()
def _start(model, tokenizer, prompts: list[list[int]], first: int, n: int, uniforms):
    """n rows for each of these prompts, the `first` of which has that number, all but its last token in the cache."""
    beginnings = [ids[:-1] for ids in prompts]
    batch = models.pad_batch(beginnings, [[]] * len(prompts), tokenizer.pad_token_id, model.device)
    ids, mask, positions = (
        batch[name][:, :-1] for name in ("input_ids", "attention_mask", "position_ids")
    )
    cache = SlotCache(mask)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    copies = torch.arange(len(prompts), device=model.device).repeat_interleave(n)
    u = torch.from_numpy(np.concatenate([uniforms(first + i) for i in range(len(prompts))])).to(
        model.device
    )
    none = torch.zeros_like(copies)
    rows = _Rows(
        completion=first * n + torch.arange(len(copies), device=model.device),
        token=torch.tensor([ids[-1] for ids in prompts], device=model.device)[copies],
        position=torch.tensor([len(ids) - 1 for ids in prompts], device=model.device)[copies],
        n_tokens=none.clone(),
        tokens=torch.zeros_like(u, dtype=torch.long),
        uniforms=u,
        logprob=torch.zeros_like(u[:, 0]),
        ended=none.bool(),
        over=none.bool(),
    )
    return rows, cache, copies


@torch.inference_mode()
def _decode(model, tokenizer, prompts, n, temperature, top_p, batch_size, uniforms):
    """Completions as they end, of prompts that come longest first: see `_Rows.hand_out` for what is given.

    `uniforms(i)` gives the numbers for the n samples of prompt i, of shape (n, max_new_tokens).
    """
    ends = torch.tensor(models.end_tokens(model, tokenizer), device=model.device)
    slots = min(max(1, batch_size // n), len(prompts)) * n
    begun = min(slots // n, PREFILL)
    rows, cache, copies = _start(model, tokenizer, prompts[:begun], 0, n, uniforms)
    filling = torch.arange(slots, device=model.device) % len(
        copies
    )  # the rest are free slots from the start
    rows.keep(filling)
    rows.over[len(copies) :], rows.completion[len(copies) :] = True, -1
    columns = (
        len(prompts[0]) + rows.tokens.shape[1] + ROOM
    )  # one row needs ROOM less: there is always some to drop
    cache.reserve(copies[filling], columns)
    while True:
        free = rows.over.nonzero().squeeze(-1)
        waiting = prompts[begun : begun + min(len(free) // n, PREFILL)]
        change = len(free) >= FREE_SHARE * len(rows.over) and (waiting or begun >= len(prompts))
        if change:
            yield from rows.hand_out(n)
            if waiting:  # a newcomer starts with the last token of its prompt
                new, their_cache, copies = _start(model, tokenizer, waiting, begun, n, uniforms)
                slots = free[: len(copies)]
                rows.put(slots, new)
                cache.put(slots, their_cache, copies)
                begun += len(waiting)
            elif len(free) == len(rows.over):
                return
            else:
                alive = (~rows.over).nonzero().squeeze(-1)
                rows.keep(alive)
                cache.keep(alive)
        if change or cache.mask.shape[1] == columns:  # full, although hardly a row has ended
            first = int(cache.mask[~rows.over].any(0).long().argmax())
            if first >= ROOM:  # columns that no row needs any more
                cache.keep(slice(None), first)
        cache.mask = torch.cat([cache.mask, torch.ones_like(cache.mask[:, :1])], 1)
        logits = (
            model(
                input_ids=rows.token[:, None],
                attention_mask=cache.mask,
                position_ids=rows.position[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            .logits[:, -1]
            .float()
        )
        alive, at = (~rows.over).nonzero().squeeze(-1), rows.n_tokens
        logits, at = logits[alive], rows.n_tokens[alive]
        token = next_tokens(logits, rows.uniforms[alive, at], temperature, top_p)
        rows.logprob[alive] += (
            logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)
        ).double()
        rows.tokens[alive, at] = rows.token[alive] = token
        rows.n_tokens[alive] += 1
        rows.position[alive] += 1
        rows.ended[alive] = torch.isin(token, ends)
        rows.over = rows.ended | (rows.n_tokens == rows.tokens.shape[1])


def _uniforms(seed: int, question_id: str, n: int, max_new_tokens: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of shape (n, max_new_tokens), a stream of its own for each question and sample."""
    key = hashlib.blake2b(f"{seed}/{question_id}".encode(), digest_size=16).digest()
    streams = np.random.SeedSequence(list(np.frombuffer(key, np.uint32))).spawn(n)
    return np.stack(
        [np.random.Generator(np.random.Philox(s)).random(max_new_tokens) for s in streams]
    )


def _check(questions, n, temperature, top_p, max_new_tokens) -> None:
    if len(questions) == 0:
        raise UserError(
            "There are no questions to sample for. Check --n-questions and the split of the data set."
        )
    for name, value, sound in (
        ("n", n, n >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
    ):
        if not sound:
            raise UserError(
                f"{name} = {value} is out of range: n and max_new_tokens are at least 1, temperature is 0 "
                "(greedy) or more, top_p is above 0 and at most 1."
            )
