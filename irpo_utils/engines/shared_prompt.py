"""Training with one row per pair, `prompt | chosen | rejected`: the prompt is computed once.

TRL's batch has two rows per pair, each with the prompt. The loss and the gradients are the same.
"""

from __future__ import annotations

import torch

from irpo_utils import logprobs
from irpo_utils.engines import Engine as PlainEngine
from irpo_utils.training import CHOSEN_ONLY, IterativeRPOTrainer, PairLogps


def pair_batch(prompts, chosen, rejected, pad_id: int) -> dict:
    """Token ids of B pairs as tensors; L = P + C + R columns.

    `input_ids`, `position_ids` (B, L): both responses continue the prompt's positions.
    `filled` (B, L), `response_mask` (B, C + R): what is no padding. `n_columns`: C.
    """
    widths = [max(1, *map(len, part)) for part in (prompts, chosen, rejected)]
    starts = (0, widths[0], widths[0] + widths[1])
    ids = torch.full((len(prompts), sum(widths)), pad_id)
    filled, positions = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    for row, parts in enumerate(zip(prompts, chosen, rejected, strict=True)):
        n_prompt = len(parts[0])
        offsets = (widths[0] - n_prompt, starts[1], starts[2])  # the prompt is padded on the left
        for part, at, position in zip(parts, offsets, (0, n_prompt, n_prompt), strict=True):
            ids[row, at : at + len(part)] = torch.tensor(part)
            positions[row, at : at + len(part)] = torch.arange(position, position + len(part))
            filled[row, at : at + len(part)] = True
    return {
        "input_ids": ids,
        "position_ids": positions,
        "filled": filled,
        "response_mask": filled[:, widths[0] :].long(),
        "n_columns": widths[1],  # no tensor: reading it would wait for the GPU
    }


def pair_mask(batch, dtype=torch.float32) -> torch.Tensor:
    """An additive mask (B, 1, L, L), in which the rejected response does not see the chosen one."""
    filled, length = batch["filled"], batch["filled"].shape[1]
    chosen = length - batch["response_mask"].shape[1]  # first column; the next is of the rejected
    rejected = chosen + batch["n_columns"]
    allowed = filled.new_ones(length, length).tril()
    allowed[rejected:, chosen:rejected] = False
    mask = torch.zeros(len(filled), 1, length, length, dtype=dtype, device=filled.device)
    return mask.masked_fill_(~(allowed & filled[:, None, :])[:, None], torch.finfo(dtype).min)


def pair_logps(model, batch, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen and the rejected responses of a `pair_batch`, (B,), nats."""
    width, split = batch["response_mask"].shape[1], batch["n_columns"]
    inputs = batch | {"attention_mask": pair_mask(batch, dtype)}
    logits = logprobs.response_logits(model, inputs)
    # The last prompt token predicts the first token of both responses.
    predicting = torch.cat([logits[:, :split], logits[:, :1], logits[:, split + 1 : -1]], 1)
    targets = batch["input_ids"][:, -width:]
    logps = logprobs.token_logps(predicting, targets) * batch["response_mask"]
    return logps[:, :split].sum(-1), logps[:, split:].sum(-1)


class SharedPromptTrainer(IterativeRPOTrainer):
    """`IterativeRPOTrainer` with one row per pair."""

    def __init__(self, model, **options):
        self.pad_id, self.dtype = options["processing_class"].pad_token_id, model.dtype
        super().__init__(model, data_collator=self.collate, **options)

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """B pairs as B rows; without the rejected responses for a loss that does not need them."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompts, chosen, rejected = ([row[name] for row in rows] for name in names)
        if self.loss_name in CHOSEN_ONLY:
            rejected = [[] for _ in rows]
        batch = pair_batch(prompts, chosen, rejected, self.pad_id)
        lengths = [[len(ids) for ids in side] for side in (prompts, chosen, rejected)]
        batch["lengths"] = torch.tensor(lengths).T
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def n_pairs(self, inputs) -> int:
        return len(inputs["lengths"])

    def n_tokens(self, inputs) -> torch.Tensor:
        return inputs["lengths"].sum(1)

    def compute_ref_log_probs(self, model, inputs):
        """Called by TRL for the precomputed reference; the model is M_t as it is now."""
        with torch.no_grad(), self.accelerator.autocast():
            return pair_logps(model, inputs, self.dtype)

    def pair_logps(self, model, inputs) -> PairLogps:
        chosen, rejected = pair_logps(model, inputs, self.dtype)
        _, n_chosen, n_rejected = inputs["lengths"].unbind(1)
        if self.loss_name in CHOSEN_ONLY:
            return PairLogps(chosen, n_chosen)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return PairLogps(chosen, n_chosen, rejected, n_rejected, *reference)


class Engine(PlainEngine):
    """Trains with `SharedPromptTrainer` where the model allows a mask of our own."""

    def trainer(self, model):
        config = model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        # A model with sliding windows builds several masks; with ALiBi (BLOOM, MPT, Falcon-RW) it
        # counts positions in the mask or by column.
        sliding = getattr(config, "sliding_window", None) or "sliding_attention" in kinds
        alibi = getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt")
        return None if sliding or alibi else SharedPromptTrainer
