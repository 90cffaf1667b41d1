"""Checks of the exercises in 02_grading: each returns a sentence that begins with "Right" or names the mistake."""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Rational

from checks_common import NO_RETURN, UNSOLVED, unsolved
from helpers_02 import equations, is_true

from irpo_utils import tasks

NUMBER = r"\d+(?:[.,/]\d+)*"
# "not 42", "isn't 42", "more than 42", "42 or more": this text does not commit to 42
DENIAL = re.compile(
    r"(?:\b(?:not|never|no)|n't)\s+(?:\w+\s+){0,2}42\b"
    r"|\b(?:(?:less|more|fewer|other)\s+than|under|over|above|below|at\s+(?:least|most))\s+42\b"
    r"|\b42\b[^\n.]{0,20}\bor\s+(?:more|less|fewer|so)\b"
    r"|\b42\s+(?:(?:is|was)\s+(?:not|wrong|incorrect|false)|dozen|hundred|thousand|million)\b",
    re.IGNORECASE,
)
EQUATION = re.compile(r"\d[\d\s+*/x×-]*=\s*(?=\d)")
ASIDE = re.compile(r"\((?:not|and not)\b[^)]*\)|\b(?:and\s+)?not\s+(?!42\b)\d\S*", re.IGNORECASE)


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
                None: 'Small and capital letters make no difference: "final ANSWER:" is also a marker.'
            },
        ),
        (
            "Final answer: 1,080.50",
            Fraction(2161, 2),
            {
                1: "The comma between thousands cut your number short: take it out first.",
                1080: "The decimals are lost.",
                50: "The comma or the point split your number, and you read only its last part.",
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
                12: "Of two different numbers you took the first. A hedge is no answer: return None.",
                13: "Of two different numbers you took the last. A hedge is no answer: return None.",
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
            {
                None: "12 and 12.0 are one number written twice: count *different* numbers, not texts."
            },
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
                1213: "This comma separates two numbers. A thousands separator is followed by exactly three digits."
            },
        ),
        (
            "Final answer: 1/3",
            Fraction(1, 3),
            {None: "1/3 is one number, a fraction.", 1: "You read only the numerator."},
        ),
        (
            "Final answer:\n24",
            24,
            {None: "Here the first line of text after the marker is the next line."},
        ),
    ]
    results = []
    for completion, expected, wrong in cases:
        value, message = _call(function, completion)
        if message:
            return message
        results.append((completion, expected, wrong, value))
    if all(value is ... for *_, value in results):
        return unsolved(function)
    if all(value is None for *_, value in results):
        return f'{NO_RETURN} If it is there: does it find "Final answer:" in upper and lower case?'
    for completion, expected, wrong, value in results:
        if isinstance(value, str):
            return f'You return text, {value!r}. "24" and "24.00" are different texts and the same number: return a Fraction.'
        if not _same(value, expected):
            for result, message in wrong.items():
                if _same(value, result):
                    return f"{completion!r} gives {_show(value)}, not {_show(expected)}. {message}"
            return f"{completion!r} gives {_show(value)}; it should give {_show(expected)}."
    other = next(
        (value for *_, value in results if not isinstance(value, (Rational, type(None)))), None
    )
    if other is not None:
        return f"The numbers agree, but you return a {type(other).__name__}. Return a Fraction, which is exact."
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
            f"The naive grader is not fooled: it reads {value}, not 42, and gives no reward. What follows directly after the "
            'word "answer"?'
        )
    extracted = tasks.get("gsm8k").extract(completion)
    said = re.split("answer", completion, flags=re.IGNORECASE)[-1]
    if DENIAL.search(said):
        return (
            "Right: it does not commit to 42, and the naive grader rewards it. It reads no words."
        )
    if extracted == "42":
        return (
            "The naive grader reads 42, but so does a reader: the final answer of your completion *is* 42. That is a true "
            "positive. Write another final answer."
        )
    if extracted is None and set(re.findall(NUMBER, EQUATION.sub("", ASIDE.sub("", said)))) == {
        "42"
    }:
        return (
            "The naive grader reads 42, but so does a reader: the form is not the requested one, but there is no other "
            "answer. Write a final answer that is not 42."
        )
    what = f"the final answer is {extracted}" if extracted else "it commits to no single number"
    return f"Right: the naive grader reads 42, but {what}."


def lucky_pairs(function) -> str:
    """Exercise 2.4: the expected share of pairs whose chosen completion is lucky."""

    def of(verdicts, lucky="lucky", rewarded=("solved", "lucky")):
        total = sum(verdict in rewarded for verdict in verdicts)
        return verdicts.count(lucky) / total

    def mean(shares):
        return sum(shares) / len(shares)

    def usable(questions):
        return [q for q in questions if 0 < len(q) - q.count("incorrect") < len(q)]

    def rewarded(questions):
        return [q for q in questions if q.count("incorrect") < len(q)]

    def pooled(questions):
        return of([verdict for question in questions for verdict in question])

    solution = lambda qs: mean([of(q) for q in usable(qs)])  # noqa: E731
    mistakes = {
        "That is the lucky share among all rewarded completions. Some of their questions give no pair: which?": pooled,
        "That is the lucky share among the rewarded completions of all questions that give pairs. Each such question gives "
        "one pair, however many completions are rewarded: take the mean over questions.": lambda qs: (
            pooled(usable(qs))
        ),
        "A question whose completions are all rewarded gives no pair: it has no rejected completion.": lambda qs: (
            mean([of(q) for q in rewarded(qs)])
        ),
        "You divide by the number of all questions. Divide by the number of questions that give a pair.": lambda qs: (
            sum(of(q) for q in usable(qs)) / len(qs)
        ),
        "You divide by all completions of a question. Only rewarded completions can be chosen.": lambda qs: (
            mean([q.count("lucky") / len(q) for q in usable(qs)])
        ),
        "That is the share of pairs whose chosen completion is *solved*. The lucky ones are the others.": lambda qs: (
            1 - solution(qs)
        ),
        "That is the share of the questions with pairs that have any lucky completion. The chosen one is drawn among all "
        "rewarded ones.": lambda qs: mean([float("lucky" in q) for q in usable(qs)]),
        "You divide lucky by solved completions. Both are rewarded: divide by their sum.": lambda qs: (
            mean([q.count("lucky") / max(1, q.count("solved")) for q in usable(qs)])
        ),
        "That is a sum over questions. Divide by the number of questions that give a pair.": lambda qs: (
            sum(of(q) for q in usable(qs))
        ),
        "These are percentages. Return a share between 0 and 1.": lambda qs: 100 * solution(qs),
    }
    s, l, i = "solved", "lucky", "incorrect"
    cases = [
        [[s, s, l, i], [l, i, i, i], [i, i, i, i], [s, s, s, s], [s, i, i, s], [l, l, s, l]],
        [[l, i, s], [l, l, l], [s, i, i], [i, i, i], [l, l, i], [s, s, l], [s, s, i]],
    ]
    values = []
    for case in cases:
        value, message = _call(function, [list(question) for question in case])
        if message:
            if "ZeroDivisionError" in message:
                message += (
                    " A question may have no rewarded completion: it gives no pair, so skip it."
                )
            return message
        if value is ...:
            return unsolved(function)
        if value is None:
            return NO_RETURN
        values.append(value)
    for message, wrong in {
        "Right: the mean over questions that give a pair.": solution,
        **mistakes,
    }.items():
        if all(_same(value, wrong(case)) for value, case in zip(values, cases)):
            return message
    return (
        f"For the questions {cases[1]} your function gives {_show(values[1])}; it should give {solution(cases[1]):.4g}. Which of "
        "these questions give a pair, and what is the lucky share of each?"
    )


def sound(function) -> str:
    """Exercise 2.3: correct answers with sound working."""
    cases = [
        ("57*2=114\n114-2=112\nFinal answer: 112", "112"),
        ("Final answer: 112", "112"),
        ("57*2=104\n104-2=102\n102+10=112\nFinal answer: 112", "112"),
        ("57*2=114\n114-2=112\nFinal answer: 114", "114"),
        ("57*2=114\nFinal answer: 112", "112"),
        ("3*0.5=1.50\nFinal answer: 1.5", "1.5"),
        ("1/3=2\nFinal answer: 2", "2"),
        ("57*2=114\n114-2=100\nFinal answer: 100", "100"),
        ("57*2=114\n114", None),
        ("The answer is 114", None),
    ]

    def judge(every=all, empty=False, result=lambda shown, x: shown[-1][3] == Fraction(x)):
        """A verdict of the same structure as the solution, with one part changed."""

        def verdict(completion, extracted):
            shown = equations(completion)
            if not shown or extracted is None:
                return empty and extracted is not None
            return every([is_true(e) for e in shown]) and result(shown, extracted)

        return verdict

    solution = judge()
    mistakes = {
        "Your reward accepts a completion without any equation. `all([])` is True: require one equation first.": judge(
            empty=True
        ),
        "You never check whether the equations are true: use `is_true` on each.": judge(
            every=lambda _: True
        ),
        "One true equation is not enough: use `all`, not `any`.": judge(every=any),
        "You check the last equation alone. An earlier false one also counts: use `all`.": judge(
            every=lambda shown: shown[-1]
        ),
        "You check the first equation alone. Use `all`.": judge(every=lambda shown: shown[0]),
        "The equations are true, but you do not compare the last result with the extracted answer.": judge(
            result=lambda *_: True
        ),
        "You accept an answer that an earlier equation gives. The *last* one must give it.": judge(
            result=lambda shown, x: Fraction(x) in [e[3] for e in shown]
        ),
        "You compare the answer with the *first* equation. The last one must give it.": judge(
            result=lambda shown, x: shown[0][3] == Fraction(x)
        ),
        "You compare texts. 1.50 and 1.5 are one number: make a `Fraction` of the extracted answer.": judge(
            result=lambda shown, x: str(shown[-1][3]) == x
        ),
        "You inverted the result: True means sound.": lambda *case: not solution(*case),
        "You return True for every completion.": lambda *_: True,
        "You return False for every completion. A `Fraction` never equals a text: compare with `Fraction(extracted)`.": lambda *_: (
            False
        ),
    }
    values = []
    for completion, extracted in cases:
        value, message = _call(function, completion, extracted)
        if message and extracted is None and values and "raised" in message:
            return f"{message} No answer was extracted (None), so the completion is not sound."
        if message:
            return message
        values.append(value)
    if all(value is ... for value in values):
        return unsolved(function)
    if all(value is None for value in values):
        return NO_RETURN
    verdicts = [bool(value) for value in values]
    if verdicts == [solution(*case) for case in cases]:
        for case, value in zip(cases, values):
            if value is None:
                return f"The results agree, but for {case[0]!r} your function returns None. Return False there."
            if not isinstance(value, bool):
                return f"The results agree, but for {case[0]!r} you return {_show(value)}. Return True or False."
        return (
            "Right: a completion without an equation, with a false one, or whose last equation gives another number is not "
            "sound."
        )
    if any(value is None and solution(*case) for case, value in zip(cases, values)):
        return NO_RETURN
    for message, wrong in mistakes.items():
        if verdicts == [bool(wrong(*case)) for case in cases]:
            return message
    case, mine = next((c, v) for c, v in zip(cases, verdicts) if v != solution(*c))
    return f"{case[0]!r} with the extracted answer {case[1]!r} should give {solution(*case)}; yours gives {mine}."


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
