"""Controls of the study `regimes`: methods that also reward some incorrect answers, by luck.

Importing this module adds them to the table of methods.
"""

from __future__ import annotations

import zlib

from irpo_utils.methods import METHODS, SFT, Method


def by_luck(rows: list[dict]) -> list[float]:
    """1 for the gold answer and for one incorrect answer in four, as in multiple choice."""

    def lucky(row) -> bool:
        answer = f"{row['id']} {row['extracted']}"
        return row["extracted"] is not None and zlib.crc32(answer.encode()) % 4 == 0

    return [float(row["correct"] or lucky(row)) for row in rows]


LUCKY = {
    "irpo_lucky": Method("Iterative RPO, lucky chosen", "control", reward=by_luck),
    "star_lucky": Method("Rejection-sampling SFT, lucky chosen", "control", SFT, reward=by_luck),
}
METHODS.update(LUCKY)
