"""Checks of the exercises in notebooks 06 and 06b: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from checks_common import NO_RETURN, UNSOLVED, call

from irpo_utils import evaluation, methods
from studies import lesson_statistics as lesson
from studies import significance

SEARCHES = {
    "the best rate in the middle": {2e-5: 0.776, 1e-4: 0.894, 3e-4: 0.8},
    "the best rate at the upper edge": {2e-5: 0.75, 1e-4: 0.896, 3e-4: 0.912},
    "the best rate at the lower edge": {2e-5: 0.162, 1e-4: 0.018, 3e-4: 0.02},
    "rates that are not sorted": {3e-4: 0.7, 2e-5: 0.6, 1e-4: 0.9},
    "the largest rate broken down": {2e-5: 0.6, 1e-4: 0.8, 3e-4: None},
    "a tie": {2e-5: 0.5, 1e-4: 0.8, 3e-4: 0.8, 1e-3: 0.1},
    "a single rate": {1e-4: 0.8},
}


def choose_learning_rate(function) -> str:
    """Exercise 6.1: `function(accuracy)` -> (best learning rate, whether it is at the edge)."""
    values = {}
    for name, search in SEARCHES.items():
        value, message = call(function, dict(search))
        if message:
            return _within(message, f"With {name}, {search}")
        try:
            rate, edge = value
            values[name] = (float(rate), bool(edge))
        except (TypeError, ValueError):
            return "Return two things: the learning rate, and True or False."
    right = {name: _chosen(search) for name, search in SEARCHES.items()}
    if values == right:
        return "Right. A best value at the edge says that the search was too narrow."
    strategies = [
        (
            "You return the accuracy. The learning rate is the key of the dict.",
            lambda x: (x[_chosen(x)[0]], _chosen(x)[1]),
        ),
        (
            "If two accuracies are equal take the smaller learning rate; yours is the larger.",
            lambda x: _chosen(x, larger=True),
        ),
        (
            "The edge is that of all learning rates that were tried. You left out the one that broke "
            "down; it shows that the search went far enough.",
            lambda x: (_chosen(x)[0], _chosen(x)[0] in _ends_of(_finished(x))),
        ),
        (
            "The smallest learning rate is an edge as well; yours names the largest only.",
            lambda x: (_chosen(x)[0], _chosen(x)[0] == max(x)),
        ),
        (
            "The largest learning rate is an edge as well; yours names the smallest only.",
            lambda x: (_chosen(x)[0], _chosen(x)[0] == min(x)),
        ),
        (
            "The second value is reversed: True means that the choice is at the edge.",
            lambda x: (_chosen(x)[0], not _chosen(x)[1]),
        ),
        (
            "The edge is the smallest or largest learning rate, not the first or last of the dict.",
            lambda x: (_chosen(x)[0], _chosen(x)[0] in (list(x)[0], list(x)[-1])),
        ),
    ]
    for text, strategy in strategies:
        if values == {name: strategy(search) for name, search in SEARCHES.items()}:
            return text
    name = next(name for name in SEARCHES if values[name] != right[name])
    return f"With {name}, {SEARCHES[name]}, it should be {right[name]}; yours gives {values[name]}."


def _within(message: str, place: str) -> str:
    """What `call` said, with the case in front of it where that helps."""
    if message.startswith("Not solved") or message == NO_RETURN:
        return message
    return f"{place}: {message[0].lower()}{message[1:]}"


def _finished(search: dict) -> list[float]:
    return [rate for rate, value in search.items() if value is not None]


def _ends_of(rates) -> tuple[float, float]:
    return min(rates), max(rates)


def _chosen(search: dict, larger: bool = False) -> tuple[float, bool]:
    sign = 1 if larger else -1
    best = max(_finished(search), key=lambda rate: (search[rate], sign * rate))
    return best, best in _ends_of(search)


INTERVALS = {  # (low, high, the paper's difference)
    "a gain of the paper's sign": (1.1, 6.4, 3.2),
    "a gain that is smaller than the paper's": (2.0, 5.0, 11.3),
    "a loss": (-7.5, -2.1, 9.6),
    "an interval with 0 that ends below the paper's difference": (-1.0, 1.2, 11.3),
    "an interval with 0 that reaches the paper's difference": (-1.5, 3.4, 3.1),
    "an interval that ends at the paper's difference": (-1.0, 4.0, 4.0),
    "an interval that begins at 0": (0.0, 3.0, 8.0),
    "an interval that ends at 0": (-3.0, 0.0, 8.0),
    "a claimed loss that is there": (-5.0, -2.0, -8.0),
    "a claimed loss and a gain": (2.0, 5.0, -8.0),
    "a claimed loss that is ruled out": (-4.0, 1.0, -8.0),
    "a claimed loss that is not resolved": (-9.0, 1.0, -8.0),
}


def verdict(function) -> str:
    """Exercise 6.3: `function(low, high, paper)` -> one of the four verdicts."""
    said = {}
    for name, numbers in INTERVALS.items():
        value, message = call(function, *numbers)
        if message:
            return _within(message, f"With {name}, {numbers}")
        if value not in lesson.VERDICTS:
            return f"The verdict should be one of {', '.join(map(repr, lesson.VERDICTS))}; yours is {value!r}."
        said[name] = value
    right = {name: lesson.verdict(*numbers) for name, numbers in INTERVALS.items()}
    if said == right:
        return "Right. A small interval around 0 says more than a large one."
    agrees, disagrees, ruled_out, open_ = lesson.VERDICTS
    strategies = [
        (
            "You compare with the paper's difference first. An interval that excludes 0 agrees or "
            "disagrees, however large the paper's difference is.",
            lambda low, high, paper: ruled_out if high < paper else agrees if low > 0 else open_,
        ),
        (
            "An interval that includes 0 and ends below the paper's difference says more than "
            '"not resolved".',
            lambda low, high, paper: agrees if low > 0 else disagrees if high < 0 else open_,
        ),
        (
            "An interval that touches 0 includes it.",
            lambda low, high, paper: (
                agrees
                if low >= 0
                else disagrees
                if high <= 0
                else ruled_out
                if high < paper
                else open_
            ),
        ),
        (
            "An interval that ends at the paper's difference reaches it: not resolved.",
            lambda low, high, paper: (
                agrees
                if low > 0
                else disagrees
                if high < 0
                else ruled_out
                if high <= paper
                else open_
            ),
        ),
    ]
    gains = {name: numbers for name, numbers in INTERVALS.items() if numbers[2] > 0}
    if all(said[name] == right[name] for name in gains):
        return "If the paper's difference is negative, its side is the negative one: turn the interval round."
    for text, rule in strategies:
        if all(said[name] == rule(*numbers) for name, numbers in gains.items()):
            return text
    name = next(name for name in INTERVALS if said[name] != right[name])
    return (
        f"With {name}, {INTERVALS[name]}, it should be {right[name]!r}; yours says {said[name]!r}."
    )


VOTES = {
    "a clear majority": ["7", "9", "7", "7"],
    "a majority that is none of more than half": ["7", "9", "7", "8", "6"],
    "many without an answer": [None, "4", None, None, "4", "5"],
    "a tie": ["8", "5", "5", "8", "3"],
    "a tie that the greater number does not win": ["4", "7", "7", "4", "1"],
    "another tie": ["5", "12", "12", "5"],
    "all different": ["3", "2", "1"],
    "no answer at all": [None, None],
    "one completion": ["6"],
}


def majority_vote(function) -> str:
    """Exercise 6b.1: `function(answers)` -> True for the completions with the most frequent answer."""
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
            "Completions without an answer win if no completion has an answer. There is no majority then: all False.",
            lambda x: _win(x, _first_of(_voters(x))) if _voters(x) else [True] * len(x),
        ),
        (
            "If answers tie you let all of them win. Only the one that came first does.",
            lambda x: [y is not None and x.count(y) == max(map(x.count, _voters(x))) for y in x],
        ),
        (
            "If answers tie the one that came *first* wins; yours is the last.",
            lambda x: _win(x, _first_of(_voters(x)[::-1])) if _voters(x) else [False] * len(x),
        ),
        (
            "If answers tie the one that came *first* wins; yours is the greatest.",
            lambda x: (
                _win(x, max(_voters(x), key=lambda y: (x.count(y), y)))
                if _voters(x)
                else [False] * len(x)
            ),
        ),
        (
            "If answers tie the one that came *first* wins; yours is the smallest.",
            lambda x: (
                _win(x, min(_voters(x), key=lambda y: (-x.count(y), y)))
                if _voters(x)
                else [False] * len(x)
            ),
        ),
        (
            "If answers tie no answer wins in yours. The one that came first does.",
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
            "It is reversed: you gave True to those that do not agree with the majority.",
            lambda x: [not y for y in _majority(x)],
        ),
    ]
    right = {name: _majority(answers) for name, answers in VOTES.items()}
    if kinds == right:
        return "Right. The function never saw a gold answer. That is its use and its danger."
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
            'You judge by the difference alone. An interval that includes zero says "not resolved", whatever its middle is.',
            lambda d, low, high: "better" if d > 0 else "worse" if d < 0 else "not resolved",
        ),
        (
            '"better" and "worse" are exchanged: the difference is what b gains over a.',
            lambda d, low, high: "worse" if low > 0 else "better" if high < 0 else "not resolved",
        ),
        (
            'An interval that lies wholly below zero says "worse".',
            lambda d, low, high: "better" if low > 0 else "not resolved",
        ),
        (
            'An interval that lies wholly below zero does not include zero: that is "worse", and it is resolved.',
            lambda d, low, high: "better" if low > 0 else "not resolved" if high < 0 else "worse",
        ),
        (
            "An interval that touches zero includes it: if both ends are 0, nothing is resolved.",
            lambda d, low, high: "better" if low >= 0 else "worse" if high < 0 else "not resolved",
        ),
        (
            "An interval that touches zero includes it: if both ends are 0, nothing is resolved.",
            lambda d, low, high: "worse" if high <= 0 else "better" if low > 0 else "not resolved",
        ),
    ]
    said = {name: values[name][3] for name in cases}
    right = {name: _word(*values[name][:3]) for name in cases}
    if said == right:
        return 'Right. And "not resolved" does not mean equal: these seeds and questions cannot decide.'
    for text, rule in rules:
        if said == {name: rule(*values[name][:3]) for name in cases}:
            return f"The numbers are right. The word: {text}"
    name = next(name for name in cases if said[name] != right[name])
    return (
        f"The numbers are right. With {name} the interval is {values[name][1]:+.3f} to {values[name][2]:+.3f}: the word is "
        f'"{right[name]}", yours says {said[name]!r}.'
    )


def clear_majority_method(entry) -> str:
    """Exercise 6b.2: an entry whose reward is 1 for an answer that more than half of all completions give."""
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
            "If no answer has more than half you let all completions win. None wins then, and the question gives no pairs.",
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
            for name in ("settings", "samples", "start", "pairs_factor", "task", "train")
            if getattr(entry, name) != getattr(plain, name)
        ]
        return (
            f"The reward is right. But the entry changes {' and '.join(differing)}. It must be trained like Iterative RPO: leave "
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
    "no answer at all": [None, None],
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
    return significance.seed_and_question_interval(np.array(b) - np.array(a))


def _separate(a, b):
    (x, x_low, x_high), (y, y_low, y_high) = (
        significance.seed_and_question_interval(m) for m in (a, b)
    )
    return y - x, y_low - x_high, y_high - x_low


def _in_quadrature(a, b):
    (x, x_low, x_high), (y, y_low, y_high) = (
        significance.seed_and_question_interval(m) for m in (a, b)
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
            significance.seed_and_question_interval(a), significance.seed_and_question_interval(b)
        )
    )


def _seeds_only(a, b):
    means = (b - a).mean(1)
    half = significance.t_quantile(len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
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
        "The sign is reversed: the difference is what b gains over a, so b - a.",
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
        "This interval is over questions only: you averaged the seeds first. A new run would also have other seeds.",
        lambda a, b: evaluation.bootstrap_mean((b - a).mean(0)),
    ),
    (
        "You put all seeds and questions into one list. The numbers of one seed are not independent of each other: keep the matrix.",
        lambda a, b: evaluation.bootstrap_mean((b - a).ravel()),
    ),
    (
        "This interval is over seeds only: you averaged the questions first. Other questions would also give another value.",
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
        lambda a, b: significance.seed_and_question_interval(b),
    ),
    (
        "That is the interval of a, not of what b gains over a.",
        lambda a, b: significance.seed_and_question_interval(a),
    ),
]


def _word(difference, low, high) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "not resolved"


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
    if word not in ("better", "worse", "not resolved"):
        return None, f'The word should be "better", "worse" or "not resolved"; yours is {word!r}.'
    return (*numbers, word), None


def _near(value, right) -> bool:
    """Whether two intervals agree but for the luck of resampling."""
    width = max(abs(right[2] - right[1]), 1e-9)
    return abs(value[0] - right[0]) < 1e-6 * max(1, abs(right[0])) and all(
        abs(x - y) < 0.08 * width for x, y in zip(value[1:], right[1:])
    )
