"""What is known before a run about machines, models and tasks; the data are in machines.yaml."""

from __future__ import annotations

import itertools
import os
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import yaml

from irpo_utils import UserError, models, tasks
from irpo_utils.profiles import Profile

DATA = yaml.safe_load(Path(__file__).with_name("machines.yaml").read_text(encoding="utf-8"))
GPUS = DATA["gpus"]
NF4_BYTES = (4 + 0.127) / 8  # per weight, with its share of the constants (Dettmers et al. 2023)
CHARACTERS, TEMPLATE = 4, 26  # per token; tokens around a question. Fits GSM8K, SVAMP and ARC.

# Tokens of a prompt (mean, longest) and of a completion (mean); questions per split; where the
# numbers come from.
TaskSize = namedtuple("TaskSize", "prompt longest completion train validation test source")
# `count` GPUs or cores of a CPU; the rest is of one, speeds as reached: bytes of `memory`, FLOPs
# per second by dtype, bytes per second of its memory and to a GPU of the same (`link`) or another
# node (`between`). `layers`: by engine, milliseconds that a layer adds to a step, with a base in
# 16 bits and in NF4. `dtype`: the default there. `note`, `measured`: what the speed rests on.
Machine = namedtuple(
    "Machine", "name count memory flops bandwidth layers dtype note measured link between"
)


@dataclass
class Shape:
    """A decoder like Llama's. `linear` (quantised, with LoRA), `head`, `parameters`: weights."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True  # embeddings and output layer are one matrix
    family: str = "llama"  # the first part of the config's `model_type`
    sliding: bool = False  # some layers have a sliding window, so a pair cannot be one row

    def __post_init__(self):
        h, i, family = self.hidden, self.intermediate, self.family
        self.query, self.kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(h, self.query), (h, self.kv), (h, self.kv), (self.query, h)]
        self.matrices = [*attention, (h, i), (h, i), (i, h)]
        self.linear = self.layers * sum(a * b for a, b in self.matrices)
        self.head = self.vocabulary * h
        small = (4 if family == "gemma3" else 2) * h  # norms
        small += 2 * self.head_dim if family in ("qwen3", "gemma3") else 0  # norms of q and k
        small += self.query + 2 * self.kv if family == "qwen2" else 0  # biases
        embeddings = self.head if self.tied else 2 * self.head
        self.parameters = self.linear + embeddings + self.layers * small + h

    def lora(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)

    def base_bytes(self, nf4: bool, width: int) -> tuple[float, float]:
        """Of the base and, in NF4, of the largest matrix of a layer, unpacked while in use."""
        linear = self.linear * (NF4_BYTES if nf4 else width)
        unpacked = max(a * b for a, b in self.matrices) * width if nf4 else 0
        return linear + (self.parameters - self.linear) * width, unpacked

    def adapter_bytes(self, rank: int, optimizer: str) -> float:
        """Weights and gradients in fp32, gradients again for a repeated step, two moments."""
        return (12 + (2 if "8bit" in optimizer else 8)) * self.lora(rank)


TASKS = {name: TaskSize(**size) for name, size in DATA["tasks"].items()}
HUB = {model.pop("hub"): name for name, model in DATA["models"].items()}
SHAPES = {name: Shape(**model) for name, model in DATA["models"].items()}


def task_size(p: Profile) -> TaskSize:
    """Sizes of the profile's task: from machines.yaml, or for `jsonl` and new tasks measured."""
    task = tasks.get(p.task)
    known, assumed = TASKS.get(task.name), TASKS["jsonl"]
    if known and not (task.name == "jsonl" and p.data):
        return known
    try:
        splits = {split: task.load(split, p.data) for split in ("train", "validation", "test")}
        texts = [task.prompt(row) for row in itertools.islice(splits["train"], 2000)]
        tokens = [len(text) // CHARACTERS + TEMPLATE for text in texts]
        sizes = (sum(tokens) // len(tokens), max(tokens), assumed.completion)
    except Exception:  # of any kind: the run itself reports what is wrong with the data
        source = f"assumed, because the questions of {task.name} cannot be read here"
        return assumed._replace(source=source)
    source = f"prompts measured ({CHARACTERS} characters a token), completions assumed as in gsm8k"
    return TaskSize(*sizes, *(max(1, len(rows)) for rows in splits.values()), source)


def find_shape(name: str) -> Shape:
    """The shape of a model in machines.yaml, or from config.json in a folder or on the hub."""
    name = HUB.get(name, name)
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    path = models.find(name)
    try:
        c = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        h, heads = c.hidden_size, c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        head_dim = getattr(c, "head_dim", None) or h // heads
        mlp, family = getattr(c, "intermediate_size", None) or 4 * h, c.model_type.split("_")[0]
        sliding = "sliding_attention" in (getattr(c, "layer_types", None) or [])
        sliding = sliding or bool(getattr(c, "sliding_window", None))
        sizes = (c.num_hidden_layers, h, mlp, heads, kv_heads, head_dim, c.vocab_size)
        return Shape(*sizes, c.tie_word_embeddings, family, sliding)
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The shape of the model {name} could not be read from its config.json ({reason}). "
            f"Without network give a folder as --model, or one of: seed, {', '.join(SHAPES)}."
        ) from error


def find_machine(text: str | None = None) -> Machine:
    """The machine named, such as "8xA100-80GB" or "cpu"; None: this computer's GPU or CPU."""
    import psutil
    import torch

    if text is None and torch.cuda.is_available():
        here, count = torch.cuda.get_device_properties(0), int(os.environ.get("WORLD_SIZE", "1"))
        same = [gpu for gpu in GPUS if re.search(rf"\b{GPUS[gpu]['pattern']}\b", here.name)]
        same.sort(key=lambda gpu: abs(1e9 * GPUS[gpu]["memory"] - here.total_memory))
        made = _machine(same[0] if same else "T4-16GB", count, here.total_memory)
        if same:
            return made._replace(name=here.name)
        dtype = "bfloat16" if getattr(here, "major", 0) >= 8 else "float16"
        note = f"{here.name} is unknown, a T4's speed is assumed: {made.note}"
        return made._replace(name=here.name, dtype=dtype, note=note)
    count, name = re.fullmatch(r"(?:(\d+)[xX])?(.*)", text or "cpu", re.DOTALL).groups()
    name = {known.lower(): known for known in (*GPUS, "cpu")}.get(name.lower())
    if name is None or count == "0":
        raise UserError(
            f"There is no machine {text!r}. Give a number of GPUs and their name, such as "
            f"8xA100-80GB, or cpu. The GPUs are {', '.join(GPUS)}."
        )
    if name == "cpu":
        cores, memory = count or torch.get_num_threads(), psutil.virtual_memory().total
        return _machine(name, int(cores), memory)
    return _machine(name, int(count or 1), 1e9 * GPUS[name]["memory"])


def _machine(name: str, count: int, memory: float) -> Machine:
    """The machine at the calibrated shares of its data sheet; `memory` in bytes."""
    sheet, c = GPUS.get(name, DATA["cpu"]), DATA["calibration"]["cpu" if name == "cpu" else "gpu"]
    dtypes, share = ("bfloat16", "float16", "float32"), c["bandwidth"]["share"]
    flops = {dtype: 1e12 * sheet["tflops"] * c["flops"][dtype] for dtype in dtypes}
    bandwidth, link = 1e9 * sheet["bandwidth"] * share, 1e9 * c["link"]["share"]
    here = name == c["machine"]
    measured = "measured" if here else f"measured on {c['machine']}, assumed here"
    note = f"{c['flops']['bfloat16']:.0%} of FLOPS (assumed), {share:.0%} of bandwidth ({measured})"
    if name == "cpu":
        note = "as cores did in figures/bench.csv (measured)"
    links = (link * sheet["link"], link * DATA["between_nodes"])
    speeds = (flops, bandwidth, c["layers"], sheet["dtype"], note, measured, *links)
    return Machine(name, count, memory, *speeds)
