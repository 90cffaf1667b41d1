"""The embedded task: grade-school word problems with integer answers, made by a seeded generator.

One raw question, its gold solution and its answer:

    Mia keeps 24 shells in a jar. A friend gives Mia 13 more shells. Then the number of shells doubles.
    How many shells does Mia have now?

    24+13=37
    37*2=74
    Final answer: 74

A question is a *skeleton* (the story with names, objects and numbers masked) filled with numbers. The 2,000
skeletons are drawn once from a fixed seed, 400 for each number of steps from 2 to 6; a quarter of them are held
out: neither the training split nor the corpus of the seed model M0 ever uses them, and `load("test")` says for each
question whether its skeleton is one of those (column `new_skeleton`).
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from irpo_utils import UserError
from irpo_utils.tasks.numbers import NumberTask

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = (2, 3, 4, 5, 6)
SKELETONS_PER_STEP = 400
HELD_OUT_SHARE = 0.25
SPLIT_SIZES = {"train": 2400, "validation": 500, "test": 500}

NAMES = (
    "Mia Tom Ana Ben Zoe Sam Eva Leo Ida Max Ivy Jon Amy Dan Lea Kai Una Raj Nia Finn "
    "Omar Rosa Yuki Lars Tara Hugo Nora Emil Sofia Ravi Lena Igor"
).split()


@dataclass(frozen=True)
class Theme:
    """Sentences of one kind of story. {n}, {k} and {m} are numbers, {name} and {item} are filled per question."""

    items: tuple[str, ...]
    openings: tuple[str, ...]  # tells the start value {n}
    setting: str  # the same scene without the number, for stories that tell the start last
    gains: tuple[str, ...]  # value + n
    losses: tuple[str, ...]  # value - n
    packs: tuple[str, ...]  # value + k*m, two steps
    shares: tuple[str, ...]  # value - k*m, two steps
    questions: tuple[str, ...]


THEMES = (
    Theme(
        ("shells", "marbles", "stamps", "coins", "buttons"),
        ("{name} has {n} {item}.", "{name} keeps {n} {item} in a jar."),
        "{name} collects {item}.",
        (
            "{name} finds {n} more.",
            "A friend gives {name} {n} more {item}.",
            "On Sunday {name} adds {n} new {item}.",
        ),
        (
            "{name} loses {n} of them.",
            "{name} gives {n} {item} to a sister.",
            "{name} trades away {n} {item}.",
        ),
        ("{name} buys {k} bags with {m} {item} each.", "An aunt sends {k} boxes of {m} {item}."),
        ("{name} gives {m} {item} to each of {k} friends.", "{k} cousins take {m} {item} each."),
        (
            "How many {item} does {name} have now?",
            "How many {item} are in the collection at the end?",
        ),
    ),
    Theme(
        ("loaves", "rolls", "cakes", "pies", "cookies"),
        ("A bakery has {n} {item} on the shelf.", "{name} bakes {n} {item} at dawn."),
        "{name} runs a bakery that sells {item}.",
        (
            "{name} bakes {n} more.",
            "The oven turns out another {n} {item}.",
            "A helper brings {n} {item} from the back room.",
        ),
        (
            "A customer buys {n} {item}.",
            "{n} {item} are sold before noon.",
            "{name} throws away {n} burnt {item}.",
        ),
        (
            "{name} bakes {k} trays of {m} {item}.",
            "A van delivers {k} crates with {m} {item} each.",
        ),
        (
            "{k} people buy {m} {item} each.",
            "{name} packs {k} bags with {m} {item} and sells them.",
        ),
        ("How many {item} are left in the bakery?", "How many {item} can {name} still sell?"),
    ),
    Theme(
        ("passengers", "tourists", "pupils", "workers"),
        ("A bus leaves town with {n} {item}.", "{n} {item} are on the bus of {name}."),
        "{name} drives a bus full of {item}.",
        (
            "At the next stop {n} {item} get on.",
            "{n} more {item} board at the market.",
            "A group of {n} joins at the bridge.",
        ),
        (
            "{n} {item} get off at the station.",
            "At the park {n} of them leave.",
            "{n} {item} step out at the school.",
        ),
        ("{k} families of {m} get on.", "At the port {k} groups of {m} {item} board."),
        ("{k} groups of {m} {item} get off.", "At the zoo {k} families of {m} leave the bus."),
        ("How many {item} are on the bus now?", "With how many {item} does the bus arrive?"),
    ),
    Theme(
        ("books", "comics", "films", "maps", "magazines"),
        ("A library owns {n} {item}.", "{name} puts {n} {item} on a shelf."),
        "{name} looks after the {item} of a library.",
        (
            "Readers return {n} {item}.",
            "The town buys {n} new {item}.",
            "{name} finds {n} {item} in the cellar.",
        ),
        (
            "{n} {item} are lent out.",
            "A school borrows {n} of the {item}.",
            "{name} removes {n} torn {item}.",
        ),
        ("{k} parcels with {m} {item} each arrive.", "{k} readers bring back {m} {item} each."),
        ("{k} readers borrow {m} {item} each.", "{name} sends {m} {item} to each of {k} schools."),
        ("How many {item} are there in the end?", "How many {item} does the library hold now?"),
    ),
    Theme(
        ("hens", "sheep", "goats", "ducks", "cows"),
        ("A farm starts the year with {n} {item}.", "{name} owns {n} {item}."),
        "{name} raises {item} on a farm.",
        (
            "In spring {n} {item} are born.",
            "{name} buys {n} {item} at a fair.",
            "A neighbour hands over {n} more {item}.",
        ),
        (
            "{name} sells {n} {item}.",
            "In a storm {n} {item} run away.",
            "A neighbour buys {n} of the {item}.",
        ),
        ("{k} trucks bring {m} {item} each.", "{name} buys {k} pens with {m} {item} in each."),
        ("{k} farmers buy {m} {item} each.", "{name} moves {m} {item} to each of {k} other farms."),
        ("How many {item} are on the farm now?", "How many {item} does {name} own after that?"),
    ),
    Theme(
        ("dollars", "euros", "pounds", "tokens"),
        ("{name} saves {n} {item}.", "There are {n} {item} in the purse of {name}."),
        "{name} counts the {item} in a purse.",
        (
            "{name} earns {n} {item} by washing cars.",
            "Grandma adds {n} {item}.",
            "{name} wins {n} {item} in a game.",
        ),
        (
            "{name} spends {n} {item} on lunch.",
            "A ticket costs {name} {n} {item}.",
            "{name} lends {n} {item} to a friend.",
        ),
        ("{name} works {k} hours for {m} {item} each.", "{k} uncles give {name} {m} {item} each."),
        (
            "{name} buys {k} toys at {m} {item} each.",
            "{name} pays {m} {item} for each of {k} rides.",
        ),
        ("How many {item} does {name} have left?", "What is in the purse in the end?"),
    ),
    Theme(
        ("apples", "pears", "plums", "lemons", "figs"),
        ("{name} picks {n} {item}.", "A basket holds {n} {item}."),
        "{name} fills a basket with {item}.",
        (
            "{name} picks {n} more.",
            "{n} {item} fall from the tree into the basket.",
            "{name} adds {n} {item} from the garden.",
        ),
        (
            "{name} eats {n} {item}.",
            "{n} {item} turn out to be bad.",
            "A bird steals {n} of the {item}.",
        ),
        (
            "{name} empties {k} buckets of {m} {item} into the basket.",
            "{k} children add {m} {item} each.",
        ),
        ("{name} bakes {k} tarts with {m} {item} each.", "{k} children eat {m} {item} each."),
        ("How many {item} are in the basket now?", "How many {item} remain?"),
    ),
    Theme(
        ("points", "stars", "badges", "gems"),
        ("{name} starts a game with {n} {item}.", "After one round {name} holds {n} {item}."),
        "{name} plays a game for {item}.",
        (
            "{name} gains {n} {item}.",
            "A bonus brings {n} {item}.",
            "In the next level {name} collects {n} more {item}.",
        ),
        (
            "{name} loses {n} {item}.",
            "A trap costs {n} {item}.",
            "{name} pays {n} {item} for a key.",
        ),
        ("{name} opens {k} chests with {m} {item} each.", "{k} wins bring {m} {item} each."),
        ("{k} mistakes cost {m} {item} each.", "{name} buys {k} hints for {m} {item} each."),
        ("How many {item} does {name} end with?", "What is the final number of {item}?"),
    ),
    Theme(
        ("bricks", "tiles", "planks", "pipes", "stones"),
        ("A builder has {n} {item} on site.", "{name} orders {n} {item} for a house."),
        "{name} builds a house and needs {item}.",
        (
            "A truck unloads {n} {item}.",
            "{name} finds {n} {item} in the shed.",
            "The next day {n} more {item} arrive.",
        ),
        (
            "{name} uses {n} {item} for a wall.",
            "{n} {item} break.",
            "{name} sends back {n} of the {item}.",
        ),
        ("{k} pallets of {m} {item} arrive.", "{name} buys {k} stacks with {m} {item} each."),
        ("Each of {k} walls takes {m} {item}.", "{name} lays {k} rows of {m} {item}."),
        ("How many {item} are left on site?", "How many {item} can {name} still use?"),
    ),
    Theme(
        ("letters", "parcels", "cards", "flyers"),
        ("A post office holds {n} {item}.", "{name} sorts {n} {item} in the morning."),
        "{name} sorts {item} at a post office.",
        (
            "A train brings {n} {item}.",
            "{n} more {item} are dropped off.",
            "{name} finds {n} {item} under a table.",
        ),
        (
            "{name} delivers {n} {item}.",
            "{n} {item} go out by plane.",
            "A clerk returns {n} {item}.",
        ),
        ("{k} sacks of {m} {item} come in.", "{k} shops drop off {m} {item} each."),
        (
            "{name} brings {m} {item} to each of {k} houses.",
            "{k} riders carry off {m} {item} each.",
        ),
        ("How many {item} are at the post office now?", "How many {item} still wait?"),
    ),
    Theme(
        ("roses", "tulips", "herbs", "seeds", "bulbs"),
        ("{name} plants {n} {item}.", "A garden has {n} {item} in May."),
        "{name} grows {item} in a garden.",
        (
            "{name} plants {n} more.",
            "In June {n} new {item} come up.",
            "A neighbour gives {name} {n} {item}.",
        ),
        (
            "Rabbits eat {n} {item}.",
            "{name} cuts {n} {item} for a vase.",
            "Frost kills {n} of the {item}.",
        ),
        ("{name} sets {k} rows of {m} {item}.", "{k} guests bring {m} {item} each."),
        (
            "{name} makes {k} bunches of {m} {item} and gives them away.",
            "{k} pots with {m} {item} each are sold.",
        ),
        ("How many {item} grow in the garden now?", "How many {item} are left for {name}?"),
    ),
    Theme(
        ("pencils", "pens", "crayons", "erasers", "rulers"),
        ("A teacher has {n} {item}.", "{name} brings {n} {item} to class."),
        "{name} hands out {item} in class.",
        (
            "{name} buys {n} more {item}.",
            "The school adds {n} {item}.",
            "{n} lost {item} turn up again.",
        ),
        (
            "{n} {item} break.",
            "Pupils lose {n} {item}.",
            "{name} lends {n} {item} to the next room.",
        ),
        ("{name} opens {k} packs of {m} {item}.", "{k} parents bring {m} {item} each."),
        ("{k} pupils take {m} {item} each.", "{name} gives {m} {item} to each of {k} groups."),
        ("How many {item} are left in class?", "How many {item} does {name} still have?"),
    ),
)

# Sentences that fit every theme: the value is multiplied or halved.
MULTIPLY = {
    2: ("Then the number of {item} doubles.", "Soon there are twice as many {item}."),
    3: ("Then the number of {item} triples.", "Soon there are three times as many {item}."),
}
HALVE = ("Then half of the {item} are taken away.", "Only half of the {item} are kept.")
START_LAST = ("At the start there were {n} {item}.", "It all began with {n} {item}.")
ORDERS = ("in order", "question first", "start last")
CLAUSE_STEPS = {"gain": 1, "loss": 1, "multiply": 1, "halve": 1, "pack": 2, "share": 2}


@dataclass(frozen=True)
class Skeleton:
    """A story without names, objects and numbers.

    `parts` holds (clause kind, sentence, factor): one clause gives one equation line, or two for packs and shares.
    """

    theme: int
    order: str
    opening: str
    parts: tuple[tuple[str, str, int], ...]
    question: str

    @property
    def text(self) -> str:
        """The masked question: `{name}`, `{item}`, `{n}`, `{k}` and `{m}` stand where the fillings go."""
        sentences = [sentence for _, sentence, _ in self.parts]
        if self.order == "question first":
            return " ".join([self.question, self.opening, *sentences])
        if self.order == "start last":
            return " ".join([THEMES[self.theme].setting, *sentences, self.opening, self.question])
        return " ".join([self.opening, *sentences, self.question])


def _draw_clause(rng: random.Random, theme: Theme, steps_left: int) -> tuple[str, str, int]:
    kinds = ["gain"] * 4 + ["loss"] * 4 + ["multiply"] * 2 + ["halve"]
    if steps_left >= 2:
        kinds += ["pack"] * 2 + ["share"] * 2
    kind = rng.choice(kinds)
    if kind == "multiply":
        factor = rng.choice((2, 3))
        return kind, rng.choice(MULTIPLY[factor]), factor
    sentences = {
        "gain": theme.gains,
        "loss": theme.losses,
        "halve": HALVE,
        "pack": theme.packs,
        "share": theme.shares,
    }
    return kind, rng.choice(sentences[kind]), 2


def _draw_skeleton(rng: random.Random, steps: int) -> Skeleton:
    index = rng.randrange(len(THEMES))
    theme, order = THEMES[index], rng.choice(ORDERS)
    opening = rng.choice(START_LAST if order == "start last" else theme.openings)
    parts: list[tuple[str, str, int]] = []
    while (left := steps - sum(CLAUSE_STEPS[kind] for kind, _, _ in parts)) > 0:
        clause = _draw_clause(rng, theme, left)
        repeated_scaling = (
            parts and clause[0] in ("multiply", "halve") and parts[-1][0] in ("multiply", "halve")
        )
        if not repeated_scaling and clause not in parts:
            parts.append(clause)
    return Skeleton(index, order, opening, tuple(parts), rng.choice(theme.questions))


@functools.lru_cache(maxsize=1)
def skeletons() -> dict[str, tuple[tuple[int, Skeleton], ...]]:
    """All skeletons as {"seen": ((steps, skeleton), ...), "held_out": (...)}; the same on every machine."""
    rng, known = random.Random(2404), set()
    groups: dict[str, list[tuple[int, Skeleton]]] = {"seen": [], "held_out": []}
    for steps in STEPS:
        drawn: list[Skeleton] = []
        while len(drawn) < SKELETONS_PER_STEP:
            skeleton = _draw_skeleton(rng, steps)
            if skeleton.text not in known and _fill(skeleton, rng, WIDE_RANGE, tries=50):
                known.add(skeleton.text)
                drawn.append(skeleton)
        held_out = round(HELD_OUT_SHARE * SKELETONS_PER_STEP)
        groups["held_out"] += [(steps, s) for s in drawn[:held_out]]
        groups["seen"] += [(steps, s) for s in drawn[held_out:]]
    return {key: tuple(value) for key, value in groups.items()}


@dataclass(frozen=True)
class NumberRange:
    """Bounds on the numbers of a question: start value, value between steps, result, and single operands."""

    start: int = 60
    running: int = 199
    result: int = 599
    operand: int = 60


TASK_RANGE = NumberRange()
WIDE_RANGE = NumberRange(
    start=120, running=499, result=999, operand=150
)  # for the first phase of M0's corpus


def _fill(
    skeleton: Skeleton, rng: random.Random, bounds: NumberRange, tries: int = 20
) -> dict | None:
    """Numbers for one skeleton, or None where none within bounds were found in `tries` draws."""
    for _ in range(tries):
        value = start = rng.randint(4, bounds.start)
        sentences, lines = [], []
        for position, (kind, sentence, factor) in enumerate(skeleton.parts):
            limit = bounds.result if position == len(skeleton.parts) - 1 else bounds.running
            filled = _apply_clause(kind, sentence, factor, value, limit, rng, bounds)
            if filled is None:
                break
            sentence, new_lines, value = filled
            sentences.append(sentence)
            lines += new_lines
        else:
            return {"start": start, "sentences": sentences, "lines": lines, "result": value}
    return None


def _apply_clause(kind, sentence, factor, value, limit, rng, bounds):
    """One clause with numbers: (sentence, equation lines, new value), or None if the value would leave its bounds."""
    if kind in ("pack", "share"):
        k, m = rng.randint(2, 9), rng.randint(2, 9)
        sentence, lines, n = (
            sentence.replace("{k}", str(k)).replace("{m}", str(m)),
            [f"{k}*{m}={k * m}"],
            k * m,
        )
    else:
        n = factor if kind in ("multiply", "halve") else rng.randint(2, bounds.operand)
        sentence, lines = sentence.replace("{n}", str(n)), []
    if kind == "halve" and value % 2:
        return None
    symbol = {"gain": "+", "pack": "+", "loss": "-", "share": "-", "multiply": "*", "halve": "/"}[
        kind
    ]
    result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[symbol]
    if not 1 <= result <= limit:
        return None
    return sentence, [*lines, f"{value}{symbol}{n}={result}"], result


def make_question(
    rng: random.Random,
    group: str = "seen",
    bounds: NumberRange = TASK_RANGE,
    steps: int | None = None,
) -> dict:
    """One question as a row: `question`, `answer`, `solution`, `steps`, `skeleton`, `new_skeleton`.

    `group` is "seen" or "held_out"; `steps` fixes the number of equation lines (otherwise all are equally likely).
    """
    steps = rng.choice(STEPS) if steps is None else steps
    filled = None
    while filled is None:
        _, skeleton = rng.choice(_by_steps()[group, steps])
        filled = _fill(skeleton, rng, bounds)
    theme = THEMES[skeleton.theme]
    story = Skeleton(
        skeleton.theme,
        skeleton.order,
        skeleton.opening.replace("{n}", str(filled["start"])),
        tuple(
            (kind, sentence, factor)
            for (kind, _, factor), sentence in zip(skeleton.parts, filled["sentences"])
        ),
        skeleton.question,
    )
    text = story.text.replace("{name}", rng.choice(NAMES)).replace(
        "{item}", rng.choice(theme.items)
    )
    answer = str(filled["result"])
    return {
        "question": text[0].upper() + text[1:],
        "answer": answer,
        "solution": "\n".join([*filled["lines"], f"Final answer: {answer}"]),
        "steps": steps,
        "skeleton": skeleton.text,
        "new_skeleton": group == "held_out",
    }


@functools.lru_cache(maxsize=1)
def _by_steps() -> dict[tuple[str, int], list[tuple[int, Skeleton]]]:
    return {
        (group, steps): [pair for pair in pairs if pair[0] == steps]
        for group, pairs in skeletons().items()
        for steps in STEPS
    }


@functools.lru_cache(maxsize=1)
def all_splits() -> dict[str, list[dict]]:
    """The fixed splits: train has seen skeletons only, validation and test 30 % held-out ones; no question twice."""
    rng, known = random.Random(19733), set()
    splits: dict[str, list[dict]] = {}
    for split, size in SPLIT_SIZES.items():
        rows: list[dict] = []
        while len(rows) < size:
            held_out = split != "train" and len(rows) % 10 < 3
            row = make_question(
                rng, "held_out" if held_out else "seen", steps=STEPS[len(rows) // 10 % len(STEPS)]
            )
            if row["question"] not in known:
                known.add(row["question"])
                rows.append({"id": f"word_problems-{split}-{len(rows):04d}", **row})
        splits[split] = rows
    return splits


class WordProblems(NumberTask):
    """The embedded task. Its prompt is short: M0 has 0.9 M parameters and was trained with just this text."""

    name = "word_problems"

    def prompt(self, row: dict) -> str:
        """The question between "Question:" and "Solution:"."""
        return f"Question: {row['question']}\nSolution:"

    def load(self, split: str, data: str | None = None) -> Dataset:
        """Rows of one fixed split: `id`, `question`, `answer`, `solution`, `steps`, `skeleton`, `new_skeleton`.

        Raises `UserError` for another split and for `data`, which this task does not read.
        """
        from datasets import Dataset

        if data:
            raise UserError(
                "The task word_problems comes with the package and reads no data; leave out --data, or "
                "take the task that the data belong to (--task gsm8k, --task jsonl, ...)."
            )
        if split not in SPLIT_SIZES:
            raise UserError(
                f"There is no split {split!r} of word_problems; take one of {', '.join(SPLIT_SIZES)}."
            )
        return Dataset.from_list(all_splits()[split])


TASK = WordProblems()
