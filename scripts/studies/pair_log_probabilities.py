"""How DPO, DPO + NLL and SFT move the log-probability of each held-out pair (notebook 04).

    python scripts/studies/pair_log_probabilities.py           # 18 runs, about a minute each
    python scripts/studies/pair_log_probabilities.py --seeds 1 # the first seed alone

Each run is one iteration from M_0 with the profile `cpu`: M_0 answers 400 training questions, and
one epoch of training follows on their pairs. Runs of a seed share these pairs. 256 pairs of
different validation questions, also from M_0, are scored before, during and after training.

Writes figures/pair_log_probabilities_pairs.jsonl (the held-out pairs) and
figures/pair_log_probabilities.jsonl, one line per run: `method`, `learning_rate`, `seed`,
`train_pairs`, `steps`, and for `chosen` and `rejected` a list per step with the log-probability of
each pair (a sum over the completion, nats). A run that is in the file is not made again, so the
same command resumes a study that was stopped. figures/pair_log_probabilities.json has the command,
versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.append(str(Path(__file__).resolve().parents[1]))
from irpo_utils import logprobs, models, pairs, training
from studies import api
from studies.one_model import OneModel

FIGURES = Path(__file__).resolve().parents[2] / "figures"
RUNS = FIGURES / "pair_log_probabilities.jsonl"
HELD_OUT = FIGURES / "pair_log_probabilities_pairs.jsonl"
# alpha and loss of each method
METHODS = {"DPO": (0.0, "dpo_nll"), "DPO + NLL": (1.0, "dpo_nll"), "SFT": (1.0, "sft")}
LEARNING_RATES = (3e-4, 1e-4)
QUESTIONS, HELD_OUT_PAIRS, MEASUREMENTS = 400, 256, 4
SAMPLES_HELD_OUT = 16  # per validation question, so that 256 questions give a pair
COLUMNS = ("id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids")


class PairProbe(TrainerCallback):
    """Log-probabilities of fixed pairs, one list per measurement."""

    def __init__(self, held_out: list[dict], tokenizer):
        self.held_out, self.tokenizer = held_out, tokenizer
        self.rows: dict[str, list] = {"steps": [], "chosen": [], "rejected": []}

    def measure(self, model, step: int) -> None:
        """Score all pairs under the model as it is."""
        training_mode = model.training
        model.eval()
        self.rows["steps"].append(step)
        prompts = [pair["prompt_ids"] for pair in self.held_out]
        for side in ("chosen", "rejected"):
            responses = [pair[f"{side}_ids"] for pair in self.held_out]
            scores = logprobs.score(model, self.tokenizer, prompts, responses)
            self.rows[side].append([round(score, 3) for score in scores])
        model.train(training_mode)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // MEASUREMENTS)
        last = state.global_step == state.max_steps
        near_end = state.max_steps - state.global_step < every
        if last or (state.global_step % every == 0 and not near_end):
            self.measure(model, state.global_step)


class Study(OneModel):
    """M_0 with its engine, and the pairs that it gives."""

    def __init__(self):
        super().__init__()
        self.seed, self.train_pairs = None, None

    def draw_pairs(self, split: str, n_questions: int | None, n: int, k: int, seed: int):
        """At most `k` pairs per question from `n` completions of M_0 for questions of a split."""
        models.set_adapter(self.model, None)
        questions = self.task.load(split).shuffle(seed=seed)
        questions = questions.select(range(n_questions or len(questions)))
        return pairs.build_pairs(self.draw(questions, seed, n), k=k)[0]

    def held_out(self) -> list[dict]:
        """One pair for each of 256 validation questions, from the file if it is there."""
        if not HELD_OUT.exists():
            drawn = self.draw_pairs("validation", None, SAMPLES_HELD_OUT, k=1, seed=0)
            rows = list(drawn.select(range(HELD_OUT_PAIRS)).select_columns(list(COLUMNS)))
            HELD_OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [json.loads(line) for line in HELD_OUT.read_text().splitlines()]

    def run(self, method: str, learning_rate: float, seed: int) -> dict:
        """One training from M_0: a line of the file."""
        if self.seed != seed:
            p = self.profile
            self.train_pairs = self.draw_pairs("train", QUESTIONS, p.n_samples, p.k_pairs, seed)
            self.seed = seed
        models.set_adapter(self.model, None)
        alpha, loss = METHODS[method]
        probe = PairProbe(self.held_out(), self.tokenizer)
        started = time.perf_counter()
        training.train(
            self.model,
            self.tokenizer,
            self.train_pairs,
            alpha,
            self.profile.beta,
            learning_rate,
            loss=loss,
            seed=seed,
            batch_size=self.profile.batch_size,
            trainer=self.engine.trainer(self.model),
            callbacks=[probe],
            disable_tqdm=True,
        )
        settings = {"method": method, "learning_rate": learning_rate, "seed": seed}
        settings |= {"alpha": alpha, "beta": self.profile.beta, "loss": loss}
        settings |= {"train_pairs": len(self.train_pairs)}
        return settings | {"seconds": round(time.perf_counter() - started, 1)} | probe.rows


def finished() -> set[tuple]:
    """(method, learning rate, seed) of the runs in the file."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    rows = map(json.loads, lines)
    return {(row["method"], row["learning_rate"], row["seed"]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [
        (method, rate, seed)
        for seed in range(options.seeds)
        for rate in LEARNING_RATES
        for method in METHODS
    ]
    done = finished()
    todo = [run for run in wanted if run not in done]
    study = Study() if todo else None
    for i, run in enumerate(todo, 1):
        record = study.run(*run)
        with RUNS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{i} of {len(todo)}: {run}, {record['seconds']} s", flush=True)
    if todo:
        RUNS.with_suffix(".json").write_text(json.dumps(api.environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
