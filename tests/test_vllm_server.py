"""Sampling with a vLLM server, against a stand-in with its interface that uses the seed model."""

import csv
import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from irpo_utils import UserError, iteration, models, profiles, sampling, tasks
from irpo_utils.engines import vllm
from irpo_utils.ops import run as runs
from irpo_utils.ops import run_directory
from studies import gpu_phases, gpu_report

ROOT = Path(__file__).parent.parent
BASE = "the-base"


class StandIn:
    """The paths of vLLM that are used: models, completions, and the two for LoRA adapters."""

    def __init__(self):
        self.model, self.tokenizer = models.load("seed")
        self.lock, self.asked, self.adapters = threading.Lock(), [], {}
        self.token_ids, self.breaks_off = True, False

    def get(self, path):
        adapters = [{"id": name, "parent": BASE} for name in self.adapters]
        return {"data": [{"id": BASE, "parent": None}, *adapters]}

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
            adapter = None if content["model"] == BASE else self.adapters[content["model"]]
            models.set_adapter(self.model, adapter)
            return {"choices": [self.choice(content, i) for i in reversed(range(content["n"]))]}

    def choice(self, content, index):
        """One completion, token by token, without a helper of the package."""
        # Otherwise a real server uses the model's generation_config.json.
        assert (content["top_k"], content["min_p"], content["repetition_penalty"]) == (0, 0.0, 1.0)
        assert content["presence_penalty"] == content["frequency_penalty"] == 0.0
        generator = torch.Generator().manual_seed(content["seed"] + index)
        tokens, logps, ended = [], [], False
        while len(tokens) < content["max_tokens"] and not ended:
            with torch.inference_mode():
                ids = torch.tensor([content["prompt"] + tokens])
                logits = self.model(input_ids=ids).logits[0, -1]
            chances = torch.softmax(logits / max(content["temperature"], 1e-6), -1)
            token = int(torch.multinomial(chances, 1, generator=generator))
            if content["temperature"] == 0:
                token = int(chances.argmax())
            tokens.append(token)
            logps.append(torch.log_softmax(logits, -1)[token].item())
            ended = token in content["stop_token_ids"]
        reason = "abort" if self.breaks_off else "stop" if ended else "length"
        found = {"index": index, "finish_reason": reason, "logprobs": {"token_logprobs": logps}}
        return found | ({"token_ids": tokens} if self.token_ids else {})


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
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(stand_in.post(self.path, json.loads(content)))

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 512  # connections that may wait; 5 by default

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield stand_in, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def engine(served, monkeypatch):
    """(engine, model, tokenizer) of a profile with this server."""
    monkeypatch.setenv("VLLM_URL", served[1] + "/v1/")
    engine = vllm.Engine()
    return engine, *engine.load(profiles.get("smoke", engine="vllm"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter that differs from M_0."""
    model, _ = models.load("seed")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def complete(parts, engine=None, n_questions=3, **options):
    model, tokenizer = parts
    task = tasks.get("word_problems")
    questions = task.load("test").select(range(n_questions))
    options = {"n": 1, "temperature": 0.0, "max_new_tokens": 12, "progress": False} | options
    return sampling.sample(model, tokenizer, questions, task, engine=engine, **options)


def test_the_server_completes_with_the_adapter_in_use(served, engine, adapter):
    """Greedy completions need no random numbers, so they are those of the plain decoder."""
    stand_in, (engine, *parts) = served[0], engine
    seen = len(stand_in.asked)
    for folder in (None, adapter, adapter, None):
        engine.use(parts[0], folder)
        theirs, ours = complete(parts, engine), complete(parts)
        assert theirs["completion_ids"][:] == ours["completion_ids"][:]
        assert theirs["finished"][:] == ours["finished"][:]
        assert theirs["logprob"][:] == pytest.approx(ours["logprob"][:], abs=1e-3)
    paths = [path for path, _ in stand_in.asked[seen:] if "lora" in path]
    assert paths == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


def test_an_adapter_that_only_scores_is_not_served(served, engine, adapter):
    seen = len(served[0].asked)
    engine[0].use(engine[1], adapter)
    engine[0].use(engine[1], None)
    complete(engine[1:], engine[0])
    assert {path for path, _ in served[0].asked[seen:]} == {"/v1/completions"}


def test_samples_of_a_question_differ_and_are_the_same_again(engine):
    options = {"n": 3, "temperature": 1.0}
    drawn = [complete(engine[1:], engine[0], **options) for _ in range(2)]
    assert drawn[0]["completion_ids"][:] == drawn[1]["completion_ids"][:]
    assert drawn[0]["sample"][:6] == [0, 1, 2] * 2
    assert len(set(drawn[0]["completion"])) > 2


def test_a_server_with_another_model_is_refused_once_per_adapter(engine, adapter, monkeypatch):
    """The same tokenizer with other weights: only the log-probabilities show it."""
    read, engine, *parts = vllm.Server._read, *engine
    complete(parts, engine)
    monkeypatch.setattr(
        vllm.Server,
        "_read",
        lambda *arguments: (*(found := read(*arguments))[:2], found[2] - len(found[0])),
    )
    complete(parts, engine)  # M_0 has been compared before
    engine.use(parts[0], adapter)
    with pytest.raises(UserError, match=r"has another model: .* 1\.\d+ nats per token"):
        complete(parts, engine)


def request(prompts=((5, 6), (7,)), seed=0):
    prompts = [list(prompt) for prompt in prompts]
    return sampling.Request(prompts, ["a", "b"][: len(prompts)], 1, 1.0, 1.0, 2, seed, [3], 0)


def test_the_seed_follows_the_seed_of_the_request_and_the_question(served):
    stand_in, url = served
    server, seen = vllm.Server(url), len(stand_in.asked)
    for seed in (1, 1, 2):
        list(server.complete(request(seed=seed)))
    pairs = {(str(content["prompt"]), content["seed"]) for _, content in stand_in.asked[seen:]}
    assert len(pairs) == 4 and len({seed for _, seed in pairs}) == 4


def test_what_a_user_sees_when_the_server_cannot_be_used(served):
    stand_in, url = served
    with pytest.raises(
        UserError, match="at http://127.0.0.1:9 did not answer .*notebook 08, .*VLLM_URL"
    ):
        vllm.Server("http://127.0.0.1:9")
    server, short = vllm.Server(url), request([(5,)])
    stand_in.token_ids = False
    with pytest.raises(UserError, match="no token ids.*0.32"):
        list(server.complete(short))
    stand_in.token_ids, stand_in.breaks_off = True, True
    with pytest.raises(UserError, match=r"stopped a completion after \d tokens \(abort\)"):
        list(server.complete(short))
    stand_in.breaks_off = False


def test_a_server_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(vllm.Server._ask, "__defaults__", (None, 0.5))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UserError, match=r"did not answer /v1/models: .*timeout=0\.5"),
    ):
        vllm.Server(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_pairs_share_their_prompt_in_training(engine):
    assert engine[0].trainer(engine[1]) is vllm.shared_prompt.SharedPromptTrainer


# ---------------------------------------------------------------- a server that the run starts


@pytest.fixture
def program(served, tmp_path, monkeypatch):
    """The folder of the stand-in program, which `--engine vllm` starts."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "url").write_text(served[1])
    (folder / "fault").write_text("")
    (folder / "starts").write_text("")
    vllm_bin = folder / "vllm"
    script = Path(__file__).with_name("vllm_program.py")
    vllm_bin.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    vllm_bin.chmod(0o755)
    monkeypatch.setenv("VLLM_BIN", str(vllm_bin))
    monkeypatch.setenv("STAND_IN", str(folder))
    monkeypatch.delenv("VLLM_URL", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # for logs
    yield folder
    wait_for_the_end_of(starts(folder))


def starts(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_the_end_of(rows: list[dict], seconds: float = 20) -> None:
    """All processes of these starts end in time."""
    pids, deadline = [pid for row in rows for pid in row["pids"]], time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def started_engine(**changes):
    engine = vllm.Engine()
    profile = profiles.get("smoke", engine="vllm", quantize=False, **changes)
    return engine, *engine.load(profile)


def test_a_run_starts_its_server_when_it_samples_and_ends_all_its_processes(program, adapter):
    engine, *parts = started_engine(lora_r=12)
    assert starts(program) == []
    theirs, ours = complete(parts, engine), complete(parts)
    assert theirs["completion_ids"][:] == ours["completion_ids"][:]
    [row] = starts(program)
    assert row["updating"] == "True" and all(map(alive, row["pids"]))
    words = " ".join(row["words"])
    assert words.startswith(f"serve {models.find('seed')} --host 127.0.0.1 --dtype float32 ")
    for option in ("--enable-lora", "--max-lora-rank 16", "--enable-prefix-caching"):
        assert option in words
    assert "--no-enable-chunked-prefill" in words  # else vLLM ends on a CPU when prompts are split
    assert "quantization" not in words and "revision" not in words and "memory" not in words
    engine.close()
    assert not any(map(alive, row["pids"]))
    engine.close()  # nothing to end
    complete(parts, engine)
    assert len(starts(program)) == 2
    engine.close()


def test_the_report_of_a_gpu_measures_a_server_that_it_starts_and_ends(program, tmp_path):
    sides = gpu_phases.Sides(gpu_report.Settings.of(device="cpu", tiny=True, work=str(tmp_path)))
    values = gpu_phases.sample_from_vllm(sides, "vllm", quantize=False, rows=16)
    assert values["rows"] == 16 <= values["tokens"] <= 16 * 4 and values["tokens_per_second"] > 0
    assert "peak_mb" not in values
    [row] = starts(program)
    assert not any(map(alive, row["pids"]))


def test_the_server_of_a_gpu_gets_a_share_of_the_memory_that_is_free(program, monkeypatch):
    """And the 4-bit base of the profile, and its commit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60e9, 80e9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    words = vllm.command(profiles.get("llama-3.1-8b", model="seed", lora_r=64), "abc")
    with vllm.running(words):
        [row] = starts(program)
    assert row["words"][-2:] == ["--gpu-memory-utilization", "0.600"]
    text = " ".join(row["words"])
    for option in ("--dtype bfloat16", "--quantization bitsandbytes", "--max-lora-rank 64"):
        assert option in text
    assert "--revision abc" in text


def test_what_vllm_cannot_do_is_named_before_the_model_is_loaded(monkeypatch):
    monkeypatch.delenv("VLLM_URL", raising=False)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setenv("VLLM_BIN", "/nowhere/vllm")
    with pytest.raises(UserError, match="no /nowhere/vllm: .*VLLM_BIN.*VLLM_URL"):
        started_engine()
    monkeypatch.setenv("VLLM_BIN", sys.executable)
    with pytest.raises(UserError, match="4-bit base: add --quantize false"):
        vllm.Engine().load(profiles.get("smoke", engine="vllm"))


def test_a_run_that_is_refused_before_its_engine_has_loaded_says_why(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_URL", raising=False)
    monkeypatch.setenv("VLLM_BIN", "/nowhere/vllm")
    profile = profiles.get("smoke", engine="vllm", quantize=False)
    with pytest.raises(UserError, match="no /nowhere/vllm"):
        runs.run(profile, tmp_path, progress=False)
    (tmp_path / "iteration_0" / "samples").mkdir(parents=True)
    with pytest.raises(UserError, match="made with other settings: seed"):
        runs.run(dataclasses.replace(profile, seed=1), tmp_path, progress=False)


@pytest.mark.parametrize("fault", ["ends", "loads"])
def test_a_server_that_does_not_start_is_given_up(program, monkeypatch, fault):
    (program / "fault").write_text(fault)
    monkeypatch.setattr(vllm, "START", 60.0 if fault == "ends" else 3.0)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"\(log: (.*)\) did not start.*same command") as raised:
        with vllm.running(vllm.command(profiles.get("smoke", quantize=False))):
            pass
    assert time.monotonic() - begun < 30
    log = Path(re.search(r"log: (.*)\)", str(raised.value))[1]).read_text()
    assert ("no room for the model" in log) == (fault == "ends")
    wait_for_the_end_of(starts(program))


TINY = {
    "iterations": 1,
    "n_questions": 4,
    "n_samples": 2,
    "n_eval_questions": 6,
    "eval_samples": 1,
    "eval_samples_ends": 1,
    "max_new_tokens": 6,
    "batch_size": 2,
    "gold": True,
    "quantize": False,
    "engine": "vllm",
}


@pytest.mark.parametrize(
    "fault, message",
    [
        ("dies 7", "did not answer /v1/completions"),
        ("hangs 7", "did not answer /health: .*timed out"),
        ("other_base", r"has another model: .* differ by (0.9|1.)\d+ nats"),
    ],
)
def test_a_run_whose_server_fails_ends_with_one_message_and_resumes(
    served, program, tmp_path, monkeypatch, fault, message
):
    """Blocks of two questions; with the first eight completions one block is finished."""
    monkeypatch.setattr(run_directory, "BLOCK", 4)
    profile, out = profiles.get("smoke", **TINY), tmp_path / "run"
    (program / "fault").write_text(fault)
    with monkeypatch.context() as patched:
        patched.setattr(vllm, "REPLY", 1.0)
        patched.setattr(vllm.Server._ask, "__defaults__", (None, 1.0))
        with pytest.raises(UserError, match=message) as raised:
            runs.run(profile, out, progress=False)
    text = str(raised.value)
    assert Path(re.search(r"of this run \(log: (.*?)\)", text)[1]).is_file()
    wait_for_the_end_of(starts(program), seconds=5)
    done = len(list(out.rglob("block_*")))
    assert done == (0 if fault == "other_base" else 1)
    (program / "fault").write_text("")
    seen = len(served[0].asked)
    rows = runs.run(profile, out, progress=False)
    asked = [content for path, content in served[0].asked[seen:] if path.endswith("completions")]
    # M_0: greedy and sampled, for the questions of unfinished blocks. Then the 4 training
    # questions, and 6 questions at M_1: greedy, sampled, and for the KL.
    assert len(asked) == 2 * (6 - 2 * done) + 4 + 3 * 6
    assert {row["iteration"] for row in rows} == {0, 1}
    # Stopped for training, started again for M_1, whose adapter it has loaded.
    assert len(starts(program)) == 3
    assert len({content["model"] for content in asked}) == 2
    wait_for_the_end_of(starts(program), seconds=5)


PARENT = """
import signal, time
from irpo_utils import profiles
from irpo_utils.engines import vllm
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
with vllm.running(vllm.command(profiles.get("smoke", quantize=False))):
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_ends_when_the_run_is_killed_or_interrupted(program, number):
    command = [sys.executable, "-c", PARENT]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(program)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": environment}
    with subprocess.Popen(command, text=True, **options) as parent:
        lines = iter(parent.stdout.readline, "")
        assert any(line == "ready\n" for line in lines)
        assert all(map(alive, starts(program)[0]["pids"]))
        parent.send_signal(number)
    wait_for_the_end_of(starts(program))


SMALL = {
    "iterations": 1,
    "n_questions": 12,
    "n_samples": 4,
    "n_eval_questions": 6,
    "eval_samples": 2,
    "eval_samples_ends": 2,
    "batch_size": 4,
    "learning_rate": 1e-3,
}


@pytest.mark.slow
def test_a_run_loads_the_adapter_of_each_iteration(served, tmp_path, monkeypatch):
    stand_in, seen = served[0], len(served[0].asked)
    monkeypatch.setenv("VLLM_URL", served[1])
    iteration.run(profiles.get("smoke", engine="vllm", **SMALL), tmp_path / "run", progress=False)
    asked = stand_in.asked[seen:]
    loaded = [content["lora_name"] for path, content in asked if path == "/v1/load_lora_adapter"]
    used = {content["model"] for path, content in asked if "completions" in path}
    assert len(loaded) == 1 and used == {BASE, *loaded}


@pytest.mark.slow
def test_processes_that_share_a_split_model_run_through_with_it(served, tmp_path):
    """The server completes, the parts are scored and trained together, the adapter is whole."""
    settings = [
        word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    command = [*torchrun, str(ROOT / "scripts/run.py")]
    command += "--profile smoke --quiet --engine vllm".split()
    command += [*settings, "--shard", "true", "--out", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_URL": served[1], "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["iteration"] == "1"]
    value = {row["metric"]: float(row["value"]) for row in rows}
    assert value["chosen_logp_per_token"] > value["chosen_logp_per_token_before"]
    assert value["kl_to_previous"] > 0
    assert not list(tmp_path.rglob("*unfinished*"))


# ---------------------------------------------------------------- the real server


@pytest.mark.vllm
def test_a_run_with_the_real_server_survives_its_death(tmp_path, monkeypatch):
    """Two iterations with SmolLM2-135M; the server is killed while it samples from M_1."""
    if shutil.which(os.environ.get("VLLM_BIN") or "vllm") is None:
        pytest.skip("there is no vLLM: `make vllm-test` installs it")
    if not (models.CACHE / "smollm2-135m" / "config.json").is_file():
        pytest.skip("there is no SmolLM2-135M: `python scripts/smollm2.py` makes it")
    monkeypatch.delenv("VLLM_URL", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for logs
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    changes = TINY | {"iterations": 2, "n_questions": 6, "max_new_tokens": 24, "k_pairs": 1}
    small = {
        "task": "word_problems",
        "dtype": None,
        "dequantize": False,
        "start": None,
        "micro_batch_size": 2,
    }
    profile = profiles.get("smollm2-135m-cpu", **small, **changes)
    ask, used = vllm.Server._ask, []

    def kill_at_m_1(self, path, *arguments):
        """The third request to M_1 comes too late."""
        if path.endswith("completions"):
            used.append(self.model)
            if used.count(self.model) == 3 and len(set(used)) == 2:
                [server] = [p for p in psutil.Process().children() if "serve" in p.cmdline()]
                server.kill()
        return ask(self, path, *arguments)

    monkeypatch.setattr(vllm.Server, "_ask", kill_at_m_1)
    with pytest.raises(UserError, match=r"of this run \(log: .*same command") as raised:
        runs.run(profile, tmp_path / "run", progress=False)
    print(raised.value)
    wait_for_the_end_of(
        [{"pids": [p.pid for p in psutil.process_iter() if p.name()[:4] == "VLLM"]}]
    )
    assert (tmp_path / "run" / "iteration_1" / "adapter").is_dir()
    used.append("resumed")
    rows = runs.run(profile, tmp_path / "run", progress=False)
    assert {row["iteration"] for row in rows} == {0, 1, 2}
    print((tmp_path / "run" / "timing.csv").read_text())
    adapters = [name for name in dict.fromkeys(used) if name.startswith("irpo-")]
    assert len(adapters) == 2  # whose log-probabilities were compared
    resumed = used[used.index("resumed") + 1 :]
    assert resumed[0] == adapters[0] and set(resumed) == set(adapters)  # M_0 was not asked again
    logs = [file.read_text() for file in tmp_path.glob("vllm-*.log")]
    loaded = [text.count('POST /v1/load_lora_adapter HTTP/1.1" 200') for text in logs]
    assert sorted(loaded) == [0, 1, 1, 1]  # M_0; M_1, killed; M_1 again; M_2
