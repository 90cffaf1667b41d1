"""The report of a GPU: phases in separate processes with time limits, and what each measures."""

import csv
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from irpo_utils import UserError
from studies import gpu_phases, gpu_report
from studies.gpu_report import Records, Settings

ROOT = Path(__file__).parent.parent

# Phases that need no time. The file `calls` has a line for every measurement; while the file
# `broken` is there, sampling hangs and training loses its process.
PROGRAM = """
import os, sys, time
from pathlib import Path
from irpo_utils import UserError
from studies import gpu_phases

HERE = Path(__file__).parent
BROKEN = (HERE / "broken").exists()

def value(name, number=1.0):
    def measured():
        with (HERE / "calls").open("a") as file:
            file.write(name + "\\n")
        return {"seconds": number}
    return name, measured, {"name": name}

def hang():
    print("hanging", flush=True)
    time.sleep(100)

def die():
    print("lost the GPU", flush=True)
    os._exit(7)

def fail():
    raise ValueError("three rows\\nare too many")

def environment(s, records):
    gpus = ["GPU X-1"] if s.device == "cuda" else []
    found = {"gpus": gpus, "commit": "abc", "driver": "580", "versions": {"torch": "2"}}
    records.measure([("environment", lambda: found, {})])

def tests(s, records):
    records.measure([value("test_a"), ("test_b", fail, {}), value("test_c", 1 / 3)])

def sampling(s, records):
    second = ("second", hang, {}) if BROKEN else value("second")
    records.measure([value("first"), second, value("third")])

def training(s, records):
    lost = ("lost", die, {}) if BROKEN else value("lost")
    records.measure([value("before"), lost, value("after")])

def run(s, records):
    out = Path(s.work) / "run"
    out.mkdir(exist_ok=True)
    (out / "metrics.csv").write_text("iteration,value\\n")
    (out / "adapter_model.safetensors").write_text("weights")
    records.measure([value("run")])

def plan(s, records):
    if BROKEN:
        os._exit(9)
    records.measure([value("plan")])

def notebooks(s, records):
    import a_package_that_is_missing

gpu_phases.PHASES = {name: globals()[name] for name in gpu_phases.PHASES}
gpu_phases.main(*sys.argv[1:])
"""


@pytest.fixture()
def report(tmp_path, monkeypatch):
    """Measures with the phases above; only sampling has little time, about three seconds."""
    program = tmp_path / "phases.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(gpu_report, "PROGRAM", [sys.executable, str(program)])
    shares = {"tests": 30, "sampling": 3, "training": 30, "run": 30, "plan": 30, "notebooks": 30}
    monkeypatch.setattr(gpu_report, "SHARES", shares)

    def measure(**options):
        settings = Settings.of(**{"device": options.pop("device", "cuda")})
        folders = {"out": tmp_path / "figures", "runs": tmp_path / "runs"}
        return gpu_report.measure(settings, **folders, **{"seconds": 153} | options)

    measure.folder, measure.broken = tmp_path, tmp_path / "broken"
    measure.calls = lambda: (tmp_path / "calls").read_text().split()
    return measure


def statuses(report, phase):
    return {r["variant"]: r["status"] for r in report.phases[phase]["records"]}


def test_a_hang_a_crash_and_a_missing_package_are_recorded_and_the_rest_is_measured(report):
    report.broken.touch()
    made = report()
    phases = {name: found["status"] for name, found in made.phases.items()}
    expected = dict.fromkeys(gpu_report.SHARES, "finished")
    expected |= {"sampling": "time limit", "plan": "crashed", "notebooks": "not run"}
    assert phases == expected
    assert statuses(made, "tests") == {"test_a": "done", "test_b": "failed", "test_c": "done"}
    hung = {"first": "done", "second": "time limit", "third": "waiting"}
    assert statuses(made, "sampling") == hung
    assert statuses(made, "training") == {"before": "done", "lost": "crashed", "after": "done"}
    [lost] = [r for r in made.phases["training"]["records"] if r["variant"] == "lost"]
    assert lost["reason"] == "exit status 7: lost the GPU"
    assert made.phases["plan"]["reason"].startswith("exit status 9")
    assert "a_package_that_is_missing" in made.phases["notebooks"]["reason"]
    assert made.phases["sampling"]["seconds"] < 2 * made.phases["sampling"]["limit"] + 5
    table = made.table().splitlines()
    assert len(table) == len(gpu_report.SHARES) and "time limit" in table[1]


def test_the_same_command_measures_only_what_is_missing(report):
    report.broken.touch()
    report()
    report.broken.unlink()
    before = len(report.calls())
    made = report()
    assert report.calls()[before:] == ["second", "third", "plan"]
    assert set(statuses(made, "sampling").values()) == {"done"}
    assert made.phases["notebooks"]["status"] == "not run"  # it is tried again
    assert report().phases["sampling"] == made.phases["sampling"]
    assert report.calls()[before:] == ["second", "third", "plan"]


def test_results_continue_on_another_machine_without_the_folder_of_runs(report):
    report.broken.touch()
    first = report(name="here")
    for file in first.work.rglob("*"):
        if file.is_file():
            file.unlink()
    report.broken.unlink()
    before = len(report.calls())
    made = report(name="here")
    assert report.calls()[before:] == ["second", "third", "plan"]
    assert set(made.records("tests").read()) == {
        "test_a",
        "test_b",
        "test_c",
    }  # the plan reads them


def test_named_phases_are_measured_again(report):
    made = report()
    before = len(report.calls())
    again = report(only=["training"])
    assert report.calls()[before:] == ["before", "lost", "after", "plan"]
    assert again.phases["tests"] == made.phases["tests"]
    with pytest.raises(UserError, match="no phase typing. The phases are tests, sampling"):
        report(only=["typing"])


def test_files_have_every_number_and_what_is_needed_to_repeat_it(report, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--model", "m"])
    made = report()
    assert made.json_file.name == "gpu_gpu_x_1.json"
    content = json.loads(made.json_file.read_text())
    assert content["environment"]["driver"] == "580"
    assert content["environment"]["command"] == "python scripts/gpu_report.py --model m"
    assert content["settings"]["task"] == "word_problems" and "work" not in content["settings"]
    for phase in content["phases"].values():
        assert phase["commit"] == "abc" and phase["seconds"] > 0 and phase["limit"] > 0
    rows = list(csv.DictReader(made.json_file.with_suffix(".csv").open()))
    assert tuple(rows[0]) == gpu_report.COLUMNS
    found = {(r["phase"], r["variant"], r["metric"]): r for r in rows}
    assert found["tests", "test_c", "seconds"]["value"] == "0.333333"
    failed = found["tests", "test_b", ""]
    assert (failed["status"], failed["reason"], failed["value"]) == ("failed", "three rows", "")
    assert float(found["run", "", "seconds"]["value"]) > 0
    with tarfile.open(made.json_file.with_name("gpu_gpu_x_1_files.tar.gz")) as archive:
        names = set(archive.getnames())
    assert {f"gpu_gpu_x_1/{n}" for n in ("run/metrics.csv", "tests.jsonl", "tests.log")} <= names
    assert not [name for name in names if "safetensors" in name]


def test_results_of_another_gpu_or_model_are_not_mixed(report):
    report(name="x")
    with pytest.raises(UserError, match="measured with another GPU, device. Choose another --name"):
        report(name="x", device="cpu")


def test_no_gpu_is_one_clear_message(tmp_path):
    command = [sys.executable, "scripts/gpu_report.py", "--out", str(tmp_path / "figures")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: PyTorch ")
    assert "sees no CUDA GPU" in done.stderr and "--device cpu --tiny" in done.stderr
    assert not (tmp_path / "figures").exists()


def test_an_interrupt_keeps_what_was_measured(report, monkeypatch):
    run_phase = gpu_report._run_phase

    def interrupted(phase, settings, seconds, log):
        if phase == "training":
            Records(Path(settings.work) / "training.jsonl").write("before", "started")
            raise KeyboardInterrupt
        return run_phase(phase, settings, seconds, log)

    monkeypatch.setattr(gpu_report, "_run_phase", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report()
    [file] = report.folder.glob("figures/*.json")
    phases = json.loads(file.read_text())["phases"]
    assert list(phases) == ["tests", "sampling", "training"]
    assert phases["training"]["status"] == "stopped"
    assert phases["training"]["records"][0]["status"] == "stopped"


def test_no_time_is_a_time_limit(report):
    made = report(seconds=0.5)
    assert {found["status"] for found in made.phases.values()} == {"time limit"}
    assert not (report.folder / "calls").exists()


def test_a_command_over_its_limit_ends_with_all_its_processes(tmp_path):
    log = tmp_path / "log"
    words = ["sh", "-c", "sleep 60 & echo $!; wait"]
    assert gpu_report.run_limited(words, 1.0, log, grace=1.0) is None
    other = int(log.read_text())
    for _ in range(50):
        if not psutil.pid_exists(other) or psutil.Process(other).status() == "zombie":
            return
        time.sleep(0.1)
    raise AssertionError("the second process is still there")


def test_a_line_that_was_cut_off_costs_one_record(tmp_path):
    records = Records(tmp_path / "r.jsonl")
    records.write("a", "done", values={"x": 1})
    with records.path.open("a") as file:
        file.write('\n{"variant": "b", "sta')
    records.write("c", "started")
    assert list(records.read()) == ["a", "c"] and records.finished() == {"a"}


# What the phases measure, in this process


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The phases of the benchmarks and of the run with tiny sizes: records by phase."""
    work = tmp_path_factory.mktemp("work")
    settings = Settings.of(device="cpu", tiny=True, work=str(work))
    found = {}
    for phase in ("sampling", "training", "run", "plan"):
        records = Records(work / f"{phase}.jsonl")
        gpu_phases.PHASES[phase](settings, records)
        found[phase] = records.read()
    return found


def test_sampling_measures_every_engine_and_generate_in_both_precisions(measured):
    found = measured["sampling"]
    for engine in ("plain", "cpu", "cuda_graph", "generate"):
        for kind in ("nf4", gpu_phases.precision(False)):
            record = found[f"{engine} {kind} 16"]
            assert record["status"] == "done", record
            values = record["values"]
            assert 16 <= values["tokens"] <= 64 and values["peak_mb"] > 100
            speed = values["tokens"] / values["seconds"]
            assert values["tokens_per_second"] == pytest.approx(speed, rel=1e-3)
    vllm = next(record for name, record in found.items() if name.startswith("vllm"))
    assert vllm["status"] == "done" or "VLLM_BIN" in vllm["reason"]


def test_training_measures_every_combination(measured):
    records = measured["training"].values()
    settings = [tuple(record["settings"].values()) for record in records]
    assert len(set(settings)) == len(settings) == 8
    for record in records:
        values, size = record["values"], gpu_phases.TINY
        tokens = size.pairs * (size.prompt + 2 * size.response)
        overall = values["tokens_per_second_overall"]
        assert overall == pytest.approx(tokens / values["seconds"], rel=1e-3)
        # The first step, half of the tokens, is left out with all the time before its end.
        assert values["tokens_per_second"] > overall / 2


def test_the_run_is_a_run_of_two_iterations(measured):
    found = measured["run"]
    assert found["run"]["status"] == "done"
    assert {"M_0", "M_1", "M_2", "iteration 1 adapter", "iteration 1 samples"} <= set(found)
    assert found["iteration 2 adapter"]["values"]["tokens"] > 0
    assert 0 <= found["M_2"]["values"]["greedy"] <= 1


def test_the_plan_is_compared_with_everything_that_was_measured(measured):
    found = measured["plan"]
    n_sampled = sum(
        record["status"] == "done" and record["settings"]["engine"] != "generate"
        for record in measured["sampling"].values()
    )
    assert len(found) == n_sampled + len(measured["training"]) + 1
    for name, record in found.items():
        assert record["status"] == "done" and all(v > 0 for v in record["values"].values()), name
    kind = gpu_phases.precision(False)
    speed = measured["sampling"][f"plain {kind} 16"]["values"]["tokens_per_second"]
    compared = found[f"sampling plain {kind} 16"]["values"]
    assert compared["measured_tokens_per_second"] == speed
    assert 1 / 300 < compared["planned_tokens_per_second"] / speed < 300  # the same unit


def test_random_weights_have_the_shape_of_smollm2(tmp_path, monkeypatch):
    from transformers import LlamaConfig

    import smollm2
    from irpo_utils.ops import plan as planning

    def missing():
        raise UserError("not installed")

    monkeypatch.setattr(smollm2, "convert", missing)
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1500}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    monkeypatch.setitem(planning.DATA["models"], "smollm2-135m", small)
    folder = gpu_phases.model_folder(Settings.of(work=str(tmp_path)))
    assert folder == gpu_phases.model_folder(Settings.of(work=str(tmp_path)))
    assert vars(planning.find_shape(folder)) == vars(planning.Shape(LlamaConfig(**small)))
    assert gpu_phases.model_folder(Settings.of(model=folder)) == folder


def test_a_notebook_fails_with_its_error_and_hangs_no_longer_than_its_limit(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    for name, code in (("bad", "1 / 0"), ("slow", "import time; time.sleep(100)")):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        gpu_phases.execute(tmp_path / "bad.ipynb", tmp_path)
    with pytest.raises(RuntimeError, match="longer than 1 seconds"):
        gpu_phases.execute(tmp_path / "slow.ipynb", tmp_path, seconds=1.0)
    scripts = tmp_path / "source"
    scripts.mkdir()
    (scripts / "bad.py").write_text("import a_package_that_is_missing")
    (tmp_path / "solutions").mkdir()
    with pytest.raises(RuntimeError, match="a_package_that_is_missing"):
        gpu_phases.execute(tmp_path / "solutions" / "bad.ipynb", tmp_path, with_nbval=False)


@pytest.mark.slow
def test_the_command_measures_all_phases_on_a_cpu(tmp_path):
    command = [sys.executable, "scripts/gpu_report.py", "--device", "cpu", "--tiny"]
    command += ["--out", str(tmp_path / "figures"), "--runs", str(tmp_path / "runs")]
    command += ["--seconds", "1800"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    phases = json.loads((tmp_path / "figures" / "gpu_cpu.json").read_text())["phases"]
    assert {found["status"] for found in phases.values()} == {"finished"}, done.stdout
    assert {r["status"] for r in phases["tests"]["records"]} == {"not run"}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert " at most" not in again.stdout
