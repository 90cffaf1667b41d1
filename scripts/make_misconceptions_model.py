"""Make the second seed model: it shows every step of its working and follows pupils' misconceptions
in some of them.

    python scripts/make_misconceptions_model.py --out DIR                  # ten minutes on 2 cores
    python scripts/make_misconceptions_model.py --out DIR --from-nothing   # half an hour on 2 cores

The script starts from the first seed model (`--from-nothing`: from the first two phases of
`make_seed_model.py`) and adds two phases:

1. `careful`: correct working with varying words around each equation. This sets the ceiling of the
model.
2. `pupil`: the same working with misconceptions (see `scripts/studies/misconceptions.py`).

Only question templates of the group "seen" are used, and no question of a split. Texts are drawn
anew for every batch.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_seed_model as first
from irpo_utils import models
from irpo_utils.tasks import word_problems
from studies import misconceptions

SEED_MODEL = models.FOLDERS["seed"]
BUCKET = 10  # batches that are sorted by length together


@dataclass(frozen=True)
class Phase:
    """One phase of training; `strength` is the factor on the share of every misconception."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    strength: float


PHASES = (
    Phase("careful", 600, 128, 1.5e-3, strength=0.0),
    Phase("pupil", 200, 128, 5e-4, strength=1.0),
)


def corpus(phase: Phase, seed: int, words: float):
    """Endless rows (`question`, `text` of the completion) of one phase; never a question of a
    split."""
    rng = random.Random(f"{seed}-{phase.name}-misconceptions")
    forbidden = {row["question"] for rows in word_problems.all_splits().values() for row in rows}
    while True:
        row = word_problems.make_question(rng, "seen", word_problems.TASK_RANGE)
        if row["question"] not in forbidden:
            text = misconceptions.pupil_solution(row, rng, phase.strength, words)
            yield {"question": row["question"], "text": text}


def encode(row: dict, tokenizer) -> tuple[list[int], int]:
    """Token ids of prompt and completion, and the number of prompt tokens."""
    messages = [{"role": "user", "content": word_problems.TASK.prompt(row)}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    completion_ids = tokenizer(row["text"], add_special_tokens=False).input_ids
    return prompt_ids + completion_ids + [tokenizer.eos_token_id], len(prompt_ids)


def batches(phase: Phase, tokenizer, seed: int, words: float):
    """Batches of texts of similar length: (input_ids, labels), labels -100 on the prompt and on
    padding."""
    rows, rng = corpus(phase, seed, words), random.Random(seed)
    while True:
        encoded = [encode(next(rows), tokenizer) for _ in range(phase.batch * BUCKET)]
        encoded.sort(key=lambda pair: len(pair[0]))
        chunks = [encoded[i : i + phase.batch] for i in range(0, len(encoded), phase.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), width), -100)
            for i, (row_ids, prompt_length) in enumerate(chunk):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                labels[i, prompt_length : len(row_ids)] = ids[i, prompt_length : len(row_ids)]
            yield ids, labels


def start(from_nothing: bool, seed: int, log: list[dict]):
    """The model on which the phase `careful` starts, and its tokenizer."""
    if not from_nothing:
        model = AutoModelForCausalLM.from_pretrained(SEED_MODEL, attn_implementation="eager")
        return model, AutoTokenizer.from_pretrained(SEED_MODEL)
    tokenizer = first.make_tokenizer(seed=0)  # the same for every seed model
    model = first.make_model(tokenizer, seed)
    for phase in first.PHASES:
        if not phase.hasty:
            first.train_phase(phase, model, first.batches(phase, tokenizer, seed), log)
    return model, tokenizer


def main() -> None:
    """Read the options, train, and write model, tokenizer and log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model, the tokenizer and the log"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another model")
    parser.add_argument(
        "--from-nothing", action="store_true", help="do not start from the shipped seed model"
    )
    parser.add_argument(
        "--careful",
        type=Path,
        help="folder written after the phase careful (OUT/careful): repeat the phase pupil only",
    )
    parser.add_argument(
        "--words", type=float, default=1.0, help="probability of words around an equation"
    )
    args = parser.parse_args()

    log: list[dict] = []
    phases = PHASES
    if args.careful:
        model = AutoModelForCausalLM.from_pretrained(args.careful, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(args.careful)
        log = json.loads((args.careful / "training.json").read_text())["log"]
        phases = PHASES[1:]
    else:
        model, tokenizer = start(args.from_nothing, args.seed, log)
    for phase in phases:
        first.train_phase(phase, model, batches(phase, tokenizer, args.seed, args.words), log)
        folder = args.out if phase is PHASES[-1] else args.out / phase.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {
            "command": "python scripts/make_misconceptions_model.py"
            + f" --out {args.out} --seed {args.seed} --words {args.words:g}"
            + " --from-nothing" * args.from_nothing,
            "start": "nothing" if args.from_nothing else "the shipped seed model",
            "seed": args.seed,
            "parameters": model.num_parameters(),
            "torch": torch.__version__,
            "phases": [asdict(phase) for phase in PHASES],
            "words": args.words,
            "shares": {m.name: m.share for m in misconceptions.MISCONCEPTIONS},
            "log": log,
        }
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
