"""Stage 1: draw N chain-of-thought completions per question from M_t (section 2 of the paper).

The prompt goes through the model once, its cache is copied to the N samples, and all samples grow
by one token per step. Every token is drawn with its own uniform random number, fixed by (seed,
question id, sample, position): a completion does not depend on the others in its batch, so chunking
a run does not change its samples.

`Engine` is the plain way to compute. A module in `engines/` with a class `Engine` replaces it.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import DynamicCache

from irpo_utils import UserError, models


@dataclass
class Request:
    """Prompts to complete and how; `ids` are the questions' ids, `ends` the tokens that end one."""

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
        rows = [
            np.random.Generator(np.random.Philox(s)).random(self.max_new_tokens) for s in streams
        ]
        return np.stack(rows)


class Engine:
    """How a run computes. This one is plain; the subclasses in `engines/` are faster."""

    def load(self, p, revision: str | None = None):
        """The model and tokenizer of a profile: M_0."""
        names = ("quantize", "lora_r", "lora_alpha", "pad_token", "dtype")
        settings = {name: getattr(p, name) for name in names}
        return models.load(p.model, revision=revision, **settings)

    def use(self, model, adapter) -> None:
        """Turn the model into the M_t of the folder `adapter` (None: M_0)."""
        models.set_adapter(model, adapter)

    def decode(self, model, request: Request, batch_size: int):
        """Yield (prompt, sample, tokens, finished, logprob) for every completion, in any order.

        prompt and sample are indices, tokens includes the end token, logprob is the sum at
        temperature 1 in nats. batch_size counts completions.
        """
        at_once = max(1, batch_size // request.n)
        longest_first = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        for start in range(0, len(longest_first), at_once):
            yield from decode(model, request, longest_first[start : start + at_once])

    def trainer(self, model):
        """The class that trains this model, or None for `training.IterativeRPOTrainer`."""
        return None


def find_engine(name: str) -> Engine:
    """The engine of that name: "plain", or a module of `irpo_utils.engines`."""
    if name == "plain":
        return Engine()
    try:
        return importlib.import_module(f"irpo_utils.engines.{name}").Engine()
    except ModuleNotFoundError as error:
        if error.name != f"irpo_utils.engines.{name}":
            raise
        raise UserError(
            f"There is no engine {name!r}: --engine is plain or the name of a module in "
            "irpo_utils/engines, such as cpu."
        ) from error


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
    engine: Engine | None = None,
) -> Dataset:
    """N completions per question: `len(questions) * n` rows in the order of the questions.

    Columns: those of the questions, and `sample` (0 to n - 1), `prompt`, `completion`, `prompt_ids`,
    `completion_ids` (the sampled tokens, with the end token if it was sampled), `n_tokens`,
    `finished` (ended by an end token), `logprob` (sum over `completion_ids` at temperature 1, nats).
    temperature 0 is greedy. batch_size counts completions, not questions.
    Raises `UserError` for settings out of range, duplicate ids, a prompt that leaves no room in the
    model's context, and logits that are not finite.
    """
    _check(questions, n, temperature, top_p, max_new_tokens)
    questions = list(questions)
    prompts, prompt_ids = render_prompts(model, tokenizer, questions, task, max_new_tokens)
    request = Request(
        prompt_ids,
        [row["id"] for row in questions],
        n,
        temperature,
        top_p,
        max_new_tokens,
        seed,
        models.end_tokens(model, tokenizer),
        tokenizer.pad_token_id,
    )
    rows: list[dict | None] = [None] * (len(questions) * n)
    bar = tqdm(
        total=len(rows), desc="sampling", unit="completion", disable=not progress, leave=False
    )
    with bar:
        completions = (engine or Engine()).decode(model, request, batch_size)
        for i, k, tokens, finished, logprob in completions:
            if not math.isfinite(logprob):
                raise UserError(
                    "The model's logits are not finite, so its completions mean nothing. In float16, "
                    "use --dtype bfloat16 or float32; otherwise its weights are broken."
                )
            bar.update()
            rows[i * n + k] = {
                **questions[i],
                "sample": k,
                "prompt": prompts[i],
                "completion": tokenizer.decode(tokens, skip_special_tokens=True),
                "prompt_ids": prompt_ids[i],
                "completion_ids": tokens,
                "n_tokens": len(tokens),
                "finished": finished,
                "logprob": logprob,
            }
    return Dataset.from_list(rows)


def render_prompts(model, tokenizer, questions, task, max_new_tokens: int):
    """The prompts of the questions as text and as token ids; they must leave room for a completion."""
    prompts = [models.render_prompt(tokenizer, task.prompt(row)) for row in questions]
    ids = tokenizer(prompts, add_special_tokens=False).input_ids  # the template has its own BOS
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"The longest prompt has {longest} tokens. With {max_new_tokens} new ones it does not fit "
            f"into the model's context of {context}. Lower --max-new-tokens, or leave out the longest "
            "questions."
        )
    return prompts, ids


def next_tokens(logits, uniforms, temperature: float, top_p: float) -> torch.Tensor:
    """One token per row, (rows, vocabulary) -> (rows,): the inverse CDF at a uniform number.

    Nucleus sampling (Holtzman et al. 2020) keeps the smallest set of most probable tokens whose
    mass reaches `top_p`.
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
    # Rounding must not put the threshold on the last edge, where no token is left.
    below_total = total.nextafter(torch.zeros_like(total))
    threshold = torch.minimum(uniforms.unsqueeze(-1).to(total) * total, below_total)
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp_(max=logits.shape[-1] - 1)


@torch.inference_mode()
def decode(model, request: Request, part: list[int]):
    """The n completions of each prompt in `part`: (prompt, sample, tokens, finished, logprob)."""
    device, n, width = model.device, request.n, max(len(request.prompts[i]) for i in part)
    ids = torch.full((len(part), width), request.pad_id)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(part):
        ids[row, width - len(request.prompts[i]) :] = torch.tensor(request.prompts[i])
        mask[row, width - len(request.prompts[i]) :] = 1
    ids, mask = ids.to(device), mask.to(device)

    # 1. Each prompt once, then n copies of its cache.
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(n)
    logits, mask = logits.float().repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    position = mask.sum(-1)
    uniforms = torch.from_numpy(np.concatenate([request.uniforms(i) for i in part])).to(device)

    # 2. One token per step; a row that has ended leaves the batch.
    ends = torch.tensor(request.ends, device=device)
    rows = torch.arange(len(mask), device=device)
    tokens: list[list[int]] = [[] for _ in rows]
    logprob = torch.zeros(len(rows), dtype=torch.double, device=device)
    for step in range(request.max_new_tokens):
        token = next_tokens(logits, uniforms[rows, step], request.temperature, request.top_p)
        chosen = logits.gather(-1, token[:, None]).squeeze(-1)
        logprob[rows] += (chosen - logits.logsumexp(-1)).double()
        ended = torch.isin(token, ends)
        for row, drawn in zip(rows.tolist(), token.tolist(), strict=True):
            tokens[row].append(drawn)
        alive = (~ended).nonzero().squeeze(-1)
        if len(alive) == 0 or step == request.max_new_tokens - 1:
            break
        if len(alive) < len(rows):
            rows, token, mask, position = rows[alive], token[alive], mask[alive], position[alive]
            cache.batch_select_indices(alive)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        logits, position = logits.float(), position + 1
    for row, (drawn, value) in enumerate(zip(tokens, logprob.tolist(), strict=True)):
        yield part[row // n], row % n, drawn, drawn[-1] in request.ends, value


def check_ids(rows, where: str) -> None:
    """Raise `UserError` for ids that occur twice: completions are joined with questions by id."""
    double = [name for name, count in Counter(rows).items() if count > 1]
    if double:
        raise UserError(
            f"{len(double)} ids occur more than once in the {where}, for example {double[0]!r}. "
            "Give every question its own `id`."
        )


def _check(questions, n, temperature, top_p, max_new_tokens) -> None:
    if len(questions) == 0:
        raise UserError(
            "There are no questions to sample for. Check --n-questions and the split of the data set."
        )
    check_ids([row["id"] for row in questions], "questions")
    sound = {
        "n": n >= 1,
        "temperature": temperature >= 0,
        "top_p": 0 < top_p <= 1,
        "max_new_tokens": max_new_tokens >= 1,
    }
    for name, good in sound.items():
        if not good:
            raise UserError(
                f"{name} is out of range: n and max_new_tokens must be at least 1, temperature 0 "
                "(greedy) or more, and top_p above 0 and at most 1."
            )
