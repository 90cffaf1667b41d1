"""Several processes that share one run, as `torchrun` and `accelerate launch` start them.

Every process goes through the same loop, with its share of the questions and pairs. Only the first
one writes. With one process nothing here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from irpo_utils import UserError


def count() -> int:
    """The number of processes that share this run; WORLD_SIZE without a launcher is ignored."""
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return count() == 1 or os.environ["RANK"] == "0"


def speaks_last() -> bool:
    """Whether this process reports why the run ends: the first, or the second if the first died."""
    if is_first() or os.environ["RANK"] != "1":
        return is_first()
    import psutil

    for other in psutil.Process(os.getppid()).children():
        try:
            if other.status() != psutil.STATUS_ZOMBIE and other.environ().get("RANK") == "0":
                return False
        except psutil.Error:  # it ended in the meantime
            continue
    return True


def _state():
    """accelerate's view of the processes; the first call connects them."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def share(items: list) -> list:
    """This process's part of `items`: consecutive ones, in order."""
    with _state().split_between_processes(items) as part:
        return list(part)


def gather(part: list) -> list:
    """The parts of all processes, one after the other. All processes must call it."""
    from accelerate.utils import gather_object

    _state()
    return gather_object(part)


def from_first(decide: Callable):
    """The result of `decide()` in the first process, given to all, so that all do the same."""
    from accelerate.utils import broadcast_object_list

    _state()
    return broadcast_object_list([decide() if is_first() else None])[0]


def wait() -> None:
    """Wait until all processes are here."""
    _state().wait_for_everyone()


def engine(p, alone):
    """The engine of several processes, from that of one; scripts/run.py replaces this function."""
    raise UserError(
        "Several processes, and --shard true, need scripts/run.py: start them with `torchrun "
        "--nproc_per_node 8 scripts/run.py ...`, or run in one process without --shard."
    )
