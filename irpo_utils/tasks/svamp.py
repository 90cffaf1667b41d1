"""SVAMP: 1,000 short word problems of one or two steps (Patel et al. 2021, ChilleD/SVAMP).

One raw row (files test.jsonl, and train.jsonl if there):

    {"ID": "chal-777", "Body": "There are 87 oranges and 290 bananas in Philip's collection. ...",
     "Question": "How big is each group of bananas?", "Answer": 145.0, ...}

SVAMP is a test set without a training split. All rows are shuffled with a fixed seed and split
700/100/200: an accuracy on these 200 is no result on "the SVAMP test". The prompt is GSM8K's.
"""

import random
from pathlib import Path

from irpo_utils.tasks import numbers
from irpo_utils.tasks.files import SEED, need, without
from irpo_utils.tasks.gsm8k import GSM8K


class SVAMP(GSM8K):
    """Elementary word problems with integer answers and no worked solutions."""

    name = "svamp"
    hub, config = "ChilleD/SVAMP", None
    expected = "`ID`, `Body`, `Question` (text) and `Answer` (a number)"

    def row(self, raw: dict) -> dict:
        """Body and question as one text; a body without a full stop gets a comma."""
        body, question = raw["Body"].strip(), raw["Question"].strip()
        answer = numbers.parse(str(raw["Answer"]))
        need(body and question, "`Body` or `Question` is empty")
        need(answer is not None, "`Answer` is not a number")
        text = f"{body}{' ' if body[-1] in '.!?,' else ', '}{question}"
        return {"id": f"svamp-{raw['ID']}", "question": text, "answer": numbers.show(answer)}

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        """70, 10 and 20 % of all rows, sorted by id and shuffled with a fixed seed."""
        rows = without(self.read(path, "train", optional=True) + self.read(path, "test"))
        rows.sort(key=lambda row: row["id"])
        random.Random(SEED).shuffle(rows)
        first, second = len(rows) * 7 // 10, len(rows) * 8 // 10
        return {"train": rows[:first], "validation": rows[first:second], "test": rows[second:]}


TASK = SVAMP()
