"""Before a run: how much memory, how many tokens, how many hours, and what it costs. Arithmetic; no model is loaded.

Memory is counted tensor by tensor from the shape of the model. Time is a roofline (Williams et al. 2009): a matrix
product takes as long as its arithmetic or as reading its weights, whichever is slower; to that come the cache, the
activations, and what every layer of every step costs in Python. Units are bytes and seconds, where not said otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from irpo_utils import UserError, methods, models, sampling, tasks
from irpo_utils.profiles import Profile

# Per card: memory (GB), dense bf16 TFLOP/s (fp16 where it has no bf16), GB/s, whether it has bf16; from data sheets.
CARDS = {
    "T4-16GB": (16, 65, 320, False),
    "V100-32GB": (32, 125, 900, False),
    "L4-24GB": (24, 121, 300, True),
    "A10-24GB": (24, 125, 600, True),
    "RTX3090-24GB": (24, 71, 936, True),
    "RTX4090-24GB": (24, 165, 1008, True),
    "A100-40GB": (40, 312, 1555, True),
    "A100-80GB": (80, 312, 2039, True),
    "H100-80GB": (80, 989, 3350, True),
    "H200-141GB": (141, 989, 4800, True),
}
OVERVIEW = ("cpu", "T4-16GB", "RTX4090-24GB", "A100-80GB", "H200-141GB")
# GB/s from a card to its neighbour, one way: NVLink where the cards have it, else PCIe. And to a card of another node.
LINKS = {
    "T4": 16,
    "V100": 150,
    "L4": 32,
    "A10": 32,
    "RTX3090": 32,
    "RTX4090": 32,
    "A100": 300,
    "H100": 450,
    "H200": 450,
}
NODE, BETWEEN_NODES = 8, 25  # cards of one node, and 200 Gbit/s of InfiniBand for each; assumed
RESERVE = 0.05  # share of the memory that stays free: the allocator cannot use every gap

# What a GPU reaches of its data sheet with transformers, PEFT and bitsandbytes, nothing compiled. Not measured.
GPU_FLOPS, GPU_BANDWIDTH = 0.35, 0.6
GPU_LAYER = (
    1e-3  # seconds per layer and step: Python and the launches of its kernels, LoRA's included
)
FP32_SHARE = 1 / 16  # of a GPU's 16-bit speed in fp32 (A100: 19.5 of 312 TFLOP/s)
# What a core of a CPU reaches, fitted to figures/bench.csv and finished runs: from one run to the next the same core
# took half or twice as long, as others worked beside it. The numbers lie in the middle.
CPU_FLOPS = {"float32": 25e9, "bfloat16": 90e9, "float16": 90e9}
CPU_BANDWIDTH, CPU_LAYER = 2.5e9, 0.7e-3

CUDA_CONTEXT = 0.8e9  # context, kernels and workspaces of torch, cuBLAS and bitsandbytes; assumed
CPU_PROCESS = 0.5e9  # Python with torch, transformers, TRL and PEFT in it; measured
NF4_BYTES = (
    4 + 0.127
) / 8  # per weight: 4 bits and its share of the doubly quantised constants (Dettmers et al. 2023)
PAIR_SHARE = 0.75  # of K pairs a question: 0.58 to 0.86 in notebooks/shipped_run, 0.02 where M_0 was too weak
KL_QUESTIONS = 256  # as in `iteration`, which takes seconds to import


@dataclass
class TaskSize:
    """Tokens of a prompt (mean, longest) and of a completion (mean), and questions per split."""

    prompt: int
    longest: int
    completion: int
    train: int
    validation: int
    test: int
    source: str = "assumed"  # where the length of a completion comes from


# Prompts as SmolLM2's tokenizer cuts them, those of word_problems as the seed model's does.
TASKS = {
    "word_problems": TaskSize(58, 90, 27, 2400, 500, 500, "measured with the seed model"),
    "word_choices": TaskSize(58, 90, 27, 2400, 500, 500, "as of word_problems"),
    "gsm8k": TaskSize(131, 265, 200, 6473, 1000, 1319),
    "svamp": TaskSize(113, 146, 114, 700, 100, 200, "measured with SmolLM2-135M, cut off at 128"),
    "arc_challenge": TaskSize(140, 260, 150, 946, 166, 1172),
    "math": TaskSize(704, 1991, 300, 4739, 836, 5000),
    "jsonl": TaskSize(130, 300, 200, 800, 100, 100),
}


@dataclass
class Shape:
    """A decoder like Llama's, as far as the arithmetic needs it; `linear`, `head` and `parameters` count weights."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True  # embeddings and output layer are one matrix
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma 3
    norms: int = 2  # per layer; Gemma 3 has 4
    shares_prompt: bool = True  # see `models.can_share_prompt`

    def __post_init__(self):
        h, i = self.hidden, self.intermediate
        self.query, self.kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.matrices = [
            (h, self.query),
            (h, self.kv),
            (h, self.kv),
            (self.query, h),
            (h, i),
            (h, i),
            (i, h),
        ]
        self.linear = self.layers * sum(
            a * b for a, b in self.matrices
        )  # all that is quantised and gets LoRA
        self.head = self.vocabulary * h
        small = (
            (self.query + 2 * self.kv) * self.qkv_bias
            + 2 * self.head_dim * self.qk_norm
            + self.norms * h
        )
        self.parameters = (
            self.linear + self.head * (1 if self.tied else 2) + self.layers * small + h
        )

    def lora(self, rank: int) -> int:
        return self.layers * rank * sum(a + b for a, b in self.matrices)


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 64, 49152),
    "smollm2-1.7b": Shape(24, 2048, 8192, 32, 32, 64, 49152),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, qkv_bias=True),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, qkv_bias=True),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "gemma-3-1b": Shape(
        26, 1152, 6912, 4, 1, 256, 262144, qk_norm=True, norms=4, shares_prompt=False
    ),
    "llama-2-70b-chat": Shape(80, 8192, 28672, 64, 8, 128, 32000, tied=False),
}


@dataclass
class Machine:
    """`count` cards that share the questions, or a CPU with `count` cores; memory and speeds are those of one.

    `link`, `between`: bytes per second from one card to the next, one way, in its node and to another one.
    """

    name: str
    count: int
    memory: float
    flops: dict[str, float]  # per second and dtype, as reached
    bandwidth: float
    layer_seconds: float
    dtype: str  # what `models.default_dtype` chooses there
    note: str
    link: float = math.inf
    between: float = math.inf


@dataclass
class Stage:
    """A row of the plan: peak bytes on one card; tokens and hours of all iterations, as expected and at most."""

    name: str
    memory: float
    tokens: float
    tokens_at_most: float
    hours: float
    hours_at_most: float
    cost: float | None = None


@dataclass
class Sharing:
    """Training on several cards in one way: peak bytes on a card, bytes that a card sends per optimiser step, hours."""

    memory: float
    sent: float
    hours: float


@dataclass
class BreakEven:
    """Whole copies of the model on `cards` (data parallel) against layers split over them (FSDP2).

    `base`, `largest_base`: bytes of the frozen weights here, and at which whole copies no longer fit. `positions`: tokens of a
    micro-batch here; from `hidden_from` on the split weights arrive while the products of the layer before are at work.
    """

    cards: int
    copies: Sharing
    split: Sharing
    base: float
    largest_base: float
    positions: float
    hidden_from: float


@dataclass
class Plan:
    """What a run is expected to take; `total.memory` is the peak, `room` what one card has for it, both in bytes.

    `break_even` is there where several cards train.
    """

    profile: Profile
    shape: Shape
    machine: Machine
    room: float
    stages: list[Stage]
    total: Stage
    assumptions: list[str]
    break_even: BreakEven | None = None


def plan(
    profile: Profile, machine: str | None = None, price: float | None = None, must_fit: bool = True
) -> Plan:
    """What a run takes on `machine` ("8xA100-80GB", "cpu", "2xcpu" for two cores; None: this computer) at `price` an hour.

    Raises `UserError` for a machine or model that cannot be found and, with `must_fit`, for a run that does not fit.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError(
            f"--price is {price}; it is what the whole machine costs an hour, 0 or more."
        )
    profile = methods.apply(profile)
    e = _Estimate(profile, find_shape(profile.model), find_machine(machine), task_size(profile))
    if not (e.on_cpu or e.online) and profile.batch_size // e.ranks % e.micro:
        raise UserError(
            f"batch_size = {profile.batch_size} is not a multiple of micro_batch_size = {e.micro} times {e.ranks} "
            "processes."
        )
    length, memory = min(e.size.completion, profile.max_new_tokens), e.memory()
    expected, most = e.work(length, PAIR_SHARE), e.work(profile.max_new_tokens, 1.0)
    stages = [
        Stage(
            name,
            memory[name],
            *(x[name][i] / unit for i, unit in enumerate((1, 3600)) for x in (expected, most)),
        )
        for name in memory
    ]
    sums = (
        sum(getattr(row, name) for row in stages)
        for name in ("tokens", "tokens_at_most", "hours", "hours_at_most")
    )
    total = Stage("total", max(memory.values()), *sums)
    for row in (*stages, total):
        row.cost = None if price is None else price * row.hours
    made = Plan(
        profile,
        e.shape,
        e.machine,
        e.machine.memory * (1 - RESERVE),
        stages,
        total,
        [
            f"expected: {length} tokens a completion ({e.size.source}) and {PAIR_SHARE:.0%} of the possible pairs; at most: all",
            e.machine.note
            + (
                "; the server's memory is counted on the same cards"
                if profile.sampler == "vllm"
                else ""
            ),
        ],
        break_even(profile, e.shape, e.machine, e.size),
    )
    if must_fit:
        check(made)
    return made


def break_even(
    profile: Profile, shape: Shape, machine: Machine, size: TaskSize
) -> BreakEven | None:
    """Training with whole copies of the model against layers split over the cards; None where one card trains.

    Whole copies have to fit in all stages, and where a server writes the completions its part of the base grows, too.
    """
    copies, split = (
        _Estimate(dataclasses.replace(profile, shard=shard), shape, machine, size)
        for shard in (False, True)
    )
    if copies.on_cpu or copies.ranks == 1 or not profile.iterations:
        return None
    length = min(size.completion, profile.max_new_tokens)
    both = [
        Sharing(
            e.memory()["training"],
            e.sent_per_step(),
            e.work(length, PAIR_SHARE)["training"][1] / 3600,
        )
        for e in (copies, split)
    ]
    gathered = (
        split.gathered_bytes() / split.link / (2 + profile.gradient_checkpointing)
    )  # per pass of all layers
    slack = machine.memory * (1 - RESERVE) - max(copies.memory().values())
    held = 1 + 1 / copies.served if profile.sampler == "vllm" else 1
    return BreakEven(
        copies.ranks,
        *both,
        copies.base,
        copies.base + slack / held,
        copies.layer_bytes(size.prompt, min(length, copies.lengths()[1]))[0],
        gathered * machine.flops[copies.dtype] / 2 / (shape.linear + shape.head),
    )


def check(made: Plan) -> None:
    """Raise `UserError` if the peak is above the room, with the settings that bring it below."""
    if made.total.memory <= made.room:
        return
    worst, changes = max(made.stages, key=lambda row: row.memory), what_fits(made)
    options = " ".join(
        f"--{name.replace('_', '-')} {str(value).lower() if value is True else value}"
        for name, value in (changes or {}).items()
    )
    advice = (
        f"It fits with {options}"
        if changes
        else "No setting makes it fit: take a smaller --model or larger cards"
    )
    raise UserError(
        f"By estimate this run does not fit: {worst.name} needs {_gb(worst.memory)}, {made.machine.name} has room "
        f"for {_gb(made.room)}, {_gb(worst.memory - made.room)} too little. {advice}. With --ignore-plan `run` goes "
        "on anyway."
    )


def what_fits(made: Plan) -> dict | None:
    """The mildest change of settings with which the run fits, a single one if that is enough; None if there is none."""
    p, size = made.profile, task_size(made.profile)
    share = p.batch_size // (made.break_even.cards if made.break_even else 1)  # of a process
    share *= p.n_samples // 2 if methods.get(p.method).train else 1
    options = {
        "micro_batch_size": [
            n for n in _halves(min(p.micro_batch_size or share, share)) if share % n == 0
        ],
        "sampling_batch_size": _halves(p.sampling_batch_size),
        "gradient_checkpointing": [True] * (not p.gradient_checkpointing),
        "quantize": [True] * (not p.quantize),
    }

    def fits(changes: dict) -> bool:
        estimate = _Estimate(dataclasses.replace(p, **changes), made.shape, made.machine, size)
        return max(estimate.memory().values()) <= made.room

    changes: dict = {}
    for name, values in options.items():
        changes |= {name: values[-1]} if values else {}
        if fits(changes):
            break
    else:
        whole = "8bit" in p.optimizer or "paged" in p.optimizer
        split = {"shard": True, "sampler": "vllm"} | ({"optimizer": "adamw_torch"} if whole else {})
        can = made.break_even and not p.shard and not methods.get(p.method).train
        return split if can and fits(split) else None
    for name in list(changes):  # back to what it was, or to the mildest that is enough
        others = {key: value for key, value in changes.items() if key != name}
        changes = next(
            c for c in (others, *({**others, name: value} for value in options[name])) if fits(c)
        )
    return changes


@dataclass
class _Estimate:
    """Memory and work of one profile on one machine."""

    p: Profile
    shape: Shape
    machine: Machine
    size: TaskSize

    def __post_init__(self):
        s, self.on_cpu = self.shape, self.machine.name == "cpu"
        self.cores = (
            self.machine.count if self.on_cpu else 1
        )  # `sampling` has a loop for each, in one memory
        self.dtype = self.p.dtype or self.machine.dtype
        self.bytes = 4 if self.dtype == "float32" else 2
        self.in_4_bits = self.p.quantize and not self.p.dequantize
        self.online = (
            methods.get(self.p.method).train is not None
        )  # GRPO: learns from each completion once, without a reference
        self.draws = (methods.get(self.p.method).samples or self.online) and self.p.iterations > 0
        self.multiplied_out = self.in_4_bits and 4 * s.linear <= 2**31  # in 16 bits at M_0 alone
        self.cache = s.layers * 2 * s.kv * self.bytes  # keys and values of one token
        # Processes, one a card: they share the batch in equal parts, so that it may keep fewer busy than there are cards.
        count, batch = self.machine.count, self.p.batch_size
        self.ranks = (
            1
            if self.on_cpu or self.online
            else max(n for n in range(1, min(count, batch) + 1) if batch % n == 0)
        )
        self.micro = min(self.p.micro_batch_size or batch, batch // self.ranks)
        self.batch = batch  # pairs in a step
        if self.online:  # two completions each: see `grpo.train`
            self.batch = batch * self.p.n_samples / 2
            self.micro = self.p.micro_batch_size or self.batch / self.ranks
        self.score_on = count if self.on_cpu else self.ranks
        self.draw_on = count if self.p.sampler == "vllm" else self.score_on  # a server takes all
        self.link = (
            min(self.machine.link, self.machine.between) if self.ranks > NODE else self.machine.link
        )
        self.base = (
            s.linear * (NF4_BYTES if self.in_4_bits else self.bytes)
            + (s.parameters - s.linear) * self.bytes
        )
        self.parts = self.ranks if self.p.shard else 1  # of every weight, in training
        self.served = (
            min(NODE, self.machine.count) if not self.on_cpu else 1
        )  # cards over which a server splits it

    def memory(self) -> dict[str, float]:
        """Peak bytes per stage on one card, for the longest prompts and completions.

        The base: NF4 or the compute dtype for the linear layers, the latter for embeddings and norms. On a CPU the pages
        of the model's file count as well. LoRA in fp32; in training its gradients in fp32, kept twice in case a step has to
        be taken again, and Adam's two moments. Split over cards, a card has its part of all that, and whole at a time two
        layers (one at work, the next on its way), the embeddings and the head. A server that writes the completions is
        taken to split the model over the cards of a node; it stays there, beside the model that is trained.
        """
        p, s = self.p, self.shape
        adapter = 4 * s.lora(p.lora_r)
        process = CPU_PROCESS + s.parameters * self.bytes if self.on_cpu else CUDA_CONTEXT
        layer = (
            max(a * b for a, b in s.matrices) * self.bytes * self.in_4_bits
        )  # unpacked while it is in use
        unpacked = s.linear * self.bytes if self.multiplied_out else layer
        learning = (8 + (2 if "8bit" in p.optimizer else 8)) * s.lora(p.lora_r) / self.parts
        scoring = layer + self.scoring_bytes()
        whole = (2 * (self.base + adapter - self.root) / s.layers + self.root) * (self.parts > 1)
        fixed = process + (self.base + adapter) / self.parts + whole
        drawing = self.decoding_bytes(p.n_samples)
        evaluating = max(self.decoding_bytes(k) for k in (1, p.eval_samples, p.eval_samples_ends))
        if p.sampler == "vllm":
            fixed += (
                CUDA_CONTEXT
                + (self.base + adapter + max(drawing, evaluating)) / self.served
                + layer
            )  # the server
            drawing = evaluating = unpacked = 0
        return {
            "sampling": (fixed + unpacked + drawing) * self.draws,
            "training": (fixed + max(learning + layer + self.training_bytes(), scoring))
            * (p.iterations > 0),
            "evaluation": fixed + max(unpacked + evaluating, scoring),
        }

    @property
    def root(self) -> float:
        """Bytes of what lies outside the layers: embeddings, head, last norm."""
        return (self.shape.parameters - self.shape.linear) * self.bytes

    def gathered_bytes(self) -> float:
        """What a card receives per micro-batch where layers are split: the other cards' parts of every layer, once forward
        and once backward, and once of what lies outside the layers."""
        return (
            (2 * (self.base + 4 * self.shape.lora(self.p.lora_r) - self.root) + self.root)
            * (self.ranks - 1)
            / self.ranks
        )

    def sent_per_step(self) -> float:
        """Bytes that a card sends per optimiser step. In a ring a sum of gradients goes round twice, which is an all-reduce,
        and once where every card needs its part alone, a reduce-scatter; put together again, weights go round once."""
        micro_batches = self.p.batch_size / self.micro / self.ranks
        gradients = 4 * self.shape.lora(self.p.lora_r) * (self.ranks - 1) / self.ranks
        return (
            micro_batches * (self.gathered_bytes() + gradients) if self.p.shard else 2 * gradients
        )

    def rows(self, n: int) -> int:
        """Completions that one loop of `sampling` decodes at once, n of each prompt."""
        return max(1, self.p.sampling_batch_size // self.cores // n) * n

    def decoding_bytes(self, n: int) -> float:
        """Keys and values of all rows, and of one layer once more while rows are moved; the prefill; probabilities.

        These are, per row and word of the vocabulary, a logit, five numbers in fp32, and with top-p sorted ones.
        """
        s, rows, prompts = self.shape, self.rows(n), min(sampling.PREFILL, self.rows(n) // n)
        columns = self.size.longest + self.p.max_new_tokens + sampling.ROOM
        cache = (rows * columns * (1 + 1 / s.layers) + prompts * self.size.longest) * self.cache
        words = rows * s.vocabulary * (self.bytes + 20 + 20 * (self.p.top_p < 1))
        return self.cores * (cache + words + self.forward_bytes(prompts, self.size.longest))

    def forward_bytes(self, rows: int, length: int) -> float:
        """One layer without gradients: its activations, and on a CPU the attention scores, three times in fp32."""
        s = self.shape
        return (
            rows * length * (4 * s.hidden + 4 * s.query + 3 * s.intermediate) * self.bytes
            + 12 * rows * s.heads * length**2 * self.on_cpu
        )

    def scoring_bytes(self) -> float:
        """`models.score`: at most 64 rows and 2^28 logits, in the compute dtype and twice in fp32."""
        prompt, new = self.lengths()
        rows = max(1, min(64, 2**28 // ((new + 1) * self.shape.vocabulary)))
        return rows * (new + 1) * self.shape.vocabulary * (self.bytes + 8) + self.forward_bytes(
            rows, prompt + new
        )

    def lengths(self) -> tuple[int, int]:
        """Tokens of the longest prompt and response that `max_length` lets through."""
        limit = self.p.max_length or 10**9
        new = min(self.p.max_new_tokens, max(1, limit - self.size.prompt))
        return min(self.size.longest, max(1, limit - new)), new

    def layer_bytes(self, prompt: float, new: float) -> tuple[float, float]:
        """(positions, bytes of one layer's activations that are kept for the backward pass) of a micro-batch.

        Per position: the inputs of both norms and of the LoRA matrices A in fp32 (copies where the base is in 16 bits);
        queries, keys, values and output of the attention; gate, its silu and up. On a CPU the attention weights, too.
        """
        s, d = self.shape, self.bytes
        in_one = s.shares_prompt and not self.online  # a pair in one row
        rows, length = (self.micro, prompt + 2 * new) if in_one else (2 * self.micro, prompt + new)
        inputs = (
            2 * s.hidden + s.intermediate if d == 4 else 5 * s.hidden + s.query + s.intermediate
        )
        weights = (
            9 * rows * s.heads * length**2 * self.on_cpu
        )  # softmax, the same after dropout of 0, a mask
        rest = (
            rows * length * (4 * (2 * s.hidden + inputs) + d * (4 * s.query + 3 * s.intermediate))
        )
        return rows * length, weights + rest

    def training_bytes(self) -> float:
        """Activations of all layers, or with checkpointing each layer's input and all of one layer; a layer's gradients;
        the responses' logits twice in the compute dtype and twice in fp32."""
        s, (prompt, new) = self.shape, self.lengths()
        positions, layer = self.layer_bytes(prompt, new)
        kept = (
            layer + s.layers * positions * s.hidden * self.bytes
            if self.p.gradient_checkpointing
            else s.layers * layer
        )
        return kept + layer + 2 * self.micro * new * s.vocabulary * (2 * self.bytes + 8)

    def work(self, length: float, share: float) -> dict[str, tuple[float, float]]:
        """(tokens, seconds) per stage over all iterations, for completions of this length and this share of the pairs."""
        p, size, last = self.p, self.size, self.p.iterations
        n = min(p.n_questions or size.train, size.train)
        available = getattr(size, p.eval_split, size.test)
        n_eval = min(p.n_eval_questions or available, available)
        drawn = last * n * p.n_samples * self.draws
        pairs = min(
            n * p.k_pairs * share if self.draws else n, p.max_pairs or math.inf
        )  # else one gold pair each
        pairs = n * p.n_samples / 2 if self.online else pairs
        compared = last * min(KL_QUESTIONS, n_eval)  # for the KL: drawn, then scored
        evaluation = [((last + 1) * n_eval + compared, 1)] + [
            (n_eval * k, k)
            for k in (
                p.eval_samples_ends if t in (0, last) else p.eval_samples for t in range(last + 1)
            )
        ]
        trained, seconds = self.training_work(pairs, length)
        scored = compared * (size.prompt + length)
        return {
            "sampling": (drawn * length, self.decoding_seconds(drawn, p.n_samples, length)),
            "training": (last * trained, last * seconds),
            "evaluation": (
                sum(c for c, _ in evaluation) * length,
                self.forward_seconds(scored, self.score_on)
                + sum(self.decoding_seconds(c, k, length) for c, k in evaluation),
            ),
        }

    def decoding_seconds(self, completions: float, n: int, length: float) -> float:
        """Each prompt once; then steps of all rows: weights, the cache so far, and the layers' overhead."""
        here, s, m = completions / self.draw_on, self.shape, self.machine
        rows = min(self.rows(n), max(1, here))
        cache = rows * (self.size.prompt + length / 2) * self.cache / m.bandwidth
        unpacked = not self.in_4_bits or self.multiplied_out and self.bytes == 4
        step = self.product_seconds(rows, unpacked) + cache + s.layers * m.layer_seconds
        return here / rows * length * step + self.forward_seconds(
            completions / n * self.size.prompt, self.draw_on
        )

    def training_work(self, pairs: float, length: float) -> tuple[float, float]:
        """(tokens, seconds) of one iteration, the reference's log-probabilities included.

        Passes of 2 FLOPs per weight and token: forward, backward for the activations (a frozen base has no gradients of
        its own), with checkpointing forward again. Kept activations are written, read, and their gradients written.
        """
        p, m = self.p, self.machine
        shown = (
            pairs
            if self.online
            else p.max_steps * self.batch
            if p.max_steps > 0
            else pairs * p.epochs
        )
        length, passes = min(length, self.lengths()[1]), 2 + p.gradient_checkpointing
        positions, layer = self.layer_bytes(self.size.prompt, length)
        step = (
            passes * self.product_seconds(positions, not self.in_4_bits)
            + 3 * self.shape.layers * layer / m.bandwidth
        )
        step = (
            step / self.cores + 2 * passes * self.shape.layers * m.layer_seconds
        )  # cores share a micro-batch
        sent = self.sent_per_step() / self.link  # of split layers it comes while others are at work
        each = self.batch / self.micro / self.ranks  # micro-batches of one card in a step
        seconds = shown / self.batch * (max(each * step, sent) if p.shard else each * step + sent)
        reference = self.forward_seconds(2 * pairs * (self.size.prompt + length), self.score_on) * (
            not self.online
        )
        return shown * ((1 + self.online) * self.size.prompt + 2 * length), seconds + reference

    def product_seconds(self, tokens: float, unpacked: bool) -> float:
        """All matrix products for so many tokens on one card or core: the roofline.

        Packed weights are read, written unpacked and read again, as bitsandbytes does for more than one row.
        """
        s, m = self.shape, self.machine
        read = (
            s.linear * (self.bytes if unpacked else NF4_BYTES + 2 * self.bytes)
            + s.head * self.bytes
        )
        return max(read / m.bandwidth, 2 * (s.linear + s.head) * tokens / m.flops[self.dtype])

    def forward_seconds(self, tokens: float, cards: int) -> float:
        """So many tokens through the model at once, all of it arithmetic, on so many cards or cores."""
        return 2 * self.shape.linear * tokens / self.machine.flops[self.dtype] / cards


def task_size(p: Profile) -> TaskSize:
    """The sizes of the profile's task; the lines of a file of one's own are counted."""
    size = TASKS.get(tasks.get(p.task).name, TASKS["jsonl"])
    if p.task != "jsonl" or not p.data or not Path(p.data).is_file():
        return size
    with Path(p.data).open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    held = max(1, lines // 10)
    return dataclasses.replace(size, train=max(1, lines - 2 * held), validation=held, test=held)


def find_shape(name: str) -> Shape:
    """Of a model in the table, or from the config.json of a folder or a hub model; `UserError` where there is none."""
    name = {hub: short for short, hub in models.HUB_NAMES.items()}.get(name, name)
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    path = models.find(name)
    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=False)
        c = whole.get_text_config()
        family = c.model_type.split("_")[0]
        return Shape(
            c.num_hidden_layers,
            c.hidden_size,
            getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
            c.num_attention_heads,
            getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
            getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
            c.vocab_size,
            c.tie_word_embeddings,
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "gemma3"),
            norms=4 if family == "gemma3" else 2,
            shares_prompt=models.can_share_prompt(SimpleNamespace(config=whole)),
        )
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The shape of the model {name} could not be read from its config.json ({reason}). Without network "
            f"give --model a folder that has one, or one of: seed, {', '.join(SHAPES)}."
        ) from error


def find_machine(text: str | None = None) -> Machine:
    """The machine of that name, such as "8xA100-80GB" or "cpu"; None: this computer's card, or its CPU."""
    import torch

    if text is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return _gpu(card.name, int(os.environ.get("WORLD_SIZE", "1")), card.total_memory)
    count, name = re.fullmatch(
        r"(?:(\d+)x)?(.*)", text or "cpu", re.IGNORECASE | re.DOTALL
    ).groups()
    name = {known.lower(): known for known in (*CARDS, "cpu")}.get(name.lower())
    if name is None or count == "0":
        raise UserError(
            f"There is no machine {text!r}. Give a number of cards and their name, such as 8xA100-80GB, or cpu. "
            f"The cards are {', '.join(CARDS)}."
        )
    if name != "cpu":
        return _gpu(name, int(count or 1), CARDS[name][0] * 1e9)
    import psutil

    return Machine(
        "cpu",
        int(count or torch.get_num_threads()),
        psutil.virtual_memory().total,
        CPU_FLOPS,
        CPU_BANDWIDTH,
        CPU_LAYER,
        "float32",
        "speed: as cores did in figures/bench.csv, within a factor of two",
    )


def _gpu(name: str, count: int, memory: float) -> Machine:
    """A card by what CUDA calls it; the speed of the slowest in `CARDS` where that names none of them."""
    same = [
        key for key in CARDS if re.search(rf"\b{key.split('-')[0]}\b", name.replace("RTX ", "RTX"))
    ]
    key = min(same, key=lambda key: abs(CARDS[key][0] - memory / 1e9), default=None)
    _, tflops, bandwidth, bf16 = CARDS[key or "T4-16GB"]
    fast, link = tflops * 1e12 * GPU_FLOPS, LINKS[(key or "T4-16GB").split("-")[0]]
    note = (
        f"assumed: the card reaches {GPU_FLOPS:.0%} of its FLOPs and {GPU_BANDWIDTH:.0%} of its bandwidth, a layer takes "
        f"{1e3 * GPU_LAYER:.0f} ms a step; not measured here"
        + ("" if key else f" ({name} is unknown: a T4's speed)")
    )
    bandwidth, link, between = (1e9 * GPU_BANDWIDTH * x for x in (bandwidth, link, BETWEEN_NODES))
    return Machine(
        name,
        count,
        memory,
        {"bfloat16": fast, "float16": fast, "float32": fast * FP32_SHARE},
        bandwidth,
        GPU_LAYER,
        "bfloat16" if bf16 else "float16",
        note,
        link,
        between,
    )


def table(made: Plan) -> str:
    """The plan as text: a row for each stage, the total, and what was assumed."""
    m, p, priced = made.machine, made.profile, made.total.cost is not None
    kind = f"{'4-bit base, ' * (p.quantize and not p.dequantize)}{p.dtype or m.dtype}"
    place = (
        f"{m.count} CPU core{'s' * (m.count > 1)}" if m.name == "cpu" else f"{m.count} x {m.name}"
    )
    model = f"{p.model} ({_count(made.shape.parameters)} parameters, {kind})"
    lines = [
        f"plan: {p.iterations} x {p.method}, {p.task}, {model} on {place}",
        f"{'':10}{'peak memory':>12}{'tokens':>10}{'at most':>10}{'time':>10}{'at most':>10}"
        + f"{'cost':>10}" * priced,
    ]
    for row in (*made.stages, made.total):
        lines.append(
            f"{row.name:10}{_gb(row.memory):>12}{_count(row.tokens):>10}{_count(row.tokens_at_most):>10}"
            f"{_time(row.hours):>10}{_time(row.hours_at_most):>10}"
            + (f"{row.cost:>10,.2f}" if priced else "")
        )
    hint = "" if priced else "; for the cost give --price PER_HOUR"
    return "\n".join([*lines, made.assumptions[0], made.assumptions[1] + hint, *_shared(made)])


def _shared(made: Plan) -> list[str]:
    """The lines on how several cards can share training."""
    b, m = made.break_even, made.machine
    if b is None:
        return []
    link = min(m.link, m.between) if b.cards > NODE else m.link
    busy = (
        f"{m.count} cards"
        if b.cards == m.count
        else (
            f"{b.cards} of {m.count} cards, as many processes as a batch of {made.profile.batch_size} has equal parts for (--batch-size)"
        )
    )
    rows = [
        f"{name:26}{_gb(row.memory):>12}{_gb(row.sent):>16}{_time(row.hours):>10}"
        + "  does not fit" * (row.memory > made.room)
        for name, row in (("whole copies", b.copies), ("split layers (--shard)", b.split))
    ]
    return [
        "",
        f"training on {busy}",
        f"{'':26}{'peak memory':>12}{'sent per step':>16}{'time':>10}",
        *rows,
        f"break-even: whole copies fit with up to {_gb(max(0, b.largest_base))} of frozen weights (here {_gb(b.base)}); split "
        f"layers cost no time from {b.hidden_from:,.0f} tokens per micro-batch on (here {b.positions:,.0f})",
        f"assumed: {link / 1e9:,.0f} GB/s from card to card, {GPU_BANDWIDTH:.0%} of the data sheet's"
        + f" ({NODE} cards a node, {BETWEEN_NODES} GB/s between nodes)" * (b.cards > NODE),
    ]


def overview(profiles: dict[str, Profile], machines=OVERVIEW) -> str:
    """All profiles below each other: parameters, peak memory on the last machine, and the time on each."""
    lines = [
        f"{'':18}{'parameters':>12}{'memory':>10}" + "".join(f"{name:>14}" for name in machines)
    ]
    for name, profile in profiles.items():
        plans = [plan(profile, machine, must_fit=False) for machine in machines]
        times = [
            _time(made.total.hours) if made.total.memory <= made.room else "-" for made in plans
        ]
        lines.append(
            f"{name:18}{_count(plans[-1].shape.parameters):>12}{_gb(plans[-1].total.memory):>10}"
            + "".join(f"{cell:>14}" for cell in times)
        )
    notes = dict.fromkeys(find_machine(name).note for name in machines)
    return "\n".join(
        [
            *lines,
            f"memory: the peak on {machines[-1]}; -: does not fit there as it is set",
            *notes,
            "More: python -m irpo_utils plan --profile NAME --gpus 8xA100-80GB --price PER_HOUR",
        ]
    )


def _halves(number: int) -> list[int]:
    return [number >> i for i in range(1, number.bit_length())]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _count(number: float) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _time(hours: float) -> str:
    return (
        f"{hours:,.1f} h"
        if hours >= 1.5
        else f"{60 * hours:,.0f} min"
        if hours >= 1 / 40
        else f"{3600 * hours:,.0f} s"
    )
