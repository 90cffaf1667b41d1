"""Before a run: memory, tokens, hours and cost of each stage. Arithmetic; no model is loaded.

Memory adds up the large tensors, from the model's shape. Time is a roofline (Williams et al. 2009):
a matrix product takes as long as its arithmetic or as reading its weights, whichever is slower;
reading the cache and each layer's overhead are added. If the plan says that numbers are assumed,
expect both to be right within a factor of two. Units: bytes, seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import namedtuple

import pandas

from irpo_utils import UserError, logprobs, methods
from irpo_utils.ops import machines
from irpo_utils.profiles import Profile

OVERVIEW = ("cpu", "T4-16GB", "RTX4090-24GB", "A100-80GB", "H200-141GB")
NODE = 8  # GPUs of a node
RESERVE = 0.05  # share of the memory that stays free: the allocator cannot use every gap
PAIR_SHARE = 0.75  # of the possible pairs: 0.58 to 0.86 in notebooks/shipped_run

# A row: peak bytes on one GPU; tokens and hours of all iterations, expected and at most; the cost.
Stage = namedtuple("Stage", "name memory tokens hours tokens_at_most hours_at_most cost")
# `room`: bytes that one GPU (or the CPU) has for the run. `notes`: what the numbers rest on.
Plan = namedtuple("Plan", "estimate profile shape machine room stages total notes")


def plan(
    profile: Profile, machine: str | None = None, price: float | None = None, must_fit: bool = True
) -> Plan:
    """What a run takes on `machine` ("8xA100-80GB"; "2xcpu": two cores; None: this computer).

    `price`: of the whole machine per hour. Raises `UserError` if the machine or the model cannot be
    found, if processes cannot share a batch and, with `must_fit`, if the run does not fit.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price is {price}: give the machine's cost per hour, 0 or more.")
    p = methods.apply(profile)
    place, shape = machines.find_machine(machine), machines.find_shape(p.model)
    e = Estimate(p, shape, place, machines.task_size(p))
    expected, at_most = e.work(e.length, PAIR_SHARE), e.work(p.max_new_tokens)
    rows = {name: (peak, *expected[name], *at_most[name]) for name, peak in e.memory().items()}
    peaks, *columns = zip(*rows.values(), strict=True)
    rows["total"] = (max(peaks), *map(sum, columns))
    *stages, total = (
        Stage(name, *row, None if price is None else price * row[2]) for name, row in rows.items()
    )
    made = Plan(e, p, shape, place, e.room, stages, total, e.notes())
    if must_fit:
        check(made)
    return made


def check(made: Plan) -> None:
    """Raise `UserError` if the peak is above the room, with settings that bring it below."""
    if made.total.memory <= made.room:
        return
    worst = max(made.stages, key=lambda row: row.memory)
    advice = "No setting makes it fit: choose a smaller --model or larger GPUs"
    if changes := what_fits(made.estimate):
        options = (f"--{key.replace('_', '-')} {str(new).lower()}" for key, new in changes.items())
        advice = f"It fits with {' '.join(options)}"
    raise UserError(
        f"By estimate this run does not fit: {worst.name} needs {_gb(worst.memory)}, "
        f"{made.machine.name} has room for {_gb(made.room)}, {_gb(worst.memory - made.room)} too "
        f"little. {advice}. To run without this check, add --ignore-plan."
    )


def what_fits(e: Estimate) -> dict | None:
    """The fewest and smallest changes of settings with which the run fits; None: there are none."""
    options = {  # None: unchanged; the last one is the first to be tried
        "micro_batch_size": [None, *(n for n in _halves(e.micro) if e.share % n == 0)],
        "sampling_batch_size": [None, *_halves(e.p.sampling_batch_size)],
        "gradient_checkpointing": [None, True],
        "quantize": [None, True],
    }
    candidates = [
        {name: new for name, new in zip(options, values, strict=True) if new is not None}
        for values in itertools.product(*options.values())
    ]
    candidates.sort(key=len)
    if e.ranks > 1 and not e.p.shard:
        split = {"shard": True, "engine": "vllm"}
        if "8bit" in e.p.optimizer or "paged" in e.p.optimizer:  # FSDP2 cannot split their states
            split["optimizer"] = "adamw_torch"
        candidates.append(split)
    return next((new for new in candidates if e.replace(**new).peak() <= e.room), None)


def _halves(n: int) -> list[int]:
    return [n >> i for i in range(1, n.bit_length())]


class Estimate:
    """Memory and work of one profile on one machine. A CPU's cores count as one device."""

    def __init__(self, p: Profile, shape: machines.Shape, machine: machines.Machine, size):
        """`size`: a `machines.TaskSize`. Raises `UserError` if processes cannot share a batch."""
        self.p, self.shape, self.machine, self.size = p, shape, machine, size
        self.room = machine.memory * (1 - RESERVE)
        self.engine = p.engine if p.engine in machine.overhead else "plain"
        self.dtype = p.dtype or machine.dtype
        self.width = 4 if self.dtype == "float32" else 2
        self.nf4 = p.quantize and not p.dequantize
        # What a layer adds to a step of an engine, or to a pass of `training`.
        self.milliseconds = {name: ms[self.nf4] for name, ms in machine.overhead.items()}
        # Bytes of a token's keys and values, and of weights: all layers, embeddings and head.
        self.token = shape.layers * 2 * shape.kv * self.width
        self.adapter = 4 * shape.lora(p.lora_r)
        self.layers = shape.linear * (machines.NF4_BYTES if self.nf4 else self.width) + self.adapter
        self.outside = (shape.parameters - shape.linear) * self.width
        # Tokens of a completion, expected and at most in training, and of a prompt; questions.
        self.length, limit = min(size.completion, p.max_new_tokens), p.max_length or 10**9
        self.new = min(p.max_new_tokens, max(1, limit - size.prompt))
        self.prompt = min(size.longest, max(1, limit - self.new))
        self.questions = min(p.n_questions or size.train, size.train)
        available = getattr(size, p.eval_split)
        self.n_eval = min(p.n_eval_questions or available, available)
        method = methods.get(p.method)
        online = method.train is not None  # GRPO: planned as if it trained on pairs
        self.samples = p.iterations > 0 and (method.samples or online)
        # Processes share a batch in equal parts, so that some GPUs may stay without work.
        self.devices = 1 if machine.name == "cpu" else machine.count
        busy = 1 if online else min(self.devices, p.batch_size)
        self.ranks = max(n for n in range(1, busy + 1) if p.batch_size % n == 0)
        batch = max(1, p.batch_size * p.n_samples // 2) if online else p.batch_size
        self.share = batch // self.ranks  # pairs of one process in a step
        micro = min(p.micro_batch_size or self.share, self.share)
        if not online and self.share % micro:
            raise UserError(
                f"batch_size = {p.batch_size} is not a multiple of micro_batch_size = {micro} "
                f"times {self.ranks} processes. Choose another --micro-batch-size."
            )
        self.batch = min(batch, self.pairs(1.0) * (max(1, p.iterations) if p.keep_pairs else 1))
        self.micro = min(micro, math.ceil(self.batch / self.ranks))
        self.micro_batches = self.batch / self.micro / self.ranks  # of one process in a step

    def replace(self, **changes) -> Estimate:
        """The same with other settings."""
        p = dataclasses.replace(self.p, **changes)
        return Estimate(p, self.shape, self.machine, self.size)

    def pairs(self, share: float) -> float:
        """Pairs of one iteration if `share` of the possible ones can be built."""
        possible = self.questions * self.p.k_pairs * share if self.samples else self.questions
        return min(possible, self.p.max_pairs or math.inf)

    def draws(self) -> dict[str, list[tuple[int, int, int]]]:
        """What is sampled in a stage: (questions, completions of each, how often)."""
        p, n, last = self.p, self.n_eval, self.p.iterations
        greedy, ends = (n, 1, last + 1), (n, p.eval_samples_ends, min(2, last + 1))
        between = [(n, p.eval_samples, last - 1)] if last > 1 else []
        sampling = [(self.questions, p.n_samples, last)] if self.samples else []
        return {"sampling": sampling, "evaluation": [greedy, ends, *between]}

    def notes(self) -> list[str]:
        """What the numbers rest on; for several GPUs also whether each can hold a copy."""
        size, speed, added = self.size, self.machine.note, self.milliseconds[self.engine]
        notes = [
            f"sizes: prompts of {size.prompt} tokens, completions of {self.length}: {size.source}",
            f"expected: {PAIR_SHARE:.0%} of the possible pairs; at most: all, at full length",
            f"speed: {speed}; {added} ms per layer and step of engine {self.engine}",
        ]
        if self.engine == "vllm":
            notes.append("memory: the vLLM server is counted on the same GPUs")
        if self.devices > 1:
            copies = self.replace(shard=False).peak()
            fits = "fits" if copies <= self.room else "does not fit: split it with --shard true"
            notes.append(f"a copy of the model on each GPU needs {_gb(copies)} and {fits}")
        if self.ranks < self.devices:
            notes.append(
                f"only {self.ranks} of {self.devices} GPUs train: a batch of {self.p.batch_size} "
                "has no more equal parts (--batch-size)"
            )
        return notes

    def peak(self) -> float:
        return max(self.memory().values())

    def memory(self) -> dict[str, float]:
        """Peak bytes per stage on one GPU, for the longest prompts and completions."""
        p, s, parts = self.p, self.shape, self.ranks if self.p.shard else 1
        weights = self.layers + self.outside
        fixed = self.machine.libraries + weights / parts
        if parts > 1:  # one layer at work, the next on its way, and what is outside the layers
            fixed += 2 * self.layers / s.layers + self.outside
        drawing = {
            stage: max((self.decoding_bytes(n, k) for n, k, _ in draws), default=0)
            for stage, draws in self.draws().items()
        }
        if self.engine == "vllm":  # a server for each node, which stays there during training
            server = (weights + max(drawing.values())) / min(NODE, self.devices)
            fixed, drawing = fixed + self.machine.libraries + server, dict.fromkeys(drawing, 0)
        logits = logprobs.LOGITS["cpu" if self.machine.name == "cpu" else "cuda"]
        rows = max(1, min(64, logits // (self.new * s.vocabulary)))  # as of `logprobs.score`
        scoring = rows * self.new * s.vocabulary * (self.width + 8)
        scoring += self.forward_bytes(rows * (self.prompt + self.new))
        # Gradients in fp32, again for a repeated step, and two moments of each adapter weight.
        learning = self.adapter * (2.5 if "8bit" in p.optimizer else 4) / parts
        learning += self.micro_batch(self.prompt, self.new)[2]
        return {
            "sampling": fixed + drawing["sampling"] if self.samples else 0,
            "training": fixed + max(learning, scoring) if p.iterations else 0,
            "evaluation": fixed + max(drawing["evaluation"], scoring),
        }

    def rows(self, questions: int, n: int) -> int:
        """Completions that a device holds at once, n per question: no more than there are."""
        there = math.ceil(questions / (1 if self.engine == "vllm" else self.ranks))
        return max(1, min(self.p.sampling_batch_size // n, there)) * n

    def decoding_bytes(self, questions: int, n: int) -> float:
        """First the prompts, then the cache of all rows and their probabilities."""
        s, rows, longest = self.shape, self.rows(questions, n), self.size.longest
        cache = rows * (longest + self.p.max_new_tokens) * self.token
        cache += cache / s.layers * s.query / s.kv  # attention repeats the keys of a layer
        # Per row and word of the vocabulary a logit, and five numbers in fp32, with top-p ten.
        words = rows * s.vocabulary * (self.width + (40 if self.p.top_p < 1 else 20))
        prompts = rows // n * longest  # before they are repeated n times
        return max(cache + words, prompts * self.token + self.forward_bytes(prompts))

    def forward_bytes(self, positions: float) -> float:
        """Activations of one layer without gradients."""
        s = self.shape
        return positions * self.width * (4 * s.hidden + 4 * s.query + 3 * s.intermediate)

    def micro_batch(self, prompt: float, new: float) -> tuple[float, float, float]:
        """(positions, bytes of a layer's activations, peak bytes) of a micro-batch.

        `prompt`, `new`: tokens of the prompt and of a completion. At the peak: all layers (with
        checkpointing their inputs and one layer), a layer's gradients, and the logits, twice in the
        compute dtype and twice in fp32.
        """
        s, width, pairs = self.shape, self.width, self.micro
        two_rows = s.sliding or self.engine == "plain"  # else the completions share a prompt
        positions = pairs * ((2 if two_rows else 1) * prompt + 2 * new)
        in_fp32 = positions * 4 * (5 * s.hidden + s.query + s.intermediate)  # for norms, LoRA's A
        kept = layer = self.forward_bytes(positions) + in_fp32
        kept += s.layers * positions * s.hidden * width
        if not self.p.gradient_checkpointing:
            kept = s.layers * layer
        return positions, layer, kept + layer + 2 * pairs * new * s.vocabulary * (2 * width + 8)

    def work(self, length: float, share: float = 1.0) -> dict[str, tuple[float, float]]:
        """(tokens, hours) per stage and all iterations.

        Completions have `length` tokens, and `share` of the possible pairs can be built.
        """
        work = {stage: self.decoding_work(draws, length) for stage, draws in self.draws().items()}
        return {**work, "training": self.training_work(self.pairs(share), min(length, self.new))}

    def decoding_work(self, draws: list[tuple], length: float) -> tuple[float, float]:
        """(tokens, hours) of some of `draws`: weights, cache, overhead; no prompts."""
        tokens = seconds = 0.0
        # A step of `plain` waits for the longest completion; others are fitted per mean token.
        waiting = self.p.max_new_tokens / length if self.engine == "plain" else 1
        overhead = 1e-3 * self.shape.layers * self.milliseconds[self.engine]
        for questions, n, times in draws:
            here = questions * n / (self.devices if self.engine == "vllm" else self.ranks)
            rows = min(self.rows(questions, n), max(1, here))
            cache = rows * (self.size.prompt + length / 2) * self.token / self.machine.bandwidth
            step = self.product_seconds(rows) + cache + waiting * overhead
            tokens += times * questions * n * length
            seconds += times * here / rows * length * step
        return tokens, seconds / 3600

    def training_work(self, pairs: float, length: float) -> tuple[float, float]:
        """(tokens, hours) of all iterations, the reference's log-probabilities included.

        Activations are written and read, and their gradients written. GPUs send while they compute.
        """
        p, s, m, prompt = self.p, self.shape, self.machine, self.size.prompt
        if p.keep_pairs:
            pairs *= (p.iterations + 1) / 2  # those of 1 to T iterations
        steps = p.max_steps if p.max_steps > 0 else pairs * p.epochs / self.batch
        positions, layer, _ = self.micro_batch(prompt, length)
        passes = 3 if p.gradient_checkpointing else 2  # forward, backward, forward again
        overhead = 1e-3 * s.layers * self.milliseconds["training"]
        computing = passes * (self.product_seconds(positions) + overhead)
        computing += 3 * s.layers * layer / m.bandwidth
        computing *= self.micro_batches
        link = min(m.link, m.between) if self.ranks > NODE else m.link
        reference = self.product_seconds(2 * pairs * (prompt + length)) / self.ranks
        seconds = steps * max(computing, self.sent_per_step() / link) + reference
        tokens = steps * self.batch * (prompt + 2 * length)
        return p.iterations * tokens, p.iterations * seconds / 3600

    def sent_per_step(self) -> float:
        """Bytes that a GPU sends in a step of training, in a ring."""
        sent = 2 * self.adapter  # an all-reduce of the gradients
        if self.p.shard:  # each micro-batch gathers layers twice, and reduce-scatters gradients
            sent = self.micro_batches * (2 * self.layers + self.outside + self.adapter)
        return sent * (self.ranks - 1) / self.ranks

    def product_seconds(self, tokens: float) -> float:
        """All matrix products for so many tokens on one device: the roofline."""
        s, m = self.shape, self.machine
        # NF4 weights are read, written unpacked and read again, as by bitsandbytes.
        weight = machines.NF4_BYTES + 2 * self.width if self.nf4 else self.width
        read = s.linear * weight + s.head * self.width
        return max(read / m.bandwidth, 2 * (s.linear + s.head) * tokens / m.flops[self.dtype])


def table(made: Plan) -> str:
    """The plan as text: a row for each stage, the total, and what was assumed."""
    e, p, m = made.estimate, made.profile, made.machine
    kind = f"{_count(e.shape.parameters)} parameters, {'4-bit base, ' if e.nf4 else ''}{e.dtype}"
    place = f"{m.count} x {'CPU core' if m.name == 'cpu' else m.name}"
    columns = {
        "memory": ("peak memory", _gb),
        "tokens": ("tokens", _count),
        "tokens_at_most": ("at most", _count),
        "hours": ("time", _time),
        "hours_at_most": ("at most", _time),
    }
    if priced := made.total.cost is not None:
        columns["cost"] = ("cost", "{:,.2f}".format)
    header, formatters = zip(*columns.values(), strict=True)
    rows = pandas.DataFrame([*made.stages, made.total]).set_index("name")[list(columns)]
    text = rows.to_string(header=header, formatters=formatters, index_names=False)
    title = f"plan: {p.iterations} x {p.method}, {p.task}, {p.model} ({kind}) on {place}"
    notes = made.notes + ([] if priced else ["cost: give --price PER_HOUR"])
    return "\n".join([title, text, *notes])


def overview(profiles: dict[str, Profile], names=OVERVIEW) -> str:
    """All profiles: parameters, peak memory on the last machine, and the time on each machine."""
    rows = {}
    for name, profile in profiles.items():
        plans = [plan(profile, machine, must_fit=False) for machine in names]
        hours = [_time(p.total.hours) if p.total.memory <= p.room else "-" for p in plans]
        rows[name] = [_count(plans[-1].shape.parameters), _gb(plans[-1].total.memory), *hours]
    text = pandas.DataFrame(rows, index=["parameters", "memory", *names]).T.to_string()
    notes = dict.fromkeys(f"speed: {machines.find_machine(name).note}" for name in names)
    more = "More: python -m irpo_utils plan --profile NAME --gpus 8xA100-80GB --price PER_HOUR"
    memory = f"memory: the peak on {names[-1]}; -: does not fit there as it is set"
    return "\n".join([text, memory, *notes, more])


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _count(number: float) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _time(hours: float) -> str:
    if hours >= 1.5:
        return f"{hours:,.1f} h"
    return f"{60 * hours:,.0f} min" if hours >= 1 / 40 else f"{3600 * hours:,.0f} s"
