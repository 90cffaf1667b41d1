"""A small run against stored numbers, so that a change of the code that changes results is seen.

    python tests/core/test_golden.py

writes `golden.json` anew. Do this only for a change that is meant to change results, and say so in
the commit message.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from irpo_utils import iteration, profiles

STORED = Path(__file__).with_name("golden.json")
SETTINGS = {
    "n_questions": 12,
    "n_samples": 4,
    "k_pairs": 2,
    "iterations": 2,
    "n_eval_questions": 8,
    "eval_samples": 2,
    "eval_samples_ends": 2,
    "max_new_tokens": 60,
    "batch_size": 4,
    "warmup_ratio": 0.0,
    "learning_rate": 3e-4,
}
ENGINES = ("plain", "cpu")


def compute(engine: str, out: Path) -> dict:
    """Metrics of a run, and its adapters: the norm of each tensor and its product with a vector."""
    rows = iteration.run(profiles.get("smoke", engine=engine, **SETTINGS), out, progress=False)
    metrics = {f"{row['iteration']} {row['metric']} {row['k']}": row["value"] for row in rows}
    adapters = {}
    for t in (1, 2):
        weights = load_file(out / f"iteration_{t}" / "adapter" / "adapter_model.safetensors")
        for name in sorted(weights):
            short = name.removeprefix("base_model.model.model.layers.").removesuffix(".weight")
            adapters[f"{t} {short}"] = [weights[name].norm().item(), projection(weights[name])]
    return {"metrics": metrics, "adapters": adapters}


def projection(weight: torch.Tensor) -> float:
    """The product with a fixed random vector of length 1, in which every element counts."""
    vector = torch.randn(weight.numel(), generator=torch.Generator().manual_seed(0))
    return torch.dot(weight.flatten(), vector / vector.norm()).item()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_small_run_gives_the_stored_numbers(engine, tmp_path):
    stored, found = json.loads(STORED.read_text())[engine], compute(engine, tmp_path / "run")
    metrics = {name: found["metrics"][name] for name in stored["metrics"]}
    assert metrics == pytest.approx(stored["metrics"], rel=1e-9)
    assert set(found["adapters"]) == set(stored["adapters"])
    for name, (norm, product) in stored["adapters"].items():
        assert found["adapters"][name] == pytest.approx([norm, product], rel=1e-3, abs=1e-3 * norm)


def test_the_stored_run_learnt_something_and_both_engines_the_same():
    stored = json.loads(STORED.read_text())
    plain, fast = (stored[engine] for engine in ENGINES)
    assert plain["metrics"] == pytest.approx(fast["metrics"], rel=1e-9)
    assert plain["metrics"]["0 pairs_pairs 0"] >= 8
    for name, (norm, product) in plain["adapters"].items():
        assert norm > 0
        assert fast["adapters"][name] == pytest.approx([norm, product], abs=1e-3 * norm)


def write() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        values = {engine: compute(engine, Path(folder) / engine) for engine in ENGINES}
    rounded = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.8g}"))
    STORED.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write())
