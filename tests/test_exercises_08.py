"""The checks of notebook 08 accept the solution and name a typical mistake; its processes use the CPU."""

import math
import subprocess
import sys
from pathlib import Path

import exercises
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("jupytext")

import checks_08 as checks  # noqa: E402
import helpers_08  # noqa: E402

EXERCISES = ("share", "combine", "sent_when_split", "hidden_from")


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined("08_past_one_gpu", name, solved)


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_stubs_are_unsolved(name):
    check = getattr(checks, name)
    assert check(solution(name)).startswith("Right")
    assert check(solution(name, solved=False)).startswith("Not solved yet")
    for nothing in (None, ..., lambda *arguments: ...):
        assert check(nothing).startswith("Not solved yet")
    assert "is a `return` missing?" in check(lambda *arguments: None)


@pytest.mark.parametrize("name", EXERCISES)
def test_checks_never_raise(name):
    def broken(*arguments):
        raise KeyError("question")

    check = getattr(checks, name)
    assert "KeyError: 'question'" in check(broken)
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: {"x": None},
        lambda *a: float("nan"),
        lambda *a: (1, 2, 3),
        lambda *a: [None],
        lambda *a: -1,
        lambda *a: [{}],
        lambda *a: True,
        lambda *a: [1.0, 2.0],
    ):
        said = check(odd)
        assert said and not said.startswith("Right") and "could not be compared" not in said


def right_share(items, rank, count):
    return solution("share")(items, rank, count)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda items, rank, count: items[rank::count], "every count-th"),
        (
            lambda items, rank, count: items[rank * (len(items) // count) :][: len(items) // count],
            "are lost",
        ),
        (
            lambda items, rank, count: items[
                rank * (len(items) // count) : None
                if rank == count - 1
                else (rank + 1) * (len(items) // count)
            ],
            "The last process takes all",
        ),
        (
            lambda items, rank, count: items[rank * math.ceil(len(items) / count) :][
                : math.ceil(len(items) / count)
            ],
            "rounded the length",
        ),
        (
            lambda items, rank, count: items[
                rank * len(items) // count : (rank + 1) * len(items) // count
            ],
            "the last processes have the longer",
        ),
        (
            lambda items, rank, count: items[rank * (len(items) // count) :][
                : len(items) // count + (rank < len(items) % count)
            ],
            "done twice",
        ),
        (lambda items, rank, count: items, "takes all items"),
        (
            lambda items, rank, count: [right_share(items, r, count) for r in range(count)],
            "part of `rank` alone",
        ),
        (lambda items, rank, count: right_share(items, rank - 1, count) if rank else [], "from 1"),
        (lambda items, rank, count: len(right_share(items, rank, count)), "Return a list"),
        (lambda items, rank, count: right_share(items, rank, count)[:1], "no process takes"),
        (lambda items, rank, count: right_share(items, rank, count) * 2, "taken twice"),
        (lambda items, rank, count: right_share(items, rank, count)[::-1], "should be"),
    ],
)
def test_share_names_the_mistake(wrong, words):
    said = checks.share(wrong)
    assert words in said, said


def test_another_type_of_sequence_is_accepted():
    assert checks.share(
        lambda items, rank, count: tuple(right_share(items, rank, count))
    ).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda g, n: sum(g) / len(g), "averaged over processes"),
        (
            lambda g, n: sum(x for x, c in zip(g, n) if c) / sum(c > 0 for c in n),
            "over the processes with items",
        ),
        (lambda g, n: sum(x.nan_to_num() for x in g) / len(g), "averaged over all processes"),
        (lambda g, n: sum(x * c for x, c in zip(g, n)) / sum(n), "nan times 0"),
        (lambda g, n: sum(g), "added the means"),
        (lambda g, n: sum(x for x, c in zip(g, n) if c), "added the means"),
        (lambda g, n: sum(x * c for x, c in zip(g, n) if c), "Divide it by their number"),
        (lambda g, n: sum(x * c for x, c in zip(g, n)), "nan times 0"),
        (lambda g, n: sum(x * c for x, c in zip(g, n) if c) / len(n), "number of processes"),
        (lambda g, n: sum(x for x, c in zip(g, n) if c) / sum(n), "did not multiply"),
        (lambda g, n: g[0][0], "the shape ()"),
        (lambda g, n: "gradient", "Return one tensor"),
        (lambda g, n: g[0], "it should be"),
    ],
)
def test_combine_names_the_mistake(wrong, words):
    said = checks.combine(wrong)
    assert words in said, said


def test_other_ways_to_combine_are_accepted():
    def stacked(gradients, counts):
        import torch

        kept = [(gradient, count) for gradient, count in zip(gradients, counts) if count]
        return torch.stack([gradient * count for gradient, count in kept]).sum(0) / sum(
            count for _, count in kept
        )

    assert checks.combine(stacked).startswith("Right")
    assert checks.combine(lambda g, n: stacked(g, n).tolist()).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda w, o, g, p, m: m * (w + o + g) * (p - 1) / p, "again for the backward pass"),
        (lambda w, o, g, p, m: m * (2 * w + 2 * o + g) * (p - 1) / p, "kept from the forward"),
        (lambda w, o, g, p, m: m * (2 * w + o + 2 * g) * (p - 1) / p, "as in an all-reduce"),
        (lambda w, o, g, p, m: m * (2 * w + o) * (p - 1) / p, "gradients are missing"),
        (lambda w, o, g, p, m: m * (2 * w + g) * (p - 1) / p, "`outside` is missing"),
        (lambda w, o, g, p, m: (2 * w + o + g) * (p - 1) / p, "one micro-batch"),
        (lambda w, o, g, p, m: (m * (2 * w + o) + g) * (p - 1) / p, "gradients once per step"),
        (lambda w, o, g, p, m: (2 * w + o + m * g) * (p - 1) / p, "weights once per step"),
        (lambda w, o, g, p, m: m * (2 * w + o + g), "does not send everything"),
        (lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1), "all GPUs together"),
        (lambda w, o, g, p, m: m * (2 * w + o + g) / p, "already has"),
        (lambda w, o, g, p, m: 2 * g * (p - 1) / p, "all-reduce of whole copies"),
        (lambda w, o, g, p, m: 2 * m * (w + o + g) * (p - 1) / p, "counted everything twice"),
        (lambda w, o, g, p, m: m * (2 * w + o + g) * (p - 1) / p / 1e9, "Return bytes"),
        (lambda w, o, g, p, m: 7, "it should be"),
        (lambda w, o, g, p, m: [w, o, g], "one number"),
    ],
)
def test_bytes_of_split_layers_name_the_mistake(wrong, words):
    said = checks.sent_when_split(wrong)
    assert words in said, said


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda g, link, w, f: g / link * f / (2 * w), "one pass"),
        (lambda g, link, w, f: g / link * f / (4 * w), "two passes"),
        (lambda g, link, w, f: g / link * f / (3 * w), "one operation per weight. A"),
        (lambda g, link, w, f: g / link * f / w, "one operation per weight and one pass"),
        (lambda g, link, w, f: 6 * w / f / (g / link), "inverse"),
        (lambda g, link, w, f: g / link, "seconds of sending"),
        (lambda g, link, w, f: 6 * w / f, "seconds of computing one token"),
        (lambda g, link, w, f: g * link * f / (6 * w), "faster link"),
        (lambda g, link, w, f: link / g * f / (6 * w), "not link / gathered"),
        (lambda g, link, w, f: 7, "it should be"),
        (lambda g, link, w, f: (g, link), "one number"),
    ],
)
def test_break_even_names_the_mistake(wrong, words):
    said = checks.hidden_from(wrong)
    assert words in said, said


# Processes


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_processes_use_the_cpu_whatever_gpus_there_are(gpus, monkeypatch):
    """Also with fewer GPUs than processes, and where a launcher or a hosted notebook left traces."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    environment = helpers_08.environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and environment["OMP_NUM_THREADS"] == "1"
    if gpus == 1:
        code = "import torch; from irpo_utils import models; print(torch.cuda.device_count(), models.default_device())"
        environment |= {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == ["0", "cpu"], done.stderr


def test_the_notebook_starts_processes_and_loads_models_on_the_cpu():
    source = (ROOT / "notebooks/source/08_past_one_gpu.py").read_text()
    assert "subprocess" not in source and "Popen" not in source  # only through the helpers
    assert source.count("models.load(") == source.count('models.load("seed", device="cpu")') == 1


def test_a_process_that_fails_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="No module named no_such_module"):
        helpers_08._run([sys.executable, "-m", "no_such_module"])


def test_traffic_of_split_layers_is_that_of_exercises_3_and_4():
    """The numbers of section 7, from the solutions of the students' formulas."""
    from irpo_utils import profiles
    from irpo_utils.ops import plan as planning

    p, shape = profiles.get("paper"), planning.SHAPES["llama-2-70b-chat"]
    for n, busy in ((8, 8), (64, 16)):
        machine = planning.find_machine(f"{n}xA100-80GB")
        layers = planning.NF4_BYTES * shape.linear + 4 * shape.lora(p.lora_r)
        outside = 2 * (shape.parameters - shape.linear)
        gathered = solution("sent_when_split")(layers, outside, 0, busy, 1)
        weights = shape.linear + shape.head
        found = helpers_08.traffic("paper", n)
        expected = solution("hidden_from")(
            gathered, machine.link, weights, machine.flops["bfloat16"]
        )
        assert found["hidden_from"] == pytest.approx(expected)
        assert found["link"] == machine.link
