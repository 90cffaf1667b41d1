"""Before a run: memory, tokens, hours and cost of each stage. Arithmetic; no model is loaded.

Memory is counted tensor by tensor from the model's shape. Time is a roofline (Williams et al.
2009): a matrix product takes as long as its arithmetic or as reading its weights, whichever is
slower; reading the cache and each layer's overhead are added. Units: bytes, seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import namedtuple

from irpo_utils import UserError, methods
from irpo_utils.ops.machines import (  # noqa: F401  (notebooks use the tables)
    DATA,
    GPUS,
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
CUDA_CONTEXT, CPU_PROCESS = 0.8e9, 0.5e9  # the libraries themselves: assumed, measured
PAIR_SHARE = 0.75  # of the possible pairs: 0.58 to 0.86 in notebooks/shipped_run
KL_QUESTIONS = 256  # as in `iteration`
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
# Settings for training, and the peak bytes with them.
Choice = namedtuple("Choice", "micro_batch_size gradient_checkpointing quantize memory")


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
    if not (e.on_cpu or e.online) and e.share % e.requested:
        raise UserError(
            f"batch_size = {p.batch_size} is not a multiple of micro_batch_size = {e.requested} "
            f"times {e.ranks} processes. Choose another --micro-batch-size."
        )
    length, memory, stages = min(e.size.completion, p.max_new_tokens), e.memory(), []
    expected, at_most = e.work(length, PAIR_SHARE), e.work(p.max_new_tokens, 1.0)
    for name, peak in memory.items():
        (tokens, seconds), (most, longest) = expected[name], at_most[name]
        stages.append(Stage(name, peak, tokens, most, seconds / 3600, longest / 3600, None))
    sums = [sum(column) for column in list(zip(*stages, strict=True))[2:6]]
    stages.append(Stage("total", max(memory.values()), *sums, None))
    if price is not None:
        stages = [row._replace(cost=price * row.hours) for row in stages]
    engine = e.machine.layers[e.engine]
    assumptions = [
        f"sizes: prompts of {e.size.prompt} tokens, completions of {length}: {e.size.source}",
        f"expected: {PAIR_SHARE:.0%} of the possible pairs; at most: all, at full length",
        f"speed: {e.machine.note}; {engine[e.ms]} ms per layer and step of engine {e.engine} "
        f"({e.machine.measured if engine['measured'] else 'assumed'})",
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
    length, ways = min(e.size.completion, e.p.max_new_tokens), []
    for way in (copies, split):
        hours = way.work(length, PAIR_SHARE)["training"][1] / 3600
        ways.append(Sharing(way.memory()["training"], way.sent_per_step(), hours))
    slack = e.room - max(copies.memory().values())
    largest = e.base + slack / (1 + 1 / e.served if e.engine == "vllm" else 1)
    positions = e.micro_batch(e.size.prompt, min(length, e.new))[0]
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
    p, size = made.profile, task_size(made.profile)
    e = Estimate(p, made.shape, made.machine, size)
    rows, pairs = (
        [n >> i for i in range(1, 30) if n >> i] for n in (p.sampling_batch_size, e.micro)
    )
    options = {
        "quantize": [] if p.quantize else [True],
        "gradient_checkpointing": [] if p.gradient_checkpointing else [True],
        "sampling_batch_size": rows,
        "micro_batch_size": [n for n in pairs if e.share % n == 0],
    }
    choices = [[(), *((name, value) for value in values)] for name, values in options.items()]
    candidates = [dict(filter(None, changes)) for changes in itertools.product(*choices)]
    candidates.sort(key=len)
    if made.break_even and not p.shard:
        split = {"shard": True, "engine" if hasattr(p, "engine") else "sampler": "vllm"}
        if "8bit" in p.optimizer or "paged" in p.optimizer:  # FSDP2 cannot split their states
            split["optimizer"] = "adamw_torch"
        candidates.append(split)
    for changes in candidates:
        if max(e.replace(**changes).memory().values()) <= made.room:
            return changes
    return None


def training_bytes(shape, pairs, lengths, checkpointing, width=2, one_row=True, on_cpu=False):
    """(positions, bytes of a layer's activations, peak bytes) of a micro-batch of so many pairs.

    `lengths`: tokens of the prompt and of a completion. `width`: bytes of a number. Per position:
    inputs of norms and LoRA's A in fp32, the four of attention and three of the MLP; on a CPU the
    softmax, its dropout and a mask. At the peak: all layers (with checkpointing their inputs and
    one layer), a layer's gradients, and the logits, twice in the compute dtype and twice in fp32.
    """
    s, (prompt, new) = shape, lengths
    rows = pairs if one_row else 2 * pairs
    positions = rows * prompt + 2 * pairs * new
    wide = s.hidden if width == 4 else 4 * s.hidden + s.query
    numbers = width * (4 * s.query + 3 * s.intermediate)
    layer = positions * (4 * (3 * s.hidden + wide + s.intermediate) + numbers)
    layer += 9 * s.heads * positions**2 / rows if on_cpu else 0
    kept = layer + s.layers * positions * s.hidden * width if checkpointing else s.layers * layer
    return positions, layer, kept + layer + 2 * pairs * new * s.vocabulary * (2 * width + 8)


def choose_training(
    shape, lengths, free_bytes, batch_size, lora_r=16, dtype="bfloat16", optimizer="", one_row=True
) -> Choice:
    """Settings for training on one GPU: the fastest that fit, as far as memory decides.

    `lengths`: tokens of the longest prompt and completion. `free_bytes`: free memory of the GPU
    before it is used. `one_row`: the pair's completions share a prompt. Neither checkpointing nor
    NF4 where that fits, else the first, the second, or both; then the largest micro-batch that
    divides `batch_size`. If nothing fits, the smallest.
    """
    width, one_row = 4 if dtype == "float32" else 2, one_row and not shape.sliding
    sizes = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    for quantize, checkpointing, micro in itertools.product((False, True), (False, True), sizes):
        batch = training_bytes(shape, micro, lengths, checkpointing, width, one_row)
        fixed = CUDA_CONTEXT + sum(shape.base_bytes(quantize, width))
        memory = fixed + shape.adapter_bytes(lora_r, optimizer) + batch[2]
        if memory <= free_bytes * (1 - RESERVE):
            break
    return Choice(micro, checkpointing, quantize, memory)


class Estimate:
    """Memory and work of one profile on one machine."""

    def __init__(self, p: Profile, shape: Shape, machine: Machine, size: TaskSize):
        self.p, self.shape, self.machine, self.size = p, shape, machine, size
        s, count, self.on_cpu = shape, machine.count, machine.name == "cpu"
        method, self.room = methods.get(p.method), machine.memory * (1 - RESERVE)
        self.online = method.train is not None  # GRPO: each completion once, and no reference
        self.draws = (method.samples or self.online) and p.iterations > 0
        server = getattr(p, "sampler", "") == "vllm"
        engine = getattr(p, "engine", None) or ("vllm" if server else "cpu")
        self.engine = engine if engine in machine.layers else "plain"
        self.cores = count if self.on_cpu else 1
        self.loops = self.cores if self.engine == "cpu" else 1  # one decoder per core
        self.dtype = p.dtype or machine.dtype
        self.width = 4 if self.dtype == "float32" else 2
        self.nf4 = p.quantize and not p.dequantize
        self.ms = "nf4_ms" if self.nf4 else "ms"
        layers = machine.layers.items()  # seconds that all layers add to a step or pass
        self.overhead = {name: 1e-3 * s.layers * layer[self.ms] for name, layer in layers}
        # The "cpu" engine samples M_0 from a merged, unpacked copy of a small base.
        self.merges = self.nf4 and self.engine == "cpu" and 4 * s.linear <= 2**31
        self.base, self.unpacked = s.base_bytes(self.nf4, self.width)
        self.frozen = self.base + 4 * s.lora(p.lora_r)  # what FSDP2 splits
        self.outside = (s.parameters - s.linear) * self.width  # embeddings, head and norms
        self.token = s.layers * 2 * s.kv * self.width  # bytes of its keys and values
        self.passes = 3 if p.gradient_checkpointing else 2  # forward, backward, forward again
        limit = p.max_length or 10**9
        self.new = min(p.max_new_tokens, max(1, limit - size.prompt))  # longest in training
        self.prompt = min(size.longest, max(1, limit - self.new))
        self.questions = min(p.n_questions or size.train, size.train)
        available = getattr(size, p.eval_split, size.test)
        self.n_eval = min(p.n_eval_questions or available, available)
        # Processes share a batch in equal parts, so that some GPUs may stay without work.
        busy = 1 if self.on_cpu or self.online else min(count, p.batch_size)
        self.ranks = max(n for n in range(1, busy + 1) if p.batch_size % n == 0)
        batch = max(1, p.batch_size * p.n_samples // 2) if self.online else p.batch_size
        self.share = batch // self.ranks  # pairs of one process in a step
        self.requested = min(p.micro_batch_size or self.share, self.share)
        self.batch = min(batch, self.pairs(1.0) * (max(1, p.iterations) if p.keep_pairs else 1))
        self.micro = min(self.requested, math.ceil(self.batch / self.ranks))
        self.score_on = count if self.on_cpu else self.ranks
        self.draw_on = count if self.engine == "vllm" else self.score_on  # a server uses all
        self.served = 1 if self.on_cpu else min(NODE, count)  # GPUs over which it splits the model
        self.link = min(machine.link, machine.between) if self.ranks > NODE else machine.link
        gathered = 2 * (self.frozen - self.outside) + self.outside  # per micro-batch if split
        self.gathered = gathered * (self.ranks - 1) / self.ranks

    def replace(self, **changes) -> Estimate:
        """The same with other settings."""
        p = dataclasses.replace(self.p, **changes)
        return Estimate(p, self.shape, self.machine, self.size)

    def pairs(self, share: float) -> float:
        """Pairs of one iteration if `share` of the possible ones can be built."""
        if self.online:
            return self.questions * self.p.n_samples / 2
        possible = self.questions * self.p.k_pairs * share if self.draws else self.questions
        return min(possible, self.p.max_pairs or math.inf)

    def evaluations(self) -> list[tuple[int, int, int]]:
        """(questions, completions of each, times): greedy, for KL, sampled at the ends, between."""
        p, n, last = self.p, self.n_eval, self.p.iterations
        draws = [(n, 1, last + 1), (min(KL_QUESTIONS, n), 1, last)]
        draws += [(n, p.eval_samples_ends, min(2, last + 1)), (n, p.eval_samples, last - 1)]
        return [draw for draw in draws if draw[2] > 0]

    def memory(self) -> dict[str, float]:
        """Peak bytes per stage on one GPU, for the longest prompts and completions."""
        p, s, parts = self.p, self.shape, self.ranks if self.p.shard else 1
        # On a CPU the pages of the model's file count as well.
        fixed = CPU_PROCESS + s.parameters * self.width if self.on_cpu else CUDA_CONTEXT
        fixed += self.frozen / parts
        if parts > 1:  # one layer at work, the next on its way, and what is outside the layers
            fixed += 2 * (self.frozen - self.outside) / s.layers + self.outside
        unpacked = s.linear * self.width if self.merges else self.unpacked
        drawing = self.decoding_bytes(self.questions, p.n_samples)
        evaluating = max(self.decoding_bytes(n, k) for n, k, _ in self.evaluations())
        if self.engine == "vllm":  # a server for each node, which stays there during training
            held = self.frozen + max(drawing, evaluating)
            fixed += CUDA_CONTEXT + held / self.served + self.unpacked
            drawing = evaluating = unpacked = 0
        rows = max(1, min(64, 2**28 // ((self.new + 1) * s.vocabulary)))  # as `score` takes them
        logits = rows * (self.new + 1) * s.vocabulary * (self.width + 8)
        scoring = self.unpacked + logits + self.forward_bytes(rows, self.prompt + self.new)
        learning = (s.adapter_bytes(p.lora_r, p.optimizer) - 4 * s.lora(p.lora_r)) / parts
        learning += self.unpacked + self.micro_batch(self.prompt, self.new)[2]
        return {
            "sampling": fixed + unpacked + drawing if self.draws else 0,
            "training": fixed + max(learning, scoring) if p.iterations else 0,
            "evaluation": fixed + max(unpacked + evaluating, scoring),
        }

    def rows(self, questions: int, n: int) -> int:
        """Completions that one decoder holds at once, n per question: no more than there are."""
        decoders = self.loops if self.on_cpu else self.ranks
        there = math.ceil(questions / (1 if self.engine == "vllm" else decoders))
        return max(1, min(self.p.sampling_batch_size // self.loops // n, there)) * n

    def decoding_bytes(self, questions: int, n: int) -> float:
        """Cache of all rows, and of one layer again while rows move; prefill; probabilities."""
        s, rows, longest = self.shape, self.rows(questions, n), self.size.longest
        prompts, columns = min(PREFILL, rows // n), longest + self.p.max_new_tokens + ROOM
        cache = (rows * columns * (1 + 1 / s.layers) + prompts * longest) * self.token
        # Per row and word of the vocabulary a logit, and five numbers in fp32, with top-p ten.
        words = rows * s.vocabulary * (self.width + (40 if self.p.top_p < 1 else 20))
        return self.loops * (cache + words + self.forward_bytes(prompts, longest))

    def forward_bytes(self, rows: int, length: int) -> float:
        """One layer without gradients; on a CPU with attention scores, three times in fp32."""
        s = self.shape
        numbers = 4 * s.hidden + 4 * s.query + 3 * s.intermediate
        scores = 12 * s.heads * length if self.on_cpu else 0
        return rows * length * (numbers * self.width + scores)

    def micro_batch(self, prompt: float, new: float) -> tuple[float, float, float]:
        """`training_bytes` of a micro-batch with these lengths in tokens."""
        two_rows = self.shape.sliding or self.online or self.engine == "plain"
        layout = (self.width, not two_rows, self.on_cpu)
        again = self.p.gradient_checkpointing
        return training_bytes(self.shape, self.micro, (prompt, new), again, *layout)

    def sent_per_step(self) -> float:
        """Bytes that a GPU sends per step in a ring: an all-reduce is two, a reduce-scatter one."""
        gradients = 4 * self.shape.lora(self.p.lora_r) * (self.ranks - 1) / self.ranks
        micro_batches = self.batch / self.micro / self.ranks
        return micro_batches * (self.gathered + gradients) if self.p.shard else 2 * gradients

    def work(self, length: float, share: float) -> dict[str, tuple[float, float]]:
        """(tokens, seconds) per stage and all iterations, with completions of `length` tokens."""
        last, evaluations = self.p.iterations, self.evaluations()
        drawn = (self.questions, self.p.n_samples, last if self.draws else 0)
        tokens, seconds = self.training_work(self.pairs(share), length)
        scored = last * min(KL_QUESTIONS, self.n_eval) * (self.size.prompt + length)
        evaluating = sum(self.decoding_seconds(*draw, length) for draw in evaluations)
        evaluating += self.forward_seconds(scored, self.score_on)
        return {
            "sampling": (length * math.prod(drawn), self.decoding_seconds(*drawn, length)),
            "training": (last * tokens, last * seconds),
            "evaluation": (length * sum(math.prod(draw) for draw in evaluations), evaluating),
        }

    def decoding_seconds(self, questions: int, n: int, times: int, length: float) -> float:
        """Each prompt once; then steps of all rows: weights, cache, and the layers' overhead."""
        here = questions * n / (self.loops if self.on_cpu else self.draw_on)
        rows = min(self.rows(questions, n), max(1, here))
        cache = rows * (self.size.prompt + length / 2) * self.token / self.machine.bandwidth
        unpacked = not self.nf4 or (self.merges and self.width == 4)
        step = (self.product_seconds(rows, unpacked) + cache) * self.loops / self.cores
        # The plain engine does not refill rows: a batch lasts as long as a completion can be.
        waiting = self.p.max_new_tokens / length if self.engine == "plain" else 1
        step += waiting * self.overhead[self.engine]
        prefill = self.forward_seconds(questions * self.size.prompt, self.draw_on)
        return times * (here / rows * length * step + prefill)

    def training_work(self, pairs: float, length: float) -> tuple[float, float]:
        """(tokens, seconds) of one iteration, the reference's log-probabilities included.

        Activations are written and read, and their gradients written. Split layers are sent while
        others are computed.
        """
        p, length = self.p, min(length, self.new)
        if p.keep_pairs and not self.online:
            pairs *= (p.iterations + 1) / 2  # those of 1 to T iterations
        shown, prompts, reference = pairs * p.epochs, 1, 2 * pairs * (self.size.prompt + length)
        if self.online:
            shown, prompts, reference = pairs, 2, 0
        elif p.max_steps > 0:
            shown = p.max_steps * self.batch
        positions, layer, _ = self.micro_batch(self.size.prompt, length)
        step = self.passes * self.product_seconds(positions, not self.nf4)
        step += 3 * self.shape.layers * layer / self.machine.bandwidth
        step = step / self.cores + self.passes * self.overhead["training"]
        each = step * self.batch / self.micro / self.ranks
        sent = self.sent_per_step() / self.link
        seconds = shown / self.batch * (max(each, sent) if p.shard else each + sent)
        tokens = shown * (prompts * self.size.prompt + 2 * length)
        return tokens, seconds + self.forward_seconds(reference, self.score_on)

    def product_seconds(self, tokens: float, unpacked: bool) -> float:
        """All matrix products for so many tokens on one GPU or core: the roofline."""
        s, m = self.shape, self.machine
        # NF4 weights are read, written unpacked and read again, as by bitsandbytes.
        weight = self.width if unpacked else NF4_BYTES + 2 * self.width
        read = s.linear * weight + s.head * self.width
        return max(read / m.bandwidth, 2 * (s.linear + s.head) * tokens / m.flops[self.dtype])

    def forward_seconds(self, tokens: float, workers: int) -> float:
        """So many tokens in one forward pass on so many GPUs or cores, limited by arithmetic."""
        return 2 * self.shape.linear * tokens / self.machine.flops[self.dtype] / workers


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
