"""GSM8K: 8,792 grade-school word problems with worked solutions (Cobbe et al. 2021, openai/gsm8k).

One raw row (files train.jsonl, test.jsonl):

    {"question": "Natalia sold clips to 48 of her friends in April, and then ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n... 72 clips ...\\n#### 72"}

Zero-shot prompt of the paper (appendix B.1). As in the paper 1,000 training questions are held out
for choosing the checkpoint; a fixed seed draws them.
"""

import re
from pathlib import Path

from irpo_utils.tasks import numbers
from irpo_utils.tasks.files import FileTask, hold_out, need, without

PROMPT = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and "
    "when you're ready to answer, please use the format "
    '"Final answer: ..."\nQuestion: {question}\nSolution:'
)


class GSM8K(numbers.NumberTask, FileTask):
    """Grade-school mathematics with integer answers."""

    name = "gsm8k"
    hub, config = "openai/gsm8k", "main"
    expected = '`question` and `answer` (text, the answer ending in "#### NUMBER")'

    def prompt(self, row: dict) -> str:
        return PROMPT.format(question=row["question"])

    def row(self, raw: dict) -> dict:
        """`solution` without calculator marks, ending in the "Final answer:" of the prompt."""
        solution, mark, answer = raw["answer"].rpartition("####")
        answer = answer.strip().replace(",", "")
        need(mark and numbers.parse(answer) is not None, "`answer` does not end in #### NUMBER")
        need(raw["question"].strip(), "`question` is empty")
        solution = f"{re.sub(r'<<.*?>>', '', solution).strip()}\nFinal answer: {answer}"
        return {"question": raw["question"], "answer": answer, "solution": solution}

    def splits(self, path: Path | None) -> dict[str, list[dict]]:
        test = self.read(path, "test")
        train, validation = hold_out(without(self.read(path, "train"), test), 1000)
        return {"train": train, "validation": validation, "test": test}


TASK = GSM8K()
