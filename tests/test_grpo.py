"""GRPO on TRL's trainer: the same log for any micro-batch, and a model that is left as it was."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from irpo_utils import UserError, iteration, models, profiles, tasks
from studies import grpo

ROOT = Path(__file__).parent.parent
TASK = tasks.get("word_problems")
SMALL = {"method": "grpo", "n_samples": 4, "batch_size": 4, "max_new_tokens": 40}


def trained(n_questions: int, **changes):
    """(model, log) of one pass over a few questions."""
    model, tokenizer = models.load("seed")
    profile = profiles.get("smoke", **{"quantize": False, **SMALL, **changes})
    questions = TASK.load("train").select(range(n_questions))
    return model, grpo.train(model, tokenizer, questions, TASK, profile, 0).to_pandas()


def test_grpo_leaves_the_model_as_it_was_and_learns_the_same_in_smaller_micro_batches():
    logs = {}
    for micro in (None, 1):  # the 16 completions of a step at once, or two by two
        model, logs[micro] = trained(12, micro_batch_size=micro)
        assert set(model.peft_config) == {"default"} and not model.training
        assert "forward" not in model.get_base_model().__dict__
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert list(logs[1]) == grpo.COLUMNS and logs[1].step.to_list() == [1, 2, 3]
    assert logs[1].reward.max() > 0 and logs[1].loss.abs().max() > 1e-3
    for name in ("loss", "reward", "grad_norm", "tokens"):
        expected = pytest.approx(logs[None][name].to_list(), rel=1e-3, abs=1e-5)
        assert logs[1][name].to_list() == expected


def test_grpo_samples_with_the_engine_of_the_profile(monkeypatch):
    from irpo_utils.engines import cpu

    used, decode = [], cpu.Engine.decode
    monkeypatch.setattr(
        cpu.Engine, "decode", lambda self, *rest: used.append(self) or decode(self, *rest)
    )
    _, log = trained(4, max_new_tokens=10, n_samples=2)
    assert len(log) == len(used) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_an_fp16_base_are_scaled(dtype, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(grpo, "GRPOConfig", lambda **options: asked.update(options))
    model = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
    grpo._config(model, profiles.get("smoke", **SMALL), 0, 8, str(tmp_path))
    assert asked["fp16"] == (dtype == torch.float16) and not asked["bf16"]


def test_what_grpo_cannot_do_is_refused(monkeypatch):
    profile = profiles.get("smoke", method="grpo", n_samples=1)
    with pytest.raises(UserError, match="--n-samples must be at least 2"):
        grpo.train(None, None, [], None, profile, 0)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    profile = profiles.get("smoke", method="grpo")
    with pytest.raises(UserError, match="in one process.*without a launcher"):
        grpo.train(None, None, [], None, profile, 0)


def test_a_run_of_grpo_can_be_evaluated_again():
    """In a fresh process, where no other module has added the method."""
    code = "from irpo_utils import methods; import studies.evaluate_again; methods.get('grpo')"
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)


@pytest.mark.slow
def test_grpo_goes_through_the_same_loop_and_learns_from_the_rewards(tmp_path):
    changes = {"n_questions": 32, "n_samples": 8, "iterations": 1, "n_eval_questions": 10}
    changes |= {"eval_samples": 2, "eval_samples_ends": 2, "learning_rate": 1e-3}
    profile = profiles.get("smoke", method="grpo", warmup_ratio=0.0, **changes)
    rows = iteration.run(profile, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "iteration_0" / "samples").exists()
    assert (tmp_path / "run" / "iteration_1" / "adapter" / "adapter_model.safetensors").exists()
    assert {row["method"] for row in rows} == {"grpo"}
    weights = load_file(tmp_path / "run" / "iteration_1" / "adapter" / "adapter_model.safetensors")
    assert max(value.abs().max() for name, value in weights.items() if "lora_B" in name) > 1e-4
