"""The benchmark: both sides do the same work, and ratios are what their names say."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from irpo_utils import UserError
from studies import bench

ROOT = Path(__file__).parent.parent


def results(seconds, tokens=100, peak=500.0):
    return [
        {"seconds": s, "tokens": tokens, "tokens_per_second": tokens / s, "peak_mb": peak}
        for s in seconds
    ]


def test_ratios_are_taken_turn_by_turn_against_the_fastest_plain_batch():
    runs = {
        "plain_1": results([40, 40, 40]),
        "plain_8": results([12, 20, 16], peak=600.0),
        "ours": results([4, 4, 4]),
    }
    rows = {(row["variant"], row["metric"]): row for row in bench.summarise("sampling", runs)}
    for metric in ("tokens_per_second", "seconds"):
        row = rows["ours_vs_best_plain", metric]
        assert (row["ratio"], row["low"], row["high"]) == pytest.approx((4, 3, 5))
    assert rows["ours_vs_best_plain", "peak_mb"]["ratio"] == pytest.approx(1.2)
    assert rows["plain_8", "seconds"]["value"] == 16 and rows["plain_8", "seconds"]["high"] == 20


def test_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="sampling, training, evaluation, iteration, scaling"):
        bench.bench("typing")


@pytest.mark.slow
def test_both_sides_sample_every_completion_and_train_on_it(monkeypatch):
    monkeypatch.setattr(bench, "PLAIN_BATCHES", (2, 4))
    rows = bench.bench("iteration", repeats=1, questions=6, progress=False)
    table = {(row["variant"], row["metric"]): row for row in rows}
    for side in ("plain_4", "ours"):
        assert 0 <= table[side, "accuracy"]["value"] <= 1
        assert table[side, "seconds"]["value"] > 0 and table[side, "peak_mb"]["value"] > 100
    plain, ours = (table[side, "seconds"]["value"] for side in ("plain_4", "ours"))
    assert table["ours_vs_best_plain", "seconds"]["ratio"] == pytest.approx(plain / ours)


def test_rows_of_other_benchmarks_are_kept(tmp_path):
    row = {"variant": "ours", "metric": "seconds", "value": 1.0}
    both = [{"what": "sampling", **row}, {"what": "training", **row}]
    bench.save(both, tmp_path, {"command": "one"})
    bench.save([{"what": "training", **row, "value": 2.0}], tmp_path, {"command": "two"})
    table = pandas.read_csv(tmp_path / "bench.csv").set_index("what").value
    assert table.to_dict() == {"sampling": 1.0, "training": 2.0}
    assert set(json.loads((tmp_path / "bench.json").read_text())) == {"one", "two"}


@pytest.mark.parametrize(
    "words", [["-m", "irpo_utils", "--help"], ["scripts/bench.py", "--help"]], ids=str
)
def test_help_takes_less_than_a_second_of_processor_time(words):
    """Processor time, so that a busy machine does not fail it; torch alone takes longer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
