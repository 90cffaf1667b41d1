"""Checks of the exercises in 00_start_here: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import pandas as pd
from checks_common import call


def time_shares(function) -> str:
    """Exercise 0.2: `function(timing)` gives the share of all seconds by stage."""
    timing = pd.DataFrame(
        {
            "iteration": [0, 0, 1, 1, 1],
            "stage": ["samples", "evaluation", "samples", "adapter", "evaluation"],
            "seconds": [10.0, 40.0, 30.0, 60.0, 60.0],
            "tokens": [100.0, 400.0, 300.0, 100.0, 100.0],
        }
    )
    value, message = call(function, timing)
    if message:
        return message
    try:
        value = {str(stage): float(share) for stage, share in dict(value).items()}
    except (TypeError, ValueError):
        return (
            f"Your function returned a {type(value).__name__} that is not one number for each stage. Return a Series with the "
            "stages as its index, or a dict."
        )
    by_stage = timing.groupby("stage")
    seconds, tokens = by_stage.seconds.sum(), by_stage.tokens.sum()
    if set(value) != set(seconds.index):
        return f"The stages of this table are {', '.join(seconds.index)}; yours are {', '.join(sorted(value)) or 'none'}."
    mistakes = {
        "These are seconds, not shares: divide by the seconds of all stages together.": seconds,
        "These are percentages. The exercise asks for shares between 0 and 1: leave out the factor 100.": 100
        * seconds
        / seconds.sum(),
        "You divided by the longest stage, so the shares do not add up to 1. Divide by the sum.": seconds
        / seconds.max(),
        "You divided by the number of rows. Divide by the seconds of all stages together.": seconds
        / len(timing),
        "You took the mean over iterations where the sum is needed: a stage that ran twice then counts once.": by_stage.seconds.mean()
        / by_stage.seconds.mean().sum(),
        "These are shares of the tokens. The exercise asks for shares of the seconds.": tokens
        / tokens.sum(),
        "Your shares look at one iteration only. Add up a stage's seconds over all iterations first.": timing[
            timing.iteration == 1
        ]
        .set_index("stage")
        .seconds.pipe(lambda s: s / s.sum()),
        "You divided by the mean of the stages instead of their sum.": seconds / seconds.mean(),
        "You counted rows of the table. Add up the seconds of each stage.": timing.stage.value_counts(
            normalize=True
        ),
    }
    if all(_same(value[stage], share) for stage, share in (seconds / seconds.sum()).items()):
        return "Right: the shares add up to 1. Call it with the real `timing`, and compare with the seconds in the table."
    for message, wrong in mistakes.items():
        if set(wrong.index) == set(value) and all(
            _same(value[stage], x) for stage, x in wrong.items()
        ):
            return message
    return (
        f"The shares of this small table should be {_text(seconds / seconds.sum())}; yours are {_text(value)}, "
        f"which add up to {sum(value.values()):.3g}."
    )


def sampling_hours(function) -> str:
    """Exercise 0.3: hours of sampling from counts and tokens per second."""
    questions, samples, tokens, iterations, rate = 7500, 30, 200, 4, 5000
    value, message = call(function, questions, samples, tokens, iterations, rate)
    if message:
        return message
    right = questions * samples * tokens * iterations / rate / 3600
    mistakes = {
        "That is in seconds: divide by 3,600 to get hours.": 3600 * right,
        "That is in minutes: divide by another 60 to get hours.": 60 * right,
        "That is in days: the exercise asks for hours.": right / 24,
        "That is one iteration only: multiply by `iterations`.": right / iterations,
        "You counted one completion per question: every question gets `n` completions.": right
        / samples,
        "You counted completions, not tokens: multiply by `mean_tokens`.": right / tokens,
        "You left out the number of questions.": right / questions,
        "You multiplied by `tokens_per_second`. A faster machine takes less time: divide by it.": right
        * rate
        * rate,
        "That is the number of tokens. Divide by `tokens_per_second`, then turn seconds into hours.": right
        * rate
        * 3600,
        "You inverted the ratio: divide the tokens by the tokens per second.": 1
        / (right * 3600)
        / 3600,
    }
    if _same(value, right):
        other, message = call(function, 10, 2, 36, 1, 1)
        if message or not _same(other, 0.2):
            return (
                f"It fits one case, but 10 questions with 2 completions of 36 tokens at 1 token per second take 0.2 hours and you "
                f"get {other}. Are there numbers in your function that should be arguments?"
            )
        return (
            f"Right: with {questions:,} questions, {samples} completions of {tokens} tokens, {iterations} iterations and {rate:,} tokens per "
            f"second it is {right:.0f} hours."
        )
    for message, wrong in mistakes.items():
        if _same(value, wrong):
            return message
    return (
        f"For {questions} questions, {samples} completions, {tokens} tokens, {iterations} iterations and {rate} tokens per second it is "
        f"{right:.2f} hours; your function gives {value!r}. Count the tokens of one question first."
    )


def iterative_rpo(function) -> str:
    """Exercise 0.1: the loop, called with stages that write down what they are given."""
    sampled, trained = [], []

    def sample(model, questions):
        sampled.append(model)
        return f"samples of {model}"

    def grade(samples):
        return f"graded {samples}"

    def pair(graded):
        return f"pairs from {graded}"

    def train(model, pairs, reference):
        trained.append((model, pairs, reference))
        return f"M_{len(trained)}"

    value, message = call(function, "M_0", ["q1", "q2"], 3, sample, grade, pair, train)
    if message:
        return message
    wrong = _wrong_part(sampled, trained) or _wrong_result(value, trained)
    if not wrong:
        sampled, trained = [], []
        value, message = call(function, "M_0", ["q1"], 1, sample, grade, pair, train)
        if message or value not in (["M_0", "M_1"], ("M_0", "M_1")):
            return (
                "Almost: for 1 iteration the result should be M_0 and M_1. Do you use `iterations`?"
            )
    return wrong or (
        "Right: M_t samples, M_t is the reference, training starts from M_t, and the pairs are M_t's own."
    )


def _wrong_part(sampled: list, trained: list) -> str | None:
    """What was given to which stage, against what should have been."""
    if len(trained) != 3:
        return (
            f"For 3 iterations you trained {len(trained)} times. Every iteration trains once: M_0 to M_3 are four models, "
            "three of them trained."
        )
    if len(sampled) != 3:
        return f"For 3 iterations you sampled {len(sampled)} times. Every iteration samples once, before it trains."
    for t, (start, pairs, reference) in enumerate(trained):
        now = f"M_{t}"
        if sampled[t] != now:
            return (
                f"In iteration {t} the samples came from {sampled[t]!r}. They must come from the newest model, M_{t}: "
                "otherwise the model never learns from what it does now."
            )
        if start != now:
            return f"In iteration {t} training started from {start!r}. It starts from a copy of the newest model, M_{t}."
        if "pairs from" in str(reference):
            return "The reference was a set of pairs: the order of the arguments is train(model, pairs, reference)."
        if reference != now:
            return (
                f"In iteration {t} the reference was {reference!r}. In this paper it is the model that training starts from, "
                f"M_{t}."
            )
        if isinstance(pairs, str) and pairs == f"pairs from samples of {now}":
            return "You made pairs from samples without grades: `pair` needs what `grade` returns."
        if pairs != f"pairs from graded samples of {now}":
            if now != "M_0" and "M_0" in str(pairs) or str(pairs).count("pairs from") > 1:
                return (
                    f"In iteration {t} training also got pairs of earlier models. The paper trains on the pairs of M_t alone and "
                    "discards the others."
                )
            return f"In iteration {t} training got {pairs!r} as its pairs. It needs `pair(grade(sample(M_{t}, questions)))` as it is."
    return None


def _wrong_result(value, trained: list) -> str | None:
    """The list of models that the function returned."""
    expected = ["M_0", "M_1", "M_2", "M_3"]
    if isinstance(value, (list, tuple)) and list(value) == expected:
        return None
    if value == "M_3":
        return "The loop is as it should be, but you return the last model only. Return the list of all, M_0 first."
    if isinstance(value, (list, tuple)) and list(value) == expected[1:]:
        return "The loop is as it should be, but M_0 is missing at the beginning of the list."
    return f"The loop is as it should be, but it should return {expected}; yours returns {value!r}."


def _same(a, b) -> bool:
    try:
        return abs(float(a) - float(b)) <= 1e-6 * max(1e-9, abs(float(b)))
    except (TypeError, ValueError):
        return False


def _text(shares) -> str:
    return ", ".join(f"{stage} {share:.3g}" for stage, share in dict(shares).items())
