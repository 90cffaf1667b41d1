"""Check claims about the first seed model with the records that are in `figures/`, paired by seed
and question.

    python scripts/lesson_claims.py      # writes figures/lesson_claims.csv in a minute

Each row compares two methods (or two iterations) on the same test questions and seeds. `points` is
what `b` gains over `a` in greedy accuracy. `paper` is the difference in table 1 of the paper
(GSM8K). Where the paper gives no number for a claim of this direction, `paper` is infinite with
its sign, and the verdict is about the direction alone. Where there is no claim, both are empty.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

from studies import lesson_statistics as lesson
from studies.significance import mcnemar, t_quantile

FIGURES = Path(__file__).resolve().parents[1] / "figures"
COLUMNS = (
    "claim",
    "a",
    "b",
    "points",
    "low",
    "high",
    "seeds",
    "seeds_above_zero",
    "paper",
    "verdict",
    "source",
)
# claim, study, a = (trial, iteration), b = (trial, iteration), the paper's difference
CLAIMS = [
    *(
        (f"Iterative RPO gains in iteration {t}", "comparison", ("irpo", t - 1), ("irpo", t), gain)
        for t, gain in ((1, 17.5), (2, 4.9), (3, 3.1), (4, 0.5))
    ),
    (
        "a second iteration is worth more than twice the pairs",
        "comparison",
        ("irpo_2x", 1),
        ("irpo", 2),
        3.2,
    ),
    *(
        (
            f"the NLL term helps (M{t}, learning rate of Iterative RPO)",
            "comparison",
            ("iterative_dpo", t),
            ("irpo", t),
            11.3 if t == 1 else math.inf,
        )
        for t in (1, 2, 3, 4)
    ),
    *(
        (
            f"Iterative RPO beats rejection-sampling SFT (M{t}, 600 questions)",
            "comparison",
            ("star", t),
            ("irpo", t),
            7.9 if t == 1 else math.inf,
        )
        for t in (1, 2, 3, 4)
    ),
    *(
        (
            f"Iterative RPO beats rejection-sampling SFT (M{t}, {title})",
            "regimes",
            (f"star_{name}", t),
            (f"irpo_{name}", t),
            7.9 if t == 1 else math.inf,
        )
        for name, title in (
            ("usual", "300 questions"),
            ("fewsamples", "300 questions, few samples"),
            ("hot", "300 questions, hot sampling"),
            ("fewquestions", "150 questions"),
        )
        for t in (1, 2)
    ),
    (
        "Iterative RPO beats SFT on gold solutions (M1)",
        "comparison",
        ("sft_gold", 1),
        ("irpo", 1),
        9.6,
    ),
    (
        "the start from rejection-sampling SFT makes no difference (M1)",
        "comparison",
        ("irpo_from_sft", 1),
        ("irpo", 1),
        None,
    ),
]
FALL = 3.0  # points: a fall that is reported per seed


def correctness(study: str) -> dict[tuple[str, int], dict[int, list[float]]]:
    """(trial, iteration) -> seed -> greedy correctness per question."""
    found: dict[tuple[str, int], dict[int, list[float]]] = {}
    for line in (FIGURES / f"{study}_runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        for t, answers in run["answers"].items():
            of_trial = found.setdefault((run["trial"], int(t)), {})
            of_trial[run["seed"]] = lesson.per_question(answers["greedy"])
    return found


def rows() -> list[dict]:
    """All claims that the records can answer."""
    studies = {name: correctness(name) for name in ("comparison", "regimes")}
    made = []
    for claim, study, a, b, paper in CLAIMS:
        gain = lesson.paired_interval(studies[study][a], studies[study][b])
        made.append(
            {
                "claim": claim,
                "a": f"{a[0]} M{a[1]}",
                "b": f"{b[0]} M{b[1]}",
                "paper": paper,
                "verdict": lesson.verdict(gain["low"], gain["high"], paper) if paper else "",
                "source": f"{study}_runs.jsonl",
                **gain,
            }
        )
    return made + headline(studies["comparison"]) + falls(studies["comparison"])


def headline(found: dict) -> list[dict]:
    """The learning rate of the comparison against that of the headline figure, paired by seed.

    The records of the headline have no answers per question, so the intervals are over seeds only.
    """
    with (FIGURES / "accuracy_per_iteration.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["metric"] == "greedy"]
    made = []
    for t in (1, 2, 3, 4):
        slow = {
            int(row["seed"]): float(row["value"]) for row in table if row["iteration"] == str(t)
        }
        fast = {seed: sum(digits) / len(digits) for seed, digits in found["irpo", t].items()}
        gain = [100 * (fast[seed] - slow[seed]) for seed in sorted(set(slow) & set(fast))]
        n, mean = len(gain), sum(gain) / len(gain)
        half = t_quantile(n - 1) * statistics.stdev(gain) / n**0.5
        made.append(
            {
                "claim": f"Iterative RPO gains from 1e-4 in place of the headline's 2e-5 (M{t})",
                "a": f"irpo M{t} at 2e-5",
                "b": f"irpo M{t} at 1e-4",
                "paper": None,
                "verdict": "",
                "source": "accuracy_per_iteration.csv, comparison_runs.jsonl",
                "points": mean,
                "low": mean - half,
                "high": mean + half,
                "seeds": n,
                "seeds_above_zero": sum(value > 0 for value in gain),
            }
        )
    return made


def falls(found: dict) -> list[dict]:
    """Per method: in how many seeds M4 is below M3 by more than chance (McNemar's test) and by at
    least `FALL` points."""
    made = []
    for trial in sorted({trial for trial, t in found if t == 4}):
        before, after = found[trial, 3], found[trial, 4]
        fallen = 0
        for seed in set(before) & set(after):
            loss = 100 * (sum(before[seed]) - sum(after[seed])) / len(before[seed])
            fallen += loss >= FALL and mcnemar(before[seed], after[seed])["p"] < 0.05
        made.append(
            {
                "claim": f"M4 falls by {FALL:g} points or more: {fallen} of {len(before)} seeds",
                "a": f"{trial} M3",
                "b": f"{trial} M4",
                "paper": None,
                "verdict": "",
                "source": "comparison_runs.jsonl",
                **lesson.paired_interval(before, after),
            }
        )
    return made


def main() -> None:
    """Compute all claims, print them, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FIGURES / "lesson_claims.csv")
    args = parser.parse_args()
    made = rows()
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in made:
            numbers = {name: f"{row[name]:.2f}" for name in ("points", "low", "high")}
            writer.writerow(row | numbers)
            print(
                f"{row['points']:+6.1f} ({row['low']:+.1f} to {row['high']:+.1f}), above zero in "
                f"{row['seeds_above_zero']} of {row['seeds']} seeds, paper {row['paper']}: "
                f"{row['claim']} [{row['verdict']}]"
            )


if __name__ == "__main__":
    main()
