"""The loop: sample, grade, pair, train, evaluate, T times, in a run directory that reads like the algorithm.

    runs/NAME/
      profile.json  environment.json        settings; versions, hardware, commit
      iteration_0/  evaluation/ samples/ graded/ pairs/ metrics.json            made with M_0 (adapter/: see `start`)
      iteration_1/  adapter/ training_log.jsonl  evaluation/ samples/ ...       M_1, and what M_1 made
      ...
      metrics.csv  timing.csv

A stage whose artefact is there and sound is not done again, so a run that was killed at any point goes on where it stood:
see `run_directory`. Sampling and evaluation keep blocks of completions, training keeps checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from irpo_utils import (
    UserError,
    checksums,
    contamination,
    evaluation,
    grading,
    methods,
    models,
    processes,
    sampling,
    tasks,
    training,
    vllm_server,
)
from irpo_utils.profiles import EVALUATION, PAIRING, SAMPLING, TRAINING, Profile
from irpo_utils.run_directory import RunDirectory, environment, is_whole  # noqa: F401 (`environment` is for who draws results)
from irpo_utils.tasks.base import FewShot

KL_QUESTIONS = 256  # completions for the KL to M_{t-1}: one per question, drawn at temperature 1
PROBE_PAIRS = 128  # pairs whose winners are scored before and after training
KL_WARNING = (
    4.0  # nats per completion: no run of figures/stability.csv that went on rising had more
)
SERVER_APART = 0.3  # nats per token; a base in bf16 there and in NF4 here is well below
BLOCK = 2400  # completions that are kept at a time: a kill costs one block at most


def run(profile: Profile, out: str | Path, progress: bool = True) -> list[dict]:
    """Iterative RPO with these settings in the run directory `out`; goes on with what is already there.

    Returns the metric rows of all iterations and writes them to `out/metrics.csv` (columns `method`, `seed`,
    `iteration`, `split`, `metric`, `k`, `value`, `low`, `high`, `n`). Raises `UserError` for an `out` made with other
    settings or used by another process, and for what the stages refuse.
    """
    processes.wait()  # joins them, where there are several
    profile, progress = methods.apply(profile), progress and processes.is_first()
    task = tasks.get(profile.task)  # a mistake in task or data is found before anything is written
    train_questions = task.load("train", profile.data).shuffle(seed=profile.seed)
    eval_questions = _first(task.load(profile.eval_split, profile.data), profile.n_eval_questions)
    training.check_names(profile.lr_scheduler, profile.optimizer, profile.report_to)
    check_shard(profile)
    methods.check_start(profile)
    if not methods.get(profile.method).train:  # GRPO counts otherwise
        training.pairs_at_once(profile.batch_size, profile.micro_batch_size)
    elif profile.n_samples < 2 or processes.count() > 1:
        raise UserError(
            f"--method {profile.method} compares the completions of a question, in one process: --n-samples has to be at "
            "least 2, and the command is given without a launcher such as torchrun."
        )
    if (
        profile.probe
        and not (Path(profile.probe).expanduser() / "state.json").is_file()
        and not _is_own_probe(profile, out)
    ):
        raise UserError(
            f"--probe {profile.probe} is no folder of pairs, such as RUN/iteration_0/pairs."
        )
    task = _as_asked(profile, task)
    overlap = contamination.check(
        [*train_questions, *_learnt_before(profile)], eval_questions, profile.allow_overlap
    )
    directory = RunDirectory(out, profile)
    with directory.lock():
        directory.check_profile()
        directory.keep_file(
            directory.path / "contamination.json",
            json.dumps(dataclasses.asdict(overlap), indent=1) + "\n",
        )
        if profile.start and not checksums.read(directory.folder(0) / "adapter"):
            find_adapter(profile)  # a mistake is found before the model is loaded
        if progress:
            tqdm.write(contamination.describe(overlap))
        model, tokenizer = load_model(profile, directory.inputs().get("model"))
        for questions in (eval_questions, *_asked_in_training(profile, train_questions)):
            sampling.prompts_of(
                model, tokenizer, questions, task, profile.max_new_tokens
            )  # too long ones are found now
        inputs = {
            "model": models.fingerprint(model),
            "training questions": _digest(train_questions),
            "evaluation questions": _digest(eval_questions),
            "order of training questions": _digest(train_questions, ordered=True),
            "order of evaluation questions": _digest(eval_questions, ordered=True),
        }
        directory.check_inputs(inputs)
        loop = _Loop(
            profile,
            directory,
            task,
            model,
            tokenizer,
            train_questions,
            eval_questions,
            inputs,
            progress,
        )
        for t in range(profile.iterations + 1):
            loop.iteration(t)
        processes.wait()
        return directory.metrics(range(profile.iterations + 1))


def load_model(p: Profile, known: str | None = None):
    """M_0 and its tokenizer as the profile asks for them; of a hub model the commit `known`, if it is one."""
    commit = (
        known if known and re.fullmatch("[0-9a-f]{40}", known) else None
    )  # a folder's fingerprint is longer
    return models.load(
        p.model,
        quantize=p.quantize,
        dequantize=p.dequantize,
        shard=p.shard,
        dtype=p.dtype,
        lora_r=p.lora_r,
        lora_alpha=p.lora_alpha,
        pad_token=p.pad_token,
        revision=commit,
    )


def _asked_in_training(p: Profile, questions: Dataset) -> list[Dataset]:
    """The training questions for which completions will be written, if any."""
    method = methods.get(p.method)
    if not p.iterations or not (method.samples or method.train):
        return []
    return [
        _first(
            questions, p.n_questions and p.n_questions * (p.iterations if p.fresh_questions else 1)
        )
    ]


def _is_own_probe(p: Profile, out: str | Path) -> bool:
    """Whether the probe is the run's own first pairs, which it makes before it needs them."""
    return Path(p.probe).expanduser().resolve() == (Path(out) / "iteration_0" / "pairs").resolve()


def _learnt_before(p: Profile) -> list[dict]:
    """The training questions of the runs that `p` starts from, as far as their directories and data are there."""
    start = Path(p.start).expanduser().resolve() if p.start else None
    run = (
        next(
            (place for place in (start, *start.parents[:2]) if (place / "profile.json").is_file()),
            None,
        )
        if start
        else None
    )
    if not run:
        return []
    before = load_profile(run)
    if (before.task, before.data) == (p.task, p.data):
        return _learnt_before(before)
    try:
        return [*tasks.get(before.task).load("train", before.data), *_learnt_before(before)]
    except UserError as error:
        tqdm.write(
            f"What --start {p.start} was trained on could not be compared with the evaluation questions: {error}"
        )
        return []


def check_shard(p: Profile) -> None:
    """Raise `UserError` for what a model cannot do whose layers are split over processes."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "accelerate is set to split models by itself (FSDP). Take a configuration for several GPUs without it, and "
            "--shard true."
        )
    if not p.shard:
        return
    if processes.count() == 1:
        raise UserError(
            "--shard true splits the model over several processes, and there is one. Start them with `torchrun "
            "--nproc_per_node 8 -m irpo_utils run ...`, or leave it out."
        )
    if p.sampler != "vllm" or methods.get(p.method).train:
        raise UserError(
            "A model that is split over processes can be trained and scored; token by token it would wait for all of them "
            "at every step. Let a server write the completions: --sampler vllm"
            + (f", and another --method than {p.method}." if methods.get(p.method).train else ".")
        )
    if "8bit" in p.optimizer or "paged" in p.optimizer:
        raise UserError(
            f"--optimizer {p.optimizer} cannot keep its state in parts. Take --optimizer adamw_torch: split over the "
            "processes it is small anyway."
        )


class _Loop:
    """One iteration after the other; holds what all of them share."""

    def __init__(
        self,
        profile,
        directory,
        task,
        model,
        tokenizer,
        train_questions,
        eval_questions,
        inputs,
        progress,
    ):
        self.profile, self.directory, self.task, self.inputs, self.progress = (
            profile,
            directory,
            task,
            inputs,
            progress,
        )
        self.model, self.tokenizer, self.method = model, tokenizer, methods.get(profile.method)
        self.train_questions, self.eval_questions = train_questions, eval_questions
        self.server = vllm_server.Server() if profile.sampler == "vllm" else None

    def _become(self, adapter: Path | None) -> None:
        """Turn the model, here and on the server, into the M_t of that adapter."""
        models.set_adapter(self.model, adapter)
        if self.server:
            self.server.use(adapter)

    def _stage(self, *arguments, **options) -> Path:
        return self.directory.stage(*arguments, tokens=_count_tokens, **options)

    def _settings(self, names: tuple[str, ...], questions: str, **more) -> dict:
        """What an artefact depends on beside the folders that it is made from, for its record."""
        fields = {name: getattr(self.profile, name) for name in names}
        return fields | more | {name: self.inputs[name] for name in ("model", questions)}

    def iteration(self, t: int) -> None:
        """Make M_t (t > 0), evaluate it, and let it make the pairs for M_{t+1}."""
        notes: dict = {}
        if t > 0:
            adapter = self._stage(
                t,
                "adapter",
                lambda: self._train(t),
                _save_adapter,
                of=self._trained_on(t),
                settings=self._settings(TRAINING, "training questions"),
            )
            if (log := adapter / "training_log.jsonl").exists():  # the copy that a reader looks for
                self.directory.keep_file(self.directory.folder(t) / log.name, log.read_text())
        elif self.profile.start:
            self._stage(0, "adapter", lambda: find_adapter(self.profile), _copy_adapter)
        self._become(self._adapter(t))
        self._stage(
            t,
            "evaluation",
            lambda: self._evaluate(t),
            _save_evaluation,
            of=self._evaluated(t),
            settings=self._settings(
                EVALUATION,
                "evaluation questions",
                k=self._eval_samples(t),
                examples=self.method.examples,
            ),
        )
        self._write_metrics(t, notes)  # also where there will be no pairs to go on with
        if t < self.profile.iterations and not self.method.train:
            graded = self._graded(t) if self.method.samples else None
            self._stage(
                t,
                "pairs",
                lambda: self._pairs(t, graded),
                _save_pairs,
                of=(graded,) if graded else (),
                settings=self._settings(PAIRING, "training questions"),
            )
            notes = json.loads((self.directory.folder(t) / "pairs" / "counts.json").read_text())
        self._report(t, self._write_metrics(t, notes), notes)

    def _trained_on(self, t: int) -> tuple[Path, ...]:
        """What M_t comes from: M_{t-1}, which is the reference, too, and its pairs."""
        pairs = [] if self.method.train else range(0 if self.profile.keep_pairs else t - 1, t)
        first = self._adapter(0) if self.profile.reference == "start" and t > 1 else None
        folders = (
            *(self.directory.folder(i) / "pairs" for i in pairs),
            first,
            self._adapter(t - 1),
        )
        return tuple(folder for folder in folders if folder)

    def _evaluated(self, t: int) -> tuple[Path, ...]:
        return tuple(
            folder
            for folder in (self._adapter(t), self._adapter(t - 1) if t > 0 else None)
            if folder
        )

    def _writer(self, t: int) -> tuple[Path, ...]:
        """The model that writes the completions of iteration t; a method with a start of its own learns from those of M_0."""
        adapter = None if self.method.start and t == 0 else self._adapter(t)
        return (adapter,) if adapter else ()

    def _write_metrics(self, t: int, notes: dict) -> list[dict]:
        rows = self._metrics(t, notes)
        self.directory.write_file(
            self.directory.folder(t) / "metrics.json", json.dumps(rows, indent=0) + "\n"
        )
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

    def _in_blocks(
        self, t: int, name: str, of: tuple[Path, ...], questions: Dataset, completions: int, draw
    ) -> list[Path]:
        """`draw(some of the questions)`, each kept as soon as it is there, `completions` a question."""
        size, kept = max(1, BLOCK // completions), self.directory.unfinished(t, name, of).name
        return [
            self._stage(
                t,
                f"{kept}/block_{start:06d}_of_{size}",
                lambda: draw(_slice(questions, start, size)),  # noqa: B023
                _save_dataset,
            )
            for start in range(0, len(questions), size)
        ]

    def _sample(self, t: int) -> Dataset:
        p, writer = self.profile, self._writer(t)
        self._become(writer[0] if writer else None)
        draw = functools.partial(
            sampling.sample,
            self.model,
            self.tokenizer,
            task=self.task,
            n=p.n_samples,
            temperature=p.temperature_of(t),
            top_p=p.top_p,
            max_new_tokens=p.max_new_tokens,
            seed=self._seed(t, 1),
            batch_size=p.sampling_batch_size,
            progress=self.progress,
            server=self.server,
        )
        blocks = self._in_blocks(t, "samples", writer, self._questions(t), p.n_samples, draw)
        return concatenate_datasets([load_from_disk(str(block)) for block in blocks])

    def _graded(self, t: int) -> Path:
        settings = self._settings(
            SAMPLING, "training questions", temperature=self.profile.temperature_of(t)
        )
        folder = self._stage(
            t,
            "samples",
            lambda: self._sample(t),
            _save_dataset,
            of=self._writer(t),
            settings=settings,
        )
        return self._stage(
            t,
            "graded",
            lambda: grading.grade(load_from_disk(str(folder)), self.task),
            _save_dataset,
            of=(folder,),
        )

    def _pairs(self, t: int, graded: Path | None):
        p = self.profile
        preferences, counts = self.method.build(
            load_from_disk(str(graded)) if graded else None,
            self._questions(t),
            self.task,
            self.tokenizer,
            p,
            self._seed(t, 2),
            self.method.verdict,
        )
        if p.max_pairs is not None and len(preferences) > p.max_pairs:
            preferences = preferences.shuffle(seed=self._seed(t, 2)).select(range(p.max_pairs))
            counts |= {
                "pairs": len(preferences),
                "used": len(set(preferences["id"])),
                "gold_winners": preferences["chosen_sample"][:].count(-1),
            }
        return preferences, counts

    def _train(self, t: int) -> training.TrainingResult:
        models.set_adapter(self.model, self._adapter(t - 1))
        if self.method.train:
            return self.method.train(
                self.model,
                self.tokenizer,
                self._questions(t - 1),
                self.task,
                self.profile,
                self._seed(t, 3),
                self.progress,
            )
        return self._train_on_pairs(t)

    def _train_on_pairs(self, t: int) -> training.TrainingResult:
        p = self.profile
        preferences = concatenate_datasets(
            [
                load_from_disk(str(self.directory.folder(i) / "pairs"))
                for i in range(0 if p.keep_pairs else t - 1, t)
            ]
        )
        probe = _first(
            load_from_disk(str(Path(p.probe).expanduser())) if p.probe else preferences, PROBE_PAIRS
        )
        reference = None
        if p.reference == "start":
            models.set_adapter(self.model, self._adapter(0))
            reference = training.reference_logps(self.model, self.tokenizer, preferences)
            models.set_adapter(self.model, self._adapter(t - 1))
        return training.train(
            self.model,
            self.tokenizer,
            preferences,
            alpha=p.alpha,
            beta=p.beta,
            dpo_weight=p.dpo_weight,
            learning_rate=p.learning_rate,
            epochs=p.epochs,
            max_steps=p.max_steps,
            batch_size=p.batch_size,
            micro_batch_size=p.micro_batch_size,
            warmup_ratio=p.warmup_ratio,
            lr_scheduler=p.lr_scheduler,
            max_grad_norm=p.max_grad_norm,
            nll_per=p.nll_per,
            seed=self._seed(t, 3),
            probe=probe,
            probe_every=p.probe_every or 10**9,
            gradient_checkpointing=p.gradient_checkpointing,
            optimizer=p.optimizer,
            progress=self.progress,
            checkpoints=self.directory.unfinished(t, "adapter", self._trained_on(t)),
            reference=reference,
            warn=functools.partial(self.directory.warn, t, "training"),
            report_to=p.report_to,
            log_dir=self.directory.folder(t) / "logs" if p.report_to != "none" else None,
        )

    def _eval_samples(self, t: int) -> int:
        return (
            self.profile.eval_samples_ends
            if t in (0, self.profile.iterations)
            else self.profile.eval_samples
        )

    def _evaluate(self, t: int):
        p, k = self.profile, self._eval_samples(t)
        draw = functools.partial(
            evaluation.answers,
            self.model,
            self.tokenizer,
            task=self.task,
            k=k,
            temperature=p.eval_temperature,
            max_new_tokens=p.max_new_tokens,
            seed=self._seed(0, 4),
            batch_size=p.sampling_batch_size,
            progress=self.progress,
            server=self.server,
        )
        blocks = [
            load_from_disk(str(block))
            for block in self._in_blocks(
                t, "evaluation", self._evaluated(t), self.eval_questions, k + 1, draw
            )
        ]
        greedy, sampled = (
            concatenate_datasets([block[name] for block in blocks])
            for name in ("greedy", "sampled")
        )
        if self.server:
            self._check_server(_first(greedy, 16))
        result = evaluation.Evaluation(
            Dataset.from_list(evaluation.score(greedy, sampled, k, self.eval_questions)),
            greedy,
            sampled,
        )
        extra = self._compare_with_previous(t) if t > 0 else []
        return result, extra

    def _check_server(self, written: Dataset) -> None:
        """The server has to write with this very model: its log-probabilities are ours, up to rounding and 4 bits."""
        ours = models.score(
            self.model, self.tokenizer, written["prompt_ids"], written["completion_ids"]
        )
        apart = [
            abs(a - b) / max(1, n)
            for a, b, n in zip(ours, written["logprob"], written["n_tokens"], strict=True)
        ]
        if sum(apart) / len(apart) > SERVER_APART:
            raise UserError(
                f"The server at {self.server.url} does not write with {self.profile.model} and the adapter of this run: "
                f"its log-probabilities are {sum(apart) / len(apart):.2f} nats a token from ours. Serve the same base "
                "there, with its default --logprobs-mode."
            )

    def _compare_with_previous(self, t: int) -> list[dict]:
        """The two warning numbers: KL(M_t || M_{t-1}) per completion, and the winners' log-probability per token.

        The reward accuracy during training does not warn of a collapse; these two do.
        """
        p = self.profile
        questions = _first(self.eval_questions, KL_QUESTIONS)
        drawn = sampling.sample(
            self.model,
            self.tokenizer,
            questions,
            self.task,
            n=1,
            temperature=1.0,
            max_new_tokens=p.max_new_tokens,
            seed=self._seed(t, 5),
            batch_size=p.sampling_batch_size,
            progress=False,
            server=self.server,
        )
        score = functools.partial(
            models.score, self.model, self.tokenizer, drawn["prompt_ids"], drawn["completion_ids"]
        )
        logprobs = (
            score() if self.server else drawn["logprob"]
        )  # a server's arithmetic is not quite ours
        models.set_adapter(self.model, self._adapter(t - 1))
        before = score()
        models.set_adapter(self.model, self._adapter(t))
        ratios = [now - then for now, then in zip(logprobs, before, strict=True)]
        summary = json.loads((self._adapter(t) / "summary.json").read_text())
        kl = evaluation.bootstrap_row("kl_to_previous", ratios)
        if "probe_start" not in summary:
            return [kl]
        return [
            kl,
            {
                "metric": "chosen_logp_per_token_before",
                "k": 0,
                "value": summary["probe_start"],
                "n": summary["probe_pairs"],
            },
            {
                "metric": "chosen_logp_per_token",
                "k": 0,
                "value": summary["probe_end"],
                "n": summary["probe_pairs"],
            },
        ]

    def _metrics(self, t: int, notes: dict) -> list[dict]:
        rows = json.loads((self.directory.folder(t) / "evaluation" / "metrics.json").read_text())
        rows += [
            {"metric": f"pairs_{key}", "k": 0, "value": value, "n": notes["questions"]}
            for key, value in notes.items()
        ]
        return [
            {
                "method": self.profile.method,
                "seed": self.profile.seed,
                "iteration": t,
                "split": self.profile.eval_split,
                "metric": row["metric"],
                "k": row.get("k", 0),
                "value": row["value"],
                "low": row.get("low"),
                "high": row.get("high"),
                "n": row.get("n"),
            }
            for row in rows
        ]

    def _report(self, t: int, rows: list[dict], notes: dict) -> None:
        """A few lines on the screen after every iteration."""
        if not processes.is_first():
            return
        value = {row["metric"]: row["value"] for row in rows}
        line = f"M_{t}: greedy {value['greedy']:.1%}, sampled {value['sampled']:.1%}"
        if t > 0:
            line += f"; KL to M_{t - 1} {value['kl_to_previous']:.2f} nats"
        if "chosen_logp_per_token" in value:
            line += (
                f", winners' log-probability per token {value['chosen_logp_per_token_before']:.3f} -> "
                f"{value['chosen_logp_per_token']:.3f}"
            )
        tqdm.write(line)
        for warning in self._running_off(t, value):
            tqdm.write(f"     warning: {warning}")
            self.directory.warn(t, "evaluation", warning)
        if notes:
            tqdm.write(
                f"     {notes['pairs']} pairs from {notes['used']} of {notes['questions']} questions "
                f"({notes['all_right']} all right, {notes['all_wrong']} all wrong, {notes['duplicates']} duplicate "
                f"completions, {notes['over_long']} over-long pairs left out)"
            )

    def _running_off(self, t: int, value: dict) -> list[str]:
        """What M_t's own answers warn of, beside those of M_{t-1}."""
        if t == 0:
            return []
        before = {row["metric"]: row["value"] for row in self.directory.metrics([t - 1])}
        found = []
        cut = before["truncated_rate"]
        if value["truncated_rate"] > min(max(2 * cut, 0.1), (1 + cut) / 2):
            found.append(
                f"length is running off: {value['truncated_rate']:.0%} of the completions of M_{t} do not end, of M_{t - 1} "
                f"{cut:.0%}"
            )
        if value["sampled"] < before["sampled"] - 0.05:
            found.append(
                f"accuracy fell: sampled {before['sampled']:.1%} -> {value['sampled']:.1%}. Go back to M_{t - 1}, and lower "
                "--learning-rate or raise --alpha"
            )
        if value["kl_to_previous"] > KL_WARNING:
            found.append(
                f"a long step: KL to M_{t - 1} is {value['kl_to_previous']:.1f} nats a completion"
            )
        return found


def find_adapter(p: Profile) -> Path:
    """The adapter that `p.start` names: a folder with one, or a finished run, of which it is the last."""
    folder = Path(p.start).expanduser()
    if (folder / "profile.json").is_file():
        folder = folder / f"iteration_{load_profile(folder).iterations}" / "adapter"
        if not checksums.read(folder):
            raise UserError(
                f"{folder} is missing or damaged. Finish that run first: `python -m irpo_utils run` with its --out."
            )
    if (folder / checksums.NAME).exists() and not checksums.read(folder):
        raise UserError(
            f"{folder} is damaged: its checksums do not match. Run the command that made it again, or give another "
            "--start."
        )
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            names = list(weights.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"--start {p.start} is neither an adapter folder nor a run directory: adapter_config.json or "
            f"adapter_model.safetensors is missing in {folder}, or unreadable ({error})."
        ) from error
    if not any("lora_" in name for name in names):
        raise UserError(
            f"{folder}/adapter_model.safetensors holds no LoRA weights. Give another --start."
        )
    if beyond := [
        name
        for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
        if config.get(name)
    ]:
        raise UserError(
            f"The adapter in {folder} was made with {' and '.join(beyond)}, and would be another one here, where every "
            "matrix has the scale lora_alpha / lora_r. Give another --start."
        )
    for name, there, now in (
        ("model", config.get("base_model_name_or_path"), p.model),
        ("lora_r", config.get("r"), p.lora_r),
        ("lora_alpha", config.get("lora_alpha"), p.lora_alpha),
    ):
        if there != now:
            raise UserError(
                f"The adapter in {folder} was made with {name} {there!r}, this run has {now!r}. Give "
                f"--{name.replace('_', '-')} {there}, or another --start."
            )
    return folder


def _as_asked(profile: Profile, task):
    """The task as the profile's method asks its questions: as it is, or with worked examples before each."""
    examples = methods.get(profile.method).examples
    return (
        FewShot(task, list(task.load("train", profile.data).select(range(examples))))
        if examples
        else task
    )


def load_profile(run: str | Path) -> Profile:
    """The settings of a run directory."""
    path = Path(run) / "profile.json"
    try:
        return Profile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{run} is not a run directory: {path} is missing or unreadable. Make one with "
            "`python -m irpo_utils run --out DIR`."
        ) from error


def evaluate_run(
    run: str | Path,
    task: str | None = None,
    data: str | None = None,
    split: str | None = None,
    iterations: list[int] | None = None,
    k: int = 32,
    out: str | Path | None = None,
    allow_overlap: bool = False,
) -> str:
    """Evaluate M_t of a run again, perhaps on another task; writes a metrics table and returns it as text.

    The text ends with a paired comparison of the first and the last iteration asked for, on the same questions.
    Raises `UserError` where these are questions that the run was trained on, unless `allow_overlap`.
    """
    import pandas

    p = load_profile(run)
    chosen, split = tasks.get(task or p.task), split or p.eval_split
    data = data or (p.data if task in (None, p.task) else None)
    questions = chosen.load(split, data)
    chosen = _as_asked(dataclasses.replace(p, data=data), chosen)
    wanted = iterations if iterations is not None else sorted({0, p.iterations})
    if k < 1 or not wanted or min(wanted) < 0 or max(wanted) > p.iterations:
        raise UserError(
            f"--k must be at least 1 and --iterations from 0 to {p.iterations}, the last of {run}."
        )
    adapters = {
        t: Path(run) / f"iteration_{t}" / "adapter" if t > 0 or p.start else None for t in wanted
    }
    for adapter in filter(None, adapters.values()):
        if not checksums.read(adapter):
            raise UserError(
                f"{adapter} is missing or damaged. Finish the run first: `python -m irpo_utils run` with its --out."
            )
    inputs, learnt = RunDirectory(run, p).inputs(), tasks.get(p.task).load("train", p.data)
    if inputs.get("training questions") not in (None, _digest(learnt)) and not allow_overlap:
        raise UserError(
            f"The training questions of {run} are not the ones any more that it was trained on, so that they cannot be "
            "compared with these. Put the data back as they were, or, to do without that, add --allow-overlap."
        )
    overlap = contamination.check(
        [*learnt, *_learnt_before(p)], questions, allow_overlap or p.allow_overlap
    )
    if processes.is_first():
        tqdm.write(contamination.describe(overlap))
    known = inputs.get("model")
    model, tokenizer = load_model(dataclasses.replace(p, shard=False), known)
    if known and models.fingerprint(model) not in (None, known):
        raise UserError(
            f"The model behind {p.model} is not the one any more with which {run} was made. Put it back as it was."
        )
    rows, results, folder = [], {}, Path(out) if out else Path(run) / "evaluations"
    for t, adapter in adapters.items():
        models.set_adapter(model, adapter)
        results[t] = evaluation.evaluate(
            model,
            tokenizer,
            questions,
            chosen,
            k=k,
            temperature=p.eval_temperature,
            max_new_tokens=p.max_new_tokens,
            seed=p.seed,
            batch_size=p.sampling_batch_size,
            progress=processes.is_first(),
        )
        rows += [
            {"method": p.method, "seed": p.seed, "iteration": t, "split": split, **row}
            for row in results[t].metrics
        ]
        table = pandas.DataFrame(rows)
        if (
            processes.is_first()
        ):  # also after the first of several: what is there is not lost with the rest
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
            raise UserError(
                f"{run} and {runs[0]} differ in more than their seed, so that they cannot be drawn as one curve."
            )
        first, own = (RunDirectory(path, profile).inputs() for path in (runs[0], run))
        for name, what in (
            ("model", "another model"),
            ("evaluation questions", "other evaluation questions"),
        ):
            if first.get(name) and own.get(name) and first[name] != own[name]:
                raise UserError(
                    f"{run} had {what} than {runs[0]}, so that they cannot be drawn as one curve."
                )
        if not is_whole(Path(run)):
            raise UserError(
                f"{run} is not finished, or something in it is damaged. Run it again with the same --out: it goes on "
                "where it stood, and makes anew what is damaged."
            )
        tables.append(
            pandas.DataFrame(RunDirectory(run, profile).metrics(range(profile.iterations + 1)))
        )
    means = []
    for t in range(profiles[0].iterations + 1):
        for metric in ("greedy", "sampled"):
            matrix = [accuracy_per_question(run, t, metric) for run in runs]
            value, low, high = evaluation.seed_and_question_interval(matrix)
            low, high = evaluation.no_point(value, low, high, len(matrix[0]))
            means.append(
                {
                    "method": profiles[0].method,
                    "iteration": t,
                    "split": profiles[0].eval_split,
                    "metric": metric,
                    "k": 1,
                    "value": value,
                    "low": low,
                    "high": high,
                    "n": len(matrix[0]),
                    "seeds": len(runs),
                }
            )
    last = profiles[0].iterations
    for metric in ("greedy", "sampled") if last > 0 else ():
        gains = [
            [
                after - before
                for before, after in zip(
                    *(accuracy_per_question(run, t, metric) for t in (0, last)), strict=True
                )
            ]
            for run in runs
        ]
        value, low, high = evaluation.seed_and_question_interval(gains)
        means.append(
            {
                **means[-1],
                "metric": f"{metric}_gain_over_M0",
                "value": value,
                "low": low,
                "high": high,
            }
        )
    record = {
        "seeds": [p.seed for p in profiles],
        "profile": dataclasses.asdict(profiles[0]),
        "runs": [
            {
                "seed": p.seed,
                "environment": json.loads((Path(run) / "environment.json").read_text()),
                "seconds": float(pandas.read_csv(Path(run) / "timing.csv").seconds.sum()),
            }
            for run, p in zip(runs, profiles)
        ],
    }
    return pandas.concat(tables, ignore_index=True), pandas.DataFrame(means), record


def accuracy_per_question(run: str | Path, t: int, metric: str) -> list[float]:
    """Share of right completions of M_t of a run for each question of its evaluation; `metric` is greedy or sampled."""
    data = load_from_disk(str(Path(run) / f"iteration_{t}" / "evaluation"))[metric]
    by_question: dict[str, list[bool]] = {}
    for question, correct in zip(data["id"], data["correct"]):
        by_question.setdefault(question, []).append(correct)
    return [sum(values) / len(values) for values in by_question.values()]


def _first(data: Dataset, n: int | None) -> Dataset:
    return data if n is None else data.select(range(min(n, len(data))))


def _digest(questions: Dataset, ordered: bool = False) -> str:
    """One number for the questions with all that belongs to them, in any order or in this one, on which the choice of some depends."""
    rows = [json.dumps(row, sort_keys=True) for row in questions]
    return checksums.of_text(json.dumps(rows if ordered else sorted(rows)))


def _count_tokens(content) -> int | None:
    """Tokens sampled or trained on, for timing.csv."""
    if isinstance(content, training.TrainingResult):
        return content.summary["tokens"]
    if (
        isinstance(content, Dataset)
        and "n_tokens" in content.column_names
        and "correct" not in content.column_names
    ):
        return sum(content["n_tokens"])
    if isinstance(content, tuple) and hasattr(content[0], "sampled"):
        return sum(content[0].sampled["n_tokens"]) + sum(content[0].greedy["n_tokens"])
    return None


def _slice(data: Dataset, start: int, size: int) -> Dataset:
    return data.select(range(start, min(start + size, len(data))))


def _save_dataset(data: Dataset, folder: Path) -> None:
    data.save_to_disk(str(folder))


def _save_pairs(content, folder: Path) -> None:
    preferences, counts = content
    preferences.save_to_disk(str(folder))
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def _save_adapter(result: training.TrainingResult, folder: Path) -> None:
    # Without the last argument PEFT looks for the base on the hub, to see whether its vocabulary was changed.
    result.model.save_pretrained(
        str(folder), state_dict=result.adapter, safe_serialization=True, save_embedding_layers=False
    )
    (folder / "README.md").unlink(missing_ok=True)  # a model card template that says nothing
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(
        config["target_modules"]
    )  # a set: its order would differ from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    summary, probe = result.summary, list(result.probe_log or [])
    if probe:
        summary = {
            **summary,
            "probe_pairs": result.probe_pairs,
            "probe_start": -probe[0]["nll_chosen"],
            "probe_end": -probe[-1]["nll_chosen"],
        }
    (folder / "probe_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probe))
    (folder / "training_log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in result.log)
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _copy_adapter(source: Path, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, folder / name)


def _save_evaluation(content, folder: Path) -> None:
    result, extra = content
    # The prompts are those of the questions: 32 copies of each would be most of a run directory.
    data = DatasetDict({"greedy": result.greedy, "sampled": result.sampled}).remove_columns(
        ["prompt", "prompt_ids"]
    )
    data.save_to_disk(str(folder))
    (folder / "metrics.json").write_text(json.dumps(list(result.metrics) + extra, indent=0) + "\n")
