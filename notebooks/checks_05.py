"""Checks of the exercises in 05_iterations: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
from checks_common import call, number

from studies.stopping import patience


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
                "Your function reads a file that does not exist. The run of this check has 3 iterations, as its profile.json says, and "
                "the last model makes no pairs: iteration_3 has none, and there is no iteration_4."
            )
        return message
    if not isinstance(value, dict):
        return f"Your function returned a {type(value).__name__}. Return a dict: number of the model -> pairs."
    by_t = [pairs for _, _, pairs in made]
    right = {t + 1: pairs for t, pairs in enumerate(by_t)}
    mistakes = [
        (
            "You gave the pairs that each model *made*. The folder iteration_t has what was made with M_t; M_{t+1} is trained on it, "
            "and M_0 on nothing.",
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
        return "Right: M_{t+1} is trained on the pairs that M_t made, which are in iteration_t. The last model makes none."
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
            "This is the one-sided value. Before the test you did not know which model is better: double it.",
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
            "You tossed a coin for every question. Only the discordant ones count: those that both models answer correctly, or both "
            "incorrectly, say nothing.",
            min(1.0, 2 * _tail(20, 2)),
        ),
        (
            "You compared both accuracies as if the questions were different (two proportions). Compare them question by question.",
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
            "The last term is missing: the observed split belongs to the sum. `range(k)` ends at k - 1.",
            2 * _tail(11, 1),
        ),
        (
            "The observed split is missing in the sum, and the sum should be doubled. `range(k)` ends at k - 1.",
            _tail(11, 1),
        ),
    ]
    if _close(value, right):
        return _mcnemar_corners(function) or (
            "Right, and exact for few questions. On 20 questions two models can differ by 7 without a significant "
            f"difference: p = {right:.3f} here."
        )
    for text, wrong in mistakes:
        if _close(value, wrong):
            return text
    return (
        f"With 2 questions that only a answers correctly and 9 that only b does, p is {right:.4f}; yours gives {value:.4g}. "
        "11 tosses of a fair coin: how likely is a split of 2 to 9, or a more uneven one, on either side?"
    )


def _mcnemar_corners(function) -> str | None:
    """Cases at the edge that a formula for the middle misses."""
    for sizes, right, text in (
        (
            dict(only_a=9, only_b=2, both=5, neither=4),
            2 * _tail(11, 2),
            "with a and b exchanged. It must not matter which model is better",
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
            "The sign is reversed: this is the mean of log before - log now. For KL(now || before) take log now - log before.",
            -right,
        ),
        (
            "You weighted each completion by its probability. The samples carry the weights already: likely completions are sampled often.",
            (weights * ratios).sum(),
        ),
        (
            "You weighted each completion by its probability. The samples carry the weights already: likely completions are sampled often.",
            (weights * ratios).sum() / weights.sum(),
        ),
        ("That is the sum. A KL divergence is a mean over completions.", ratios.sum()),
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
            "You divided by n - 1. That belongs in the standard deviation, not in the mean.",
            ratios.sum() / (n - 1),
        ),
        (
            "You replaced negative ratios by 0, which makes the estimate too high.",
            np.maximum(ratios, 0).mean(),
        ),
    ):
        if _close(pair[0], wrong) and not _close(wrong, right):
            return f"The estimate: {text[0].lower()}{text[1:]}"
    if not _close(pair[0], right):
        return f"The estimate should be {right:.4f} for the numbers of this check; yours is {pair[0]:.4g}."
    for text, wrong in (
        (
            "this is the standard deviation of single completions. That of their mean is smaller: divide by the root of n.",
            ratios.std(ddof=1),
        ),
        (
            "this is the standard deviation of single completions, with n instead of n - 1. Take ddof=1 and divide by the root of n.",
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
    return f"Right: {right:.2f} ± {error:.2f} nats. With 8 completions that says little; a run draws 256."


def keep(function) -> str:
    """Exercise 5.4: patience 1 on validation accuracy; the number of the model to keep."""
    cases = {
        "accuracy rises and then falls": _rows((0.3, 0.6, 0.5)),
        "accuracy rises in every iteration": _rows((0.3, 0.5, 0.7)),
        "accuracy falls and later exceeds the maximum": _rows((0.3, 0.6, 0.5, 0.8, 0.7)),
        "the first iteration lowers accuracy": _rows((0.5, 0.4, 0.6)),
        "accuracy recovers after two lower iterations": _rows((0.3, 0.7, 0.4, 0.6, 0.8)),
        "accuracy recovers in part after a fall": _rows((0.3, 0.7, 0.4, 0.6)),
        "test accuracy is highest elsewhere": _rows(
            (0.3, 0.5, 0.6, 0.55), test=(0.3, 0.6, 0.5, 0.7)
        ),
        "KL is large while accuracy rises": _rows((0.3, 0.86, 0.88, 0.87), kl=(1.9, 2.6, 0.1)),
        "chosen completions fall while accuracy rises": _rows(
            (0.3, 0.5, 0.7, 0.6), chosen=(-0.02, -0.01, 0.03)
        ),
        "there is only M_0": _rows((0.3,)),
    }
    values = {}
    for name, rows in cases.items():
        values[name], message = number(function, rows)
        if message:
            if message.startswith("Not solved"):
                return message
            return f"Where {name}: {message[0].lower()}{message[1:]}"
    right = {name: patience(rows) for name, rows in cases.items()}
    if values == right:
        return _ties(function) or (
            "Right: the first iteration that does not improve ends the run, and later models are not trained."
        )
    for text, strategy in _KEEP_MISTAKES:
        if values == {name: strategy(rows) for name, rows in cases.items()}:
            return text
    name = next(name for name in cases if values[name] != right[name])
    accuracies = [row["validation"] for row in cases[name]]
    return (
        f"Where {name}, keep M_{right[name]}; yours says {values[name]:g}. "
        f"Validation accuracies of M_0, M_1, ...: {accuracies}."
    )


def _ties(function) -> str | None:
    """On a tie a rule may stop or continue, and keep either of two equal models."""
    for accuracies, allowed in (((0.3, 0.7, 0.7, 0.6), {1, 2}), ((0.3, 0.7, 0.7, 0.8), {1, 2, 3})):
        value, message = number(function, _rows(accuracies))
        if message or value not in allowed:
            got = message or f"yours says {value:g}"
            return f"It works without ties. With the accuracies {list(accuracies)} keep one of {sorted(allowed)}: {got}"
    return None


def _rows(validation, test=None, kl=None, chosen=None) -> list[dict]:
    """The rows that `keep` gets; test accuracy is the validation accuracy if it is not given."""
    rest = len(validation) - 1
    columns = zip(
        validation,
        test or validation,
        (None, *(kl or (0.1,) * rest)),
        (None, *(chosen or (0.02,) * rest)),
        strict=True,
    )
    return [dict(zip(("validation", "test", "kl", "chosen_change"), row)) for row in columns]


def _best(rows, column="validation") -> int:
    return max(range(len(rows)), key=lambda t: rows[t][column])


def _rises(rows) -> list[int]:
    return [t for t in range(1, len(rows)) if rows[t]["validation"] > rows[t - 1]["validation"]]


def _before(rows, is_bad) -> int:
    return next((t - 1 for t in range(1, len(rows)) if is_bad(t)), len(rows) - 1)


_KEEP_MISTAKES = [
    (
        "You return the iteration at which you stop. Keep the best model before it.",
        lambda rows: min(patience(rows) + 1, len(rows) - 1),
    ),
    (
        "You return the best of all iterations. With patience 1 the run stops at the first iteration that does not "
        "improve; the later models do not exist yet.",
        _best,
    ),
    ("You always return the last model.", lambda rows: len(rows) - 1),
    (
        "You select by test accuracy. The test split measures the kept model once; select with `validation`.",
        lambda rows: patience(rows, column="test"),
    ),
    (
        "You select the best test accuracy. The test split measures the kept model once; select with `validation`.",
        lambda rows: _best(rows, "test"),
    ),
    (
        "You wait for two iterations without improvement: that is patience 2.",
        lambda rows: patience(rows, patience=2),
    ),
    (
        "M_0 is a candidate: if the first iteration lowers accuracy, keep M_0.",
        lambda rows: min(max(1, patience(rows)), len(rows) - 1),
    ),
    (
        "You compare with M_0. Compare with the best model so far.",
        lambda rows: _before(rows, lambda t: rows[t]["validation"] <= rows[0]["validation"]),
    ),
    (
        "You return the last iteration that improved on its predecessor. Stop at the first one that does not improve.",
        lambda rows: max(_rises(rows), default=0),
    ),
    (
        "You count the iterations that improve. Stop at the first one that does not.",
        lambda rows: len(_rises(rows)),
    ),
    (
        "You return an accuracy. Return the number of the iteration.",
        lambda rows: rows[patience(rows)]["validation"],
    ),
    (
        "You also stop if KL is large. KL is a sign to look at; this rule uses validation accuracy alone.",
        lambda rows: min(patience(rows), _before(rows, lambda t: rows[t]["kl"] > 1)),
    ),
    (
        "You also stop if chosen completions fall. That is a sign to look at; this rule uses validation accuracy alone.",
        lambda rows: min(patience(rows), _before(rows, lambda t: rows[t]["chosen_change"] < 0)),
    ),
    (
        "You stop by KL. It is a sign to look at; use validation accuracy.",
        lambda rows: _before(rows, lambda t: rows[t]["kl"] > 1),
    ),
    (
        "You stop by the chosen completions. They are a sign to look at; use validation accuracy.",
        lambda rows: _before(rows, lambda t: rows[t]["chosen_change"] < 0),
    ),
]


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
