"""Checks of the exercises in 03_pairs: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

from itertools import cycle, islice, product
from math import ceil, gcd, lcm

UNSOLVED = "Not solved yet: fill in the cell above and run it again."


def wrap_around(function) -> str:
    """Exercise 3.1: K pairs of sample numbers."""

    def walk(winners, losers, k):
        return (
            [(winners[i % len(winners)], losers[i % len(losers)]) for i in range(k)]
            if winners and losers
            else []
        )

    def restart_both(winners, losers, k):
        return list(islice(cycle(zip(winners, losers)), k))

    mistakes = {
        "You stop where the shorter set ends, as `zip` does. Begin that set again, until there are k pairs.": lambda w, l, k: (
            list(zip(w, l))[:k]
        ),
        "You begin *both* sets again when one has ended. Only that one begins again; the other walks on.": restart_both,
        "You pair each winner with every loser before you go on to the next. Both sets have to move at the same time.": lambda w, l, k: (
            list(islice(cycle(product(w, l)), k))
        ),
        "These are all combinations, cut at k. Both sets have to move at the same time.": lambda w, l, k: (
            list(product(w, l))[:k]
        ),
        "Your pairs are (loser, winner). The winner comes first.": lambda w, l, k: [
            (b, a) for a, b in walk(w, l, k)
        ],
        "These are indices into the two lists. Return the sample numbers, winners[...] and losers[...].": lambda w, l, k: (
            walk(range(len(w)), range(len(l)), k)
        ),
        "You stay at the last element of the shorter set. It has to begin again at its first.": lambda w, l, k: [
            (w[min(i, len(w) - 1)], l[min(i, len(l) - 1)]) for i in range(k)
        ],
        "You stop where the *longer* set ends. Walk on until there are k pairs.": lambda w, l, k: (
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
    for case in [*cases, ([], [0, 1], 3), ([4], [], 2)]:
        value, message = _call(function, *case)
        if message:
            return f"{message} {EMPTY}" if not case[0] or not case[1] else message
        values.append(value)
    if all(value is None or value is ... for value in values):
        return UNSOLVED
    got = []
    for case, value in zip(cases, values):
        try:
            got.append([(int(a), int(b)) for a, b in value])
        except (TypeError, ValueError):
            return f"For {_arguments(case)} you return {value!r}. Return a list of tuples (winner, loser)."
    expected = [walk(*case) for case in cases]
    if got == expected:
        empty = [
            case
            for case, value in zip([([], [0, 1], 3), ([4], [], 2)], values[len(cases) :])
            if not _is_empty(value)
        ]
        return (
            f"The walk is right. {EMPTY}"
            if empty
            else "Right: both sets are walked at the same time, each begins again at its own end."
        )
    for message, wrong in mistakes.items():
        if got == [wrong(*case) for case in cases]:
            return message
    if (
        all(len(g) == len(e) for g, e in zip(got, expected))
        and all((a in w and b in l) for g, (w, l, _) in zip(got, cases) for a, b in g)
        and any(sorted(g) != sorted(e) for g, e in zip(got, expected))
    ):
        hint = " If you drew by lot: the paper does not; it walks."
    else:
        hint = ""
    case, mine, right = next((c, g, e) for c, g, e in zip(cases, got, expected) if g != e)
    place = next(
        (i for i, (a, b) in enumerate(zip(mine, right)) if a != b), min(len(mine), len(right))
    )
    return (
        f"For {_arguments(case)} pair {place} is {mine[place] if place < len(mine) else 'missing'}; it should be "
        f"{right[place] if place < len(right) else 'none, there are k pairs already'}.{hint}"
    )


EMPTY = "But a set can be empty: then there are no pairs, and the list is empty."


def distinct_pairs(function) -> str:
    """Exercise 3.2: min(k, least common multiple)."""
    mistakes = {
        "That is the number of all combinations. The walk never reaches those that it skips once both sets have ended together.": lambda w, l, k: (
            w * l
        ),
        "You take all combinations, limited to k. The walk repeats itself after the least common multiple, which can be smaller.": lambda w, l, k: (
            min(k, w * l)
        ),
        "The least common multiple is right for a long walk; a short one ends after k pairs.": lambda w, l, k: (
            lcm(w, l)
        ),
        "That is how many pairs there are. Some of them can be the same.": lambda w, l, k: k,
        "That is the larger set. After it has ended once, the other set stands elsewhere, so that the next pairs are new.": lambda w, l, k: (
            min(k, max(w, l))
        ),
        "That is the smaller set. The walk does not end with it: it begins again and meets new partners.": lambda w, l, k: (
            min(k, min(w, l))
        ),
        "That is the greatest common divisor; the walk repeats itself after the least common *multiple*.": lambda w, l, k: (
            min(k, gcd(w, l))
        ),
        "You take the sum of the two sets. Both sets end together after their least common multiple.": lambda w, l, k: (
            min(k, w + l)
        ),
    }
    settings = [(4, 6, 48), (4, 6, 10), (3, 5, 40), (1, 2, 4), (15, 15, 20), (7, 14, 15), (2, 3, 4)]
    values = []
    for setting in settings + [(0, 5, 4), (3, 0, 4)]:
        value, message = _call(function, *setting)
        if message:
            return f"{message} {EMPTY}" if 0 in setting else message
        values.append(value)
    if all(value is None or value is ... for value in values):
        return UNSOLVED
    values, empty = values[: len(settings)], values[len(settings) :]
    if all(_same(value, min(k, lcm(w, l))) for value, (w, l, k) in zip(values, settings)):
        if all(_same(value, 0) for value in empty):
            return "Right: the smaller of k and the least common multiple, and 0 if a set is empty."
        return f"Right for sets with something in them. {EMPTY} The number is then 0."
    for message, wrong in mistakes.items():
        if all(_same(value, wrong(*setting)) for value, setting in zip(values, settings)):
            return message
    (w, l, k), value = next(
        (s, v) for s, v in zip(settings, values) if not _same(v, min(s[2], lcm(s[0], s[1])))
    )
    return (
        f"{w} winners, {l} losers, k = {k}: you say {value!r}, the walk gives {min(k, lcm(w, l))}. Count with "
        f"len(set(pairs.walk({w}, {l}, {k})))."
    )


def gold_pairs(function) -> str:
    """Exercise 3.3: how often the gold chain is the winner."""
    solution = lambda w, k: ceil(k / (w + 1))  # noqa: E731
    mistakes = {
        "Rounded down. The gold chain is number 0, so that the walk *begins* with it, and a round that was begun counts: round up.": lambda w, k: (
            k // (w + 1)
        ),
        "You divide by the sampled winners. With the gold chain there is one more.": lambda w, k: (
            ceil(k / w) if w else None
        ),
        "That is not a whole number. The walk uses the gold chain in pair 0, n_winners + 1, ...: count these.": lambda w, k: (
            k / (w + 1)
        ),
        "You count the gold chain once. The winners begin again, and so does it.": lambda w, k: 1,
        "Rounded to the nearest. A round that was begun has used the gold chain: round up.": lambda w, k: (
            round(k / (w + 1))
        ),
        "One too many: if the last round ends with the last pair, no new one is begun.": lambda w, k: (
            k // (w + 1) + 1
        ),
        "That is how many pairs the *sampled* winners have. The gold chain has the rest.": lambda w, k: (
            k - ceil(k / (w + 1))
        ),
        "That is the share of the gold chain among the winners; the exercise asks for a number of pairs.": lambda w, k: (
            1 / (w + 1)
        ),
    }
    settings = [(3, 10), (1, 4), (7, 4), (2, 15), (4, 8), (9, 10)]
    values = []
    for setting in settings + [(0, 10)]:
        value, message = _call(function, *setting)
        if message:
            return message + (
                " With no sampled winner the gold chain is the only one." if setting[0] == 0 else ""
            )
        values.append(value)
    if all(value is None or value is ... for value in values):
        return UNSOLVED
    if all(
        _same(value, solution(*setting)) for value, setting in zip(values, settings + [(0, 10)])
    ):
        return "Right: k divided by the number of winners, rounded up. A question without any other winner has gold in all k."
    for message, wrong in mistakes.items():
        if all(
            wrong(*setting) is not None and _same(value, wrong(*setting))
            for value, setting in zip(values, settings)
        ):
            return message
    (w, k), value = next(
        (s, v) for s, v in zip(settings + [(0, 10)], values) if not _same(v, solution(*s))
    )
    used = list(range(0, k, w + 1))
    return f"{w} sampled winners, k = {k}: the gold chain wins in the pairs {used}, that is {len(used)}; you say {value!r}."


def lost(function) -> str:
    """Exercise 3.4: expected numbers of questions that are all wrong and all right."""
    chances = [0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0]

    def solution(n):
        return sum((1 - p) ** n for p in chances), sum(p**n for p in chances)

    mean = sum(chances) / len(chances)
    mistakes = {
        "The two are the wrong way round: first those that are all wrong, then those that are all right.": lambda n: (
            solution(n)[::-1]
        ),
        "You raise to the power of n only once: (1 - p)**n is the chance that *all* are wrong, not 1 - p**n.": lambda n: (
            sum(1 - p**n for p in chances),
            solution(n)[1],
        ),
        "These are the questions with at least one right and with at least one wrong sample. The lost ones are the others.": lambda n: (
            tuple(len(chances) - x for x in solution(n))
        ),
        "You took the average chance first. The power of an average is not the average of the powers: sum over the questions.": lambda n: (
            len(chances) * (1 - mean) ** n,
            len(chances) * mean**n,
        ),
        "These are shares. The exercise asks for numbers of questions: take the sum, not the mean.": lambda n: (
            tuple(x / len(chances) for x in solution(n))
        ),
        "You multiply where a power is needed: n samples that are all right have probability p**n.": lambda n: (
            sum(n * (1 - p) for p in chances),
            sum(n * p for p in chances),
        ),
        "These are the chances of one single sample. All n of them must be wrong (or right): p**n.": lambda n: (
            sum(1 - p for p in chances),
            sum(chances),
        ),
        "You count only questions that are lost for certain (p = 0 or 1). The others are lost with some probability, too.": lambda n: (
            chances.count(0.0),
            chances.count(1.0),
        ),
    }
    values = {}
    for n in (4, 16):
        value, message = _call(function, list(chances), n)
        if message or value is None or value is ...:
            return message or UNSOLVED
        if _number(value) is not None:
            if _same(value, sum(solution(n))):
                return "The sum is right. Return its two parts as a tuple: all wrong, all right."
            return f"You return one number, {value!r}. Return two: the expected number that is all wrong, and the number that is all right."
        try:
            wrong, right = (float(x) for x in value)
        except (TypeError, ValueError):
            return f"You return {value!r}. Return a tuple of two numbers: all wrong, all right."
        values[n] = (wrong, right)

    def matches(candidate):
        return all(_same(a, b) for n in values for a, b in zip(values[n], candidate(n)))

    if matches(solution):
        return (
            f"Right. Of {len(chances)} questions with chances {', '.join(f'{p:g}' for p in chances)} about {sum(values[4]):.1f} are "
            f"lost at N = 4 and {sum(values[16]):.1f} at N = 16. The certain ones (0 and 1) stay lost; 0.02 and 0.97 mostly, too."
        )
    for message, wrong in mistakes.items():
        if matches(wrong):
            return message
    side = 0 if not _same(values[4][0], solution(4)[0]) else 1
    return (
        f"For chances {chances} and n = 4 you expect {values[4][side]:.4g} questions that are all {('wrong', 'right')[side]}; it "
        f"should be {solution(4)[side]:.4g}. The other number is {'right' if _same(values[4][1 - side], solution(4)[1 - side]) else 'not right either'}."
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
