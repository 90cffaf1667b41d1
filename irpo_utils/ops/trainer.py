"""Training that survives kills, full memory and full disks."""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset, concatenate_datasets
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import TrainerCallback

from irpo_utils import UserError, iteration, training
from irpo_utils.ops import checksums, trial, warnings
from irpo_utils.ops.plan import choose_training, find_machine
from irpo_utils.scale import processes

CHECKPOINT_SECONDS = 10.0  # between two checkpoints, at least
CHECKPOINT_SHARE = 0.02  # of the time may be spent on writing them
# Functions of the stages and the folder of checkpoints, which return lists of further callbacks.
CALLBACKS: list = []


def train(make, stages: iteration.Stages, kept: Path, warn) -> tuple[Dataset, dict]:
    """The log of `make(**arguments of training.train)`, which starts from M_{t-1} at each call.

    It resumes from the newest checkpoint in `kept`. If memory runs out, it does so with about half
    the micro-batch. Raises `UserError` if one pair does not fit. Also returns `chosen`, as used.
    """
    batch_size = max(stages.p.batch_size // processes.count(), 1)
    sizes = processes.from_first(functools.partial(chosen, stages))
    while True:
        micro = sizes["micro_batch_size"]
        try:
            return make(**sizes, **options(stages, kept, warn)), sizes
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if micro == 1 or processes.count() > 1:  # the others wait in a step
                smaller = "a smaller --micro-batch-size, " if micro > 1 else ""
                raise UserError(
                    f"Out of memory in training with --micro-batch-size {micro}. Run the same "
                    f"command to resume, with {smaller}--gradient-checkpointing true, or a GPU "
                    "with more memory. A smaller --max-length also helps, in another --out."
                ) from error
        # Outside the except block, which keeps the tensors of the failed attempt alive.
        clear_device_cache(garbage_collection=True)
        micro = next(size for size in range(micro // 2, 0, -1) if batch_size % size == 0)
        sizes |= {"micro_batch_size": micro, "precompute_ref_batch_size": micro}
        tqdm.write(f"Out of memory: continuing with --micro-batch-size {micro}.")


def chosen(stages: iteration.Stages) -> dict:
    """Micro-batch and checkpointing: what the profile leaves open follows from free GPU memory."""
    p, model, machine = stages.p, stages.model, find_machine()
    if machine.name == "cpu" or None not in (p.micro_batch_size, p.gradient_checkpointing):
        micro = p.micro_batch_size or max(p.batch_size // processes.count(), 1)
        return {"micro_batch_size": micro, "gradient_checkpointing": bool(p.gradient_checkpointing)}
    clear_device_cache(garbage_collection=True)
    machine.memory, _ = torch.cuda.mem_get_info(model.device)  # bytes that are free, and all
    pairs = concatenate_datasets(stages.history if p.keep_pairs else stages.history[-1:])
    sizes = choose_training(p, model.config.get_text_config(), pairs, machine)
    listed = ", ".join(f"{name} {value}" for name, value in sizes.items())
    tqdm.write(f"Chosen for {machine.memory / 1e9:.1f} GB of free memory: {listed}.")
    return sizes


def options(stages: iteration.Stages, kept: Path, warn) -> dict:
    """Arguments of `training.train` for a long run; `kept` is the folder of its checkpoints."""
    p, base = stages.p, stages.engine.trainer(stages.model) or training.IterativeRPOTrainer
    options = {"callbacks": [warnings.CollapseWarning(warn)]}
    options["callbacks"] += [callback for make in CALLBACKS for callback in make(stages, kept)]
    if not p.shard:  # a split model keeps no checkpoints
        options["callbacks"].append(Checkpoints())
        newest = processes.from_first(functools.partial(newest_checkpoint, kept))
        options["resume_from_checkpoint"] = newest
    if p.report_to != "none":
        folder = str(kept.parent / "logs")
        options |= {"report_to": p.report_to, "output_dir": folder, "run_name": folder}
    if p.reference == "start":
        base = referring_to_start(base, stages)
    return options | {"trainer": safe(base, kept)}


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written as a whole and is unchanged."""
    sound = [f for f in folder.glob("checkpoint-*") if checksums.read(f) is not None]
    return str(max(sound, key=_step)) if sound else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


class SafeTraining:
    """What `safe` adds to a trainer: checkpoints that are checked, and an order that can resume."""

    kept: Path  # folder of the checkpoints

    def _get_output_dir(self, trial):
        return str(self.kept)  # logs may be elsewhere

    def _save_checkpoint(self, model, trial):
        """With checksums, and without the older ones; a disk that is full costs the checkpoint."""
        step = self.state.global_step
        folder = self.kept / f"checkpoint-{step}"
        try:
            try:
                super(training.DPOTrainer, self)._save_checkpoint(model, trial)
            finally:
                processes.wait()  # each process has written the state of its random numbers
            if processes.is_first():
                checksums.write(folder, {"seconds": self.state.log_history[-1]["seconds"]})
                older = [path for path in self.kept.glob("checkpoint-*") if _step(path) <= step]
                for path in sorted(older, key=_step)[:-2]:  # by step: a clock may be set back
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            reason = str(error).splitlines()[0][:200]
            tqdm.write(f"No checkpoint could be written ({reason}).")

    def _save(self, output_dir=None, state_dict=None):
        # Without the last argument PEFT looks for the base on the hub.
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _load_from_checkpoint(self, checkpoint, *args):
        super()._load_from_checkpoint(checkpoint, *args)
        self.started -= checksums.read(Path(checkpoint))["seconds"]

    def _get_train_sampler(self, *args):
        return EpochSampler(super()._get_train_sampler(*args), self)


def safe(base: type[training.IterativeRPOTrainer], folder: Path):
    """The trainer class `base` with `SafeTraining`, and its checkpoints in `folder`."""
    return type("SafeTrainer", (SafeTraining, base), {"kept": folder})


def referring_to_start(base: type[training.IterativeRPOTrainer], stages: iteration.Stages):
    """The trainer class `base` with M_0 as the reference instead of M_t."""

    class ReferringToStart(base):
        starts_from_reference = False

        def _precompute_ref_logps(self, *args):
            with trial.unchanged(stages.model):
                stages.engine.use(stages.model, stages.keep.adapter(0))
                weights = dict(stages.model.named_parameters())
                for name in (name for name in weights if ".ref." in name):  # TRL's copy of M_t
                    weights[name].data.copy_(weights[name.replace(".ref.", ".default.")])
                return super()._precompute_ref_logps(*args)

    return ReferringToStart


class EpochSampler(torch.utils.data.Sampler):
    """A sampler whose order depends on the seed and the epoch alone, so that training can resume.

    The first epoch takes its order from the generator that the trainer has just seeded; the library
    would give a resumed run that order in every epoch.
    """

    def __init__(self, sampler, trainer):
        self.sampler, self.trainer = sampler, trainer

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        if epoch := int(self.trainer.state.epoch):
            seed = self.trainer.args.seed + epoch
            self.sampler.generator = torch.Generator().manual_seed(seed)
        return iter(self.sampler)


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint now and then."""

    def __init__(self):
        self.saved, self.took = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = time.perf_counter()
        wait = max(CHECKPOINT_SECONDS, self.took / CHECKPOINT_SHARE)
        control.should_save = processes.from_first(lambda: self.asked - self.saved >= wait)

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.perf_counter()
        self.took = self.saved - self.asked
