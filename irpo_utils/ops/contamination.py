"""Whether evaluation questions are among the training questions, checked before every run.

Three nets, from fine to coarse: the same text up to spacing; the same letters, digits and signs,
whatever the case and punctuation; and a run of 13 words in common (Brown et al. 2020, GPT-3,
appendix C). The first two are the same question. The third is a hint: templates also share words.

No such check can find what a model saw before it came here. Notebook 07b shows how to tell.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field

from irpo_utils import UserError
from irpo_utils.tasks.files import normalise

N_GRAM = 13  # words
SHOWN, KEPT = 3, 20  # examples in an error message, and on record


@dataclass
class Overlap:
    """Counts of evaluation questions, out of `questions`, that training also has."""

    questions: int
    exact: int = 0
    normalised: int = 0  # includes the exact ones
    train_rows: int = 0  # training questions that are evaluation questions
    n_gram: int = 0  # evaluation questions that share 13 words in a row, the same ones included
    examples: list[dict] = field(default_factory=list)  # `train`, `evaluation`: ids; `question`


def find(train, evaluation) -> Overlap:
    """The overlap of two sets of questions (rows with `id` and `question`)."""
    train, evaluation = list(train), list(evaluation)
    exact = {"".join(row["question"].split()) for row in train}
    known = {normalise(row["question"]): row["id"] for row in train}
    grams = {gram for row in train for gram in n_grams(row["question"])}
    asked = {normalise(row["question"]) for row in evaluation}
    examples = [
        {"train": known[form], "evaluation": row["id"], "question": row["question"]}
        for row in evaluation
        if (form := normalise(row["question"])) in known
    ]
    return Overlap(
        questions=len(evaluation),
        exact=sum("".join(row["question"].split()) in exact for row in evaluation),
        normalised=len(examples),
        train_rows=sum(normalise(row["question"]) in asked for row in train),
        n_gram=sum(not grams.isdisjoint(n_grams(row["question"])) for row in evaluation),
        examples=examples[:KEPT],
    )


def check(train, evaluation, allow: bool = False) -> Overlap:
    """`find`; the same question on both sides is a `UserError` with examples, unless `allow`."""
    overlap = find(train, evaluation)
    if overlap.normalised and not allow:
        examples = "; ".join(
            f'{e["train"]} is {e["evaluation"]}, "{textwrap.shorten(e["question"], 80)}"'
            for e in overlap.examples[:SHOWN]
        )
        raise UserError(
            f"{overlap.normalised} of {overlap.questions} evaluation questions are also training "
            f"questions ({overlap.exact} word for word): {examples}. Accuracy would partly measure "
            f"memory. Remove these {overlap.train_rows} rows from the training file or the data of "
            "--start, evaluate on another set, or add --allow-overlap true to continue anyway."
        )
    return overlap


def describe(overlap: Overlap) -> str:
    """One line for the screen."""
    same = f"{overlap.normalised} evaluation questions ARE training questions, as allowed; "
    share = overlap.n_gram / max(1, overlap.questions)
    return (same if overlap.normalised else "") + (
        f"{overlap.n_gram} of {overlap.questions} evaluation questions share {N_GRAM} words in a "
        f"row with a training question ({share:.1%})."
    )


def n_grams(question: str, n: int = N_GRAM) -> list[tuple[str, ...]]:
    """Runs of n words (letters and digits, case folded); none for a shorter question."""
    words = re.findall(r"[^\W_]+", question.casefold())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
