"""Make the seed model M0: tokenizer, corpus, and a Llama of one million parameters, trained in three phases.

    python scripts/make_seed_model.py --out irpo_utils/seed_model --compile      # a quarter of an hour on 2 cores

M0 takes the role of a pretrained model that *can* reason but often does not:

1. `wide`: careful working on a wide range of numbers teaches reading and arithmetic.
2. `task`: careful working on the numbers of the task.
3. `hasty`: a short last phase on texts that skip part or all of the working and still end in the correct answer. The
   share of such texts increases with the number of steps. The model then mostly answers without reasoning.

Only question templates (skeletons) of the group "seen" are used, and no question of a split: `corpus` leaves both out.
Every batch has new texts, so no text is used twice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irpo_utils.tasks import word_problems

VOCABULARY = 1280
SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Phase:
    name: str
    steps: int
    batch: int
    learning_rate: float
    bounds: word_problems.NumberRange
    hasty: bool = False


PHASES = (
    Phase("wide", 1400, 128, 3e-3, word_problems.WIDE_RANGE),
    Phase("task", 650, 128, 2e-3, word_problems.TASK_RANGE),
    Phase("hasty", 100, 96, 3e-4, word_problems.TASK_RANGE, hasty=True),
)
# Shares of hasty texts with all of the working and with none of it, by number of steps; the rest shows a first part.
FULL_WORKING = {2: 0.45, 3: 0.30, 4: 0.20, 5: 0.15, 6: 0.10}
NO_WORKING = {2: 0.35, 3: 0.45, 4: 0.55, 5: 0.60, 6: 0.65}


def hasty_solution(row: dict, rng: random.Random) -> str:
    """The gold solution with none, a first part, or all of its equation lines."""
    *lines, final = row["solution"].split("\n")
    draw = rng.random()
    if draw < NO_WORKING[row["steps"]]:
        lines = []
    elif draw > NO_WORKING[row["steps"]] + FULL_WORKING[row["steps"]]:
        lines = lines[: rng.randint(1, len(lines) - 1)]
    return "\n".join([*lines, final])


def corpus(phase: Phase, seed: int):
    """Endless rows (`question`, `text` of the answer) of one phase; never a question of a split."""
    rng = random.Random(f"{seed}-{phase.name}")
    forbidden = {row["question"] for rows in word_problems.all_splits().values() for row in rows}
    while True:
        row = word_problems.make_question(rng, "seen", phase.bounds)
        if row["question"] not in forbidden:
            yield {
                "question": row["question"],
                "text": hasty_solution(row, rng) if phase.hasty else row["solution"],
            }


def make_tokenizer(seed: int, texts: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE: it encodes any text, and every digit is a separate token."""
    rows = corpus(PHASES[0], seed)
    samples = (
        f"{word_problems.TASK.prompt(row)}\n{row['text']}" for row, _ in zip(rows, range(texts))
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        samples,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attn_implementation="eager",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(phase: Phase, tokenizer, seed: int):
    """Batches of texts of similar length: (input_ids, labels), labels -100 on the prompt and on padding."""
    rows, rng = corpus(phase, seed), random.Random(seed)
    while True:
        encoded = []
        for row, _ in zip(rows, range(phase.batch * 10)):
            messages = [{"role": "user", "content": word_problems.TASK.prompt(row)}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
            answer_ids = tokenizer(row["text"], add_special_tokens=False).input_ids + [
                tokenizer.eos_token_id
            ]
            encoded.append((prompt_ids + answer_ids, len(prompt_ids)))
        encoded.sort(key=lambda pair: len(pair[0]))
        chunks = [encoded[i : i + phase.batch] for i in range(0, len(encoded), phase.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = (
                -(-max(len(ids) for ids, _ in chunk) // 16) * 16
            )  # few widths, so that --compile pays
            ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), width), -100)
            for i, (row_ids, prompt_length) in enumerate(chunk):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                labels[i, prompt_length : len(row_ids)] = ids[i, prompt_length : len(row_ids)]
            yield ids, labels


def loss_on_answers(model, ids, labels):
    """Mean cross-entropy of the answer tokens. Right padding and a causal mask: no attention mask is needed."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(
        model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted]
    )


def train_phase(phase: Phase, model, batches, log: list[dict]) -> None:
    """Train all weights on the (ids, labels) of one phase: warm-up, then a cosine down to a tenth
    of the learning rate."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, phase.steps // 14)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / phase.steps))
        ),
    )
    bar, started = tqdm(range(phase.steps), desc=f"{phase.name:>7}", mininterval=5), time.time()
    for step, (ids, labels) in zip(bar, batches, strict=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_on_answers(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == phase.steps - 1:
            log.append(
                {
                    "phase": phase.name,
                    "step": step + 1,
                    "loss": round(loss.item(), 4),
                    "seconds": round(time.time() - started, 1),
                }
            )
            bar.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model, the tokenizer and the log"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives another M0 (default 0)"
    )
    parser.add_argument(
        "--from-phase",
        default="wide",
        choices=[p.name for p in PHASES],
        help="continue from the state saved before this phase in OUT/phases",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile, a third faster; needs a C++ compiler"
    )
    args = parser.parse_args()

    tokenizer = make_tokenizer(seed=0)  # the same for every M0
    model, log = make_model(tokenizer, args.seed), []
    if args.compile:
        model.model.compile(dynamic=True)
    phases = args.out / "phases"
    phases.mkdir(parents=True, exist_ok=True)
    names = [phase.name for phase in PHASES]
    for phase in PHASES[names.index(args.from_phase) :]:
        state = phases / f"before_{phase.name}.pt"
        if phase.name == args.from_phase and state.exists():
            model.load_state_dict(torch.load(state, weights_only=True))
        torch.save(model.state_dict(), state)
        train_phase(phase, model, batches(phase, tokenizer, args.seed), log)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "command": f"python scripts/make_seed_model.py --out {args.out} --seed {args.seed}",
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "phases": [asdict(phase) for phase in PHASES],
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
