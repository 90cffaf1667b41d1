"""The command line as a user meets it: a mistake is one paragraph, never a traceback."""

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
import torch

import evaluate
import plot
from irpo_utils import UserError, models, tasks
from irpo_utils.ops import cli

ROOT = Path(__file__).parent.parent
TINY = (
    "--profile smoke --quiet --iterations 1 --n-questions 16 --n-samples 4 --n-eval-questions 10 "
    "--eval-samples-ends 2"
).split()
SCRIPTS = {"plot": plot.plot, "evaluate": evaluate.evaluate}
STOPPED = "Stopped. What was finished is kept: the same command resumes it."


def irpo(*arguments):
    words = [sys.executable, "-m", "irpo_utils", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True)


def command(name, *arguments) -> int:
    """The exit status of a command of the package or of a script for finished runs."""
    words = [str(word) for word in arguments]
    if name in SCRIPTS:
        return cli.run_command(SCRIPTS[name], words)
    return cli.main([name, *words])


def refused(capsys, *arguments) -> str:
    """The message of a command that a user's mistake ends."""
    assert command(*arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and len(message) > 60, message
    return message


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run by the real command: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return out, irpo("run", *TINY, "--out", out)


# ---- run, plot, evaluate


def test_the_script_that_runs_knows_the_methods_of_the_studies():
    words = [sys.executable, "scripts/run.py", "--method", "ppo"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: There is no method 'ppo'")
    assert all(name in done.stderr for name in ("irpo", "self_consistency", "grpo"))


def test_the_script_that_runs_has_the_probe():
    """Both commands are wrong about --start, which is looked at after the probe."""
    options = "--profile smoke --probe-every 1 --start nowhere".split()
    done = irpo("run", *options)
    assert done.returncode == 1 and "need scripts/run.py" in done.stderr
    words = [sys.executable, "scripts/run.py", *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "nowhere" in done.stderr
    assert "need scripts/run.py" not in done.stderr


def test_run_ends_with_the_table_and_the_place_of_the_figure(run):
    out, result = run
    assert result.returncode == 0, result.stderr
    assert "M_0" in result.stdout and "M_1" in result.stdout and "greedy" in result.stdout
    assert str(out / "accuracy_per_iteration.png") in result.stdout
    for name in ("metrics.csv", "timing.csv", "accuracy_per_iteration.svg"):
        assert (out / name).stat().st_size > 0
    record = json.loads((out / "accuracy_per_iteration.json").read_text())
    assert record["seed"] == 0 and record["versions"]["torch"]
    assert "run --profile smoke" in record["command"] and "--n-questions 16" in record["command"]


def test_run_prints_accuracy_pairs_and_kl_of_each_iteration(run):
    for word in ("pairs_pairs", "pairs_used", "kl_to_previous", "sampled"):
        assert word in run[1].stdout + run[1].stderr


def test_the_same_command_again_prints_the_same_table(run, capsys):
    assert cli.main(["run", *TINY, "--out", str(run[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == run[1].stdout.splitlines()[-5:]


def test_other_settings_in_the_same_directory(run, capsys):
    message = refused(capsys, "run", *TINY, "--alpha", 2, "--out", run[0])
    assert "alpha (1.0 there, 2.0 now)" in message and "Choose another --out" in message


def test_plot_draws_from_run_directories(run, tmp_path, capsys):
    assert command("plot", run[0], "--out", tmp_path, "--name", "mine") == 0
    assert "M_1" in capsys.readouterr().out
    assert set(pandas.read_csv(tmp_path / "mine.csv").iteration) == {0, 1}
    assert (tmp_path / "mine.svg").exists() and (tmp_path / "mine_mean.csv").exists()
    made_by = json.loads((tmp_path / "mine.json").read_text())["command"]
    assert made_by == f"python scripts/plot.py {run[0]} --out {tmp_path} --name mine"
    of_the_run = (run[0] / "accuracy_per_iteration.json").read_text()
    assert command("plot", run[0]) == 0  # into the folder of the run, next to its own figure
    assert (run[0] / "accuracy_of_seeds.png").exists()
    assert (run[0] / "accuracy_per_iteration.json").read_text() == of_the_run


def test_evaluate_again(run, tmp_path, capsys):
    rows = tasks.get("word_problems").load("validation").select(range(5))
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [dict(row) for row in rows])
    words = ["evaluate", run[0], "--task", "jsonl", "--data", tmp_path, "--k", 2]
    assert command(*words, "--iterations", 1, "--allow-overlap", "false") == 0
    assert "greedy" in capsys.readouterr().out
    assert (run[0] / "evaluations" / "jsonl_test.csv").exists()


def test_evaluate_the_best_iteration(run, capsys):
    message = refused(capsys, "evaluate", run[0], "--iterations", "best", "--split", "test")
    assert "accuracy on the test split" in message and "--eval-split validation" in message
    with pytest.raises(SystemExit):
        command("evaluate", run[0], "--iterations", "worst")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_run_ends_with_the_next_command(monkeypatch, tmp_path, capsys, split):
    from irpo_utils.ops import run as runs

    metrics = ROOT / "notebooks" / "shipped_run" / "metrics.csv"
    rows = pandas.read_csv(metrics).to_dict("records")
    monkeypatch.setattr(runs, "run", lambda *arguments, **options: rows)
    words = ["--profile", "smoke", "--eval-split", split, "--quiet", "--out", str(tmp_path)]
    assert cli.main(["run", *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    following = f"python scripts/evaluate.py {tmp_path} --iterations best --split test"
    assert last.endswith(following) == (split == "validation")


def test_accuracy_table_shows_intervals():
    rows = [
        {"iteration": 0, "metric": "greedy", "k": 1, "value": 0.25, "low": 0.2, "high": 0.3},
        {"iteration": 0, "metric": "mean_tokens", "k": 1, "value": 9.5, "low": 9, "high": 10},
    ]
    table = cli.accuracy_table(pandas.DataFrame(rows))
    assert "25.0 (20.0-30.0)" in table and "9.5" in table


def test_help_lists_every_command_and_every_option(capsys):
    text = irpo("--help").stdout
    assert all(word in text for word in ("run", "plan"))
    for name in ("run", "plan"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        text = capsys.readouterr().out
        for option in ("--n-samples", "--k-pairs", "--alpha", "--learning-rate", "--config"):
            assert option in text
        assert "(default: 2e-05)" in text


# ---- options


@pytest.mark.parametrize(
    "words, field, value",
    [
        (["--n-questions", "none"], "n_questions", None),
        (["--n-questions", "all"], "n_questions", None),
        (["--max-pairs=all"], "max_pairs", None),
        (["--data=none"], "data", None),
        (["--n-questions", "none", "--n-questions", "3"], "n_questions", 3),
        (["--data", "all"], "data", "all"),
        (["--data=all"], "data", "all"),
        (["--pad-token", "all"], "pad_token", "all"),
        (["--model", "none"], "model", "none"),
        (["--report-to", "none"], "report_to", "none"),
        (["--no-quantize"], "quantize", False),
        (["--quantize", "false"], "quantize", False),
        (["--quantize", "none"], "quantize", None),
        (["--gradient-checkpointing"], "gradient_checkpointing", True),
        (["--gradient-checkpointing", "none"], "gradient_checkpointing", None),
        (["--gold"], "gold", True),
        (["--n_samples", "3"], "n_samples", 3),
        (["--temperature", "0.8", "1.0"], "temperature", [0.8, 1.0]),
    ],
)
def test_an_option_has_the_value_that_was_given(words, field, value):
    profile, _ = cli.parse_profile([*words, "--seed", "3"])
    assert getattr(profile, field) == value and profile.seed == 3


def test_a_file_of_options(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "profile: smoke\nout: here\nn_samples: 5\nlearning_rate: 2e-4\ntemperature: [0.5, 0.7]\n"
        "n_questions: null\ngold: true\nquiet: true\n"
    )
    profile, options = cli.parse_profile(["--config", str(file), "--n-samples", "6"])
    assert (profile.n_samples, profile.learning_rate, profile.iterations) == (6, 2e-4, 2)
    assert profile.temperature == [0.5, 0.7] and profile.n_questions is None and profile.gold
    assert options.out == "here" and options.quiet and not options.ignore_plan
    file.write_text("n_sample: 5\n")
    assert "Did you mean --n-samples" in refused(capsys, "run", "--config", file)
    file.write_text("n_samples: five\n")
    assert "--n-samples" in refused(capsys, "run", "--config", file)
    for text in ("[", "word", None):
        file.unlink() if text is None else file.write_text(text)
        assert "is not a YAML file of options" in refused(capsys, "run", "--config", file)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--profile laptop", "'laptop'"),
        ("--learning_rat 1", "--learning-rate"),
        ("--n-sampl 3", "Did you mean --n-samples"),
        ("--prof smoke", "--profile"),
        ("--learning-rate -1", "--learning-rate"),
        ("--lora-r 0", "--lora-r"),
        ("--seed -1", "--seed"),
        ("--epochs 0", "--epochs"),
        ("--epochs inf", "--epochs"),
        ("--max-pairs 0", "--max-pairs"),
        ("--alpha -1", "--alpha"),
        ("--alpha nan", "--alpha"),
        ("--warmup-ratio 1.5", "--warmup-ratio"),
        ("--n-samples abc", "--n-samples"),
        ("--n-samples 0", "--n-samples is 0: it must be at least 1"),
        ("--dtype int3", "--dtype"),
        ("--dtype all", "--dtype is 'all'"),
        ("--temperature 0", "--temperature"),
        ("--lr-scheduler foo", "--lr-scheduler"),
        ("--optimizer foo", "--optimizer"),
        ("--report-to os", "--report-to is 'os': it must be one of none, tensorboard"),
        ("--loss foo", "foo"),
        ("--loss sft --alpha 0", "--alpha is 0.0: it must be above 0 with --loss sft"),
        ("--gold maybe", "(case insensitive). `python -m irpo_utils run --help`"),
        ("--engine warp", "warp"),
        ("--task crosswords", "word_problems"),
        ("--model no/such/folder/here", "no/such/folder/here"),
        ("--data keepme.csv::x", "--data is 'keepme.csv::x'"),
        ("--start s3://bucket/x", "--start is 's3://bucket/x'"),
        ("--probe a::b", "--probe is 'a::b'"),
        ("--model hf://a/b", "--model is 'hf://a/b'"),
        ("--out keepme.csv::run1", "--out is 'keepme.csv::run1'"),
        ("--out s3://bucket/run1", "--out is 's3://bucket/run1'"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_written(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "keepme.csv").write_text("a,b\n")
    assert message in refused(capsys, "run", *TINY, "--out", "o", *words.split())
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("iteration")]
    assert (tmp_path / "keepme.csv").read_text() == "a,b\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--method sft_gold --iterations 3", "--method sft_gold fixes --iterations 1"),
        ("--method iterative_dpo --alpha 5", "--method iterative_dpo fixes --alpha 0"),
        ("--method star --loss dpo_nll", "--method star fixes --loss sft"),
        ("--method ppo", "'ppo'"),
        ("--method dpo_from_sft", "first run --method star --iterations 1 --out DIR"),
    ],
)
def test_a_method_that_contradicts_an_option_is_refused(words, message, tmp_path, capsys):
    words = ["--profile", "smoke", "--quiet", "--out", tmp_path / "o", *words.split()]
    assert message in refused(capsys, "run", *words)
    assert not (tmp_path / "o").exists()


def test_options_that_agree_with_the_method_are_not_refused():
    profile, _ = cli.parse_profile(["--method", "sft_gold", "--iterations", "1"])
    assert profile.iterations == 1


@pytest.mark.parametrize("words", ["evaluate a::b", "evaluate s3://b/run", "plot a --out b::c"])
def test_addresses_instead_of_paths_are_refused_by_the_scripts(
    words, run, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run[0], "a")
    refused(capsys, *words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- data, models and folders


def write_jsonl(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


GOOD = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]


@pytest.mark.parametrize(
    "lines, words",
    [
        ([*GOOD[:6], '{"question": "no answer"}', *GOOD[6:]], ("mine.jsonl", "7", "answer")),
        ([*GOOD[:3], "{not json", *GOOD[3:]], ("mine.jsonl", "4")),
        (None, ("mine.jsonl",)),
    ],
)
def test_a_malformed_or_missing_file_is_named_with_the_line(tmp_path, capsys, lines, words):
    data, out = tmp_path / "mine.jsonl", tmp_path / "o"
    if lines:
        write_jsonl(data, lines)
    message = refused(capsys, "run", *TINY, "--task", "jsonl", "--data", data, "--out", out)
    assert all(word in message for word in words) and not out.exists()


def test_questions_that_the_model_cannot_answer_end_in_no_pairs(tmp_path, capsys):
    rows = [{"question": f"Riddle {i}?", "answer": f"impossible {i}"} for i in range(60)]
    data = write_jsonl(tmp_path / "hard.jsonl", rows)
    out = tmp_path / "o"
    message = refused(capsys, "run", *TINY, "--task", "jsonl", "--data", data, "--out", out)
    assert "no pairs" in message and "--n-samples" in message


def test_a_model_folder_without_tokenizer(tmp_path, capsys):
    folder = shutil.copytree(models.FOLDERS["seed"], tmp_path / "model")
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    message = refused(capsys, "run", *TINY, "--model", folder, "--out", tmp_path / "o")
    assert "tokenizer" in message and "save_pretrained" in message


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "run", *TINY, "--out", tmp_path / "file" / "o")
    assert "cannot write to" in message and "--out" in message


@pytest.mark.parametrize("name", SCRIPTS)
def test_something_that_is_no_run(name, tmp_path, capsys):
    assert "not a run directory" in refused(capsys, name, tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_a_program_and_reports_a_mistake_in_one_line(name, tmp_path):
    words = [sys.executable, f"scripts/{name}.py", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not a run directory" in done.stderr.splitlines()[-1]


def test_an_interrupted_script_is_to_be_run_again(capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    assert cli.run_command(interrupted, []) == 130
    assert capsys.readouterr().err.endswith("kept: run it again.\n")


@pytest.mark.parametrize(
    "name",
    ["irpo_utils.models.load", pytest.param("irpo_utils.logprobs.score", marks=pytest.mark.slow)],
)
def test_out_of_memory_anywhere_is_one_paragraph(tmp_path, monkeypatch, capsys, name):
    """Also where no smaller batch can help: loading the model, or scoring a single row."""

    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(name, fails)
    message = refused(capsys, "run", *TINY, "--out", tmp_path / "o")
    assert message.startswith("error: Out of memory (CUDA out of memory.")
    assert "--micro-batch-size" in message and "irpo_utils plan" in message


# ---- interrupts


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_an_object_is_deleted_is_not_lost(monkeypatch, capsys, number, status):
    """Python drops what is raised there; the library that holds our tables has such objects."""

    class Table:
        def __del__(self):
            signal.raise_signal(number)
            time.sleep(0.01)

    def busy(arguments):
        Table()
        time.sleep(20)
        raise AssertionError("the interrupt was lost")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "run", busy)
    try:
        assert cli.main(["run"]) == status
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"\n{STOPPED}\n"


def test_an_interrupt_while_an_error_is_reported_still_ends_in_one_message(monkeypatch, capsys):
    """As a launcher does that ends the other processes while one waits for its turn to speak."""

    def mistaken(arguments):
        raise UserError("a mistake")

    def interrupted(message):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(cli, "run", mistaken)
    monkeypatch.setattr(cli, "_fail", interrupted)
    assert cli.main(["run"]) == 143
    assert capsys.readouterr().err.strip() == STOPPED


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, interrupt, status",
    [
        ("iteration_0/samples", signal.SIGINT, 130),
        ("iteration_0/pairs", signal.SIGINT, 130),
        ("iteration_0/pairs", signal.SIGTERM, 143),
    ],
)
def test_an_interrupt_is_one_line_and_the_same_command_resumes(
    run, tmp_path, before, interrupt, status
):
    """The keyboard's signal goes to the whole process group; what was finished stays."""
    out = tmp_path / "run"
    words = [word for word in TINY if word != "--quiet"] + ["--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "irpo_utils", "run", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and not (out / before).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, interrupt)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in said, said[-2000:]
    assert said.strip().splitlines()[-1] == STOPPED
    kept = (out / before / "checksums.json").stat().st_mtime_ns
    assert irpo("run", *TINY, "--out", out).returncode == 0
    assert (out / before / "checksums.json").stat().st_mtime_ns == kept
    assert (out / "metrics.csv").read_text() == (run[0] / "metrics.csv").read_text()
