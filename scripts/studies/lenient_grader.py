"""What a model learns from a strict grader and from two lenient ones (notebook 02).

    python scripts/studies/lenient_grader.py           # 3 seeds, 18 trainings
    python scripts/studies/lenient_grader.py --seeds 1 # the first seed alone

For each seed M_0 answers 300 training questions, eight times each. Each grader grades the *same*
completions, and each gives one M_1, which samples, is graded and gives one M_2. `strict` is the
package's grader. `within 20 %` also accepts a number that is at most 20 % off. `partial credit`
also accepts working without a false equation, whatever the final answer. All three train on at
most 500 pairs per iteration, so that a grader that gives more pairs gets no more steps.

Writes figures/lenient_grader.csv, one line per grader, seed, iteration and validation question:
`greedy` (whether the greedy completion is correct), and of `samples` completions at temperature 1
how many are `correct`, `near` (incorrect, at most 20 % off), `no_working` (no equation) and
`partial` (incorrect, with fewer equations than the gold solution, and at least one). Iteration 0 is
M_0, with the grader "none". The chains of a seed that are in the file are not computed again, so
the same command resumes a study that was stopped. figures/lenient_grader.json has the command,
versions and hardware.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from irpo_utils import grading, models, pairs, training
from studies import api
from studies.one_model import OneModel

RECORDS = Path(__file__).resolve().parents[2] / "figures" / "lenient_grader.csv"
COLUMNS = "grader seed iteration id samples greedy correct near no_working partial".split()
QUESTIONS, PAIRS, VALIDATION_QUESTIONS, ITERATIONS = 300, 500, 200, 2
LEARNING_RATE, TOLERANCE = 1e-4, Fraction(20, 100)
EQUATION = re.compile(r"(-?\d+)([-+*/])(\d+)=(-?\d+)")


def equations(completion: str) -> list[bool]:
    """Whether each equation of the working is true."""
    shown = []
    for left, operator, right, result in EQUATION.findall(completion):
        a, b, c = int(left), int(right), int(result)
        true = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and b * c == a}
        shown.append(true[operator])
    return shown


def is_near(row: dict) -> bool:
    """Whether the extracted number is at most 20 % off."""
    if row["extracted"] is None:
        return False
    gold = Fraction(row["answer"])
    return abs(Fraction(row["extracted"]) - gold) <= TOLERANCE * abs(gold)


def partial_credit(row: dict) -> bool:
    shown = equations(row["completion"])
    return row["correct"] or (bool(shown) and all(shown))


# what each grader rewards, given a row that the package's grader has graded
GRADERS = {
    "strict": lambda row: row["correct"],
    "within 20 %": is_near,
    "partial credit": partial_credit,
}


class Study(OneModel):
    """M_0, its engine and the validation questions."""

    def __init__(self):
        super().__init__()
        self.validation = self.task.load("validation").select(range(VALIDATION_QUESTIONS))

    def train(self, graded, grader: str, seed: int) -> None:
        """Train the model on the pairs that `grader` gives."""
        rewards = [float(GRADERS[grader](row)) for row in graded]
        graded = graded.remove_columns("reward").add_column("reward", rewards)
        p = self.profile
        training.train(
            self.model,
            self.tokenizer,
            pairs.build_pairs(graded, p.k_pairs, max_pairs=PAIRS, seed=seed)[0],
            p.alpha,
            p.beta,
            LEARNING_RATE,
            seed=seed,
            batch_size=p.batch_size,
            trainer=self.engine.trainer(self.model),
            disable_tqdm=True,
        )

    def measure(self, grader: str, seed: int, iteration: int) -> list[dict]:
        """The rows of the file for the model as it is."""
        greedy = self.draw(self.validation, seed, n=1, temperature=0.0)
        sampled = grading.group(self.draw(self.validation, seed, n=self.profile.n_samples))
        rows = []
        for question, first in zip(self.validation, greedy, strict=True):
            completions = sampled[question["id"]]
            steps = len(equations(question["solution"]))
            shown = [len(equations(row["completion"])) for row in completions]
            wrong = [not row["correct"] for row in completions]
            rows.append(
                {
                    "grader": grader,
                    "seed": seed,
                    "iteration": iteration,
                    "id": question["id"],
                    "samples": len(completions),
                    "greedy": int(first["correct"]),
                    "correct": sum(row["correct"] for row in completions),
                    "near": sum(is_near(row) and not row["correct"] for row in completions),
                    "no_working": shown.count(0),
                    "partial": sum(w and 0 < n < steps for w, n in zip(wrong, shown, strict=True)),
                }
            )
        return rows

    def chain(self, grader: str, seed: int) -> list[dict]:
        """M_1 and M_2 of one grader; the completions of M_0 are the same for all graders."""
        models.set_adapter(self.model, None)
        questions = self.task.load("train").shuffle(seed=seed).select(range(QUESTIONS))
        rows = []
        for t in range(1, ITERATIONS + 1):
            graded = self.draw(questions, seed * ITERATIONS + t, n=self.profile.n_samples)
            self.train(graded, grader, seed * ITERATIONS + t)
            rows += self.measure(grader, seed, t)
        return rows

    def start(self, seed: int) -> list[dict]:
        """M_0."""
        models.set_adapter(self.model, None)
        return self.measure("none", seed, 0)


def finished() -> set[tuple]:
    """(grader, seed) of the chains in the file."""
    if not RECORDS.exists():
        return set()
    with RECORDS.open(newline="") as file:
        return {(row["grader"], int(row["seed"])) for row in csv.DictReader(file)}


def append(rows: list[dict]) -> None:
    new = not RECORDS.exists()
    with RECORDS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(grader, seed) for seed in range(options.seeds) for grader in ("none", *GRADERS)]
    todo = [chain for chain in wanted if chain not in finished()]
    study = Study() if todo else None
    for i, (grader, seed) in enumerate(todo, 1):
        started = time.perf_counter()
        append(study.start(seed) if grader == "none" else study.chain(grader, seed))
        seconds = time.perf_counter() - started
        print(f"{i} of {len(todo)}: {grader}, seed {seed}, {seconds:.0f} s", flush=True)
    if todo:
        RECORDS.with_suffix(".json").write_text(json.dumps(api.environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
