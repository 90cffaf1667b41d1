"""What a result was made with: versions, hardware and commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from irpo_utils.scale import processes

LIBRARIES = "torch transformers trl peft bitsandbytes datasets accelerate numpy".split()
# A run that continues on another machine records these again.
MACHINE = ("python", "versions", "system", "processor", "gpus", "world_size", "commit", "dtype")


def environment() -> dict:
    """Command, versions, hardware and commit, to be stored next to every result."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    program = Path(sys.argv[0]).name  # without the folders of Python and of the package
    program = "-m irpo_utils" if program == "__main__.py" else program
    return {
        "command": " ".join(["python", program, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES if find_spec(name)},
        "system": platform.system(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": processes.count(),
        "commit": _commit(),
    }


def record(path: Path, model, continues: bool) -> dict:
    """The record of a run for `path`: what is there, and this machine if the run continues on it.

    `dtype` is what the base of `model` was loaded in, which a machine may not have as asked.
    """
    now = environment() | {"dtype": str(model.dtype).removeprefix("torch.")}
    try:
        made = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # a new run, or a damaged record
        return now
    machines = [made, *made.get("resumed_on", [])]
    known = any(all(one.get(name, now[name]) == now[name] for name in MACHINE) for one in machines)
    if continues and not known:
        made["resumed_on"] = [*machines[1:], now]
    return made


def _processor() -> str:
    """The model of the CPU; on Linux `platform` knows only its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search("model name\\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with "+" if files were changed since."""
    words = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 10}
    try:
        done = subprocess.run(words, **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
