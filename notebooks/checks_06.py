"""Checks of the exercises in 06_baselines_and_ablations: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from checks_common import NO_RETURN, UNSOLVED, call

from irpo_utils import evaluation, methods
from irpo_utils.ops import statistics

VOTES = {
    "a clear majority": ["7", "9", "7", "7"],
    "a majority that is none of more than half": ["7", "9", "7", "8", "6"],
    "many without an answer": [None, "4", None, None, "4", "5"],
    "a tie": ["8", "5", "5", "8", "3"],
    "a tie that the greater number does not win": ["4", "7", "7", "4", "1"],
    "another tie": ["5", "12", "12", "5"],
    "all different": ["3", "2", "1"],
    "nobody votes": [None, None],
    "one completion": ["6"],
}


def majority_verdict(function) -> str:
    """Exercise 6.1: `function(answers)` -> True for the completions with the most frequent answer."""
    values = {}
    for name, answers in VOTES.items():
        value, message = call(function, list(answers))
        if message:
            return (
                message
                if message.startswith("Not solved") or message == NO_RETURN
                else f"With {name}, {answers}: {message[0].lower()}{message[1:]}"
            )
        values[name] = value
    kinds = {name: _booleans(value, VOTES[name]) for name, value in values.items()}
    if wrong := next((text for text in kinds.values() if isinstance(text, str)), None):
        return wrong
    strategies = [
        ("Completions without an answer win: None does not vote.", lambda x: _win(x, _first_of(x))),
        (
            "Completions without an answer win where nobody votes. There is no majority then: all False.",
            lambda x: _win(x, _first_of(_voters(x))) if _voters(x) else [True] * len(x),
        ),
        (
            "Where answers tie you let all of them win. Only the one that came first does.",
            lambda x: [y is not None and x.count(y) == max(map(x.count, _voters(x))) for y in x],
        ),
        (
            "Where answers tie the one that came *first* wins; yours is the last.",
            lambda x: _win(x, _first_of(_voters(x)[::-1])) if _voters(x) else [False] * len(x),
        ),
        (
            "Where answers tie the one that came *first* wins; yours is the greatest.",
            lambda x: (
                _win(x, max(_voters(x), key=lambda y: (x.count(y), y)))
                if _voters(x)
                else [False] * len(x)
            ),
        ),
        (
            "Where answers tie the one that came *first* wins; yours is the smallest.",
            lambda x: (
                _win(x, min(_voters(x), key=lambda y: (-x.count(y), y)))
                if _voters(x)
                else [False] * len(x)
            ),
        ),
        (
            "Where answers tie nobody wins with yours. The one that came first does.",
            lambda x: [
                y is not None
                and sum(x.count(z) == x.count(y) for z in set(_voters(x))) == 1
                and x.count(y) == max(map(x.count, _voters(x)))
                for y in x
            ],
        ),
        (
            "You ask for more than half of all completions. The most frequent answer is enough.",
            lambda x: [y is not None and x.count(y) > len(x) / 2 for y in x],
        ),
        (
            "You ask for more than half of the votes. The most frequent answer is enough.",
            lambda x: [y is not None and x.count(y) > len(_voters(x)) / 2 for y in x],
        ),
        (
            "Only the first completion with the winning answer wins with yours. All that give it do.",
            lambda x: [
                _voters(x) != [] and i == x.index(_first_of(_voters(x))) for i in range(len(x))
            ],
        ),
        (
            "It is turned round: you gave True to those that do not agree with the majority.",
            lambda x: [not y for y in _majority(x)],
        ),
    ]
    right = {name: _majority(answers) for name, answers in VOTES.items()}
    if kinds == right:
        return "Right. The function never saw a gold answer, and that is the point, and the danger."
    for text, strategy in strategies:
        if kinds == {name: strategy(answers) for name, answers in VOTES.items()}:
            return text
    name = next(name for name in VOTES if kinds[name] != right[name])
    return f"With {name}, {VOTES[name]}, it should be {right[name]}; yours gives {kinds[name]}."


def paired(function) -> str:
    """Exercise 6.2: (difference, low, high, word) of two matrices of seeds and questions."""
    cases, values = _matrices(), {}
    for name, (a, b) in cases.items():
        value, message = call(function, a.tolist(), b.tolist())
        if message:
            return (
                message
                if message.startswith("Not solved") or message == NO_RETURN
                else f"With {name}: {message[0].lower()}{message[1:]}"
            )
        values[name], message = _four(value)
        if message:
            return message
    if all(_near(values[name][:3], _paired(a, b)) for name, (a, b) in cases.items()):
        return _words(cases, values)
    for text, strategy in WRONG_INTERVALS:
        if all(_near(values[name][:3], strategy(a, b)) for name, (a, b) in cases.items()):
            return text
    name = next(
        name for name, (a, b) in cases.items() if not _near(values[name][:3], _paired(a, b))
    )
    difference, low, high = _paired(*cases[name])
    return (
        f"With {name} it should be about {difference:+.3f} ({low:+.3f} to {high:+.3f}); yours gives "
        "{:+.3f} ({:+.3f} to {:+.3f}).".format(*values[name][:3])
    )


def _words(cases, values) -> str:
    rules = [
        (
            'You judge by the difference alone. An interval that holds zero says "within noise", whatever lies in its middle.',
            lambda d, low, high: "better" if d > 0 else "worse" if d < 0 else "within noise",
        ),
        (
            '"better" and "worse" are exchanged: the difference is what b gains over a.',
            lambda d, low, high: "worse" if low > 0 else "better" if high < 0 else "within noise",
        ),
        (
            'An interval that lies wholly below zero says "worse".',
            lambda d, low, high: "better" if low > 0 else "within noise",
        ),
        (
            'An interval that lies wholly below zero does not hold zero: that is "worse", and not noise.',
            lambda d, low, high: "better" if low > 0 else "within noise" if high < 0 else "worse",
        ),
        (
            "An interval that touches zero holds it: where both ends are 0, nothing can be told.",
            lambda d, low, high: "better" if low >= 0 else "worse" if high < 0 else "within noise",
        ),
        (
            "An interval that touches zero holds it: where both ends are 0, nothing can be told.",
            lambda d, low, high: "worse" if high <= 0 else "better" if low > 0 else "within noise",
        ),
    ]
    said = {name: values[name][3] for name in cases}
    right = {name: _word(*values[name][:3]) for name in cases}
    if said == right:
        return 'Right. And "within noise" does not mean equal: it means that these seeds and questions cannot tell.'
    for text, rule in rules:
        if said == {name: rule(*values[name][:3]) for name in cases}:
            return f"The numbers are right. The word: {text}"
    name = next(name for name in cases if said[name] != right[name])
    return (
        f"The numbers are right. With {name} the interval is {values[name][1]:+.3f} to {values[name][2]:+.3f}: the word is "
        f'"{right[name]}", yours says {said[name]!r}.'
    )


def clear_majority_method(entry) -> str:
    """Exercise 6.3: an entry whose reward is 1 for an answer that more than half of all completions give."""
    if entry is None or entry is ...:
        return UNSOLVED
    if not isinstance(entry, methods.Method):
        if callable(entry):
            return "That is the reward. Put it into an entry: methods.Method(title, source, reward=...)."
        return f"CLEAR should be a methods.Method; it is a {type(entry).__name__}."
    if entry.reward is None:
        return "The entry has no reward function, so it takes the gold answer. Give it yours: reward=..."
    if not callable(entry.reward):
        return f"The reward of your entry is a {type(entry.reward).__name__}. Give it the function itself, without calling it."
    values = {}
    for name, answers in CLEAR_VOTES.items():
        for gold in ("5", "7", "none"):
            value, message = call(entry.reward, _rows(answers, gold))
            if message:
                return (
                    message
                    if message.startswith("Not solved") or message == NO_RETURN
                    else f"With {name}, {answers}: {message[0].lower()}{message[1:]}"
                ).replace("Your function", "Your reward")
            if isinstance(kind := _booleans(value, answers, "1.0 and 0.0"), str):
                return kind
            if values.setdefault(name, kind) != kind:
                return "Your reward changes with the gold answer. It must not look at `correct` or `reward`: a vote is all it has."
    right = {name: _clear(answers) for name, answers in CLEAR_VOTES.items()}
    for text, strategy in (
        (
            "That is the plain majority. Here the most frequent answer must have more than half of all completions.",
            _majority,
        ),
        (
            "You count half of those that have an answer. Half of *all* completions is meant: silence counts against a majority.",
            lambda x: [y is not None and x.count(y) > len(_voters(x)) / 2 for y in x],
        ),
        (
            "Exactly half wins with yours. *More* than half is meant: with half there may be two such answers.",
            lambda x: [y is not None and x.count(y) >= len(x) / 2 for y in x],
        ),
        (
            "Completions without an answer win where there are many of them. None does not vote.",
            lambda x: [x.count(y) > len(x) / 2 for y in x],
        ),
        (
            "Only the first completion with the winning answer wins with yours. All that give it do.",
            lambda x: [win and i == _clear(x).index(True) for i, win in enumerate(_clear(x))],
        ),
        (
            "Where no answer has more than half you let all completions win. Nobody wins then, and the question gives no pairs.",
            lambda x: _clear(x) if any(_clear(x)) else [True] * len(x),
        ),
    ):
        if values == {name: strategy(answers) for name, answers in CLEAR_VOTES.items()} != right:
            return text
    if values != right:
        name = next(name for name in CLEAR_VOTES if values[name] != right[name])
        numbers = [[float(reward) for reward in kind[name]] for kind in (right, values)]
        return f"With {name}, {CLEAR_VOTES[name]}, it should be {numbers[0]}; yours gives {numbers[1]}."
    return (
        _entry(entry)
        or "Right. Sometimes the best reward is none: a question left out teaches nothing wrong."
    )


def _entry(entry) -> str | None:
    """What is wrong with an entry whose reward is right."""
    if not all(isinstance(text, str) and text.strip() for text in (entry.title, entry.source)):
        return "The reward is right. The entry needs a title and a source, in words."
    plain = methods.Method(entry.title, entry.source, reward=entry.reward)
    if entry != plain:
        differing = [
            name
            for name in ("settings", "samples", "start", "pairs_factor", "examples", "train")
            if getattr(entry, name) != getattr(plain, name)
        ]
        return (
            f"The reward is right. But the entry changes {' and '.join(differing)} as well; it is to be trained like Iterative RPO, so leave "
            "that out."
        )
    return None


CLEAR_VOTES = {
    "a clear majority": ["7", "5", "7", "7"],
    "exactly half": ["7", "5", "7", "6"],
    "two halves": ["7", "5", "7", "5"],
    "half of all, but more than half of those with an answer": [None, "5", "5", None, "7", "5"],
    "most without an answer": [None, None, None, "7"],
    "an odd number": ["5", "5", "7"],
    "no agreement": ["1", "2", "3", "4"],
    "nobody votes": [None, None],
}


def _rows(answers, gold) -> list[dict]:
    return [
        {
            "id": "q",
            "extracted": answer,
            "correct": answer == gold,
            "reward": float(answer == gold),
            "logprob": -float(i + 1),
            "n_tokens": 5 + i,
        }
        for i, answer in enumerate(answers)
    ]


def _voters(answers) -> list[str]:
    return [answer for answer in answers if answer is not None]


def _first_of(answers):
    return Counter(answers).most_common(1)[0][0] if answers else None


def _win(answers, most) -> list[bool]:
    return [answer == most for answer in answers]


def _majority(answers) -> list[bool]:
    return (
        _win(answers, _first_of(_voters(answers))) if _voters(answers) else [False] * len(answers)
    )


def _clear(answers) -> list[bool]:
    return [answer is not None and answers.count(answer) > len(answers) / 2 for answer in answers]


def _booleans(value, answers, kinds: str = "True and False"):
    """The value as a list of True and False, or what is wrong with it; `kinds` are its values in words."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return f"Return a list of {kinds}, one for each completion; yours returned a {type(value).__name__}."
    value = list(value)
    if len(value) != len(answers):
        return f"For {len(answers)} completions a list of {len(answers)} is needed; yours has {len(value)}."
    if any(
        not isinstance(x, (bool, np.bool_)) and not (isinstance(x, (int, float)) and x in (0, 1))
        for x in value
    ):
        return f"The list should hold {kinds}; yours holds {value[0]!r}."
    return [bool(x) for x in value]


def _matrices() -> dict:
    """Cases in which what is typically done wrong gives another interval."""
    rng = np.random.default_rng(5)
    hard = rng.random(60) < 0.5  # for both: the questions differ much more than the methods
    steady = np.tile(np.where(hard, 0.1, 0.7), (5, 1))
    kinds = rng.normal(0, 0.15, 60)  # questions on which b gains more than on others
    kinds -= kinds.mean()
    noise = lambda size: rng.normal(0, 0.05, (size, 60)) + kinds  # noqa: E731
    uneven = np.array([[0.20], [0.10], [-0.04], [0.09]])  # seeds that differ much
    flat = np.round(steady + rng.normal(0, 0.02, (5, 60)), 3)
    return {
        "a gain that is small against the spread of the questions": (
            flat,
            np.round(flat + 0.07 + noise(5), 3),
        ),
        "a gain that changes from seed to seed": (
            steady[:4],
            np.round(steady[:4] + uneven + noise(4), 3),
        ),
        "a loss": (flat, np.round(flat - 0.09 + noise(5), 3)),
        "equal matrices": (flat, flat.copy()),
    }


def _paired(a, b):
    return statistics.seed_and_question_interval(np.array(b) - np.array(a))


def _separate(a, b):
    (x, x_low, x_high), (y, y_low, y_high) = (
        statistics.seed_and_question_interval(m) for m in (a, b)
    )
    return y - x, y_low - x_high, y_high - x_low


def _in_quadrature(a, b):
    (x, x_low, x_high), (y, y_low, y_high) = (
        statistics.seed_and_question_interval(m) for m in (a, b)
    )
    return (
        y - x,
        y - x - math.hypot(x_high - x, y - y_low),
        y - x + math.hypot(x - x_low, y_high - y),
    )


def _ends(a, b):
    return tuple(
        y - x
        for x, y in zip(
            statistics.seed_and_question_interval(a), statistics.seed_and_question_interval(b)
        )
    )


def _seeds_only(a, b):
    means = (b - a).mean(1)
    half = statistics.t_quantile(len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return means.mean(), means.mean() - half, means.mean() + half


def _unstretched(a, b):
    rng, matrix = np.random.default_rng(0), b - a
    seeds, questions = matrix.shape
    means = [
        matrix[rng.integers(seeds, size=seeds)]
        .mean(0)[rng.integers(questions, size=questions)]
        .mean()
        for _ in range(2000)
    ]
    return matrix.mean(), *np.percentile(means, (2.5, 97.5))


WRONG_INTERVALS = [
    (
        "The sign is turned round: the difference is what b gains over a, so b - a.",
        lambda a, b: _paired(b, a),
    ),
    (
        "You took an interval of a and one of b and compared their ends. That throws the pairing away: subtract the matrices, and take the "
        "interval of that.",
        _separate,
    ),
    (
        "You added the two intervals in quadrature, as if a and b had answered different questions. Subtract the matrices first.",
        _in_quadrature,
    ),
    (
        "You subtracted the ends of two intervals. Take one interval, that of the matrix of differences.",
        _ends,
    ),
    (
        "This interval is over questions only: you averaged the seeds first. A new run would have other seeds, too.",
        lambda a, b: evaluation.bootstrap_mean((b - a).mean(0)),
    ),
    (
        "You put all seeds and questions into one list. The numbers of one seed are not independent of each other: keep the matrix.",
        lambda a, b: evaluation.bootstrap_mean((b - a).ravel()),
    ),
    (
        "This interval is over seeds only: you averaged the questions first. Other questions would give something else, too.",
        _seeds_only,
    ),
    (
        "Nearly: this is the interval without the stretch that few seeds need. `seed_and_question_interval` does it, if each row of the matrix "
        "is a seed and each column a question.",
        _unstretched,
    ),
    (
        "These are percentage points. Leave the differences as they are, in fractions of 1.",
        lambda a, b: tuple(100 * x for x in _paired(a, b)),
    ),
    (
        "That is the interval of b, not of what b gains over a.",
        lambda a, b: statistics.seed_and_question_interval(b),
    ),
    (
        "That is the interval of a, not of what b gains over a.",
        lambda a, b: statistics.seed_and_question_interval(a),
    ),
]


def _word(difference, low, high) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "within noise"


def _four(value):
    """((difference, low, high, word), None) or (None, message)."""
    wanted = "Return four things: the difference, the low and the high end of its interval, and the word."
    try:
        *numbers, word = value
        numbers = [float(x) for x in numbers]
    except (TypeError, ValueError):
        return None, wanted
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        return None, wanted
    if word not in ("better", "worse", "within noise"):
        return None, f'The word should be "better", "worse" or "within noise"; yours is {word!r}.'
    return (*numbers, word), None


def _near(value, right) -> bool:
    """Whether two intervals agree but for the luck of resampling."""
    width = max(abs(right[2] - right[1]), 1e-9)
    return abs(value[0] - right[0]) < 1e-6 * max(1, abs(right[0])) and all(
        abs(x - y) < 0.08 * width for x, y in zip(value[1:], right[1:])
    )
