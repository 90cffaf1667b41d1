"""Before a run: memory, tokens, hours and cost of each stage. Arithmetic; no model is loaded.

machines.yaml describes GPUs, tasks and models. Memory adds up the large tensors. Time is a roofline
(Williams et al. 2009): the longer of the arithmetic and of reading the weights, plus reading the
cache and the overhead of each layer. With assumed numbers both are right within a factor of two.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections import namedtuple
from pathlib import Path

import pandas
import psutil
import torch
import yaml
from transformers import AutoConfig, LlamaConfig

from irpo_utils import UserError, logprobs, methods, models, tasks
from irpo_utils.profiles import Profile

DATA = yaml.safe_load(Path(__file__).with_name("machines.yaml").read_text(encoding="utf-8"))
GPUS = DATA["gpus"]
NODE = 8  # GPUs of a node
OVERVIEW = ("cpu", "T4-16GB", "RTX4090-24GB", "A100-80GB", "H200-141GB")
RESERVE = 0.05  # share of the memory that stays free: the allocator cannot use every gap
COMFORT = 0.8  # share that settings which are chosen here may take: estimates are not exact
PAIR_SHARE = 0.75  # of the possible pairs are built: 0.58 to 0.86 in notebooks/shipped_run
NF4_BYTES = (4 + 0.127) / 8  # per weight, with its share of the constants (Dettmers et al. 2023)
CHARACTERS, TEMPLATE = 4, 26  # per token; tokens around a question. Fits GSM8K, SVAMP and ARC.

# Tokens of a prompt (mean, longest) and of a completion (mean); questions per split; the source.
TaskSize = namedtuple("TaskSize", "prompt longest completion train validation test source")
# Peak bytes on one GPU; tokens, hours and cost of all iterations. Without a price the cost is NaN.
Stage = namedtuple("Stage", "name memory tokens hours cost")


class Machine:
    """`count` GPUs, or CPU cores, which work as one device. Speeds are per device, as reached."""

    def __init__(self, name: str, count: int, memory: float):
        """`name`: a key of `GPUS`, or "cpu". `memory`: in bytes."""
        kind, cores = ("cpu", count) if name == "cpu" else ("gpu", 1)
        sheet, reached = GPUS.get(name, DATA["cpu"]), DATA["calibration"][kind]
        self.name, self.count, self.memory, self.dtype = name, count, memory, sheet["dtype"]
        self.note = reached["note"]  # what the speeds rest on
        self.libraries = 1e9 * reached["libraries"]  # bytes that CUDA and its libraries take
        flops = 1e12 * cores * sheet["tflops"]  # per second
        self.flops = {dtype: flops * share for dtype, share in reached["flops"].items()}
        self.bandwidth = 1e9 * cores * sheet["bandwidth"] * reached["bandwidth"]  # bytes per second
        link = DATA["between_nodes"] if count > NODE else sheet["link"]
        self.link = 1e9 * link * reached["link"]  # bytes per second to another GPU
        # Engine -> milliseconds that a layer adds to a step, with a base in 16 bits and in NF4.
        self.overhead = reached["overhead"]


class Shape:
    """Sizes of a decoder like Llama's, without norms and biases (0.2 % of the weights)."""

    def __init__(self, c):
        """`c`: the config of the text model in transformers."""
        self.layers, self.hidden, self.vocabulary = c.num_hidden_layers, c.hidden_size, c.vocab_size
        self.intermediate = getattr(c, "intermediate_size", None) or 4 * self.hidden
        heads = c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or self.hidden // heads
        self.query = heads * head_dim
        self.kv = (getattr(c, "num_key_value_heads", None) or heads) * head_dim
        self.sliding = bool(getattr(c, "sliding_window", None))  # a pair cannot be one row
        attention = [(self.hidden, n) for n in (self.query, self.kv, self.kv, self.query)]
        self.matrices = attention + 3 * [(self.hidden, self.intermediate)]  # of a layer
        # Weights: of the layers (quantised, with LoRA), of the output layer, and all.
        self.linear = self.layers * sum(a * b for a, b in self.matrices)
        self.head = self.vocabulary * self.hidden
        self.parameters = self.linear + (1 if c.tie_word_embeddings else 2) * self.head

    def lora(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)


TASKS = {name: TaskSize(**size) for name, size in DATA["tasks"].items()}
SHAPES = {name: Shape(LlamaConfig(**config)) for name, config in DATA["models"].items()}


def task_size(p: Profile) -> TaskSize:
    """Sizes of the profile's task: from machines.yaml, or for `jsonl` and new tasks measured."""
    task, assumed = tasks.get(p.task), TASKS["jsonl"]
    if task.name in TASKS and not (task.name == "jsonl" and p.data):
        return TASKS[task.name]
    try:
        train, *others = (task.load(split, p.data) for split in ("train", "validation", "test"))
        tokens = [len(task.prompt(row)) // CHARACTERS + TEMPLATE for row in train]
        lengths = sum(tokens) // len(tokens), max(tokens), assumed.completion
    except Exception:  # of any kind: the run itself reports what is wrong with the data
        return assumed
    source = f"prompts measured ({CHARACTERS} characters a token), completions assumed as in gsm8k"
    return TaskSize(*lengths, len(train), *map(len, others), source)


def find_shape(name: str) -> Shape:
    """The shape of a model in machines.yaml, or from config.json in a folder or on the hub."""
    name = {hub: short for short, hub in models.HUB_NAMES.items()}.get(name, name)
    if name in SHAPES:
        return SHAPES[name]
    try:
        config = AutoConfig.from_pretrained(models.find(name), trust_remote_code=False)
        return Shape(config.get_text_config())
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"The shape of the model {name} could not be read from its config.json ({reason}). "
            f"Without network give a folder as --model, or one of: seed, {', '.join(SHAPES)}."
        ) from error


def find_machine(text: str | None = None) -> Machine:
    """The machine named, such as "8xA100-80GB" or "cpu"; None: this computer's GPU or CPU."""
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
        return Machine(name, int(count or torch.get_num_threads()), psutil.virtual_memory().total)
    return Machine(name, int(count or 1), 1e9 * GPUS[name]["memory"])


def _this_gpu(here) -> Machine:
    """A GPU with the properties `here` of `torch.cuda`; an unknown one has the speed of a T4."""
    known = [name for name, gpu in GPUS.items() if re.search(rf"\b{gpu['pattern']}\b", here.name)]
    known.sort(key=lambda name: abs(1e9 * GPUS[name]["memory"] - here.total_memory))
    count = int(os.environ.get("WORLD_SIZE", "1"))
    machine = Machine(known[0] if known else "T4-16GB", count, here.total_memory)
    machine.name = here.name
    if not known:
        machine.dtype = "bfloat16" if here.major >= 8 else "float16"
        machine.note = f"{here.name} is unknown, a T4's speed is assumed: {machine.note}"
    return machine


def plan(profile: Profile, machine=None, price=None) -> Plan:
    """What a run takes on `machine` ("8xA100-80GB"; "2xcpu": two cores; None: this computer).

    `price`: of the whole machine per hour. Raises `UserError` if the machine or the model cannot be
    found and if processes cannot share a batch. `check` refuses a run that does not fit.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price is {price}: give the machine's cost per hour, 0 or more.")
    p, price = methods.apply(profile), math.nan if price is None else price
    return choose(p, find_shape(p.model), find_machine(machine), task_size(p), price)


def choose(p: Profile, s: Shape, machine: Machine, size, price=math.nan, need=None) -> Plan:
    """The fastest plan that fits comfortably, with a base in 16 bits if any does.

    On a GPU it chooses those of `quantize`, `gradient_checkpointing` and `micro_batch_size` that
    are None. `need(plan)`: bytes of a plan, by default its peak. If none fits, the least is taken.
    """
    given = Plan(p, s, machine, size, price)
    if machine.name == "cpu":
        return given
    share = p.batch_size // given.ranks
    values = {"quantize": (False, True), "gradient_checkpointing": (False, True)}
    values["micro_batch_size"] = [n for n in range(share, 0, -1) if share % n == 0]
    left = {name: tried for name, tried in values.items() if getattr(p, name) is None}
    settings = [dict(zip(left, tried, strict=True)) for tried in itertools.product(*left.values())]
    plans = [Plan(dataclasses.replace(p, **new), s, machine, size, price) for new in settings]
    need, room = need or (lambda made: made.total.memory), COMFORT * machine.memory

    def order(made: Plan):
        # What checkpointing saves is a rough estimate, so it must be a quarter of the time.
        doubt = 4 / 3 if made.profile.gradient_checkpointing else 1
        return max(need(made), room), made.nf4, doubt * made.training.hours

    made = min(plans, key=order)
    made.given = p
    return made


def choose_training(p: Profile, config, pairs, machine: Machine) -> dict:
    """Arguments of `training.train` by `choose`, for these pairs and a model that is loaded.

    `config`: of the text model in transformers. `machine.memory`: the bytes that are still free.
    """
    responses = [*pairs["chosen_ids"], *pairs["rejected_ids"]]
    lengths = [list(map(len, texts)) for texts in (pairs["prompt_ids"], responses)]
    (prompt, longest), (response, new) = ((sum(n) // len(n), max(n)) for n in lengths)
    size = TaskSize(prompt, longest, response, len(pairs), 1, 1, "the pairs")
    p = dataclasses.replace(p, max_new_tokens=new, max_length=None)
    made = choose(p, Shape(config), machine, size, need=lambda made: made.training.memory)
    # The reference is scored without gradients, so that its logits take the most memory.
    logits = 2 * new * made.shape.vocabulary * (made.width + 8)  # bytes of a pair
    scored = max(made.micro, min(64, int(COMFORT * machine.memory / logits)))
    sizes = {"micro_batch_size": made.micro, "precompute_ref_batch_size": scored}
    return sizes | {"gradient_checkpointing": made.profile.gradient_checkpointing}


def check(made: Plan) -> None:
    """Raise `UserError` if the run does not fit, with settings that make it fit."""
    if made.fits:
        return
    worst = max(made.stages, key=lambda stage: stage.memory)
    need, room = worst.memory / 1e9, made.room / 1e9
    raise UserError(
        f"By estimate this run does not fit: {worst.name} needs {need:,.1f} GB, "
        f"{made.machine.name} has room for {room:,.1f} GB, {need - room:,.1f} GB too little. "
        f"{advice(made)}. To run without this check, add --ignore-plan."
    )


def advice(made: Plan) -> str:
    """Settings with which the run fits: smaller batches, and others if these are not enough."""
    p = made.given
    others = [{}, {"gradient_checkpointing": True, "quantize": True}]
    if made.ranks > 1:  # FSDP2 cannot split the states of 8-bit and paged optimisers
        others.append({"shard": True, "engine": "vllm", "optimizer": "adamw_torch"})
    rows = [p.sampling_batch_size >> i for i in range(p.sampling_batch_size.bit_length())]
    pairs = [n for n in range(made.micro - 1, 0, -1) if p.batch_size // made.ranks % n == 0]
    for changes, n, micro in itertools.product(others, rows, [p.micro_batch_size, *pairs]):
        new = {"sampling_batch_size": n, "micro_batch_size": micro, **changes}
        if choose(dataclasses.replace(p, **new), made.shape, made.machine, made.size).fits:
            options = [f"--{k.replace('_', '-')} {v}" for k, v in new.items() if v != getattr(p, k)]
            return f"It fits with {' '.join(options).lower()}"
    return "No setting makes it fit: choose a smaller --model or larger GPUs"


class Plan:
    """`stages`, `total` (of class `Stage`) and `room` (bytes that a run can use of one GPU)."""

    def __init__(self, p: Profile, s: Shape, machine: Machine, size: TaskSize, price=math.nan):
        """`price`: per hour. Raises `UserError` if processes cannot share a batch."""
        self.shape, self.machine, self.size, self.price = s, machine, size, price
        self.profile = self.given = p  # `choose` sets the one that was given
        self.engine = p.engine if p.engine in machine.overhead else "plain"
        self.dtype = p.dtype or machine.dtype
        self.width = 4 if self.dtype == "float32" else 2
        self.nf4 = p.quantize is not False and not p.dequantize
        # Bytes of the weights: adapter, all layers with it, embeddings and output layer.
        self.adapter = 4 * s.lora(p.lora_r)
        self.layers = s.linear * (NF4_BYTES if self.nf4 else self.width) + self.adapter
        self.outside = (s.parameters - s.linear) * self.width
        # Bytes of a token: keys and values in all layers; activations of one layer, and those kept
        # for the backward pass, of which norms and LoRA's A need some in fp32.
        self.token = s.layers * 2 * s.kv * self.width
        self.activations = self.width * (4 * s.hidden + 4 * s.query + 3 * s.intermediate)
        self.kept = self.activations + 4 * (5 * s.hidden + s.query + s.intermediate)
        # Seconds that all layers add to a step of an engine, or to a pass of `training`.
        self.overhead = {k: 1e-3 * s.layers * ms[self.nf4] for k, ms in machine.overhead.items()}
        # Tokens of a completion, expected and at most in training, and of a prompt in training.
        self.length, limit = min(size.completion, p.max_new_tokens), p.max_length or math.inf
        self.new = min(p.max_new_tokens, max(1, limit - size.prompt))
        self.prompt = min(size.longest, max(1, limit - self.new))
        self.questions = min(p.n_questions or size.train, size.train)
        self.share_batch()
        self.stages = self.all_stages()
        _, memory, *sums = zip(*self.stages, strict=True)
        self.total = Stage("total", max(memory), *map(sum, sums))
        self.room = machine.memory * (1 - RESERVE)
        self.fits = self.total.memory <= self.room

    def share_batch(self) -> None:
        """Processes share a batch in equal parts, so that some GPUs may stay without work."""
        p, method = self.profile, methods.get(self.profile.method)
        self.devices = 1 if self.machine.name == "cpu" or method.train else self.machine.count
        self.ranks = max(n for n in range(1, self.devices + 1) if p.batch_size % n == 0)
        # GRPO: on one GPU, planned as if it trained on N / 2 pairs of each question in a step.
        self.samples = p.iterations > 0 and (method.samples or method.train is not None)
        self.batch = p.batch_size * (max(1, p.n_samples // 2) if method.train else 1)
        share = self.batch // self.ranks  # pairs of one process in a step
        self.micro = min(p.micro_batch_size or share, share)
        if share % self.micro:
            raise UserError(
                f"batch_size = {p.batch_size} is not a multiple of micro_batch_size = {self.micro} "
                f"times {self.ranks} processes. Choose another --micro-batch-size."
            )

    def all_stages(self) -> list[Stage]:
        """Sampling, training and evaluation. A stage that does nothing needs no memory."""
        p, s, last = self.profile, self.shape, self.profile.iterations
        available = getattr(self.size, p.eval_split, 500)  # the split math500 has 500
        n = min(p.n_eval_questions or available, available)
        draws = [(self.questions, p.n_samples, last)] if self.samples else []
        ends, between = min(2, last + 1), max(0, last - 1)
        graded = [(n, 1, last + 1), (n, p.eval_samples_ends, ends), (n, p.eval_samples, between)]
        sampling, evaluation = self.decode("sampling", draws), self.decode("evaluation", graded)
        weights, parts = self.layers + self.outside, self.ranks if p.shard else 1
        fixed = self.machine.libraries + weights / parts
        if parts > 1:  # one layer at work, the next on its way, and what is outside the layers
            fixed += 2 * self.layers / s.layers + self.outside
        if self.engine == "vllm":  # a server for each node; one GPU stops it for training
            server = weights + max(sampling.memory, evaluation.memory)
            server = self.machine.libraries + server / min(NODE, self.devices)
            stays = server if self.devices > 1 else 0
            fixed += stays
            sampling = sampling._replace(memory=server - stays)
            evaluation = evaluation._replace(memory=server - stays)
        self.training = self.train(parts)  # without its weights
        stages = sampling, self.training, evaluation
        return [row._replace(memory=fixed + row.memory if row.tokens else 0) for row in stages]

    def decode(self, name: str, draws: list[tuple[int, int, int]]) -> Stage:
        """A stage without its weights. `draws`: (questions, completions of each, how often)."""
        p, s, size = self.profile, self.shape, self.size
        peak = tokens = hours = 0.0
        # A step of `plain` waits for the longest completion; others are fitted per mean token.
        waiting = p.max_new_tokens / self.length if self.engine == "plain" else 1
        for questions, n, times in draws:
            here = max(1, questions / (self.devices if self.engine == "vllm" else self.ranks))
            prompts = max(1, min(p.sampling_batch_size // n, here))  # at once
            rows = prompts * n
            prefill = prompts * size.longest * (self.token + self.activations)
            cache = rows * (size.longest + p.max_new_tokens) * self.token
            cache += cache / s.layers * s.query / s.kv  # attention repeats the keys of a layer
            # Per row and word of the vocabulary a logit, and five numbers in fp32, with top-p ten.
            words = rows * s.vocabulary * (self.width + (40 if p.top_p < 1 else 20))
            peak = max(peak, prefill, cache + words)
            step = rows * (size.prompt + self.length / 2) * self.token / self.machine.bandwidth
            step += self.product_seconds(rows) + waiting * self.overhead[self.engine]
            tokens += times * questions * n * self.length
            hours += times * here / prompts * self.length * step / 3600
        return Stage(name, peak, tokens, hours, self.price * hours)

    def train(self, parts: int) -> Stage:
        """The stage without its weights; each GPU has one of `parts` of the optimiser's state."""
        p, s, prompt, new = self.profile, self.shape, self.size.prompt, self.new
        length = min(self.length, new)
        possible = self.questions * p.k_pairs * PAIR_SHARE if self.samples else self.questions
        pairs = min(possible, p.max_pairs or math.inf)
        if p.keep_pairs:
            pairs *= (p.iterations + 1) / 2  # those of 1 to T iterations
        steps = p.max_steps if p.max_steps > 0 else pairs * p.epochs / self.batch
        prompts = 2 if s.sliding or self.engine == "plain" else 1  # else the two rows share it
        most = self.micro * (prompts * self.prompt + 2 * new)  # tokens of a micro-batch, at most
        positions = self.micro * (prompts * prompt + 2 * length)
        # Each adapter weight: a gradient in fp32, as much in reserve, and two moments.
        peak = self.adapter * (2.5 if "8bit" in p.optimizer else 4) / parts
        peak += 2 * self.micro * new * s.vocabulary * (2 * self.width + 8)  # logits, also in fp32
        peak += 2 * most * self.kept  # of one layer, and its gradients
        others = s.hidden * self.width if p.gradient_checkpointing else self.kept  # input only
        peak += most * (s.layers - 1) * others
        # Logits of the reference: `logprobs.score` reads up to 64 completions at once.
        logits = logprobs.LOGITS["cpu" if self.machine.name == "cpu" else "cuda"]
        peak = max(peak, min(logits, 64 * new * s.vocabulary) * (self.width + 8))
        passes = 3 if p.gradient_checkpointing else 2  # forward, backward, forward again
        computing = passes * (self.product_seconds(positions) + self.overhead["training"])
        # Activations are written and read, and their gradients written.
        computing += 3 * s.layers * positions * self.kept / self.machine.bandwidth
        micro_batches = self.batch / self.micro / self.ranks  # of one process in a step
        # Meanwhile GPUs send the gradients in a ring, or all layers twice for each micro-batch.
        sent = micro_batches * (2 * self.layers + self.outside) if p.shard else 2 * self.adapter
        sending = sent * (self.ranks - 1) / self.ranks / self.machine.link
        reference = self.product_seconds(2 * pairs * (prompt + length)) / self.ranks
        hours = p.iterations * (steps * max(micro_batches * computing, sending) + reference) / 3600
        tokens = p.iterations * steps * self.batch * (prompt + 2 * length)
        return Stage("training", peak, tokens, hours, self.price * hours)

    def product_seconds(self, tokens: float) -> float:
        """All matrix products for so many tokens on one device: the roofline."""
        s, m = self.shape, self.machine
        # NF4 weights are read, written unpacked and read again, as by bitsandbytes.
        weight = NF4_BYTES + 2 * self.width if self.nf4 else self.width
        read = s.linear * weight + s.head * self.width
        return max(read / m.bandwidth, 2 * (s.linear + s.head) * tokens / m.flops[self.dtype])


def table(made: Plan) -> str:
    """The plan as text: a row for each stage, the total, and what was assumed."""
    p, m, size = made.profile, made.machine, made.size
    base = f"{made.shape.parameters / 1e6:,.1f} M parameters, {'4-bit base, ' if made.nf4 else ''}"
    formats = {"peak memory": "{:,.1f} GB".format, "tokens": "{:,.1f} M".format}
    formats |= {"time": _time, "cost": "{:,.2f}".format}
    rows = pandas.DataFrame([*made.stages, made.total]).set_index("name") / [1e9, 1e6, 1, 1]
    rows = rows.set_axis(formats, axis=1).dropna(axis=1)  # without a price, no cost
    notes = [
        f"plan: {p.iterations} x {p.method}, {p.task}, {p.model} ({base}{made.dtype}) on "
        f"{m.count} x {m.name}",
        rows.to_string(formatters=formats, index_names=False),
        f"sizes: prompts of {size.prompt} tokens, completions of {made.length}: {size.source}; "
        f"{PAIR_SHARE:.0%} of the possible pairs",
        f"speed: {m.note}; engine {made.engine}, micro-batch {made.micro}"
        f"{' with checkpointing' if p.gradient_checkpointing else ''}",
    ]
    if p.engine == "cuda_graph" and m.name == "cpu":
        notes.append("warning: this profile is for a GPU; if you have one, look at `nvidia-smi`")
    if made.engine == "vllm":
        notes.append("memory: the vLLM server is counted on the same GPUs")
    if made.ranks < made.devices:
        notes.append(f"only {made.ranks} of {made.devices} GPUs train: --batch-size {p.batch_size}")
    if math.isnan(made.price):
        notes.append("cost: give --price PER_HOUR")
    return "\n".join(notes)


def overview(profiles: dict[str, Profile], names=OVERVIEW) -> str:
    """All profiles: parameters, peak memory on the last machine, and the time on each machine."""
    rows = {}
    for name, profile in profiles.items():
        plans = [plan(profile, machine) for machine in names]
        hours = [_time(made.total.hours) if made.fits else "-" for made in plans]
        parameters, memory = plans[-1].shape.parameters / 1e6, plans[-1].total.memory / 1e9
        rows[name] = [f"{parameters:,.1f} M", f"{memory:,.1f} GB", *hours]
    text = pandas.DataFrame(rows, index=["parameters", "memory", *names]).T.to_string()
    return (
        f"{text}\nmemory: the peak on {names[-1]}; -: does not fit there as it is set\n"
        "More: python -m irpo_utils plan --profile NAME --gpus 8xA100-80GB --price PER_HOUR"
    )


def _time(hours: float) -> str:
    if hours >= 1.5:
        return f"{hours:,.1f} h"
    return f"{60 * hours:,.0f} min" if hours >= 1 / 40 else f"{3600 * hours:,.0f} s"
