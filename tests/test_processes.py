"""Several processes on one run: the same samples, the same training, one writer (CPU processes that talk over gloo)."""

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
from datasets import load_from_disk

from irpo_utils import UserError, iteration, models, planning, profiles, training

SMALL = [
    "--profile",
    "smoke",
    "--quiet",
    "--iterations",
    "1",
    "--n-questions",
    "24",
    "--n-samples",
    "4",
    "--k-pairs",
    "4",
    "--n-eval-questions",
    "21",
    "--eval-samples",
    "2",
    "--eval-samples-ends",
    "2",
    "--learning-rate",
    "1e-3",
    "--alpha",
    "0.5",
]
TRAIN = """
import json, sys
import torch
from datasets import load_from_disk
from irpo_utils import models, processes, training
torch.set_num_threads(1)
shard = "sharded" in sys.argv
model, tokenizer = models.load("seed", shard=shard)
assert models.is_sharded(model) == shard
pairs = load_from_disk(sys.argv[1]).select(range(29))
result = training.train(model, tokenizer, pairs, learning_rate=1e-3, batch_size=8, micro_batch_size=2, seed=3, progress=False,
                        probe=pairs.select(range(1)), gradient_checkpointing="checkpointed" in sys.argv)
if processes.is_first():
    model.save_pretrained(sys.argv[2], state_dict=result.adapter, save_embedding_layers=False)
    open(sys.argv[2] + "/probe.json", "w").write(json.dumps(list(result.probe_log)))
    open(sys.argv[2] + "/log.json", "w").write(json.dumps(list(result.log)))
"""

TRAFFIC = """
import json, sys, time
import psutil
from datasets import load_from_disk
from irpo_utils import models, processes, training

def sent(pairs, steps):
    processes.wait()
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    training.train(model, tokenizer, pairs, batch_size=8, micro_batch_size=2, max_steps=steps, progress=False)
    processes.wait()
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before

found = {}
for shard in (False, True):
    model, tokenizer = models.load("seed", shard=shard)
    few, many = (sent(load_from_disk(sys.argv[1]).select(range(64)), steps) for steps in (2, 8))
    found[str(shard)] = (many - few) / 6            # without what is sent once
if processes.is_first():
    open(sys.argv[2], "w").write(json.dumps(found))
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread a process


def launcher(*words, processes=2) -> list[str]:
    """The engine's own launcher."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *map(str, words),
    ]


def launch(*words, processes=2, **options):
    return subprocess.run(
        launcher(*words, processes=processes),
        capture_output=True,
        text=True,
        timeout=400,
        env=ENVIRONMENT,
        **options,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same command in one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "irpo_utils", "run", *SMALL, "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


def trained(pairs, folder, *words, processes):
    """(rows of the log, rows of the probe, weights) of the script above."""
    from safetensors.torch import load_file

    script = folder.with_suffix(".py")
    script.write_text(TRAIN)
    done = launch(
        script, pairs, folder, *words, processes=processes, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return *(
        json.loads((folder / f"{name}.json").read_text()) for name in ("log", "probe")
    ), load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def steps_of_one(alone, tmp_path_factory):
    return trained(
        alone / "iteration_0" / "pairs", tmp_path_factory.mktemp("steps") / "one", processes=1
    )


@pytest.mark.parametrize("words", [(), ("sharded", "checkpointed")], ids=["whole", "sharded"])
def test_two_processes_take_the_same_steps_as_one(alone, steps_of_one, tmp_path, words):
    """Fixed pairs, optimiser steps of 8, 8, 8 and 5: losses, gradients and weights, whoever has which pairs or weights."""
    log, probe, weights = trained(
        alone / "iteration_0" / "pairs", tmp_path / "two", *words, processes=2
    )
    assert len(log) == len(steps_of_one[0]) == 4
    for one, two in zip(steps_of_one[0], log):
        for name in (
            "loss",
            "loss_dpo",
            "loss_nll",
            "logps_chosen",
            "margin",
            "grad_norm",
            "tokens",
        ):
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5), (one["step"], name)
    assert [row["nll_chosen"] for row in probe] == pytest.approx(
        [row["nll_chosen"] for row in steps_of_one[1]], abs=1e-5
    )
    assert set(weights) == set(steps_of_one[2])
    assert (
        max((weights[name] - value).abs().max() for name, value in steps_of_one[2].items()) < 1e-5
    )


def test_a_run_of_two_processes_is_the_run_of_one(alone, tmp_path):
    out = tmp_path / "run"
    done = launch("-m", "irpo_utils", "run", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    assert done.stdout.count("M_1: greedy") == 1  # one of them speaks
    samples = [load_from_disk(str(run / "iteration_0" / "samples")) for run in (alone, out)]
    assert (
        samples[0]["completion_ids"][:] == samples[1]["completion_ids"][:]
        and samples[0]["id"][:] == samples[1]["id"][:]
    )
    for name in ("graded", "pairs"):
        one, two = (
            load_from_disk(str(run / "iteration_0" / name)).remove_columns(
                ["logprob"] * (name == "graded")
            )
            for run in (alone, out)
        )
        assert one.to_list() == two.to_list()
    assert not list(out.rglob("*unfinished*")) and not list(out.rglob("*.partial"))
    one, two = (
        pandas.read_csv(run / "metrics.csv").query("metric == 'greedy'").set_index("iteration")
        for run in (alone, out)
    )
    assert one.value[0] == two.value[0] and one.low[1] <= two.value[1] <= one.high[1]
    again = launch(
        "-m", "irpo_utils", "evaluate", out, "--k", "1", "--iterations", "1"
    )  # the same for what is evaluated again
    assert again.returncode == 0 and again.stdout.count("split") == 1, again.stderr[-3000:]
    assert (out / "evaluations" / "word_problems_test.csv").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_dies_ends_all_and_another_number_goes_on(alone, tmp_path, rank):
    out = tmp_path / "run"
    group = subprocess.Popen(
        launcher("-m", "irpo_utils", "run", *SMALL, "--out", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while (
        group.poll() is None
        and not (out / "iteration_0" / "samples").exists()
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    workers = {
        child.environ()["RANK"]: child
        for child in psutil.Process(group.pid).children()
        if "RANK" in child.environ()
    }
    os.kill(workers[str(rank)].pid, signal.SIGKILL)
    _, said = group.communicate(timeout=120)
    assert group.returncode != 0 and not any(worker.is_running() for worker in workers.values())
    spoke = said.count("What was finished is kept: the same command goes on where it stood")
    assert spoke == 1, said[-3000:]
    kept = (out / "iteration_0" / "samples" / "checksums.json").stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "irpo_utils", "run", *SMALL, "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "iteration_0" / "samples" / "checksums.json").stat().st_mtime_ns == kept
    one, two = (
        pandas.read_csv(run / "metrics.csv").query("metric in ('greedy', 'sampled')")
        for run in (alone, out)
    )
    assert one.value.tolist() == pytest.approx(two.value.tolist())


@pytest.mark.parametrize(
    "changes, count, message",
    [
        ({}, "1", "torchrun"),
        ({"sampler": "transformers"}, "2", "--sampler vllm"),
        ({"method": "grpo"}, "2", "another --method than grpo"),
        ({"optimizer": "paged_adamw_8bit"}, "2", "adamw_torch"),
    ],
)
def test_what_a_model_in_parts_cannot_do_is_refused(monkeypatch, changes, count, message):
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UserError, match=message):
        iteration.check_shard(
            profiles.get("smoke", **{"shard": True, "sampler": "vllm", **changes})
        )
    iteration.check_shard(profiles.get("smoke"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="without it, and --shard true"):
        iteration.check_shard(profiles.get("smoke"))


def test_the_profile_decides_whether_the_model_is_split(monkeypatch):
    asked = []
    monkeypatch.setattr(models, "load", lambda name, **options: asked.append(options["shard"]))
    for shard in (True, False):
        iteration.load_model(profiles.get("smoke", shard=shard))
    assert asked == [True, False]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size = 16 cannot be shared by 3 processes"):
        training.pairs_at_once(16, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [training.pairs_at_once(16, micro) for micro in (None, 16, 2)] == [4, 4, 2]
    with pytest.raises(UserError, match="micro_batch_size = 3 times 4 processes"):
        training.pairs_at_once(16, 3)


@pytest.mark.slow
def test_what_goes_over_the_wire_is_what_the_plan_says(tmp_path):
    if "lo" not in psutil.net_io_counters(pernic=True):
        pytest.skip("no loopback interface of that name to count at")
    script, found = tmp_path / "traffic.py", tmp_path / "found.json"
    script.write_text(TRAFFIC)
    root = Path(__file__).parent.parent
    done = launch(
        script, root / "notebooks" / "shipped_run" / "iteration_0" / "pairs", found, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    copies, split = json.loads(found.read_text()).values()

    def planned(shard):
        profile = profiles.get(
            "cpu", batch_size=8, micro_batch_size=2, dtype="float32", shard=shard
        )
        shape = planning.find_shape("seed")
        e = planning._Estimate(
            profile, shape, planning.find_machine("2xA100-80GB"), planning.task_size(profile)
        )
        again = 4 * shape.lora(
            profile.lora_r
        )  # of 2 micro-batches: gloo makes a reduce-scatter of an all-reduce
        return 2 * (e.sent_per_step() + again / 2 * 2 * shard)

    assert copies == pytest.approx(planned(False), rel=0.1)
    assert split == pytest.approx(planned(True), rel=0.1)


def test_the_second_process_speaks_where_the_first_is_gone_or_goes_at_that_moment(monkeypatch):
    class Other:
        def __init__(self, rank):
            self.rank = rank

        def status(self):
            if self.rank is None:
                raise psutil.NoSuchProcess(1)
            return psutil.STATUS_RUNNING

        def environ(self):
            return {"RANK": self.rank}

    from irpo_utils import processes

    for others, speaks in (
        ([], True),
        ([Other(None)], True),
        ([Other("0")], False),
        ([Other("1"), Other(None)], True),
    ):
        monkeypatch.setattr(psutil.Process, "children", lambda self, others=others: others)
        for rank, expected in (("0", True), ("1", speaks), ("2", False)):
            monkeypatch.setenv("RANK", rank)
            assert processes.speaks_last() == expected, (rank, [other.rank for other in others])
