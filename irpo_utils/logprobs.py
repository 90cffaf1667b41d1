"""Log-probabilities of responses, in nats. The model reads the prompt; it is never scored."""

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.functional import cross_entropy

LOGITS = {"cpu": 2**24, "cuda": 2**28}  # numbers in the logits of one batch: 64 MB and 1 GB in fp32


def pad_batch(prompts, responses, pad_id: int, device="cpu") -> dict[str, torch.Tensor]:
    """Lists of token ids as tensors (rows, P + R): prompts padded left, responses padded right.

    Every response begins in column P. Returns the model's inputs and `response_mask` (rows, R).
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width + max(1, *map(len, responses))), pad_id)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        used = slice(width - len(prompt), width + len(response))
        ids[row, used] = torch.tensor(prompt + response)
        mask[row, used] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "response_mask": mask[:, width:]}
    batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `targets` (rows, R) under `logits` (rows, R, vocabulary), in fp32."""
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape)


def response_logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the last prompt column and of all response columns, (rows, 1 + R, vocabulary)."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    kept = 1 + batch["response_mask"].shape[1]
    return model(**inputs, use_cache=False, logits_to_keep=kept).logits


def response_logps(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of every response token given all before it, (rows, R), 0 on padding."""
    logits = response_logits(model, batch)
    targets = batch["input_ids"][:, 1 - logits.shape[1] :]
    # The logits of a position predict the next token: drop the last, keep the one before column P.
    return token_logps(logits[:, :-1], targets) * batch["response_mask"]


@torch.no_grad()
def score(model, tokenizer, prompts, responses, batch_size: int = 64) -> list[float]:
    """Sum of the log-probabilities of each response under the model as it is, in nats.

    Batches have rows of similar length, and fewer of them if the logits would take much memory.
    """
    longest, scores = max(map(len, responses), default=0) + 1, [0.0] * len(prompts)
    room = LOGITS[model.device.type] // (longest * model.config.get_text_config().vocab_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    size = max(1, min(batch_size, room))
    while order:
        rows = order[:size]
        parts = [prompts[i] for i in rows], [responses[i] for i in rows]
        try:
            batch = pad_batch(*parts, tokenizer.pad_token_id, model.device)
            sums = response_logps(model, batch).sum(-1).tolist()
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
            size //= 2
            continue
        for i, value in zip(rows, sums, strict=True):
            scores[i] = value
        order = order[len(rows) :]
    return scores
