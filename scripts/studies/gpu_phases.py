"""What `gpu_report` measures: one function per phase, `python -m studies.gpu_phases PHASE SETTINGS`.

Speeds are tokens per second. Memory is in MB: `peak_mb` of tensors, `reserved_mb` of PyTorch's
allocator; without a GPU both are the peak of the process. The benchmarks use the stages and the
plain variant of `bench`, all with the same adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from irpo_utils import UserError
from studies.gpu_report import ROOT, Records, Settings, last_line, reason_of, run_limited

NOTEBOOK_SECONDS = 120.0
N_SAMPLES = 8


@dataclasses.dataclass
class Sizes:
    """How much is measured: rows are completions that are decoded at once."""

    rows: tuple[int, ...] = (512, 2048, 128)
    new_tokens: int = 64
    micro_batches: tuple[int, ...] = (64, 8, 32)
    pairs: int = 192
    batch: int = 64  # pairs per optimiser step
    prompt: int = 110  # tokens of the pairs' prompts and responses
    response: int = 130
    questions: int = 64  # of the run, in each iteration
    run_tokens: int = 96


TINY = Sizes((16,), 4, (4,), 8, 4, 12, 8, 4, 12)


def sizes(s: Settings) -> Sizes:
    return TINY if s.tiny else Sizes()


def environment(s: Settings, records: Records) -> None:
    """Hardware, driver, versions and commit."""
    import torch

    from irpo_utils.ops import environment as environments

    found = environments.environment()
    found |= {"cuda": torch.version.cuda, "driver": None}
    if found["gpus"]:
        properties = torch.cuda.get_device_properties(0)
        found["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        found["driver"] = done.stdout.splitlines()[0]
    records.measure([("environment", lambda: found, {})])


# ---------------------------------------------------------------- tests and notebooks


def tests(s: Settings, records: Records) -> None:
    """The tests marked `gpu`, except those that execute notebooks: these are a phase."""
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a plugin may lack packages that it needs
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in f.read_text()]
    words = ["-m", "gpu", "-k", "not notebooks", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    words += [f"--deselect={name}" for name in records.finished()]
    code = pytest.main([*words, *map(str, files)], plugins=[TestResults(records)])
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        raise RuntimeError(f"pytest ended with {code!r}")


class TestResults:
    """A plugin of pytest that records every test."""

    def __init__(self, records: Records):
        self.records = records

    def pytest_collectreport(self, report):
        if report.failed:
            self.records.write(report.nodeid, "not run", reason=_last_error(report))

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.records.write(item.nodeid, "waiting")

    def pytest_runtest_logstart(self, nodeid, location):
        self.records.write(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.records.write(report.nodeid, "failed", reason=_last_error(report))
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.records.write(report.nodeid, "not run", reason=reason)
        elif report.when == "call":
            values = {"seconds": round(report.duration, 2)}
            self.records.write(report.nodeid, "done", values=values)


def _last_error(report) -> str:
    """The last line that pytest marks as an error, or the last line."""
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return reason_of(Exception((errors or lines or [""])[-1]))


def notebooks(s: Settings, records: Records) -> None:
    """Every solved notebook with the profile `smoke`, one after another."""
    files = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
    if s.tiny:
        files = [file for file in files if file.stem == "03_pairs"]
    packages = ("nbval", "ipykernel")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    how = {"executed": "by nbval"}
    if missing:
        how = {"executed": f"as a script, without {' and '.join(missing)}"}
    records.measure(
        (file.stem, functools.partial(execute, file, Path(s.work), not missing), how)
        for file in files
    )


def execute(
    notebook: Path, work: Path, with_nbval: bool = True, seconds: float = NOTEBOOK_SECONDS
) -> dict[str, float]:
    """Execute a notebook in a process; a `RuntimeError` says how it failed. Its log is in `work`."""
    script = f"../source/{notebook.stem}.py"  # the code cells are those of the solved notebook
    words = [script]
    if with_nbval:
        words = ["-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", notebook.name]
    log, started = work / f"notebook_{notebook.stem}.log", time.perf_counter()
    log.unlink(missing_ok=True)
    changes = {"IRPO_PROFILE": "smoke", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}
    options = {"cwd": notebook.parent, "env": {**os.environ, **changes}, "grace": 2.0}
    code = run_limited([sys.executable, *words], seconds, log, **options)
    if code is None:
        raise RuntimeError(f"It took longer than {seconds:.0f} seconds.")
    if code:
        raise RuntimeError(last_line(log, "Error"))
    return {"seconds": round(time.perf_counter() - started, 1)}


# ---------------------------------------------------------------- models


def profile_of(s: Settings, **changes):
    """The settings of a benchmark or run, with the model and the questions of the report."""
    from irpo_utils import profiles

    changes |= {"model": model_folder(s), "task": s.task, "data": s.data, "n_samples": N_SAMPLES}
    if changes.get("quantize") is False:  # then bitsandbytes is not needed
        changes["optimizer"] = "adamw_torch"
    return profiles.get("smoke" if s.tiny else "smollm2-135m", **changes)


def model_folder(s: Settings) -> str:
    """The model that was given, or SmolLM2-135M, or random weights of its shape."""
    if s.model or s.tiny:
        return s.model or "seed"
    import smollm2

    try:
        return str(smollm2.convert())
    except (ImportError, UserError):
        return str(random_model(Path(s.work) / "random_weights"))


def random_model(folder: Path) -> Path:
    """A model with SmolLM2-135M's shape, random weights and the seed model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from irpo_utils import models
    from irpo_utils.ops import plan as planning

    if folder.exists():
        return folder
    tokenizer = models.load_tokenizer(models.find("seed"))
    config = LlamaConfig(
        **planning.DATA["models"]["smollm2-135m"],
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    partial = folder.with_suffix(".partial")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


class Sides:
    """The sides of `bench` by engine and precision; the last one stays loaded."""

    def __init__(self, s: Settings):
        from irpo_utils import tasks
        from studies import api

        api.quiet_libraries()
        self.s, self.key, self.side = s, None, None
        self.task, self.adapter = tasks.get(s.task), Path(s.work) / "adapter"

    def get(self, engine: str, quantize: bool):
        """The `bench` side of an engine, or of plain `generate`, with the report's adapter."""
        if self.key != (engine, quantize):
            self.key, self.side = None, None
            reset_memory()
            self.side = self._load(engine, quantize)
            self.key = (engine, quantize)
        return self.side

    def _load(self, engine: str, quantize: bool):
        from studies import bench

        self._make_adapter()
        if engine == "generate":
            from peft import PeftModel

            side = bench.Plain(profile_of(self.s, quantize=quantize), self.task, 1, trains=False)
            side.model = PeftModel.from_pretrained(side.model, str(self.adapter)).eval()
        else:
            side = bench.Ours(profile_of(self.s, engine=engine, quantize=quantize), self.task)
            side.engine.use(side.model, self.adapter)
        side.profile = dataclasses.replace(side.profile, max_new_tokens=sizes(self.s).new_tokens)
        return side

    def _make_adapter(self) -> None:
        """An adapter that is not zero: engines may leave a zero one out."""
        if self.adapter.exists():
            return
        import torch

        from irpo_utils import models

        model, _ = models.load(profile_of(self.s).model, quantize=False)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, std=1e-3)
        partial = self.adapter.with_suffix(".partial")
        model.save_pretrained(partial, save_embedding_layers=False)
        partial.rename(self.adapter)


def reset_memory() -> None:
    """Free what is not used, and measure peaks from here on."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """Peak memory since `reset_memory`, in MB."""
    import torch

    from studies import bench

    reserved = torch.cuda.max_memory_reserved() / 1e6 if torch.cuda.is_available() else None
    return {"peak_mb": bench.peak_mb(), "reserved_mb": reserved or bench.peak_mb()}


def precision(quantize: bool) -> str:
    """NF4 or the dtype that models have here, for the names of variants."""
    from irpo_utils import models

    dtype = models.default_dtype(models.default_device())
    return "nf4" if quantize else str(dtype).removeprefix("torch.")


def decoders() -> list[str]:
    """The engines with a decoder, `plain` and `cpu` last; vLLM needs a server and is left out."""
    from irpo_utils import engines

    names = [module.name for module in pkgutil.iter_modules(engines.__path__)]
    modules = {name: importlib.import_module(f"irpo_utils.engines.{name}") for name in names}
    found = [name for name, module in modules.items() if "decode" in vars(module.Engine)]
    known = ("plain", "cpu", "vllm")
    return [name for name in found if name not in known] + ["plain", "cpu"]


# ---------------------------------------------------------------- benchmarks


def sampling(s: Settings, records: Records) -> None:
    """Every decoder, plain `generate` and vLLM, in 16 bits and in NF4, by rows at once."""
    sides = Sides(s)
    axes = [*decoders(), "generate"], (False, True), sizes(s).rows  # a model is loaded once
    variants = [
        (sample, rows, engine, quantize) for engine, quantize, rows in itertools.product(*axes)
    ]
    variants.append((sample_from_vllm, max(sizes(s).rows), "vllm", False))
    items = []
    for function, rows, engine, quantize in variants:
        settings = {"engine": engine, "quantize": quantize, "rows": rows}
        name = f"{engine} {precision(quantize)} {rows}"
        items.append((name, functools.partial(function, sides, **settings), settings))
    records.measure(items)


def sample(sides: Sides, engine: str, quantize: bool, rows: int) -> dict[str, float]:
    """One batch of `rows` completions, after one of two tokens, which `cuda_graph` draws whole.

    A run records its graphs once and replays them in all later batches.
    """
    from studies import bench

    side, n = sides.get(engine, quantize), N_SAMPLES
    questions = sides.task.load("train", sides.s.data)
    questions = questions.select([i % len(questions) for i in range(rows // n)])
    questions = questions.remove_columns("id").add_column("id", [f"{i}" for i in range(rows // n)])
    side.batch = rows // n  # of `generate`, in prompts
    profile = side.profile = dataclasses.replace(side.profile, sampling_batch_size=rows)
    if engine != "cuda_graph":
        side.profile = dataclasses.replace(profile, max_new_tokens=2)
    side.sample(questions)
    side.profile = profile
    reset_memory()
    started = time.perf_counter()
    samples = side.sample(questions)
    values = bench.timed(started, sum(samples["n_tokens"])) | peaks()
    if engine == "generate":
        return values
    prompts = [len(ids) for ids in samples["prompt_ids"]]
    values |= {"prompt_tokens": sum(prompts) / rows, "longest_prompt": max(prompts)}
    return values | {"rows": min(rows, side.engine.most)}  # fewer if memory ran out


def sample_from_vllm(sides: Sides, engine: str, quantize: bool, rows: int) -> dict[str, float]:
    """As `sample`; the engine starts a server for it, and stops it."""
    with contextlib.closing(sides.get(engine, quantize).engine):
        values = sample(sides, engine, quantize, rows)
    del values["peak_mb"], values["reserved_mb"]  # the server has most of it
    return values


def training(s: Settings, records: Records) -> None:
    """Both batch layouts, with and without checkpointing and NF4, by micro-batch."""
    sides, size = Sides(s), sizes(s)
    axes = {
        "micro_batch_size": size.micro_batches,
        "gradient_checkpointing": (False, True),
        "quantize": (False, True),
        "engine": ("shared_prompt", "plain"),
    }
    items = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        kind, micro = precision(settings["quantize"]), settings["micro_batch_size"]
        words = [settings["engine"], kind, str(micro)]
        words += ["checkpointing"] if settings["gradient_checkpointing"] else []
        items.append((" ".join(words), functools.partial(train, sides, size, **settings), settings))
    records.measure(items)


def train(sides: Sides, size: Sizes, engine: str, quantize: bool, **settings) -> dict[str, float]:
    """A few optimiser steps on pairs of random tokens.

    The speed leaves out the first step and the reference's log-probabilities, which come before it;
    `tokens_per_second_overall` includes them. Tokens are those of the pairs, each prompt once.
    """
    import torch
    from datasets import Dataset

    side = sides.get(engine, quantize)
    generator, words = torch.Generator().manual_seed(0), len(side.tokenizer)
    lengths = {
        "prompt_ids": size.prompt,
        "chosen_ids": size.response,
        "rejected_ids": size.response,
    }
    pairs = Dataset.from_dict(
        {
            name: torch.randint(words, (size.pairs, n), generator=generator).tolist()
            for name, n in lengths.items()
        }
    )
    side.engine.use(side.model, None)
    side.profile = dataclasses.replace(side.profile, batch_size=size.batch, **settings)
    reset_memory()
    seconds, tokens = side.train(pairs)["seconds"][:], sum(lengths.values())
    speed = tokens * (size.pairs - size.batch) / (seconds[-1] - seconds[0])
    overall = tokens * size.pairs / seconds[-1]
    values = {"tokens_per_second": speed, "tokens_per_second_overall": overall}
    return values | {"seconds": seconds[-1]} | peaks()


# ---------------------------------------------------------------- a run, and the plan


def run(s: Settings, records: Records) -> None:
    """Two iterations with gold solutions, so that every question gives pairs; resumes."""
    from studies import api

    api.quiet_libraries()
    profile, out = run_profile(s), Path(s.work) / "run"
    settings = dataclasses.asdict(profile) | {"model": Path(profile.model).name}
    try:
        records.measure([("run", functools.partial(run_once, profile, out), settings)])
    finally:
        records.measure(run_items(out))


def run_profile(s: Settings):
    size = sizes(s)
    return profile_of(
        s,
        engine=decoders()[0],
        quantize=False,
        iterations=2,
        n_questions=size.questions,
        max_new_tokens=size.run_tokens,
        sampling_batch_size=max(size.rows),
        gold=True,
        k_pairs=4,
        batch_size=16,
        n_eval_questions=size.questions,
        eval_samples=4,
        eval_samples_ends=4,
    )


def run_once(profile, out: Path) -> dict[str, float]:
    from studies import api

    reset_memory()
    started = time.perf_counter()
    api.run(profile, out, progress=False)
    return {"seconds": time.perf_counter() - started} | peaks()


def run_items(out: Path):
    """What a run directory has so far: accuracy of each M_t, seconds and tokens of each stage."""
    for folder in sorted(out.glob("iteration_*")):
        t = folder.name.removeprefix("iteration_")
        if (metrics := folder / "metrics.json").exists():
            rows = json.loads(metrics.read_text())
            values = {row["metric"]: row["value"] for row in rows if row["metric"] in METRICS}
            yield f"M_{t}", functools.partial(dict, values), {}
        for file in sorted(folder.glob("*/checksums.json")):
            record = json.loads(file.read_text())
            values = {name: record[name] for name in ("seconds", "tokens") if record[name]}
            yield f"iteration {t} {file.parent.name}", functools.partial(dict, values), {}


METRICS = ("greedy", "sampled", "mean_tokens", "truncated_rate", "pairs_pairs", "kl_to_previous")


def plan(s: Settings, records: Records) -> None:
    """The plan's speed and memory for everything that was measured, at the measured lengths."""
    items = []
    for phase, compare in (("sampling", plan_sampling), ("training", plan_training)):
        for name, record in Records(Path(s.work) / f"{phase}.jsonl").read().items():
            if record["status"] == "done" and record["settings"]["engine"] != "generate":
                function = functools.partial(compare, s, record["values"], **record["settings"])
                items.append((f"{phase} {name}", function, {}))
    items.append(("run", functools.partial(plan_run, s), {}))
    records.measure(items)


def plan_sampling(s: Settings, measured: dict, engine: str, quantize: bool, rows: int) -> dict:
    """One iteration that samples as `sample` has done."""
    profile = profile_of(s, engine=engine, quantize=quantize, max_new_tokens=sizes(s).new_tokens)
    profile = dataclasses.replace(profile, sampling_batch_size=rows)
    lengths = measured["prompt_tokens"], measured["longest_prompt"], measured["tokens"] / rows
    return _compared(
        profile, lengths, rows // N_SAMPLES, "sampling", measured["tokens_per_second"], measured
    )


def plan_training(s: Settings, measured: dict, engine: str, **settings) -> dict:
    """One iteration that trains as `train` has done."""
    size = sizes(s)
    profile = profile_of(s, engine=engine, batch_size=size.batch, k_pairs=1, **settings)
    profile = dataclasses.replace(profile, max_new_tokens=size.response)
    lengths = size.prompt, size.prompt, size.response
    speed = measured["tokens_per_second_overall"]
    return _compared(profile, lengths, size.pairs, "training", speed, measured)


def _compared(profile, lengths, questions: int, stage: str, speed: float, measured: dict) -> dict:
    from irpo_utils.ops import plan as planning

    profile = dataclasses.replace(profile, iterations=1, n_questions=questions)
    size = planning.TaskSize(*lengths, questions, questions, questions, "measured")
    shape, machine = planning.find_shape(profile.model), planning.find_machine()
    stages = planning.Plan(profile, shape, machine, size).stages
    [planned] = [planned for planned in stages if planned.name == stage]
    return {
        "planned_tokens_per_second": planned.tokens / planned.hours / 3600,
        "measured_tokens_per_second": speed,
        "planned_mb": planned.memory / 1e6,
        "measured_mb": measured.get("reserved_mb"),
    }


def plan_run(s: Settings) -> dict[str, float]:
    """The seconds of the stages of the run, and its peak memory."""
    import pandas

    from irpo_utils.ops import plan as planning

    work = Path(s.work)
    record = Records(work / "run.jsonl").read().get("run", {})
    if record.get("status") != "done":
        raise UserError("The run is not finished, so there is nothing to compare")
    made = planning.plan(run_profile(s))
    times = pandas.read_csv(work / "run" / "timing.csv")
    values = {"planned_mb": made.total.memory / 1e6, "measured_mb": record["values"]["reserved_mb"]}
    folders = {"sampling": "samples", "training": "adapter", "evaluation": "evaluation"}
    for stage in made.stages:
        values[f"planned_{stage.name}_seconds"] = 3600 * stage.hours
        measured = times[times.stage == folders[stage.name]].seconds.sum()
        values[f"measured_{stage.name}_seconds"] = float(measured)
    return values


PHASES = {
    "environment": environment,
    "tests": tests,
    "sampling": sampling,
    "training": training,
    "run": run,
    "plan": plan,
    "notebooks": notebooks,
}


def main(phase: str, settings: str) -> None:
    """Measure a phase; what it lacks is recorded, and other errors end the process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` is executed
    s = Settings(**json.loads(settings))
    records = Records(Path(s.work) / f"{phase}.jsonl")
    try:
        PHASES[phase](s, records)
    except (ImportError, UserError) as error:
        records.write("", "not run", reason=reason_of(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
