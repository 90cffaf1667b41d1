"""What several processes do in test_processes.py: complete questions, then train on pairs.

    torchrun --nproc_per_node 2 shared_program.py PAIRS OUT [split]

OUT gets the results of each process as JSON, and the adapter.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from cluster import fsdp, shared
from irpo_utils import engines, profiles, sampling, tasks, training
from irpo_utils.scale import processes


def complete(engine, model, tokenizer, n_questions: int) -> list:
    """The completions of a few questions, three each."""
    task = tasks.get("word_problems")
    questions = task.load("test").select(range(n_questions))
    samples = sampling.sample(
        model, tokenizer, questions, task, 3, max_new_tokens=12, progress=False, engine=engine
    )
    return [list(samples["id"]), list(samples["completion_ids"])]


def train(engine, model, tokenizer, pairs: str, **options) -> list[dict]:
    """The log of steps with 8, 8, 8 and 5 pairs."""
    log = training.train(
        model,
        tokenizer,
        load_from_disk(pairs).select(range(29)),
        learning_rate=1e-3,
        batch_size=8,
        micro_batch_size=2,
        num_train_epochs=1,
        seed=3,
        disable_tqdm=True,
        trainer=engine.trainer(model),
        **options,
    )
    return log.to_list()


def main(pairs: str, out: str, *words: str) -> None:
    torch.set_num_threads(1)
    split = "split" in words
    engine = (fsdp.ShardedEngine if split else shared.SharedEngine)(engines.Engine())
    profile = profiles.get("smoke", shard=split, engine="vllm" if split else "plain")
    model, tokenizer = engine.load(profile)
    result = {"split": hasattr(next(model.parameters()), "device_mesh")}
    if not split:
        result["five"] = complete(engine, model, tokenizer, 5)
        result["one"] = complete(engine, model, tokenizer, 1)
    result["log"] = train(engine, model, tokenizer, pairs, gradient_checkpointing=split)
    adapter = engine.state_dict(model)
    Path(out).mkdir(exist_ok=True)
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    if processes.is_first():
        model.save_pretrained(out, state_dict=adapter, save_embedding_layers=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
