"""What a result was made with: versions, hardware and commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = "torch transformers trl peft bitsandbytes datasets accelerate numpy".split()
# A run that continues on another machine records these again.
MACHINE = ("python", "versions", "system", "processor", "gpus", "world_size", "commit")


def environment() -> dict:
    """Command, versions, hardware and commit, to be stored next to every result."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": command(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "system": platform.system(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": _commit(),
    }


def command() -> str:
    """The command line of this process, without the folders of Python and of the package."""
    program = Path(sys.argv[0]).name
    name = "python -m irpo_utils" if program == "__main__.py" else f"python {program}"
    return " ".join([name, *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with "+" if files were changed since."""

    def git(*words):
        words = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(words, capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed else "") if head.returncode == 0 else None
