"""Figures show the numbers they are given, label their axes, are readable, and are saved whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as xml
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from irpo_utils import UserError, plots
from studies import figures

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))
import helpers_01  # noqa: E402

GREEDY, SAMPLED = (0.28, 0.43, 0.70, 0.88, 0.92), (0.13, 0.20, 0.31, 0.51, 0.68)


def row(metric, value, half=0.03, seed=0, iteration=0, k=1, method="irpo", n=500, **more):
    return {
        "method": method,
        "seed": seed,
        "iteration": iteration,
        "split": "test",
        "metric": metric,
        "k": k,
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": n,
        **more,
    }


def run_metrics(seeds=(0, 1, 2)) -> pd.DataFrame:
    """A run's table: M_0 and M_4 have 32 samples, the others 8; seeds are 0.01 apart."""
    rows = []
    for seed in seeds:
        for t in range(5):
            at, shift = {"seed": seed, "iteration": t}, 0.01 * (seed - np.mean(seeds))
            rows += [
                row("greedy", GREEDY[t] + shift, **at),
                row("sampled", SAMPLED[t] + shift, **at),
            ]
            for k in (8, 32) if t in (0, 4) else (8,):
                rows += [
                    row("majority", SAMPLED[t] + 0.1 + k / 1000, k=k, **at),
                    row("distinct_answers", k / 4 + t, k=k, **at),
                ]
            ks = (1, 8, 32) if t in (0, 4) else (1, 8)
            rows += [row("pass_at_k", 1 - (1 - SAMPLED[t]) ** k, k=k, **at) for k in ks]
            rows += [row(f"greedy_steps_{s}", GREEDY[t] - s / 100, n=100, **at) for s in (2, 3, 10)]
            rows += [
                row("mean_tokens", 20 + 5 * t + seed, 0.5, **at),
                row("greedy_mean_tokens", 18 + 5 * t, 0.5, **at),
            ]
            if t:
                rows += [
                    row("kl_to_previous", 0.1 * t, 0.02, **at),
                    row("chosen_logp_per_token", -0.2 * t, math.nan, **at),
                    row("chosen_logp_per_token_before", -0.3 * t, math.nan, **at),
                ]
    return pd.DataFrame(rows)


def study() -> pd.DataFrame:
    values = {
        ("zero_shot", 0): 0.28,
        ("dpo", 1): 0.40,
        ("irpo", 1): 0.43,
        ("irpo", 4): 0.92,
        ("sft_gold", 1): 0.50,
    }
    return pd.DataFrame(
        [
            row(
                "greedy",
                value + 0.01 * (seed - 1),
                seed=seed,
                iteration=t,
                method=method,
                tokens=t * 250_000,
                seconds=t * 90,
            )
            for (method, t), value in values.items()
            for seed in range(3)
        ]
    )


def gains() -> pd.DataFrame:
    return pd.DataFrame(
        [(0.05, 0.02, 0.08), (-0.01, -0.04, 0.03), (-0.2, -0.25, -0.15)],
        columns=["difference", "difference_low", "difference_high"],
    )


def stability() -> pd.DataFrame:
    """Only a high rate without alpha falls, and only in one of two seeds."""
    return pd.DataFrame(
        [
            row(
                "greedy",
                0.5 if (rate, alpha, seed, t) == (1e-4, 0, 1, 2) else 0.3 + 0.3 * t,
                seed=seed,
                iteration=t,
                learning_rate=rate,
                alpha=alpha,
            )
            for rate in (3e-5, 1e-4)
            for alpha in (0, 1)
            for seed in (0, 1)
            for t in (0, 1, 2)
        ]
    )


def logs() -> dict[str, pd.DataFrame]:
    step = np.arange(1, 31)
    return {
        name: pd.DataFrame(
            {"step": step, "logps/chosen": -30 + a * step, "logps/rejected": -33 - step}
        )
        for name, a in (("with NLL", 0.5), ("without NLL", -0.4))
    }


def scaling_table() -> pd.DataFrame:
    """Time in proportion, memory constant."""
    return pd.DataFrame(
        [
            {"axis": axis, "x": x, "parameters": x * 10**6, "seconds": 2.0 * x, "peak_mb": 50.0}
            for axis in ("n", "questions", "hidden")
            for x in (1, 2, 4)
        ]
    )


def next_token_table() -> pd.DataFrame:
    return pd.DataFrame(
        {"temperature 0.5": [0.9, 0.1], "temperature 1": [0.75, 0.25]}, index=["Final", "57"]
    )


def sweep_table() -> pd.DataFrame:
    values = {"accuracy": (0.34, 0.19, 0.04), "usable questions": (0.6, 0.8, 0.2)}
    return pd.DataFrame(
        [
            {"metric": name, "temperature": t, "value": v, "low": v - 0.03, "high": v + 0.03}
            for name, vs in values.items()
            for t, v in zip((0.5, 1.0, 1.6), vs, strict=True)
        ]
    )


FIGURES = {
    "accuracy_per_iteration": lambda: figures.accuracy_of_seeds(run_metrics()),
    "accuracy_of_one_seed": lambda: plots.accuracy_per_iteration(run_metrics([7])),
    "warning_numbers": lambda: figures.warning_numbers(run_metrics()),
    "diversity": lambda: figures.diversity(run_metrics()),
    "training_curves": lambda: figures.training_curves(logs()),
    "dot_plot": lambda: figures.dot_plot(study()),
    "accuracy_against_cost": lambda: figures.accuracy_against_cost(study()),
    "heat_map": lambda: figures.heat_map(stability()),
    "differences": lambda: figures.differences(
        gains(), ["beta 0.5", "N 4", "Rejection-sampling SFT, twice the data"]
    ),
    "scaling": lambda: figures.scaling(scaling_table()),
    "next_tokens": lambda: helpers_01.next_tokens(next_token_table()),
    "sweep": lambda: figures.sweep(sweep_table(), "temperature", "Sampling temperature"),
    "heat_map_of_all_shades": lambda: figures.heat_map(
        pd.DataFrame(
            [
                row("greedy", percent / 100, learning_rate=1e-5 * (1 + percent), alpha=1)
                for percent in range(0, 101, 4)
            ]
        )
    ),
}


def drawn(axes) -> dict[str, np.ndarray]:
    """The points of every line by its label."""
    return {line.get_label(): line.get_xydata() for line in axes.lines}


# ---------------------------------------------------------------- what every figure keeps


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled_and_the_text_holds_numbers(name):
    figure = FIGURES[name]()
    assert all(axes.get_xlabel() for axes in figure.axes if axes.get_label() != "<colorbar>")
    assert all(
        axes.get_ylabel() or axes.get_subplotspec().colspan.start > 0 for axes in figure.axes
    )
    assert sum(
        character.isdigit() for character in figure.alt_text
    ) > 10 and figure.alt_text.endswith(".")
    assert "nan" not in figure.alt_text and plots.alt_text(figure) == figure.alt_text


@pytest.mark.parametrize("name", FIGURES)
def test_text_lies_inside_the_figure_apart_from_other_text_and_with_contrast(name):
    figure = FIGURES[name]()
    figure.savefig(BytesIO(), format="png")  # lays it out
    for axes in figure.axes:
        around = [axes.xaxis.label, axes.yaxis.label, axes.title]
        names = axes.get_legend().get_texts() if axes.get_legend() else []
        for text in [text for text in [*around, *axes.texts, *names] if text.get_text()]:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
            background = plots.PAPER
            if axes.images and text in axes.texts:
                background = axes.images[0].to_rgba(np.array([[float(text.get_text())]]))[0, 0, :3]
            assert contrast(text.get_color(), background) >= 4.5, (text, text.get_color())
        names = [text.get_window_extent().shrunk(1, 0.8) for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i])


def contrast(a, b) -> float:
    """Contrast ratio of WCAG 2; 4.5 is its level AA for text."""

    def luminance(colour):
        parts = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", ["accuracy_per_iteration", "heat_map"])
def test_the_background_is_opaque_so_that_dark_pages_do_not_shine_through(name):
    bundle, metadata = FIGURES[name]()._repr_mimebundle_()
    pixels = matplotlib.image.imread(BytesIO(bundle["image/png"]))
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1
    assert metadata["image/png"]["alt"].startswith(("Accuracy", "Greedy accuracy"))


def test_pyplot_stays_out_so_that_a_notebook_shows_a_figure_once():
    found = "{'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    code = f"import sys, irpo_utils.plots; sys.exit(str({found} or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


# ---------------------------------------------------------------- numbers given, numbers drawn


def test_accuracy_per_iteration_draws_means_seeds_and_intervals():
    figure = figures.accuracy_of_seeds(run_metrics())
    lines = drawn(figure.axes[0])
    assert set(lines) == {"greedy", "sampled", "majority of 8", "_seed 0", "_seed 1", "_seed 2"}
    assert lines["greedy"] == pytest.approx(np.column_stack([range(5), 100 * np.array(GREEDY)]))
    assert lines["sampled"][:, 1] == pytest.approx(100 * np.array(SAMPLED))
    assert lines["majority of 8"][:, 1] == pytest.approx(100 * (np.array(SAMPLED) + 0.108))
    seeds = sorted(
        line.get_ydata()[4] for line in figure.axes[0].lines if line.get_label().startswith("_seed")
    )
    assert seeds[-3:] == pytest.approx([91, 92, 93])
    half = 100 * math.hypot(4.302653 * 0.01 / math.sqrt(3), 0.03)
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(28 - half)
    assert f"M_2 70.0 ({70 - half:.1f} to {70 + half:.1f})" in figure.alt_text
    assert "500 questions" in figure.axes[0].get_ylabel()


def test_a_metric_of_several_seeds_has_an_interval_only_if_its_mean_is_given():
    means = pd.DataFrame(
        [
            {"iteration": t, "metric": "greedy", "k": 1, "value": v, "low": v - 0.2, "high": v}
            for t, v in enumerate(GREEDY)
        ]
    )
    text = figures.accuracy_of_seeds(run_metrics(), means).alt_text
    assert "M_1 43.0 (23.0 to 43.0)" in text and "sampled: M_0 13.0, M_1 20.0," in text
    assert (
        "sampled: M_0 13.0 (10.0 to 16.0)" in figures.accuracy_of_seeds(run_metrics([7])).alt_text
    )


def test_the_legend_lists_lines_in_the_order_in_which_they_end():
    [axes] = figures.accuracy_of_seeds(run_metrics()).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["greedy", "majority of 8", "sampled"]
    left, right = figures.warning_numbers(run_metrics()).axes
    assert left.get_legend() is None and right.get_legend()  # the title names the only line


def test_majority_is_left_out_where_the_iterations_have_no_k_in_common():
    rows = [row(metric, 0.1, iteration=t) for t in (0, 1) for metric in ("greedy", "sampled")]
    rows += [row("majority", 0.1, k=k, iteration=t) for t, k in ((0, 4), (1, 2))]
    text = plots.alt_text(plots.accuracy_per_iteration(pd.DataFrame(rows)))
    assert "greedy" in text and "majority" not in text


@pytest.mark.parametrize("highest, top", [(0.9, 102), (0.24, 30), (0.01, 20)])
def test_the_axis_of_accuracy_ends_above_what_is_drawn(highest, top):
    rows = [
        row(metric, highest / 2 * t, iteration=t) | {"low": 0.0, "high": highest}
        for t in (0, 1)
        for metric in ("greedy", "sampled")
    ]
    [axes] = plots.accuracy_per_iteration(pd.DataFrame(rows)).axes
    assert axes.get_ylim() == (0, pytest.approx(top))


def test_the_axis_also_shows_a_seed_far_above_the_mean():
    rows = [row(m, 0.3 * (i == 0), seed=i) for i in range(10) for m in ("greedy", "sampled")]
    [axes] = figures.accuracy_of_seeds(pd.DataFrame(rows)).axes
    assert 30 < axes.get_ylim()[1] < 40


def test_a_figure_of_one_run_refuses_several_seeds():
    with pytest.raises(UserError, match=r"one seed, but .* has 0, 1, 2\..*metrics.seed == 0\]"):
        plots.accuracy_per_iteration(run_metrics())


def test_figures_of_one_method_refuse_several():
    both = pd.concat([run_metrics(), run_metrics().assign(method="star")])
    with pytest.raises(UserError, match=r"irpo, star.*metrics.method == 'irpo'"):
        plots.accuracy_per_iteration(both)


def test_the_largest_common_k_is_drawn():
    table = pd.DataFrame(
        [
            row("mean_tokens", 9),
            *(row("distinct_answers", k / 8, k=k) for k in (8, 16)),
            *(row("pass_at_k", k / 32, k=k) for k in (1, 16)),
        ]
    )
    assert list(drawn(figures.diversity(table).axes[1])) == ["in 16 completions"]
    with pytest.raises(UserError, match="different k"):
        figures.diversity(
            pd.concat(
                [
                    table,
                    pd.DataFrame(
                        [
                            row("distinct_answers", 2, k=4, iteration=1),
                            row("pass_at_k", 0.5, k=1, iteration=1),
                        ]
                    ),
                ]
            )
        )


def test_warnings_and_diversity_draw_their_metrics():
    left, right = figures.warning_numbers(run_metrics()).axes
    assert left.lines[-1].get_xydata() == pytest.approx(
        np.array([[t, 0.1 * t] for t in range(1, 5)])
    )
    assert drawn(right)["after training"][:, 1] == pytest.approx([-0.2, -0.4, -0.6, -0.8])
    assert drawn(right)["before"][:, 1] == pytest.approx([-0.3, -0.6, -0.9, -1.2])

    left, right = figures.diversity(run_metrics()).axes
    assert [name for name in drawn(left)] == ["pass@1", "pass@8"]  # what all iterations have
    assert drawn(left)["pass@8"][:, 1] == pytest.approx([100 * (1 - (1 - p) ** 8) for p in SAMPLED])
    assert drawn(right)["in 8 completions"][:, 1] == pytest.approx([2, 3, 4, 5, 6])


def test_training_curves_share_an_axis_and_show_the_gap():
    figure = figures.training_curves(logs())
    first, second, gap = figure.axes
    assert drawn(first)["chosen"][:, 1] == pytest.approx(-30 + 0.5 * np.arange(1, 31))
    assert drawn(second)["rejected"][:, 1] == pytest.approx(-33.0 - np.arange(1, 31))
    assert first.get_ylim() == second.get_ylim() and second.get_ylim()[0] < -63
    assert drawn(gap)["without NLL"][-1] == pytest.approx([30, 3 + 0.6 * 30])
    assert "with NLL: chosen: -29.5 to -15.0; rejected: -34.0 to -63.0" in figure.alt_text


def test_dot_plot_orders_methods_and_draws_every_seed():
    figure = figures.dot_plot(study())
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["zero shot", "dpo", "irpo, iteration 1", "sft gold", "irpo, iteration 4"]
    lines = drawn(axes)
    assert lines["dpo"] == pytest.approx(np.array([[40.0, 1]]))
    assert sorted(lines["_seeds irpo, iteration 4"][:, 0]) == pytest.approx([91, 92, 93])
    half = 100 * math.hypot(4.302653 * 0.01 / math.sqrt(3), 0.03)
    assert lines["_interval dpo"][:, 0] == pytest.approx([40 - half, 40 + half])
    assert (
        f"irpo, iteration 4 92.0 ({92 - half:.1f} to {92 + half:.1f}); sft gold" in figure.alt_text
    )


def test_dot_plot_has_rows_with_fewer_seeds_below_the_others():
    table = study()
    table = table[(table.method != "sft_gold") | (table.seed < 2)]
    labels = figures.dot_plot(table).axes[0].get_yticklabels()
    names = [label.get_text() for label in labels]
    assert names[:2] == ["sft gold (2 seeds)", "zero shot"] and len(names) == 5


@pytest.mark.parametrize("x, scale, cost", [("tokens", 1e6, 250_000), ("seconds", 60, 90)])
def test_accuracy_against_cost(x, scale, cost):
    figure = figures.accuracy_against_cost(study(), x=x)
    lines = drawn(figure.axes[0])
    assert lines["irpo"] == pytest.approx(np.array([[cost / scale, 43], [4 * cost / scale, 92]]))
    assert f"irpo: 43.0 at {cost / scale:.3g}, 92.0 at {4 * cost / scale:.3g}" in figure.alt_text
    with pytest.raises(UserError, match="joules"):
        figures.accuracy_against_cost(study(), x="joules")


def test_differences_shows_which_can_be_told_from_zero():
    figure = figures.differences(gains(), ["a", "b", "c"])
    dots = {
        tuple(line.get_xydata()[0].round(6)): line.get_color()
        for line in figure.axes[0].lines
        if line.get_marker() == "o"
    }
    assert dots == {(5.0, 2): plots.BLUE, (-1.0, 1): plots.GREY, (-20.0, 0): plots.ORANGE}
    assert "a +5.0 (+2.0 to +8.0); b -1.0 (-4.0 to +3.0); c -20.0" in figure.alt_text
    with pytest.raises(UserError, match="a label for each"):
        figures.differences(gains(), ["a"])


def test_scaling_draws_multiples_of_the_smallest_point():
    figure = figures.scaling(scaling_table())
    assert "time: 1.0 at 1, 2.0 at 2, 4.0 at 4; memory: 1.0 at 1, 1.0 at 2" in figure.alt_text
    assert drawn(figure.axes[0])["time"][:, 1] == pytest.approx([1, 2, 4])
    with pytest.raises(UserError, match="peak_mb"):
        figures.scaling(scaling_table().drop(columns="peak_mb"))


@pytest.mark.parametrize(
    "iteration, text", [(2, "learning rate 3e-5: 60.0;"), (None, None)], ids=["stopped", "not run"]
)
def test_heat_map_of_incomplete_runs(iteration, text):
    """A run that stopped early is not stable; a cell that was not run is left out."""
    table = stability()
    gone = (table.learning_rate == 3e-5) & (table.alpha == 1)
    if iteration is not None:
        gone &= table.iteration == iteration
    alt = figures.heat_map(table[~gone]).alt_text
    assert (f"alpha 1, {text}" in alt) if text else ("alpha 1, learning rate 3e-5" not in alt)
    assert "alpha 1, learning rate 1e-4: 90.0, stable" in alt


def test_heat_map_frames_what_no_seed_falls_in():
    figure = figures.heat_map(stability())
    axes = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "90", (1, 0): "70", (0, 1): "90", (1, 1): "90"}
    frames = {(round(patch.get_x()), round(patch.get_y())) for patch in axes.patches}
    assert frames == {(0, 0), (0, 1), (1, 1)}
    assert "alpha 0, learning rate 1e-4: 70.0;" in figure.alt_text
    assert "alpha 1, learning rate 1e-4: 90.0, stable" in figure.alt_text
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3e-5", "1e-4"]


@pytest.mark.parametrize(
    "draw, missing",
    [
        (plots.accuracy_per_iteration, "greedy"),
        (figures.diversity, "pass_at_k"),
        (figures.warning_numbers, "kl_to_previous"),
        (figures.heat_map, "learning_rate"),
        (figures.accuracy_against_cost, "tokens"),
    ],
)
def test_tables_without_the_metric_are_refused_by_name(draw, missing):
    with pytest.raises(UserError, match=missing):
        draw(pd.DataFrame([row("other", 0.5)]))
    with pytest.raises(UserError, match="logps/rejected"):
        figures.training_curves({"run": pd.DataFrame({"step": [1]})})


def test_next_tokens_draws_a_bar_per_token_and_setting():
    axes = helpers_01.next_tokens(next_token_table()).axes
    assert [bar.get_width() for bar in axes[1].patches] == pytest.approx([75, 25]) and len(
        axes
    ) == 2
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["Final", "57"]


def test_sweep_draws_a_line_per_metric_in_percent():
    [axes] = figures.sweep(sweep_table(), "temperature", "Sampling temperature").axes
    assert drawn(axes)["accuracy"][:, 1] == pytest.approx([34, 19, 4])
    with pytest.raises(UserError, match="temperature"):
        figures.sweep(pd.DataFrame(), "temperature", "T")


# ---------------------------------------------------------------- means over seeds


def test_summarise_one_seed_keeps_its_interval_and_several_add_their_spread():
    one = figures.summarise(run_metrics([7])).set_index(["metric", "iteration", "k"])
    greedy = one.loc[("greedy", 2, 1), ["value", "low", "high", "n", "seeds"]]
    assert tuple(greedy) == pytest.approx((0.70, 0.67, 0.73, 500, 1))
    assert math.isnan(one.loc[("chosen_logp_per_token", 2, 1), "low"])
    table = pd.DataFrame(
        [row("greedy", value, seed=i) for i, value in enumerate((0.95, 0.97, 0.99))]
        + [
            row("kl_to_previous", value, math.nan, seed=i)
            for i, value in enumerate((1.0, 2.0, 6.0))
        ]
    )
    greedy, kl = figures.summarise(table).to_dict("records")
    assert (greedy["value"], greedy["seeds"], greedy["high"]) == (
        pytest.approx(0.97),
        3,
        1.0,
    )  # not above 1
    assert greedy["low"] == pytest.approx(0.97 - math.hypot(4.302653 * 0.02 / math.sqrt(3), 0.03))
    assert (
        kl["high"] - 3
        == pytest.approx(4.302653 * np.std([1, 2, 6], ddof=1) / math.sqrt(3))
        == 3 - kl["low"]
    )


def test_summarise_covers_what_new_seeds_and_questions_would_show():
    """Right or wrong of 5 seeds on 100 shared questions; the truth is 0.5."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(200):
        p = 0.5 + 0.05 * rng.standard_normal((5, 1)) + 0.3 * rng.choice([-1, 1], (1, 100))
        values = (rng.random((5, 100)) < p).mean(1)
        rows = figures.summarise(
            pd.DataFrame(
                [
                    row("greedy", v, 1.96 * math.sqrt(v * (1 - v) / 100), seed=i)
                    for i, v in enumerate(values)
                ]
            )
        )
        hits.append(rows.low[0] <= 0.5 <= rows.high[0])
    assert 0.93 <= np.mean(hits) <= 1


# ---------------------------------------------------------------- saving


def test_save_writes_four_files_that_describe_themselves(tmp_path):
    metrics = run_metrics([7])
    figure = plots.accuracy_per_iteration(metrics)
    figure.alt_text += ' <"&>'
    plots.save(
        figure, tmp_path / "new", "name", metrics, {"command": "make it", "seeds": [0, 1, 2]}
    )
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"name.csv", "name.json", "name.png", "name.svg"}
    root = xml.parse(tmp_path / "new" / "name.svg").getroot()
    assert (
        root.get("role") == "img"
        and root.find("{http://www.w3.org/2000/svg}title").text == figure.alt_text
    )
    record = json.loads((tmp_path / "new" / "name.json").read_text())
    assert record == {"command": "make it", "seeds": [0, 1, 2], "alt_text": figure.alt_text}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "name.csv"), metrics)
    assert (tmp_path / "new" / "name.png").read_bytes().startswith(b"\x89PNG")


def test_saving_the_same_figure_again_gives_the_same_files(tmp_path):
    contents = []
    for _ in range(2):
        plots.save(figures.heat_map(stability()), tmp_path, "map", stability(), {})
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]


def test_save_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write the figure map to .*file"):
        plots.save(figures.heat_map(stability()), tmp_path / "file", "map", stability(), {})
