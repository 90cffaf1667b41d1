"""The curve of a real model: what it chooses, what it draws, and that it resumes."""

import argparse
import json

import pandas
import pytest
from datasets import load_from_disk

import real_curve
from irpo_utils import UserError, plots
from studies import figures


def study(folder, **changes):
    options = {"data": None, "seeds": 1, "jobs": 1, "small": True}
    options |= {"steps": real_curve.STEPS, "methods": real_curve.METHODS}
    options |= {"runs": str(folder / "runs"), "out": str(folder / "figures")} | changes
    return real_curve.Study(argparse.Namespace(**options))


def test_every_method_gets_the_learning_rate_that_is_best_on_validation(tmp_path):
    made = study(tmp_path)
    best = {"irpo": 3e-4, "star": 1e-4, "iterative_dpo": 1e-4}
    for trial in made.sweep():
        profile = made.profile(trial)
        assert (profile.eval_split, profile.iterations) == ("validation", 1)
        right = best[trial.method] == profile.learning_rate
        rows = [
            {"metric": "greedy", "iteration": 1, "value": 0.2 if right else 0.4},
            {"metric": "sampled", "iteration": 0, "value": 0.2 if right else 0.4},
            {"metric": "sampled", "iteration": 1, "value": 0.3 if right else 0.2},
        ]
        rows = [row | {"high": row["value"] + 0.05} for row in rows]
        made.records.runs[trial.name, 0] = {"metrics": rows}
    trials = made.curve()
    assert {t.method: t.settings["learning_rate"] for t in trials} == best
    profiles = [made.profile(trial, seed=1) for trial in trials]
    assert {(p.eval_split, p.seed) for p in profiles} == {("test", 1)}


def test_the_curve_takes_the_best_rate_so_far_and_needs_one(tmp_path):
    made = study(tmp_path, methods=["irpo"])
    with pytest.raises(UserError, match="--steps learning_rate"):
        made.curve()
    for trial in made.sweep():
        if trial.method == "irpo" and trial.settings["learning_rate"] < 1e-3:
            value = trial.settings["learning_rate"]
            rows = [{"metric": "sampled", "iteration": 1, "value": value, "high": value}]
            made.records.runs[trial.name, 0] = {"metrics": rows}
    [trial] = made.curve()
    assert (trial.method, trial.settings) == ("irpo", {"learning_rate": 3e-4})
    made.options.methods = ["irpo", "star"]
    with pytest.raises(UserError, match="for star"):
        made.curve()


def test_one_step_of_one_method_can_be_made_alone(tmp_path, monkeypatch):
    made = study(tmp_path, steps=["learning_rate"], methods=["star"])
    work = []
    monkeypatch.setattr(made, "make", work.extend)
    made.run()
    rates = [f"star_learning_rate_{rate:g}" for rate in real_curve.LEARNING_RATES]
    assert [folder.parent.name for folder in work] == ["sft_gold", *rates]


def test_the_better_learning_rate_is_chosen_on_validation(tmp_path):
    made = study(tmp_path)
    found = {1e-4: 0.05, 3e-4: 0.09}
    for trial in made.sweep():
        if trial.method == "irpo":
            value = found[trial.settings["learning_rate"]]
            rows = [
                {"metric": "greedy", "iteration": 1, "value": 0.1 - value},
                {"metric": "sampled", "iteration": 0, "value": 0.1 - value},
                {"metric": "sampled", "iteration": 1, "value": value},
            ]
            made.records.runs[trial.name, 0] = {"metrics": rows}
    assert made.best_rate("irpo") == 3e-4 and made.best_rate("star") is None


def test_a_run_that_is_kept_with_other_settings_is_not_taken(tmp_path):
    made = study(tmp_path)
    [trial, *_] = made.sweep()
    profile, folder = made.profile(trial), made.folder(trial, 0)
    assert not made.is_kept(folder, profile)
    made.records.runs[trial.name, 0] = {"profile": made.settings(profile)}
    assert made.is_kept(folder, profile)
    made.records.runs[trial.name, 0]["profile"] |= {"beta": 0.7}
    with pytest.raises(UserError, match="other settings. Give another --out and --runs"):
        made.is_kept(folder, profile)


def test_the_figure_shows_every_method_with_intervals():
    rows = [
        {"method": m, "metric": metric, "iteration": t, "value": v, "low": v - 0.1, "high": v + 0.1}
        for metric in ("greedy", "sampled")
        for m, start in (("Iterative RPO", 0.2), ("RFT", 0.3))
        for t, v in ((0, start), (1, start + 0.2))
    ]
    figure = figures.accuracy_of_methods(pandas.DataFrame(rows))
    assert "RFT: M_0 30.0 (20.0 to 40.0), M_1 50.0 (40.0 to 60.0)" in plots.alt_text(figure)
    assert [len(axes.containers) for axes in figure.axes] == [2, 2]
    seeds = pandas.DataFrame(rows).assign(seeds=[2, 2, 1, 1] * 2)
    text = plots.alt_text(figures.accuracy_of_methods(seeds))
    assert "Iterative RPO (2 seeds): M_0" in text and "RFT (1 seed): M_0" in text
    with pytest.raises(UserError, match="greedy and sampled"):
        figures.accuracy_of_methods(pandas.DataFrame(rows[:4]))


@pytest.mark.slow
def test_one_command_makes_the_curve_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(real_curve, "METHODS", ("irpo", "star"))
    monkeypatch.setattr(real_curve, "LEARNING_RATES", (1e-4,))
    options = ["--small", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    options += ["--out", str(tmp_path / "figures")]
    real_curve.main(options)
    kept = tmp_path / "figures" / "real_curve_runs.jsonl"
    runs = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(runs) == 1 + 2 + 2
    means = pandas.read_csv(tmp_path / "figures" / "real_curve_mean.csv")
    assert set(means.method) == {"irpo", "star"} and set(means.iteration) == {0, 1, 2}
    # All methods start from the same model, with the same completions.
    curve = tmp_path / "runs" / "curve"
    samples = [
        load_from_disk(str(curve / m / "seed_0" / "iteration_0" / "samples"))["completion"][:]
        for m in real_curve.METHODS
    ]
    assert samples[0] == samples[1]
    # They were drawn once for all methods: every run has a link to the same file.
    for part in ("sweep", "curve"):
        drawn = (tmp_path / "runs" / part).glob("*/seed_0/iteration_0/samples/*.arrow")
        assert [file.stat().st_nlink for file in drawn] == [2, 2]
    assert means[(means.iteration == 0) & (means.metric == "sampled")].value.nunique() == 1
    before = kept.stat().st_mtime_ns
    real_curve.main(options)  # nothing is left to do
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "figures" / "real_curve.png").is_file()
