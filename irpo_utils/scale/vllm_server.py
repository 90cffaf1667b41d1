"""A vLLM server as the one that writes the completions (Kwon et al. 2023, arXiv 2309.06180), for models past one card.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 16 --enable-prefix-caching \\
        --quantization bitsandbytes --tensor-parallel-size 4 --data-parallel-size 2 --api-server-count 1
    VLLM_URL=http://localhost:8000 python -m irpo_utils run --profile NAME --model MODEL --sampler vllm

The server splits the model over cards (tensor parallel) and the questions over copies of it (data parallel), keeps a
prompt's cache for its N samples (prefix caching), and gets the adapter of M_t as LoRA before each iteration; so it has to
see the run directory. One API server: vLLM takes adapters at run time with no more. It needs vLLM 0.10.2 or newer, which
gives token ids back.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from irpo_utils import UserError, checksums, processes

AT_ONCE = 256  # questions under way: the server batches them as it likes
SECONDS = 3600.0  # for one question; it may wait behind many others
ADAPTER = 600.0  # to load one from a slow disk
SOON = 60.0  # for everything else
# What a server would otherwise take from the model's generation_config.json, and sample from another distribution.
PLAIN = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Server:
    """The server at `url`, or at VLLM_URL; `use` says which M_t writes, `complete` lets it write."""

    def __init__(self, url: str | None = None):
        self.url = (
            (url or os.environ.get("VLLM_URL", "http://localhost:8000"))
            .rstrip("/")
            .removesuffix("/v1")
        )
        models = self._ask("/v1/models")["data"]
        self.base = self.model = next(entry["id"] for entry in models if not entry.get("parent"))

    def use(self, adapter: Path | None) -> None:
        """Serve the base with this adapter from here on; None: the base as it is (M_0)."""
        name = f"irpo-{checksums.digest(adapter)[:16]}" if adapter else self.base
        if name != self.model and processes.is_first():
            if self.model != self.base:
                self._ask("/v1/unload_lora_adapter", {"lora_name": self.model}, ADAPTER)
            if adapter and name not in {entry["id"] for entry in self._ask("/v1/models")["data"]}:
                self._ask(
                    "/v1/load_lora_adapter",
                    {"lora_name": name, "lora_path": str(adapter.resolve())},
                    ADAPTER,
                )
        self.model = name
        processes.wait()

    def complete(
        self,
        prompts: list[list[int]],
        ids: list[str],
        n: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
        ends: list[int],
    ):
        """Yields (index of the prompt, its n completions) in the order of the prompts; each is (tokens, finished, logprob).

        Seeds are fixed by (seed, question id). On a GPU the same seed gives the same text only as far as the server's
        arithmetic does not depend on what else is in its batch. `logprob` is that of the model at temperature 1, as far as
        the server runs with its default `--logprobs-mode raw_logprobs`.
        """

        def one(prompt: list[int], question: str) -> list[tuple[list[int], bool, float]]:
            number = (
                int.from_bytes(
                    hashlib.blake2b(f"{seed}/{question}".encode(), digest_size=4).digest()
                )
                >> 1
            )
            answer = self._ask(
                "/v1/completions",
                {
                    "model": self.model,
                    "prompt": prompt,
                    "n": n,
                    "temperature": temperature,
                    "top_p": top_p,
                    "seed": number,
                    "max_tokens": max_new_tokens,
                    "stop_token_ids": ends,
                    "logprobs": 0,
                    "return_token_ids": True,
                    **PLAIN,
                },
                SECONDS,
            )
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            drawn = [self._read(choice, ends, max_new_tokens) for choice in choices]
            if len(drawn) != n:
                raise UserError(
                    f"The server at {self.url} gave {len(drawn)} completions where {n} were asked for."
                )
            return drawn

        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from enumerate(pool.map(one, prompts, ids))

    def _read(self, choice: dict, ends: list[int], most: int) -> tuple[list[int], bool, float]:
        tokens, finished = choice.get("token_ids"), choice["finish_reason"] == "stop"
        if tokens is None:
            raise UserError(
                f"The server at {self.url} gives no token ids back, and pairs are trained on the very tokens that were "
                "sampled: install vLLM 0.10.2 or newer there."
            )
        if not finished and (choice["finish_reason"] != "length" or len(tokens) < most):
            raise UserError(
                f"The server at {self.url} broke a completion off after {len(tokens)} tokens ({choice['finish_reason']}), "
                "which is neither an end nor the limit: see its log, and give the same command again."
            )
        if finished and (not tokens or tokens[-1] not in ends):
            raise UserError(
                f"The server at {self.url} ended a completion without one of the end tokens {ends}: take the same model "
                "and tokenizer there as here."
            )
        return tokens, finished, float(sum(choice["logprobs"]["token_logprobs"]))

    def _ask(self, path: str, content: dict | None = None, seconds: float = SOON):
        """POST of JSON, or GET; the answer as JSON, or as text where it is none."""
        request = urllib.request.Request(
            self.url + path,
            None if content is None else json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            advice = (
                " Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a disk that holds the run directory."
                if "lora" in path
                else ""
            )
            raise UserError(
                f"The vLLM server at {self.url} refused {path} ({error.code}: {said}).{advice}"
            ) from error
        except TimeoutError as error:
            raise UserError(
                f"The vLLM server at {self.url} did not answer {path} within {seconds:g} seconds: see its log, and give "
                "the same command again."
            ) from error
        except OSError as error:
            raise UserError(
                f"There is no vLLM server at {self.url} ({getattr(error, 'reason', error)}). Start it with `vllm serve "
                "MODEL --enable-lora`, wait until it is ready, and give its address in VLLM_URL."
            ) from error
        try:
            return json.loads(text)
        except ValueError:
            return text
