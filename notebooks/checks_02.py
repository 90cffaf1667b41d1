"""Checks of the exercises in 02_grading: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import re
from fractions import Fraction

from irpo_utils import tasks

UNSOLVED = "Not solved yet: fill in the cell above and run it again."
HEDGES = re.compile(
    r"\b(?:not|never|no|less|more|fewer|other|under|over|above|below|at least|at most)\b|n't",
    re.IGNORECASE,
)


def extract_number(function) -> str:
    """Exercise 2.1: the number after the last "Final answer:"."""
    whole_text = 'You read the whole text. Only what follows the last "Final answer:" counts.'
    cases = [  # completion, expected, {typical wrong result: what went wrong}
        ("6*7=42\nFinal answer: 42", 42, {6: whole_text, None: whole_text}),
        (
            "Final answer: 3\nNo, wait.\nFinal answer: 4",
            4,
            {
                3: 'You read the first "Final answer:"; a model may correct itself, so the last one counts.',
                None: 'You took the numbers after both markers for a hedge; only the last "Final answer:" counts.',
            },
        ),
        (
            "final ANSWER: 42",
            42,
            {
                None: 'Small and capital letters make no difference: "final ANSWER:" is a marker, too.'
            },
        ),
        (
            "Final answer: 1,080.50",
            Fraction(2161, 2),
            {
                1: "The comma between thousands cut your number short: take it out first.",
                1080: "The decimals are lost.",
                None: "The comma or the point split your number in two: take out the commas between thousands and allow decimals.",
            },
        ),
        (
            "Final answer: $24",
            24,
            {None: "A currency sign in front of the number is no reason to give up."},
        ),
        ("3-8=-5\nFinal answer: -5", -5, {5: "The minus is lost."}),
        (
            "Final answer: 12 or 13",
            None,
            {
                12: "Of two different numbers you took the first. That rewards hedging: return None.",
                13: "Of two different numbers you took the last. That rewards hedging: return None.",
            },
        ),
        (
            "Final answer: 12 or 13 or 12",
            None,
            {
                12: "The first and the last number agree, but one between them does not: look at all."
            },
        ),
        (
            "Final answer: 12 = 12.0",
            12,
            {None: "12 and 12.0 are one number written twice: compare numbers, not texts."},
        ),
        (
            "We need 5 more.\nThe answer is 42.",
            None,
            {
                42: 'There is no "Final answer:" in the text, so there is no answer.',
                5: whole_text,
                0: 'Without a "Final answer:" the result is None. 0 would be an answer.',
            },
        ),
        (
            "6*7=42\nFinal answer: none",
            None,
            {
                42: whole_text,
                0: "Without a number on its line the result is None. 0 would be an answer.",
            },
        ),
        (
            "Final answer: 42\n\nThis took 3 steps.",
            42,
            {
                None: "You read on after the line of the answer: it ends at the line break.",
                3: "You took the last number of the text; the answer ends at its line break.",
            },
        ),
        (
            "Final answer: 12,13",
            None,
            {
                1213: "That comma stands between two numbers: only one that three digits follow stands between thousands."
            },
        ),
    ]
    results = []
    for completion, expected, wrong in cases:
        value, message = _call(function, completion)
        if message:
            return message
        results.append((completion, expected, wrong, value))
    if all(value is ... for *_, value in results):
        return UNSOLVED
    if all(value is None for *_, value in results):
        return (
            UNSOLVED
            + ' (If it is filled in: it returns None for every text. Does it find "Final answer:" in any case of letters?)'
        )
    for completion, expected, wrong, value in results:
        if isinstance(value, str):
            return f'You return text, {value!r}. "24" and "24.00" are different texts and the same number: return a Fraction.'
        if not _same(value, expected):
            for result, message in wrong.items():
                if _same(value, result):
                    return f"{completion!r} gives {_show(value)}, not {_show(expected)}. {message}"
            return f"{completion!r} gives {_show(value)}; it should give {_show(expected)}."
    return "Right: the last line counts, one number is an answer, and two different ones are none."


def fooled(completion, naive) -> str:
    """Exercise 2.2: a completion that `naive` takes for 42 although it is not."""
    if completion is None or completion is ...:
        return UNSOLVED
    if not isinstance(completion, str):
        return f"Write a completion, that is a text; this is a {type(completion).__name__}."
    try:
        value = naive(completion)
    except Exception as error:  # noqa: BLE001
        return f"The naive grader raised {type(error).__name__}: {error}. Leave it as it was."
    if value != "42":
        return (
            f"The naive grader is not fooled: it reads {value}, not 42, and gives no reward. What stands first after the "
            'word "answer"?'
        )
    extracted = tasks.get("gsm8k").extract(completion)
    line = re.split("answer", completion, flags=re.IGNORECASE)[-1]
    if extracted == "42" and HEDGES.search(line):
        return "Right: it denies the answer and is rewarded. This one fools the package's grader as well: it reads no words."
    if extracted == "42":
        return (
            "The naive grader reads 42, but so does a reader: the final answer of your completion *is* 42. That is a true "
            "positive. Make the final answer another one."
        )
    read = re.sub(r"\bnot \d\S*", "", line)  # "42 (not 41)" says 42
    if (
        extracted is None
        and set(re.findall(r"\d+(?:[.,/]\d+)*", read)) == {"42"}
        and not HEDGES.search(read)
    ):
        return (
            "The naive grader reads 42, but so does a reader: the form is not the one that was asked for, but no other answer is "
            "given. Make the completion say something else than 42."
        )
    said = f"its final answer is {extracted}" if extracted else "it commits to no single number"
    return f"Right: the naive grader reads 42, but {said}."


def lucky_pairs(function) -> str:
    """Exercise 2.3: the expected share of pairs with a lucky winner."""

    def gives(p, n):
        return 1 - p**n - (1 - p) ** n

    def share(guessed, knew, q):
        return (1 - q) * guessed / ((1 - q) * guessed + q * knew)

    solution = lambda q, a, c, n: share(gives(1 / c, n), gives(a, n), q)  # noqa: E731
    mistakes = {
        "That is the chance that one guess is right. Most winners are no guesses; weigh with how often the model guesses.": lambda q, a, c, n: (
            1 / c
        ),
        "That is the lucky share among all *winners*. Pairs come from questions: each that stays gives K, however many "
        "winners it has.": lambda q, a, c, n: share(1 / c, a, q),
        "That is the share of guessed questions among all. Some of the questions give no pairs: which?": lambda q, a, c, n: (
            1 - q
        ),
        "You forgot the questions whose samples are all right: they have no loser and give no pairs.": lambda q, a, c, n: (
            share(1 - (1 - 1 / c) ** n, 1 - (1 - a) ** n, q)
        ),
        "You forgot the questions whose samples are all wrong: they have no winner and give no pairs.": lambda q, a, c, n: (
            share(1 - (1 / c) ** n, 1 - a**n, q)
        ),
        "You did not weigh with how many questions are known and how many are guessed (known, and 1 - known).": lambda q, a, c, n: (
            gives(1 / c, n) / (gives(1 / c, n) + gives(a, n))
        ),
        "That is the share of pairs from *known* questions. The lucky ones are the others: 1 minus yours.": lambda q, a, c, n: (
            1 - solution(q, a, c, n)
        ),
        "That is the probability that a guessed question gives pairs. It has to be compared with the known ones.": lambda q, a, c, n: (
            gives(1 / c, n)
        ),
        "That is the share of *all* questions that are guessed and give pairs. Divide by the share of all that give pairs.": lambda q, a, c, n: (
            (1 - q) * gives(1 / c, n)
        ),
        "Known and guessed are mixed up: `known` is the share of questions that the model knows.": lambda q, a, c, n: (
            share(gives(1 / c, n), gives(a, n), 1 - q)
        ),
    }
    settings = [(0.7, 0.97, 4, 30), (0.55, 0.9, 3, 4), (0.8, 0.95, 5, 7)]
    values = []
    for setting in settings:
        value, message = _call(function, *setting)
        if message or value is None or value is ...:
            return message or UNSOLVED
        values.append(value)
    if all(_same(value, solution(*setting)) for value, setting in zip(values, settings)):
        return "Right: this is what the simulation counted, without its noise."
    if all(_same(value, 100 * solution(*setting)) for value, setting in zip(values, settings)):
        return "These are per cent. Return a share between 0 and 1: leave out the factor 100."
    for message, wrong in mistakes.items():
        if all(_same(value, wrong(*setting)) for value, setting in zip(values, settings)):
            return message
    known, right, options, n = settings[0]
    return (
        f"For known={known}, right_if_known={right}, options={options}, n={n} your function gives {_show(values[0])}; the "
        f"simulation says about {solution(*settings[0]):.3f}. Work out separately how likely a guessed and a known question "
        "is to give pairs."
    )


def sound(function) -> str:
    """Exercise 2.4: right answers with sound working."""
    cases = [
        (
            "57*2=114\n114-2=112\nFinal answer: 112",
            "112",
            True,
            "Both equations are true and the last one gives the answer.",
        ),
        (
            "Final answer: 112",
            "112",
            False,
            "There is no equation at all. `all` of an empty list is True: ask for one equation first.",
        ),
        (
            "57*2=104\n104-2=102\n102+10=112\nFinal answer: 112",
            "112",
            False,
            "The first equation is false. One true equation is not enough: `all`, not `any`, and not the last one alone.",
        ),
        (
            "57*2=114\n114-2=112\nFinal answer: 114",
            "114",
            False,
            "The *last* equation must give the answer; here an earlier one does.",
        ),
        (
            "57*2=114\nFinal answer: 112",
            "112",
            False,
            "The equations are true, but the last one does not result in the answer.",
        ),
        (
            "3*0.5=1.50\nFinal answer: 1.5",
            "1.5",
            True,
            "1.50 and 1.5 are one number. Compare numbers, not texts, and not as int.",
        ),
        ("1/3=2\nFinal answer: 2", "2", False, "1/3 is not 2: use `is_true`."),
        (
            "57*2=114\n114",
            None,
            False,
            "No answer was extracted (None), so there is nothing that could be sound.",
        ),
    ]
    results = []
    for completion, extracted, expected, why in cases:
        value, message = _call(function, completion, extracted)
        if message:
            return (
                f"{message} (The completion was {completion!r}, extracted {extracted!r}.)"
                if message != UNSOLVED
                else message
            )
        results.append((completion, extracted, expected, why, value))
    if all(value is None or value is ... for *_, value in results):
        return UNSOLVED
    for completion, extracted, expected, why, value in results:
        if bool(value) != expected:
            return f"{completion!r} with the answer {extracted} should give {expected}; yours gives {_show(value)}. {why}"
        if not isinstance(value, bool):
            return f"The verdicts agree, but for {completion!r} you return {_show(value)}. Return True or False."
    return "Right: no equation, a false one, or one that leads elsewhere is not sound."


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
            f"Your function raised {type(error).__name__}: {error} for {', '.join(map(repr, arguments))}.",
        )


def _same(a, b) -> bool:
    if a is None or b is None:
        return a is b
    try:
        return abs(float(a) - float(b)) <= 1e-9 * max(1.0, abs(float(b)))
    except (TypeError, ValueError, OverflowError):
        return False


def _show(value) -> str:
    return (
        str(value)
        if isinstance(value, Fraction)
        else f"{value:.4g}"
        if isinstance(value, float)
        else repr(value)
    )
