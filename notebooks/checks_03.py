"""Checks of the exercises in 03_pairs: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import dis
from itertools import cycle, islice, product

UNSOLVED = "Not solved yet: fill in the cell above and run it again."
NO_RETURN = "Your function returned None: is a `return` missing?"
PLACEHOLDER = "Your code ran, but the last line still returns `...`: return your result there."


def wrap_around(function) -> str:
    """Exercise 3.1: K pairs of completion numbers."""

    def walk(chosen, rejected, k):
        return (
            [(chosen[i % len(chosen)], rejected[i % len(rejected)]) for i in range(k)]
            if chosen and rejected
            else []
        )

    def restart_both(chosen, rejected, k):
        return list(islice(cycle(zip(chosen, rejected)), k))

    mistakes = {
        "You stop where the shorter list ends, as `zip` does. Start that list again, until there are k pairs.": lambda w, l, k: (
            list(zip(w, l))[:k]
        ),
        "You start *both* lists again when one has ended. Start only that one again; the other continues.": restart_both,
        "You pair each chosen completion with every rejected one before the next. Move through both lists in parallel.": lambda w, l, k: (
            list(islice(cycle(product(w, l)), k))
        ),
        "These are all combinations, cut at k. Move through both lists in parallel.": lambda w, l, k: (
            list(product(w, l))[:k]
        ),
        "Your pairs are (rejected, chosen). The chosen one comes first.": lambda w, l, k: [
            (b, a) for a, b in walk(w, l, k)
        ],
        "These are indices into the two lists. Return the completion numbers, chosen[...] and rejected[...].": lambda w, l, k: (
            walk(range(len(w)), range(len(l)), k)
        ),
        "You stay at the last element of the shorter list. Start it again at its first.": lambda w, l, k: [
            (w[min(i, len(w) - 1)], l[min(i, len(l) - 1)]) for i in range(k)
        ],
        "You stop where the *longer* list ends. Continue until there are k pairs.": lambda w, l, k: (
            walk(w, l, min(k, max(len(w), len(l))))
        ),
    }
    cases = [
        ([0, 2], [1, 3, 4], 5),
        ([7, 8, 9], [5], 4),
        ([3], [6, 1], 5),
        ([2, 4, 5, 6, 9, 11], [0, 1, 3], 4),
    ]
    values = []
    for case in cases:
        value, message = _call(function, *case)
        if message:
            return message
        values.append(value)
    if all(value is ... for value in values):
        return _unsolved(function)
    if all(value is None for value in values):
        return NO_RETURN
    if any(hasattr(value, "__next__") for value in values):
        return "You return an iterator. Return a list: `list(...)`."
    got = []
    for case, value in zip(cases, values):
        try:
            got.append([(int(a), int(b)) for a, b in value])
        except (TypeError, ValueError):
            return f"For {_arguments(case)} you return {value!r}. Return a list of tuples (chosen, rejected)."
    expected = [walk(*case) for case in cases]
    if got == expected:
        for case in (([], [0, 1], 3), ([4], [], 2)):
            value, message = _call(function, *case)
            if message or not _is_empty(value):
                return f"Your pairs are correct. {message or ''} {EMPTY}".replace("  ", " ")
        return "Right: both lists are walked in parallel, and each starts again at its own end."
    for message, wrong in mistakes.items():
        if got == [wrong(*case) for case in cases]:
            return message
    if (
        all(len(g) == len(e) for g, e in zip(got, expected))
        and all((a in w and b in l) for g, (w, l, _) in zip(got, cases) for a, b in g)
        and any(sorted(g) != sorted(e) for g, e in zip(got, expected))
    ):
        hint = " If you draw at random: the paper does not, it walks."
    else:
        hint = ""
    case, mine, right = next((c, g, e) for c, g, e in zip(cases, got, expected) if g != e)
    place = next(
        (i for i, (a, b) in enumerate(zip(mine, right)) if a != b), min(len(mine), len(right))
    )
    return (
        f"For {_arguments(case)} element {place} of your list is {mine[place] if place < len(mine) else 'missing'}; it should be "
        f"{right[place] if place < len(right) else 'none, there are k pairs already'}.{hint}"
    )


EMPTY = "But a list can be empty: then there are no pairs, and you return an empty list."


def n_shared(function) -> str:
    """Exercise 3.3: tokens in common before the first difference."""

    def solution(ours, theirs):
        same = [a == b for a, b in zip(ours, theirs)]
        return same.index(False) if False in same else len(same)

    def suffix(ours, theirs):
        return solution(ours[::-1], theirs[::-1])

    mistakes = {
        "You count equal tokens in all positions. Stop at the first difference: what follows it has another context.": lambda a, b: (
            sum(x == y for x, y in zip(a, b))
        ),
        "You count tokens that occur in both lists, at any position. Compare position by position.": lambda a, b: (
            len(set(a) & set(b))
        ),
        "That is the number of the first token that differs, counted from 1. Return how many tokens come before it.": lambda a, b: (
            solution(a, b) + 1
        ),
        "You compare from the end. Start at the beginning.": suffix,
        "That is a share. Return the number of tokens.": lambda a, b: solution(a, b) / len(a),
    }
    cases = [
        ([5, 6, 7, 8, 2], [5, 6, 9, 8, 2]),
        ([4, 4, 1, 2], [4, 4, 1, 3]),
        ([1, 2, 3], [2, 1, 3]),
        ([8, 3, 3, 8, 1, 2], [8, 3, 3, 9, 1, 2]),
    ]
    ends = [([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 3]), ([7, 7], [7, 7])]
    values = []
    for case in cases + ends:
        value, message = _call(function, *case)
        if message:
            return message
        values.append(value)
    if values[0] is ...:
        return _unsolved(function)
    if all(_same(value, solution(*case)) for value, case in zip(values, cases + ends)):
        return "Right: the tokens before the first difference. DPO compares those after it."
    whole = all(_same(value, solution(*case)) for value, case in zip(values, cases))
    if whole:
        case, value = next(
            (c, v) for c, v in zip(ends, values[len(cases) :]) if not _same(v, solution(*c))
        )
        if value is None:
            return NO_RETURN
        return f"Your function is correct where the lists differ. For {_arguments(case)}, where one ends first, return {solution(*case)}. Yours returns {value!r}."
    if all(value is None for value in values):
        return NO_RETURN
    for message, wrong in mistakes.items():
        if all(_same(value, wrong(*case)) for value, case in zip(values, cases)):
            return message
    case, value = next((c, v) for c, v in zip(cases, values) if not _same(v, solution(*c)))
    return f"For {_arguments(case)} you return {value!r}; the first {solution(*case)} tokens are the same."


def lost(function) -> str:
    """Exercise 3.2: expected numbers of questions that are all incorrect and all correct."""
    chances = [0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0]

    def solution(n):
        return sum((1 - p) ** n for p in chances), sum(p**n for p in chances)

    mean = sum(chances) / len(chances)
    mistakes = {
        "The order is reversed: return first the number that is all incorrect, then the number that is all correct.": lambda n: (
            solution(n)[::-1]
        ),
        "1 - p**n is the chance of at least one incorrect completion. All are incorrect with (1 - p)**n.": lambda n: (
            sum(1 - p**n for p in chances),
            solution(n)[1],
        ),
        "These are the questions with at least one correct and with at least one incorrect completion. The lost ones are the others.": lambda n: (
            tuple(len(chances) - x for x in solution(n))
        ),
        "You took the average chance first. The power of an average is not the average of the powers: sum over the questions.": lambda n: (
            len(chances) * (1 - mean) ** n,
            len(chances) * mean**n,
        ),
        "These are shares. The exercise asks for numbers of questions: take the sum, not the mean.": lambda n: (
            tuple(x / len(chances) for x in solution(n))
        ),
        "You multiply where a power is needed: n completions that are all correct have probability p**n.": lambda n: (
            sum(n * (1 - p) for p in chances),
            sum(n * p for p in chances),
        ),
        "These are the probabilities for a single completion. All n of them must be incorrect (or correct): p**n.": lambda n: (
            sum(1 - p for p in chances),
            sum(chances),
        ),
        "You count only questions that are lost for certain (p = 0 or 1). The others are also lost with some probability.": lambda n: (
            chances.count(0.0),
            chances.count(1.0),
        ),
    }
    values = {}
    for n in (4, 16):
        value, message = _call(function, list(chances), n)
        if message or value is None or value is ...:
            return message or (NO_RETURN if value is None else _unsolved(function))
        if _number(value) is not None:
            if _same(value, sum(solution(n))):
                return "The sum is correct. Return its two parts as a tuple: all incorrect, all correct."
            return f"You return one number, {value!r}. Return two: the expected number that is all incorrect, and the number that is all correct."
        try:
            wrong, right = (float(x) for x in value)
        except (TypeError, ValueError):
            return (
                f"You return {value!r}. Return a tuple of two numbers: all incorrect, all correct."
            )
        values[n] = (wrong, right)

    def matches(candidate):
        return all(_same(a, b) for n in values for a, b in zip(values[n], candidate(n)))

    if matches(solution):
        return (
            f"Right. Of {len(chances)} questions with chances {', '.join(f'{p:g}' for p in chances)} about {sum(values[4]):.1f} are "
            f"lost at N = 4 and {sum(values[16]):.1f} at N = 16. The certain ones (0 and 1) stay lost, and 0.02 and 0.97 mostly."
        )
    for message, wrong in mistakes.items():
        if matches(wrong):
            return message
    n, side = next(
        (n, side)
        for n in values
        for side in (0, 1)
        if not _same(values[n][side], solution(n)[side])
    )
    if n != 4:
        return (
            f"Your numbers are correct for n = 4, but not for n = {n}. Does your function use `n`?"
        )
    return (
        f"For chances {chances} and n = 4 you expect {values[4][side]:.4g} questions that are all {('incorrect', 'correct')[side]}; it "
        f"should be {solution(4)[side]:.4g}. The other number is {'correct' if _same(values[4][1 - side], solution(4)[1 - side]) else 'also incorrect'}."
    )


def _call(function, *arguments):
    """(result, None), or (None, message) where there is nothing to look at."""
    if function is None or function is ...:
        return None, UNSOLVED
    if not callable(function):
        return (
            None,
            f"Give the check your function itself, without calling it; it got a {type(function).__name__}.",
        )
    try:
        return function(*arguments), None
    except NotImplementedError:
        return None, UNSOLVED
    except Exception as error:  # noqa: BLE001   whatever a student's code raises is told
        return (
            None,
            f"Your function raised {type(error).__name__}: {error} for {_arguments(arguments)}.",
        )


def _unsolved(function) -> str:
    """What is said of a function that returns `...`: a stub has no other instructions."""
    if hasattr(function, "__code__") and len(list(dis.get_instructions(function))) > 4:
        return PLACEHOLDER
    return UNSOLVED


def _arguments(arguments) -> str:
    return ", ".join(map(repr, arguments))


def _number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _same(a, b) -> bool:
    a, b = _number(a), _number(b)
    return a is not None and b is not None and abs(a - b) <= 1e-9 * max(1.0, abs(b))


def _is_empty(value) -> bool:
    try:
        return len(value) == 0
    except TypeError:
        return False
