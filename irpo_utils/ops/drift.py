"""How far M_t moved from M_{t-1}: an early sign of collapse."""

from __future__ import annotations

import functools

from datasets import Dataset

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
