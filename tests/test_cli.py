"""The command line as a user meets it: what goes wrong is one paragraph that says what to do, never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas
import pytest

from irpo_utils import __main__ as cli

TINY = [
    "--profile",
    "smoke",
    "--quiet",
    "--iterations",
    "1",
    "--n-questions",
    "24",
    "--n-samples",
    "4",
    "--n-eval-questions",
    "20",
    "--eval-samples-ends",
    "2",
]


def irpo(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "irpo_utils", *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def assert_clean_error(result, *words):
    assert result.returncode != 0
    assert "Traceback" not in result.stderr + result.stdout
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and len(message) > 60, result.stderr
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One tiny run by the real command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return out, irpo("run", *TINY, "--out", out)


def test_run_ends_with_the_table_and_the_place_of_the_figure(run):
    out, result = run
    assert result.returncode == 0, result.stderr
    assert "M_0" in result.stdout and "M_1" in result.stdout and "greedy" in result.stdout
    assert str(out / "accuracy_per_iteration.png") in result.stdout
    for name in (
        "metrics.csv",
        "timing.csv",
        "accuracy_per_iteration.png",
        "accuracy_per_iteration.svg",
    ):
        assert (out / name).stat().st_size > 0
    record = json.loads((out / "accuracy_per_iteration.json").read_text())
    assert (
        record["seed"] == 0
        and record["versions"]["torch"]
        and "--n-questions 24" in record["command"]
    )


def test_run_prints_counts_of_pairs_and_the_warning_numbers(run):
    _, result = run
    assert "all wrong" in result.stdout and "duplicate completions" in result.stdout
    assert "KL to M_0" in result.stdout and "log-probability per token" in result.stdout


def test_the_same_command_again_does_nothing_and_says_the_same(run):
    out, result = run
    assert (
        irpo("run", *TINY, "--out", out).stdout.splitlines()[-5:] == result.stdout.splitlines()[-5:]
    )


def test_other_settings_over_the_same_directory(run):
    assert_clean_error(
        irpo("run", *TINY, "--alpha", "2", "--out", run[0]), "alpha", "Choose another --out"
    )


def test_plot_draws_from_run_directories(run, tmp_path):
    result = irpo("plot", run[0], "--out", tmp_path / "figures")
    assert result.returncode == 0, result.stderr
    table = pandas.read_csv(tmp_path / "figures" / "accuracy_per_iteration.csv")
    assert (
        set(table.iteration) == {0, 1}
        and (tmp_path / "figures" / "accuracy_per_iteration.svg").exists()
    )


def test_evaluate_again(run):
    result = irpo("evaluate", run[0], "--split", "validation", "--k", "2", "--iterations", "1")
    assert result.returncode == 0, result.stderr
    assert "greedy" in result.stdout


def test_unknown_profile():
    assert_clean_error(irpo("run", "--profile", "laptop"), "laptop", "smoke", "cpu")


def test_unknown_field_suggests_the_right_one():
    assert_clean_error(irpo("run", "--learning_rat", "1"), "--learning_rat", "--learning-rate")


def test_unknown_task(tmp_path):
    assert_clean_error(
        irpo("run", *TINY, "--task", "crosswords", "--out", tmp_path / "o"),
        "crosswords",
        "word_problems",
        "jsonl",
    )


def test_value_out_of_range(tmp_path):
    assert_clean_error(
        irpo("run", "--n-samples", "0", "--out", tmp_path / "o"), "--n-samples", "at least 1"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("--learning-rate", "-1"),
        ("--lr-scheduler", "foo"),
        ("--optimizer", "foo"),
        ("--lora-r", "0"),
        ("--seed", "-1"),
        ("--epochs", "0"),
        ("--epochs", "inf"),
        ("--max-pairs", "0"),
        ("--alpha", "-1"),
        ("--nll-per", "x"),
        ("--warmup-ratio", "1.5"),
        ("--n-samples", "abc"),
        ("--report-to", "no_such_logger"),
        ("--dtype", "int3"),
        ("--temperature", "0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_done(
    option, value, tmp_path, capsys
):
    assert cli.main(["run", *TINY, option, value, "--out", str(tmp_path / "o")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and (
        option in message or option.replace("-", "_")[2:] in message
    )
    assert not (tmp_path / "o").exists()


def test_none_means_all_where_a_limit_is_optional():
    profile, _ = cli._parse_profile(["--n-questions", "none", "--max-pairs", "all", "--seed", "3"])
    assert profile.n_questions is None and profile.max_pairs is None and profile.seed == 3


def write_jsonl(path, lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return path


def test_malformed_row_names_file_and_line(tmp_path):
    good = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(30)]
    data = write_jsonl(tmp_path / "mine.jsonl", [*good[:6], '{"question": "no answer"}', *good[6:]])
    assert_clean_error(
        irpo("run", *TINY, "--task", "jsonl", "--data", data, "--out", tmp_path / "o"),
        "mine.jsonl",
        "7",
        "answer",
    )
    data = write_jsonl(tmp_path / "broken.jsonl", [*good[:3], "{not json", *good[3:]])
    assert_clean_error(
        irpo("run", *TINY, "--task", "jsonl", "--data", data, "--out", tmp_path / "o"),
        "broken.jsonl",
        "4",
    )


def test_a_file_of_ones_own_runs(tmp_path):
    """The embedded questions written out as a user's file, so that the seed model can answer some."""
    from irpo_utils.tasks import word_problems

    rows = [
        {"question": r["question"], "answer": r["answer"]}
        for r in word_problems.all_splits()["train"][:120]
    ]
    data = write_jsonl(tmp_path / "mine.jsonl", rows)
    result = irpo(
        "run",
        *TINY,
        "--task",
        "jsonl",
        "--data",
        data,
        "--out",
        tmp_path / "o",
        "--n-eval-questions",
        "5",
        "--n-questions",
        "60",
        "--n-samples",
        "8",
        "--temperature",
        "1.0",
    )
    if (
        result.returncode
    ):  # the prompt is not M_0's own, so that it may answer none: then it must say so
        assert_clean_error(result, "no pairs")
    else:
        assert "M_1" in result.stdout


@pytest.mark.parametrize("answer, advice", [("impossible", "too weak")])
def test_questions_that_nobody_can_answer_end_in_no_pairs(tmp_path, answer, advice):
    data = write_jsonl(
        tmp_path / "hard.jsonl",
        [{"question": f"Riddle {i}?", "answer": f"{answer} {i}"} for i in range(60)],
    )
    assert_clean_error(
        irpo("run", *TINY, "--task", "jsonl", "--data", data, "--out", tmp_path / "o"),
        "no pairs",
        advice,
        "--n-samples",
    )


def test_a_mistake_in_the_data_leaves_nothing_behind(tmp_path):
    result = irpo(
        "run",
        *TINY,
        "--task",
        "jsonl",
        "--data",
        write_jsonl(tmp_path / "a.jsonl", ["{"]),
        "--out",
        tmp_path / "o",
    )
    assert_clean_error(result, "a.jsonl")
    assert not (tmp_path / "o").exists()


def test_missing_data_file(tmp_path):
    assert_clean_error(
        irpo(
            "run",
            *TINY,
            "--task",
            "jsonl",
            "--data",
            tmp_path / "none.jsonl",
            "--out",
            tmp_path / "o",
        ),
        "none.jsonl",
    )


def test_model_folder_without_tokenizer(tmp_path):
    import shutil

    from irpo_utils.models import SEED_MODEL

    folder = shutil.copytree(SEED_MODEL, tmp_path / "model")
    (folder / "tokenizer.json").unlink(), (folder / "tokenizer_config.json").unlink()
    assert_clean_error(
        irpo("run", *TINY, "--model", folder, "--out", tmp_path / "o"),
        "No tokenizer",
        "save_pretrained",
    )


def test_output_folder_on_a_full_disk(run, tmp_path):
    """A file where the folder should be stands for any place that cannot be written."""
    (tmp_path / "file").write_text("")
    assert_clean_error(
        irpo("run", *TINY, "--out", tmp_path / "file" / "o"), "could not be written", "--out"
    )


def test_plot_of_something_that_is_no_run(tmp_path):
    assert_clean_error(irpo("plot", tmp_path), "not a run directory")


def test_help_lists_every_command_and_every_field():
    assert all(word in irpo("--help").stdout for word in ("run", "evaluate", "plot"))
    text = irpo("run", "--help").stdout
    assert all(
        flag in text
        for flag in (
            "--n-samples",
            "--k-pairs",
            "--alpha",
            "--beta",
            "--learning-rate",
            "--temperature",
        )
    )


def test_accuracy_table_shows_intervals():
    rows = [
        dict(iteration=0, metric="greedy", k=1, value=0.25, low=0.2, high=0.3),
        dict(iteration=0, metric="mean_tokens", k=1, value=9.5, low=9, high=10),
    ]
    assert "25.0 (20.0-30.0)" in cli.accuracy_table(
        pandas.DataFrame(rows)
    ) and "9.5" in cli.accuracy_table(pandas.DataFrame(rows))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_while_an_object_is_deleted_is_not_lost(monkeypatch, capsys, number, status):
    """Python drops what is raised there; the library that holds our tables has such objects."""

    class Table:
        def __del__(self):
            signal.raise_signal(number)
            time.sleep(0.01)

    def busy(arguments):
        Table()
        time.sleep(20)
        raise AssertionError("nobody heard it")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "run", busy)
    try:
        assert cli.main(["run"]) == status
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert (
        said == "\nStopped. What was finished is kept: the same command goes on where it stood.\n"
    )


@pytest.mark.parametrize("until", ["iteration_0/graded", "iteration_1/adapter"])
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(run, tmp_path, until):
    """The keyboard's signal goes to the whole process group, bars and all; what was finished is not done again."""
    out = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "irpo_utils",
        "run",
        *[word for word in TINY if word != "--quiet"],
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # whatever the shell did with it
    before = {
        "iteration_0/graded": "iteration_0/samples",
        "iteration_1/adapter": "iteration_0/pairs",
    }[until]
    deadline = time.monotonic() + 200
    while process.poll() is None and not (out / before).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said[-2000:]
    assert (
        said.strip().splitlines()[-1]
        == "Stopped. What was finished is kept: the same command goes on where it stood."
    )
    kept = (out / before / "checksums.json").stat().st_mtime_ns
    assert irpo("run", *TINY, "--out", out).returncode == 0
    assert (out / before / "checksums.json").stat().st_mtime_ns == kept
    assert (out / "metrics.csv").read_text() == (run[0] / "metrics.csv").read_text()


@pytest.mark.parametrize("place", ["load", "score"])
def test_out_of_memory_anywhere_is_one_paragraph(tmp_path, monkeypatch, capsys, place):
    """Also where no smaller batch can help: loading the model, or scoring a single row."""
    import torch

    from irpo_utils import models

    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(models, place, fails)
    assert cli.main(["run", *TINY, "--out", str(tmp_path / "o")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said.startswith("error: Out of memory (CUDA out of memory.")
        and "--micro-batch-size" in said
        and "irpo_utils plan" in said
    )


def test_an_interrupt_while_an_error_is_reported_still_ends_in_one_message(
    tmp_path, monkeypatch, capsys
):
    """As a launcher does that ends the other processes while one waits whether it has to speak."""

    def interrupted(message):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(cli, "_say", interrupted)
    assert cli.main(["run", *TINY, "--task", "crosswords", "--out", str(tmp_path / "o")]) == 143
    assert (
        capsys.readouterr().err.strip()
        == "Stopped. What was finished is kept: the same command goes on where it stood."
    )
