"""A study over methods and seeds: what runs share, what is kept, and what is in its tables."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import pandas
import pytest
import torch
from datasets import load_from_disk

import lesson_report
import lesson_study
import study
from irpo_utils import UserError, methods, profiles, tasks
from studies import api, check_reliability, finished_runs, lucky, report, runner, trials

ROOT = Path(__file__).parent.parent
BEST = {"irpo": 1e-4, "iterative_dpo": 2e-5, "star": 3e-4}


def write_tuning(folder, leave_out=lambda row: False):
    """A table as the tuning writes it, with a misleading first iteration."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in trials.TUNED:
        for rate in trials.LEARNING_RATES:
            best = rate == BEST.get(method, 2e-5) or (method, rate) == ("irpo", 3e-4)
            row = {"method": method, "level": rate, "metric": "greedy"}
            for t, value in ((1, 0.2 if best else 0.5), (2, 0.8 if best else 0.5)):
                rows.append({**row, "iteration": t, "value": value})
    table = pandas.DataFrame([row for row in rows if not leave_out(row)])
    table.to_csv(folder / "tuning_of_methods.csv", index=False)
    return folder


def run_small(name, out, runs=None, **options):
    options = {"seeds": 1, "small": True, "progress": False, "jobs": os.cpu_count(), **options}
    return runner.run_study(name, out, runs or out / "runs", **options)


def arrow(run, t, stage):
    return (run / f"iteration_{t}" / stage / "data-00000-of-00001.arrow").read_bytes()


def adapter(run, t):
    return (run / f"iteration_{t}" / "adapter" / "adapter_model.safetensors").read_bytes()


# Without runs


def test_a_kept_run_may_differ_in_settings_that_change_only_the_rounding():
    wanted = {"beta": 0.1, "sampling_batch_size": 256, "gradient_checkpointing": None}
    kept = {"beta": 0.1, "sampling_batch_size": 512, "gradient_checkpointing": False}
    assert runner._same_settings(kept, wanted)
    assert not runner._same_settings(kept | {"beta": 0.3}, wanted)


def test_the_learning_rate_of_a_method_is_the_best_of_its_last_iteration(tmp_path):
    rates = trials.tuned_learning_rates(write_tuning(tmp_path))
    assert {name: rates[name] for name in BEST} == BEST  # of two equal ones the smaller
    assert set(rates) == set(trials.TUNED)

    def stopped(row):
        return (row["method"], row["level"], row["iteration"]) == ("star", 3e-4, 2)

    # A run that stopped after M_1 is not chosen by its M_1.
    some = trials.tuned_learning_rates(write_tuning(tmp_path, stopped))
    assert some["star"] == 2e-5


def test_a_tuning_that_is_not_complete_is_refused(tmp_path):
    write_tuning(tmp_path, lambda row: row["method"] not in BEST)
    assert trials.tuned_learning_rates(tmp_path, set(BEST)) == BEST
    with pytest.raises(UserError, match="no learning rate for grpo.*study.py tuning --only grpo"):
        trials.profile_of(trials.Trial("grpo"), 0, BEST, tmp_path, "comparison")
    write_tuning(tmp_path, lambda row: row["method"] == "grpo")
    with pytest.raises(UserError, match="lacks 3 of its runs, such as grpo at 2e-05.*tuning"):
        trials.tuned_learning_rates(tmp_path)
    with pytest.raises(UserError, match="study.py tuning"):
        trials.tuned_learning_rates(tmp_path / "nowhere")


def test_trials_have_different_names_and_are_compared_with_trials_of_their_study():
    assert set(methods.METHODS) == set(trials.TUNED) | set(trials.TUNED_AS)
    for make in trials.STUDIES.values():
        names = [trial.name for trial in make()]
        assert len(set(names)) == len(names)
        assert not any(character in name for name in names for character in "/ ")
        assert {trial.against for trial in make()} <= {"", *names}
    base, changed = profiles.get("cpu"), trials.ablations()[1:]
    settings = [(t.settings, "loss" if t.factor == "nll_per" else t.factor) for t in changed]
    assert all(values[name] != getattr(base, name) for values, name in settings)


@pytest.mark.parametrize("name", ["comparison", "curves", "stability", "regimes", "ablations"])
def test_the_tables_in_figures_are_those_of_the_kept_runs(name):
    """Kept runs of today's settings, the same table again, and learning rates of the tuning."""
    out = ROOT / "figures"
    study = runner.Study(name, out, Path("runs/study"), False, trials.select(name))
    assert len(study.valid()) == len(study.records.runs)
    table = report.table(name, trials.select(name), study.valid())
    shipped = pandas.read_csv(out / f"{name}.csv", dtype={"factor": str, "level": str})
    assert table.value.tolist() == pytest.approx(shipped.value.tolist())
    assert table[["method", "iteration", "metric"]].equals(
        shipped[["method", "iteration", "metric"]]
    )
    rates = json.loads((out / f"{name}.json").read_text())["rates"]
    assert {method: study.learning_rates[method] for method in rates} == rates


def test_pairs_that_are_one_step_apart():
    a = "2+3=5\n5*2=10\nFinal answer: 10"
    assert report.one_step_apart(a, "2+3=5\n5*2=12\nFinal answer: 12")
    assert not report.one_step_apart(a, a)
    assert not report.one_step_apart(a, "2+3=6\n6*2=12\nFinal answer: 12")
    assert not report.one_step_apart(a, "2+3=5\nFinal answer: 5")


@pytest.mark.parametrize(
    "name, only, message",
    [
        ("nothing", None, "no study 'nothing'.*tuning"),
        ("comparison", ["ppo"], "No trial.*ppo.*irpo"),
    ],
)
def test_unknown_names(tmp_path, name, only, message):
    with pytest.raises(UserError, match=message):
        runner.run_study(name, tmp_path, tmp_path / "runs", only=only, progress=False)


def test_the_script_ends_with_one_line_for_an_error(tmp_path):
    command = [sys.executable, "scripts/study.py", "comparison", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.search("^error: .*study.py tuning", done.stderr, re.M)
    assert "Traceback" not in done.stderr


def test_the_lesson_is_one_command(monkeypatch):
    done = []
    monkeypatch.setattr(lesson_study, "study", lambda *options: done.append(options))
    monkeypatch.setattr(lesson_report, "main", lambda arguments: done.append("report"))
    study.main(["lesson", "--jobs", "2", "--seeds", "1"])
    assert done == [(list(lesson_study.PARTS), 1, 2), "report"]
    for option in (["--small"], ["--only", "irpo"], ["--out", "elsewhere"]):
        with pytest.raises(SystemExit, match="error: .*lesson_study.py --help"):
            study.main(["lesson", *option])


def test_the_plain_model_is_made_once(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setitem(lesson_study.MODELS, "plain", str(tmp_path))
    monkeypatch.setattr(lesson_study.subprocess, "run", lambda c, check: commands.append(c))
    lesson_study.make_plain_model()
    assert commands[0][2:] == ["--words", "0", "--out", str(tmp_path)]
    (tmp_path / "model.safetensors").touch()
    lesson_study.make_plain_model()
    assert len(commands) == 1


# With small runs


class InThisProcess(Executor):
    """Runs one after another without starting processes, which takes longer than a small run."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = write_tuning(tmp_path_factory.mktemp("study"))
    table = run_small("comparison", out, only=["irpo", "star", "dpo_from_sft", "few_shot"])
    return out, table


@pytest.fixture
def results(finished, tmp_path):
    """A copy of the results without the run directories, as on another machine."""
    ignored = shutil.ignore_patterns("runs")
    return shutil.copytree(finished[0], tmp_path / "figures", ignore=ignored)


@pytest.mark.slow
def test_the_table_is_tidy_and_has_the_cost_of_each_number(finished):
    out, table = finished
    columns = "method seed iteration split metric k value low high n factor level tokens seconds"
    assert list(table.columns) == columns.split()
    assert set(table.method) == {"zero_shot", "irpo", "star", "dpo_from_sft", "few_shot"}
    assert (pandas.read_csv(out / "comparison.csv").value.round(9) == table.value.round(9)).all()
    record = json.loads((out / "comparison.json").read_text())
    assert record["rates"]["star"] == 3e-4 and record["small"] is True
    assert record["versions"]["torch"]
    greedy = table[table.metric == "greedy"].set_index(["method", "iteration"])
    assert greedy.tokens["irpo", 0] == 0 and greedy.seconds["irpo", 0] == 0
    run = out / "runs/comparison/irpo/seed_0"
    sampled = [sum(load_from_disk(str(run / f"iteration_{t}/samples"))["n_tokens"]) for t in (0, 1)]
    assert greedy.tokens["irpo", 1] == sampled[0] and greedy.tokens["irpo", 2] == sum(sampled)
    assert greedy.value["zero_shot", 0] == greedy.value["irpo", 0] == greedy.value["star", 0]


@pytest.mark.slow
def test_means_and_differences_are_those_of_the_table(finished):
    out, table = finished
    keys = ["method", "iteration", "metric"]
    means = pandas.read_csv(out / "comparison_mean.csv").set_index(keys)
    measured = table.set_index(keys).value
    assert means.value["star", 1, "greedy"] == pytest.approx(measured["star", 1, "greedy"])
    star, irpo = means.value["star", 2, "sampled"], means.value["irpo", 2, "sampled"]
    assert means.difference["star", 2, "sampled"] == pytest.approx(star - irpo)
    assert means.against["star", 2, "sampled"] == "irpo"
    keys = ["method", "iteration", "against", "against_iteration"]
    pair = pandas.read_csv(out / "comparison_paired.csv").set_index(keys).difference
    value = means.value[:, :, "greedy"]
    cells = ("irpo", 2, "irpo", 1), ("irpo", 1, "irpo", 0), ("star", 1, "dpo_from_sft", 1)
    for a, t, b, u in cells:
        assert pair[a, t, b, u] == pytest.approx(value[a, t] - value[b, u])


@pytest.mark.slow
def test_accuracies_are_kept_question_by_question(finished):
    out, _ = finished
    kept = report.Records("comparison", out).runs["irpo", 0]
    for metric in ("greedy", "sampled"):
        for t in (0, 1, 2):
            each = finished_runs.accuracy_per_question(
                out / "runs/comparison/irpo/seed_0", t, metric
            )
            assert report.accuracies(kept, t, metric) == pytest.approx(each)


@pytest.mark.slow
def test_completions_of_m0_are_shared_and_those_of_other_models_are_not(finished):
    runs = finished[0] / "runs" / "comparison"
    irpo, star, dpo = (runs / name / "seed_0" for name in ("irpo", "star", "dpo_from_sft"))
    assert arrow(irpo, 0, "samples") == arrow(star, 0, "samples") == arrow(dpo, 0, "samples")
    assert arrow(irpo, 0, "pairs") == arrow(dpo, 0, "pairs")
    assert arrow(irpo, 1, "samples") != arrow(star, 1, "samples")
    start = json.loads((dpo / "profile.json").read_text())["start"]
    assert start.endswith("star/seed_0/iteration_1/adapter")
    assert adapter(star, 1) == adapter(dpo, 0)


@pytest.mark.slow
def test_a_method_with_a_start_trains_on_completions_of_m0(finished, tmp_path):
    """Also where there is no run to share them with: not on completions of its start."""
    runs = finished[0] / "runs/comparison"
    profile = api.load_profile(runs / "dpo_from_sft/seed_0")
    api.run(dataclasses.replace(profile, iterations=1), tmp_path / "alone", progress=False)
    texts = [
        load_from_disk(str(run / "iteration_0/samples"))["completion"][:]
        for run in (tmp_path / "alone", runs / "irpo/seed_0")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_later_studies_continue_from_the_comparison(finished):
    out, _ = finished
    table = run_small("long", out, only=["irpo"])
    assert set(table.iteration) == {4, 5, 6}
    before, after = (out / "runs" / study / "irpo/seed_0" for study in ("comparison", "long"))
    assert adapter(before, 2) == adapter(after, 0) != adapter(after, 1)
    assert arrow(before, 0, "samples") != arrow(after, 0, "samples")  # not those of M_0
    assert (out / "eight_iterations.csv").exists()


@pytest.mark.slow
def test_log_probabilities_are_of_the_same_pairs_for_every_method(finished):
    out, _ = finished
    run_small("curves", out, only=["irpo", "star"])
    table = pandas.read_csv(out / "log_probabilities.csv")
    chosen = table[table.step == 0].set_index("method")["logps/chosen"]
    assert chosen["irpo"] == pytest.approx(chosen["star"], abs=1e-4)
    assert set(table.method) == {"irpo", "star"} and table.step.max() > 0


@pytest.mark.slow
def test_a_run_that_is_kept_is_not_run_again(results, finished, monkeypatch):
    """Also without its directory; and settings that are newer than it have their defaults."""
    file = results / "comparison_runs.jsonl"
    file.write_text(file.read_text().replace('"sampler": "transformers", ', ""))
    monkeypatch.setattr(runner, "_run_one", None)
    again = run_small("comparison", results, only=["irpo", "star", "dpo_from_sft", "few_shot"])
    assert again.equals(finished[1]) and not (results / "runs").exists()


@pytest.mark.slow
def test_what_a_new_run_starts_from_is_made_again(results, tmp_path):
    before = report.Records("comparison", results).runs
    table = run_small("comparison", results, tmp_path / "runs", only=["irpo", "irpo_from_sft"])
    made = {path.name for path in (tmp_path / "runs/comparison").iterdir()}
    assert made == {"star", "irpo_from_sft"}  # the second starts from M_1 of the first
    assert {"star", "few_shot", "irpo_from_sft"} <= set(table.method)
    after = report.Records("comparison", results).runs
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_a_kept_run_of_other_settings_is_in_no_table(results, tmp_path):
    file = results / "comparison_runs.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]

    def change(**settings):
        for record in records:
            if record["trial"] == "star":
                record["profile"] |= settings
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    change(n_questions=600)  # a small run does not replace one of full size
    with pytest.raises(UserError, match="runs of full size.*--out"):
        run_small("comparison", results, tmp_path / "runs", only=["irpo"])
    change(n_questions=24, lora_r=4)
    table = run_small("comparison", results, tmp_path / "runs", only=["irpo"])
    assert set(table.method) == {"zero_shot", "irpo", "dpo_from_sft", "few_shot"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_study_that_was_killed_resumes(tmp_path):
    out = write_tuning(tmp_path)
    command = [sys.executable, str(ROOT / "scripts/study.py"), "comparison", "--small"]
    command += ["--only", "irpo", "--seeds", "1", "--out", str(out), "--runs", str(out / "runs")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    first = out / "runs/comparison/irpo/seed_0/iteration_0/samples/checksums.json"
    deadline = time.monotonic() + 300
    while process.poll() is None and not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "comparison_runs.jsonl").exists()  # half a run is in no table
    before = first.stat().st_mtime_ns
    table = run_small("comparison", out, only=["irpo"])
    assert first.stat().st_mtime_ns == before
    assert set(table[table.method == "irpo"].iteration) == {0, 1, 2}


@pytest.mark.slow
def test_a_run_that_stops_early_is_a_result(tmp_path, monkeypatch):
    """With one completion per question there are no pairs: the study says so and ends well."""
    monkeypatch.setitem(trials.SMALL, "n_samples", 1)
    table = run_small("comparison", write_tuning(tmp_path), only=["star"])
    assert table[table.metric == "stopped"].iteration.tolist() == [1]
    assert set(table[table.metric == "greedy"].iteration) == {0}


def test_luck_rewards_the_gold_answer_and_one_incorrect_answer_in_four():
    many = [{"id": "a", "extracted": str(i), "correct": i == 5} for i in range(1000)]
    many.append({"id": "a", "extracted": None, "correct": False})
    rewards = lucky.by_luck(many)
    assert rewards[5] == 1 and rewards[-1] == 0 and 200 < sum(rewards) < 300
    assert rewards == lucky.by_luck(many)


@pytest.mark.parametrize("name", lucky.LUCKY)
def test_the_lucky_methods_can_be_run_and_are_trials_of_the_regimes_only(name):
    assert methods.get(name).title and methods.apply(profiles.get("smoke", method=name))
    assert name in {trial.method for trial in trials.regimes()}
    assert name not in {trial.method for trial in [*trials.comparison(), *trials.tuning()]}


@pytest.mark.slow
def test_a_lucky_letter_is_told_from_a_correct_number(tmp_path):
    """`solved` counts correct numbers; at least as many letters are correct."""
    out = write_tuning(tmp_path)
    run_small("regimes", out, only=["irpo_choices"])
    kept = report.Records("regimes", out).runs["irpo_choices", 0]
    evaluation = out / "runs/regimes/irpo_choices/seed_0/iteration_2/evaluation"
    greedy = load_from_disk(str(evaluation))["greedy"]
    numbers = {row["id"]: row["answer"] for row in tasks.get("word_problems").load("test")}
    solved = [
        row["completion"].rstrip().endswith(f"Final answer: {numbers[row['id']]}") for row in greedy
    ]
    assert report.accuracies(kept, 2, "solved") == solved
    assert sum(solved) <= sum(greedy["correct"])
    metrics = pandas.read_csv(out / "regimes_mean.csv").metric
    assert set(metrics) == {"greedy", "sampled", "solved"}


@pytest.mark.parametrize("fault", check_reliability.FAULTS)
def test_every_injected_fault_names_tests_that_exist(fault):
    *files, words = check_reliability.FAULTS[fault]
    for file in files:
        names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
        assert any(word in name for word in words.split(" or ") for name in names), file
