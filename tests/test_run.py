"""A run as a user meets it: a run directory that can be read, resumed and trusted."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from datasets import DatasetDict, load_from_disk
from filelock import FileLock

from irpo_utils import (
    UserError,
    evaluation,
    iteration,
    logprobs,
    methods,
    models,
    profiles,
    sampling,
    tasks,
    training,
)
from irpo_utils.engines import Engine, plain
from irpo_utils.ops import environment, run_directory, storage, trainer, warnings
from irpo_utils.ops import plan as planning
from irpo_utils.ops import run as runs
from studies import baselines, evaluate_again, finished_runs, grpo, stopping  # noqa: F401
from studies import probe as probes

SHIPPED = Path(__file__).parent.parent / "notebooks" / "shipped_run"
STAGES = ("evaluation", "samples", "graded", "pairs")
SMOKE = {
    "n_questions": 16,
    "n_samples": 4,
    "k_pairs": 2,
    "n_eval_questions": 10,
    "eval_samples": 2,
    "eval_samples_ends": 3,
    "learning_rate": 1e-4,
    "batch_size": 4,
    "sampling_batch_size": 64,
}


def smoke(**changes):
    return profiles.get("smoke", **SMOKE | changes)


def run(profile, out):
    return runs.run(profile, out, progress=False)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of two iterations, which no test changes."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    run(smoke(), out)
    return out


@pytest.fixture()
def finished(unbroken, tmp_path):
    """A copy of it."""
    return shutil.copytree(unbroken, tmp_path / "finished")


def results(out: Path) -> dict[str, bytes]:
    """Everything that a run computed, without what differs each time (seconds, environment)."""
    differing = (
        ".lock timing.csv environment.json checksums.json training_log.jsonl state.json "
        "dataset_info.json"
    ).split()
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.name not in differing]
    kept = {str(file.relative_to(out)): file.read_bytes() for file in files}
    for log in sorted(out.rglob("training_log.jsonl")):
        rows = [row | {"seconds": 0} for row in read_log(log)]
        kept[str(log.relative_to(out))] = json.dumps(rows).encode()
    return kept


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(n: int, first: int = 0) -> list[dict]:
    """Questions that word_problems does not have."""
    numbers = range(first, first + n)
    return [{"id": f"{i}", "question": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in numbers]


def stories(split: str, n: int) -> list[dict]:
    """Questions of word_problems as rows of a user's file."""
    names, rows = ("question", "answer", "solution"), tasks.get("word_problems").load(split)
    return [{name: row[name] for name in names} for row in rows.select(range(n))]


def folder_of_splits(folder: Path, train, validation, test) -> str:
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return str(folder)


def flip(file: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def change_record(artefact: Path, **changes) -> None:
    file = artefact / "checksums.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- what a run directory says


def test_a_run_directory_reads_like_the_algorithm(unbroken):
    assert json.loads((unbroken / "profile.json").read_text())["n_samples"] == 4
    record = json.loads((unbroken / "environment.json").read_text())
    assert record["versions"]["torch"] and record["dtype"] == "float32"
    assert json.loads((unbroken / "contamination.json").read_text())["normalised"] == 0
    for t in range(3):
        folder = unbroken / f"iteration_{t}"
        assert (folder / "adapter" / "adapter_model.safetensors").exists() == (t > 0)
        assert (folder / "training_log.jsonl").exists() == (t > 0)
        assert [(folder / stage).exists() for stage in STAGES] == [True] + [t < 2] * 3
    left = [path.name for path in unbroken.rglob(".*") if path.name != ".lock"]
    assert not left


def test_the_metrics_have_intervals_and_the_numbers_that_announce_a_collapse(unbroken):
    table = pandas.read_csv(unbroken / "metrics.csv")
    columns = "method seed iteration split metric k value low high n".split()
    assert list(table.columns) == columns and set(table.iteration) == {0, 1, 2}
    greedy = table[table.metric == "greedy"]
    assert len(greedy) == 3 and set(greedy.n) == {10}
    assert (greedy.low <= greedy.value).all() and (greedy.value <= greedy.high).all()
    assert {"sampled", "majority", "pass_at_k", "mean_tokens", "pairs_used"} <= set(table.metric)
    for metric in ("kl_to_previous", "chosen_logp_per_token", "rejected_logp_per_token_before"):
        assert set(table[table.metric == metric].iteration) == {1, 2}
    assert set(table[(table.metric == "majority") & (table.iteration == 1)].k) == {2}
    assert set(table[(table.metric == "majority") & (table.iteration != 1)].k) == {3}
    assert not table.duplicated(["iteration", "metric", "k"]).any()
    timing = pandas.read_csv(unbroken / "timing.csv")
    assert {"adapter", *STAGES} <= set(timing.stage) and (timing.seconds >= 0).all()
    assert timing[timing.stage.isin(["samples", "adapter"])].tokens.notna().all()


def test_the_kl_is_measured_on_completions_of_the_new_model(unbroken):
    """Computed again from the adapter alone."""
    task = tasks.get("word_problems")
    model, tokenizer = models.load("seed")
    models.set_adapter(model, unbroken / "iteration_1" / "adapter")
    questions = task.load("test").select(range(10))
    drawn = sampling.sample(model, tokenizer, questions, task, 1, seed=15, progress=False)
    texts = list(drawn["prompt_ids"]), list(drawn["completion_ids"])
    new = logprobs.score(model, tokenizer, *texts)
    models.set_adapter(model, None)
    old = logprobs.score(model, tokenizer, *texts)
    table = pandas.read_csv(unbroken / "metrics.csv")
    [written] = table[(table.metric == "kl_to_previous") & (table.iteration == 1)].value
    assert written == pytest.approx((sum(new) - sum(old)) / 10, abs=1e-3)
    assert abs(written) > 1e-5


def test_the_dtype_that_a_cpu_falls_back_to_is_said_and_recorded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    run(smoke(dtype="bfloat16", iterations=0), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["dtype"] == "float32" and "float32 is used" in caplog.text


def test_completions_that_are_all_cut_off_are_not_blamed_on_the_model(tmp_path):
    for _ in range(2):  # the same command again says the same
        with pytest.raises(UserError, match="None of the 64 completions of M_0 ended.* 3 tokens"):
            run(smoke(iterations=1, max_new_tokens=3), tmp_path / "run")


def test_cut_off_completions_are_rejected_ones_beside_gold_solutions(tmp_path):
    run(smoke(iterations=1, max_new_tokens=3, gold=True), tmp_path / "run")
    pairs, _ = storage.load(tmp_path / "run" / "iteration_0" / "pairs")
    assert len(pairs) and max(len(ids) for ids in pairs["rejected_ids"]) <= 3


def test_a_run_reports_completions_without_a_readable_answer(tmp_path, monkeypatch, capsys):
    """A task that reads no answer of two digits: the endings show what it did not read."""
    real = tasks.get("word_problems").extract

    def extract(text, row=None):
        answer = real(text)
        return None if answer is None or len(answer) == 2 else answer

    monkeypatch.setattr(tasks.get("word_problems"), "extract", extract)
    run(smoke(iterations=1), tmp_path / "run")
    said = "".join(capsys.readouterr())
    [line] = [line.strip() for line in said.splitlines() if "no readable answer" in line]
    assert line.startswith("M_0: ") and "of 64 completions have no readable answer" in line
    assert "'Final answer: #' (" in line


@pytest.mark.slow
def test_the_record_says_on_which_machines_a_run_was_made(finished, monkeypatch):
    path, here = finished / "environment.json", environment.environment()
    first = json.loads(path.read_text())
    for gpu, unfinished in (([], True), (["a GPU"], False), (["a GPU"], True), (["a GPU"], True)):
        now = here | {"gpus": gpu}
        monkeypatch.setattr(environment, "environment", lambda now=now: now)
        if unfinished:
            (finished / "metrics.csv").unlink()
        run(smoke(), finished)
        assert ("resumed_on" in json.loads(path.read_text())) == bool(gpu and unfinished)
    record = json.loads(path.read_text())
    assert record["gpus"] == first["gpus"]
    assert [machine["gpus"] for machine in record["resumed_on"]] == [["a GPU"]]


# ---- resumption


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(unbroken, tmp_path):
    run(smoke(), tmp_path / "again")
    assert results(tmp_path / "again") == results(unbroken)
    run(smoke(seed=1, iterations=1), tmp_path / "other")
    texts = [
        load_from_disk(str(out / "iteration_0" / "samples"))["completion"][:]
        for out in (unbroken, tmp_path / "other")
    ]
    assert texts[0] != texts[1]


def test_a_finished_run_computes_nothing_again(finished, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("this is computed already")

    for name in ("training.train", "sampling.sample", "grading.grade", "pairs.build_pairs"):
        monkeypatch.setattr(f"irpo_utils.{name}", fail)
    tables = ("metrics.csv", "timing.csv", "metrics.json", ".lock")  # made from what is there
    files = [f for f in finished.rglob("*") if f.is_file() and f.name not in tables]
    before, kept = {f: f.stat().st_mtime_ns for f in files}, results(finished)
    run(smoke(), finished)
    assert {f: f.stat().st_mtime_ns for f in before} == before and results(finished) == kept


def test_a_finished_run_that_is_interrupted_in_a_replay_keeps_its_tables(finished, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    before = [(finished / name).read_bytes() for name in ("metrics.csv", "timing.csv")]
    monkeypatch.setattr(iteration.Stages, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(smoke(), finished)
    after = [(finished / name).read_bytes() for name in ("metrics.csv", "timing.csv")]
    assert after == before and results(finished)


def test_metrics_of_later_models_are_not_shown_next_to_new_ones(finished, monkeypatch):
    """The evaluation of M_1 is made again with other numbers, and the run is interrupted."""
    shutil.rmtree(finished / "iteration_1" / "evaluation")
    real = evaluation.score

    def worse(greedy, sampled, k):
        rows = real(greedy, sampled, k)
        return [row | {"value": 0.0} if row["metric"] == "greedy" else row for row in rows]

    def interrupted(self, t, graded):
        if t == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(iteration.Stages, "pair", interrupted)
    monkeypatch.setattr(evaluation, "score", worse)
    with pytest.raises(KeyboardInterrupt):
        run(smoke(), finished)
    assert set(pandas.read_csv(finished / "metrics.csv").iteration) == {0, 1}
    with pytest.raises(KeyboardInterrupt):  # it resumes, and is interrupted again
        run(smoke(), finished)
    assert set(pandas.read_csv(finished / "metrics.csv").iteration) == {0, 1}


STAGE_KILLS = [
    ("evaluation", 0),
    ("samples", 0),
    ("graded", 0),
    ("pairs", 0),
    ("adapter", 1),
    ("drift", 1),
    ("evaluation", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage, t", STAGE_KILLS)
def test_a_run_killed_in_a_stage_resumes_to_the_same_results(unbroken, tmp_path, stage, t):
    """SIGKILL while the artefact is being written: the moment in which most could be lost."""
    out = tmp_path / "killed"
    program = f"""
import os, signal
from irpo_utils import profiles
from irpo_utils.ops import run, run_directory
real = run_directory.RunDirectory.put
def put(self, place, write, about):
    def write_and_die(folder):
        write(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, place, write_and_die if place == self.folder({t}) / {stage!r} else write, about)
run_directory.RunDirectory.put = put
run.run(profiles.get("smoke", **{SMOKE!r}), {str(out)!r}, progress=False)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / f"iteration_{t}" / stage).exists()
    run(smoke(), out)
    assert results(out) == results(unbroken)


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.slow
@pytest.mark.parametrize("stage, block", [("samples", 16), ("evaluation", 12)])
def test_what_was_sampled_before_a_kill_is_not_sampled_again(tmp_path, monkeypatch, stage, block):
    """Killed in the third block: the run resumes there and ends with the same numbers."""
    monkeypatch.setattr(run_directory, "BLOCK", block)
    monkeypatch.setattr("irpo_utils.ops.trial.check", lambda *arguments: None)  # it samples as well
    settings = smoke(iterations=1 if stage == "samples" else 0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(settings, whole)
    real, drawn = sampling.sample, []

    def counted(model, tokenizer, questions, n, **options):
        wanted = n == settings.n_samples if stage == "samples" else n > 1
        if wanted:
            drawn.append(questions["id"][:])
            if len(drawn) == 3:
                raise Killed
        return real(model, tokenizer, questions, n=n, **options)

    monkeypatch.setattr(sampling, "sample", counted)
    with pytest.raises(Killed):
        run(settings, killed)
    run(settings, killed)
    first, second, third, *again = drawn
    assert again[0] == third and first not in again and second not in again
    assert results(killed) == results(whole) and not list(killed.rglob("*unfinished*"))


@pytest.mark.slow
def test_an_artefact_of_another_run_is_made_again(unbroken, finished, tmp_path, capsys):
    """Sound artefacts put there by hand; nothing made with the old ones may stay next to them."""
    run(smoke(seed=1, iterations=1), tmp_path / "samples")
    run(smoke(alpha=3.0, iterations=1), tmp_path / "adapter")
    for name, t in (("samples", 0), ("adapter", 1)):
        shutil.rmtree(finished / f"iteration_{t}" / name)
        source = tmp_path / name / f"iteration_{t}" / name
        shutil.copytree(source, finished / f"iteration_{t}" / name)
    run(smoke(), finished)
    said = "".join(capsys.readouterr())
    for place in ("iteration_0/samples", "iteration_1/adapter"):
        assert f"{place} was made from other settings: it is made again" in said
    assert results(finished) == results(unbroken)
    shutil.rmtree(finished / "iteration_1" / "pairs")
    shutil.copytree(finished / "iteration_0" / "pairs", finished / "iteration_1" / "pairs")
    run(smoke(), finished)
    assert "pairs was made from other iteration_0/graded" in "".join(capsys.readouterr())
    assert results(finished) == results(unbroken)


def test_an_edited_reward_makes_its_pairs_again(tmp_path, monkeypatch, capsys):
    """A reward keeps its name in the settings when its code changes."""

    def shortest(rows):
        return [float(row["n_tokens"] == min(r["n_tokens"] for r in rows)) for row in rows]

    def longest(rows):
        return [float(row["n_tokens"] == max(r["n_tokens"] for r in rows)) for row in rows]

    chosen = {}
    for reward in (shortest, shortest, longest):
        monkeypatch.setitem(methods.METHODS, "own", methods.Method("Own", "here", reward=reward))
        run(smoke(method="own", iterations=1), tmp_path)
        again = "pairs was made from other settings" in "".join(capsys.readouterr())
        assert again == (reward is longest)
        pairs, _ = storage.load(tmp_path / "iteration_0" / "pairs")
        chosen[reward] = [len(ids) for ids in pairs["chosen_ids"]]
    assert sum(chosen[longest]) > sum(chosen[shortest])


def test_an_edited_task_grades_again(tmp_path, monkeypatch):
    """A task keeps its name when its code changes; what it does not touch stays."""
    number = tasks.get("word_problems")

    class Task(tasks.base.Task):
        name, load, prompt, extract = "own", number.load, number.prompt, number.extract

    class Exact(Task):
        def is_correct(self, extracted, answer):
            return extracted == answer

    class Even(Task):
        def is_correct(self, extracted, answer):
            return extracted == answer and int(answer) % 2 == 0

    monkeypatch.setattr(tasks, "_REGISTERED", {})
    sampled = tmp_path / "iteration_0" / "samples" / "checksums.json"
    made = []
    for task in (Exact, Even):
        tasks.register(task())
        rows = run(smoke(task="own", iterations=1), tmp_path)
        made.append(sampled.stat().st_mtime_ns)
    for name in ("graded", "evaluation"):
        data = storage.load(tmp_path / "iteration_0" / name)
        parts = data.values() if isinstance(data, DatasetDict) else [data]
        answers = [row["answer"] for part in parts for row in part if row["correct"]]
        assert answers and all(int(answer) % 2 == 0 for answer in answers)
    first = load_from_disk(str(tmp_path / "iteration_0" / "evaluation"))["greedy"]["correct"][:]
    [greedy] = [row["value"] for row in rows if (row["metric"], row["iteration"]) == ("greedy", 0)]
    assert greedy == sum(first) / len(first) and made[0] == made[1]


def test_an_edited_loss_trains_again(tmp_path, monkeypatch):
    def low(pairs, alpha, beta):
        return -beta * (pairs.chosen - pairs.rejected), {}

    def high(pairs, alpha, beta):
        return -3 * beta * (pairs.chosen - pairs.rejected), {}

    logs = []
    for loss in (low, low, high):
        monkeypatch.setitem(training.LOSSES, "own", loss)
        run(smoke(loss="own", iterations=1), tmp_path)
        logs.append(read_log(tmp_path / "iteration_1" / "adapter" / "training_log.jsonl"))
    assert logs[0] == logs[1]
    assert logs[2][0]["loss"] == pytest.approx(3 * logs[0][0]["loss"], rel=1e-4)


def test_the_functions_of_the_package_and_of_the_studies_are_not_in_a_record(tmp_path):
    """Otherwise a new version of the code would make every finished run again."""
    keep = run_directory.RunDirectory(tmp_path)
    keep.p, keep.task = smoke(loss="dpo_nll_per_token"), tasks.get("word_problems")
    keep.method = methods.METHODS["grpo"]
    assert not any(keep.sources(name) for name in run_directory.FIELDS)


def test_an_artefact_that_does_not_say_what_it_was_made_from_is_made_again(
    unbroken, finished, capsys
):
    pairs = finished / "iteration_1" / "pairs"
    record = json.loads((pairs / "checksums.json").read_text())
    del record["inputs"]
    (pairs / "checksums.json").write_text(json.dumps(record))
    run(smoke(), finished)
    said = "".join(capsys.readouterr())
    assert "iteration_1/pairs was made from other iteration_1/graded, settings: it is" in said
    assert results(finished) == results(unbroken)
    record = json.loads((pairs / "checksums.json").read_text())
    assert set(record["inputs"]) == {"iteration_1/graded", "settings"}


@pytest.mark.parametrize(
    "stage, text",
    [
        ("pairs", '{"seconds": 1.0, "tok'),
        pytest.param("graded", "[]", marks=pytest.mark.slow),
        pytest.param("samples", '{"sha256": {}}', marks=pytest.mark.slow),
        pytest.param("evaluation", "", marks=pytest.mark.slow),
    ],
)
def test_an_artefact_with_a_damaged_record_is_made_again(unbroken, finished, stage, text):
    (finished / "iteration_0" / stage / "checksums.json").write_text(text)
    run(smoke(), finished)
    assert results(finished) == results(unbroken)


@pytest.mark.slow
def test_a_damaged_artefact_is_made_again_and_never_trusted(unbroken, finished, capsys):
    flip(finished / "iteration_1" / "adapter" / "adapter_model.safetensors")
    (finished / "iteration_0" / "metrics.json").write_text('[{"metric": "gre')
    run(smoke(), finished)
    assert "iteration_1/adapter is damaged" in "".join(capsys.readouterr())
    assert results(finished) == results(unbroken)


def test_a_damaged_table_or_log_is_written_again(unbroken, finished):
    log = finished / "iteration_1" / "training_log.jsonl"
    log.write_text(log.read_text()[:-40])
    (finished / "iteration_0" / "metrics.json").write_text('[{"metric": "gre')
    (finished / "metrics.csv").unlink()
    run(smoke(), finished)
    assert results(finished) == results(unbroken)


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(unbroken, tmp_path, monkeypatch):
    """Each look at the clock is an hour before the last one; files get old dates as well."""
    now = [1.7e9]

    def earlier():
        now[0] -= 3600
        return now[0]

    out, settings = tmp_path / "run", smoke(iterations=1)
    monkeypatch.setattr(time, "time", earlier)
    run(settings, out)
    for file in out.rglob("*"):
        os.utime(file, (0, 0))
    shutil.rmtree(out / "iteration_1" / "evaluation")
    run(settings, out)
    assert (pandas.read_csv(out / "timing.csv").seconds >= 0).all()
    ours, expected = results(out), results(unbroken)
    made = ("iteration_0/samples", "iteration_0/pairs", "iteration_1/adapter")
    same = [name for name in ours if name.startswith(made)]
    assert len(same) > 3 and all(ours[name] == expected[name] for name in same)


# ---- settings, model and questions of a run that exists


def test_other_settings_are_refused_by_name(unbroken):
    with pytest.raises(UserError, match=r"alpha \(1.0 there, 2.0 now\), seed.*another --out"):
        run(smoke(alpha=2.0, seed=5), unbroken)


@pytest.mark.slow
def test_settings_that_only_cost_memory_may_change(unbroken, finished):
    """Out of memory in the third hour: the same command with a smaller batch resumes."""
    shutil.rmtree(finished / "iteration_2")
    run(smoke(micro_batch_size=2, sampling_batch_size=16), finished)
    assert json.loads((finished / "profile.json").read_text())["micro_batch_size"] == 2
    index = ["iteration", "metric", "k"]
    one, two = (
        pandas.read_csv(out / "metrics.csv").set_index(index).value for out in (unbroken, finished)
    )
    assert (one - two).abs().max() < 0.11


def test_a_run_of_an_older_version_with_fewer_settings_resumes(unbroken, finished):
    settings = json.loads((finished / "profile.json").read_text())
    for name in ("method", "start"):
        del settings[name]
    (finished / "profile.json").write_text(json.dumps(settings))
    run(smoke(), finished)
    assert results(finished) == results(unbroken)


def test_iterations_without_their_settings_are_not_resumed(finished):
    (finished / "profile.json").unlink()
    with pytest.raises(UserError, match="profile.json is missing or damaged"):
        run(smoke(), finished)


def test_questions_that_changed_behind_their_name_are_refused(tmp_path):
    rows, file = sums(200), tmp_path / "mine.jsonl"
    write_jsonl(file, rows)
    settings = smoke(task="jsonl", data=str(file), iterations=0)
    run(settings, tmp_path / "run")
    changed = [row | {"answer": "7"} for row in rows[:5]] + rows[5:]
    for now in (changed, rows[::-1]):  # which ones are taken depends on their order
        write_jsonl(file, now)
        with pytest.raises(UserError, match="questions of .* changed since the run was started"):
            run(settings, tmp_path / "run")
    write_jsonl(file, rows)
    run(settings, tmp_path / "run")


@pytest.mark.slow
def test_another_model_behind_the_same_name_is_refused(tmp_path):
    folder, out = shutil.copytree(models.FOLDERS["seed"], tmp_path / "model"), tmp_path / "run"
    settings = smoke(model=str(folder), iterations=0)
    run(settings, out)
    weights, template = next(folder.glob("*.safetensors")), next(folder.glob("*.jinja"))
    for file, content in ((weights, None), (template, template.read_text() + " ")):
        before = file.read_bytes()
        flip(file) if content is None else file.write_text(content)
        with pytest.raises(UserError, match="model of .* changed since the run was started"):
            run(settings, out)
        with pytest.raises(UserError, match="is no longer the one that .* was made with"):
            evaluate_again.evaluate_run(out, k=1, split="validation")
        file.write_bytes(before)
    run(settings, out)


@pytest.mark.parametrize("known, asked", [(None, None), ("a" * 40, "a" * 40), ("b" * 64, None)])
def test_a_hub_model_is_loaded_at_the_commit_of_the_run(tmp_path, monkeypatch, known, asked):
    """What is known: nothing, a commit, the fingerprint of a folder."""
    revisions = []

    def load(name, revision, **options):
        revisions.append(revision)
        raise UserError("enough")

    monkeypatch.setattr(models, "load", load)
    (tmp_path / "inputs.json").write_text(json.dumps({"model": known}))
    with pytest.raises(UserError, match="enough"):
        run(smoke(), tmp_path)
    assert revisions == [asked]


def test_a_damaged_list_of_inputs_is_refused(finished):
    (finished / "inputs.json").write_text("{")
    with pytest.raises(UserError, match="inputs.json is damaged.*Restore it"):
        run(smoke(), finished)


# ---- mistakes found before anything is made


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_found_before_anything_is_made(tmp_path):
    rows = sums(60)
    data = folder_of_splits(tmp_path / "data", rows[:30], rows[30:45], rows[45:])
    settings = smoke(task="jsonl", data=data, n_questions=24, iterations=1)
    order = tasks.get("jsonl").load("train", data).shuffle(seed=settings.seed)["id"]
    for place, message in ((23, "longest prompt has .* context 1024"), (24, "no pairs")):
        long = [
            r | {"question": r["question"] + " Really?" * 900 * (r["id"] == order[place])}
            for r in rows[:30]
        ]
        write_jsonl(Path(data) / "train.jsonl", long)
        with pytest.raises(UserError, match=message):
            run(settings, tmp_path / f"run_{place}")
        assert (tmp_path / f"run_{place}" / "iteration_0").exists() == (place == 24)


def test_what_a_start_was_trained_on_is_compared_with_the_evaluation_questions(finished, tmp_path):
    """Otherwise the accuracy of a run that starts from another one could measure its memory."""
    test, others = stories("test", 20), [row | {"solution": "x"} for row in sums(20)]
    first = folder_of_splits(tmp_path / "first", test, others, others[:5])
    second = folder_of_splits(tmp_path / "second", others, test[10:], test)
    settings = json.loads((finished / "profile.json").read_text())
    settings |= {"task": "jsonl", "data": first}
    (finished / "profile.json").write_text(json.dumps(settings))
    for place in (finished, finished / "iteration_1" / "adapter"):
        with pytest.raises(UserError, match="10 of 10 evaluation questions are also training"):
            run(smoke(task="jsonl", data=second, start=str(place)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 64}}]
)
def test_a_start_with_other_scales_is_refused(unbroken, tmp_path, change):
    folder = shutil.copytree(unbroken / "iteration_2" / "adapter", tmp_path / "adapter")
    (folder / "checksums.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"made with {next(iter(change))}"):
        run(smoke(start=str(folder)), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": "nowhere"}, "neither an adapter folder nor a run directory"),
        ({"start": "{run}", "lora_r": 8}, "made with lora_r 16, this run has 8"),
        ({"start": "{run}", "model": "smollm2-135m"}, "made with model 'seed'"),
        ({"method": "nonsense"}, "no method 'nonsense'"),
        ({"probe": "nowhere"}, "--probe nowhere is no folder of pairs"),
        ({"lr_scheduler": "foo"}, "--lr-scheduler is 'foo'"),
        ({"optimizer": "foo"}, "--optimizer is 'foo'"),
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"task": "crosswords"}, "no task 'crosswords'"),
        ({"eval_split": "math500"}, "no split 'math500'; use one of train, validation, test"),
        ({"engine": "warp"}, "engines.warp.*--engine is"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    unbroken, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    given = {k: v.format(run=unbroken) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        run(smoke(**given), tmp_path / "out")
    assert not list((tmp_path / "out").glob("iteration_*"))


def flip_start(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def rename_weights(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: flip(f / "adapter_model.safetensors"), "damaged: its checksums do not match"),
        (flip_start, "adapter_model.safetensors is missing .*, or damaged"),
        (rename_weights, "adapter_model.safetensors is missing"),
    ],
)
def test_a_damaged_start_is_refused_before_anything_is_made(unbroken, tmp_path, damage, message):
    folder = shutil.copytree(unbroken / "iteration_2" / "adapter", tmp_path / "adapter")
    damage(folder)
    with pytest.raises(UserError, match=message):
        run(smoke(start=str(folder), iterations=1), tmp_path / "run")
    assert not (tmp_path / "run" / "iteration_0").exists()


def test_sft_needs_gold_solutions(tmp_path):
    data = write_jsonl(tmp_path / "mine.jsonl", sums(40))
    with pytest.raises(UserError, match="no gold solutions"):
        run(smoke(method="sft_gold", task="jsonl", data=str(data)), tmp_path / "out")


# ---- disks and locks


def test_two_runs_in_one_directory(finished):
    program = (
        "import time; from filelock import FileLock\n"
        f"with FileLock({str(finished / '.lock')!r}): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    before = (finished / "profile.json").read_text()
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match="in use by another run"):
            run(smoke(alpha=7.0), finished)
    finally:
        holder.kill()
    assert (finished / "profile.json").read_text() == before


def test_a_run_that_was_refused_releases_its_lock_and_changes_no_file(finished):
    before = results(finished)
    with pytest.raises(UserError, match=f"other settings.*with --start {finished}"):
        run(smoke(n_eval_questions=4), finished)
    assert results(finished) == before
    with FileLock(finished / ".lock", timeout=0):
        pass


def test_a_full_disk_is_one_clear_error_and_leaves_no_partial_files(tmp_path, monkeypatch):
    def full(self, folder, **kwargs):
        (Path(folder) / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings, out = smoke(iterations=0), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(DatasetDict, "save_to_disk", full)
        with pytest.raises(UserError, match="No space left on device.*same command to resume"):
            run(settings, out)
    assert not [file for file in (out / "iteration_0").rglob("*") if file.is_file()]
    assert {row["iteration"] for row in run(settings, out)} == {0}


@pytest.mark.slow
def test_a_disk_that_fills_while_the_adapter_is_saved(unbroken, finished, monkeypatch):
    """safetensors reports it in an error that is no OSError."""
    from safetensors import SafetensorError

    shutil.rmtree(finished / "iteration_2")

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", full)
        with pytest.raises(UserError, match="cannot write to .*adapter.*No space left"):
            run(smoke(), finished)
    assert not list((finished / "iteration_2").glob("*adapter*partial"))
    assert not (finished / "iteration_2" / "adapter").exists()
    run(smoke(), finished)
    assert results(finished) == results(unbroken)


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*Choose another --out"):
        run(smoke(), tmp_path / "file" / "out")

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        run(smoke(), tmp_path / "out")


# ---- settings in a whole run


@pytest.mark.slow
def test_fresh_questions_differ_in_every_iteration(tmp_path):
    run(smoke(fresh_questions=True), tmp_path / "run")
    first, second = (
        set(load_from_disk(str(tmp_path / "run" / f"iteration_{t}" / "samples"))["id"])
        for t in (0, 1)
    )
    assert len(first) == len(second) == 16 and not first & second


@pytest.mark.slow
def test_gold_solutions_and_a_limit_of_pairs(tmp_path):
    run(smoke(gold=True, max_pairs=10, iterations=1), tmp_path / "run")
    folder = tmp_path / "run" / "iteration_0" / "pairs"
    pairs, counts = load_from_disk(str(folder)), json.loads((folder / "counts.json").read_text())
    assert len(pairs) == counts["pairs"] == 10 and counts["all_wrong"] == 0
    assert counts["used"] == len(set(pairs["id"]))
    assert counts["gold_winners"] == pairs["chosen_sample"][:].count(-1) > 0


@pytest.mark.slow
def test_a_start_from_sft_on_gold_solutions(unbroken, tmp_path):
    """The start is copied, so that the run is whole without it, and M_1 is trained from there."""
    sft, out = tmp_path / "sft", tmp_path / "out"
    run(smoke(method="sft_gold", learning_rate=3e-3), sft)
    assert json.loads((sft / "profile.json").read_text())["loss"] == "sft"
    run(smoke(start=str(sft), iterations=1), out)
    shutil.rmtree(sft / "iteration_1" / "adapter")
    again = run(smoke(start=str(sft), iterations=1), out)
    assert finished_runs.is_whole(out)

    def tokens(rows, t):
        [value] = [r["value"] for r in rows if (r["metric"], r["iteration"]) == ("mean_tokens", t)]
        return value

    trained = pandas.read_csv(sft / "metrics.csv").to_dict("records")
    plain = pandas.read_csv(unbroken / "metrics.csv").to_dict("records")
    assert tokens(again, 0) == tokens(trained, 1) != tokens(plain, 0)
    log = read_log(out / "iteration_1" / "training_log.jsonl")
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the reference is the start


def test_a_probe_is_refused_where_the_script_that_has_it_was_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CALLBACKS", [])
    with pytest.raises(UserError, match="need scripts/run.py"):
        run(smoke(probe_every=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_start_as_the_reference_and_a_probe_of_other_pairs(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CALLBACKS", [probes.of_run])
    run(smoke(reference="start", learning_rate=3e-3), tmp_path / "start")
    first, second = (
        read_log(tmp_path / "start" / f"iteration_{t}" / "training_log.jsonl")[0] for t in (1, 2)
    )
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(second["rewards/margins"]) > 1e-3
    probe = str(unbroken / "iteration_1" / "pairs")
    run(smoke(iterations=1, probe=probe, probe_every=1), tmp_path / "probed")
    folder = tmp_path / "probed" / "iteration_1"
    rows = read_log(folder / "probe_log.jsonl")
    assert [row["step"] for row in rows] == list(
        range(len(read_log(folder / "training_log.jsonl")) + 1)
    )
    assert {"logps/chosen", "logps/rejected"} <= set(rows[0])
    assert rows[0]["logps/chosen"] != rows[-1]["logps/chosen"]


@pytest.mark.slow
def test_a_collapse_is_on_the_screen_and_in_the_run_directory(tmp_path, capsys):
    settings = smoke(n_questions=32, k_pairs=4, iterations=1)
    settings = dataclasses.replace(settings, learning_rate=1e-2, alpha=0.0, batch_size=1)
    run(settings, tmp_path / "run")
    rows = read_log(tmp_path / "run" / "iteration_1" / "warnings.jsonl")
    assert {"training", "evaluation"} == {row["stage"] for row in rows}
    assert any(row["warning"].startswith("chosen completions lose probability") for row in rows)
    said = "".join(capsys.readouterr())
    assert all(row["warning"] in said for row in rows)


def test_signs_of_a_collapse_in_the_metrics_are_named():
    before = {"truncated_rate": 0.02, "sampled": 0.4, "kl_to_previous": 0.2}
    assert warnings.of_evaluation(1, before, before | {"kl_to_previous": 0.1}) == []
    now = before | {"truncated_rate": 0.9, "sampled": 0.3}
    length, accuracy = warnings.of_evaluation(1, before, now)
    assert "completions get too long: 90% of those of M_1" in length
    assert "accuracy fell" in accuracy and "Return to M_0" in accuracy
    [step] = warnings.of_evaluation(1, before, before | {"kl_to_previous": 9.0})
    assert step.startswith("a long step: KL to M_0 is 9.0")


def test_the_rule_names_the_model_to_keep_after_two_models_without_improvement():
    assert warnings.of_validation([0.3, 0.5]).startswith("M_1 is the best model so far")
    said = warnings.of_validation([0.3, 0.5, 0.6, 0.5])
    assert "M_3 does not exceed M_2 on validation (50.0%, 60.0%): one more iteration" in said
    assert "keep" not in said
    said = warnings.of_validation([0.3, 0.5, 0.6, 0.5, 0.55])
    assert "M_3 to M_4 do not exceed M_2 on validation: stop and keep M_2" in said
    assert "stop and keep M_2" in warnings.of_validation([0.3, 0.5, 0.6, 0.5, 0.55, 0.4])
    assert "M_4 is the best" in warnings.of_validation([0.3, 0.5, 0.6, 0.5, 0.7])
    assert "keep M_0" in warnings.of_validation([0.3, 0.3, 0.3])  # level is no gain


def test_the_rule_of_a_run_is_the_one_that_was_scored():
    for accuracy in itertools.product((0.1, 0.2, 0.3), repeat=5):
        said = [warnings.of_validation(accuracy[: t + 1]) for t in range(1, 5)]
        stops = [text.partition("keep M_")[2] for text in said if "stop and keep" in text]
        kept = stopping.patience_2([{"validation": value} for value in accuracy])
        assert kept == (int(stops[0]) if stops else accuracy.index(max(accuracy)))


def test_a_run_on_validation_says_which_model_to_keep(tmp_path, capsys):
    said = {}
    for split in ("validation", "test"):
        run(smoke(iterations=1, eval_split=split), tmp_path / split)
        said[split] = "".join(capsys.readouterr())
    table = pandas.read_csv(tmp_path / "validation" / "metrics.csv")
    accuracy = table[table.metric == "greedy"].value.tolist()
    assert warnings.of_validation(accuracy) in said["validation"]
    assert "on validation" not in said["test"]  # the test split selects nothing


# ---- several seeds


def with_seed(run: Path, out: Path, seed: int, **changes) -> Path:
    """A copy of a run that claims another seed."""
    out = shutil.copytree(run, out)
    settings = json.loads((out / "profile.json").read_text()) | {"seed": seed} | changes
    (out / "profile.json").write_text(json.dumps(settings))
    table = pandas.read_csv(out / "metrics.csv").assign(seed=seed)
    table.to_csv(out / "metrics.csv", index=False)
    return out


def test_collect_joins_seeds_and_refuses_other_settings(unbroken, tmp_path):
    one = with_seed(unbroken, tmp_path / "one", 1)
    metrics, means, record = finished_runs.collect([unbroken, one])
    assert set(metrics.seed) == {0, 1} and record["seeds"] == [0, 1]
    assert set(means.iteration) == {0, 1, 2} and len(record["runs"]) == 2
    greedy = {
        t: metrics[(metrics.metric == "greedy") & (metrics.iteration == t)].value.mean()
        for t in (0, 2)
    }
    [mean] = means[(means.metric == "greedy") & (means.iteration == 2)].itertuples()
    assert mean.value == pytest.approx(greedy[2]) and mean.low <= mean.value <= mean.high
    assert mean.seeds == 2 and mean.n == 10
    [gain] = means[means.metric == "greedy_gain_over_M0"].itertuples()
    assert gain.iteration == 2 and gain.value == pytest.approx(greedy[2] - greedy[0])
    votes, mean_votes = (table[table.metric == "majority"] for table in (metrics, means))
    assert mean_votes.low.le(mean_votes.value).all() and mean_votes.high.ge(mean_votes.value).all()
    by_model = ["iteration", "k"]
    assert mean_votes.set_index(by_model).value.sort_index().to_dict() == pytest.approx(
        votes.groupby(by_model).value.mean().to_dict()
    )
    inputs = json.loads((one / "inputs.json").read_text())
    (one / "inputs.json").write_text(json.dumps(inputs | {"evaluation questions": "0" * 64}))
    with pytest.raises(UserError, match="have different evaluation questions"):
        finished_runs.collect([unbroken, one])
    two = with_seed(unbroken, tmp_path / "two", 2, beta=0.2)
    with pytest.raises(UserError, match="differ in more than their seed"):
        finished_runs.collect([unbroken, two])
    with pytest.raises(UserError, match="same seed"):
        finished_runs.collect([unbroken, unbroken])


DAMAGES = [
    lambda run: flip(run / "iteration_2/evaluation/greedy/data-00000-of-00001.arrow"),
    lambda run: shutil.rmtree(run / "iteration_1/adapter"),
    lambda run: (run / "iteration_2/metrics.json").write_text("["),
    lambda run: (run / "metrics.csv").write_text(
        "".join((run / "metrics.csv").read_text().splitlines(True)[:20])
    ),
    lambda run: shutil.copytree(
        run / "iteration_2/adapter", run / "iteration_1/adapter", dirs_exist_ok=True
    ),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_is_not_whole_is_not_collected(finished, damage):
    assert finished_runs.is_whole(finished)
    damage(finished)
    assert not finished_runs.is_whole(finished)
    with pytest.raises(UserError, match="is not finished, or something in it is damaged"):
        finished_runs.collect([finished])


# ---- evaluate again


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Ten questions that no run was trained on, as a user's file."""
    data = tmp_path_factory.mktemp("others")
    return folder_of_splits(
        data, stories("train", 20), stories("test", 5), stories("validation", 10)
    )


def test_evaluate_again_writes_a_table_and_compares_the_first_with_the_last(finished, others):
    text = evaluate_again.evaluate_run(finished, "jsonl", others, k=4)
    table = pandas.read_csv(finished / "evaluations" / "jsonl_test.csv")
    assert set(table.iteration) == {0, 2} and set(table.n) >= {10} and set(table.split) == {"test"}
    assert not table.duplicated(["iteration", "metric", "k"]).any()
    assert "greedy" in text and "M_2 against M_0" in text and "p_mcnemar" in text
    with pytest.raises(UserError, match="--iterations from 0 to 2"):
        evaluate_again.evaluate_run(finished, "jsonl", others, iterations=[3])


@pytest.mark.slow
def test_evaluate_again_asks_as_the_run_did(others, tmp_path):
    """With the worked examples of few_shot, and with the same random numbers."""
    settings = smoke(method="few_shot", task="jsonl", data=others, n_eval_questions=None)
    run(settings, tmp_path / "run")
    text = evaluate_again.evaluate_run(tmp_path / "run", k=3)
    first, again = (
        pandas.read_csv(tmp_path / "run" / name).set_index(["metric", "k"]).value
        for name in ("metrics.csv", "evaluations/jsonl_test.csv")
    )
    assert again.index.is_unique and "against" not in text
    for metric in ("greedy", "sampled", "greedy_mean_tokens", "mean_tokens"):
        assert again[metric, 1] == first[metric, 1]


def test_evaluate_looks_for_all_adapters_first(finished, others):
    shutil.rmtree(finished / "iteration_2" / "adapter")
    with pytest.raises(UserError, match="iteration_2/adapter is missing or damaged"):
        evaluate_again.evaluate_run(finished, "jsonl", others, k=1, iterations=[0, 2])
    assert not (finished / "evaluations").exists()


def test_evaluate_that_is_interrupted_leaves_what_it_has(unbroken, others, tmp_path, monkeypatch):
    score, done = evaluation.score, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(score(*arguments))
        return done[0]

    monkeypatch.setattr(evaluation, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_again.evaluate_run(unbroken, "jsonl", others, k=1, out=tmp_path)
    assert set(pandas.read_csv(tmp_path / "jsonl_test.csv").iteration) == {0}


def test_evaluating_on_training_questions_is_refused_unless_allowed(unbroken, tmp_path):
    with pytest.raises(UserError, match="2400 of 2400 evaluation questions are also training"):
        evaluate_again.evaluate_run(unbroken, split="train")
    rows = stories("train", 3)
    memory = folder_of_splits(tmp_path / "memory", rows, rows, rows)
    with pytest.raises(UserError, match="are also training questions"):
        evaluate_again.evaluate_run(unbroken, "jsonl", memory)
    out = tmp_path / "out"
    text = evaluate_again.evaluate_run(
        unbroken, "jsonl", memory, None, [0], 1, out, allow_overlap=True
    )
    assert "greedy" in text and (out / "jsonl_test.csv").is_file()


@pytest.mark.slow
def test_evaluate_needs_the_training_questions_of_the_run(tmp_path):
    rows, file, out = sums(100), tmp_path / "mine.jsonl", tmp_path / "run"
    write_jsonl(file, rows)
    run(smoke(task="jsonl", data=str(file), iterations=0), out)
    write_jsonl(file, rows[::-1])  # in another order they are the same
    assert "greedy" in evaluate_again.evaluate_run(out, k=1)
    write_jsonl(file, rows[:80])
    with pytest.raises(UserError, match="training questions .* have changed.*--allow-overlap"):
        evaluate_again.evaluate_run(out, k=1)


def test_evaluate_ends_the_server_of_its_engine(finished, others, monkeypatch):
    closed = []
    monkeypatch.setattr(Engine, "close", lambda self: closed.append(self))
    evaluate_again.evaluate_run(finished, "jsonl", others, iterations=[0], k=1)
    monkeypatch.setattr(iteration.Stages, "evaluate", lambda self, t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_again.evaluate_run(finished, "jsonl", others, iterations=[0], k=1)
    assert len(closed) == 2


# ---- the best iteration


def evaluated_on(folder, split: str, greedy: list[float]):
    """The run as if it had been evaluated on `split` with these greedy accuracies."""
    settings = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps(settings | {"eval_split": split}))
    table = pandas.read_csv(folder / "metrics.csv")
    for t, value in enumerate(greedy):
        table.loc[(table.metric == "greedy") & (table.iteration == t), "value"] = value
    table.to_csv(folder / "metrics.csv", index=False)
    return folder


@pytest.mark.parametrize(
    "greedy, best", [([0.1, 0.4, 0.3], 1), ([0.1, 0.4, 0.4], 1), ([0.4, 0.4, 0.2], 0)]
)
def test_the_best_iteration_is_the_earliest_of_equals(finished, greedy, best):
    folder = evaluated_on(finished, "validation", greedy)
    t, reason = evaluate_again.best_iteration(folder, storage.read_profile(folder), "test")
    assert t == best and reason.startswith(f"best: M_{best}, by greedy accuracy on 10 validation")
    assert "(M_0 " in reason and f"M_2 {greedy[2]:.1%})" in reason


def test_the_best_iteration_is_evaluated_alone_or_next_to_others(finished, others, capsys):
    folder = evaluated_on(finished, "validation", [0.1, 0.4, 0.3])
    evaluate_again.evaluate_run(folder, "jsonl", others, "test", ["best"], 2)
    table = pandas.read_csv(folder / "evaluations" / "jsonl_test.csv")
    assert set(table.iteration) == {1} and {"greedy", "majority"} <= set(table.metric)
    assert "best: M_1" in "".join(capsys.readouterr())
    text = evaluate_again.evaluate_run(folder, "jsonl", others, "test", [0, "best", 1], 2)
    assert "M_1 against M_0" in text
    table = pandas.read_csv(folder / "evaluations" / "jsonl_test.csv")
    assert list(dict.fromkeys(table.iteration)) == [0, 1]


@pytest.mark.parametrize(
    "chosen_on, split",
    [("test", None), ("test", "validation"), ("validation", None), ("math500", "test")],
)
def test_questions_that_chose_an_iteration_do_not_evaluate_it(finished, chosen_on, split):
    folder = evaluated_on(finished, chosen_on, [0.1, 0.4, 0.3])
    with pytest.raises(UserError, match=f"accuracy on the {chosen_on} split.*--split test"):
        evaluate_again.evaluate_run(folder, split=split, iterations=["best"], k=1)


def test_the_best_iteration_of_an_unfinished_run_is_not_known(finished):
    folder = evaluated_on(finished, "validation", [0.1, 0.4, 0.3])
    table = pandas.read_csv(folder / "metrics.csv")
    table[table.iteration < 2].to_csv(folder / "metrics.csv", index=False)
    for _ in range(2):
        with pytest.raises(UserError, match="lacks the greedy accuracy of some iterations"):
            evaluate_again.evaluate_run(folder, split="test", iterations=["best"], k=1)
        (folder / "metrics.csv").unlink(missing_ok=True)


# ---- what is chosen before the model is loaded


def on_gpu(monkeypatch, name: str) -> None:
    real = planning.find_machine
    monkeypatch.setattr(planning, "find_machine", lambda text=None: real(text or name))


def test_the_record_of_an_adapter_says_how_it_was_trained(unbroken):
    record = json.loads((unbroken / "iteration_1" / "adapter" / "checksums.json").read_text())
    assert (record["micro_batch_size"], record["gradient_checkpointing"]) == (4, False)
    settings = json.loads((unbroken / "profile.json").read_text())  # as they were given
    assert (settings["micro_batch_size"], settings["gradient_checkpointing"]) == (None, None)


def test_the_base_is_chosen_for_the_gpu_and_kept_on_another(tmp_path, monkeypatch):
    profile = profiles.get("llama-3.1-8b")
    assert runs.settled(profile).quantize is None  # a CPU keeps NF4, see `Engine.load`
    for gpu, quantize in (("A100-80GB", False), ("RTX4090-24GB", True)):
        on_gpu(monkeypatch, gpu)
        settled = runs.settled(profile, tmp_path)
        assert settled == dataclasses.replace(profile, quantize=quantize)
        assert runs.settled(settled, tmp_path) is settled
    given = dataclasses.replace(profile, quantize=False)
    assert runs.settled(given) is given
    (tmp_path / "profile.json").write_text(json.dumps(dataclasses.asdict(given)))
    assert runs.settled(profile, tmp_path).quantize is True  # nothing is made with it yet
    (tmp_path / "iteration_0" / "evaluation").mkdir(parents=True)
    assert runs.settled(profile, tmp_path).quantize is False


def test_a_method_that_samples_in_training_gets_its_batches_before(monkeypatch):
    on_gpu(monkeypatch, "RTX4090-24GB")
    p = runs.settled(profiles.get("qwen2.5-0.5b", method="grpo"))
    assert p.micro_batch_size in (1, 2, 4, 8) and p.gradient_checkpointing is not None
    assert runs.settled(profiles.get("qwen2.5-0.5b")).micro_batch_size is None  # by the pairs


def test_an_open_base_is_nf4_where_nothing_chooses_it():
    model, _ = plain.Engine().load(profiles.get("smoke", quantize=None))
    assert any(hasattr(p, "quant_state") for p in model.parameters())


# ---- a run of version 0.1


def test_a_run_of_version_0_1_can_be_read_collected_and_evaluated(others, tmp_path):
    assert finished_runs.is_whole(SHIPPED)
    p = storage.read_profile(SHIPPED)
    assert (p.loss, p.engine, p.iterations) == ("dpo_nll", "cpu", 4)
    metrics, means, record = finished_runs.collect([SHIPPED])
    [last] = means[(means.metric == "greedy") & (means.iteration == 4)].value
    written = metrics[(metrics.metric == "greedy") & (metrics.iteration == 4)].value
    assert last == pytest.approx(written.iloc[0]) and record["seeds"] == [0]
    votes = metrics[metrics.metric == "majority"][["iteration", "k", "value"]].to_numpy()
    assert means[means.metric == "majority"][["iteration", "k", "value"]].to_numpy() == (
        pytest.approx(votes)
    )
    evaluate_again.evaluate_run(SHIPPED, "jsonl", others, k=1, out=tmp_path)
    table = pandas.read_csv(tmp_path / "jsonl_test.csv")
    greedy = table[table.metric == "greedy"].set_index("iteration").value
    assert set(greedy.index) == {0, 4}


@pytest.mark.parametrize(
    "old, new",
    [
        ({"dpo_weight": 0.0}, {"loss": "sft"}),
        ({"nll_per": "token"}, {"loss": "dpo_nll_per_token"}),
        ({"sampler": "transformers"}, {"engine": "cpu", "loss": "dpo_nll"}),
    ],
)
def test_settings_of_version_0_1_have_new_names(tmp_path, old, new):
    settings = json.loads((SHIPPED / "profile.json").read_text()) | old
    (tmp_path / "profile.json").write_text(json.dumps(settings))
    read = storage.read_profile(tmp_path)
    assert {name: getattr(read, name) for name in new} == new
