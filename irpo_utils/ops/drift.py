"""How far M_t moved from M_{t-1}, after training and during it: what announces a collapse."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback

from irpo_utils import evaluation, iteration, logprobs

KL_QUESTIONS = 256  # completions for the KL to the previous model, one per question
PAIRS = 128  # pairs whose log-probabilities are compared


def measure(t: int, stages: iteration.Stages) -> Dataset:
    """Log-probabilities under M_t and M_{t-1} of M_t's samples and of the pairs it was trained on.

    Columns: `kind` (sample, chosen, rejected), `logp`, `logp_previous` (nats), `n_tokens`. Both
    columns come from `logprobs.score`, so that a model against itself gives exactly 0.
    """
    use, adapter = stages.engine.use, stages.keep.adapter
    use(stages.model, adapter(t))
    questions = iteration.first(stages.eval_questions, KL_QUESTIONS)
    drawn = stages.draw(questions, n=1, temperature=1.0, seed=stages.seed(t, 5))
    rows = [("sample", row["prompt_ids"], row["completion_ids"]) for row in drawn]
    if stages.history:
        pairs = iteration.first(stages.history[-1], PAIRS)
        for side in ("chosen", "rejected"):
            rows += [(side, row["prompt_ids"], row[f"{side}_ids"]) for row in pairs]
    kinds, prompts, responses = zip(*rows, strict=True)
    score = functools.partial(logprobs.score, stages.model, stages.tokenizer, prompts, responses)
    columns = {"kind": kinds, "logp": score(), "n_tokens": list(map(len, responses))}
    use(stages.model, adapter(t - 1))
    columns["logp_previous"] = score()
    use(stages.model, adapter(t))
    return Dataset.from_dict(columns)


def rows(drift: Dataset) -> list[dict]:
    """Metrics: KL(M_t || M_{t-1}) per completion (nats), log-probabilities of pairs per token."""
    table = drift.to_pandas()
    samples = table[table.kind == "sample"]
    found = [evaluation.bootstrap_row("kl_to_previous", samples.logp - samples.logp_previous)]
    for side in ("chosen", "rejected"):
        part = table[table.kind == side]
        for name, logp in (("_before", part.logp_previous), ("", part.logp)):
            if len(part):
                value = float((logp / part.n_tokens).mean())
                row = {"metric": f"{side}_logp_per_token{name}", "value": value, "n": len(part)}
                found.append(row)
    return found


class Probe(TrainerCallback):
    """Log-probabilities of fixed pairs during training (the paper's figures 2 to 4).

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
