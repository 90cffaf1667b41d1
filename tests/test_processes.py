"""Several processes on one run: the same samples, the same training, one writer (gloo)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest
import shared_program
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from cluster import fsdp, shared
from irpo_utils import UserError, engines, models, profiles, training
from irpo_utils.engines import cpu
from irpo_utils.ops.run import engine_of
from irpo_utils.scale import processes

ROOT = Path(__file__).parent.parent
RUN = ROOT / "scripts" / "run.py"
OF_THE_PACKAGE = processes.engine  # a test of scripts/evaluate.py may have replaced it
PAIRS = str(ROOT / "notebooks" / "shipped_run" / "iteration_0" / "pairs")
SMALL = (
    "--profile smoke --quiet --iterations 1 --n-questions 24 --n-samples 4 --k-pairs 4 "
    "--n-eval-questions 21 --eval-samples 2 --eval-samples-ends 2 --learning-rate 1e-3 --alpha 0.5"
).split()
# One thread per process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/scripts"}


def launcher(*words, n=2) -> list[str]:
    """The command that starts n processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(n), *map(str, words)]


def launch(*words, n=2):
    done = subprocess.run(
        launcher(*words, n=n), capture_output=True, text=True, timeout=400, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_alone(out):
    command = [sys.executable, "-m", "irpo_utils", "run", *SMALL, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_process():
    """(completions of five questions, log, weights) of this process alone."""
    engine = engines.Engine()
    model, tokenizer = engine.load(profiles.get("smoke"))
    completions = shared_program.complete(engine, model, tokenizer, 5)
    log = shared_program.train(engine, model, tokenizer, PAIRS)
    weights = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    return completions, log, weights


def assert_same_steps(one_process, out: Path) -> None:
    """Losses, gradients and weights, whichever process has which pairs or weights."""
    _, log, weights = one_process
    for rank in (0, 1):
        shared = json.loads((out / f"{rank}.json").read_text())["log"]
        assert len(log) == len(shared) == 4
        for one, two in zip(log, shared, strict=True):
            for name in set(one) - {"seconds", "epoch", "rewards/accuracies"}:
                assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5), name
    saved = load_file(out / "adapter_model.safetensors")
    assert saved.keys() == weights.keys()
    assert max((saved[name] - weights[name]).abs().max() for name in saved) < 1e-5


def test_two_processes_sample_and_train_as_one(one_process, tmp_path):
    launch(shared_program.__file__, PAIRS, tmp_path / "out")
    ids, completions = one_process[0]
    for rank in (0, 1):  # every process has all completions
        found = json.loads((tmp_path / "out" / f"{rank}.json").read_text())
        assert not found["split"] and found["five"] == [ids, completions]
        assert found["one"] == [ids[:3], completions[:3]]  # the second process has no question
    assert_same_steps(one_process, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_with_half_of_the_weights_each_train_as_one(one_process, tmp_path):
    launch(shared_program.__file__, PAIRS, tmp_path / "out", "split")
    assert json.loads((tmp_path / "out" / "0.json").read_text())["split"]
    assert_same_steps(one_process, tmp_path / "out")


def test_world_size_without_a_launcher_is_one_process():
    """Some hosted notebooks set it; accelerate would wait for other processes."""
    code = (
        "from irpo_utils.scale import processes\n"
        "from accelerate import PartialState\n"
        "print(processes.count(), processes.is_first(), processes.gather([7]))\n"
        "print(PartialState(cpu=True).num_processes)\n"
    )
    stray = {k: v for k, v in ENVIRONMENT.items() if k not in ("RANK", "MASTER_ADDR")}
    stray |= {"WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=stray, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:2] == ["1 True [7]", "1"]


def as_one_of(monkeypatch, count: int, rank: int = 0) -> None:
    """The environment of a process that a launcher has started."""
    for name, value in {"WORLD_SIZE": count, "RANK": rank, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def test_the_launcher_says_how_many_processes_there_are(monkeypatch):
    assert processes.count() == 1 and processes.is_first()
    as_one_of(monkeypatch, 3, rank=2)
    assert processes.count() == 3 and not processes.is_first()
    monkeypatch.delenv("MASTER_ADDR")
    assert processes.count() == 1 and processes.is_first()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("RANK")
    assert processes.count() == 1 and processes.is_first() and processes.speaks_last()


@pytest.mark.parametrize(
    "changes, count, message",
    [
        ({}, 1, "torchrun"),
        ({"engine": "plain"}, 2, "--engine vllm"),
        ({"optimizer": "paged_adamw_8bit"}, 2, "adamw_torch"),
    ],
)
def test_what_a_split_model_cannot_do_is_refused(monkeypatch, changes, count, message):
    as_one_of(monkeypatch, count)
    with pytest.raises(UserError, match=message):
        fsdp.engine(profiles.get("smoke", **{"shard": True, "engine": "vllm", **changes}), None)


def test_processes_share_a_run_with_what_scripts_run_adds(monkeypatch):
    whole, split = profiles.get("smoke"), profiles.get("smoke", shard=True, engine="vllm")
    assert type(engine_of(whole)) is cpu.Engine
    as_one_of(monkeypatch, 2)
    monkeypatch.setattr(processes, "engine", OF_THE_PACKAGE)
    for profile in (whole, split):
        with pytest.raises(UserError, match="torchrun --nproc_per_node 8 scripts/run.py"):
            engine_of(profile)
    monkeypatch.setattr(processes, "engine", fsdp.engine)
    assert type(engine_of(whole)) is shared.SharedEngine
    assert type(engine_of(split)) is fsdp.ShardedEngine


def test_the_fsdp_of_accelerate_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="without FSDP, and use --shard true"):
        engine_of(profiles.get("smoke"))


def test_a_model_to_be_split_is_loaded_on_the_cpu_in_the_type_of_its_device(monkeypatch):
    """NF4 bytes are stored as numbers of that type, because FSDP2 splits no others."""
    asked = {}

    class Inner:
        def load(self, p, revision, **options):
            asked.update(options)
            return torch.nn.Linear(1, 1), None

    monkeypatch.setattr(fsdp, "shard_layers", lambda model, device: asked.update(to=device))
    monkeypatch.setattr(models, "default_device", lambda: "cuda:1")
    as_one_of(monkeypatch, 2)
    profile = profiles.get("smoke", shard=True, engine="vllm", dtype="bfloat16")
    fsdp.ShardedEngine(Inner()).load(profile)
    storage = {"bnb_4bit_quant_storage": torch.bfloat16}
    expected = {"device": "cpu", "dtype": "bfloat16", "nf4_options": storage, "to": "cuda:1"}
    assert asked == expected


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, tmp_path):
    model = torch.nn.Linear(1, 1)
    model.device, model.dtype = torch.device("cpu"), torch.float32

    def sizes(n_processes, micro):
        monkeypatch.setattr(training.DPOConfig, "world_size", n_processes)
        config = training._config(model, {"output_dir": str(tmp_path)}, "dpo_nll", 16, micro)
        return config.per_device_train_batch_size, config.gradient_accumulation_steps

    assert [sizes(4, micro) for micro in (None, 16, 2)] == [(4, 1), (4, 1), (2, 2)]
    with pytest.raises(UserError, match="batch_size = 16 must be a multiple .* processes, 3"):
        sizes(3, None)
    with pytest.raises(UserError, match="micro_batch_size = 3 times the number of processes, 4"):
        sizes(4, 3)
    with pytest.raises(UserError, match="micro_batch_size = 1 times the number of processes, 32"):
        sizes(32, None)  # fewer pairs than processes


def test_the_second_process_speaks_if_the_first_is_gone_or_ends_at_that_moment(monkeypatch):
    class Other:
        def __init__(self, rank):
            self.rank = rank

        def status(self):
            if self.rank is None:
                raise psutil.NoSuchProcess(1)
            return psutil.STATUS_RUNNING

        def environ(self):
            return {"RANK": self.rank}

    for others, speaks in (
        ([], True),
        ([Other(None)], True),
        ([Other("0")], False),
        ([Other("1"), Other(None)], True),
    ):
        monkeypatch.setattr(psutil.Process, "children", lambda self, others=others: others)
        for rank, expected in ((0, True), (1, speaks), (2, False)):
            as_one_of(monkeypatch, 3, rank)
            assert processes.speaks_last() == expected, (rank, [other.rank for other in others])


# Whole runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run directory of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    run_alone(out)
    return out


@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(alone, tmp_path):
    out = tmp_path / "run"
    done = launch(RUN, *SMALL, "--out", out)
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    assert done.stdout.count("M_1: greedy") == 1  # one of them prints
    tables = [
        [
            load_from_disk(str(run / "iteration_0" / name)).to_pandas()
            for name in ("samples", "graded", "pairs")
        ]
        for run in (alone, out)
    ]
    for one, two in zip(*tables, strict=True):
        numbers = [name for name in one if name == "logprob"]
        pandas.testing.assert_frame_equal(one.drop(columns=numbers), two.drop(columns=numbers))
    assert not list(out.rglob("*unfinished*")) and not list(out.rglob("*.partial"))
    one, two = (
        pandas.read_csv(run / "metrics.csv").query("metric == 'greedy'").set_index("iteration")
        for run in (alone, out)
    )
    assert one.value[0] == two.value[0] and one.low[1] <= two.value[1] <= one.high[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_dies_ends_all_and_another_number_resumes(alone, tmp_path, rank):
    out = tmp_path / "run"
    group = subprocess.Popen(
        launcher(RUN, *SMALL, "--out", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    samples, deadline = out / "iteration_0" / "samples", time.monotonic() + 300
    while group.poll() is None and not samples.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(group.pid).children()
    workers = {child.environ().get("RANK"): child for child in children}
    os.kill(workers[str(rank)].pid, signal.SIGKILL)
    _, said = group.communicate(timeout=120)
    assert group.returncode != 0 and not any(worker.is_running() for worker in workers.values())
    assert said.count("the same command") == 1, said[-3000:]
    kept = (samples / "checksums.json").stat().st_mtime_ns
    run_alone(out)
    assert (samples / "checksums.json").stat().st_mtime_ns == kept
    one, two = (
        pandas.read_csv(run / "metrics.csv").query("metric in ('greedy', 'sampled')")
        for run in (alone, out)
    )
    assert one.value.tolist() == pytest.approx(two.value.tolist())
