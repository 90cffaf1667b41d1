"""A vLLM server (Kwon et al. 2023, arXiv 2309.06180) completes; the model here scores and trains.

A run in one process starts the server, and stops it to free memory for training: vLLM's sleep mode
needs a server in development mode. Several processes share one that you start: see notebook 08.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import requests
import torch
from tqdm.auto import tqdm

from irpo_utils import UserError, logprobs, models, sampling
from irpo_utils.engines import shared_prompt
from irpo_utils.scale import processes

CHECKED = 16  # completions of every adapter whose log-probabilities are compared
MOST_DIFFERENCE = 0.3  # nats per token; rounding and another 4-bit kernel give less
AT_ONCE = 256  # questions sent at a time; the server forms its own batches
# Seconds for one question, which may wait behind many others; for an adapter; and for the rest.
COMPLETION, ADAPTER, REPLY = 3600.0, 600.0, 60.0
START, STOP = 1800.0, 10.0  # seconds to load and compile the model, and to end
GPU_SHARE = 0.8  # of the memory that is free when the run's model is loaded; it scores in the rest
AGAIN = "See its log, then run the same command to resume."
# The shell becomes the server. A second one waits for the end of the run, and ends their group.
WATCHED = '{ (trap "" TERM; read _ <&3; kill 0; sleep 30; kill -9 0) & } 3<&0; exec "$@" </dev/null'
# Otherwise a server uses the model's generation_config.json, which is another distribution.
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


class Engine(shared_prompt.Engine):
    """Decoding with the vLLM server at VLLM_URL, or with one that the run starts."""

    command: list[str] | None = None  # starts the server; none before `load`, and with VLLM_URL

    def load(self, p, revision: str | None = None, **options):
        given = os.environ.get("VLLM_URL") or processes.count() > 1
        self.command = None if given else command(p, revision)  # first: the model takes longer
        self.server, self.started = Server() if given else None, contextlib.ExitStack()
        self.adapter = self.checked = None
        model, self.tokenizer = super().load(p, revision, **options)
        return model, self.tokenizer

    def use(self, model, adapter) -> None:
        """Store the adapter; the server loads it at the next request for completions."""
        super().use(model, adapter)
        self.adapter = Path(adapter) if adapter is not None else None

    def close(self) -> None:
        if self.command:
            self.server = None
            self.started.close()

    def decode(self, model, request: sampling.Request, batch_size: int):
        if self.server is None:
            self.server = Server(*self.started.enter_context(running(self.command)))
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
                f"{self.server.name} has another model: log-probabilities differ by "
                f"{per_token.mean():.2f} nats per token. {self.server.advice}"
            )


class Server:
    """The server at `url` or VLLM_URL; `use` chooses the adapter, `complete` writes completions."""

    def __init__(self, url: str | None = None, name: str | None = None):
        url = url or os.environ.get("VLLM_URL") or "http://localhost:8000"
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = name or f"The vLLM server at {self.url}"  # in messages
        self.advice = AGAIN if name else f"Start it as in notebook 08, and set VLLM_URL. {AGAIN}"
        self.base = next(m["id"] for m in self._ask("/v1/models")["data"] if not m.get("parent"))
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
            known = [model["id"] for model in self._ask("/v1/models")["data"]]
            if adapter is not None and name not in known:
                content = {"lora_name": name, "lora_path": str(adapter.resolve())}
                self._ask("/v1/load_lora_adapter", content, ADAPTER)
        self.model = name
        processes.wait()

    def complete(self, request):
        """Yield (prompt, sample, tokens, finished, logprob) for a `sampling.Request`.

        The request's seed and the question's id fix the seed of a prompt. On a GPU the text can
        also depend on what else is in the server's batch.
        """
        pool = ThreadPoolExecutor(AT_ONCE)
        answers = [pool.submit(self._complete, request, i) for i in range(len(request.prompts))]
        try:
            for i, answer in enumerate(answers):
                while not wait([answer], REPLY).done:
                    self._ask("/health")  # raises an error if the server hangs
                for k, choice in enumerate(answer.result()):
                    yield i, k, *self._read(choice, request)
        finally:  # does not wait for requests that the server still has
            pool.shutdown(wait=False, cancel_futures=True)

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
            raise UserError(f"{self.name} returned {len(choices)} completions, not {request.n}.")
        return sorted(choices, key=lambda choice: choice["index"])

    def _read(self, choice: dict, request) -> tuple[list[int], bool, float]:
        """(tokens, finished, log-probability at temperature 1) of one completion."""
        tokens, reason = choice.get("token_ids"), choice["finish_reason"]
        if tokens is None:
            fault = "returns no token ids, which training needs. Install vLLM 0.32 or newer"
        elif reason != "stop" and (reason != "length" or len(tokens) < request.max_new_tokens):
            fault = f"stopped a completion after {len(tokens)} tokens ({reason}). See its log"
        elif reason == "stop" and (not tokens or tokens[-1] not in request.ends):
            fault = f"ended a completion without {request.ends}. Serve the model of this run"
        else:
            return tokens, reason == "stop", float(sum(choice["logprobs"]["token_logprobs"]))
        raise UserError(f"{self.name} {fault}, then run the same command to resume.")

    def _ask(self, path: str, content: dict | None = None, seconds: float = REPLY):
        """GET, or POST of JSON; the reply as JSON, or as text if it is none."""
        method = "GET" if content is None else "POST"
        try:
            reply = requests.request(method, self.url + path, json=content, timeout=seconds)
        except requests.RequestException as error:
            raise UserError(f"{self.name} did not answer {path}: {error}. {self.advice}") from error
        if not reply.ok:
            reason = f"{reply.status_code}: {reply.text[:300]}"
            raise UserError(f"{self.name} refused {path} ({reason}). {self.advice}")
        return reply.json() if reply.content.startswith(b"{") else reply.text


def command(p, revision: str | None = None) -> list[str]:
    """The words that start a server for a profile; `UserError` if vLLM cannot serve it."""
    program = os.environ.get("VLLM_BIN") or "vllm"
    if shutil.which(program) is None:
        raise UserError(f"There is no {program}: set VLLM_BIN to vLLM's program, or VLLM_URL.")
    quantized = p.quantize is not False
    if quantized and not torch.cuda.is_available():
        raise UserError("On a CPU vLLM cannot serve a 4-bit base: add --quantize false.")
    dtype = str(models.default_dtype(models.default_device(), p.dtype)).removeprefix("torch.")
    rank = max(8, 1 << (p.lora_r - 1).bit_length())  # vLLM takes powers of two
    words = f"--host 127.0.0.1 --dtype {dtype} --max-model-len auto --enable-prefix-caching"
    words += f" --enable-lora --max-lora-rank {rank}"
    words += "" if torch.cuda.is_available() else " --no-enable-chunked-prefill"  # fails with seeds
    words += " --quantization bitsandbytes" if quantized else ""
    words += f" --revision {revision}" if revision else ""
    return [program, "serve", models.find(p.model), *words.split()]


@contextlib.contextmanager
def running(command: list[str]):
    """(URL, name) of a server that answers; after the context all its processes have ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words, url = [*command, "--port", f"{port}"], f"http://127.0.0.1:{port}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        room, total = torch.cuda.mem_get_info()
        words += ["--gpu-memory-utilization", f"{GPU_SHARE * room / total:.3f}"]
    log = tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", delete=False)
    name = f"The vLLM server of this run (log: {log.name})"
    tqdm.write(f"{name} is starting: {' '.join(command[:3])}.")
    options = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
    options |= {"env": os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}}
    process, started = subprocess.Popen(["sh", "-c", WATCHED, "sh", *words], **options), time.time()
    try:
        ready = False
        while not ready:
            if process.poll() is not None or time.time() > started + START:
                raise UserError(f"{name} did not start. {AGAIN}")
            time.sleep(0.5)
            with contextlib.suppress(requests.RequestException):
                ready = requests.get(f"{url}/health", timeout=5).ok
        tqdm.write(f"It answers after {time.time() - started:.0f} seconds.")
        yield url, name
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(STOP)
