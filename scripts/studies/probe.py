"""Log-probabilities of fixed pairs during training (the paper's figures 2 to 4).

Importing this module adds a probe to the training of every run with `--probe` or `--probe-every`.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, load_from_disk
from transformers import TrainerCallback

from irpo_utils import iteration, logprobs
from irpo_utils.ops import trainer
from irpo_utils.ops.drift import PAIRS


class Probe(TrainerCallback):
    """Scores `pairs` before training, every so many steps, and after the last one.

    `rows`: `step`, `logps/chosen`, `logps/rejected` (mean sums, nats), `nll_chosen`, `nll_rejected`
    (nats per token); also written to probe_log.jsonl in the folder of the iteration.
    """

    def __init__(self, pairs: Dataset, tokenizer, every: int, kept: Path | None = None):
        self.pairs, self.tokenizer, self.every, self.rows = pairs, tokenizer, every, []
        self.path = kept.parent / "probe_log.jsonl" if kept else None

    def measure(self, model, step: int) -> None:
        """Add the row of this step."""
        training_mode, row = model.training, {"step": step}
        model.eval()
        for side in ("chosen", "rejected"):
            prompts, responses = list(self.pairs["prompt_ids"]), list(self.pairs[f"{side}_ids"])
            scores = logprobs.score(model, self.tokenizer, prompts, responses)
            per_token = [s / len(r) for s, r in zip(scores, responses, strict=True)]
            row[f"logps/{side}"] = sum(scores) / len(scores)
            row[f"nll_{side}"] = -sum(per_token) / len(per_token)
        model.train(training_mode)
        self.rows = [*(r for r in self.rows if r["step"] < step), row]
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.global_step:
            self.measure(model, 0)
        elif self.path and self.path.exists():  # resumed from a checkpoint
            rows = map(json.loads, self.path.read_text().splitlines())
            self.rows = [row for row in rows if row["step"] <= state.global_step]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


def of_run(stages: iteration.Stages, kept: Path) -> list[Probe]:
    """The probe that the profile asks for, if any: of the pairs `probe`, or of the run's own."""
    p = stages.p
    if not (p.probe or p.probe_every):
        return []
    pairs = load_from_disk(str(Path(p.probe).expanduser())) if p.probe else stages.history[-1]
    return [Probe(iteration.first(pairs, PAIRS), stages.tokenizer, p.probe_every or 10**9, kept)]


trainer.CALLBACKS.append(of_run)
