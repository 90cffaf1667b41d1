"""A study over methods and seeds: what is shared, what is kept, what ends up in the table."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas
import pytest
from datasets import load_from_disk

from irpo_utils import UserError, iteration, methods, profiles, report, study, tasks

BEST = {"irpo": 1e-4, "iterative_dpo": 2e-5, "star": 3e-4}


def tuned(folder, leave_out=lambda row: False):
    """A table as the tuning writes it, with an early iteration that would mislead."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in study.TUNED:
        for rate in study.RATES:
            value = (
                0.8 if rate == BEST.get(method, 2e-5) or (method, rate) == ("irpo", 3e-4) else 0.5
            )
            rows += [
                {
                    "method": method,
                    "level": rate,
                    "iteration": t,
                    "metric": "greedy",
                    "value": value if t == 2 else 1 - value,
                }
                for t in (1, 2)
            ]
    pandas.DataFrame([row for row in rows if not leave_out(row)]).to_csv(
        folder / "tuning_of_methods.csv", index=False
    )
    return folder


def test_the_rate_of_a_method_is_the_best_of_its_last_iteration(tmp_path):
    rates = study.tuned_rates(tuned(tmp_path))
    assert {name: rates[name] for name in BEST} == BEST and set(rates) == set(
        study.TUNED
    )  # of two equal ones the smaller
    stopped = study.tuned_rates(
        tuned(
            tmp_path,
            lambda row: row["method"] == "star" and row["level"] == 3e-4 and row["iteration"] == 2,
        )
    )
    assert stopped["star"] == 2e-5  # what stopped after M_1 is not chosen by its M_1
    some = tuned(tmp_path, lambda row: row["method"] not in BEST)
    assert (
        study.tuned_rates(some, set(BEST)) == BEST
    )  # the others need not be there for those that are asked for
    with pytest.raises(UserError, match="no learning rate for grpo.*study tuning --only grpo"):
        study.settings(study.Trial("grpo"), 0, BEST, tmp_path)
    with pytest.raises(UserError, match="lacks 3 of its runs, such as grpo at 2e-05.*study tuning"):
        study.tuned_rates(tuned(tmp_path, lambda row: row["method"] == "grpo"))
    with pytest.raises(UserError, match="study tuning"):
        study.tuned_rates(tmp_path / "nowhere")


def test_every_method_has_a_rate_and_every_trial_a_name_of_its_own():
    assert set(methods.METHODS) == set(study.TUNED) | set(study.LIKE)
    for make in study.STUDIES.values():
        names = [trial.name for trial in make()]
        assert len(set(names)) == len(names) and not any(
            "/" in name or " " in name for name in names
        )
        assert {trial.against for trial in make()} <= {
            "",
            *names,
        }  # what each is compared with is run, too
    base = profiles.get("cpu")
    changed = [t for t in study.ablations() if t.factor != "base"]
    assert all(t.settings[t.factor] != getattr(base, t.factor) for t in changed) and len(
        changed
    ) + 1 == len(study.ablations())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tuned(tmp_path_factory.mktemp("study"))
    table = study.study(
        "comparison",
        out,
        out / "runs",
        seeds=1,
        only=["irpo", "star", "dpo_from_sft", "few_shot"],
        small=True,
        progress=False,
    )
    return out, table


def test_the_table_is_tidy_and_says_what_each_number_cost(finished):
    out, table = finished
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
        "factor",
        "level",
        "tokens",
        "seconds",
    ]
    assert set(table.method) == {"zero_shot", "irpo", "star", "dpo_from_sft", "few_shot"}
    assert (pandas.read_csv(out / "comparison.csv").value.round(9) == table.value.round(9)).all()
    means = pandas.read_csv(out / "comparison_mean.csv").set_index(
        ["method", "iteration", "metric"]
    )
    assert means.value["star", 1, "greedy"] == pytest.approx(
        table[
            (table.method == "star") & (table.iteration == 1) & (table.metric == "greedy")
        ].value.iloc[0]
    )
    star, irpo = means.value["star", 2, "sampled"], means.value["irpo", 2, "sampled"]
    pair = pandas.read_csv(out / "comparison_paired.csv").set_index(
        ["method", "iteration", "against", "against_iteration"]
    )
    value = means.value[:, :, "greedy"]
    for a, t, b, u in (
        ("irpo", 2, "irpo", 1),
        ("irpo", 1, "irpo", 0),
        ("star", 1, "dpo_from_sft", 1),
    ):
        assert pair.difference[a, t, b, u] == pytest.approx(value[a, t] - value[b, u])
    assert (
        means.difference["star", 2, "sampled"] == pytest.approx(star - irpo)
        and means.against["star", 2, "sampled"] == "irpo"
    )
    record = json.loads((out / "comparison.json").read_text())
    assert (
        record["rates"]["star"] == 3e-4 and record["versions"]["torch"] and record["small"] is True
    )
    greedy = table[table.metric == "greedy"].set_index(["method", "iteration"])
    assert greedy.tokens["irpo", 0] == 0 and greedy.seconds["irpo", 0] == 0
    samples = [
        sum(
            load_from_disk(str(out / f"runs/comparison/irpo/seed_0/iteration_{t}/samples"))[
                "n_tokens"
            ]
        )
        for t in (0, 1)
    ]
    assert greedy.tokens["irpo", 1] == samples[0] and greedy.tokens["irpo", 2] == sum(samples)
    assert greedy.value["zero_shot", 0] == greedy.value["irpo", 0] == greedy.value["star", 0]


def test_what_m0_wrote_is_shared_and_what_another_model_wrote_is_not(finished):
    runs = finished[0] / "runs" / "comparison"
    read = lambda name, t, stage: (
        runs / name / "seed_0" / f"iteration_{t}" / stage / "data-00000-of-00001.arrow"
    ).read_bytes()  # noqa: E731
    assert (
        read("irpo", 0, "samples")
        == read("star", 0, "samples")
        == read("dpo_from_sft", 0, "samples")
    )
    assert read("irpo", 0, "pairs") == read("dpo_from_sft", 0, "pairs")
    assert read("irpo", 1, "samples") != read("star", 1, "samples")
    start = json.loads((runs / "dpo_from_sft" / "seed_0" / "profile.json").read_text())["start"]
    assert start.endswith("star/seed_0/iteration_1/adapter")
    weights = [
        (runs / name / "seed_0" / f"iteration_{t}/adapter/adapter_model.safetensors").read_bytes()
        for name, t in (("star", 1), ("dpo_from_sft", 0))
    ]
    assert weights[0] == weights[1]


def test_later_studies_go_on_from_the_comparison(finished):
    out, _ = finished
    table = study.study(
        "long", out, out / "runs", seeds=1, only=["irpo"], small=True, progress=False
    )
    assert set(table.iteration) == {4, 5, 6}
    weights = [
        (out / "runs" / place / "adapter/adapter_model.safetensors").read_bytes()
        for place in (
            "comparison/irpo/seed_0/iteration_2",
            "long/irpo/seed_0/iteration_0",
            "long/irpo/seed_0/iteration_1",
        )
    ]
    assert weights[0] == weights[1] != weights[2]
    samples = [
        (
            out / "runs" / study_name / "irpo/seed_0/iteration_0/samples/data-00000-of-00001.arrow"
        ).read_bytes()
        for study_name in ("comparison", "long")
    ]
    assert samples[0] != samples[1]  # not those of M_0
    assert (out / "eight_iterations.csv").exists()


def test_log_probabilities_of_the_same_pairs_for_every_method(finished):
    out, _ = finished
    study.study(
        "curves", out, out / "runs", seeds=1, only=["irpo", "star"], small=True, progress=False
    )
    table = pandas.read_csv(out / "log_probabilities.csv")
    first = table[table.step == 0].set_index("method")
    assert first.logps_chosen["irpo"] == pytest.approx(first.logps_chosen["star"], abs=1e-4)
    assert set(table.method) == {"irpo", "star"} and table.step.max() > 0


def test_pairs_that_are_one_step_apart():
    a = "2+3=5\n5*2=10\nFinal answer: 10"
    assert report.one_step_apart(
        a, "2+3=5\n5*2=12\nFinal answer: 12"
    ) and not report.one_step_apart(a, a)
    assert not report.one_step_apart(
        a, "2+3=6\n6*2=12\nFinal answer: 12"
    ) and not report.one_step_apart(a, "2+3=5\nFinal answer: 5")


def test_a_study_that_is_there_is_not_made_again(finished, monkeypatch):
    out, table = finished
    monkeypatch.setattr(study, "_run_one", None)  # nothing may be run
    again = study.study(
        "comparison",
        out,
        out / "runs",
        seeds=1,
        only=["irpo", "star", "dpo_from_sft", "few_shot"],
        small=True,
        progress=False,
    )
    assert again.equals(table)


def test_a_study_that_was_killed_goes_on_where_it_stood(tmp_path):
    out = tuned(tmp_path)
    command = [
        sys.executable,
        "-m",
        "irpo_utils",
        "study",
        "comparison",
        "--only",
        "irpo",
        "--seeds",
        "1",
        "--small",
        "--out",
        str(out),
        "--runs",
        str(out / "runs"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    first = (
        out
        / "runs"
        / "comparison"
        / "irpo"
        / "seed_0"
        / "iteration_0"
        / "samples"
        / "checksums.json"
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "comparison_runs.jsonl").exists()  # half a run is in no table
    before = first.stat().st_mtime_ns
    table = study.study(
        "comparison", out, out / "runs", seeds=1, only=["irpo"], small=True, progress=False
    )
    assert first.stat().st_mtime_ns == before and set(table[table.method == "irpo"].iteration) == {
        0,
        1,
        2,
    }


def test_a_run_that_cannot_go_on_is_a_result(tmp_path):
    """One completion a question never has both kinds: no pairs, and the study says so and ends well."""
    out = tuned(tmp_path)
    study.SMALL["n_samples"], before = 1, study.SMALL["n_samples"]
    try:
        table = study.study(
            "comparison", out, out / "runs", seeds=1, only=["star"], small=True, progress=False
        )
    finally:
        study.SMALL["n_samples"] = before
    stopped = table[table.metric == "stopped"]
    assert (
        len(stopped) == 1
        and stopped.iteration.iloc[0] == 1
        and set(table[table.metric == "greedy"].iteration) == {0}
    )


@pytest.mark.parametrize(
    "name, only, message",
    [
        ("nothing", None, "no study 'nothing'.*tuning"),
        ("comparison", ["ppo"], "No trial.*ppo.*irpo"),
    ],
)
def test_unknown_names(tmp_path, name, only, message):
    with pytest.raises(UserError, match=message):
        study.study(name, tmp_path, tmp_path / "runs", only=only, progress=False)


def test_a_study_goes_on_where_the_run_directories_are_gone(finished, tmp_path):
    """On another machine with figures/ alone: what was measured stays, and what a new run begins with is made again."""
    out = tmp_path / "figures"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("runs"))
    text = (
        out / "comparison_runs.jsonl"
    ).read_text()  # as before a field was added: its default counts
    (out / "comparison_runs.jsonl").write_text(text.replace('"sampler": "transformers", ', ""))
    before = [json.loads(line) for line in (out / "comparison_runs.jsonl").read_text().splitlines()]
    table = study.study(
        "comparison",
        out,
        tmp_path / "runs",
        seeds=1,
        only=["irpo", "irpo_from_sft"],
        small=True,
        progress=False,
    )
    made = {path.name for path in (tmp_path / "runs" / "comparison").iterdir()}
    assert made == {"star", "irpo_from_sft"}  # the second begins with M_1 of the first
    assert set(table.method) == {
        "zero_shot",
        "irpo",
        "star",
        "dpo_from_sft",
        "few_shot",
        "irpo_from_sft",
    }
    after = [json.loads(line) for line in (out / "comparison_runs.jsonl").read_text().splitlines()]
    assert [run for run in after if run["trial"] != "irpo_from_sft"] == before


def test_a_method_with_a_start_of_its_own_learns_from_what_m0_wrote(finished, tmp_path):
    """Also where nobody has drawn it before: not from what its start writes."""
    out, _ = finished
    p = iteration.load_profile(out / "runs/comparison/dpo_from_sft/seed_0")
    iteration.run(dataclasses.replace(p, iterations=1), tmp_path / "alone", progress=False)
    drawn = [
        load_from_disk(str(folder / "iteration_0/samples"))["completion"][:]
        for folder in (tmp_path / "alone", out / "runs/comparison/irpo/seed_0")
    ]
    assert drawn[0] == drawn[1]


def test_a_record_of_other_settings_is_no_result(finished, tmp_path):
    out = tmp_path / "figures"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("runs"))
    lines = (
        (out / "comparison_runs.jsonl")
        .read_text()
        .replace(
            '"trial": "star", "seed": 0, "profile": {',
            '"trial": "star", "seed": 0, "profile": {"lora_r": 4, ',
        )
    )
    (out / "comparison_runs.jsonl").write_text(
        re.sub('("lora_r": 4, .*?)"lora_r": 16', r'\1"lora_r": 4', lines)
    )
    text = (out / "comparison_runs.jsonl").read_text()
    (out / "comparison_runs.jsonl").write_text(
        text.replace('"n_questions": 24', '"n_questions": 600')
    )
    with pytest.raises(
        UserError, match="runs of full size.*--out"
    ):  # nor does a small run take the place of a full one
        study.study("comparison", out, tmp_path / "runs", only=["irpo"], small=True, progress=False)
    (out / "comparison_runs.jsonl").write_text(text)
    table = study.study(
        "comparison", out, tmp_path / "runs", seeds=1, only=["irpo"], small=True, progress=False
    )
    assert (
        set(table.method) == {"zero_shot", "irpo", "dpo_from_sft", "few_shot"}
        and not (tmp_path / "runs").exists()
    )


def test_answers_are_kept_question_by_question(finished):
    out, table = finished
    kept = report.Records("comparison", out).runs["irpo", 0]
    for metric in ("greedy", "sampled"):
        for t in (0, 1, 2):
            each = iteration.accuracy_per_question(out / "runs/comparison/irpo/seed_0", t, metric)
            assert report.accuracies(kept, t, metric) == pytest.approx(each)


def test_luck_in_multiple_choice_is_told_from_knowledge(finished, tmp_path):
    """`solved` counts the right numbers, of which the right letters are at least as many."""
    shutil.copy(finished[0] / "tuning_of_methods.csv", tmp_path)
    study.study(
        "regimes",
        tmp_path,
        tmp_path / "runs",
        seeds=1,
        only=["irpo_choices"],
        small=True,
        progress=False,
    )
    kept = report.Records("regimes", tmp_path).runs["irpo_choices", 0]
    greedy = load_from_disk(
        str(tmp_path / "runs/regimes/irpo_choices/seed_0/iteration_2/evaluation")
    )["greedy"]
    numbers = {row["id"]: row["answer"] for row in tasks.get("word_problems").load("test")}
    solved = [
        row["completion"].rstrip().endswith(f"Final answer: {numbers[row['id']]}") for row in greedy
    ]
    assert report.accuracies(kept, 2, "solved") == solved and sum(solved) <= sum(greedy["correct"])
    assert set(pandas.read_csv(tmp_path / "regimes_mean.csv").metric) == {
        "greedy",
        "sampled",
        "solved",
    }
