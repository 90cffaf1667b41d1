"""Sampling by a vLLM server, against a stand-in of the same interface that writes with the seed model."""

import csv
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from irpo_utils import UserError, iteration, models, profiles, sampling, tasks, vllm_server

SMALL = dict(
    iterations=1,
    n_questions=24,
    n_samples=4,
    k_pairs=2,
    n_eval_questions=12,
    eval_samples=2,
    eval_samples_ends=2,
    learning_rate=1e-3,
)


class StandIn:
    """GET /v1/models, POST /v1/completions and the two of LoRA, as vLLM answers them; one request at a time."""

    def __init__(self):
        self.model, self.tokenizer = models.load("seed")
        self.adapters, self.asked, self.lock, self.token_ids, self.breaks_off = (
            {},
            [],
            threading.Lock(),
            True,
            False,
        )

    def get(self, path):
        return {
            "data": [{"id": "the-base", "parent": None}]
            + [{"id": name, "parent": "the-base"} for name in self.adapters]
        }

    def post(self, path, content):
        self.asked.append((path, content))
        if path == "/v1/load_lora_adapter":
            assert (Path(content["lora_path"]) / "adapter_config.json").exists()
            self.adapters[content["lora_name"]] = content["lora_path"]
            return "Success: LoRA adapter added."
        if path == "/v1/unload_lora_adapter":
            del self.adapters[content["lora_name"]]
            return "Success: LoRA adapter removed."
        with self.lock:
            return {"choices": [self.choice(content, i) for i in reversed(range(content["n"]))]}

    def choice(self, content, index):
        """One completion, token by token, by no helper of the package."""
        models.set_adapter(
            self.model, self.adapters[content["model"]] if content["model"] != "the-base" else None
        )
        generator = torch.Generator().manual_seed(content["seed"] + index)
        tokens, logps = [], []
        while len(tokens) < content["max_tokens"] and not (
            tokens and tokens[-1] in content["stop_token_ids"]
        ):
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([content["prompt"] + tokens])).logits[
                    0, -1
                ]
            chances = torch.softmax(logits / max(content["temperature"], 1e-6), -1)
            token = int(
                chances.argmax()
                if content["temperature"] == 0
                else torch.multinomial(chances, 1, generator=generator)
            )
            tokens.append(token)
            logps.append(torch.log_softmax(logits, -1)[token].item())
        # What a real server would otherwise take from the model's generation_config.json.
        assert (content["top_k"], content["min_p"], content["repetition_penalty"]) == (0, 0.0, 1.0)
        assert content["presence_penalty"] == content["frequency_penalty"] == 0.0
        ended = tokens[-1] in content["stop_token_ids"]
        reason = "abort" if self.breaks_off else "stop" if ended else "length"
        return {
            "index": index,
            "finish_reason": reason,
            "logprobs": {"token_logprobs": logps},
            **({"token_ids": tokens} if self.token_ids else {}),
        }


@pytest.fixture(scope="module")
def served():
    stand_in = StandIn()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content):
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer(stand_in.get(self.path))

        def do_POST(self):
            self.answer(
                stand_in.post(
                    self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )
            )

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 512  # callers that may wait at the door; 5 otherwise

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield stand_in, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_run_lets_the_server_write_with_the_adapter_of_each_iteration(
    served, tmp_path, monkeypatch
):
    stand_in, url = served
    monkeypatch.setenv("VLLM_URL", url + "/v1/")
    here, there = tmp_path / "here", tmp_path / "there"
    iteration.run(profiles.get("smoke", sampler="vllm", **SMALL), there, progress=False)
    loaded = [
        content["lora_name"] for path, content in stand_in.asked if path == "/v1/load_lora_adapter"
    ]
    assert len(loaded) == 1 and {
        content["model"] for path, content in stand_in.asked if "completions" in path
    } == {"the-base", *loaded}
    model, tokenizer = models.load("seed")
    questions, task = (
        tasks.get("word_problems").load("test").select(range(12)),
        tasks.get("word_problems"),
    )
    from datasets import load_from_disk

    for t in (0, 1):  # greedy answers need no random numbers: those of our own sampler
        models.set_adapter(model, there / "iteration_1" / "adapter" if t else None)
        ours = sampling.sample(
            model,
            tokenizer,
            questions,
            task,
            n=1,
            temperature=0.0,
            max_new_tokens=80,
            progress=False,
        )
        theirs = load_from_disk(str(there / f"iteration_{t}" / "evaluation"))["greedy"]
        assert (
            ours["completion_ids"][:] == theirs["completion_ids"][:]
            and ours["finished"][:] == theirs["finished"][:]
        )
        assert ours["logprob"][:] == pytest.approx(theirs["logprob"][:], abs=1e-3)
    drawn = load_from_disk(str(there / "iteration_0" / "samples"))
    assert (
        len(drawn) == 24 * 4
        and len(set(drawn["completion"])) > 24
        and drawn["sample"][:8] == [0, 1, 2, 3] * 2
    )
    assert not here.exists()


def test_a_server_that_writes_with_another_model_is_refused(served, tmp_path, monkeypatch):
    """Same tokenizer, other weights: only its log-probabilities show it."""
    monkeypatch.setenv("VLLM_URL", served[1])
    read = vllm_server.Server._read
    monkeypatch.setattr(
        vllm_server.Server,
        "_read",
        lambda *arguments: (*(found := read(*arguments))[:2], found[2] - len(found[0])),
    )
    with pytest.raises(
        UserError, match=r"does not write with seed.*are 1\.\d+ nats a token from ours"
    ):
        iteration.run(
            profiles.get("smoke", sampler="vllm", **SMALL), tmp_path / "run", progress=False
        )


def test_processes_that_share_a_split_model_run_through_with_it(served, tmp_path):
    """`--shard true`: the server writes, the parts are scored and trained together, and the adapter is whole again."""
    _, url = served
    small = {**SMALL, "n_questions": 12, "n_eval_questions": 6, "batch_size": 4}
    settings = [
        word
        for name, value in small.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "irpo_utils",
            "run",
            "--profile",
            "smoke",
            "--quiet",
            *settings,
            "--sampler",
            "vllm",
            "--shard",
            "true",
            "--out",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_URL": url},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.count("Figure: ") == 1
        and (tmp_path / "run" / "accuracy_per_iteration.png").exists()
    )  # one writes, one speaks
    rows = {
        (row["iteration"], row["metric"]): row
        for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    }
    value = {metric: float(row["value"]) for (t, metric), row in rows.items() if t == "1"}
    assert (
        value["chosen_logp_per_token"] > value["chosen_logp_per_token_before"]
        and value["kl_to_previous"] > 0
    )
    assert not list(tmp_path.rglob("*unfinished*"))


def test_the_same_seed_asks_for_the_same_numbers_and_other_questions_for_others(served):
    stand_in, url = served
    server, asked = vllm_server.Server(url), len(stand_in.asked)
    for seed in (1, 1, 2):
        list(server.complete([[5, 6], [7]], ["a", "b"], 1, 1.0, 1.0, 2, seed, [3]))
    seeds = sorted((content["prompt"], content["seed"]) for _, content in stand_in.asked[asked:])
    assert len({pair for pair in map(str, seeds)}) == 4 and len({seed for _, seed in seeds}) == 4


def test_what_a_user_sees_when_the_server_cannot_be_used(served):
    stand_in, url = served
    with pytest.raises(UserError, match="no vLLM server at http://127.0.0.1:9 .*vllm serve"):
        vllm_server.Server("http://127.0.0.1:9")
    stand_in.token_ids = False
    with pytest.raises(UserError, match="no token ids.*0.10.2"):
        list(vllm_server.Server(url).complete([[5]], ["a"], 1, 1.0, 1.0, 2, 0, [3]))
    stand_in.token_ids = True
    stand_in.breaks_off = True
    with pytest.raises(UserError, match=r"broke a completion off after \d tokens \(abort\)"):
        list(vllm_server.Server(url).complete([[5]], ["a"], 1, 1.0, 1.0, 2, 0, [3]))
    stand_in.breaks_off = False


def test_a_server_that_says_nothing_is_not_waited_for_long(monkeypatch):
    import socket

    monkeypatch.setattr(vllm_server.Server._ask, "__defaults__", (None, 0.5))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UserError, match="did not answer /v1/models within 0.5 seconds"),
    ):
        vllm_server.Server(f"http://127.0.0.1:{silent.getsockname()[1]}")
