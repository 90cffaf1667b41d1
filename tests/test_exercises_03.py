"""The checks of 03_pairs accept the solution and name typical mistakes; the side-by-side view shows text, never runs it."""

import random
import re
import sys
from html.parser import HTMLParser
from itertools import cycle, islice, product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "scripts")]

import checks_03  # noqa: E402
import helpers_03  # noqa: E402

from make_notebooks import view  # noqa: E402

SOURCE = (ROOT / "notebooks/source/03_pairs.py").read_text(encoding="utf-8")
EXERCISES = ("wrap_around", "lost", "n_shared")


def definitions(solved: bool) -> dict:
    names, space = "|".join(f"def {name}" for name in EXERCISES), {}
    for cell in view(SOURCE, solved).cells:
        if cell.cell_type == "code" and re.search(names, cell.source):
            exec(cell.source, space)
    return space


SOLVED = definitions(solved=True)


@pytest.mark.parametrize("name", EXERCISES)
def test_solved_and_unsolved(name):
    check = getattr(checks_03, name)
    assert check(SOLVED[name]).startswith("Right")
    for unsolved in (definitions(solved=False)[name], None, ..., lambda *_: ...):
        assert check(unsolved).startswith("Not solved yet")
    assert "is a `return` missing?" in check(lambda *_: None)
    assert "your function itself" in check(7)


def test_a_placeholder_left_below_working_code_is_named():
    def attempt(chosen, rejected, *k):
        for ours, theirs in zip(chosen, rejected):
            if ours != theirs:
                break
        return ...

    for check in (checks_03.wrap_around, checks_03.n_shared):
        assert "still returns `...`" in check(attempt)


def test_kinds_of_divergence():
    kind = helpers_03.kind_of_divergence
    answer = "Final answer: 1"
    assert [
        kind("1+1=2", answer, 0),
        kind("1+1=2", "1+1=3", 0),
        kind(answer, "Final answer: 2", 0),
        kind(answer, "1+1=2", 0),
        kind("1", "1\n2", 1),
    ] == [list(helpers_03.KINDS)[i] for i in (0, 1, 2, 3, 1)]


def walk(w, l, k):
    return [(w[i % len(w)], l[i % len(l)]) for i in range(k)]


def guarded(function):
    return lambda w, l, k: function(w, l, k) if w and l else []


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda w, l, k: list(zip(w, l)), "as `zip` does"),
        (guarded(lambda w, l, k: list(islice(cycle(zip(w, l)), k))), "*both* lists again"),
        (guarded(lambda w, l, k: list(islice(cycle(product(w, l)), k))), "both lists in parallel"),
        (guarded(lambda w, l, k: list(product(w, l))[:k]), "both lists in parallel"),
        (guarded(lambda w, l, k: [(b, a) for a, b in walk(w, l, k)]), "The chosen one comes first"),
        (
            guarded(lambda w, l, k: walk(range(len(w)), range(len(l)), k)),
            "Return the completion numbers",
        ),
        (
            guarded(lambda w, l, k: [(random.choice(w), random.choice(l)) for _ in range(k)]),
            "it walks",
        ),
        (guarded(lambda w, l, k: walk(w, l, k + 1)), "k pairs already"),
        (lambda w, l, k: walk(w, l, k), "a list can be empty"),
        (lambda w, l, k: walk(w, l, k) if w and l else None, "a list can be empty"),
        (lambda w, l, k: list(islice(zip(cycle(w), cycle(l)), k)) or 5, "a list can be empty"),
        (lambda w, l, k: 5, "Return a list of tuples"),
        (lambda w, l, k: islice(zip(cycle(w), cycle(l)), k), "You return an iterator"),
    ],
)
def test_wrong_walks(attempt, words):
    message = checks_03.wrap_around(attempt)
    assert words in message and not message.startswith("Right")


def test_cycle_is_right_too():
    assert checks_03.wrap_around(
        lambda w, l, k: list(islice(zip(cycle(w), cycle(l)), k))
    ).startswith("Right:")


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda a, b: sum(x == y for x, y in zip(a, b)), "equal tokens in all positions"),
        (lambda a, b: len(set(a) & set(b)), "at any position"),
        (lambda a, b: helpers_03.n_shared(a, b) + 1, "counted from 1"),
        (lambda a, b: helpers_03.n_shared(a[::-1], b[::-1]), "from the end"),
        (lambda a, b: helpers_03.n_shared(a, b) / len(a), "a share"),
        (lambda a, b: [x == y for x, y in zip(a, b)].index(False), "raised ValueError"),
        (
            lambda a, b: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None),
            "`return` missing",
        ),
        (
            lambda a, b: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0),
            "where one ends first",
        ),
        (lambda a, b: 5, "tokens are the same"),
    ],
)
def test_wrong_points_of_divergence(attempt, words):
    message = checks_03.n_shared(attempt)
    assert words in message and not message.startswith("Right")


def right(p, n):
    return sum(x**n for x in p)


def wrong(p, n):
    return sum((1 - x) ** n for x in p)


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda p, n: (right(p, n), wrong(p, n)), "order is reversed"),
        (lambda p, n: (sum(1 - x**n for x in p), right(p, n)), "at least one incorrect completion"),
        (lambda p, n: (len(p) - wrong(p, n), len(p) - right(p, n)), "The lost ones are the others"),
        (lambda p, n: wrong(p, n) + right(p, n), "Return its two parts"),
        (lambda p, n: wrong(p, n), "Return two"),
        (lambda p, n: (wrong(p, n) / len(p), right(p, n) / len(p)), "not the mean"),
        (
            lambda p, n: (
                wrong([sum(p) / len(p)] * len(p), n),
                right([sum(p) / len(p)] * len(p), n),
            ),
            "average chance",
        ),
        (lambda p, n: (p.count(0.0), p.count(1.0)), "lost for certain"),
        (lambda p, n: (wrong(p, n), right(p, n) + 1), "all correct; it should be"),
        (lambda p, n: (wrong(p, 4), right(p, 4)), "not for n = 16"),
        (lambda p, n: p**n, "raised TypeError"),
    ],
)
def test_wrong_losses(attempt, words):
    message = checks_03.lost(attempt)
    assert words in message and not message.startswith("Right")


# --- the side-by-side view ---------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags, attributes and the text inside <code>."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.codes = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "code":
            self.codes.append("")

    def handle_data(self, data):
        if self.codes and self.lasttag == "code":
            self.codes[-1] += data


HOSTILE = [
    "<script>alert(1)</script>",
    "</code></td></tr></table><h1>gone",
    "<img src=x onerror='alert(1)'>",
    '" onclick="x',
    "&lt;b&gt;",
    "&#60;script&#62;",
    "<!-- ",
    "$x$ \\(y\\) \\[z\\]",
    "<![CDATA[",
    "`*_#",
    "</table",
    "<b",
    "javascript:alert(1)",
    "{{7*7}}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text):
    page = helpers_03.table_of(f"1+1=2\n{text}\nFinal answer: 2", f"{text}\n")
    reader = Reader(page)
    assert reader.tags <= {"table", "tr", "th", "td", "code", "b"} and reader.attributes <= {
        "style"
    }
    assert reader.codes == ["1+1=2", text, text, "", "Final answer: 2"] or reader.codes[:2] == [
        "1+1=2",
        text,
    ]
    assert page.count("they diverge here") == 1


def test_what_cannot_be_seen_is_spelt_out():
    shown = helpers_03.visible("a\u202eb\x00c\u200bd\te")
    assert shown == r"a\u202eb\u0000c\u200bd\u0009e"


def test_first_difference():
    divergence, side_by_side = helpers_03.divergence, helpers_03.table_of
    assert [
        divergence(*two)
        for two in (
            ("a\nb", "a\nc"),
            ("a", "b"),
            ("a\nb", "a"),
            ("a", "a\nb"),
            ("a", "a"),
            ("", "a"),
            ("a\n", "a"),
        )
    ] == [1, 0, 1, 1, None, 0, 1]
    assert "they diverge here" not in side_by_side("same", "same")
    rows = side_by_side("a\nb\nc", "a\nx").split("<tr>")[2:]
    assert ["they diverge here" in row for row in rows] == [False, True, False]
