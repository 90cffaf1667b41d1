"""What notebook 08 needs and does not teach: copies of the model against split layers."""

from __future__ import annotations

from collections import namedtuple

import pandas as pd

from irpo_utils.ops import plan as planning

# One way to train on several GPUs: peak bytes on a GPU, bytes it sends per step, hours in all.
Sharing = namedtuple("Sharing", "memory sent hours")
# Frozen weights in bytes: `base`, and the largest with which copies fit. Tokens of a micro-batch,
# and from how many on a GPU computes longer than it gathers layers.
BreakEven = namedtuple("BreakEven", "gpus copies split base largest_base positions hidden_from")


def break_even(made: planning.Plan) -> BreakEven:
    """A copy of the model per GPU against split layers (FSDP2), for the training of a plan."""
    e, ways = made.estimate, []
    for way in (e.replace(shard=False), e.replace(shard=True)):
        hours = way.work(e.length, planning.PAIR_SHARE)["training"][1]
        ways.append(Sharing(way.memory()["training"], way.sent_per_step(), hours))
    base = e.layers - e.adapter + e.outside
    slack = e.room - e.replace(shard=False).peak()
    served = min(planning.NODE, e.devices)  # GPUs over which a vLLM server splits its own base
    largest = base + slack / (1 + 1 / served if e.engine == "vllm" else 1)
    positions = e.micro_batch(e.size.prompt, min(e.length, e.new))[0]
    gathered = (2 * e.layers + e.outside) * (e.ranks - 1) / e.ranks  # in a micro-batch
    link = e.machine.link if e.ranks <= planning.NODE else e.machine.between
    passes = 3 if e.p.gradient_checkpointing else 2
    flops_per_token = 2 * passes * (e.shape.linear + e.shape.head)
    hidden_from = gathered / link * e.machine.flops[e.dtype] / flops_per_token
    return BreakEven(e.ranks, *ways, base, largest, positions, hidden_from)


def break_even_table(made: planning.Plan) -> str:
    """The two ways as a table, and at which size each of them pays."""
    even = break_even(made)
    rows = {"a copy per GPU": even.copies, "split layers (--shard)": even.split}
    table = pd.DataFrame(
        {
            "peak memory (GB)": [way.memory / 1e9 for way in rows.values()],
            "sent per step (GB)": [way.sent / 1e9 for way in rows.values()],
            "hours": [way.hours for way in rows.values()],
        },
        index=list(rows),
    )
    return (
        f"training on {even.gpus} of {made.machine.count} GPUs\n{table.round(1)}\n"
        f"copies fit with up to {even.largest_base / 1e9:.1f} GB of frozen weights (here "
        f"{even.base / 1e9:.1f} GB)\nsplit layers cost no time from {even.hidden_from:,.0f} tokens "
        f"per micro-batch on (here {even.positions:,.0f})"
    )
