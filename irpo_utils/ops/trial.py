"""A trial of a model right after loading: refuse an unusable model before sampling.

A prompt is rendered, a few completions are drawn and scored again one by one with the library's own
attention, and a training step is taken and undone.
"""

from __future__ import annotations

import contextlib
import types

import torch
from datasets import Dataset
from transformers import TrainerCallback

from irpo_utils import UserError, logprobs, methods, models, sampling, training
from irpo_utils.ops import hub
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes

TEXTS = ("2 + 3?", "Mia has 14 shells and finds 5 more. How many shells does she have now?")
TASK = types.SimpleNamespace(prompt=lambda row: row["question"])


def check(model, tokenizer, p: Profile, engine) -> None:
    """Raise `UserError` if the model cannot be sampled from or trained; it stays as it is."""
    kind = model.config.model_type
    advice = "Choose another --model, --optimizer or --lr-scheduler"
    if getattr(model.get_base_model(), "_is_stateful", False):
        advice = f"It keeps a recurrent state instead of a cache of attention. {advice}"
    elif p.engine != "plain":
        advice += ", or try --engine plain"
    check_tokenizer(model, tokenizer, p.model)
    with unchanged(model):
        with explained(f"Models of type {kind} cannot be sampled from here", advice):
            rows = check_sampling(model, tokenizer, None if p.engine == "vllm" else engine)
        if p.iterations and not methods.get(p.method).train:
            with explained(f"Models of type {kind} cannot be trained here", advice):
                check_training(model, tokenizer, p, engine, rows)


def check_tokenizer(model, tokenizer, name: str) -> None:
    """The template has the question and a fixed date; the model has an embedding for each token."""
    fix = f"Correct the chat template in the tokenizer's files of {name}, or choose another --model"
    with explained(f"The chat template of {name} cannot be rendered", fix):
        prompt, _ = models.render_prompt(tokenizer, TEXTS[1]), models.turn_end(tokenizer)
    if TEXTS[1] not in prompt:
        raise UserError(f"The chat template of {name} leaves out the question. {fix}.")
    if "strftime_now(" in models.dated_template(tokenizer):
        raise UserError(
            f"The chat template of {name} prints the date with a computed format, so a run would "
            f"have other prompts tomorrow. {fix}."
        )
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    n_tokens = min(layer.weight.shape[0] for layer in layers)
    used = {"prompt": tokenizer(prompt, add_special_tokens=False).input_ids}
    used |= {"end": models.end_tokens(model, tokenizer), "pad": [tokenizer.pad_token_id]}
    for role, ids in used.items():
        if (largest := max(ids)) >= n_tokens:
            raise UserError(
                f"The {role} token {tokenizer.convert_ids_to_tokens(largest)!r} of {name} has the "
                f"id {largest}, but the model has embeddings for {n_tokens} tokens. Use the "
                "tokenizer that belongs to the model, or another --pad-token."
            )


def check_sampling(model, tokenizer, engine) -> list[dict]:
    """Compare completions in a padded batch with each alone, without cache and our attention.

    engine: draws the completions, on every core; None: a server will, and the model only scores.
    Returns four rows, two for each of `TEXTS`, as `sample` does; `alone`: log-probability (nats).
    """
    if engine is not None:
        cores = torch.get_num_threads() if model.device.type == "cpu" else 1
        questions = [{"id": f"{i}", "question": TEXTS[i % 2]} for i in range(2 * cores)]
        settings = {"task": TASK, "n": 2, "max_new_tokens": 3, "progress": False}
        rows = sampling.sample(model, tokenizer, questions, engine=engine, **settings).to_list()[:4]
    else:
        prompts = [models.render_prompt(tokenizer, text) for text in TEXTS for _ in range(2)]
        ids = tokenizer(prompts, add_special_tokens=False).input_ids
        rows = [{"prompt_ids": row, "completion_ids": row[-3:]} for row in ids]
        for row, score in zip(rows, logprobs.score(model, tokenizer, *columns(rows)), strict=True):
            row["logprob"] = score
    base = model.get_base_model()
    attention = base.config._attn_implementation
    base.set_attn_implementation("eager")
    scores = logprobs.score(model, tokenizer, *columns(rows), batch_size=1)
    base.set_attn_implementation(attention)
    for row, alone in zip(rows, scores, strict=True):
        compare(row["logprob"], alone, model.dtype)
        row["alone"] = alone
    return rows


def check_training(model, tokenizer, p: Profile, engine, rows: list[dict]) -> None:
    """Take one step on two pairs: each text's first completion, and the beginning of its second."""
    prompts, chosen = columns(rows[::2])
    rejected = [ids[:1] for ids in columns(rows[1::2])[1]]
    data = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    pairs = Dataset.from_dict({name: part * processes.count() for name, part in data.items()})
    gradients = Gradients()
    settings = {"trainer": engine.trainer(model), "callbacks": [gradients], "disable_tqdm": True}
    settings |= {"gradient_checkpointing": p.gradient_checkpointing, "batch_size": len(pairs)}
    settings |= {"optim": p.optimizer, "lr_scheduler_type": p.lr_scheduler}
    [log] = training.train(model, tokenizer, pairs, **settings)
    if names := gradients.missing:
        raise ValueError(f"{len(names)} weights of the adapter get no gradient, such as {names[0]}")
    compare(log["logps/chosen"], sum(row["alone"] for row in rows[::2]) / 2, model.dtype)


class Gradients(TrainerCallback):
    """Collects the names of trained parameters without a gradient in `missing`."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
        self.missing = [name for name, weight in trained.items() if weight.grad is None]


def columns(rows: list[dict]) -> tuple[list, list]:
    """The prompts and the completions of rows, as token ids."""
    return [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]


def compare(here: float, alone: float, dtype: torch.dtype) -> None:
    """Raise `ValueError` if two log-probabilities differ by more than rounding."""
    if abs(here - alone) > training.ROUNDING[dtype] * (1 + abs(alone)):
        raise ValueError(f"in a padded batch a completion has {here:.3f} nats, alone {alone:.3f}")


def explained(sentence: str, advice: str):
    """Turn an error of the libraries into a `UserError`: the sentence, the error, the advice."""

    def explain(text: str) -> str:
        return f"{sentence}: {text.splitlines()[0][:300].rstrip('.')}. {advice}."

    return hub.explained_by(explain, unless=lambda text: processes.count() > 1)  # one was lost


@contextlib.contextmanager
def unchanged(model):
    """Afterwards the adapter has the weights that it has now."""
    weights = [p for n, p in model.named_parameters() if "lora_" in n and ".default" in n]
    values = [weight.detach().clone() for weight in weights]
    yield
    for weight, value in zip(weights, values, strict=True):
        weight.data.copy_(value)
