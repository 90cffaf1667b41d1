"""The checks of notebook 00 accept the solution, and tell a typical wrong answer what is wrong with it."""

import exercises
import pandas as pd
import pytest

pytest.importorskip("jupytext")

import checks_00 as checks  # noqa: E402


def solution(name: str, solved: bool = True):
    """The function of that name as the notebook's source defines it, solved or as a stub."""
    return exercises.defined("00_start_here", name, solved)


EXERCISES = ("time_shares", "sampling_hours", "iterative_rpo")


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right_and_stubs_are_unsolved(name):
    check = getattr(checks, name)
    assert check(solution(name)).startswith("Right")
    assert check(solution(name, solved=False)).startswith("Not solved yet")
    for nothing in (None, ..., lambda *arguments: ...):
        assert check(nothing).startswith("Not solved yet")
    assert "is a `return` missing?" in check(lambda *arguments: None)


@pytest.mark.parametrize("name", EXERCISES)
def test_checks_never_raise(name):
    def broken(*arguments, **keywords):
        raise KeyError("seconds")

    check = getattr(checks, name)
    assert "KeyError: 'seconds'" in check(broken)
    for odd in (
        3,
        lambda *a: object(),
        lambda *a: "text",
        lambda *a: [],
        lambda *a: {"x": None},
        lambda *a: float("nan"),
        lambda *a: {},
    ):
        assert not check(odd).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda t: t.groupby("stage").seconds.sum(), "divide by the seconds of all stages"),
        (lambda t: 100 * t.groupby("stage").seconds.sum() / t.seconds.sum(), "percentages"),
        (
            lambda t: t.groupby("stage").seconds.mean() / t.groupby("stage").seconds.mean().sum(),
            "mean over iterations",
        ),
        (lambda t: t.groupby("stage").tokens.sum() / t.tokens.sum(), "shares of the tokens"),
        (
            lambda t: t.groupby("stage").seconds.sum() / t.groupby("stage").seconds.sum().max(),
            "longest stage",
        ),
        (lambda t: t.stage.value_counts(normalize=True), "counted rows"),
        (lambda t: t.seconds / t.seconds.sum(), "The stages of this table are"),
        (lambda t: dict.fromkeys(set(t.stage), 1 / 3), "should be adapter 0.3"),
    ],
)
def test_time_shares_names_the_mistake(wrong, words):
    assert words in checks.time_shares(wrong)


def test_time_shares_may_be_a_dict():
    total = lambda t: t.seconds.sum()  # noqa: E731
    assert checks.time_shares(
        lambda t: {s: g.seconds.sum() / total(t) for s, g in t.groupby("stage")}
    ).startswith("Right")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda q, s, t, i, rate: q * s * t * i / rate, "in seconds"),
        (lambda q, s, t, i, rate: q * s * t * i / rate / 60, "in minutes"),
        (lambda q, s, t, i, rate: q * t * i / rate / 3600, "one completion per question"),
        (lambda q, s, t, i, rate: q * s * t / rate / 3600, "one iteration only"),
        (lambda q, s, t, i, rate: q * s * i / rate / 3600, "completions, not tokens"),
        (lambda q, s, t, i, rate: q * s * t * i * rate / 3600, "divide by it"),
        (lambda q, s, t, i, rate: q * s * t * i, "number of tokens"),
        (lambda q, s, t, i, rate: 7500 * 30 * t * i / rate / 3600, "should be arguments"),
        (lambda q, s, t, i, rate: "long", "Count the tokens"),
    ],
)
def test_sampling_hours_names_the_mistake(wrong, words):
    assert words in checks.sampling_hours(wrong)


def loop(
    start="newest",
    sampler="newest",
    reference="newest",
    data="newest",
    rounds=0,
    grading=True,
    result="all",
):
    """The loop with one thing done differently."""

    def function(model, questions, iterations, sample, grade, pair, train):
        models, old = [model], []
        for _ in range(iterations + rounds):
            of = {"newest": models[-1], "first": model}
            samples = sample(of[sampler], questions)
            new = pair(grade(samples) if grading else samples)
            old.append(new)
            models.append(
                train(
                    of[start],
                    new if data == "newest" else list(old) if data == "list" else " and ".join(old),
                    of[reference],
                )
            )
        return {"all": models, "last": models[-1], "trained": models[1:]}[result]

    return function


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(reference="first"), "the reference was 'M_0'"),
        (dict(sampler="first"), "the samples came from 'M_0'"),
        (dict(start="first"), "training started from 'M_0'"),
        (dict(data="text"), "pairs of earlier models"),
        (dict(data="list"), "as it is"),
        (dict(rounds=1), "you trained 4 times"),
        (dict(rounds=-1), "you trained 2 times"),
        (dict(grading=False), "without grades"),
        (dict(result="last"), "the last model only"),
        (dict(result="trained"), "M_0 is missing"),
    ],
)
def test_the_loop_names_the_mistake(change, words):
    assert words in checks.iterative_rpo(loop(**change))


def test_a_correct_loop_of_another_shape_is_right():
    assert checks.iterative_rpo(loop()).startswith("Right")


def test_the_check_of_time_shares_leaves_the_students_table_alone():
    def spoil(timing: pd.DataFrame):
        value = timing.groupby("stage").seconds.sum() / timing.seconds.sum()
        timing["seconds"] = 0
        return value

    assert not checks.time_shares(spoil).startswith("Your function raised")


def test_a_placeholder_after_working_code_is_named():
    def loop_without_result(model, questions, iterations, sample, grade, pair, train):
        models = [model]
        for _ in range(iterations):
            now = models[-1]
            models.append(train(now, pair(grade(sample(now, questions))), now))
        return ...

    assert "still returns `...`" in checks.iterative_rpo(loop_without_result)
    assert checks.iterative_rpo(lambda *arguments: ...).startswith("Not solved yet")


def test_swapped_arguments_and_a_fixed_number_of_iterations_are_named():
    def run(swapped, rounds):
        def function(model, questions, iterations, sample, grade, pair, train):
            models = [model]
            for _ in range(rounds):
                now = models[-1]
                pairs = pair(grade(sample(now, questions)))
                models.append(train(now, now, pairs) if swapped else train(now, pairs, now))
            return models

        return checks.iterative_rpo(function)

    assert "order of the arguments" in run(swapped=True, rounds=3)
    assert "Do you use `iterations`?" in run(swapped=False, rounds=3)
