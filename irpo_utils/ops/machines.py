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
# `count` GPUs, or cores, which work as one device. The rest is of one device, speeds as reached:
# bytes of `memory` and those that `libraries` take, FLOPs per second by dtype, bytes per second of
# its memory and to a GPU of the same (`link`) or another node (`between`). `overhead`: by engine,
# milliseconds that a layer adds to a step, with a base in 16 bits and in NF4. `dtype`: the default
# there. `note`: what the speeds rest on.
Machine = namedtuple(
    "Machine", "name count memory libraries flops bandwidth overhead dtype note link between"
)


@dataclass
class Shape:
    """A decoder like Llama's. `linear` (quantised, with LoRA), `head`, `parameters`: weights.

    Norms and biases, less than 0.2 % of the weights, are left out.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True  # embeddings and output layer are one matrix
    sliding: bool = False  # some layers have a sliding window, so a pair cannot be one row

    def __post_init__(self):
        h, i = self.hidden, self.intermediate
        self.query, self.kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(h, self.query), (h, self.kv), (h, self.kv), (self.query, h)]
        self.matrices = [*attention, (h, i), (h, i), (i, h)]
        self.linear = self.layers * sum(a * b for a, b in self.matrices)
        self.head = self.vocabulary * h
        self.parameters = self.linear + (1 if self.tied else 2) * self.head

    def lora(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)


TASKS = {name: TaskSize(**size) for name, size in DATA["tasks"].items()}
SHAPES = {name: Shape(**model) for name, model in DATA["models"].items()}


def task_size(p: Profile) -> TaskSize:
    """Sizes of the profile's task: from machines.yaml, or for `jsonl` and new tasks measured."""
    task, assumed = tasks.get(p.task), TASKS["jsonl"]
    if task.name in TASKS and not (task.name == "jsonl" and p.data):
        return TASKS[task.name]
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
    name = {hub: short for short, hub in models.HUB_NAMES.items()}.get(name, name)
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(models.find(name), trust_remote_code=False)
        c = config.get_text_config()
        heads, windows = c.num_attention_heads, getattr(c, "layer_types", None) or []
        return Shape(
            layers=c.num_hidden_layers,
            hidden=c.hidden_size,
            intermediate=getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
            heads=heads,
            kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
            vocabulary=c.vocab_size,
            tied=c.tie_word_embeddings,
            sliding="sliding_attention" in windows or bool(getattr(c, "sliding_window", None)),
        )
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
        return _this_gpu(torch.cuda.get_device_properties(0))
    count, name = re.fullmatch(r"(?:(\d+)[xX])?(.*)", text or "cpu", re.DOTALL).groups()
    name = {known.lower(): known for known in (*GPUS, "cpu")}.get(name.lower())
    if name is None or count == "0":
        raise UserError(
            f"There is no machine {text!r}. Give a number of GPUs and their name, such as "
            f"8xA100-80GB, or cpu. The GPUs are {', '.join(GPUS)}."
        )
    if name == "cpu":
        cores = int(count or torch.get_num_threads())
        return _machine(name, cores, psutil.virtual_memory().total)
    return _machine(name, int(count or 1), 1e9 * GPUS[name]["memory"])


def _this_gpu(here) -> Machine:
    """The GPU of the table whose pattern and memory fit best; a T4's speed for an unknown one."""
    count, gigabytes = int(os.environ.get("WORLD_SIZE", "1")), here.total_memory / 1e9
    found = [name for name, gpu in GPUS.items() if re.search(rf"\b{gpu['pattern']}\b", here.name)]
    found.sort(key=lambda name: abs(GPUS[name]["memory"] - gigabytes))
    found.sort(key=lambda name: -len(GPUS[name]["pattern"]))  # "H100 PCIe" before "H100"
    made = _machine([*found, "T4-16GB"][0], count, here.total_memory)._replace(name=here.name)
    if found:
        return made
    note = f"{here.name} is unknown, a T4's speed is assumed: {made.note}"
    return made._replace(dtype="bfloat16" if here.major >= 8 else "float16", note=note)


def _machine(name: str, count: int, memory: float) -> Machine:
    """The machine at the calibrated shares of its data sheet; `memory` in bytes."""
    kind, cores = ("cpu", count) if name == "cpu" else ("gpu", 1)
    sheet, reached = GPUS.get(name, DATA["cpu"]), DATA["calibration"][kind]
    flops, link = 1e12 * cores * sheet["tflops"], 1e9 * reached["link"]
    return Machine(
        name=name,
        count=count,
        memory=memory,
        libraries=1e9 * reached["libraries"],
        flops={dtype: flops * share for dtype, share in reached["flops"].items()},
        bandwidth=1e9 * cores * sheet["bandwidth"] * reached["bandwidth"],
        overhead=reached["overhead"],
        dtype=sheet["dtype"],
        note=reached["note"],
        link=link * sheet["link"],
        between=link * DATA["between_nodes"],
    )
