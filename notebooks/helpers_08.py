"""What notebook 08 needs and does not teach: processes to start, plans to compare, and figures.

torchrun also runs this file as a program: see `main`. Each figure is a `plots.TextFigure`, whose
alt text has its numbers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from datasets import Dataset, load_from_disk
from helpers_common import finished_stages as finished  # noqa: F401
from safetensors.torch import load_file, save_file

from cluster import fsdp, shared
from irpo_utils import models, plots, profiles, tasks, training
from irpo_utils.engines.plain import Engine
from irpo_utils.ops import plan as planning
from irpo_utils.plots import BLUE, GREEN, GREY, INK, ORANGE
from irpo_utils.scale import processes

ROOT = Path(__file__).resolve().parents[1]
RANK = 16  # of the LoRA matrices
# How a process says that it ended because of another one: which of the two depends on whether it
# or the launcher notices first.
REPORTS = ("Another process of this run has ended", "Stopped. What was finished is kept")
TINY_RUN = {
    "iterations": 1,
    "n_questions": 24,
    "k_pairs": 4,
    "n_eval_questions": 20,
    "eval_samples": 2,
    "eval_samples_ends": 2,
    "learning_rate": 1e-3,
}


# ------------------------------------------------------------------------------ processes


def environment() -> dict[str, str]:
    """The environment of the processes: one thread each, and no GPU.

    GPUs are hidden however many there are. Two processes need two of them, the bytes of gloo can
    be counted, and every machine gives the same losses.
    """
    folders = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folders).rstrip(os.pathsep)
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed}


def torchrun(count: int, *words) -> list[str]:
    """The command that starts `count` processes; they end together if one of them fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(count), *map(str, words)]


def run_tiny(out: Path) -> list[str]:
    """The words of `python scripts/run.py` for a run of one iteration and a few questions."""
    words = [str(ROOT / "scripts" / "run.py"), "--profile", "smoke", "--quiet", "--out", str(out)]
    for name, value in TINY_RUN.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def resume(out: Path) -> None:
    """The same run in one process. Raises `RuntimeError` with what it printed if it fails."""
    _run([sys.executable, *run_tiny(out)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def run_and_kill(out: Path, rank: int, after: str) -> tuple[int, list[str]]:
    """Start the tiny run with two processes and kill one when the artefact `after` is there.

    Returns the exit status of the launcher, and what the processes said about it.
    """
    messages = out.with_suffix(".txt")
    with messages.open("w") as said:
        group = subprocess.Popen(
            torchrun(2, *run_tiny(out)), env=environment(), stdout=subprocess.DEVNULL, stderr=said
        )
        while group.poll() is None and not (out / after).exists():
            time.sleep(0.02)
        if group.poll() is not None:
            raise RuntimeError(messages.read_text()[-2000:])
        children = {c.environ().get("RANK"): c for c in psutil.Process(group.pid).children()}
        os.kill(children[str(rank)].pid, signal.SIGKILL)
        group.wait(120)
    lines = messages.read_text().splitlines()
    found = [line for line in lines if any(report in line for report in REPORTS)]
    return group.returncode, [line.partition(" (")[0] for line in found]


# ------------------------------------------------------------------------------ two processes train


def sent() -> int:
    """Bytes that went through the loopback interface so far; 0 if it has an unusual name."""
    interfaces = psutil.net_io_counters(pernic=True)
    return next((interfaces[name].bytes_sent for name in ("lo", "lo0") if name in interfaces), 0)


def train(pairs, steps, engine):
    """(log, adapter, bytes sent by all processes) of some steps from the seed model."""
    model, tokenizer = engine.load(profiles.get("cpu", dequantize=False), device="cpu")
    processes.wait()  # until all processes are here
    before = sent()
    log = training.train(
        model,
        tokenizer,
        pairs,
        learning_rate=1e-3,
        max_steps=steps,
        batch_size=8,
        micro_batch_size=2,
        trainer=engine.trainer(model),
        disable_tqdm=True,
    )
    processes.wait()
    bytes_sent = sent() - before
    return list(log), fsdp.whole_adapter(model), bytes_sent


def main(folder: str, many: str, few: str) -> None:
    """What each process does: train as whole copies and as split layers, or alone if it is alone.

    The bytes of a step are a difference of two trainings, without what is sent once at the start.
    """
    pairs = load_from_disk(f"{folder}/pairs")
    ways = {"copies": shared.SharedEngine(Engine()), "split": fsdp.ShardedEngine(Engine())}
    found = {"shares": processes.gather([processes.share(list(range(7)))])}
    for way, engine in ways.items() if processes.count() > 1 else [("one", Engine())]:
        log, adapter, bytes_sent = train(pairs, int(many), engine)
        if way != "one":
            bytes_sent -= train(pairs, int(few), engine)[2]
        per_step = bytes_sent / (int(many) - int(few))
        found[way] = {"losses": [row["loss"] for row in log], "bytes": per_step}
        if processes.is_first():
            tensors = {name: weight.detach().contiguous() for name, weight in adapter.items()}
            save_file(tensors, f"{folder}/{way}.safetensors")
    if processes.is_first():
        Path(folder, f"{processes.count()}.json").write_text(json.dumps(found))


def trained(folder: Path, many: int, few: int) -> dict:
    """Start `main` with one process and with two; what they found, by way."""
    found = {}
    for count in (1, 2):
        words = [__file__, str(folder), str(many), str(few)]
        _run(torchrun(count, *words) if count > 1 else [sys.executable, *words])
        found |= json.loads((folder / f"{count}.json").read_text())
    return found


def save_pairs(folder: Path, n: int = 29) -> str:
    """Write n pairs of the shipped run, else n pairs with gold solutions; return which."""
    shipped = ROOT / "notebooks/shipped_run/iteration_0/pairs"
    if shipped.exists():
        load_from_disk(str(shipped)).select(range(n)).save_to_disk(str(folder / "pairs"))
        return "of the shipped run"
    task, (_, tokenizer) = tasks.get("word_problems"), models.load("seed", device="cpu")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = []
    for row in task.load("train").select(range(n)):
        prompt = models.render_prompt(tokenizer, task.prompt(row))
        completions = {"chosen_ids": row["solution"], "rejected_ids": "Final answer: 1"}
        completions = {k: ids(text) + [tokenizer.eos_token_id] for k, text in completions.items()}
        rows.append({"prompt_ids": ids(prompt), **completions})
    Dataset.from_list(rows).save_to_disk(str(folder / "pairs"))
    return "with gold solutions"


def largest_differences(folder: Path, found: dict) -> pd.DataFrame:
    """The largest difference from one process: of a loss, and of a weight of the adapter."""
    alone, rows = load_file(folder / "one.safetensors"), {}
    for way in ("copies", "split"):
        weights = load_file(folder / f"{way}.safetensors")
        assert weights.keys() == alone.keys()
        losses = np.subtract(found[way]["losses"], found["one"]["losses"])
        rows[way] = {
            "loss": np.abs(losses).max(),
            "weight": max((weights[k] - v).abs().max().item() for k, v in alone.items()),
        }
    return pd.DataFrame(rows).T


def seed_bytes() -> tuple[float, float, float]:
    """(layers, outside, gradients): bytes of the seed model in NF4 and fp32, with its adapter."""
    shape = planning.find_shape("seed")
    gradients = 4 * shape.lora(RANK)
    outside = 4 * (shape.parameters - shape.linear)
    return planning.NF4_BYTES * shape.linear + gradients, outside, gradients


# ------------------------------------------------------------------------------ sizes and plans


def sizes(names) -> pd.DataFrame:
    """GB of all weights, of the LoRA gradient, and of the base in NF4, by model."""
    rows = {}
    for name in names:
        shape = planning.SHAPES[name]
        base = planning.NF4_BYTES * shape.linear + 2 * (shape.parameters - shape.linear)
        rows[name] = {
            "all weights, 16 bits": 2e-9 * shape.parameters,
            "gradient of LoRA, 32 bits": 4e-9 * shape.lora(RANK),
            "base in NF4, embeddings in 16 bits": 1e-9 * base,
        }
    return pd.DataFrame(rows).T


def plans(names, counts, gpu: str = "A100-80GB", **changes) -> dict:
    """(profile, number of GPUs) -> the plan, whether it fits or not."""
    return {
        (name, n): planning.plan(profiles.get(name, **changes), f"{n}x{gpu}")
        for name in names
        for n in counts
    }


def two_ways(name: str, counts) -> pd.DataFrame:
    """Training with whole copies and with split layers: GB on a GPU and hours, from two plans.

    A process needs a pair, so at most as many GPUs train as a batch has pairs. Both plans have the
    settings that need the least memory.
    """
    rows = []
    least = {"quantize": True, "gradient_checkpointing": True, "micro_batch_size": 1}
    for n in counts:
        for way, shard in (("copies", False), ("split", True)):
            made = plans([name], [n], shard=shard, **least)[name, n]
            [stage] = [stage for stage in made.stages if stage.name == "training"]
            busy = min(n, made.profile.batch_size)
            gigabytes = {"memory (GB)": stage.memory / 1e9, "room (GB)": made.room / 1e9}
            hours = {"hours of training": stage.hours}
            rows.append({"GPUs": n, "with work": busy, "way": way, **gigabytes, **hours})
    return pd.DataFrame(rows).set_index(["GPUs", "with work", "way"])


def traffic(name: str, n: int) -> dict[str, float]:
    """Split layers on n GPUs: tokens of a micro-batch, and from how many on the traffic is hidden.

    `link` is in bytes per second: that of a machine with 8 GPUs, or the slower one between machines.
    """
    made = plans([name], [n])[name, n]
    shape, machine, p = made.shape, made.machine, made.profile
    size = planning.task_size(p)
    busy = min(n, p.batch_size)  # a process needs a pair
    outside = 2 * (shape.parameters - shape.linear)
    layers = planning.NF4_BYTES * shape.linear + 4 * shape.lora(p.lora_r)
    seconds = (busy - 1) / busy * (2 * layers + outside) / machine.link
    per_token = 3 * 2 * (shape.linear + shape.head) / machine.flops[machine.dtype]
    pairs = min(p.micro_batch_size or p.batch_size, p.batch_size // busy)
    tokens = 2 * (size.prompt + min(size.completion, p.max_new_tokens))  # of the two completions
    return {"link": machine.link, "hidden_from": seconds / per_token, "micro_batch": pairs * tokens}


# ------------------------------------------------------------------------------ figures


def ring_traffic(measured: dict[int, float]) -> plots.TextFigure:
    """Bytes per GPU, in sizes of the gradient: the ring as measured, and everything through one."""
    figure, axes = plots.new_figure(6.5, 3.4)
    counts = list(measured)
    through_one = [n - 1 for n in counts]
    axes.plot(counts, through_one, "o-", color=ORANGE, label="through one GPU (that GPU)")
    axes.plot(counts, list(measured.values()), "o-", color=BLUE, label="ring (every GPU)")
    axes.set(
        xlabel="GPUs (log scale)",
        ylabel="bytes sent / bytes of the gradient",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.set_yticks([1, 2, 10, 60], [1, 2, 10, 60])
    axes.legend(frameon=False)
    numbers = ", ".join(f"{y:.2f} with {n} GPUs" for n, y in measured.items())
    figure.alt_text = (
        f"Bytes that a GPU sends, in sizes of the gradient. Ring: {numbers}. Through one GPU: "
        f"{through_one[0]} with {counts[0]} GPUs, {through_one[-1]} with {counts[-1]}."
    )
    return figure


def counted_bytes(derived: dict[str, float], found: dict) -> plots.TextFigure:
    """MB per optimiser step of both processes: by the formula, and counted."""
    figure, axes = plots.new_figure(6.5, 3)
    values = {
        "formula": [derived[way] / 1e6 for way in derived],
        "counted": [found[way]["bytes"] / 1e6 for way in derived],
    }
    for i, (name, colour) in enumerate((("formula", GREY), ("counted", BLUE))):
        places = np.arange(len(derived)) + 0.38 * (i - 0.5)
        bars = axes.barh(places, values[name], 0.36, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(derived)), ["whole copies", "split layers"])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("MB per step, both processes")
    axes.legend(frameon=False)
    figure.alt_text = "MB per optimiser step: " + "; ".join(
        f"{way} {a:.2f} by the formula, {b:.2f} counted"
        for way, a, b in zip(derived, *values.values(), strict=True)
    )
    return figure


def shares_of_time(made: dict) -> plots.TextFigure:
    """A bar per plan, stacked by stage: shares of the estimated time, with the hours on top."""
    names, counts = list(dict.fromkeys(k[0] for k in made)), list(dict.fromkeys(k[1] for k in made))
    figure, panels = plots.new_figure(9.6, 3.6, panels=len(names))
    sentences = []
    for axes, name in zip(panels, names, strict=True):
        bottom = np.zeros(len(counts))
        hours = [[stage.hours for stage in made[name, n].stages] for n in counts]
        for i, colour in enumerate((BLUE, ORANGE, GREEN)):
            heights = np.array([100 * row[i] / sum(row) for row in hours])
            label = made[name, counts[0]].stages[i].name
            axes.bar(range(len(counts)), heights, bottom=bottom, color=colour, label=label)
            bottom += heights
            sentences.append(f"{name}, {label}: {', '.join(f'{h:.0f} %' for h in heights)}")
        for at, row in enumerate(hours):
            axes.text(
                at,
                102,
                f"{sum(row):,.0f} h" if sum(row) > 100 else f"{sum(row):.2g} h",
                ha="center",
                fontsize=9,
            )
        axes.set(title=f"{name}\n", ylim=(0, 100), xlabel="GPUs (A100-80GB)")
        axes.set_xticks(range(len(counts)), counts)
        axes.grid(False)
    panels[0].set_ylabel("share of the time (%)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.alt_text = (
        f"Shares of the estimated time on {', '.join(map(str, counts))} GPUs. "
        f"{'; '.join(sentences)}."
    )
    return figure


def memory_of_two_ways(names, n: int) -> plots.TextFigure:
    """GB on each of n GPUs in training, whole copies and split layers, and the room of a GPU."""
    figure, axes = plots.new_figure(6.5, 3.2)
    tables = {name: two_ways(name, [n]) for name in names}
    room = next(iter(tables.values()))["room (GB)"].iloc[0]
    sentences = []
    for i, (way, colour) in enumerate((("copies", BLUE), ("split", ORANGE))):
        values = [table.xs(way, level="way")["memory (GB)"].iloc[0] for table in tables.values()]
        places = np.arange(len(names)) + 0.38 * (i - 0.5)
        bars = axes.bar(places, values, 0.36, color=colour, label=way)
        axes.bar_label(bars, fmt="%.0f", padding=2)
        numbers = (f"{v:.0f} GB for {name}" for v, name in zip(values, names, strict=True))
        sentences.append(f"{way}: {', '.join(numbers)}")
    axes.axhline(room, color=INK, linestyle="--", linewidth=1)
    axes.text(-0.4, room, f"room: {room:.0f} GB", va="bottom")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=f"GB on each of {n} GPUs", ylim=(0, 1.15 * room))
    axes.legend(frameon=False, loc="center left")
    figure.alt_text = (
        f"Estimated memory in training on each of {n} GPUs. {'; '.join(sentences)}. "
        f"A GPU has room for {room:.0f} GB."
    )
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
