"""Several processes that share one run (`torchrun`, `accelerate launch`): who does which part, and who writes.

Every process goes through the same loop. Questions are split between them, pairs are split by the trainer, and the
first alone writes. With one process, as without a launcher, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable


def count() -> int:
    """How many processes share this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def speaks_last() -> bool:
    """Whether this process is the one to say why a run ends: the first, or the second where the first has died."""
    if is_first() or os.environ.get("RANK") != "1":
        return is_first()
    import psutil

    for other in psutil.Process(os.getppid()).children():
        try:
            if other.status() != psutil.STATUS_ZOMBIE and other.environ().get("RANK") == "0":
                return False
        except psutil.Error:  # it went away meanwhile
            continue
    return True


def _state():
    """accelerate's view of the processes; joins them at the first call."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def share(items: list) -> list:
    """This process's part of `items`: consecutive ones, in order."""
    if count() == 1:
        return items
    with _state().split_between_processes(items) as part:
        return list(part)


def gather(part: list) -> list:
    """The parts of all processes one after the other, as `share` had split them; all processes have to call it."""
    if count() == 1:
        return part
    from accelerate.utils import gather_object

    _state()
    return gather_object(part)


def from_first(decide: Callable):
    """What `decide()` gives in the first process, in all of them: so that all go the same way."""
    if count() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    _state()
    return broadcast_object_list([decide() if is_first() else None])[0]


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        _state().wait_for_everyone()
