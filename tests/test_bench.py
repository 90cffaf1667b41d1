"""The benchmark itself: that both sides do the same work and that ratios are what they say."""

import json
import subprocess
import sys

import pandas
import pytest

from irpo_utils import UserError, bench, plots


def results(seconds, tokens=100, peak=500.0):
    return [
        {"seconds": s, "tokens": tokens, "tokens_per_second": tokens / s, "peak_mb": peak}
        for s in seconds
    ]


def test_ratios_are_taken_turn_by_turn_against_the_best_plain_batch():
    runs = {
        "plain_1": results([40, 40, 40]),
        "plain_8": results([12, 20, 16], peak=600.0),
        "ours": results([4, 4, 4]),
    }
    rows = {(row["variant"], row["metric"]): row for row in bench._rows("sampling", runs, "")}
    judged = rows["ours_vs_best_plain", "tokens_per_second"]
    assert (judged["ratio"], judged["low"], judged["high"]) == pytest.approx((4, 3, 5))
    assert rows["ours_vs_best_plain", "peak_mb"]["ratio"] == pytest.approx(1.2)
    assert rows["plain_8", "seconds"]["value"] == 16 and rows["plain_8", "seconds"]["high"] == 20


def test_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="sampling, training, evaluation, iteration, scaling"):
        bench.bench("typing")


def test_both_sides_sample_every_completion_and_train_on_it(monkeypatch):
    monkeypatch.setattr(bench, "PLAIN_BATCHES", (2, 4))
    rows = bench.bench("iteration", repeats=1, questions=6, progress=False)
    table = {(row["variant"], row["metric"]): row["value"] for row in rows}
    assert 0 <= table["plain_4", "accuracy"] <= 1 and 0 <= table["ours", "accuracy"] <= 1
    assert table["plain_4", "seconds"] > 0 and table["ours", "peak_mb"] > 100
    [ratio] = [
        row["ratio"]
        for row in rows
        if (row["variant"], row["metric"]) == ("ours_vs_best_plain", "seconds")
    ]
    assert ratio == pytest.approx(table["plain_4", "seconds"] / table["ours", "seconds"])


def test_rows_of_other_benchmarks_stay(tmp_path):
    row = {
        "variant": "ours",
        "metric": "seconds",
        "value": 1.0,
        "ratio": None,
        "low": 1.0,
        "high": 1.0,
    }
    bench.save(
        [{"what": "sampling", **row}, {"what": "training", **row}], tmp_path, {"command": "one"}
    )
    bench.save([{"what": "training", **row, "value": 2.0}], tmp_path, {"command": "two"})
    table = pandas.read_csv(tmp_path / "bench.csv").set_index("what").value
    assert table.to_dict() == {"sampling": 1.0, "training": 2.0}
    assert set(json.loads((tmp_path / "bench.json").read_text())) == {"one", "two"}


def test_scaling_figure_shows_multiples_of_the_smallest():
    table = pandas.DataFrame(
        [
            {
                "axis": axis,
                "x": x,
                "parameters": x * 10**6,
                "tokens": 1,
                "seconds": 2.0 * x,
                "peak_mb": 50.0,
            }
            for axis in ("n", "questions", "hidden")
            for x in (1, 2, 4)
        ]
    )
    figure = plots.scaling(table)
    assert "1.0 at 1, 2.0 at 2, 4.0 at 4" in figure.alt_text and len(figure.axes) == 3
    with pytest.raises(UserError, match="peak_mb"):
        plots.scaling(table.drop(columns="peak_mb"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import irpo_utils"],
        ["-m", "irpo_utils", "--help"],
        ["-m", "irpo_utils", "bench", "--help"],
    ],
)
def test_starting_takes_less_than_a_second_of_processor_time_and_no_torch(arguments):
    """Processor time, so that a busy machine does not fail it."""
    code = (
        f"import resource, runpy, sys; {arguments[1]}"
        if arguments[0] == "-c"
        else (
            f"import runpy, sys; sys.argv = {arguments[1:]!r}\ntry: runpy.run_module('irpo_utils', run_name='__main__', alter_sys=False)\n"
            "except SystemExit: pass"
        )
    )
    code += "\nimport resource, sys\nassert 'torch' not in sys.modules\nused = resource.getrusage(resource.RUSAGE_SELF)\nprint('used', used.ru_utime + used.ru_stime)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split("used")[-1]) < 1.0
