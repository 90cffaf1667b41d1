"""The loop as a user meets it: a run directory that can be read, resumed, and trusted."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from datasets import load_from_disk

from irpo_utils import UserError, iteration, profiles, report, run_directory, tasks

STAGES = ("evaluation", "samples", "graded", "pairs")
SMOKE = dict(
    n_questions=24,
    n_samples=4,
    k_pairs=2,
    n_eval_questions=20,
    eval_samples=2,
    eval_samples_ends=3,
    learning_rate=1e-4,
    sampling_batch_size=96,
)


def smoke(**changes):
    return profiles.get("smoke", **{**SMOKE, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    iteration.run(smoke(), out, progress=False)
    return out


def results(out: Path) -> dict[str, bytes]:
    """Everything a run computed, without what legitimately differs (times, environment)."""
    kept = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name not in (
            ".lock",
            "timing.csv",
            "environment.json",
            "checksums.json",
            "training_log.jsonl",
            "state.json",
            "summary.json",
            "dataset_info.json",
        ):
            kept[str(file.relative_to(out))] = file.read_bytes()
    for log in sorted(out.rglob("training_log.jsonl")):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        kept[str(log.relative_to(out))] = json.dumps(
            [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        ).encode()
    return kept


def test_run_directory_reads_like_the_algorithm(finished):
    assert json.loads((finished / "profile.json").read_text())["n_samples"] == 4
    assert json.loads((finished / "environment.json").read_text())["versions"]["torch"]
    for t in range(3):
        folder = finished / f"iteration_{t}"
        assert (folder / "adapter" / "adapter_model.safetensors").exists() == (t > 0)
        assert (folder / "training_log.jsonl").exists() == (t > 0)
        assert [(folder / stage).exists() for stage in STAGES] == [True] + [t < 2] * 3
    assert not list(finished.rglob("*.partial"))


def test_what_passes_between_the_stages_has_the_documented_columns(finished):
    folder = finished / "iteration_1"
    samples = {
        "id",
        "sample",
        "prompt",
        "completion",
        "prompt_ids",
        "completion_ids",
        "n_tokens",
        "finished",
        "logprob",
        "answer",
    }
    assert samples <= set(load_from_disk(str(folder / "samples")).column_names)
    assert samples | {"extracted", "correct", "reason"} <= set(
        load_from_disk(str(folder / "graded")).column_names
    )
    assert {
        "prompt",
        "chosen",
        "rejected",
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "id",
        "chosen_sample",
        "rejected_sample",
    } <= set(load_from_disk(str(folder / "pairs")).column_names)
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert {
        "step",
        "loss",
        "loss_dpo",
        "loss_nll",
        "logps_chosen",
        "logps_rejected",
        "nll_chosen",
        "margin",
        "accuracy",
        "grad_norm",
        "tokens",
        "seconds",
    } <= set(log[0])


def test_metrics_table(finished):
    table = pandas.read_csv(finished / "metrics.csv")
    assert list(table.columns) == [
        "method",
        "seed",
        "iteration",
        "split",
        "metric",
        "k",
        "value",
        "low",
        "high",
        "n",
    ]
    assert (
        set(table.method) == {"irpo"}
        and set(table.iteration) == {0, 1, 2}
        and set(table.split) == {"test"}
    )
    greedy = table[table.metric == "greedy"]
    assert (
        len(greedy) == 3
        and (greedy.low <= greedy.value).all()
        and (greedy.value <= greedy.high).all()
        and set(greedy.n) == {20}
    )
    assert {"sampled", "majority", "pass_at_k", "mean_tokens", "pairs_used"} <= set(table.metric)
    warning = table[table.iteration > 0]
    assert set(warning[warning.metric == "kl_to_previous"].iteration) == {1, 2}
    assert set(warning[warning.metric == "chosen_logp_per_token"].iteration) == {1, 2}
    assert set(table[(table.metric == "majority") & (table.iteration == 1)].k) == {2}
    assert set(table[(table.metric == "majority") & (table.iteration != 1)].k) == {3}
    timing = pandas.read_csv(finished / "timing.csv")
    assert set(timing.stage) == {"adapter", *STAGES} and (timing.seconds >= 0).all()


def test_kl_is_measured_on_what_the_new_model_says(finished):
    """Recomputed from the adapters alone, with fewer completions."""
    from irpo_utils import models, sampling, tasks

    task, profile = tasks.get("word_problems"), smoke()
    model, tokenizer = models.load("seed")
    models.set_adapter(model, finished / "iteration_1" / "adapter")
    drawn = sampling.sample(
        model,
        tokenizer,
        task.load("test").select(range(20)),
        task,
        n=1,
        max_new_tokens=profile.max_new_tokens,
        seed=15,
        progress=False,
    )
    new = models.score(model, tokenizer, drawn["prompt_ids"][:], drawn["completion_ids"][:])
    models.set_adapter(model, None)
    old = models.score(model, tokenizer, drawn["prompt_ids"][:], drawn["completion_ids"][:])
    table = pandas.read_csv(finished / "metrics.csv")
    written = table[(table.metric == "kl_to_previous") & (table.iteration == 1)].value.iloc[0]
    assert written == pytest.approx(sum(a - b for a, b in zip(new, old)) / len(new), abs=1e-3)


def test_same_seed_same_numbers_other_seed_others(finished, tmp_path):
    iteration.run(smoke(), tmp_path / "again", progress=False)
    assert results(tmp_path / "again") == results(finished)
    iteration.run(smoke(seed=1, iterations=1), tmp_path / "other", progress=False)
    assert (tmp_path / "other/iteration_0/samples/data-00000-of-00001.arrow").read_bytes() != (
        finished / "iteration_0/samples/data-00000-of-00001.arrow"
    ).read_bytes()


def test_a_finished_run_does_nothing_again(finished):
    made_anew = (
        "metrics.csv",
        "timing.csv",
        "metrics.json",
        ".lock",
    )  # cheap tables, from what is there
    before = {
        f: f.stat().st_mtime_ns
        for f in finished.rglob("*")
        if f.is_file() and f.name not in made_anew
    }
    iteration.run(smoke(), finished, progress=False)
    assert {f: f.stat().st_mtime_ns for f in before} == before


@pytest.mark.parametrize(
    "stage, t",
    [
        ("evaluation", 0),
        ("samples", 0),
        ("graded", 0),
        ("pairs", 0),
        ("adapter", 1),
        ("evaluation", 2),
    ],
)
def test_killed_in_a_stage_and_started_again_it_ends_with_the_same_metrics(
    finished, tmp_path, stage, t
):
    """SIGKILL while the artefact is being written: the moment in which most could be lost."""
    out = tmp_path / "killed"
    program = f"""
import os, signal
from irpo_utils import iteration, profiles
real = iteration.RunDirectory.stage
def stage(self, t, name, make, save, **options):
    def save_half(content, folder):
        save(content, folder)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, t, name, make, save_half if (t, name) == ({t}, {stage!r}) else save, **options)
iteration.RunDirectory.stage = stage
iteration.run(profiles.get("smoke", **{SMOKE!r}), {str(out)!r}, progress=False)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / f"iteration_{t}" / stage).exists()
    iteration.run(smoke(), out, progress=False)
    assert results(out) == results(finished)


@pytest.mark.parametrize("stage, blocks", [("samples", 4), ("evaluation", 4)])
def test_what_was_drawn_before_a_kill_is_not_drawn_again(tmp_path, monkeypatch, stage, blocks):
    """Six questions a block; killed after the second of four, it goes on with the third and ends with the same numbers."""
    monkeypatch.setattr(iteration, "BLOCK", {"samples": 24, "evaluation": 20}[stage])
    whole = tmp_path / "whole"
    settings = smoke(iterations=1)
    iteration.run(settings, whole, progress=False)

    class Killed(BaseException):
        pass

    drawn, killed = [], tmp_path / "killed"
    name = {"samples": "sample", "evaluation": "answers"}[stage]
    module = {"samples": iteration.sampling, "evaluation": iteration.evaluation}[stage]
    real = getattr(module, name)

    def counted(model, tokenizer, questions, *rest, **options):
        if (
            "batch_size" in options and len(questions) <= 6 and not rest
        ):  # not what an evaluation draws itself
            drawn.append(questions["id"][:])
            if len(drawn) == 3 and not killed.joinpath("gone").exists():
                raise Killed
        return real(model, tokenizer, questions, *rest, **options)

    monkeypatch.setattr(module, name, counted)
    with pytest.raises(Killed):
        iteration.run(settings, killed, progress=False)
    killed.joinpath("gone").touch()
    before = len(drawn)
    iteration.run(settings, killed, progress=False)
    killed.joinpath("gone").unlink()
    again = [ids for ids in drawn[before:]]
    assert (
        drawn[0] not in again[: blocks - 2]
        and drawn[1] not in again[: blocks - 2]
        and again[0] == drawn[2]
    )
    assert results(killed) == results(whole) and not list(killed.rglob("*unfinished*"))


def test_an_artefact_made_from_another_one_is_made_again(finished, tmp_path, capsys):
    """A sound adapter of another run in the place of M_1: nothing that was made with the old one may stand beside it."""
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, out)
    iteration.run(smoke(seed=1, iterations=1), other, progress=False)
    shutil.rmtree(out / "iteration_1" / "adapter")
    shutil.copytree(other / "iteration_1" / "adapter", out / "iteration_1" / "adapter")
    iteration.run(smoke(), out, progress=False)
    said = capsys.readouterr()
    assert "iteration_1/adapter was made from another iteration_0/pairs" in said.out + said.err
    assert results(out) == results(finished)
    shutil.rmtree(out / "iteration_1" / "pairs")
    shutil.copytree(
        finished / "iteration_0" / "pairs", out / "iteration_1" / "pairs"
    )  # the pairs of another model
    iteration.run(smoke(), out, progress=False)
    assert results(out) == results(finished)


def test_an_artefact_of_other_settings_is_made_again(finished, tmp_path, capsys):
    """Put there by hand: samples of another seed, and an adapter that another NLL weight made of the very same pairs."""
    out = shutil.copytree(finished, tmp_path / "run")
    iteration.run(smoke(seed=1, iterations=1), tmp_path / "samples", progress=False)
    iteration.run(smoke(alpha=3.0, iterations=1), tmp_path / "adapter", progress=False)
    for name, t in (("samples", 0), ("adapter", 1)):
        shutil.rmtree(out / f"iteration_{t}" / name)
        shutil.copytree(tmp_path / name / f"iteration_{t}" / name, out / f"iteration_{t}" / name)
    iteration.run(smoke(), out, progress=False)
    said = "".join(capsys.readouterr())
    assert all(
        f"{name} was made from another set of settings than there is now" in said
        for name in ("samples", "adapter")
    )
    assert results(out) == results(finished)


def test_questions_that_changed_behind_their_name_are_refused(tmp_path):
    rows = [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)}
        for a in range(20)
        for b in range(20)
    ]
    file, out = tmp_path / "mine.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = smoke(task="jsonl", data=str(file), iterations=0)
    iteration.run(settings, out, progress=False)
    iteration.run(settings, out, progress=False)
    rows[0]["answer"] = "7"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="questions of .* changed since it was begun.*--data"):
        iteration.run(settings, out, progress=False)
    rows[0]["answer"] = "0"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows[::-1])
    )  # which ones are taken depends on their order
    with pytest.raises(UserError, match="questions of .* changed since it was begun.*--data"):
        iteration.run(settings, out, progress=False)


def test_a_prompt_that_is_too_long_is_found_before_anything_is_made(tmp_path):
    easy = [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)}
        for a in range(20)
        for b in range(20)
    ]
    for split, part in (("train", easy[:30]), ("validation", easy[30:60]), ("test", easy[60:90])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = smoke(task="jsonl", data=str(tmp_path), n_questions=24, iterations=1)
    order = tasks.get("jsonl").load("train", str(tmp_path)).shuffle(seed=settings.seed)["question"]
    for place, refused in ((23, True), (24, False)):  # the last that is asked, and one that is not
        rows = [
            row
            | {"question": row["question"] + " Really?" * 900 * (row["question"] == order[place])}
            for row in easy[:30]
        ]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = ""
        try:
            iteration.run(settings, tmp_path / f"run_{place}", progress=False)
        except UserError as error:
            message = str(error)
        assert bool(re.search("longest prompt has .* does not fit", message)) == refused
        assert (tmp_path / f"run_{place}" / "iteration_0").exists() != refused


def test_what_a_start_has_learnt_is_compared_with_the_evaluation_questions(finished, tmp_path):
    """A run that started from another which was trained on its test questions would have an accuracy of its memory."""
    test = list(tasks.get("word_problems").load("test").select(range(20)))
    others = [
        {"question": f"What is {a} + 1?", "answer": str(a + 1), "solution": "x"} for a in range(20)
    ]
    for name, parts in {
        "first": (test, others, others[:5]),
        "second": (others, test[10:], test),
    }.items():
        (tmp_path / name).mkdir()
        for split, part in zip(("train", "validation", "test"), parts):
            (tmp_path / name / f"{split}.jsonl").write_text(
                "".join(
                    json.dumps({k: row[k] for k in ("question", "answer", "solution")}) + "\n"
                    for row in part
                )
            )
    start = shutil.copytree(finished, tmp_path / "start")
    profile = json.loads((start / "profile.json").read_text()) | {
        "task": "jsonl",
        "data": str(tmp_path / "first"),
    }
    (start / "profile.json").write_text(json.dumps(profile))
    for place in (start, start / "iteration_1" / "adapter"):
        with pytest.raises(UserError, match="20 of 20 evaluation questions are training questions"):
            iteration.run(
                smoke(task="jsonl", data=str(tmp_path / "second"), start=str(place)),
                tmp_path / "run",
                progress=False,
            )
    assert not (tmp_path / "run").exists()


def test_a_start_with_scales_of_its_own_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished / "iteration_2" / "adapter", tmp_path / "adapter")
    (folder / "checksums.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, name in (
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"made with {name}"):
            iteration.run(smoke(start=str(folder)), tmp_path / "run", progress=False)


def test_a_probe_that_is_nowhere_is_found_at_once(tmp_path):
    with pytest.raises(UserError, match="--probe .*nowhere is no folder of pairs"):
        iteration.run(smoke(probe=str(tmp_path / "nowhere")), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_record_says_on_which_machines_a_run_was_made(finished, tmp_path, monkeypatch):
    out, here = (
        shutil.copytree(finished, tmp_path / "run"),
        json.loads((finished / "environment.json").read_text()),
    )
    for card, damaged in (
        ([], True),
        (["another card"], False),
        (["another card"], True),
        (["another card"], True),
    ):
        monkeypatch.setattr(
            run_directory, "environment", lambda card=card: here | {"gpus": here["gpus"] + card}
        )
        if damaged:  # something is left to do
            shutil.rmtree(out / "iteration_2" / "evaluation")
        iteration.run(smoke(), out, progress=False)
        assert ("gone_on_with" in json.loads((out / "environment.json").read_text())) == bool(
            card and damaged
        )
    record = json.loads((out / "environment.json").read_text())
    assert record["gpus"] == here["gpus"] and [
        other["gpus"] for other in record["gone_on_with"]
    ] == [[*here["gpus"], "another card"]]


def test_a_hub_model_is_loaded_at_the_commit_that_the_run_was_begun_with(monkeypatch):
    from irpo_utils import models

    asked = []
    monkeypatch.setattr(models, "load", lambda name, **options: asked.append(options["revision"]))
    for known in (None, "a" * 40, "b" * 64):  # nothing known, a commit, a folder's fingerprint
        iteration.load_model(smoke(), known)
    assert asked == [None, "a" * 40, None]


def test_another_model_behind_the_same_name_is_refused(tmp_path):
    from irpo_utils import models

    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(models.SEED_MODEL, folder)
    iteration.run(smoke(model=str(folder), iterations=0), out, progress=False)
    weights, template = next(folder.glob("*.safetensors")), next(folder.glob("*.jinja"))
    for file, change in (
        (weights, lambda: flip(weights)),
        (template, lambda: template.write_text(template.read_text() + " ")),
    ):
        before = file.read_bytes()
        change()
        with pytest.raises(UserError, match="model of .* changed since it was begun"):
            iteration.run(smoke(model=str(folder), iterations=0), out, progress=False)
        file.write_bytes(before)
    iteration.run(smoke(model=str(folder), iterations=0), out, progress=False)


def test_a_damaged_training_log_is_put_back(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    log = out / "iteration_1" / "training_log.jsonl"
    log.write_text(log.read_text()[:-40])
    iteration.run(smoke(), out, progress=False)
    assert log.read_bytes() == (finished / "iteration_1" / "training_log.jsonl").read_bytes()


def test_a_damaged_artefact_is_made_again_and_never_trusted(finished, tmp_path, capsys):
    import shutil

    out = shutil.copytree(finished, tmp_path / "damaged")
    victim = out / "iteration_1" / "adapter" / "adapter_model.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    (out / "iteration_0" / "metrics.json").write_text('[{"metric": "gre')
    iteration.run(smoke(), out, progress=False)
    assert "adapter is damaged" in capsys.readouterr().out
    assert results(out) == results(finished)


@pytest.mark.parametrize("stage", ["evaluation", "samples", "pairs"])
@pytest.mark.parametrize("text", ['{"seconds": 1.0, "tok', "[]", '{"sha256": {}}'])
def test_checksums_that_cannot_be_read_are_those_of_a_damaged_stage(
    finished, tmp_path, stage, text
):
    out = shutil.copytree(finished, tmp_path / "damaged")
    (out / "iteration_0" / stage / "checksums.json").write_text(text)
    iteration.run(smoke(), out, progress=False)
    assert results(out) == results(finished)


def test_other_settings_over_an_old_directory_are_refused_by_name(finished):
    with pytest.raises(UserError, match=r"alpha \(1.0 there, 2.0 now\).*seed"):
        iteration.run(smoke(alpha=2.0, seed=5), finished, progress=False)


def test_settings_that_only_cost_memory_may_change_on_the_way(finished, tmp_path):
    """Out of memory in the third hour: the same command with a smaller batch goes on."""
    import shutil

    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "iteration_2")
    iteration.run(smoke(micro_batch_size=4, sampling_batch_size=16), out, progress=False)
    assert json.loads((out / "profile.json").read_text())["micro_batch_size"] == 4
    table = [
        pandas.read_csv(run / "metrics.csv").set_index(["iteration", "metric", "k"]).value
        for run in (finished, out)
    ]
    assert (table[0] - table[1]).abs().max() < 0.1


def test_a_run_of_an_older_version_with_fewer_settings_is_gone_on_with(finished, tmp_path):
    import shutil

    out = shutil.copytree(finished, tmp_path / "out")
    settings = json.loads((out / "profile.json").read_text())
    (out / "profile.json").write_text(
        json.dumps(
            {key: value for key, value in settings.items() if key not in ("method", "start")}
        )
    )
    before = results(out)
    iteration.run(smoke(), out, progress=False)
    assert results(out) == before


def test_a_clock_that_is_set_back_changes_nothing(finished, tmp_path, monkeypatch):
    """Every look at the clock is an hour before the last one, over a stop and a resumption; files get old dates as well."""
    hours = iter(range(10**9))
    out, settings = tmp_path / "run", smoke(iterations=1)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 1.7e9 - 3600 * next(hours))
        iteration.run(settings, out, progress=False)
    for file in out.rglob("*"):
        os.utime(file, (0, 0))
    shutil.rmtree(out / "iteration_1" / "evaluation")
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
        iteration.run(settings, out, progress=False)
    assert (pandas.read_csv(out / "timing.csv").seconds >= 0).all()
    again = results(out)
    same = [
        name
        for name in again
        if name.startswith(("iteration_0/samples", "iteration_0/pairs", "iteration_1/adapter"))
    ]
    assert len(same) > 3 and all(again[name] == results(finished)[name] for name in same)


def test_a_start_from_sft_on_gold_solutions(finished, tmp_path):
    """The start is copied, so that the run is whole without it, and M_1 is trained from there."""
    import shutil

    sft = tmp_path / "sft"
    iteration.run(smoke(method="sft_gold", iterations=1, learning_rate=3e-3), sft, progress=False)
    pairs = load_from_disk(str(sft / "iteration_0" / "pairs"))
    assert (
        set(pairs["chosen_sample"]) == {-1}
        and len(pairs) == 24
        and all(row["chosen_ids"][-1] == row["rejected_ids"][0] for row in pairs)
    )
    assert not (sft / "iteration_0" / "samples").exists()
    assert json.loads((sft / "profile.json").read_text())["dpo_weight"] == 0.0
    table = pandas.read_csv(sft / "metrics.csv")
    assert set(table.method) == {"sft_gold"}

    out = tmp_path / "out"
    iteration.run(smoke(start=str(sft), iterations=1), out, progress=False)
    shutil.rmtree(sft)
    iteration.run(
        smoke(start=str(sft), iterations=1), out, progress=False
    )  # nothing of it is needed any more
    values = {
        name: pandas.read_csv(run / "metrics.csv")
        .query("metric == 'mean_tokens'")
        .set_index("iteration")
        .value
        for name, run in (("started", out), ("plain", finished))
    }
    assert (
        values["started"][0]
        == table.query("metric == 'mean_tokens'").set_index("iteration").value[1]
    )
    assert values["started"][0] != values["plain"][0]
    log = [
        json.loads(line)
        for line in (out / "iteration_1" / "training_log.jsonl").read_text().splitlines()
    ]
    assert log[0]["loss_dpo"] == pytest.approx(0.6931, abs=1e-4)  # the reference is the start


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(start="nowhere"), "neither an adapter folder nor a run directory"),
        (dict(start="{run}", lora_r=8), "made with lora_r 16, this run has 8"),
        (dict(method="nonsense"), "no method 'nonsense'"),
        (dict(start="{run}", iterations=1, model="smollm2-135m"), "made with model 'seed'"),
    ],
)
def test_a_start_or_method_that_cannot_be(finished, tmp_path, changes, message):
    changes = {
        key: value.format(run=finished) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        iteration.run(smoke(**changes), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda folder: flip(folder / "adapter_model.safetensors"),
            "damaged: its checksums do not match",
        ),
        (
            lambda folder: (
                (folder / "checksums.json").unlink(),
                flip_start(folder / "adapter_model.safetensors"),
            ),
            "unreadable",
        ),
        (
            lambda folder: (
                (folder / "checksums.json").unlink(),
                (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            ),
            "adapter_model.safetensors is missing",
        ),
    ],
)
def test_a_damaged_start_is_refused_before_anything_is_made(finished, tmp_path, damage, message):
    folder = shutil.copytree(finished / "iteration_2" / "adapter", tmp_path / "adapter")
    damage(folder)
    with pytest.raises(UserError, match=message):
        iteration.run(smoke(start=str(folder), iterations=1), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "iteration_0").exists()


def flip_start(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def test_sft_needs_gold_solutions(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"question": f"What is {i} + {i}?", "answer": str(2 * i)}) for i in range(40)
        )
    )
    with pytest.raises(UserError, match="no gold solutions"):
        iteration.run(
            smoke(method="sft_gold", task="jsonl", data=str(file), iterations=1),
            tmp_path / "out",
            progress=False,
        )


def test_two_runs_on_one_directory(finished):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from filelock import FileLock\n"
            f"with FileLock({str(finished / '.lock')!r}): print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match="in use by another run"):
            iteration.run(smoke(), finished, progress=False)
    finally:
        holder.kill()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    import errno

    from datasets import DatasetDict

    def full(self, folder, **kwargs):
        (Path(folder) / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(DatasetDict, "save_to_disk", full)
        with pytest.raises(UserError, match="No space left on device.*goes on where it stood"):
            iteration.run(smoke(iterations=1), tmp_path / "out", progress=False)
    assert not [file for file in (tmp_path / "out" / "iteration_0").rglob("*") if file.is_file()]
    iteration.run(smoke(iterations=1), tmp_path / "out", progress=False)


def test_a_disk_that_fills_while_the_adapter_is_saved(finished, tmp_path, monkeypatch):
    """safetensors reports it in an error of its own, which is no OSError."""
    import shutil

    from safetensors import SafetensorError

    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "iteration_2")

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as m:
        m.setattr("peft.peft_model.safe_save_file", full)
        with pytest.raises(UserError, match="adapter could not be written.*No space left"):
            iteration.run(smoke(), out, progress=False)
    left = {
        path.suffix for path in (out / "iteration_2").glob(".adapter*")
    }  # of the training, but no half of an adapter
    assert left <= {".unfinished"} and not (out / "iteration_2" / "adapter").exists()
    iteration.run(smoke(), out, progress=False)
    assert results(out) == results(finished)


def test_another_process_does_not_touch_the_settings_of_a_run_in_progress(tmp_path):
    from filelock import FileLock

    directory = iteration.RunDirectory(tmp_path, smoke())
    directory.check_profile()
    before = (tmp_path / "profile.json").read_text()
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="in use by another run"):
        iteration.run(smoke(alpha=7.0), tmp_path, progress=False)
    assert (tmp_path / "profile.json").read_text() == before


def test_iterations_without_their_settings_are_not_gone_on_with(finished, tmp_path):
    import shutil

    out = shutil.copytree(finished, tmp_path / "out")
    (out / "profile.json").unlink()
    with pytest.raises(UserError, match="profile.json is missing or damaged"):
        iteration.run(smoke(), out, progress=False)


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        iteration.run(smoke(), tmp_path / "file" / "out", progress=False)

    def read_only(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        iteration.run(smoke(), tmp_path / "out", progress=False)


def test_fresh_questions_are_others_in_every_iteration(tmp_path):
    iteration.run(smoke(fresh_questions=True), tmp_path / "fresh", progress=False)
    first, second = (
        set(load_from_disk(str(tmp_path / "fresh" / f"iteration_{t}" / "samples"))["id"])
        for t in (0, 1)
    )
    assert len(first) == len(second) == 24 and not first & second


def test_gold_winners_and_a_cap_on_pairs(tmp_path):
    iteration.run(smoke(gold=True, max_pairs=10, iterations=1), tmp_path / "gold", progress=False)
    pairs = load_from_disk(str(tmp_path / "gold/iteration_0/pairs"))
    counts = json.loads((tmp_path / "gold/iteration_0/pairs/counts.json").read_text())
    assert len(pairs) == counts["pairs"] == 10 and counts["all_wrong"] == 0
    assert (
        counts["used"] == len(set(pairs["id"]))
        and counts["gold_winners"] == pairs["chosen_sample"][:].count(-1) > 0
    )


def test_collect_joins_seeds_and_refuses_other_settings(finished, tmp_path):
    iteration.run(smoke(seed=1), tmp_path / "one", progress=False)
    metrics, means, record = iteration.collect([finished, tmp_path / "one"])
    other = shutil.copytree(tmp_path / "one", tmp_path / "other")
    inputs = json.loads((other / "inputs.json").read_text())
    (other / "inputs.json").write_text(json.dumps(inputs | {"evaluation questions": "0" * 64}))
    with pytest.raises(UserError, match="other had other evaluation questions than"):
        iteration.collect([finished, other])
    assert (
        set(metrics.seed) == {0, 1}
        and set(means.iteration) == {0, 1, 2}
        and record["seeds"] == [0, 1]
    )
    greedy = metrics[(metrics.metric == "greedy") & (metrics.iteration == 2)].value
    mean = means[(means.metric == "greedy") & (means.iteration == 2)].iloc[0]
    assert (
        mean.value == pytest.approx(greedy.mean())
        and mean.low <= mean.value <= mean.high
        and mean.seeds == 2
    )
    first = metrics[(metrics.metric == "greedy") & (metrics.iteration == 0)].value
    gain = means[means.metric == "greedy_gain_over_M0"].iloc[0]
    assert (
        gain.iteration == 2
        and gain.value == pytest.approx(greedy.mean() - first.mean())
        and gain.low <= gain.value <= gain.high
    )
    iteration.run(smoke(seed=2, beta=0.2, iterations=1), tmp_path / "two", progress=False)
    with pytest.raises(UserError, match="differ in more than their seed"):
        iteration.collect([finished, tmp_path / "two"])


def flip(file: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: flip(run / "iteration_2/evaluation/greedy/data-00000-of-00001.arrow"),
        lambda run: shutil.rmtree(run / "iteration_1/adapter"),  # it was about to be made again
        lambda run: (run / "iteration_2/metrics.json").write_text("["),
        lambda run: (run / "metrics.csv").write_text(
            "".join((run / "metrics.csv").read_text().splitlines(True)[:20])
        ),
        lambda run: shutil.copytree(
            run / "iteration_2/adapter", run / "iteration_1/adapter", dirs_exist_ok=True
        ),
    ],
)
def test_a_run_that_is_not_whole_is_not_drawn_and_no_result(finished, tmp_path, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    assert report.is_over(run)
    damage(run)
    assert not report.is_over(run)
    with pytest.raises(UserError, match="not finished, or something in it is damaged.*same --out"):
        iteration.collect([run])


def test_lengths_that_run_off_are_named(finished):
    loop = iteration._Loop.__new__(iteration._Loop)
    loop.directory = run_directory.RunDirectory(finished, smoke())
    before = {row["metric"]: row["value"] for row in loop.directory.metrics([0])}
    now = {
        **before,
        "kl_to_previous": 0.1,
        "truncated_rate": 0.9,
        "sampled": before["sampled"] - 0.1,
    }
    named = loop._running_off(1, now)
    assert (
        len(named) == 2
        and "length is running off: 90% of the completions of M_1" in named[0]
        and "accuracy fell" in named[1]
    )
    assert loop._running_off(1, {**now, **before, "kl_to_previous": 9.0})[0].startswith(
        "a long step: KL to M_0 is 9.0"
    )
    assert (
        loop._running_off(1, {**before, "kl_to_previous": 0.1}) == [] == loop._running_off(0, now)
    )


def test_a_collapse_is_on_the_screen_and_in_the_run_directory(tmp_path, capsys):
    iteration.run(
        smoke(iterations=1, learning_rate=1e-2, alpha=0.0, batch_size=1),
        tmp_path / "run",
        progress=False,
    )
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/iteration_1/warnings.jsonl").read_text().splitlines()
    ]
    assert {"training", "evaluation"} == {row["stage"] for row in rows}
    assert any(row["warning"].startswith("winners lose probability") for row in rows)
    said = "".join(capsys.readouterr())
    assert all(row["warning"] in said for row in rows)


def test_evaluate_run_again_asks_as_the_run_did(tmp_path, monkeypatch):
    import pandas

    iteration.run(smoke(method="few_shot", n_eval_questions=None), tmp_path / "run", progress=False)
    text = iteration.evaluate_run(tmp_path / "run", k=2)
    again = (
        pandas.read_csv(tmp_path / "run/evaluations/word_problems_test.csv")
        .set_index(["metric", "k"])
        .value
    )
    first = pandas.read_csv(tmp_path / "run/metrics.csv").set_index(["metric", "k"]).value
    for metric in ("greedy", "greedy_mean_tokens"):
        assert again[metric, 1] == first[metric, 1]  # with the worked examples, and not zero-shot
    assert again.index.is_unique and "against" not in text


def test_evaluate_keeps_to_the_model_of_the_run_and_looks_for_everything_first(finished, tmp_path):
    from irpo_utils import models

    folder, out = shutil.copytree(models.SEED_MODEL, tmp_path / "model"), tmp_path / "run"
    iteration.run(smoke(model=str(folder), iterations=0), out, progress=False)
    flip(next(folder.glob("*.safetensors")))
    with pytest.raises(UserError, match="is not the one any more with which"):
        iteration.evaluate_run(out, k=1)
    half = shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(half / "iteration_2" / "adapter")
    with pytest.raises(UserError, match="iteration_2/adapter is missing or damaged"):
        iteration.evaluate_run(half, split="validation", k=1, iterations=[0, 2])
    assert not (half / "evaluations").exists()


def test_evaluate_needs_the_training_questions_of_the_run(tmp_path):
    rows = [
        {"id": f"{a} {b}", "question": f"What is {a} + {b}?", "answer": str(a + b)}
        for a in range(20)
        for b in range(20)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    iteration.run(
        smoke(task="jsonl", data=str(file), iterations=0), tmp_path / "run", progress=False
    )
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows[::-1])
    )  # another order is no other set
    assert "greedy" in iteration.evaluate_run(tmp_path / "run", k=1)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:300]))
    with pytest.raises(
        UserError, match="are not the ones any more that it was trained on.*--allow-overlap"
    ):
        iteration.evaluate_run(tmp_path / "run", k=1)


def test_grpo_in_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(iteration.processes, "count", lambda: 2)
    monkeypatch.setattr(iteration.processes, "wait", lambda: None)
    with pytest.raises(UserError, match="grpo compares .* in one process.*without a launcher"):
        iteration.run(smoke(method="grpo"), tmp_path / "run", progress=False)


def test_evaluate_that_is_interrupted_leaves_what_it_has(finished, tmp_path, monkeypatch):
    from irpo_utils import evaluation

    evaluate, done = evaluation.evaluate, []

    def interrupted(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(evaluate(*arguments, **options))
        return done[0]

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        iteration.evaluate_run(finished, split="validation", k=1, out=tmp_path)
    assert set(pandas.read_csv(tmp_path / "word_problems_validation.csv").iteration) == {0}


def test_evaluate_run_again_with_more_samples(finished):
    text = iteration.evaluate_run(finished, split="validation", k=4)
    table = pandas.read_csv(finished / "evaluations" / "word_problems_validation.csv")
    assert set(table.iteration) == {0, 2} and "greedy" in text and "M_2 against M_0" in text


def test_evaluating_on_training_questions_is_refused_unless_allowed(finished, tmp_path):
    with pytest.raises(UserError, match="2400 of 2400 evaluation questions are training questions"):
        iteration.evaluate_run(finished, split="train")
    memory = tmp_path / "memory.jsonl"
    rows = tasks.get("word_problems").load("train").select(range(3))
    memory.write_text(
        "".join(
            json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n"
            for row in rows
        )
    )
    with pytest.raises(UserError, match="are training questions"):
        iteration.evaluate_run(finished, "jsonl", str(memory), "train")
    text = iteration.evaluate_run(
        finished, "jsonl", str(memory), "train", [0], 1, tmp_path / "out", allow_overlap=True
    )
    assert "greedy" in text


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(profiles.Profile)])
def test_every_field_of_a_profile_is_documented(field):
    [f] = [f for f in dataclasses.fields(profiles.Profile) if f.name == field]
    assert len(f.metadata["help"]) > 5
