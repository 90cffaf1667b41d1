"""Can a model judge its own answers? Then it could reward itself (Yuan et al. 2024, arXiv 2401.10020).

    python scripts/check_judges.py runs/study/comparison/irpo/seed_0 runs/smollm2_135m_svamp

For every question with right and wrong completions of M_0: how often does a right one score above a wrong one of the
same question (ties count half)? 0.5 is a coin. Judges: the model's own log-probability of the completion, per token and
as a sum; its length; and the model asked in words, by the log-odds of "Yes" against "No". Writes figures/judges.csv
(columns `model`, `run`, `judge`, `value`, `low`, `high`, `n` questions) and judges.json beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pandas
import torch
from datasets import load_from_disk

from irpo_utils import evaluation, iteration, models, sampling, tasks
from irpo_utils.__main__ import calm_libraries

ASKED = (
    "Is the final answer of this solution right?\n\n{question}\n\nProposed solution:\n{completion}\n\n"
    "Answer with one word, Yes or No."
)
SCORES = {
    "log-probability per token": lambda row: row["logprob"] / row["n_tokens"],
    "log-probability": lambda row: row["logprob"],
    "length": lambda row: row["n_tokens"],
}


def within_question(rows: list[dict], scores: list[float]) -> list[float]:
    """For each question with both kinds: share of (right, wrong) pairs in which the right one scores higher."""
    groups: dict[str, tuple[list, list]] = {}
    for row, score in zip(rows, scores, strict=True):
        groups.setdefault(row["id"], ([], []))[not row["correct"]].append(score)
    return [
        sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))
        for right, wrong in groups.values()
        if right and wrong
    ]


@torch.no_grad()
def asked_in_words(model, tokenizer, rows: list[dict]) -> list[float]:
    """log P(Yes) - log P(No) as the first word of the model's answer, one completion after the other."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    scores = []
    for row in rows:
        prompt = sampling.render_prompt(
            tokenizer, ASKED.format(question=row["question"], completion=row["completion"])
        )
        ids = torch.tensor(
            [tokenizer.encode(prompt, add_special_tokens=False)], device=model.device
        )
        logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        scores.append((logits[yes] - logits[no]).item())
    return scores


def check(run: Path, most: int) -> list[dict]:
    """Rows for one run: its M_0 as judge of what it wrote for training questions."""
    p = iteration.load_profile(run)
    graded = load_from_disk(str(run / "iteration_0" / "graded")).select_columns(
        ["id", "completion", "correct", "logprob", "n_tokens"]
    )
    questions = {row["id"]: row["question"] for row in tasks.get(p.task).load("train", p.data)}
    rows = [{**row, "question": questions[row["id"]]} for row in graded]
    both = {row["id"] for row in rows if row["correct"]} & {
        row["id"] for row in rows if not row["correct"]
    }
    chosen = set(random.Random(0).sample(sorted(both), min(most, len(both))))
    rows = [row for row in rows if row["id"] in chosen]
    model, tokenizer = iteration.load_model(p)
    models.set_adapter(model, run / "iteration_0" / "adapter" if p.start else None)
    judged = {name: [score(row) for row in rows] for name, score in SCORES.items()}
    judged["asked in words"] = asked_in_words(model.eval(), tokenizer, rows)
    return [
        {
            "model": p.model,
            "run": run.name,
            "judge": name,
            **dict(
                zip(
                    ("value", "low", "high"),
                    evaluation.bootstrap_mean(within_question(rows, scores)),
                )
            ),
            "n": len(chosen),
        }
        for name, scores in judged.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="run directories, of whose M_0 the completions are judged",
    )
    parser.add_argument(
        "--questions", type=int, default=200, help="most questions per run (default 200)"
    )
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    calm_libraries()
    table = pandas.DataFrame([row for run in options.runs for row in check(run, options.questions)])
    table.to_csv(options.out / "judges.csv", index=False)
    (options.out / "judges.json").write_text(json.dumps(iteration.environment(), indent=1) + "\n")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
