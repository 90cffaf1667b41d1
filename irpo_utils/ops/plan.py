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

from irpo_utils import UserError, methods
from irpo_utils.ops.machines import (  # noqa: F401  (notebooks use the tables)
    DATA,
    NF4_BYTES,
    SHAPES,
    TASKS,
    Machine,
    Shape,
    TaskSize,
    find_machine,
    find_shape,
    task_size,
)
from irpo_utils.profiles import Profile

OVERVIEW = ("cpu", "T4-16GB", "RTX4090-24GB", "A100-80GB", "H200-141GB")
NODE = 8  # GPUs of a node
RESERVE = 0.05  # share of the memory that stays free: the allocator cannot use every gap
PAIR_SHARE = 0.75  # of the possible pairs: 0.58 to 0.86 in notebooks/shipped_run
SCORED = 2**28  # logits that `logprobs.score` computes at once, of at most 64 rows
PREFILL, ROOM = 32, 16  # prompts prefilled at once, and spare columns of the cache, when decoding

# A row of the plan: peak bytes on one GPU; tokens and hours of all iterations, and their cost.
Stage = namedtuple("Stage", "name memory tokens tokens_at_most hours hours_at_most cost")
# `room`: bytes that one GPU (or the CPU) has for the run. `break_even`: None if one GPU trains.
Plan = namedtuple("Plan", "profile shape machine room stages total assumptions break_even")
# One way to train on several GPUs: peak bytes on a GPU, bytes it sends per step, hours in all.
Sharing = namedtuple("Sharing", "memory sent hours")
# A copy of the model per GPU against split layers (FSDP2): bytes of the frozen `base`, and the
# largest with which copies fit; tokens of a micro-batch, and from how many on gathering is hidden.
BreakEven = namedtuple("BreakEven", "gpus copies split base largest_base positions hidden_from")


def plan(
    profile: Profile, machine: str | None = None, price: float | None = None, must_fit: bool = True
) -> Plan:
    """What a run takes on `machine` ("8xA100-80GB"; "2xcpu": two cores; None: this computer).

    `price`: of the whole machine per hour. The method's settings are applied, its factor of K by
    `methods.apply` before. Raises `UserError` if the machine or the model cannot be found and, with
    `must_fit`, if the run does not fit.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price is {price}: give the machine's cost per hour, 0 or more.")
    p = dataclasses.replace(profile, **methods.get(profile.method).settings)
    e = Estimate(p, find_shape(p.model), find_machine(machine), task_size(p))
    if not e.online and e.share % e.requested:
        raise UserError(
            f"batch_size = {p.batch_size} is not a multiple of micro_batch_size = {e.requested} "
            f"times {e.ranks} processes. Choose another --micro-batch-size."
        )
    memory, stages = e.memory(), []
    expected, at_most = e.work(e.length, PAIR_SHARE), e.work(p.max_new_tokens, 1.0)
    for name, peak in memory.items():
        (tokens, seconds), (most, longest) = expected[name], at_most[name]
        stages.append(Stage(name, peak, tokens, most, seconds / 3600, longest / 3600, None))
    sums = [sum(column) for column in list(zip(*stages, strict=True))[2:6]]
    stages.append(Stage("total", max(memory.values()), *sums, None))
    if price is not None:
        stages = [row._replace(cost=price * row.hours) for row in stages]
    assumptions = [
        f"sizes: prompts of {e.size.prompt} tokens, completions of {e.length}: {e.size.source}",
        f"expected: {PAIR_SHARE:.0%} of the possible pairs; at most: all, at full length",
        f"speed: {e.machine.note}; {e.overhead_ms[e.engine]} ms per layer and step of engine "
        f"{e.engine}",
    ]
    if e.engine == "vllm":
        assumptions[-1] += "; the server's memory is counted on the same GPUs"
    made = Plan(p, e.shape, e.machine, e.room, stages[:-1], stages[-1], assumptions, break_even(e))
    if must_fit:
        check(made)
    return made


def break_even(e: Estimate) -> BreakEven | None:
    """A copy of the model per GPU, fitting in all stages, against split layers; None: one GPU."""
    if e.ranks == 1 or not e.p.iterations:
        return None
    copies, split = e.replace(shard=False), e.replace(shard=True)
    ways = []
    for way in (copies, split):
        hours = way.work(e.length, PAIR_SHARE)["training"][1] / 3600
        ways.append(Sharing(way.memory()["training"], way.sent_per_step(), hours))
    slack = e.room - max(copies.memory().values())
    largest = e.base + slack / (1 + 1 / e.served if e.engine == "vllm" else 1)
    positions = e.micro_batch(e.size.prompt, min(e.length, e.new))[0]
    flops_per_token = 2 * e.passes * (e.shape.linear + e.shape.head)
    hidden = e.gathered / e.link * e.machine.flops[e.dtype] / flops_per_token
    return BreakEven(e.ranks, *ways, e.base, largest, positions, hidden)


def check(made: Plan) -> None:
    """Raise `UserError` if the peak is above the room, with settings that bring it below."""
    if made.total.memory <= made.room:
        return
    worst, changes = max(made.stages, key=lambda row: row.memory), what_fits(made)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in (changes or {}).items()]
    advice = f"It fits with {' '.join(words).replace('True', 'true')}"
    if not changes:
        advice = "No setting makes it fit: choose a smaller --model or larger GPUs"
    raise UserError(
        f"By estimate this run does not fit: {worst.name} needs {_gb(worst.memory)}, "
        f"{made.machine.name} has room for {_gb(made.room)}, {_gb(worst.memory - made.room)} too "
        f"little. {advice}. To run without this check, add --ignore-plan."
    )


def what_fits(made: Plan) -> dict | None:
    """The fewest and smallest changes of settings with which the run fits; None: there are none."""
    p = made.profile
    e = Estimate(p, made.shape, made.machine, task_size(p))
    options = {
        "quantize": [True],
        "gradient_checkpointing": [True],
        "sampling_batch_size": _halves(p.sampling_batch_size),
        "micro_batch_size": [n for n in _halves(e.micro) if e.share % n == 0],
    }
    subsets = (itertools.combinations(options, n) for n in range(1, len(options) + 1))
    candidates = [
        dict(zip(names, values, strict=True))
        for names in itertools.chain.from_iterable(subsets)
        for values in itertools.product(*(options[name] for name in names))
    ]
    if made.break_even and not p.shard:
        split = {"shard": True, "engine": "vllm"}
        if "8bit" in p.optimizer or "paged" in p.optimizer:  # FSDP2 cannot split their states
            split["optimizer"] = "adamw_torch"
        candidates.append(split)
    for changes in candidates:
        if max(e.replace(**changes).memory().values()) <= made.room:
            return changes
    return None


def _halves(n: int) -> list[int]:
    return [n >> i for i in range(1, n.bit_length())]


class Estimate:
    """Memory and work of one profile on one machine. A CPU's cores count as one device."""

    def __init__(self, p: Profile, shape: Shape, machine: Machine, size: TaskSize):
        self.p, self.shape, self.machine, self.size = p, shape, machine, size
        method, self.room = methods.get(p.method), machine.memory * (1 - RESERVE)
        self.online = method.train is not None  # GRPO: planned as if it trained on pairs
        self.draws = (method.samples or self.online) and p.iterations > 0
        self.engine = p.engine if p.engine in machine.overhead else "plain"
        self.dtype = p.dtype or machine.dtype
        self.width = 4 if self.dtype == "float32" else 2
        self.nf4 = p.quantize and not p.dequantize
        self.overhead_ms = {name: ms[self.nf4] for name, ms in machine.overhead.items()}
        self.outside = (shape.parameters - shape.linear) * self.width  # embeddings and head
        self.base = shape.linear * (NF4_BYTES if self.nf4 else self.width) + self.outside
        self.adapter = 4 * shape.lora(p.lora_r)
        self.frozen = self.base + self.adapter  # what FSDP2 splits
        # In NF4 the largest matrix of a layer is unpacked while it is in use.
        self.unpacked = max(a * b for a, b in shape.matrices) * self.width if self.nf4 else 0
        self.token = shape.layers * 2 * shape.kv * self.width  # bytes of its keys and values
        self.passes = 3 if p.gradient_checkpointing else 2  # forward, backward, forward again
        self.length = min(size.completion, p.max_new_tokens)  # of a completion, expected
        limit = p.max_length or 10**9
        self.new = min(p.max_new_tokens, max(1, limit - size.prompt))  # longest in training
        self.prompt = min(size.longest, max(1, limit - self.new))
        self.questions = min(p.n_questions or size.train, size.train)
        available = getattr(size, p.eval_split)
        self.n_eval = min(p.n_eval_questions or available, available)
        # Processes share a batch in equal parts, so that some GPUs may stay without work.
        busy = 1 if self.online else min(machine.devices, p.batch_size)
        self.ranks = max(n for n in range(1, busy + 1) if p.batch_size % n == 0)
        batch = max(1, p.batch_size * p.n_samples // 2) if self.online else p.batch_size
        self.share = batch // self.ranks  # pairs of one process in a step
        self.requested = min(p.micro_batch_size or self.share, self.share)
        self.batch = min(batch, self.pairs(1.0) * (max(1, p.iterations) if p.keep_pairs else 1))
        self.micro = min(self.requested, math.ceil(self.batch / self.ranks))
        self.draw_on = machine.devices if self.engine == "vllm" else self.ranks  # a server uses all
        self.served = min(NODE, machine.devices)  # GPUs over which a server splits the model
        self.link = min(machine.link, machine.between) if self.ranks > NODE else machine.link
        gathered = 2 * (self.frozen - self.outside) + self.outside  # per micro-batch if split
        self.gathered = gathered * (self.ranks - 1) / self.ranks

    def replace(self, **changes) -> Estimate:
        """The same with other settings."""
        p = dataclasses.replace(self.p, **changes)
        return Estimate(p, self.shape, self.machine, self.size)

    def pairs(self, share: float) -> float:
        """Pairs of one iteration if `share` of the possible ones can be built."""
        possible = self.questions * self.p.k_pairs * share if self.draws else self.questions
        return min(possible, self.p.max_pairs or math.inf)

    def evaluations(self) -> list[tuple[int, int, int]]:
        """(questions, completions of each, times): greedy, sampled at both ends, and between."""
        p, n, last = self.p, self.n_eval, self.p.iterations
        draws = [(n, 1, last + 1), (n, p.eval_samples_ends, min(2, last + 1))]
        return [*draws, (n, p.eval_samples, last - 1)] if last > 1 else draws

    def memory(self) -> dict[str, float]:
        """Peak bytes per stage on one GPU, for the longest prompts and completions."""
        p, s, parts = self.p, self.shape, self.ranks if self.p.shard else 1
        fixed = self.machine.libraries + self.unpacked + self.frozen / parts
        if parts > 1:  # one layer at work, the next on its way, and what is outside the layers
            fixed += 2 * (self.frozen - self.outside) / s.layers + self.outside
        drawing = self.decoding_bytes(self.questions, p.n_samples)
        evaluating = max(self.decoding_bytes(n, k) for n, k, _ in self.evaluations())
        if self.engine == "vllm":  # a server for each node, which stays there during training
            fixed += self.machine.libraries + (self.frozen + max(drawing, evaluating)) / self.served
            drawing = evaluating = 0
        rows = max(1, min(64, SCORED // (self.new * s.vocabulary)))
        logits = rows * self.new * s.vocabulary * (self.width + 8)
        scoring = logits + self.forward_bytes(rows * (self.prompt + self.new))
        # Gradients in fp32, again for a repeated step, and two moments of each adapter weight.
        learning = (8 + (2 if "8bit" in p.optimizer else 8)) * s.lora(p.lora_r) / parts
        learning += self.micro_batch(self.prompt, self.new)[2]
        return {
            "sampling": fixed + drawing if self.draws else 0,
            "training": fixed + max(learning, scoring) if p.iterations else 0,
            "evaluation": fixed + max(evaluating, scoring),
        }

    def rows(self, questions: int, n: int) -> int:
        """Completions that a device holds at once, n per question: no more than there are."""
        there = math.ceil(questions / (1 if self.engine == "vllm" else self.ranks))
        return max(1, min(self.p.sampling_batch_size // n, there)) * n

    def decoding_bytes(self, questions: int, n: int) -> float:
        """Cache of all rows, and of one layer again while rows move; prefill; probabilities."""
        s, rows, longest = self.shape, self.rows(questions, n), self.size.longest
        prompts, columns = min(PREFILL, rows // n), longest + self.p.max_new_tokens + ROOM
        cache = (rows * columns * (1 + 1 / s.layers) + prompts * longest) * self.token
        # Per row and word of the vocabulary a logit, and five numbers in fp32, with top-p ten.
        words = rows * s.vocabulary * (self.width + (40 if self.p.top_p < 1 else 20))
        return cache + words + self.forward_bytes(prompts * longest)

    def forward_bytes(self, positions: float) -> float:
        """Activations of one layer without gradients."""
        s = self.shape
        return positions * self.width * (4 * s.hidden + 4 * s.query + 3 * s.intermediate)

    def micro_batch(self, prompt: float, new: float) -> tuple[float, float, float]:
        """(positions, bytes of a layer's activations, peak bytes) of a micro-batch.

        `prompt`, `new`: tokens of the prompt and of a completion. Activations are those of a
        forward pass, and inputs of norms and of LoRA's A in fp32. At the peak: all layers (with
        checkpointing their inputs and one layer), a layer's gradients, and the logits, twice in the
        compute dtype and twice in fp32.
        """
        s, width, pairs = self.shape, self.width, self.micro
        two_rows = s.sliding or self.engine == "plain"  # else the completions share a prompt
        positions = pairs * ((2 if two_rows else 1) * prompt + 2 * new)
        layer = self.forward_bytes(positions) + positions * 4 * (
            5 * s.hidden + s.query + s.intermediate
        )
        kept = s.layers * layer
        if self.p.gradient_checkpointing:
            kept = layer + s.layers * positions * s.hidden * width
        return positions, layer, kept + layer + 2 * pairs * new * s.vocabulary * (2 * width + 8)

    def sent_per_step(self) -> float:
        """Bytes that a GPU sends per step in a ring: an all-reduce is two, a reduce-scatter one."""
        gradients = self.adapter * (self.ranks - 1) / self.ranks
        micro_batches = self.batch / self.micro / self.ranks
        return micro_batches * (self.gathered + gradients) if self.p.shard else 2 * gradients

    def work(self, length: float, share: float) -> dict[str, tuple[float, float]]:
        """(tokens, seconds) per stage and all iterations, with completions of `length` tokens."""
        last, evaluations = self.p.iterations, self.evaluations()
        drawn = (self.questions, self.p.n_samples, last if self.draws else 0)
        tokens, seconds = self.training_work(self.pairs(share), length)
        evaluating = sum(self.decoding_seconds(*draw, length) for draw in evaluations)
        return {
            "sampling": (length * math.prod(drawn), self.decoding_seconds(*drawn, length)),
            "training": (last * tokens, last * seconds),
            "evaluation": (length * sum(math.prod(draw) for draw in evaluations), evaluating),
        }

    def decoding_seconds(self, questions: int, n: int, times: int, length: float) -> float:
        """Steps of all rows: weights, cache, and the layers' overhead. Prompts are left out."""
        here = questions * n / self.draw_on
        rows = min(self.rows(questions, n), max(1, here))
        cache = rows * (self.size.prompt + length / 2) * self.token / self.machine.bandwidth
        # Per step for `plain` (as many as the longest completion); fitted per mean token elsewhere.
        waiting = self.p.max_new_tokens / length if self.engine == "plain" else 1
        step = self.product_seconds(rows) + cache + waiting * self.overhead_seconds(self.engine)
        return times * here / rows * length * step

    def training_work(self, pairs: float, length: float) -> tuple[float, float]:
        """(tokens, seconds) of one iteration, the reference's log-probabilities included.

        Activations are written and read, and their gradients written. Split layers are sent while
        others are computed.
        """
        p, length = self.p, min(length, self.new)
        if p.keep_pairs:
            pairs *= (p.iterations + 1) / 2  # those of 1 to T iterations
        shown = p.max_steps * self.batch if p.max_steps > 0 else pairs * p.epochs
        positions, layer, _ = self.micro_batch(self.size.prompt, length)
        one_pass = self.product_seconds(positions) + self.overhead_seconds("training")
        step = self.passes * one_pass + 3 * self.shape.layers * layer / self.machine.bandwidth
        each = step * self.batch / self.micro / self.ranks
        sent = self.sent_per_step() / self.link
        seconds = shown / self.batch * (max(each, sent) if p.shard else each + sent)
        reference = 2 * self.shape.linear * pairs * 2 * (self.size.prompt + length)
        seconds += reference / self.machine.flops[self.dtype] / self.ranks
        return shown * (self.size.prompt + 2 * length), seconds

    def overhead_seconds(self, engine: str) -> float:
        """What all layers add to a step of decoding, or to a pass of training."""
        return 1e-3 * self.shape.layers * self.overhead_ms[engine]

    def product_seconds(self, tokens: float) -> float:
        """All matrix products for so many tokens on one device: the roofline."""
        s, m = self.shape, self.machine
        # NF4 weights are read, written unpacked and read again, as by bitsandbytes.
        weight = NF4_BYTES + 2 * self.width if self.nf4 else self.width
        read = s.linear * weight + s.head * self.width
        return max(read / m.bandwidth, 2 * (s.linear + s.head) * tokens / m.flops[self.dtype])


def table(made: Plan) -> str:
    """The plan as text: a row for each stage, the total, and what was assumed."""
    m, p, priced = made.machine, made.profile, made.total.cost is not None
    kind = f"{'4-bit base, ' if p.quantize and not p.dequantize else ''}{p.dtype or m.dtype}"
    place = f"{m.count} x {m.name if m.name != 'cpu' else 'CPU core'}"
    model = f"{p.model} ({_count(made.shape.parameters)} parameters, {kind})"
    cells = [["", "peak memory", "tokens", "at most", "time", "at most", "cost"]]
    for name, memory, tokens, most, hours, longest, cost in (*made.stages, made.total):
        row = [name, _gb(memory), _count(tokens), _count(most), _time(hours), _time(longest)]
        cells.append([*row, f"{cost:,.2f}" if priced else ""])
    lines = [f"plan: {p.iterations} x {p.method}, {p.task}, {model} on {place}"]
    lines += _aligned(cells if priced else [row[:-1] for row in cells]) + made.assumptions
    lines += [] if priced else ["cost: give --price PER_HOUR"]
    if b := made.break_even:
        few = f": a batch of {p.batch_size} has no more equal parts (--batch-size)"
        far = f" ({NODE} GPUs a node, {DATA['between_nodes']} GB/s between nodes)"
        cells = [["", "peak memory", "sent per step", "time"]]
        for name, row in (("a copy per GPU", b.copies), ("split layers (--shard)", b.split)):
            name += "" if row.memory <= made.room else ", does not fit"
            cells.append([name, _gb(row.memory), _gb(row.sent), _time(row.hours)])
        lines += ["", f"training on {b.gpus} of {m.count} GPUs{few if b.gpus < m.count else ''}"]
        lines += _aligned(cells)
        lines += [
            f"break-even: copies fit with up to {_gb(max(0, b.largest_base))} of frozen weights "
            f"(here {_gb(b.base)}); split layers cost no time from {b.hidden_from:,.0f} tokens per "
            f"micro-batch on (here {b.positions:,.0f})",
            f"assumed: {(min(m.link, m.between) if b.gpus > NODE else m.link) / 1e9:,.0f} GB/s "
            f"between GPUs{far if b.gpus > NODE else ''}",
        ]
    return "\n".join(lines)


def overview(profiles: dict[str, Profile], machines=OVERVIEW) -> str:
    """All profiles: parameters, peak memory on the last machine, and the time on each machine."""
    cells = [["", "parameters", "memory", *machines]]
    for name, profile in profiles.items():
        plans = [plan(profile, machine, must_fit=False) for machine in machines]
        hours = [_time(p.total.hours) if p.total.memory <= p.room else "-" for p in plans]
        size, memory = _count(plans[-1].shape.parameters), _gb(plans[-1].total.memory)
        cells.append([name, size, memory, *hours])
    notes = dict.fromkeys(f"speed: {find_machine(name).note}" for name in machines)
    more = "More: python -m irpo_utils plan --profile NAME --gpus 8xA100-80GB --price PER_HOUR"
    memory = f"memory: the peak on {machines[-1]}; -: does not fit there as it is set"
    return "\n".join([*_aligned(cells), memory, *notes, more])


def _aligned(cells: list[list[str]]) -> list[str]:
    """Rows of a table: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    form = f"{{:{first}}}" + "".join(f"{{:>{width}}}" for width in others)
    return [form.format(*row) for row in cells]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _count(number: float) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _time(hours: float) -> str:
    if hours >= 1.5:
        return f"{hours:,.1f} h"
    return f"{60 * hours:,.0f} min" if hours >= 1 / 40 else f"{3600 * hours:,.0f} s"
