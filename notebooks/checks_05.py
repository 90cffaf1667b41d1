"""Checks of the exercises in 05_iterations: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
from checks_common import call, number


def pairs_of_each_model(function) -> str:
    """Exercise 5.1: `function(run)` -> {t: pairs that M_t was trained on} for t = 1 ... T."""
    made = [
        (600, 350, 1400),
        (600, 420, 1674),
        (600, 390, 1533),
    ]  # questions, used, pairs of iterations 0, 1, 2
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "profile.json").write_text(json.dumps({"iterations": len(made), "n_questions": 600}))
        for t, (questions, used, pairs) in enumerate(made):
            (run / f"iteration_{t}" / "pairs").mkdir(parents=True)
            (run / f"iteration_{t}" / "pairs" / "counts.json").write_text(
                json.dumps({"questions": questions, "used": used, "pairs": pairs})
            )
        (run / f"iteration_{len(made)}").mkdir()
        value, message = call(function, run)
    if message:
        if "FileNotFoundError" in message or "No such file" in message:
            return (
                "A file that your function wants is not there. The run of this check has 3 iterations, as its profile.json says, and "
                "the last model makes no pairs: iteration_3 has none, and there is no iteration_4."
            )
        return message
    if not isinstance(value, dict):
        return f"Your function returned a {type(value).__name__}. Return a dict: number of the model -> pairs."
    by_t = [pairs for _, _, pairs in made]
    right = {t + 1: pairs for t, pairs in enumerate(by_t)}
    mistakes = [
        (
            "You gave the pairs that each model *made*. In iteration_t lies what was made with M_t; M_{t+1} is trained on it, and M_0 "
            "on nothing.",
            dict(enumerate(by_t)),
        ),
        ("M_0 is not trained: leave it out. The pairs of iteration_0 made M_1.", {0: 0, **right}),
        (
            "M_0 is not trained: leave it out. The pairs of iteration_0 made M_1.",
            {0: None, **right},
        ),
        (
            "These are the questions that gave pairs (`used`). Take `pairs`.",
            {t + 1: used for t, (_, used, _) in enumerate(made)},
        ),
        (
            "These are all questions (`questions`). Take `pairs`.",
            {t + 1: questions for t, (questions, _, _) in enumerate(made)},
        ),
        (
            "The keys are strings. Make them the numbers 1 ... T.",
            {str(t): pairs for t, pairs in right.items()},
        ),
        (
            "You have M_t trained on the pairs of iteration_t. Those were made with M_t itself, after it had been trained.",
            {t: by_t[t] for t in range(1, len(by_t))},
        ),
    ]
    if value == right:
        return "Right: M_{t+1} is trained on the pairs that M_t made, which lie in iteration_t. The last model makes none."
    for text, wrong in mistakes:
        if value == wrong:
            return text
    return f"For a run of 3 iterations with {', '.join(map(str, by_t))} pairs it should be {right}; yours gives {value}."


def mcnemar_p(function) -> str:
    """Exercise 5.2: exact two-sided McNemar p value of two lists of 0 and 1."""
    a, b = _answers(only_a=2, only_b=9, both=5, neither=4)
    value, message = number(function, a, b)
    if message:
        return message
    right = 2 * _tail(11, 2)
    mistakes = [
        (
            "This is the one-sided value. Before looking you did not know which model would win: double it.",
            _tail(11, 2),
        ),
        (
            "You took the probability of exactly this split. More uneven ones count as well: add up from 0 to the smaller side.",
            2 * math.comb(11, 2) / 2**11,
        ),
        (
            "You took the probability of exactly this split, on one side. Add up from 0 to the smaller side, and double.",
            math.comb(11, 2) / 2**11,
        ),
        (
            "You tossed a coin for every question. Only the discordant ones count: those that both got right, or both wrong, say nothing.",
            min(1.0, 2 * _tail(20, 2)),
        ),
        (
            "You compared how many each got right as if the questions had been different ones (two proportions). Compare them question by "
            "question.",
            _two_proportions(7, 14, 20),
        ),
        (
            "That is the chi-squared approximation. With few discordant questions it is off; use the binomial sum.",
            _chi2((9 - 2) ** 2 / 11),
        ),
        (
            "That is the chi-squared approximation with continuity correction. Close, but the exact sum is as easy.",
            _chi2((9 - 2 - 1) ** 2 / 11),
        ),
        (
            "You added up from 0 to the *larger* side, which is nearly everything. Take the smaller one.",
            min(1.0, 2 * _tail(11, 9)),
        ),
        (
            "You added up from 0 to the *larger* side, which is nearly everything. Take the smaller one, and double.",
            _tail(11, 9),
        ),
        (
            "The last term is missing: the split that was seen belongs to the sum. `range(k)` ends at k - 1.",
            2 * _tail(11, 1),
        ),
        (
            "The split that was seen is missing in the sum, and it should be doubled. `range(k)` ends at k - 1.",
            _tail(11, 1),
        ),
    ]
    if _close(value, right):
        return _mcnemar_corners(function) or (
            "Right, and exact also for few questions. Two models that answer 20 questions can differ by 7 and "
            f"still be no different: p = {right:.3f} here."
        )
    for text, wrong in mistakes:
        if _close(value, wrong):
            return text
    return (
        f"With 2 questions that only a got right and 9 that only b did, p is {right:.4f}; yours gives {value:.4g}. "
        "11 tosses of a fair coin: how likely is a split of 2 to 9, or a more uneven one, on either side?"
    )


def _mcnemar_corners(function) -> str | None:
    """Cases at the edge that a formula for the middle misses."""
    for sizes, right, text in (
        (
            dict(only_a=9, only_b=2, both=5, neither=4),
            2 * _tail(11, 2),
            "with a and b exchanged. It must not matter which is the better one",
        ),
        (
            dict(only_a=3, only_b=3, both=2, neither=2),
            1.0,
            "where both sides are equal, 3 and 3: doubling exceeds 1, so cut it at 1",
        ),
        (
            dict(only_a=0, only_b=0, both=3, neither=2),
            1.0,
            "without any discordant question: there is no evidence, so p is 1",
        ),
    ):
        value, message = number(function, *_answers(**sizes))
        if message or not _close(value, right):
            got = message or f"it gives {value:.4g} instead of {right:.4g}"
            return f"It fits the first case, but not {text}. ({got.rstrip('.')}.)"
    return None


def estimate_kl(function) -> str:
    """Exercise 5.3: (estimate, standard error) from log-probabilities of samples of the new model."""
    now = np.array([-3.0, -5.5, -2.0, -8.0, -4.0, -3.5, -6.0, -2.5])
    before = np.array([-3.5, -5.0, -3.5, -9.0, -4.5, -5.0, -5.75, -3.0])
    value, message = call(function, now.tolist(), before.tolist())
    if message:
        return message
    try:
        pair = [float(x) for x in value]
    except (TypeError, ValueError):
        pair = None
    if pair is None or len(pair) != 2:
        return "Return two numbers: the estimate, and its standard error."
    ratios, n = now - before, len(now)
    right, error = ratios.mean(), ratios.std(ddof=1) / math.sqrt(n)
    weights = np.exp(now)
    for text, wrong in (
        (
            "The sign is turned round: this is the mean of log before - log now. For KL(now || before) take log now - log before.",
            -right,
        ),
        (
            "You weighed each answer by its probability. The samples carry the weights already: likely answers are drawn often.",
            (weights * ratios).sum(),
        ),
        (
            "You weighed each answer by its probability. The samples carry the weights already: likely answers are drawn often.",
            (weights * ratios).sum() / weights.sum(),
        ),
        ("That is the sum. A KL divergence is a mean over answers.", ratios.sum()),
        (
            "You took absolute values. Single log-ratios may be negative; their mean estimates the divergence only with their signs.",
            np.abs(ratios).mean(),
        ),
        (
            "You took exponentials. KL is a mean of the *logarithm* of the ratio.",
            np.exp(ratios).mean(),
        ),
        (
            "You took exponentials. KL is a mean of the *logarithm* of the ratio.",
            np.log(np.exp(ratios).mean()),
        ),
        (
            "You divided by n - 1. That belongs into the standard deviation, not into the mean.",
            ratios.sum() / (n - 1),
        ),
        (
            "You cut negative ratios off at 0, which makes the estimate too high.",
            np.maximum(ratios, 0).mean(),
        ),
    ):
        if _close(pair[0], wrong) and not _close(wrong, right):
            return f"The estimate: {text[0].lower()}{text[1:]}"
    if not _close(pair[0], right):
        return f"The estimate should be {right:.4f} for the numbers of this check; yours is {pair[0]:.4g}."
    for text, wrong in (
        (
            "this is the standard deviation of single answers. That of their mean is smaller: divide by the root of n.",
            ratios.std(ddof=1),
        ),
        (
            "this is the standard deviation of single answers, with n instead of n - 1. Take ddof=1 and divide by the root of n.",
            ratios.std(),
        ),
        (
            "you divided by n in the standard deviation. Its own mean was fitted to the data, so n - 1: ddof=1.",
            ratios.std() / math.sqrt(n),
        ),
        ("you divided by n instead of its root.", ratios.std(ddof=1) / n),
        (
            "this is the variance. Take the root of it, then divide by the root of n.",
            ratios.var(ddof=1),
        ),
        ("this is the variance of the mean. Take the root.", ratios.var(ddof=1) / n),
        (
            "this is half the width of a 95 % interval. The exercise asks for one standard error.",
            1.959964 * error,
        ),
        (
            "this is half the width of a 95 % interval. The exercise asks for one standard error.",
            1.96 * error,
        ),
    ):
        if _close(pair[1], wrong):
            return f"The estimate is right. The error: {text}"
    if not _close(pair[1], error):
        return f"The estimate is right. Its standard error should be {error:.4f}; yours is {pair[1]:.4g}."
    return (
        f"Right: {right:.2f} ± {error:.2f} nats. With 8 answers that says little; a run draws 256."
    )


def keep(function) -> str:
    """Exercise 5.4: the last model before the first step that is not sound."""
    cases = {
        "all steps are sound": _table(
            (0.3, 0.5, 0.7), (0.001, 0.002), ((-0.1, -0.05), (-0.06, -0.03))
        ),
        "the last gain is no more than luck": _table(
            (0.3, 0.5, 0.51), (0.001, 0.6), ((-0.1, -0.05), (-0.06, -0.03))
        ),
        "a step in the middle lowers the winners": _table(
            (0.3, 0.5, 0.6, 0.7),
            (0.001, 0.001, 0.001),
            ((-0.1, -0.05), (-0.06, -0.20), (-0.3, -0.1)),
        ),
        "accuracy falls, and significantly so": _table(
            (0.3, 0.6, 0.4), (0.001, 0.001), ((-0.1, -0.05), (-0.06, -0.03))
        ),
        "the first step is not sound already": _table(
            (0.3, 0.31, 0.6), (0.8, 0.001), ((-0.1, -0.05), (-0.06, -0.03))
        ),
        "the winners stay where they were, which is no fall": _table(
            (0.3, 0.5, 0.7), (0.001, 0.001), ((-0.1, -0.1), (-0.1, -0.1))
        ),
        "the winners rise, though from a lower start than they had reached": _table(
            (0.3, 0.5, 0.7), (0.001, 0.001), ((-0.1, -0.03), (-0.08, -0.05))
        ),
        "M_0 is all there is": _table((0.3,), (), ()),
    }
    values = {}
    for name, table in cases.items():
        values[name], message = number(function, table)
        if message:
            return (
                message
                if message.startswith("Not solved")
                else f"Where {name}: {message[0].lower()}{message[1:]}"
            )
    right = {name: _keep(table) for name, table in cases.items()}
    if values == right:
        return "Right: the first unsound step ends it, whatever comes after."
    strategies = [
        (
            "You return the unsound step itself. Keep the model before it.",
            lambda t: min(_keep(t) + 1, len(t) - 1),
        ),
        (
            "You return the step with the highest accuracy. That is the luckiest one, or a ruined one that got better again.",
            lambda t: max(range(len(t)), key=lambda i: t[i]["greedy"]),
        ),
        ("You return the last model always.", lambda t: len(t) - 1),
        (
            "You look for the last sound step. An unsound one before it has to end the walk.",
            lambda t: max([i for i in range(1, len(t)) if _sound(t, i)], default=0),
        ),
        (
            "You count sound steps. Stop at the first one that is not.",
            lambda t: sum(_sound(t, i) for i in range(1, len(t))),
        ),
        (
            "You do not look at the winners' log-probability: a step that lowers it is not sound, even if accuracy rose.",
            lambda t: _keep(t, logp=False),
        ),
        (
            "You compare the winners with those of the iteration before. These are other pairs: compare before and after of the same t.",
            _along,
        ),
        (
            "You do not look at p: a gain that may be luck is not sound.",
            lambda t: _keep(t, p=False),
        ),
        (
            "You look at p, but not at the direction: a significant *fall* is not sound.",
            lambda t: _keep(t, rise=False),
        ),
        (
            "Where the winners' log-probability stays equal it has not fallen: that is sound.",
            lambda t: _keep(t, strict=True),
        ),
    ]
    for text, strategy in strategies:
        if values == {name: strategy(table) for name, table in cases.items()}:
            return text
    name = next(name for name in cases if values[name] != right[name])
    return (
        f"Where {name}, keep M_{right[name]}; yours says {values[name]:g}. The table: {cases[name]}"
    )


def _table(greedy, ps, logps) -> list[dict]:
    rows = [{"greedy": greedy[0], "p": None, "kl": None, "logp_before": None, "logp_after": None}]
    return rows + [
        {"greedy": g, "p": p, "kl": 0.1, "logp_before": old, "logp_after": new}
        for g, p, (old, new) in zip(greedy[1:], ps, logps)
    ]


def _sound(table, t, rise=True, p=True, logp=True, strict=False) -> bool:
    row = table[t]
    fell = (
        row["logp_after"] <= row["logp_before"]
        if strict
        else row["logp_after"] < row["logp_before"]
    )
    return (
        (not rise or row["greedy"] > table[t - 1]["greedy"])
        and (not p or row["p"] < 0.05)
        and not (logp and fell)
    )


def _along(table) -> int:
    """`keep` with the winners after each training compared along the line, over different pairs."""
    rows = [
        {**row, "logp_before": before["logp_after"]}
        if before and before["logp_after"] is not None
        else row
        for row, before in zip(table, [None, *table])
    ]
    return _keep(rows)


def _keep(table, **rules) -> int:
    return next(
        (t - 1 for t in range(1, len(table)) if not _sound(table, t, **rules)), len(table) - 1
    )


def _answers(only_a: int, only_b: int, both: int, neither: int) -> tuple[list[int], list[int]]:
    return [1] * only_a + [0] * only_b + [1] * both + [0] * neither, [0] * only_a + [1] * only_b + [
        1
    ] * both + [0] * neither


def _tail(n: int, k: int) -> float:
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


def _chi2(x: float) -> float:
    """Upper tail of chi-squared with one degree of freedom."""
    return math.erfc(math.sqrt(x / 2))


def _two_proportions(a: int, b: int, n: int) -> float:
    p = (a + b) / (2 * n)
    return math.erfc(abs(a - b) / n / math.sqrt(2 * p * (1 - p) / n) / math.sqrt(2))


def _close(a, b) -> bool:
    return math.isfinite(a) and abs(a - b) <= 1e-6 * max(1.0, abs(b))
