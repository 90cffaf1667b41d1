"""Training that survives kills, memory that runs out, and disks that fill."""

import json
import os
import re
import traceback
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from irpo_utils import UserError, logprobs, models, profiles, training
from irpo_utils.engines import shared_prompt
from irpo_utils.ops import checksums, trainer, warnings
from irpo_utils.ops import plan as planning
from studies.probe import Probe


@pytest.fixture(scope="module")
def loaded():
    return models.load("seed")


@pytest.fixture()
def model(loaded):
    """The seed model as M_0, also after a test that left weights that are not finite."""
    models.set_adapter(loaded[0], None)
    training.draw_adapter(loaded[0], 0)
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """Eleven pairs of unequal lengths: no micro-batch but one divides their number."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = []
    for i in range(11):
        story = f"Mia has {i + 12} shells. {'Mia finds 5 more. ' * (i % 4)}How many?"
        steps = "".join(f"{i + 12 + 5 * j}+5={i + 17 + 5 * j}\n" for j in range(i % 4))
        end = [tokenizer.eos_token_id]
        prompt = models.render_prompt(tokenizer, f"Question: {story}\nSolution:")
        rows.append(
            {
                "prompt_ids": encode(prompt),
                "chosen_ids": encode(f"{steps}Final answer: {i + 12 + 5 * (i % 4)}") + end,
                "rejected_ids": encode(f"Final answer: {i}") + end,
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture(params=["plain", "shared prompt"])
def base(request):
    """The trainers of both engines."""
    plain = request.param == "plain"
    return training.IterativeRPOTrainer if plain else shared_prompt.SharedPromptTrainer


def train(
    model, tokenizer, pairs, kept, base=training.IterativeRPOTrainer, callbacks=(), **settings
):
    """`training.train` as a long run calls it; `kept` is the folder of its checkpoints."""
    options = {"learning_rate": 1e-3, "batch_size": 4, "disable_tqdm": True} | settings
    return training.train(
        model,
        tokenizer,
        pairs,
        trainer=trainer.safe(base, kept),
        callbacks=[*callbacks, trainer.Checkpoints()],
        resume_from_checkpoint=trainer.newest_checkpoint(kept),
        **options,
    )


def adapter_of(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def without_seconds(log) -> list[dict]:
    return [{name: row[name] for name in row if name != "seconds"} for row in log]


def kind(warning: str) -> str:
    """The sign of a collapse that a warning names, without the numbers."""
    return warning.partition(":")[0]


# ---- kills


class Killed(BaseException):
    """What nothing catches."""


class Kill(TrainerCallback):
    """Raises `Killed` at a step; sets the clock of the checkpoints back by an hour at every step."""

    def __init__(self, step: int, folder):
        self.step, self.folder = step, folder

    def on_log(self, args, state, control, **kwargs):
        for path in self.folder.glob("checkpoint-*"):
            os.utime(path, (1.7e9 - 3600 * int(path.name.partition("-")[2]),) * 2)
        if state.global_step == self.step:
            raise Killed


@pytest.fixture()
def often(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "CHECKPOINT_SHARE", 1e9)


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 2.0, "loss": "sft"},
        pytest.param({"num_train_epochs": 3.0, "batch_size": 3}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"gradient_checkpointing": True, "micro_batch_size": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"num_train_epochs": 9.0, "learning_rate": 1e-2, "alpha": 0.0}, marks=pytest.mark.slow
        ),
    ],
)
def test_training_that_was_killed_resumes_to_the_same_weights(
    model, tokenizer, pairs, tmp_path, often, options, base
):
    """From the newest sound checkpoint: a damaged one is passed over."""
    options = {"seed": 3, "base": base} | options
    probes = [Probe(pairs.select(range(4)), tokenizer, 2, tmp_path / n / "x") for n in "ab"]
    warned = {}

    def warnings_of(name):
        return warnings.CollapseWarning(warned.setdefault(name, []).append)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    callbacks = [probes[0], warnings_of("whole")]
    whole = train(model, tokenizer, pairs, tmp_path / "a" / "kept", callbacks=callbacks, **options)
    expected, steps = adapter_of(model), len(whole)
    models.set_adapter(model, None)

    kept, kill_at = tmp_path / "b" / "kept", max(3, steps - 1)
    with pytest.raises(Killed):
        callbacks = [probes[1], warnings_of("killed"), Kill(kill_at, kept)]
        train(model, tokenizer, pairs, kept, callbacks=callbacks, **options)
    names = {path.name for path in kept.iterdir()}
    assert names == {f"checkpoint-{kill_at - i}" for i in (1, 2)}  # older ones are deleted
    newest = trainer.newest_checkpoint(kept)
    weights = kept / f"checkpoint-{kill_at - 1}" / "adapter_model.safetensors"
    assert str(weights.parent) == newest
    weights.write_bytes(weights.read_bytes()[:-1])
    assert trainer.newest_checkpoint(kept) == str(kept / f"checkpoint-{kill_at - 2}")

    models.set_adapter(model, None)
    probe = Probe(pairs.select(range(4)), tokenizer, 2, tmp_path / "b" / "x")
    callbacks = [probe, warnings_of("resumed")]
    log = train(model, tokenizer, pairs, kept, callbacks=callbacks, **options)
    assert [row["step"] for row in log] == list(range(1, steps + 1))
    assert without_seconds(log) == without_seconds(whole)
    seconds = log["seconds"][:]
    assert seconds == sorted(seconds)  # those before the kill count
    assert probe.rows == probes[0].rows and len(probe.rows) > 1
    assert {kind(text) for text in warned["resumed"]} <= {kind(text) for text in warned["whole"]}
    assert bool(warned["whole"]) == (options.get("learning_rate", 0) > 1e-3)
    ours = adapter_of(model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_checkpoints_are_not_written_more_often_than_they_may_cost(
    model, tokenizer, pairs, tmp_path, monkeypatch
):
    train(model, tokenizer, pairs, tmp_path / "kept")
    assert not list(tmp_path.rglob("checkpoint-*"))  # training takes less than 10 seconds
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "CHECKPOINT_SHARE", 1e-9)
    train(model, tokenizer, pairs, tmp_path / "kept", num_train_epochs=2)
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-1"]


# ---- memory


def out_of_memory_above(monkeypatch, limit: int, trainer_class) -> list[int]:
    """Let the loss of a micro-batch with more pairs than `limit` fail; returns the sizes tried."""
    tried, real = [], trainer_class.pair_logps

    def pair_logps(self, model, inputs):
        found = real(self, model, inputs)
        tried.append(self.n_pairs(inputs))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return found

    monkeypatch.setattr(trainer_class, "pair_logps", pair_logps)
    return tried


def train_in_a_run(model, tokenizer, pairs, kept, base, callbacks=(), **settings):
    """`trainer.train` as a run calls it: two epochs of eight pairs per step, from M_0."""
    p = profiles.get("smoke", batch_size=8, **settings)
    engine = SimpleNamespace(trainer=lambda model: base)
    stages = {"p": p, "engine": engine, "model": model, "tokenizer": tokenizer, "history": [pairs]}

    def make(**options):
        models.set_adapter(model, None)
        options["callbacks"] += callbacks
        how = {"batch_size": 8, "num_train_epochs": 2, "disable_tqdm": True, "learning_rate": 1e-3}
        return training.train(model, tokenizer, pairs, **how, **options)

    log, how = trainer.train(make, SimpleNamespace(**stages), kept, print)
    train_in_a_run.how = how
    return log, adapter_of(model)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(
    model, tokenizer, pairs, tmp_path, monkeypatch, capsys, base
):
    parts = model, tokenizer, pairs
    whole, expected = train_in_a_run(*parts, tmp_path / "whole", base)
    tried = out_of_memory_above(monkeypatch, 3, base)
    log, ours = train_in_a_run(*parts, tmp_path / "halved", base)
    assert tried[:6] == [8, 4, 2, 2, 2, 2] and max(tried[2:]) <= 2
    assert "Out of memory: continuing with --micro-batch-size 2" in "".join(capsys.readouterr())
    for name in ("loss", "loss_dpo", "loss_nll", "grad_norm", "rewards/margins", "logps/chosen"):
        assert log[name][:] == pytest.approx(whole[name][:], rel=1e-4, abs=1e-6), name
    assert log["tokens"][:] == whole["tokens"][:]
    assert all(torch.allclose(ours[name], expected[name], atol=1e-5) for name in expected)


def test_after_out_of_memory_training_resumes_from_the_newest_checkpoint(
    model, tokenizer, pairs, tmp_path, monkeypatch, often
):
    """Memory runs out in the fourth and last step."""
    base = training.IterativeRPOTrainer
    parts = model, tokenizer, pairs
    whole, expected = train_in_a_run(*parts, tmp_path / "whole", base)
    tried, real = [], base.pair_logps

    def pair_logps(self, model, inputs):
        tried.append((self.state.global_step, self.n_pairs(inputs)))
        if len(tried) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, model, inputs)

    monkeypatch.setattr(base, "pair_logps", pair_logps)
    log, ours = train_in_a_run(*parts, tmp_path / "resumed", base)
    assert tried == [(0, 8), (1, 3), (2, 8), (3, 3), (3, 3)]
    assert log["step"][:] == [1, 2, 3, 4]
    assert log["loss"][:] == pytest.approx(whole["loss"][:], rel=1e-4)
    assert all(torch.allclose(ours[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_out_of_memory_that_cannot_be_helped_says_what_to_lower(
    model, tokenizer, pairs, tmp_path, monkeypatch, n_processes
):
    """One pair does not fit, or another process would wait in the step."""
    base = training.IterativeRPOTrainer
    out_of_memory_above(monkeypatch, 0, base)
    monkeypatch.setattr(trainer.processes, "count", lambda: n_processes)
    monkeypatch.setattr(trainer.processes, "is_first", lambda: True)
    size, smaller = (1, "") if n_processes == 1 else (4, "a smaller --micro-batch-size, ")
    with pytest.raises(UserError, match=f"--micro-batch-size {size}.*with {smaller}--gradient"):
        train_in_a_run(model, tokenizer, pairs, tmp_path, base, gradient_checkpointing=True)


# ---- what a GPU's memory allows


@pytest.fixture()
def gpu_with(monkeypatch):
    """A function that lets training choose as if a GPU had so many free bytes."""

    def set_free(n_bytes: float) -> None:
        machine = lambda: planning.find_machine("L4-24GB")  # noqa: E731
        monkeypatch.setattr(trainer, "find_machine", machine)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(n_bytes), 24 * 10**9))

    return set_free


LARGE, SMALL = 10e9, 12e6  # bytes: for all eight pairs at once, and for two


def test_the_free_memory_chooses_the_micro_batch_and_the_loss_does_not_depend_on_it(
    model, tokenizer, pairs, tmp_path, gpu_with, capsys, base
):
    found = {}
    for name, free, given in (
        ("large", LARGE, {}),
        ("small", SMALL, {"gradient_checkpointing": True}),
    ):
        gpu_with(free)
        log, weights = train_in_a_run(model, tokenizer, pairs, tmp_path / name, base, **given)
        found[name] = log, weights, train_in_a_run.how
        assert f"Chosen for {free / 1e9:.1f} GB of free memory" in "".join(capsys.readouterr())
    (large, one, how), (small, other, less) = found.values()
    assert (how["micro_batch_size"], how["gradient_checkpointing"]) == (8, False)
    assert less["micro_batch_size"] < 8 and less["gradient_checkpointing"]
    for name in ("loss", "loss_dpo", "loss_nll", "grad_norm", "rewards/margins", "logps/chosen"):
        assert small[name][:] == pytest.approx(large[name][:], rel=1e-5, abs=1e-5), name
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_training_resumes_on_a_gpu_with_less_memory(
    model, tokenizer, pairs, tmp_path, gpu_with, often
):
    base, parts = shared_prompt.SharedPromptTrainer, (model, tokenizer, pairs)
    gpu_with(LARGE)
    whole, expected = train_in_a_run(*parts, tmp_path / "whole", base)
    kept = tmp_path / "killed"
    with pytest.raises(Killed):
        train_in_a_run(*parts, kept, base, callbacks=[Kill(3, kept)])
    gpu_with(SMALL)
    log, ours = train_in_a_run(*parts, kept, base)
    assert train_in_a_run.how["micro_batch_size"] == 2 and log["step"][:] == whole["step"][:]
    assert log["loss"][:] == pytest.approx(whole["loss"][:], rel=1e-5, abs=1e-5)
    assert all(torch.allclose(ours[name], expected[name], atol=1e-5) for name in expected)


def test_options_that_are_given_are_not_chosen(model, tokenizer, pairs, tmp_path, gpu_with):
    gpu_with(SMALL)
    base, given = training.IterativeRPOTrainer, {"micro_batch_size": 4}
    train_in_a_run(model, tokenizer, pairs, tmp_path / "one", base, **given)
    assert train_in_a_run.how["micro_batch_size"] == 4
    given |= {"gradient_checkpointing": False}
    train_in_a_run(model, tokenizer, pairs, tmp_path / "both", base, **given)
    assert train_in_a_run.how == given


class Reads(TorchDispatchMode):
    """Counts how often Python reads a number of a tensor, which on a GPU waits for it."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.places.append("".join(traceback.format_stack(limit=8)))
        return function(*args, **(kwargs or {}))


def test_no_micro_batch_waits_for_the_gpu(model, tokenizer, pairs):
    """Logs are read once per optimiser step."""
    found = []

    class Watched(shared_prompt.SharedPromptTrainer):
        def training_step(self, *arguments, **options):
            with Reads() as reads:
                loss = super().training_step(*arguments, **options)
            found.append(reads.places)
            return loss

    settings = {"batch_size": 8, "micro_batch_size": 2, "disable_tqdm": True}
    training.train(model, tokenizer, pairs, trainer=Watched, **settings)
    assert len(found) == 6 and not any(found), found
    args = training._config(model, {"output_dir": "unused"}, "dpo_nll", 8, 2)
    assert not args.logging_nan_inf_filter  # it reads the loss after each of them


# ---- disks


def failing(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["save_pretrained", "checksums"])
def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    model, tokenizer, pairs, tmp_path, monkeypatch, often, capsys, place
):
    """While the checkpoint is written, or between its files."""
    if place == "checksums":
        monkeypatch.setattr(checksums, "write", failing)
    else:
        monkeypatch.setattr(type(model), "save_pretrained", failing)
    log = train(model, tokenizer, pairs, tmp_path / "kept")
    said = "".join(capsys.readouterr())
    assert "No checkpoint could be written (" in said and "No space left on device" in said
    assert len(log) == 3 and not list((tmp_path / "kept").glob("checkpoint-*"))


# ---- signs of a collapse


def test_signs_of_a_collapse_in_a_log_are_named_and_a_healthy_log_is_not():
    def rows(accuracy, reward, n):
        return [{"rewards/accuracies": accuracy, "rewards/chosen": reward}] * n

    healthy = rows(0.8, 0.05, 30)
    assert warnings.of_training(healthy, 30, beta=0.1) == []
    [text] = warnings.of_training(healthy + rows(0.9, -0.3, 10), 40, beta=0.1)
    assert text.startswith("chosen completions lose probability: -3.0 nats")
    [text] = warnings.of_training(healthy + rows(0.3, 0.05, 10), 40, beta=0.1)
    assert text.startswith("rejected gain on chosen: reward accuracy 0.30")
    assert warnings.of_training(rows(0.9, -0.3, 10), 400, beta=0.1) == []  # too early to tell
    assert warnings.of_training([{"nll_chosen": 1.0}] * 40, 40, beta=0.1) == []  # SFT


@pytest.mark.slow
def test_a_collapse_is_named_while_it_happens(model, tokenizer, pairs, tmp_path, capsys):
    """At the step that shows it, not at the end, which a collapse may not reach."""
    told = []

    def stop(text):
        told.append(text)
        raise Killed

    callbacks, settings = [warnings.CollapseWarning(stop)], {"alpha": 0.0, "learning_rate": 1e-2}
    with pytest.raises(Killed):
        settings["num_train_epochs"] = 30
        train(model, tokenizer, pairs, tmp_path / "kept", callbacks=callbacks, **settings)
    assert "chosen completions lose probability" in told[0]
    assert 18 <= int(re.search(r"\(step (\d+)\)", told[0])[1]) < 60
    assert told[0] in "".join(capsys.readouterr())


# ---- probes, loggers, the start as the reference


def test_a_probe_measures_fixed_pairs_while_others_are_trained_on(
    model, tokenizer, pairs, tmp_path
):
    fixed = pairs.select([0, 3])
    texts = list(fixed["prompt_ids"]), list(fixed["chosen_ids"])
    before = logprobs.score(model, tokenizer, *texts)
    probe = Probe(fixed, tokenizer, 2, tmp_path / "kept")
    others = pairs.select(range(4, 11))
    settings = {"num_train_epochs": 5, "batch_size": 8}
    train(model, tokenizer, others, tmp_path / "kept", callbacks=[probe], **settings)
    assert [row["step"] for row in probe.rows] == [0, 2, 4, 5]
    assert probe.rows[0]["logps/chosen"] == pytest.approx(sum(before) / 2, abs=1e-3)
    after = logprobs.score(model, tokenizer, *texts)
    assert probe.rows[-1]["logps/chosen"] == pytest.approx(sum(after) / 2, abs=1e-3)
    assert after != before
    per_token = [s / len(r) for s, r in zip(after, texts[1], strict=True)]
    assert probe.rows[-1]["nll_chosen"] == pytest.approx(-sum(per_token) / 2, abs=1e-4)
    lines = (tmp_path / "probe_log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == probe.rows


def test_the_trainer_of_a_run_logs_where_it_says_and_measures_the_runs_own_pairs(
    model, tokenizer, pairs, tmp_path
):
    settings = {"probe": None, "probe_every": 5, "shard": False, "report_to": "tensorboard"}
    p = SimpleNamespace(**settings, reference="previous")
    engine = SimpleNamespace(trainer=lambda model: None)
    stages = SimpleNamespace(p=p, engine=engine, model=model, tokenizer=tokenizer, history=[pairs])
    options = trainer.options(stages, tmp_path / "iteration_1" / "kept", print)
    assert options["report_to"] == "tensorboard" and options["resume_from_checkpoint"] is None
    assert options["output_dir"] == options["run_name"] == str(tmp_path / "iteration_1" / "logs")
    [probe] = [c for c in options["callbacks"] if isinstance(c, Probe)]
    assert len(probe.pairs) == len(pairs) and probe.every == 5


def test_a_logger_finds_the_training_in_the_folder_that_is_named(model, tokenizer, pairs, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = {"report_to": "tensorboard", "output_dir": str(tmp_path / "logs")}
    log = train(model, tokenizer, pairs, tmp_path / "kept", **logs)
    [events] = tmp_path.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events.parent)).Reload()
    values = [event.value for event in read.Scalars("train/loss_dpo")]
    assert values == pytest.approx(log["loss_dpo"][:], abs=1e-5)


@pytest.mark.parametrize("stored", [False, True], ids=["no adapter", "adapter of --start"])
def test_m0_can_be_the_reference_of_a_later_iteration(
    model, tokenizer, pairs, tmp_path, base, stored
):
    """The trainer scores the reference under M_0 and then starts from M_t."""
    m0 = tmp_path / "m0" if stored else None
    if stored:
        train(model, tokenizer, pairs, tmp_path / "start", base=base, seed=5)
        model.save_pretrained(m0, save_embedding_layers=False)
        models.set_adapter(model, None)
    train(model, tokenizer, pairs, tmp_path / "first", base=base)
    model.save_pretrained(tmp_path / "m1", save_embedding_layers=False)
    m1, expected = adapter_of(model), {}
    for name, folder in (("m1", tmp_path / "m1"), ("m0", m0)):
        models.set_adapter(model, folder)
        texts = list(pairs["prompt_ids"]), list(pairs["chosen_ids"])
        expected[name] = sum(logprobs.score(model, tokenizer, *texts)) / len(pairs)
    models.set_adapter(model, tmp_path / "m1")
    keep = SimpleNamespace(adapter=lambda t: m0)
    engine = SimpleNamespace(use=models.set_adapter)
    stages = SimpleNamespace(keep=keep, model=model, engine=engine)
    referring = trainer.referring_to_start(base, stages)
    settings = {"base": referring, "batch_size": 11, "learning_rate": 1e-9}
    [row] = train(model, tokenizer, pairs, tmp_path / "second", **settings)
    assert row["logps/chosen"] == pytest.approx(expected["m1"], abs=1e-3)
    moved = expected["m1"] - expected["m0"]
    assert abs(moved) > 0.03 and row["rewards/chosen"] == pytest.approx(0.1 * moved, abs=1e-3)
    assert "ref" not in model.peft_config
    ours = adapter_of(model)
    assert all(torch.allclose(ours[name], m1[name], atol=1e-7) for name in m1)
