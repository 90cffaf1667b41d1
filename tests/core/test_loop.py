"""The loop on tiny runs: what it computes, stores and resumes."""

import json
import math
import shutil

import pandas
import pytest
import torch
from core_settings import TINY
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

from irpo_utils import UserError, iteration, methods, profiles, tasks
from irpo_utils.ops.run_directory import RunDirectory
from irpo_utils.tasks.word_problems import WordProblems


def run(profile, out, **options):
    return iteration.run(profile, out, progress=False, **options)


def value(rows, metric: str, t: int):
    [found] = [r["value"] for r in rows if r["metric"] == metric and r["iteration"] == t]
    return found


def weights(out, t: int):
    return load_file(out / f"iteration_{t}" / "adapter" / "adapter_model.safetensors")


def log(out, t: int):
    text = (out / f"iteration_{t}" / "adapter" / "training_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def profile():
    return profiles.get("smoke", **TINY | {"iterations": 2})


@pytest.fixture(scope="module")
def finished(profile, tmp_path_factory):
    """The folder and the metrics of a run of two iterations."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(profile, out)


class Recorder(RunDirectory):
    """Writes down in which order artefacts are asked for."""

    def __init__(self, out):
        super().__init__(out)
        self.order = []

    def dataset(self, t, name, *args, **options):
        self.order.append(f"{name} {t}")
        return super().dataset(t, name, *args, **options)

    def train(self, t, *args):
        self.order.append(f"train {t}")
        super().train(t, *args)


def test_the_stages_follow_in_the_order_of_the_paper(finished, profile):
    keep = Recorder(finished[0])
    run(profile, None, keep=keep)
    assert keep.order == [
        *("evaluation 0", "samples 0", "graded 0", "pairs 0", "train 1"),
        *("evaluation 1", "drift 1", "samples 1", "graded 1", "pairs 1", "train 2"),
        *("evaluation 2", "drift 2"),
    ]


def test_artefacts_and_their_columns(finished, profile):
    out, _ = finished
    samples = load_from_disk(str(out / "iteration_1" / "samples"))
    assert len(samples) == profile.n_questions * profile.n_samples
    graded = load_from_disk(str(out / "iteration_1" / "graded"))
    assert graded["completion"][:] == samples["completion"][:]
    assert {"extracted", "correct", "reason"} <= set(graded.column_names)
    pairs = load_from_disk(str(out / "iteration_1" / "pairs"))
    correct = {(row["id"], row["sample"]): row["correct"] for row in graded}
    for row in pairs:
        assert correct[row["id"], row["chosen_sample"]]
        assert not correct[row["id"], row["rejected_sample"]]
    assert json.loads((out / "profile.json").read_text())["n_samples"] == profile.n_samples


def test_every_iteration_samples_from_the_newest_model(finished):
    first, second = (
        load_from_disk(str(finished[0] / f"iteration_{t}" / "samples")) for t in (0, 1)
    )
    assert first["id"][:] == second["id"][:]  # the same questions, as in the paper
    assert first["completion"][:] != second["completion"][:]


def test_the_second_iteration_starts_from_the_first_one(finished):
    """Its reference is M_1, so the margin is 0; its adapter is near that of M_1, not near 0."""
    out, _ = finished
    assert log(out, 2)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    one, two = weights(out, 1), weights(out, 2)
    names = [name for name in one if "lora_B" in name]
    size = sum(one[name].norm() for name in names)
    assert 0 < sum((two[name] - one[name]).norm() for name in names) < 2 * size
    assert all(torch.cosine_similarity(one[n].flatten(), two[n].flatten(), 0) > 0.2 for n in names)


def test_metrics_have_one_row_per_number_and_the_same_in_the_file(finished, profile):
    out, rows = finished
    columns = "method seed iteration split metric k value low high n".split()
    assert all(list(row) == columns for row in rows)
    assert {row["method"] for row in rows} == {"irpo"}
    assert {row["iteration"] for row in rows} == {0, 1, 2}
    table = pandas.read_csv(out / "metrics.csv")
    assert table["value"].to_list() == pytest.approx([row["value"] for row in rows])
    keys = [(row["iteration"], row["metric"], row["k"]) for row in rows]
    assert len(keys) == len(set(keys))
    for t in (0, 1):
        pairs = load_from_disk(str(out / f"iteration_{t}" / "pairs"))
        assert value(rows, "pairs_pairs", t) == len(pairs)
    greedy = load_from_disk(str(out / "iteration_2" / "evaluation"))["greedy"]
    assert value(rows, "greedy", 2) == sum(greedy["correct"]) / profile.n_eval_questions


def test_the_same_call_computes_nothing_again(finished, profile, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("this is computed already")

    for name in ("training.train", "sampling.sample", "grading.grade", "pairs.build_pairs"):
        monkeypatch.setattr(f"irpo_utils.{name}", fail)
    assert run(profile, finished[0]) == finished[1]


def test_a_run_that_was_interrupted_continues_to_the_same_result(finished, profile, tmp_path):
    out, rows = finished
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iteration_2")
    (tmp_path / "run" / "iteration_1" / ".pairs.partial").mkdir()  # as a kill leaves it
    shutil.rmtree(tmp_path / "run" / "iteration_1" / "pairs")
    assert run(profile, tmp_path / "run") == rows
    ours, expected = weights(tmp_path / "run", 2), weights(out, 2)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_folder_made_with_other_settings_is_refused(finished, profile):
    other = profiles.get("smoke", **{**vars(profile), "n_samples": 3})
    with pytest.raises(UserError, match="made with other settings.*--out"):
        run(other, finished[0])


@pytest.mark.parametrize("name", ["keepme.csv::run1", "file://run1"])
def test_a_run_directory_that_datasets_reads_as_an_address_is_refused(
    profile, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keepme.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="--out.*'::' and '://'"):
        run(profile, name)
    assert (tmp_path / "keepme.csv").read_text() == "a,b\n"
    assert [path.name for path in tmp_path.iterdir()] == ["keepme.csv"]


# ---------------------------------------------------------------- methods in the loop


def test_irpo_2x_trains_on_twice_the_pairs(finished, tiny, tmp_path):
    rows = run(tiny(method="irpo_2x"), tmp_path / "run")
    used = value(finished[1], "pairs_used", 0)
    assert value(finished[1], "pairs_pairs", 0) == 2 * used
    assert value(rows, "pairs_used", 0) == used and value(rows, "pairs_pairs", 0) == 4 * used
    assert {row["method"] for row in rows} == {"irpo_2x"}
    steps = len(log(tmp_path / "run", 1))
    assert steps == math.ceil(4 * used / tiny().batch_size)


def test_a_model_that_did_not_move_has_kl_exactly_0(tiny, tmp_path):
    """Both log-probabilities are teacher-forced, so that nothing but the weights differs."""
    # The learning rate is too small to change any sum.
    rows = run(tiny(learning_rate=1e-30), tmp_path / "run")
    [kl] = [row for row in rows if row["metric"] == "kl_to_previous"]
    assert (kl["value"], kl["low"], kl["high"]) == (0, 0, 0)
    table = {row["metric"]: row["value"] for row in rows if row["iteration"] == 1}
    for side in ("chosen", "rejected"):
        assert table[f"{side}_logp_per_token"] == table[f"{side}_logp_per_token_before"] < 0


def test_sft_on_gold_solutions_samples_nothing_for_training(tiny, tmp_path):
    rows = run(tiny(method="sft_gold"), tmp_path / "run")
    assert not (tmp_path / "run" / "iteration_0" / "samples").exists()
    assert value(rows, "pairs_gold_winners", 0) == tiny().n_questions
    assert {"loss_nll", "logps/chosen"} <= set(log(tmp_path / "run", 1)[0])


@pytest.mark.parametrize("name", [name for name, m in methods.METHODS.items() if m.start])
def test_a_method_that_starts_from_another_one_needs_its_model(tiny, tmp_path, name):
    with pytest.raises(UserError, match="starts from M_1 of star.*--start"):
        run(tiny(method=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    methods.check_start(tiny(method=name, start="runs/star"))


def test_pairs_of_all_iterations_are_trained_on_with_keep_pairs(finished, profile, tmp_path):
    out, rows = finished
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("iteration_2"))
    settings = vars(profile) | {"keep_pairs": True}
    (tmp_path / "run" / "profile.json").write_text(json.dumps(settings))
    run(profiles.get("smoke", **settings), tmp_path / "run")
    pairs = [value(rows, "pairs_pairs", t) for t in (0, 1)]
    assert len(log(tmp_path / "run", 2)) == math.ceil(sum(pairs) / profile.batch_size)
    assert len(log(out, 2)) == math.ceil(pairs[1] / profile.batch_size)


def test_duplicate_ids_of_a_task_are_refused(tiny, tmp_path, monkeypatch):
    class Twice(WordProblems):
        def load(self, split, data=None):
            rows = list(super().load(split, data).select(range(8)))
            return Dataset.from_list([row | {"id": "same"} for row in rows])

    monkeypatch.setattr(tasks, "get", lambda name: Twice())
    with pytest.raises(UserError, match="more than once.*'same'"):
        run(tiny(), tmp_path / "run")
