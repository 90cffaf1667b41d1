"""Stage 1: draw N chain-of-thought completions per question from M_t (section 2 of the paper).

Three things make this several times faster than `generate(num_return_sequences=N)` at the same distribution:
the prompt runs through the model once and its cache is copied to the N samples; questions of similar length share a
batch; and a completion that has ended leaves the batch instead of being padded on until the longest is done.

Every token is drawn with a uniform number of its own, fixed by (seed, question id, sample, position): a completion
does not depend on which others shared its batch, so a run can be cut into chunks anywhere and gives the same samples.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from tqdm.auto import tqdm

from irpo_utils import UserError, models

DROP_SHARE = 1 / 8      # finished rows leave the batch once they are this share of it: copying the cache has a price
ROOM = 32               # tokens of spare room in the cache


def sample(model, tokenizer, questions, task, n: int = 8, temperature: float = 1.0, top_p: float = 1.0,
           max_new_tokens: int = 256, seed: int = 0, batch_size: int = 256, progress: bool = True):
    """N completions per question: a `Dataset` of `len(questions) * n` rows in the order of the questions.

    Columns: `id`, `sample` (0..n-1), `prompt`, `completion`, `prompt_ids`, `completion_ids` (the very tokens, EOS only
    if it was sampled), `n_tokens`, `finished` (ended by EOS), `logprob` (sum over `completion_ids` under M_t at
    temperature 1, nats), `answer`, and `choices` if the questions have them.
    `temperature` 0 is greedy; `batch_size` counts completions, not questions. Raises `UserError` for settings out of
    range, an empty data set, and a prompt that leaves no room in the model's context.
    """
    from datasets import Dataset

    _check(questions, n, temperature, top_p, max_new_tokens)
    prompts = [render_prompt(tokenizer, task.prompt(row)) for row in questions]
    prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids      # the template has its own BOS
    _check_context(model, prompt_ids, max_new_tokens)

    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    per_batch = max(1, batch_size // n)
    rows: list[dict | None] = [None] * (len(prompts) * n)
    with tqdm(total=len(prompts), desc="sampling", unit="question", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), per_batch):
            chunk = order[start : start + per_batch]
            uniforms = np.concatenate([_uniforms(seed, questions[i]["id"], n, max_new_tokens) for i in chunk])
            drawn = _decode(model, tokenizer, [prompt_ids[i] for i in chunk], n, temperature, top_p,
                            max_new_tokens, torch.from_numpy(uniforms))
            for position, (tokens, finished, logprob) in enumerate(drawn):
                i, k = chunk[position // n], position % n
                rows[i * n + k] = {"id": questions[i]["id"], "sample": k, "prompt": prompts[i],
                                   "completion": tokenizer.decode(tokens, skip_special_tokens=True),
                                   "prompt_ids": prompt_ids[i], "completion_ids": tokens, "n_tokens": len(tokens),
                                   "finished": finished, "logprob": logprob, "answer": questions[i]["answer"],
                                   **({"choices": questions[i]["choices"]} if "choices" in questions[i] else {})}
            bar.update(len(chunk))
    return Dataset.from_list(rows)


def render_prompt(tokenizer, text: str) -> str:
    """The user's turn in the model's chat template, up to where the answer begins.

    Two things that some templates would decide by themselves are fixed: the date (Llama 3.2 prints today's, so that the
    same run would differ tomorrow) and hidden thinking (Qwen3, whose answers would be cut off). Others ignore them.
    """
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
                                         date_string="26 Jul 2024", enable_thinking=False)


def next_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
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
    threshold = uniforms.unsqueeze(-1).to(cumulative) * cumulative[:, -1:]
    # First token whose cumulative mass exceeds the threshold; rounding can put the threshold on the very last edge.
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last = (probabilities > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)


@torch.inference_mode()
def _decode(model, tokenizer, prompt_ids, n, temperature, top_p, max_new_tokens, uniforms):
    """Completions of one batch: a list of (token ids, finished, log-probability) with n entries per prompt."""
    ends = torch.tensor(models.end_tokens(model, tokenizer), device=model.device)
    batch = models.pad_batch(prompt_ids, [[]] * len(prompt_ids), tokenizer.pad_token_id, model.device)
    mask, positions = batch["attention_mask"][:, :-1], batch["position_ids"][:, :-1]
    cache = roomy_cache(model.config)
    logits = model(input_ids=batch["input_ids"][:, :-1], attention_mask=mask, position_ids=positions,
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    cache.batch_repeat_interleave(n)                       # the prompt was computed once; its N samples share it
    logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    position = positions[:, -1:].repeat_interleave(n, 0)
    rows = torch.arange(len(prompt_ids) * n, device=model.device)              # which completion a batch row belongs to
    tokens = torch.full((len(rows), max_new_tokens), -1, device=model.device)
    logprob = torch.zeros(len(rows), device=model.device, dtype=torch.float64)
    uniforms, alive = uniforms.to(model.device), torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        token = next_tokens(logits.float(), uniforms[rows, step], temperature, top_p)
        picked = torch.log_softmax(logits.float(), -1).gather(-1, token[:, None]).squeeze(-1)
        tokens[rows[alive], step] = token[alive]
        logprob[rows[alive]] += picked[alive].double()
        alive &= ~torch.isin(token, ends)
        n_alive = int(alive.sum())
        if n_alive == 0 or step == max_new_tokens - 1:
            break
        if n_alive <= (1 - DROP_SHARE) * len(rows):
            keep = alive.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            rows, mask, position, token, alive = rows[keep], mask[keep], position[keep], token[keep], alive[keep]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                       use_cache=True).logits[:, -1]
    lists = [[t for t in row if t >= 0] for row in tokens.tolist()]
    ended = torch.isin(torch.tensor([row[-1] for row in lists]), ends.cpu()).tolist()
    return list(zip(lists, ended, logprob.tolist(), strict=True))


def roomy_cache(config):
    """A `DynamicCache` whose keys and values lie in buffers with room for the next 32 tokens.

    The library's own cache is copied whole for every new token, which on a CPU costs more than the model itself.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states, value_states
                self.rooms = [key_states, value_states]
                return key_states, value_states
            self.keys, self.values = self._append(0, self.keys, key_states), self._append(1, self.values, value_states)
            return self.keys, self.values

        def _append(self, i, old, new):
            length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
            # No room left, or rows were dropped or repeated since, so that `old` is no longer the buffer's beginning.
            if self.rooms[i].shape[-2] < total or self.rooms[i].data_ptr() != old.data_ptr():
                self.rooms[i] = old.new_empty(*old.shape[:-2], total + ROOM, old.shape[-1])
                self.rooms[i][..., :length, :] = old
            self.rooms[i][..., length:total, :] = new
            return self.rooms[i][..., :total, :]

    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _uniforms(seed: int, question_id: str, n: int, max_new_tokens: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of shape (n, max_new_tokens), a stream of its own for each question and sample."""
    key = hashlib.blake2b(f"{seed}/{question_id}".encode(), digest_size=16).digest()
    streams = np.random.SeedSequence(list(np.frombuffer(key, np.uint32))).spawn(n)
    return np.stack([np.random.Generator(np.random.Philox(s)).random(max_new_tokens) for s in streams])


def _check(questions, n, temperature, top_p, max_new_tokens) -> None:
    if len(questions) == 0:
        raise UserError("There are no questions to sample for. Check --n-questions and the split of the data set.")
    for name, value, sound in (("n", n, n >= 1), ("temperature", temperature, temperature >= 0),
                               ("top_p", top_p, 0 < top_p <= 1), ("max_new_tokens", max_new_tokens, max_new_tokens >= 1)):
        if not sound:
            raise UserError(f"{name} = {value} is out of range: n and max_new_tokens are at least 1, temperature is 0 "
                            "(greedy) or more, top_p is above 0 and at most 1.")


def _check_context(model, prompt_ids, max_new_tokens) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompt_ids))
    if context is not None and longest + max_new_tokens > context:
        raise UserError(f"The longest prompt has {longest} tokens; with {max_new_tokens} new ones it does not fit into "
                        f"the model's context of {context}. Lower --max-new-tokens or leave out the longest questions.")
