"""The loop: sample, grade, pair, train, evaluate, T times, in a run directory that reads like the algorithm.

    runs/NAME/
      profile.json  environment.json        settings; versions, hardware, commit
      iteration_0/  evaluation/ samples/ graded/ pairs/ metrics.json            made with M_0 (adapter/: see `start`)
      iteration_1/  adapter/ training_log.jsonl  evaluation/ samples/ ...       M_1, and what M_1 made
      ...
      metrics.csv  timing.csv

Each artefact is written beside its place, gets a list of checksums, and is moved in whole. A stage whose artefact is
there and sound is not done again, so a run that was killed at any point goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from safetensors import SafetensorError
from tqdm.auto import tqdm

from irpo_utils import UserError, contamination, evaluation, grading, methods, models, sampling, tasks, training
from irpo_utils.profiles import MAY_CHANGE, Profile
from irpo_utils.tasks.base import FewShot

CHECKSUMS = "checksums.json"
KL_QUESTIONS = 256          # completions for the KL to M_{t-1}: one per question, drawn at temperature 1
PROBE_PAIRS = 128           # pairs whose winners are scored before and after training


def run(profile: Profile, out: str | Path, progress: bool = True) -> list[dict]:
    """Iterative RPO with these settings in the run directory `out`; goes on with what is already there.

    Returns the metric rows of all iterations and writes them to `out/metrics.csv` (columns `method`, `seed`,
    `iteration`, `split`, `metric`, `k`, `value`, `low`, `high`, `n`). Raises `UserError` for an `out` made with other
    settings or used by another process, and for what the stages refuse.
    """
    profile = methods.apply(profile)
    task = tasks.get(profile.task)              # a mistake in task or data is found before anything is written
    train_questions = task.load("train", profile.data).shuffle(seed=profile.seed)
    eval_questions = _first(task.load(profile.eval_split, profile.data), profile.n_eval_questions)
    training.check_names(profile.lr_scheduler, profile.optimizer, profile.report_to)
    if examples := methods.get(profile.method).examples:
        task = FewShot(task, list(task.load("train", profile.data).select(range(examples))))
    overlap = contamination.check(train_questions, eval_questions, profile.allow_overlap)
    directory = RunDirectory(out, profile)
    with directory.lock():
        directory.check_profile()
        if not (record := directory.path / "contamination.json").exists():
            directory.write_file(record, json.dumps(dataclasses.asdict(overlap), indent=1) + "\n")
        if profile.start and not _is_sound(directory.folder(0) / "adapter"):
            find_adapter(profile)                   # a mistake is found before the model is loaded
        if progress:
            tqdm.write(contamination.describe(overlap))
        model, tokenizer = load_model(profile)
        loop = _Loop(profile, directory, task, model, tokenizer, train_questions, eval_questions, progress)
        for t in range(profile.iterations + 1):
            loop.iteration(t)
        return directory.metrics(range(profile.iterations + 1))


def load_model(p: Profile):
    """M_0 and its tokenizer as the profile asks for them."""
    return models.load(p.model, quantize=p.quantize, dequantize=p.dequantize, dtype=p.dtype, lora_r=p.lora_r,
                       lora_alpha=p.lora_alpha, pad_token=p.pad_token)


class RunDirectory:
    """Paths, checksums and resumption; knows nothing of what the artefacts mean."""

    def __init__(self, out: str | Path, profile: Profile):
        self.path = Path(out)
        self.profile = profile
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def check_profile(self) -> None:
        """Write profile.json and environment.json, or compare with what is there if anything was made with it.

        Only who holds the lock may call this: another process would rewrite the settings of a run in progress.
        """
        path, new = self.path / "profile.json", dataclasses.asdict(self.profile)
        if not any(self.path.glob("iteration_*/*")):
            self.write_file(path, json.dumps(new, indent=1) + "\n")
            self.write_file(self.path / "environment.json", json.dumps(environment(), indent=1) + "\n")
            return
        try:
            old = dataclasses.asdict(Profile(**json.loads(path.read_text())))       # fields that came later: their defaults
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is missing or damaged, so that there is no telling what the iterations in {self.path} "
                            "were made with. Put it back, or choose another --out.") from error
        differing = [f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in sorted({*old, *new})
                     if old.get(key) != new.get(key) and key not in MAY_CHANGE]
        if differing:
            raise UserError(f"{self.path} was made with other settings: {', '.join(differing)}. Choose another --out, or "
                            "give the same settings to go on with it.")
        if old != new:
            self.write_file(path, json.dumps(new, indent=1) + "\n")

    def lock(self):
        """One process at a time; the lock goes away with the process, also when it is killed."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.path} is in use by another run. Wait for it, or choose another --out.") from error
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def folder(self, t: int) -> Path:
        return self.path / f"iteration_{t}"

    def stage(self, t: int, name: str, make, save) -> Path:
        """The folder of an artefact, made by `save(make(), folder)` unless it is there and sound."""
        place = self.folder(t) / name
        if _is_sound(place):
            return place
        if place.exists():
            tqdm.write(f"{place} is damaged (its checksums do not match) and is made again.")
        started = time.perf_counter()
        content = make()
        seconds = time.perf_counter() - started
        partial = place.with_name(f".{name}.partial")
        try:
            for leftover in (partial, place):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            save(content, partial)
            sums = {str(f.relative_to(partial)): _sha256(f) for f in sorted(partial.rglob("*")) if f.is_file()}
            tokens = _count_tokens(content)
            self._write(partial / CHECKSUMS, json.dumps({"seconds": round(seconds, 3), "tokens": tokens, "sha256": sums}, indent=1))
            os.replace(partial, place)
        except (OSError, SafetensorError) as error:         # safetensors reports a full disk in an error of its own
            shutil.rmtree(partial, ignore_errors=True)
            raise _disk_error(place, error) from error
        return place

    def write_file(self, path: Path, text: str) -> None:
        """Write a small file whole or not at all."""
        try:
            self._write(path, text)
        except OSError as error:
            raise _disk_error(path, error) from error

    @staticmethod
    def _write(path: Path, text: str) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def metrics(self, iterations) -> list[dict]:
        return [row for t in iterations for row in json.loads((self.folder(t) / "metrics.json").read_text())]

    def write_tables(self, iterations) -> None:
        """metrics.csv and timing.csv from what the iterations hold."""
        import pandas

        self.write_file(self.path / "metrics.csv", pandas.DataFrame(self.metrics(iterations)).to_csv(index=False))
        rows = []
        for t in iterations:
            for sums in sorted(self.folder(t).glob(f"*/{CHECKSUMS}")):
                record = json.loads(sums.read_text())
                rows.append({"iteration": t, "stage": sums.parent.name, "seconds": record["seconds"], "tokens": record["tokens"]})
        self.write_file(self.path / "timing.csv", pandas.DataFrame(rows).to_csv(index=False))


class _Loop:
    """One iteration after the other; holds what all of them share."""

    def __init__(self, profile, directory, task, model, tokenizer, train_questions, eval_questions, progress):
        self.profile, self.directory, self.task, self.progress = profile, directory, task, progress
        self.model, self.tokenizer, self.method = model, tokenizer, methods.get(profile.method)
        self.train_questions, self.eval_questions = train_questions, eval_questions

    def iteration(self, t: int) -> None:
        """Make M_t (t > 0), evaluate it, and let it make the pairs for M_{t+1}."""
        notes: dict = {}
        if t > 0:
            self.directory.stage(t, "adapter", lambda: self._train(t), _save_adapter)
        elif self.profile.start:
            self.directory.stage(0, "adapter", lambda: find_adapter(self.profile), _copy_adapter)
        models.set_adapter(self.model, self._adapter(t))
        self.directory.stage(t, "evaluation", lambda: self._evaluate(t), _save_evaluation)
        self._write_metrics(t, notes)               # also where there will be no pairs to go on with
        if t < self.profile.iterations and not self.method.train:
            graded = self._graded(t) if self.method.samples else None
            self.directory.stage(t, "pairs", lambda: self._pairs(t, graded), _save_pairs)
            notes = json.loads((self.directory.folder(t) / "pairs" / "counts.json").read_text())
        self._report(t, self._write_metrics(t, notes), notes)

    def _write_metrics(self, t: int, notes: dict) -> list[dict]:
        rows = self._metrics(t, notes)
        self.directory.write_file(self.directory.folder(t) / "metrics.json", json.dumps(rows, indent=0) + "\n")
        self.directory.write_tables(range(t + 1))
        return rows

    def _adapter(self, t: int) -> Path | None:
        return self.directory.folder(t) / "adapter" if t > 0 or self.profile.start else None

    def _seed(self, t: int, purpose: int) -> int:
        """Different numbers for every iteration and purpose, the same on every resumption."""
        return (self.profile.seed * 1000 + t) * 10 + purpose

    def _questions(self, t: int) -> Dataset:
        available = len(self.train_questions)
        n = min(self.profile.n_questions or available, available)
        start = t * n if self.profile.fresh_questions else 0
        return self.train_questions.select([i % available for i in range(start, start + n)])

    def _sample(self, t: int) -> Dataset:
        p = self.profile
        return sampling.sample(self.model, self.tokenizer, self._questions(t), self.task, n=p.n_samples,
                               temperature=p.temperature_of(t), top_p=p.top_p, max_new_tokens=p.max_new_tokens,
                               seed=self._seed(t, 1), batch_size=p.sampling_batch_size, progress=self.progress)

    def _graded(self, t: int) -> Path:
        folder = self.directory.stage(t, "samples", lambda: self._sample(t), _save_dataset)
        return self.directory.stage(t, "graded", lambda: grading.grade(load_from_disk(str(folder)), self.task), _save_dataset)

    def _pairs(self, t: int, graded: Path | None):
        p = self.profile
        preferences, counts = self.method.build(load_from_disk(str(graded)) if graded else None, self._questions(t), self.task,
                                                self.tokenizer, p, self._seed(t, 2), self.method.verdict)
        if p.max_pairs is not None and len(preferences) > p.max_pairs:
            preferences = preferences.shuffle(seed=self._seed(t, 2)).select(range(p.max_pairs))
            counts["pairs"] = len(preferences)
        return preferences, counts

    def _train(self, t: int) -> training.TrainingResult:
        models.set_adapter(self.model, self._adapter(t - 1))
        if self.method.train:
            result = self.method.train(self.model, self.tokenizer, self._questions(t - 1), self.task, self.profile,
                                       self._seed(t, 3), self.progress)
        else:
            result = self._train_on_pairs(t)
        log = "\n".join(json.dumps(row) for row in result.log) + "\n"
        self.directory.folder(t).mkdir(exist_ok=True)           # the pairs of M_{t-1} were written beside it
        self.directory.write_file(self.directory.folder(t) / "training_log.jsonl", log)
        return result

    def _train_on_pairs(self, t: int) -> training.TrainingResult:
        p = self.profile
        preferences = concatenate_datasets([load_from_disk(str(self.directory.folder(i) / "pairs"))
                                            for i in range(0 if p.keep_pairs else t - 1, t)])
        probe = _first(load_from_disk(str(Path(p.probe).expanduser())) if p.probe else preferences, PROBE_PAIRS)
        reference = None
        if p.reference == "start":
            models.set_adapter(self.model, self._adapter(0))
            reference = training.reference_logps(self.model, self.tokenizer, preferences)
            models.set_adapter(self.model, self._adapter(t - 1))
        return training.train(
            self.model, self.tokenizer, preferences, alpha=p.alpha, beta=p.beta, dpo_weight=p.dpo_weight,
            learning_rate=p.learning_rate, epochs=p.epochs, max_steps=p.max_steps, batch_size=p.batch_size,
            micro_batch_size=p.micro_batch_size, warmup_ratio=p.warmup_ratio, lr_scheduler=p.lr_scheduler,
            max_grad_norm=p.max_grad_norm, nll_per=p.nll_per, seed=self._seed(t, 3), probe=probe, probe_every=p.probe_every or 10**9,
            gradient_checkpointing=p.gradient_checkpointing, optimizer=p.optimizer, progress=self.progress,
            reference=reference, report_to=p.report_to, log_dir=self.directory.folder(t) / "logs" if p.report_to != "none" else None)

    def _evaluate(self, t: int):
        p = self.profile
        k = p.eval_samples_ends if t in (0, p.iterations) else p.eval_samples
        result = evaluation.evaluate(self.model, self.tokenizer, self.eval_questions, self.task, k=k,
                                     temperature=p.eval_temperature, max_new_tokens=p.max_new_tokens,
                                     seed=self._seed(0, 4), batch_size=p.sampling_batch_size, progress=self.progress)
        extra = self._compare_with_previous(t) if t > 0 else []
        return result, extra

    def _compare_with_previous(self, t: int) -> list[dict]:
        """The two warning numbers: KL(M_t || M_{t-1}) per completion, and the winners' log-probability per token.

        The reward accuracy during training does not warn of a collapse; these two do.
        """
        p = self.profile
        questions = _first(self.eval_questions, KL_QUESTIONS)
        drawn = sampling.sample(self.model, self.tokenizer, questions, self.task, n=1, temperature=1.0,
                                max_new_tokens=p.max_new_tokens, seed=self._seed(t, 5),
                                batch_size=p.sampling_batch_size, progress=False)
        models.set_adapter(self.model, self._adapter(t - 1))
        before = models.score(self.model, self.tokenizer, drawn["prompt_ids"], drawn["completion_ids"])
        models.set_adapter(self.model, self._adapter(t))
        ratios = [now - then for now, then in zip(drawn["logprob"], before, strict=True)]
        summary = json.loads((self._adapter(t) / "summary.json").read_text())
        kl = {**evaluation.bootstrap_row("kl_to_previous", ratios), "k": 1}
        if "probe_start" not in summary:
            return [kl]
        return [kl,
                {"metric": "chosen_logp_per_token_before", "k": 0, "value": summary["probe_start"], "n": summary["probe_pairs"]},
                {"metric": "chosen_logp_per_token", "k": 0, "value": summary["probe_end"], "n": summary["probe_pairs"]}]

    def _metrics(self, t: int, notes: dict) -> list[dict]:
        rows = json.loads((self.directory.folder(t) / "evaluation" / "metrics.json").read_text())
        rows += [{"metric": f"pairs_{key}", "k": 0, "value": value, "n": notes["questions"]} for key, value in notes.items()]
        return [{"method": self.profile.method, "seed": self.profile.seed, "iteration": t, "split": self.profile.eval_split,
                 "metric": row["metric"], "k": row.get("k", 0), "value": row["value"], "low": row.get("low"),
                 "high": row.get("high"), "n": row.get("n")} for row in rows]

    def _report(self, t: int, rows: list[dict], notes: dict) -> None:
        """A few lines on the screen after every iteration."""
        value = {row["metric"]: row["value"] for row in rows}
        line = f"M_{t}: greedy {value['greedy']:.1%}, sampled {value['sampled']:.1%}"
        if t > 0:
            line += f"; KL to M_{t - 1} {value['kl_to_previous']:.2f} nats"
        if "chosen_logp_per_token" in value:
            line += (f", winners' log-probability per token {value['chosen_logp_per_token_before']:.3f} -> "
                     f"{value['chosen_logp_per_token']:.3f}")
        tqdm.write(line)
        if notes:
            tqdm.write(f"     {notes['pairs']} pairs from {notes['used']} of {notes['questions']} questions "
                       f"({notes['all_right']} all right, {notes['all_wrong']} all wrong, {notes['duplicates']} duplicate "
                       f"completions, {notes['over_long']} over-long pairs left out)")


def find_adapter(p: Profile) -> Path:
    """The adapter that `p.start` names: a folder with one, or a finished run, of which it is the last."""
    folder = Path(p.start).expanduser()
    if (folder / "profile.json").is_file():
        folder = folder / f"iteration_{load_profile(folder).iterations}" / "adapter"
        if not _is_sound(folder):
            raise UserError(f"{folder} is missing or damaged. Finish that run first: `python -m irpo_utils run` with its --out.")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--start {p.start} is neither an adapter folder nor a run directory: {folder}/adapter_config.json is "
                        "missing or unreadable.") from error
    for name, there, now in (("model", config.get("base_model_name_or_path"), p.model), ("lora_r", config.get("r"), p.lora_r),
                             ("lora_alpha", config.get("lora_alpha"), p.lora_alpha)):
        if there != now:
            raise UserError(f"The adapter in {folder} was made with {name} {there!r}, this run has {now!r}. Give "
                            f"--{name.replace('_', '-')} {there}, or another --start.")
    return folder


def load_profile(run: str | Path) -> Profile:
    """The settings of a run directory."""
    path = Path(run) / "profile.json"
    try:
        return Profile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run} is not a run directory: {path} is missing or unreadable. Make one with "
                        "`python -m irpo_utils run --out DIR`.") from error


def evaluate_run(run: str | Path, task: str | None = None, data: str | None = None, split: str | None = None,
                 iterations: list[int] | None = None, k: int = 32, out: str | Path | None = None) -> str:
    """Evaluate M_t of a run again, perhaps on another task; writes a metrics table and returns it as text.

    The text ends with a paired comparison of the first and the last iteration asked for, on the same questions.
    """
    import pandas

    p = load_profile(run)
    chosen, split = tasks.get(task or p.task), split or p.eval_split
    questions = chosen.load(split, data or (p.data if task in (None, p.task) else None))
    model, tokenizer = load_model(p)
    rows, results = [], {}
    wanted = iterations if iterations is not None else [0, p.iterations]
    if k < 1 or not wanted or min(wanted) < 0 or max(wanted) > p.iterations:
        raise UserError(f"--k must be at least 1 and --iterations from 0 to {p.iterations}, the last of {run}.")
    for t in wanted:
        folder = Path(run) / f"iteration_{t}" / "adapter" if t > 0 or p.start else None
        if folder and not _is_sound(folder):
            raise UserError(f"{folder} is missing or damaged. Finish the run first: `python -m irpo_utils run` with its --out.")
        models.set_adapter(model, folder)
        results[t] = evaluation.evaluate(model, tokenizer, questions, chosen, k=k, temperature=p.eval_temperature,
                                         max_new_tokens=p.max_new_tokens, seed=p.seed, batch_size=p.sampling_batch_size)
        rows += [{"method": p.method, "seed": p.seed, "iteration": t, "split": split, **row} for row in results[t].metrics]
    table = pandas.DataFrame(rows)
    folder = Path(out) if out else Path(run) / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{chosen.name}_{split}.csv", index=False)
    text = table.to_string(index=False)
    if len(results) > 1:
        first, last = list(results)[0], list(results)[-1]
        text += f"\n\nM_{last} against M_{first}, greedy: {evaluation.compare(results[first].greedy, results[last].greedy)}"
    return text


def collect(runs: list[str | Path]):
    """Metrics of several runs (seeds) of one profile: (all rows, means with intervals, what made them).

    The intervals of the means resample seeds and questions together (`evaluation.seed_and_question_interval`); the gain
    of the last iteration over M_0 is paired, question by question.
    Raises `UserError` for a run that is not finished, or whose settings differ in more than the seed.
    """
    import pandas

    tables, profiles = [], [load_profile(run) for run in runs]
    for run, profile in zip(runs, profiles):
        if dataclasses.replace(profile, seed=0) != dataclasses.replace(profiles[0], seed=0):
            raise UserError(f"{run} and {runs[0]} differ in more than their seed, so that they cannot be drawn as one curve.")
        if not (Path(run) / f"iteration_{profile.iterations}" / "metrics.json").exists():
            raise UserError(f"{run} is not finished. Run it again with the same --out: it goes on where it stood.")
        tables.append(pandas.DataFrame(RunDirectory(run, profile).metrics(range(profile.iterations + 1))))
    means = []
    for t in range(profiles[0].iterations + 1):
        for metric in ("greedy", "sampled"):
            matrix = [accuracy_per_question(run, t, metric) for run in runs]
            value, low, high = evaluation.seed_and_question_interval(matrix)
            means.append({"method": profiles[0].method, "iteration": t, "split": profiles[0].eval_split, "metric": metric, "k": 1,
                          "value": value, "low": low, "high": high, "n": len(matrix[0]), "seeds": len(runs)})
    last = profiles[0].iterations
    for metric in ("greedy", "sampled") if last > 0 else ():
        gains = [[after - before for before, after in zip(*(accuracy_per_question(run, t, metric) for t in (0, last)), strict=True)]
                 for run in runs]
        value, low, high = evaluation.seed_and_question_interval(gains)
        means.append({**means[-1], "metric": f"{metric}_gain_over_M0", "value": value, "low": low, "high": high})
    record = {"seeds": [p.seed for p in profiles], "profile": dataclasses.asdict(profiles[0]), "runs": [
        {"seed": p.seed, "environment": json.loads((Path(run) / "environment.json").read_text()),
         "seconds": float(pandas.read_csv(Path(run) / "timing.csv").seconds.sum())} for run, p in zip(runs, profiles)]}
    return pandas.concat(tables, ignore_index=True), pandas.DataFrame(means), record


def accuracy_per_question(run: str | Path, t: int, metric: str) -> list[float]:
    """Share of right completions of M_t of a run for each question of its evaluation; `metric` is greedy or sampled."""
    data = load_from_disk(str(Path(run) / f"iteration_{t}" / "evaluation"))[metric]
    by_question: dict[str, list[bool]] = {}
    for question, correct in zip(data["id"], data["correct"]):
        by_question.setdefault(question, []).append(correct)
    return [sum(values) / len(values) for values in by_question.values()]


def environment() -> dict:
    """Versions, hardware and commit, to stand beside every result."""
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "numpy")
    versions = {name: _version(name) for name in names}
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"command": _command(), "python": platform.python_version(), "versions": versions, "system": platform.system(),
            "processor": _processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpu,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")), "commit": _commit()}


def _command() -> str:
    """The command line of this process, without the place where Python or the package lies."""
    program = Path(sys.argv[0])
    name = "python -m irpo_utils" if program.name == "__main__.py" else f"python {program.name}"
    return " ".join([name, *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+" where files were changed since."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10)
    try:
        head, status = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "") if head.returncode == 0 else None


def _first(data: Dataset, n: int | None) -> Dataset:
    return data if n is None else data.select(range(min(n, len(data))))


def _save_dataset(data: Dataset, folder: Path) -> None:
    data.save_to_disk(str(folder))


def _save_pairs(content, folder: Path) -> None:
    preferences, counts = content
    preferences.save_to_disk(str(folder))
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def _save_adapter(result: training.TrainingResult, folder: Path) -> None:
    # Without the last argument PEFT looks for the base on the hub, to see whether its vocabulary was changed.
    result.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)          # a model card template that says nothing
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])      # a set: its order would differ from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    summary, probe = result.summary, list(result.probe_log or [])
    if probe:
        summary = {**summary, "probe_pairs": result.probe_pairs, "probe_start": -probe[0]["nll_chosen"],
                   "probe_end": -probe[-1]["nll_chosen"]}
    (folder / "probe_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probe))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _copy_adapter(source: Path, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, folder / name)


def _save_evaluation(content, folder: Path) -> None:
    result, extra = content
    # The prompts are those of the questions: 32 copies of each would be most of a run directory.
    data = DatasetDict({"greedy": result.greedy, "sampled": result.sampled}).remove_columns(["prompt", "prompt_ids"])
    data.save_to_disk(str(folder))
    (folder / "metrics.json").write_text(json.dumps(list(result.metrics) + extra, indent=0) + "\n")


def _count_tokens(content) -> int | None:
    """Tokens sampled or trained on, for timing.csv."""
    if isinstance(content, training.TrainingResult):
        return content.summary["tokens"]
    if isinstance(content, Dataset) and "n_tokens" in content.column_names and "correct" not in content.column_names:
        return sum(content["n_tokens"])
    if isinstance(content, tuple) and hasattr(content[0], "sampled"):
        return sum(content[0].sampled["n_tokens"]) + sum(content[0].greedy["n_tokens"])
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sound(place: Path) -> bool:
    """Every file that was written is there, unchanged."""
    try:
        sums = json.loads((place / CHECKSUMS).read_text())["sha256"]
        return all(_sha256(place / name) == value for name, value in sums.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _disk_error(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} could not be written ({getattr(error, 'strerror', None) or error}). Nothing half-written "
                     "was left; free some space or choose another --out, and run the same command again: it goes on where it stood.")
