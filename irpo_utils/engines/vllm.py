"""A vLLM server (Kwon et al. 2023, arXiv 2309.06180) completes; the model here scores and trains.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 16 \\
        --enable-prefix-caching --quantization bitsandbytes --tensor-parallel-size 4 \\
        --data-parallel-size 2 --api-server-count 1
    VLLM_URL=http://localhost:8000 python -m irpo_utils run --profile NAME --engine vllm

The server must serve the same base. It splits the model over GPUs (tensor parallel) and the
questions over copies of it (data parallel). It loads the adapter of M_t, so it must see the run
directory. vLLM loads adapters at run time with one API server only, and returns token ids from
version 0.10.2 on.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests

from irpo_utils import UserError, logprobs, sampling
from irpo_utils.engines import shared_prompt
from irpo_utils.scale import processes

CHECKED = 16  # completions of every adapter whose log-probabilities are compared
MOST_DIFFERENCE = 0.3  # nats per token; rounding and another 4-bit kernel give less
AT_ONCE = 256  # questions sent at a time; the server forms its own batches
# Seconds for one question, which may wait behind many others; for an adapter; and for the rest.
COMPLETION, ADAPTER, REPLY = 3600.0, 600.0, 60.0
# Otherwise a server uses the model's generation_config.json, which is another distribution.
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


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


class Server:
    """The server at `url` or VLLM_URL; `use` chooses the adapter, `complete` writes completions."""

    def __init__(self, url: str | None = None):
        url = url or os.environ.get("VLLM_URL", "http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.base = next(m["id"] for m in self._models() if not m.get("parent"))
        self.model = self.base

    def use(self, adapter: Path | None) -> None:
        """Complete with this adapter from now on; None: with the base alone (M_0)."""
        name = self.base
        if adapter is not None:
            weights = (adapter / "adapter_model.safetensors").read_bytes()
            name = f"irpo-{hashlib.sha256(weights).hexdigest()[:16]}"
        if name != self.model and processes.is_first():
            if self.model != self.base:
                self._ask("/v1/unload_lora_adapter", {"lora_name": self.model}, ADAPTER)
            if adapter is not None and name not in [m["id"] for m in self._models()]:
                content = {"lora_name": name, "lora_path": str(adapter.resolve())}
                self._ask("/v1/load_lora_adapter", content, ADAPTER)
        self.model = name
        processes.wait()

    def complete(self, request):
        """Yield (prompt, sample, tokens, finished, logprob) for a `sampling.Request`.

        The request's seed and the question's id fix the seed of a prompt. On a GPU the text can
        also depend on what else is in the server's batch.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = pool.map(lambda i: self._complete(request, i), range(len(request.prompts)))
            for i, choices in enumerate(answers):
                for k, choice in enumerate(choices):
                    yield i, k, *self._read(choice, request)

    def _complete(self, request, i: int) -> list[dict]:
        key = hashlib.blake2b(f"{request.seed}/{request.ids[i]}".encode(), digest_size=4)
        content = {
            "model": self.model,
            "prompt": request.prompts[i],
            "n": request.n,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": int.from_bytes(key.digest()) >> 1,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": request.ends,
            "logprobs": 0,
            "return_token_ids": True,
        }
        choices = self._ask("/v1/completions", content | PLAIN, COMPLETION)["choices"]
        if len(choices) != request.n:
            raise UserError(
                f"The server at {self.url} returned {len(choices)} completions, not {request.n}."
            )
        return sorted(choices, key=lambda choice: choice["index"])

    def _read(self, choice: dict, request) -> tuple[list[int], bool, float]:
        """(tokens, finished, log-probability at temperature 1) of one completion."""
        tokens, reason = choice.get("token_ids"), choice["finish_reason"]
        fault = None
        if tokens is None:
            fault = "returns no token ids, which training needs. Install vLLM 0.10.2 or newer"
        elif reason != "stop" and (reason != "length" or len(tokens) < request.max_new_tokens):
            fault = f"stopped a completion after {len(tokens)} tokens ({reason}). See its log"
        elif reason == "stop" and (not tokens or tokens[-1] not in request.ends):
            fault = f"ended a completion without {request.ends}. Serve the model of this run"
        if fault is not None:
            raise UserError(
                f"The server at {self.url} {fault}, then run the same command to resume."
            )
        return tokens, reason == "stop", float(sum(choice["logprobs"]["token_logprobs"]))

    def _models(self) -> list[dict]:
        return self._ask("/v1/models")["data"]

    def _ask(self, path: str, content: dict | None = None, seconds: float = REPLY):
        """GET, or POST of JSON; the reply as JSON, or as text if it is none."""
        method = "GET" if content is None else "POST"
        try:
            reply = requests.request(method, self.url + path, json=content, timeout=seconds)
        except requests.Timeout as error:
            raise UserError(
                f"The vLLM server at {self.url} did not answer {path} within {seconds:g} seconds. "
                "See its log, then run the same command to resume."
            ) from error
        except requests.RequestException as error:
            raise UserError(
                f"There is no vLLM server at {self.url} ({error}). Start it with `vllm serve MODEL "
                "--enable-lora`, and set VLLM_URL to its address."
            ) from error
        if not reply.ok:
            raise UserError(
                f"The vLLM server at {self.url} refused {path} ({reply.status_code}: "
                f"{reply.text[:300]}). Adapters need --enable-lora, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and the run's disk."
            )
        return reply.json() if reply.content.startswith(b"{") else reply.text
