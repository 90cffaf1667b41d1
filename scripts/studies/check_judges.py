"""Can a model judge its own completions, and so reward itself (Yuan et al. 2024, 2401.10020)?

    python scripts/studies/check_judges.py runs/study/comparison/irpo/seed_0 runs/smollm2_135m_svamp

For every question with correct and incorrect completions of M_0: how often does a correct one score
above an incorrect one of the same question (ties count half)? 0.5 is chance. Judges: the model's
log-probability of the completion, per token and as a sum; the length; and the model asked in words,
by the log-odds of "Yes" against "No". Writes figures/judges.csv (columns `model`, `run`, `judge`,
`value`, `low`, `high`, `n` questions) and judges.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import pandas
import torch
from datasets import load_from_disk

sys.path.append(str(Path(__file__).resolve().parents[1]))
from irpo_utils import evaluation, models, sampling, tasks
from studies import api

PROMPT = (
    "Is the final answer of this solution right?\n\n{question}\n\nProposed solution:\n{completion}"
    "\n\nAnswer with one word, Yes or No."
)


def within_question(rows: list[dict], scores: list[float]) -> list[float]:
    """For each question with both kinds: share of pairs in which the correct one scores higher."""
    groups: dict[str, dict[bool, list[float]]] = {}
    for row, score in zip(rows, scores, strict=True):
        groups.setdefault(row["id"], {True: [], False: []})[row["correct"]].append(score)
    shares = []
    for group in groups.values():
        pairs = [(a, b) for a in group[True] for b in group[False]]
        if pairs:
            shares.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    return shares


@torch.no_grad()
def ask_in_words(model, tokenizer, rows: list[dict]) -> list[float]:
    """log P(Yes) - log P(No) as the first word of the model's answer, for each completion."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    scores = []
    for row in rows:
        text = PROMPT.format(question=row["question"], completion=row["completion"])
        prompt = sampling.render_prompt(tokenizer, text)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        inputs = torch.tensor([ids], device=model.device)  # (1, tokens)
        logits = model(input_ids=inputs, logits_to_keep=1).logits[0, -1].float()  # (vocabulary,)
        scores.append((logits[yes] - logits[no]).item())
    return scores


def check(run: Path, most: int) -> list[dict]:
    """Rows for the M_0 of one run, on its completions of at most `most` training questions."""
    profile = api.load_profile(run)
    names = ["id", "completion", "correct", "logprob", "n_tokens"]
    graded = load_from_disk(str(run / "iteration_0" / "graded")).select_columns(names)
    train = tasks.get(profile.task).load("train", profile.data)
    questions = {row["id"]: row["question"] for row in train}
    rows = [{**row, "question": questions[row["id"]]} for row in graded]
    correct, incorrect = ({row["id"] for row in rows if row["correct"] is c} for c in (True, False))
    both = sorted(correct & incorrect)
    selected = set(random.Random(0).sample(both, min(most, len(both))))
    rows = [row for row in rows if row["id"] in selected]
    model, tokenizer = api.load_model(profile)
    models.set_adapter(model, run / "iteration_0" / "adapter" if profile.start else None)
    judges = {
        "log-probability per token": [row["logprob"] / row["n_tokens"] for row in rows],
        "log-probability": [row["logprob"] for row in rows],
        "length": [row["n_tokens"] for row in rows],
        "asked in words": ask_in_words(model.eval(), tokenizer, rows),
    }
    result = []
    for judge, scores in judges.items():
        value, low, high = evaluation.bootstrap_mean(within_question(rows, scores))
        row = {"model": profile.model, "run": run.name, "judge": judge}
        result.append(row | {"value": value, "low": low, "high": high, "n": len(selected)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run directories with completions of M_0")
    add("--questions", type=int, default=200, help="most questions per run (%(default)s)")
    add("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    api.quiet_libraries()
    table = pandas.DataFrame([row for run in options.runs for row in check(run, options.questions)])
    table.to_csv(options.out / "judges.csv", index=False)
    (options.out / "judges.json").write_text(json.dumps(api.environment(), indent=1) + "\n")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
