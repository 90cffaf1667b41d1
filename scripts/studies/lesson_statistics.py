"""Pure functions behind the lesson: intervals paired by seed and question, verdicts on claims,
saturation of DPO.

Everything here works on plain lists and dicts; the records come from `figures/*_runs.jsonl`.
"""

from __future__ import annotations

import math

from studies.significance import seed_and_question_interval

VERDICTS = ("agrees", "disagrees", "rules out an effect of the paper's size", "not resolved")
SATURATED = 0.1  # a pair is past saturation when its DPO gradient has fallen below a tenth of beta


def per_question(digits: str, of: int = 1) -> list[float]:
    """Share of correct completions per question, from a string with one digit (base 36) per
    question."""
    return [int(digit, 36) / of for digit in digits]


def paired_interval(a: dict[int, list[float]], b: dict[int, list[float]]) -> dict:
    """What `b` gains over `a` in percentage points; both map a seed to one value per question.

    Only seeds that both have are used, and each question is compared with itself. Keys: `points`,
    `low`, `high` (95 %, for the mean over seeds and questions), `seeds`, `seeds_above_zero`.
    """
    seeds = sorted(set(a) & set(b))
    gain = [[y - x for x, y in zip(a[seed], b[seed], strict=True)] for seed in seeds]
    points, low, high = (100 * value for value in seed_and_question_interval(gain))
    return {
        "points": points,
        "low": low,
        "high": high,
        "seeds": len(seeds),
        "seeds_above_zero": sum(sum(row) > 0 for row in gain),
    }


def verdict(low: float, high: float, paper: float) -> str:
    """What an interval of a difference says of the paper's difference, both in points.

    `paper` is not 0; where the paper gives a direction without a size, it is infinite. `agrees`:
    the interval excludes 0 on the paper's side. `disagrees`: it excludes 0 on the other side. If it
    includes 0, it either rules out a difference as large as the paper's or resolves nothing.
    """
    if paper < 0:
        low, high, paper = -high, -low, -paper
    if low > 0:
        return VERDICTS[0]
    if high < 0:
        return VERDICTS[1]
    return VERDICTS[2] if high < paper < math.inf else VERDICTS[3]


def margins(now: dict, before: dict) -> list[float]:
    """How much training raised chosen over rejected completions, nats per pair.

    Both are entries of one run with the log-probabilities of the same pairs.
    """
    sides = (now["chosen"], before["chosen"], now["rejected"], before["rejected"])
    return [(c1 - c0) - (r1 - r0) for c1, c0, r1, r0 in zip(*sides, strict=True)]


def gradient_weight(margin: float, beta: float) -> float:
    """Weight of a pair in the DPO gradient relative to its value at the start: 2 σ(-β margin), from
    1 towards 0.

    >>> gradient_weight(0.0, 0.1)
    1.0
    """
    return 2 / (1 + math.exp(min(700.0, beta * margin)))


def saturated(margin: float, beta: float) -> float:
    """1.0 where the weight of a pair in the DPO gradient has fallen below `SATURATED`, else 0.0."""
    return float(gradient_weight(margin, beta) < SATURATED)
