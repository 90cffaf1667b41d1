"""Misconceptions, and the statistics of the lesson."""

import itertools
import json
import math
import random

import numpy as np
import pytest

import lesson_report
import lesson_study
from irpo_utils import models, profiles, sampling, tasks
from irpo_utils.engines import cpu
from irpo_utils.ops import drift
from irpo_utils.tasks import word_problems
from studies import lesson_statistics as lesson
from studies import misconceptions, stopping


@pytest.mark.parametrize(
    "a, operation, b, result, name",
    [
        (27, "+", 15, 32, "forgets the carry"),
        (138, "+", 47, 175, "forgets the carry"),
        (42, "-", 17, 35, "subtracts the smaller digit from the larger"),
        (7, "*", 8, 49, "counts one group too few"),
        (27, "*", 2, 44, "forgets the carry in a product"),
        (74, "/", 2, 32, "halves digit by digit"),
        (27, "+", 15, 42, None),  # correct
        (27, "+", 15, 43, None),  # incorrect, and no misconception
        (21, "+", 15, 26, None),  # no carry to forget
        (47, "-", 12, 45, None),  # nothing to borrow
    ],
)
def test_misconception_of_an_equation(a, operation, b, result, name):
    assert misconceptions.misconception_of(a, operation, b, result) == name


@pytest.mark.parametrize("m", misconceptions.MISCONCEPTIONS, ids=lambda m: m.name)
def test_misconceptions_lead_to_an_incorrect_result_or_do_not_apply(m):
    for a in range(1, 200):
        for b in range(1, 61):
            result = m.result(a, b)
            assert result is None or result != misconceptions.calculate(a, m.operation, b)


def test_pupil_solutions_are_read_back():
    rng = random.Random(0)
    for row in word_problems.all_splits()["validation"][:200]:
        careful = misconceptions.pupil_solution(row, rng, strength=0)
        assert set(misconceptions.classify(row, careful)) == {misconceptions.CORRECT}
        assert careful.endswith(f"Final answer: {row['answer']}")
        assert set(misconceptions.classify(row, row["solution"])) == {misconceptions.CORRECT}
        text = misconceptions.pupil_solution(row, rng)
        labels = misconceptions.classify(row, text)
        assert len(labels) == row["steps"]
        assert not {misconceptions.OTHER, misconceptions.MISSING} & set(labels)
        if not text.endswith(f": {row['answer']}"):
            assert set(labels) & set(misconceptions.NAMES)


ROW = {
    "question": "Tom has 27 shells. Tom finds 15 more. Tom loses 17 of them.",
    "solution": "27+15=42\n42-17=25\nFinal answer: 25",
}


@pytest.mark.parametrize(
    "completion, labels",
    [
        ("27+15=32 in all\nNow 32-17=15 left\nFinal answer: 15", ["forgets the carry", "correct"]),
        ("27+15=42\nFinal answer: 42", ["correct", "missing"]),
        ("27+16=43\n43-17=26\nFinal answer: 26", ["other", "correct"]),
        ("27+15=42\n42+17=59\nFinal answer: 59", ["correct", "other"]),
        ("Final answer: 25", ["missing", "missing"]),
        ("", ["missing", "missing"]),
        ("27+15=" + "4" * 5000, ["missing", "missing"]),
    ],
)
def test_classification_of_lines(completion, labels):
    assert misconceptions.classify(ROW, completion) == labels


def test_groups_are_told_from_products():
    group = misconceptions.gold_steps("33+32=65\n65-47=18\n6*3=18\n18+18=36")
    assert [(s.a_from, s.b_from) for s in group] == [(None, None), (0, None), (None, None), (1, 2)]
    product = misconceptions.gold_steps("12+5=17\n17*2=34\n34-4=30")
    assert [(s.a_from, s.b_from) for s in product] == [(None, None), (0, None), (1, None)]


def test_misconceptions_are_counted_where_they_apply():
    counts = misconceptions.count_misconceptions(
        [ROW, ROW], ["27+15=32\n32-17=15\nFinal answer: 15", "27+15=42\n42-17=25\nFinal answer: 25"]
    )
    assert counts["forgets the carry"] == {"applies": 2, "follows": 1, "correct": 1}
    # 32-17 and 42-17 both need a borrow, and both are correct.
    assert counts["subtracts the smaller digit from the larger"] == {
        "applies": 2,
        "follows": 0,
        "correct": 2,
    }


def test_saturation():
    assert lesson.gradient_weight(0, 0.1) == 1
    assert lesson.gradient_weight(30, 0.1) == pytest.approx(2 / (1 + math.e**3))
    assert lesson.gradient_weight(1e6, 1.0) < 1e-100  # no overflow
    # The weight falls below a tenth at a margin of log(19) / beta.
    edge = math.log(19)
    assert lesson.saturated(edge - 0.01, 1.0) == 0
    assert lesson.saturated(edge + 0.01, 1.0) == 1
    assert lesson.saturated(edge + 0.01, 0.1) == 0


def test_margins():
    before = {"chosen": [-5.0, -6.0], "rejected": [-5.0, -7.0]}
    now = {"chosen": [-4.0, -8.0], "rejected": [-8.0, -12.0]}
    assert lesson.margins(now, before) == [4.0, 3.0]


@pytest.mark.parametrize(
    "low, high, paper, expected",
    [
        (1, 5, 8, "agrees"),
        (-5, -1, 8, "disagrees"),
        (-1, 5, 8, "rules out an effect of the paper's size"),
        (-1, 9, 8, "not resolved"),
        (-5, -1, -8, "agrees"),
        (1, 5, -8, "disagrees"),
        (-1, 5, math.inf, "not resolved"),
        (1, 5, math.inf, "agrees"),
        (-5, 1, -8, "rules out an effect of the paper's size"),
    ],
)
def test_verdicts(low, high, paper, expected):
    assert lesson.verdict(low, high, paper) == expected


def test_pairing_uses_common_seeds_and_the_same_questions():
    rng = random.Random(1)
    difficulty = [rng.random() for _ in range(300)]
    a = {seed: [float(d > 0.5) for d in difficulty] for seed in range(3)}
    # b solves five per cent more questions, the same ones for every seed
    b = {seed: [float(d > 0.45) for d in difficulty] for seed in range(5)}
    gain = lesson.paired_interval(a, b)
    assert gain["seeds"] == gain["seeds_above_zero"] == 3
    expected = 100 * sum(0.45 < d <= 0.5 for d in difficulty) / 300
    assert gain["points"] == pytest.approx(expected)
    assert 0 < gain["low"] < gain["points"] < gain["high"]
    # Unpaired, two accuracies of 300 questions differ by chance by about 8 points.
    assert gain["high"] - gain["low"] < 8


def test_digits_are_shares():
    assert lesson.per_question("014", 4) == [0, 0.25, 1]


def rows_of(accuracy: list[int], kl: list[float], chosen: list[float]) -> list[dict]:
    """Rows with these numbers of correct answers out of 10, on validation and test alike."""
    entries = [
        {
            "validation": {"greedy": "1" * a + "0" * (10 - a)},
            "test": {"greedy": "1" * a + "0" * (10 - a)},
            "kl_previous": [k, 0.1],
            "chosen": [c, c],
        }
        for a, k, c in zip(accuracy, kl, chosen, strict=True)
    ]
    return stopping.rows_of_lesson(entries)


def test_stopping_rules():
    rows = rows_of([3, 7, 6, 8], [0, 0.4, 1.5, 0.2], [-9, -8, -10, -11])
    rules = {name: rule for name, rule in stopping.RULES.items() if "one line" not in name}
    assert {name: rule(rows) for name, rule in rules.items()} == {
        "keep the last model": 3,
        "best validation accuracy of all": 3,
        "patience 1": 1,
        "patience 2": 3,
        "validation accuracy falls": 1,
        "KL to the previous model above 0.5 nats": 1,
        "KL to the previous model above 1 nat": 1,
        "KL to the previous model above 2 nats": 3,
        "KL to the previous model grows": 1,
        "chosen completions lose probability": 1,
        "validation falls, or KL above 2 nats": 1,
        "validation falls, and KL above 1 nat": 1,
    }
    assert stopping.patience_2(rows_of([3, 7, 6, 7, 9], [0] * 5, [0] * 5)) == 1
    assert stopping.patience(rows_of([3, 3, 8], [0, 0, 0], [0, 0, 0])) == 0  # level is no gain
    assert stopping.regret(rows, 1) == pytest.approx(10)
    assert stopping.regret(rows, 3) == 0


def test_a_warning_comes_before_a_fall_or_with_it():
    falls = rows_of([5, 7, 8, 3], [0, 0.1, 2.5, 0.1], [-9, -8, -7, -7])
    rises = rows_of([5, 7, 8, 9], [0, 0.1, 0.1, 3.0], [-9, -8, -7, -7])
    assert [stopping.first_fall(rows) for rows in (falls, rises)] == [3, None]
    runs = [
        {"model": "m", "trial": trial, "rows": rows}
        for trial, rows in (("a", falls), ("a", falls), ("b", rises))
    ]
    scores = stopping.scores(
        runs,
        {name: stopping.RULES[name] for name in list(stopping.RULES) if "one line" not in name},
    ).set_index("rule")
    kl = scores.loc["KL to the previous model above 2 nats"]
    assert (kl.falls, kl.before, kl["at"], kl.false_alarms, kl.without_fall) == (2, 2, 0, 1, 1)
    assert (kl.falls_at_m1, kl.before_low, kl.before_high) == (0, 100, 100)
    patience = scores.loc["patience 1"]
    assert (patience.before, patience["at"], patience.false_alarms) == (0, 2, 0)
    assert patience.regret == 0 and patience.gain_over_last == pytest.approx(100 / 3)
    # Of two settings a resample often has one alone, however many seeds that has.
    seeds = [{"model": "m", "trial": trial} for trial in "aaaab"]
    assert stopping.interval_over_settings(seeds, [1, 1, 1, 1, 0]) == (0.8, 0, 1)
    # Patience 2 would stop one model after the end of these runs.
    assert (scores.loc["patience 2"].stops, scores.loc["patience 2"].regret) == (0, 0)
    # KL warns at M_2, and M_3 falls. A mean needs two such falls.
    assert (kl.lead, kl.lead_low, kl.lead_high) == (1, 1, 1)
    assert math.isnan(patience.lead)
    # This rule is applied to a finished run: it warns of nothing.
    assert math.isnan(scores.falls["best validation accuracy of all"])


def test_the_lead_time_is_counted_from_the_model_at_which_a_rule_stops():
    """A fall at M_4 and one at M_5; M_1 is the best model on validation until then."""

    def run(trial: str, test: list[int], validation: list[int]) -> dict:
        rows = rows_of(test, [0, 3] + [0.1] * 4, [-9, -8, -7, -6, -5, -4])
        return {
            "model": "m",
            "trial": trial,
            "rows": [row | {"validation": v / 10} for row, v in zip(rows, validation, strict=True)],
        }

    runs = [
        run("a", [5, 7, 7, 7, 3, 3], [5, 7, 7, 7, 3, 3]),
        run("b", [5, 7, 7, 7, 7, 3], [5, 7, 6, 7, 7, 3]),
        run("c", [5, 7, 7, 7, 7, 3], [5, 6, 7, 8, 9, 3]),  # patience 1 stops at the fall
        run("d", [5, 6, 7, 7, 8, 9], [5, 6, 7, 7, 8, 9]),  # no fall
    ]
    rules = ("patience 1", "patience 2", "KL to the previous model above 2 nats")
    scores = stopping.scores(runs, {name: stopping.RULES[name] for name in rules})
    # Patience 1 stops at M_2, patience 2 at M_3 and keeps M_1 as well, the limit on KL at M_1.
    assert scores.before.tolist() == [2, 2, 3] and scores["at"].tolist() == [1, 0, 0]
    assert scores.false_alarms.tolist() == [1, 0, 1]
    assert scores.lead.tolist() == pytest.approx([(2 + 3) / 2, (1 + 2) / 2, (3 + 4 + 4) / 3])
    assert scores.lead_low.tolist() == [2, 1, 3] and scores.lead_high.tolist() == [3, 2, 4]


def test_a_run_of_the_first_model_is_split_and_continued(tmp_path):
    def record(bits: list[str], numbers: dict[str, dict[int, float]]) -> str:
        metrics = [
            {"metric": name, "iteration": t, "value": value}
            for name, values in numbers.items()
            for t, value in values.items()
        ]
        answers = {str(t): {"greedy": text} for t, text in enumerate(bits)}
        return json.dumps({"trial": "irpo", "seed": 0, "answers": answers, "metrics": metrics})

    after, before = {t: -t for t in range(1, 5)}, dict.fromkeys(range(1, 5), -3)
    numbers = {"chosen_logp_per_token": after, "chosen_logp_per_token_before": before}
    numbers |= {"kl_to_previous": {t: t / 10 for t in range(1, 5)}}
    numbers |= {"one_step_apart": {t: t / 8 for t in range(4)}}
    for study, bits in (
        ("comparison", ["0010"] * 5),
        ("eight_iterations", ["0010"] + ["1011"] * 4),
    ):
        (tmp_path / f"{study}_runs.jsonl").write_text(record(bits, numbers) + "\n")
    [run] = stopping.finished_runs(tmp_path)
    assert [row["validation"] for row in run["rows"]] == [0.5] * 5 + [1] * 4  # even numbers
    assert [row["test"] for row in run["rows"]] == [0] * 5 + [0.5] * 4
    assert [row["kl"] for row in run["rows"]] == [None] + [0.1, 0.2, 0.3, 0.4] * 2
    assert [row["chosen_change"] for row in run["rows"]] == [None] + [2, 1, 0, -1] * 2
    assert [row["one_step"] for row in run["rows"]] == [None] + [0, 0.125, 0.25, 0.375] * 2


def test_a_run_of_eight_iterations_replaces_the_one_that_it_begins_with(tmp_path):
    settings, rng = {"learning_rate": 3e-4}, random.Random(0)
    made = [
        (lesson_study.Run("rft", 0, settings | {"iterations": 8}), 9),
        (lesson_study.Run("rft", 0, settings), 5),
        (lesson_study.Run("rft", 1, settings), 5),  # no run of eight iterations has this seed
    ]
    lines = [json.dumps(fake_record(run, [0.5] * models, rng)) for run, models in made]
    (tmp_path / "lesson_runs.jsonl").write_text("\n".join(lines) + "\n")
    runs = stopping.finished_runs(tmp_path)
    assert [(run["seed"], len(run["rows"])) for run in runs] == [(0, 9), (1, 5)]


def test_finished_runs_of_both_models_have_the_numbers_of_all_rules():
    runs = stopping.finished_runs()
    assert {run["model"] for run in runs} >= {"hasty", "misconceptions"}
    assert len({(run["model"], run["trial"], run["seed"]) for run in runs}) == len(runs)
    longer = next(run["rows"] for run in runs if (run["trial"], run["seed"]) == ("irpo", 0))
    assert len(longer) == 9 and all(row["kl"] is not None for row in longer[1:])
    scores = stopping.scores(runs).set_index("rule")
    assert (scores.regret_low <= scores.regret).all() and (scores.runs > 20).all()
    assert (scores.before + scores["at"] <= scores.falls)[scores.falls.notna()].all()
    assert ((scores.lead >= 1) == (scores.before > 1)).all()


def test_the_pages_say_what_the_rules_do():
    """docs/results/second_model.md and notebook 05 say this in words."""
    runs = stopping.finished_runs()
    scores = stopping.scores(runs).set_index("rule")
    warn, in_vain = scores.before > scores.falls / 2, scores.false_alarms / scores.without_fall
    assert warn.any() and in_vain[warn].min() > 1 / 8
    kl = [f"KL to the previous model above {limit}" for limit in ("0.5 nats", "1 nat", "2 nats")]
    chosen = "chosen completions lose probability"
    assert warn[[*kl, chosen]].all() and in_vain[warn].idxmin() == kl[-1]
    assert (scores.regret[[*kl, chosen]] > scores.regret["keep the last model"]).all()
    assert scores.stops["patience 2"] < scores.runs["patience 2"] / 3
    lost = {
        name: np.array([stopping.regret(run["rows"], rule(run["rows"])) for run in runs])
        for name, rule in stopping.RULES.items()
        if "one line" not in name
    }
    _, low, _ = stopping.interval_over_settings(runs, lost["patience 1"] - lost["patience 2"])
    assert low > 0
    best = lost["best validation accuracy of all"]
    gain, low, _ = stopping.interval_over_settings(runs, lost["patience 2"] - best)
    assert low > 0 and gain < 0.5
    # The share of pairs was measured on the first model alone.
    measured = {run["model"] for run in runs if run["rows"][1]["one_step"] is not None}
    assert measured == {"hasty"}


def fake_record(run: lesson_study.Run, accuracy: list[float], rng: random.Random) -> dict:
    """A record with these validation accuracies; the test split has the same ones."""
    entries = []
    for t, share in enumerate(accuracy):
        digits = "".join(str(int(i < share * 100)) for i in range(100))
        logps = [rng.gauss(-8 + 0.5 * t, 1) for _ in range(20)]
        labels = {"applies": 10, "follows": max(0, 5 - t), "correct": 5 + t}
        entries.append(
            {
                "iteration": t,
                "validation": {"greedy": digits, "sampled": digits, "k": 1},
                "test": {"greedy": digits},
                "chosen": logps,
                "rejected": [value - 2 for value in logps],
                "nats": 8.0,
                "tokens": 50.0,
                "misconceptions": {
                    kind: {
                        "labels": {},
                        "lines": {name: list(labels.values()) for name in misconceptions.NAMES},
                    }
                    for kind in ("greedy", "sampled")
                },
            }
        )
        if t:
            entries[-1] |= {"kl_previous": [0.5, 0.1], "kl_m0": [0.5 * t, 0.1], "pairs": 600}
    return {
        "key": run.key,
        "trial": run.trial,
        "model": run.model,
        "method": run.method,
        "settings": run.settings,
        "seed": run.seed,
        "planned_iterations": 4,
        "seconds": 1.0,
        "profile": {"beta": run.settings.get("beta", 0.1)},
        "environment": {},
        "iterations": entries,
    }


@pytest.fixture
def records() -> dict:
    """Finished runs: β and tuning for seed 0, and two seeds of the comparison."""
    rng, found = random.Random(0), {}
    for part, seeds in (("beta", 2), ("tuning", 1)):
        for run in lesson_study.PARTS[part](seeds, {}):
            low_beta = run.settings.get("beta", 1.0) < 1
            last = 0.5 if low_beta and run.method == "dpo" else 0.8
            last += 0.03 * run.settings["learning_rate"] / 1e-3
            found[run.key] = fake_record(run, [0.3, 0.5, 0.6, 0.7, last], rng)
    return found


@pytest.fixture
def all_parts(records) -> dict:
    """`records` with two seeds of every other part. Rejected completions help with few samples
    alone, accuracy falls after M_4, and a large β helps the plain model alone."""
    rng, found = random.Random(0), dict(records)
    for part in ("new_completions", "map", "regimes", "long", "plain"):
        for run in lesson_study.PARTS[part](2, records):
            helps = run.method == "irpo" and "n_samples" in run.settings
            helps = helps or run.model == "plain" and run.settings["beta"] == 1
            accuracy = [0.3, 0.5, 0.6, 0.7, 0.9 if helps else 0.7]
            if "iterations" in run.settings:
                accuracy += [0.7, 0.65, 0.6, 0.5]
            found.setdefault(run.key, fake_record(run, accuracy, rng))
    return found


def test_verdicts_on_all_parts_of_the_study(all_parts):
    verdicts = lesson_report.verdict_table(all_parts)
    groups = {"comparison", "NLL term", "map", "regimes", "eight iterations", "beta"}
    assert set(verdicts.group) == groups | {"log-probabilities"}
    row = verdicts.set_index("claim").loc
    few = row["rejected completions help: few samples (learning rate 0.0003, M4)"]
    assert few.points == pytest.approx(20) and few.verdict == "agrees"
    assert row["rejected completions help: hot (learning rate 0.0003, M4)"].points == 0
    lucky = row["rejected completions help: lucky (learning rate 0.001, M1)"]
    assert "/rft_lucky/" in lucky.a and "/irpo_lucky/" in lucky.b
    fallen = row["Iterative RPO gains after iteration 4 (M8)"]
    assert fallen.points == pytest.approx(-20) and fallen.verdict == ""
    plain = row["beta 1 beats beta 0.1 (plain model, Iterative RPO, learning rate 0.001, M4)"]
    assert plain.points == pytest.approx(20)
    more = "beta 1 gains more over beta 0.1 where completions have fewer nats"
    assert row[f"{more} (Iterative RPO, learning rate 0.001, M4)"].points == pytest.approx(20)


def test_new_completions_are_compared_at_the_settings_of_iterative_rpo(all_parts):
    tuned = lesson_study.best_settings("irpo", all_parts)
    runs = lesson_study.new_completions_part(2, all_parts)
    assert [(run.method, run.seed, run.settings) for run in runs] == [
        ("irpo_m0_samples", seed, tuned) for seed in (0, 1)
    ]
    table = lesson_report.verdict_table(all_parts)
    row = table[table.claim.str.contains("at equal settings")].iloc[0]
    sides = (row[side].rpartition(" ")[0].partition("/")[2] for side in ("a", "b"))
    assert [side.partition("/")[2] for side in sides] == [runs[0].trial.split("/", 2)[2]] * 2


def test_figures_of_the_map_and_of_eight_iterations(all_parts):
    drawn = lesson_study.map_part(2, all_parts) + lesson_study.long_part(2, all_parts)
    drawn = {run.key: all_parts[run.key] for run in drawn}
    means = lesson_report.mean_table(lesson_report.by_trial(drawn))
    made = lesson_report.figures(all_parts, means)
    words = made["lesson_map"][0].alt_text
    assert "α = 0.3 at 0.003: 70.0 (2 seeds)" in words and "RFT at 0.001: " in words
    assert "Iterative RPO: 30.0, 50.0, 60.0, 70.0, 70.0, 70.0, 65.0, 60.0, 50.0" in (
        made["lesson_long"][0].alt_text
    )
    assert not {"lesson_map", "lesson_long"} & set(
        lesson_report.figures({}, means[means.iteration == 0])
    )


def test_how_alike_pairs_are():
    made = [  # one equation of two is the same; then none of one, and no token
        {"chosen": "1+1=2\n2*3=6", "rejected": "1+1=2\n2*3=4", "ids": ([1, 2, 3, 4], [1, 2, 3, 5])},
        {"chosen": "2*3=6", "rejected": "Final answer: 5", "ids": ([1, 2], [3, 4])},
    ]
    rows = [
        row | {"model": "m", "chosen_ids": row["ids"][0], "rejected_ids": row["ids"][1]}
        for row in made
    ]
    [row] = lesson_report.pair_table(rows).to_dict("records")
    assert row == {
        "model": "m",
        "pairs": 2,
        "tokens": 37.5,
        "before": 25.0,
        "first": 50.0,
        "token": 50.0,
    }


def test_finished_seeds_are_complete_grids():
    runs = lesson_study.beta_part(3, {})
    assert len({run.key for run in runs}) == len(runs) == 3 * 16
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_tuning_goes_on_past_the_edge(records):
    rates = {
        run.settings["learning_rate"]
        for run in lesson_study.tuning_part(1, records)
        if run.method == "rft"
    }
    assert rates == {3e-4, 1e-3, 3e-3, 1e-2}  # the best one was at the upper edge


def test_tuning_tries_both_neighbours_of_the_best_beta(records):
    key = lesson_study.Run("dpo", 0, {"beta": 3.0, "learning_rate": 3e-4}).key
    records[key]["iterations"][-1]["validation"]["greedy"] = "1" * 300
    tried = {
        (run.settings["beta"], run.settings["learning_rate"])
        for run in lesson_study.tuning_part(1, records)
        if run.method == "dpo"
    }
    assert {(1.0, 3e-4), (10.0, 3e-4), (3.0, 1e-4), (3.0, 1e-3)} <= tried


def test_a_run_that_stopped_is_not_chosen(records):
    assert lesson_study.best_settings("rft", records) == {"learning_rate": 3e-3}
    best = records[lesson_study.Run("rft", 0, {"learning_rate": 3e-3}).key]
    best["iterations"].pop()
    assert lesson_study.best_settings("rft", records) == {"learning_rate": 1e-3}
    assert lesson_study.best_settings("grpo", {}) is None


def test_tables_and_figures(records):
    trials = lesson_report.by_trial(records)
    means = lesson_report.mean_table(trials)
    m4 = means[(means.method == "dpo") & (means.iteration == 4) & (means.split == "test")]
    m4 = m4.set_index("settings")
    assert m4.value["beta=0.1 learning_rate=0.0003"] == pytest.approx(0.51)
    assert m4.seeds["beta=0.1 learning_rate=0.0003"] == 2
    verdicts = lesson_report.verdict_table(records).set_index("claim")
    small = verdicts.loc["the NLL term helps (beta 0.1, learning rate 0.0003, M4)"]
    assert small.points == pytest.approx(30)
    assert small.verdict == "agrees"
    large = verdicts.loc["the NLL term helps (beta 1, learning rate 0.0003, M4)"]
    assert large.points == 0
    assert verdicts.verdict["Iterative RPO beats GRPO (M4)"] == ""  # the paper does not compare
    assert large.verdict == "not resolved"
    made = lesson_report.figures(records, means)
    assert {"lesson_beta", "lesson_log_probabilities", "lesson_misconceptions"} <= set(made)
    for figure, data in made.values():
        assert len(figure.alt_text) > 50
        assert len(data)
    results = lesson_report.results_table(records)
    assert (results.chosen >= results["last"]).all()
    tuned = results[results.tuned]
    irpo = tuned[tuned.trial.str.contains("/irpo/")]
    assert irpo.first_gain.isna().all()
    other = tuned[tuned.trial.str.contains("/rft/")]
    for name in ("first", "last", "chosen"):
        gain = 100 * (other[name].item() - irpo[name].item())
        assert other[f"{name}_gain"].item() == pytest.approx(gain)
        assert other[f"{name}_gain_low"].item() <= gain <= other[f"{name}_gain_high"].item()
    assert sorted(name.split("/")[1] for name in tuned.trial) == sorted(lesson_study.RATES)
    assert "misconceptions/rft/learning_rate=0.003" in set(tuned.trial)


def test_the_corpus_has_no_question_of_a_split():
    import make_misconceptions_model as script

    known = {row["question"] for rows in word_problems.all_splits().values() for row in rows}
    rows = script.corpus(script.PHASES[1], seed=0, words=1.0)
    assert not known & {next(rows)["question"] for _ in range(200)}


def test_the_second_seed_model_shows_its_working_and_errs_in_it():
    engine = cpu.Engine()
    profile = profiles.get("cpu", model=lesson_study.MODELS["misconceptions"], dequantize=True)
    model, tokenizer = engine.load(profile)
    task = tasks.get("word_problems")
    questions = task.load("validation").select(range(0, 300, 10))
    settings = {"max_new_tokens": 112, "progress": False, "engine": engine}
    samples = sampling.sample(model, tokenizer, questions, task, 1, 0.0, **settings)
    labels = [
        label
        for row, text in zip(questions, samples["completion"], strict=True)
        for label in misconceptions.classify(row, text)
    ]
    assert misconceptions.MISSING not in labels
    assert sum(label in misconceptions.NAMES for label in labels) > 0.1 * len(labels)
    assert labels.count(misconceptions.CORRECT) > 0.6 * len(labels)


def test_the_second_seed_model_has_a_short_name():
    folder = models.FOLDERS["seed-misconceptions"]
    assert models.find("seed-misconceptions") == str(folder)
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 8e6


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """The study with a few questions and one step per iteration, in a folder of its own."""
    pairs = tmp_path / "pairs.jsonl"
    with lesson_study.PAIRS_FILE.open() as file:
        pairs.write_text("".join(itertools.islice(file, 4)))
    small = {"n_questions": 8, "n_eval_questions": 8, "k_pairs": 1, "batch_size": 4}
    for name, value in {
        "RUNS": tmp_path / "runs",
        "RUNS_FILE": tmp_path / "runs.jsonl",
        "PAIRS_FILE": pairs,
        "BASE": lesson_study.BASE | small,
        "STEPS": 1,
        "ITERATIONS": 2,
        "GRPO_BATCH": 4,
        "TEST_QUESTIONS": 4,
    }.items():
        monkeypatch.setattr(lesson_study, name, value)
    for name in ("KL_QUESTIONS", "PAIRS"):  # the study changes them
        monkeypatch.setattr(drift, name, getattr(drift, name))
    return tmp_path


@pytest.mark.slow
def test_a_small_study_from_the_runs_to_the_tables(small_study):
    records = {}
    for method in ("irpo", "rft", "grpo", "irpo_m0_samples", "sft_gold"):
        settings = {"learning_rate": 3e-4} | ({"beta": 1.0} if "irpo" in method else {})
        run = lesson_study.Run(method, 0, settings)
        record = json.loads(json.dumps(lesson_study.execute(run, 1, "a test")))
        records[run.key] = record
        assert record["stopped"] is None
        m0, m1, m2 = record["iterations"]
        assert [entry["iteration"] for entry in (m0, m1, m2)] == [0, 1, 2]
        assert len(m0["validation"]["greedy"]) == 8 and len(m2["test"]["greedy"]) == 4
        assert m2["training_seconds"] > 0
        assert m2["steps"] == (2 if method in (*lesson_study.NOT_ITERATIVE, "grpo") else 1)
        assert ("train_margin" in m1) == ("irpo" in method)
        assert m1["kl_m0"] == m1["kl_previous"]
        assert not (small_study / "runs" / "lesson" / run.key.replace("/", "__")).exists()
    m0 = [record["iterations"][0] for record in records.values()]
    assert all(entry == m0[0] for entry in m0)  # made once, for all methods
    means = lesson_report.mean_table(lesson_report.by_trial(records))
    assert set(means.method) == {record["method"] for record in records.values()}
    assert {"lesson_kl"} <= set(lesson_report.figures(records, means))


def test_the_profile_of_the_second_seed_model_has_the_settings_of_the_study():
    tuned = lesson_study.best_settings("irpo", lesson_study.load_records())
    run = lesson_study.Run("irpo", 0, tuned)
    studied = lesson_study.profile_of(run, lesson_study.ITERATIONS, lesson_study.STEPS)
    own = {"sampling_batch_size", "eval_split", "eval_samples", "eval_samples_ends"}
    profile = profiles.get("misconceptions")
    assert {name for name, value in vars(profile).items() if value != getattr(studied, name)} <= own
