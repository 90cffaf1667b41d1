"""Stage 1: draw N chain-of-thought completions per question from M_t (section 2 of the paper).

The prompt goes through the model once, its cache is copied to the N samples, and all samples grow
by one token per step. Every token is drawn with its own uniform random number, fixed by (seed,
question id, sample, position): batches and chunks of a run do not change its completions.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import DynamicCache

from irpo_utils import UserError, models


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
    engine=None,
) -> Dataset:
    """N completions per question: `len(questions) * n` rows in the order of the questions.

    Columns: those of the questions, and `sample` (0 to n - 1), `prompt`, `completion`,
    `prompt_ids`, `completion_ids` (the sampled tokens, with the end token if it was sampled),
    `n_tokens`, `finished` (ended by an end token), `logprob` (their sum at temperature 1, nats).
    temperature 0 is greedy. batch_size: completions at once, at least n. engine: see `engines`.
    Raises `UserError` for settings out of range, duplicate ids, long prompts and non-finite logits.
    """
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"n = {n} and max_new_tokens = {max_new_tokens} must be at least 1, temperature = "
            f"{temperature} at least 0, and top_p = {top_p} above 0 and at most 1."
        )
    questions, rows = list(questions), [None] * (len(questions) * n)
    check_ids(ids := [row["id"] for row in questions], "questions")
    prompts, prompt_ids = render_prompts(model, tokenizer, questions, task, max_new_tokens)
    ends, pad_id = models.end_tokens(model, tokenizer), tokenizer.pad_token_id
    request = Request(prompt_ids, ids, n, temperature, top_p, max_new_tokens, seed, ends, pad_id)
    decoder = engine.decode if engine else decode
    options = {"unit": "completion", "disable": not progress, "leave": False}
    with tqdm(total=len(rows), desc="sampling", **options) as bar:
        for i, k, tokens, finished, logprob in decoder(model, request, batch_size):
            if not math.isfinite(logprob):
                raise UserError("The logits are not finite: use a wider --dtype or other weights.")
            bar.update()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            row = {"sample": k, "prompt": prompts[i], "completion": text}
            row |= {"prompt_ids": prompt_ids[i], "completion_ids": tokens}
            row |= {"n_tokens": len(tokens), "finished": finished, "logprob": logprob}
            rows[i * n + k] = questions[i] | row
    names = dict.fromkeys(name for row in rows for name in row)  # a question may lack `choices`
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def render_prompts(model, tokenizer, questions, task, max_new_tokens: int):
    """The prompts as text and as token ids; they must leave room for a completion."""
    prompts = [models.render_prompt(tokenizer, task.prompt(row)) for row in questions]
    ids = tokenizer(prompts, add_special_tokens=False).input_ids  # the template has its own BOS
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"The longest prompt has {longest} tokens, the model's context {context}. Lower "
            f"--max-new-tokens (now {max_new_tokens}), or leave out the longest questions."
        )
    return prompts, ids


@dataclass
class Request:
    """What a decoder needs; the `prompts` are token ids, and the tokens `ends` end a completion."""

    prompts: list[list[int]]
    ids: list[str]
    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    ends: list[int]
    pad_id: int

    def uniforms(self, i: int) -> np.ndarray:
        """The random numbers of prompt i in [0, 1), (n, max_new_tokens): a stream per sample."""
        key = hashlib.blake2b(f"{self.seed}/{self.ids[i]}".encode(), digest_size=16).digest()
        streams = np.random.SeedSequence(list(np.frombuffer(key, np.uint32))).spawn(self.n)
        generators = [np.random.Generator(np.random.Philox(stream)) for stream in streams]
        return np.stack([generator.random(self.max_new_tokens) for generator in generators])


def next_tokens(logits, uniforms, temperature: float, top_p: float) -> torch.Tensor:
    """One token per row, (rows, vocabulary) -> (rows,): the inverse CDF at a uniform number.

    Nucleus sampling (Holtzman et al. 2020) keeps the fewest tokens whose mass reaches `top_p`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        ranked.masked_fill_(ranked.cumsum(-1) - ranked >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ranked)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not put the threshold on the last edge, where no token is left.
    below_total = total.nextafter(torch.zeros_like(total))
    threshold = torch.minimum(uniforms.unsqueeze(-1).to(total) * total, below_total)
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp_(max=logits.shape[-1] - 1)


def next_logits(model, cache, ids, mask, positions) -> torch.Tensor:
    """Logits (rows, vocabulary) after the last column of `ids`, which the cache then has."""
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    cached = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return model(**inputs, **cached).logits[:, -1].float()


@torch.inference_mode()
def decode_batch(model, request: Request, part: list[int]):
    """As `decode`: each prompt of `part` once, then n copies of its cache, which grow together."""
    device, n, prompts = model.device, request.n, [request.prompts[i] for i in part]
    width = max(map(len, prompts))
    ids = torch.tensor([[request.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)
    logits = next_logits(model, cache, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    uniforms = torch.from_numpy(np.concatenate([request.uniforms(i) for i in part])).to(device)

    # One token per step; a row that has ended leaves the batch.
    ends, rows = torch.tensor(request.ends, device=device), torch.arange(len(mask), device=device)
    tokens: list[list[int]] = [[] for _ in rows]
    logprob = torch.zeros(len(rows), dtype=torch.double, device=device)
    for step in range(request.max_new_tokens):
        token = next_tokens(logits, uniforms[rows, step], request.temperature, request.top_p)
        chosen = logits.gather(-1, token[:, None]).squeeze(-1)
        logprob[rows] += (chosen - logits.logsumexp(-1)).double()
        for row, drawn in zip(rows.tolist(), token.tolist(), strict=True):
            tokens[row].append(drawn)
        alive = (~torch.isin(token, ends)).nonzero().squeeze(-1)
        if len(alive) == 0 or step == request.max_new_tokens - 1:
            break
        if len(alive) < len(rows):
            rows, token, mask = rows[alive], token[alive], mask[alive]
            cache.batch_select_indices(alive)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = mask.sum(-1, keepdim=True) - 1
        logits = next_logits(model, cache, token[:, None], mask, position)
    for row, (drawn, value) in enumerate(zip(tokens, logprob.tolist(), strict=True)):
        yield part[row // n], row % n, drawn, drawn[-1] in request.ends, value


def decode(model, request: Request, batch_size: int, draw=decode_batch):
    """Yield (index of the prompt, sample, tokens, finished, logprob), longest prompts first."""
    at_once = max(1, batch_size // request.n)
    order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
    for start in range(0, len(order), at_once):
        yield from draw(model, request, order[start : start + at_once])


def check_ids(ids, where: str) -> None:
    """Refuse no ids, and ids that occur twice: completions are joined with questions by id."""
    if double := [name for name, count in Counter(ids).items() if count > 1]:
        raise UserError(
            f"{len(double)} ids occur more than once in the {where}: give {double[0]!r} another id."
        )
    if not ids:
        raise UserError(f"There are no {where}. Check --n-questions and the split.")
