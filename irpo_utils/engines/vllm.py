"""A vLLM server writes the completions; the model here is scored and trained.

See `scale.vllm_server` for the commands. The server must serve the same base.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from irpo_utils import UserError, logprobs, sampling
from irpo_utils.engines import shared_prompt
from irpo_utils.scale import processes
from irpo_utils.scale.vllm_server import Server

CHECKED = 16  # completions of every adapter whose log-probabilities are compared
MOST_DIFFERENCE = 0.3  # nats per token; rounding and another 4-bit kernel give less


class Engine(shared_prompt.Engine):
    """Decoding with the vLLM server at VLLM_URL."""

    def load(self, p, revision: str | None = None, **options):
        self.server = Server()  # first, because the model takes longer
        self.adapter = self.checked = None
        model, self.tokenizer = super().load(p, revision, **options)
        return model, self.tokenizer

    def use(self, model, adapter) -> None:
        """Store the adapter; the server loads it at the next request for completions."""
        super().use(model, adapter)
        self.adapter = Path(adapter) if adapter is not None else None

    def decode(self, model, request: sampling.Request, batch_size: int):
        self.server.use(self.adapter)
        completions = self.server.complete(request)
        first = list(itertools.islice(completions, CHECKED))
        if self.checked != self.server.model:
            self._check(model, request, first)
            self.checked = self.server.model
        yield from itertools.chain(first, completions)

    def _check(self, model, request: sampling.Request, completions) -> None:
        """The server must have this model: its log-probabilities are ours up to rounding."""
        rows = [(request.prompts[i], tokens, logprob) for i, _, tokens, _, logprob in completions]
        # A model that is split over processes scores the same rows in all of them.
        prompts, responses, theirs = zip(*processes.gather(rows)[:CHECKED], strict=True)
        ours = logprobs.score(model, self.tokenizer, prompts, responses)
        per_token = np.abs(np.subtract(ours, theirs)) / [len(tokens) for tokens in responses]
        if per_token.mean() > MOST_DIFFERENCE:
            raise UserError(
                f"The server at {self.server.url} does not complete with this model and adapter: "
                f"its log-probabilities differ by {per_token.mean():.2f} nats per token. Serve the "
                "same base there, with the default --logprobs-mode."
            )
