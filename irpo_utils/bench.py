"""Side-by-side timing: our stages against what a user would otherwise write with `generate` and TRL, as documented.

The two take turns (A B A B ...), each run in a process of its own so that its peak memory is its own. Loading the model
is not counted. Ratios are taken pair by pair; the table gives their median, minimum and maximum.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from irpo_utils import UserError, profiles

PLAIN_BATCHES = (1, 8, 64)          # prompts per `generate` call; the best of them stands for "plain"
WHAT = ("sampling", "training", "iteration")


def bench(what: str, repeats: int = 3, questions: int = 128, model: str = "seed", progress: bool = True) -> list[dict]:
    """Rows `what`, `variant`, `metric`, `value`, `ratio`, `low`, `high` of one of `WHAT`.

    `ratio` is how many times faster (or smaller, for memory) ours is than the variant's plain partner; `low` and
    `high` are the least and the greatest of `repeats` pairs.
    """
    if what not in WHAT:
        raise UserError(f"There is no benchmark {what!r}. The benchmarks are {', '.join(WHAT)}.")
    task = dict(what=what, questions=questions, model=model)
    batches = PLAIN_BATCHES if what == "sampling" else PLAIN_BATCHES[-1:]
    runs = {f"plain_{batch}": [] for batch in batches} | {"ours": []}
    for _ in range(repeats):
        for variant in runs:
            runs[variant].append(_in_a_process({**task, "variant": variant}))
            if progress:
                print(f"{what:>10} {variant:>9}: {runs[variant][-1]}", flush=True)
    return _rows(what, runs)


def _rows(what: str, runs: dict[str, list[dict]]) -> list[dict]:
    best = min((v for v in runs if v != "ours"), key=lambda v: statistics.median(r["seconds_per_token"] for r in runs[v]))
    rows = []
    for variant, results in runs.items():
        for metric in ("tokens_per_second", "seconds", "peak_mb", "accuracy"):
            values = [result[metric] for result in results if metric in result]
            if values:
                rows.append({"what": what, "variant": variant, "metric": metric, "value": statistics.median(values),
                             "ratio": None, "low": min(values), "high": max(values)})
    for metric, more_is_better in (("tokens_per_second", True), ("seconds", False), ("peak_mb", False)):
        pairs = [(ours[metric], plain[metric]) for ours, plain in zip(runs["ours"], runs[best])]
        ratios = [a / b if more_is_better else b / a for a, b in pairs]
        rows.append({"what": what, "variant": "ours_vs_best_plain", "metric": metric, "value": statistics.median(a for a, _ in pairs),
                     "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)})
    return rows


def _in_a_process(task: dict) -> dict:
    done = subprocess.run([sys.executable, "-m", "irpo_utils.bench", json.dumps(task)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"The benchmark {task} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _worker(what: str, variant: str, questions: int, model: str) -> dict:
    """One timed run; `variant` is "ours" or "plain_BATCH"."""
    from irpo_utils.__main__ import calm_libraries

    calm_libraries()
    from irpo_utils import tasks

    profile = profiles.get("cpu", model=model)
    task = tasks.get(profile.task)
    rows = task.load("train").select(range(questions))
    run = Ours(profile, task) if variant == "ours" else Plain(profile, task, int(variant.split("_")[1]))
    started = time.perf_counter()
    samples = run.sample(rows)
    result = {}
    if what != "sampling":
        pairs = run.pairs(samples)
        started = started if what == "iteration" else time.perf_counter()
        run.train(pairs)
        if what == "iteration":
            result["accuracy"] = run.accuracy(task.load("test").select(range(200)))
    seconds = time.perf_counter() - started
    tokens = sum(samples["n_tokens"]) if what != "training" else run.trained_tokens
    return {**result, "seconds": seconds, "tokens_per_second": tokens / seconds, "seconds_per_token": seconds / tokens,
            "peak_mb": _peak_mb()}


class Ours:
    """The stages of this package, as `iteration` calls them."""

    def __init__(self, profile, task):
        from irpo_utils import models

        self.p, self.task = profile, task
        self.model, self.tokenizer = models.load(profile.model)

    def sample(self, rows, n=None, temperature=1.0):
        from irpo_utils import sampling

        return sampling.sample(self.model, self.tokenizer, rows, self.task, n=n or self.p.n_samples, temperature=temperature,
                               max_new_tokens=self.p.max_new_tokens, batch_size=self.p.sampling_batch_size, progress=False)

    def pairs(self, samples):
        from irpo_utils import grading, pairs

        return pairs.build_pairs(grading.grade(samples, self.task), k=self.p.k_pairs)[0]

    def train(self, preferences) -> None:
        from irpo_utils import training

        result = training.train(self.model, self.tokenizer, preferences, alpha=self.p.alpha, beta=self.p.beta,
                                learning_rate=self.p.learning_rate, batch_size=self.p.batch_size, progress=False)
        self.trained_tokens = result.summary["tokens"]

    def accuracy(self, rows) -> float:
        from irpo_utils import grading

        graded = grading.grade(self.sample(rows, n=1, temperature=0.0), self.task)
        return sum(graded["correct"]) / len(graded)


class Plain(Ours):
    """The documented recipe: `generate(num_return_sequences=N)` and `DPOTrainer` with `["sigmoid", "sft"]` on text."""

    def __init__(self, profile, task, batch: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        from irpo_utils import models

        self.p, self.task, self.batch = profile, task, batch
        path = models.find(profile.model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32))

    def sample(self, rows, n=None, temperature=1.0):
        import torch
        from datasets import Dataset

        from irpo_utils.sampling import render_prompt

        n, found = n or self.p.n_samples, []
        how = dict(do_sample=False)
        if temperature:
            how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_return_sequences=n)
        for start in range(0, len(rows), self.batch):
            chunk = rows.select(range(start, min(start + self.batch, len(rows))))
            prompts = [render_prompt(self.tokenizer, self.task.prompt(row)) for row in chunk]
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            with torch.inference_mode():
                out = self.model.generate(**inputs, **how, max_new_tokens=self.p.max_new_tokens)[:, inputs["input_ids"].shape[1]:]
            for i, ids in enumerate(out.tolist()):
                finished = self.tokenizer.eos_token_id in ids
                ids = ids[: ids.index(self.tokenizer.eos_token_id) + 1] if finished else ids
                row = chunk[i // n]
                found.append({"id": row["id"], "sample": i % n, "prompt": prompts[i // n], "completion_ids": ids,
                              "prompt_ids": [], "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                              "n_tokens": len(ids), "finished": finished, "answer": row["answer"]})
        return Dataset.from_list(found)

    def train(self, preferences) -> None:
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(output_dir=folder, beta=self.p.beta, loss_type=["sigmoid", "sft"], loss_weights=[1.0, self.p.alpha],
                               learning_rate=self.p.learning_rate, num_train_epochs=1, per_device_train_batch_size=self.p.batch_size,
                               warmup_steps=self.p.warmup_ratio, lr_scheduler_type=self.p.lr_scheduler, max_grad_norm=1.0,
                               save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
                               gradient_checkpointing=False)
            trainer = DPOTrainer(self.model, args=config, processing_class=self.tokenizer,
                                 train_dataset=preferences.select_columns(["prompt", "chosen", "rejected"]),
                                 peft_config=LoraConfig(r=self.p.lora_r, lora_alpha=self.p.lora_alpha, target_modules="all-linear"))
            trainer.train()
            self.trained_tokens = int(trainer._total_train_tokens)
            self.model = trainer.model.eval()


def _peak_mb() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)       # bytes on macOS, kilobytes on Linux


def save(rows: list[dict], out: str | Path, record: dict) -> None:
    """bench.csv and bench.json in `out`; the rows of other benchmarks that are there already stay."""
    import pandas

    path, table = Path(out) / "bench.csv", pandas.DataFrame(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = pandas.read_csv(path)
        table = pandas.concat([old[~old.what.isin(table.what)], table])
    table.to_csv(path, index=False)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    print(json.dumps(_worker(**json.loads(sys.argv[1]))))
