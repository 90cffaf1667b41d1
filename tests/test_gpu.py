"""What only a CUDA GPU can show: QLoRA in bf16 and fp16, the paged optimiser, memory that truly runs out, estimates
against the card. `make gpu-test`; skipped where there is none."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset

from irpo_utils import iteration, models, profiles, sampling, tasks, training, vllm_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
DEVICE = "cuda"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def task():
    return tasks.get("word_problems")


@pytest.fixture(scope="module")
def questions(task):
    return task.load("validation").select(range(48))


@pytest.fixture(scope="module")
def in_fp32():
    return models.load("seed", device=DEVICE, dtype="float32")


@pytest.fixture()
def preferences(in_fp32, task, questions):
    """Pairs of gold solutions over blurted numbers."""
    tokenizer, rows = in_fp32[1], []
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    for i, row in enumerate(questions):
        rows.append(
            {
                "prompt_ids": encode(sampling.render_prompt(tokenizer, task.prompt(row))),
                "chosen_ids": encode(row["solution"]) + [tokenizer.eos_token_id],
                "rejected_ids": encode(f"Final answer: {i}") + [tokenizer.eos_token_id],
            }
        )
    return Dataset.from_list(rows)


def fresh(loaded):
    models.set_adapter(loaded[0], None)
    return loaded


def test_greedy_is_plain_generate_token_for_token(in_fp32, questions, task):
    model, tokenizer = fresh(in_fp32)
    ours = sampling.sample(
        model, tokenizer, questions, task, n=1, temperature=0.0, max_new_tokens=60, progress=False
    )
    for row in ours:
        ids = torch.tensor([row["prompt_ids"]], device=DEVICE)
        theirs = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
        )
        assert row["completion_ids"] == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.05)]
)
def test_log_probabilities_are_those_of_the_cpu(in_fp32, questions, task, dtype, tolerance):
    """Per token, nats; NF4 weights are the same numbers on both."""
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bf16")
    drawn = sampling.sample(
        *fresh(in_fp32), questions, task, n=1, max_new_tokens=60, progress=False
    )
    scores = []
    for device, kind in (("cpu", "float32"), (DEVICE, dtype)):
        model, tokenizer = models.load("seed", device=device, dtype=kind)
        scores.append(
            models.score(model, tokenizer, drawn["prompt_ids"][:], drawn["completion_ids"][:])
        )
    for cpu, gpu, length in zip(*scores, drawn["n_tokens"]):
        assert abs(cpu - gpu) / length < tolerance


@pytest.mark.parametrize(
    "dtype, optimizer",
    [
        ("bfloat16", "paged_adamw_8bit"),
        ("float16", "paged_adamw_8bit"),
        ("bfloat16", "adamw_torch"),
        ("float16", "adamw_torch"),
    ],
)
def test_qlora_learns_in_half_precision(preferences, dtype, optimizer):
    """Starts at ln 2, loses nothing to underflow, and ends below: with checkpointing and micro-batches."""
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bf16")
    model, tokenizer = models.load("seed", device=DEVICE, dtype=dtype)
    result = training.train(
        model,
        tokenizer,
        preferences,
        learning_rate=1e-3,
        epochs=4,
        micro_batch_size=4,
        gradient_checkpointing=True,
        optimizer=optimizer,
        progress=False,
    )
    log = result.log.to_pandas()
    assert log.loss_dpo[0] == pytest.approx(0.6931, abs=0.02)
    assert log.loss.iloc[-1] < 0.7 * log.loss[0] and log.loss.notna().all()
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_the_paged_optimiser_takes_the_steps_of_adamw(in_fp32, preferences):
    ends = {}
    for optimizer in ("adamw_torch", "paged_adamw_8bit"):
        model, tokenizer = fresh(in_fp32)
        log = training.train(
            model,
            tokenizer,
            preferences,
            learning_rate=1e-3,
            epochs=4,
            optimizer=optimizer,
            progress=False,
        ).log
        ends[optimizer] = log["loss"][-1]
    assert ends["paged_adamw_8bit"] == pytest.approx(ends["adamw_torch"], rel=0.1)


def test_memory_that_runs_out_costs_a_smaller_micro_batch_and_no_step(in_fp32, preferences, capsys):
    """A true out-of-memory error: the process is given little more than the loaded model takes."""
    many = Dataset.from_list(
        [{**row, "prompt_ids": row["prompt_ids"] * 8} for row in preferences] * 4
    )
    settings = dict(learning_rate=1e-3, batch_size=64, progress=False)
    expected = training.train(*fresh(in_fp32), many, micro_batch_size=2, **settings).log
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training.train(*fresh(in_fp32), many, micro_batch_size=8, **settings)
    allowed, total = (
        torch.cuda.max_memory_reserved(),
        torch.cuda.get_device_properties(0).total_memory,
    )
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(1.3 * allowed / total)
        found = training.train(*fresh(in_fp32), many, micro_batch_size=64, **settings).log
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory with 64 pairs at once" in capsys.readouterr().out
    assert found["loss"][:] == pytest.approx(expected["loss"][:], rel=1e-2) and len(found) == len(
        expected
    )


def test_the_base_stays_loaded_between_the_stages(in_fp32, preferences, questions, task):
    model, tokenizer = fresh(in_fp32)
    base = {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    training.train(model, tokenizer, preferences, progress=False)
    sampling.sample(model, tokenizer, questions, task, n=2, max_new_tokens=20, progress=False)
    assert {
        name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name
    } == base


def test_a_whole_run_on_the_card(tmp_path):
    profile = profiles.get(
        "smoke", dtype=None, optimizer="paged_adamw_8bit", gradient_checkpointing=True
    )
    iteration.run(profile, tmp_path / "run", progress=False)
    table = pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert set(table[table.metric == "greedy"].iteration) == {0, 1, 2}
    assert "cuda" in str(models.load("seed")[0].device)


def test_the_estimate_of_memory_holds_on_the_card(tmp_path):
    from irpo_utils import planning

    profile = dataclasses.replace(
        profiles.get("smoke"), sampling_batch_size=2048, n_samples=32, n_questions=64
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    iteration.run(profile, tmp_path / "run", progress=False)
    measured = torch.cuda.max_memory_reserved() / 1e9
    assert planning.plan(profile).total.memory / 1e9 == pytest.approx(measured, rel=0.5, abs=1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card")
@pytest.mark.parametrize("words", [(), ("sharded",)])
def test_two_cards_take_the_same_steps_as_one(tmp_path, words):
    """Over NCCL: whole copies of the model, and every layer split."""
    from test_processes import trained

    pairs = ROOT / "notebooks" / "shipped_run" / "iteration_0" / "pairs"
    one, two = (
        trained(pairs, tmp_path / str(n), *(words if n == 2 else ()), processes=n) for n in (1, 2)
    )
    for a, b in zip(one[0], two[0], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=0.01)
    assert all(
        torch.allclose(one[2][name], weight, rtol=0.05, atol=2e-3)
        for name, weight in two[2].items()
    )


@pytest.fixture(scope="module")
def vllm_url():
    """A vLLM server with SmolLM2-135M on this card; other tests keep what it leaves free."""
    if shutil.which("vllm") is None:
        pytest.skip(
            "vLLM is not installed here (pip install vllm, best in an environment of its own that is on the PATH)"
        )
    folder = models.find("smollm2-135m")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            "vllm",
            "serve",
            folder,
            "--port",
            str(port),
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "1024",
            "--enable-lora",
            "--max-lora-rank",
            "16",
            "--enable-prefix-caching",
            "--gpu-memory-utilization",
            "0.3",
        ],
        env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        start_new_session=True,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            assert server.poll() is None, "the vLLM server has ended"
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_vllm_writes_as_the_loaded_model_with_and_without_an_adapter(
    vllm_url, questions, task, tmp_path
):
    """Greedy answers agree for most questions (bf16 breaks ties otherwise), log-probabilities to a few hundredths a token."""
    model, tokenizer = models.load("smollm2-135m", quantize=False, dtype="bfloat16")
    server, settings = (
        vllm_server.Server(vllm_url),
        dict(n=1, temperature=0.0, max_new_tokens=40, progress=False),
    )
    generator = torch.Generator().manual_seed(0)
    for adapter in (None, tmp_path / "adapter"):
        if adapter:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator).to(
                        parameter
                    )
            model.save_pretrained(adapter, save_embedding_layers=False)
        server.use(adapter)
        theirs = sampling.sample(model, tokenizer, questions, task, server=server, **settings)
        ours = sampling.sample(model, tokenizer, questions, task, **settings)
        same = [a == b for a, b in zip(ours["completion_ids"], theirs["completion_ids"])]
        assert sum(same) > 0.5 * len(same)
        scores = models.score(
            model, tokenizer, theirs["prompt_ids"][:], theirs["completion_ids"][:]
        )
        for ours_logp, theirs_logp, length in zip(scores, theirs["logprob"], theirs["n_tokens"]):
            assert abs(ours_logp - theirs_logp) / length < 0.1
        if adapter is None:
            before = theirs["completion"][:]
    assert theirs["completion"][:] != before


@pytest.mark.parametrize(
    "notebook", sorted(path.name for path in (ROOT / "notebooks" / "solutions").glob("*.ipynb"))
)
def test_the_notebooks_run_unchanged_on_the_card(notebook):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-q", f"notebooks/solutions/{notebook}"],
        cwd=ROOT,
        env={**os.environ, "IRPO_PROFILE": "smoke"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
