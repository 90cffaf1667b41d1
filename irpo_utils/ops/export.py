"""Models and adapters as files: fingerprints and checks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from irpo_utils import UserError, models
from irpo_utils.ops import checksums
from irpo_utils.ops.storage import read_profile
from irpo_utils.profiles import Profile

PIECE = 2**20  # bytes


def fingerprint(model) -> str | None:
    """Identifies this base among others of its name: the hub's commit, or a hash of the files.

    Of files over 256 MiB every 16th MiB is read, and the end: a full hash would take minutes.
    """
    config = model.get_base_model().config
    folder = Path(config._name_or_path)  # where it was loaded from
    if not folder.is_dir():
        return config._commit_hash
    digest, kinds = hashlib.sha256(), ("*.json", "*.jinja", "*.safetensors")
    for path in sorted(file for kind in kinds for file in folder.glob(kind)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        step = PIECE if size < 2**28 else 16 * PIECE
        with path.open("rb") as file:
            for start in [*range(0, size, step), max(0, size - PIECE)]:
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def commit_of(known: str | None) -> str | None:
    """The hub's commit in a fingerprint; None for the hash of a folder, which is longer."""
    return known if known and re.fullmatch("[0-9a-f]{40}", known) else None


def find_start(p: Profile) -> Path:
    """The adapter that `p.start` names: a folder with one, or the last one of a finished run."""
    folder = Path(p.start).expanduser()
    if (folder / "profile.json").is_file():
        folder = folder / f"iteration_{read_profile(folder).iterations}" / "adapter"
        if checksums.read(folder) is None:
            raise UserError(f"{folder} is missing or damaged. Run its command again to finish it.")
    if (folder / checksums.NAME).exists() and checksums.read(folder) is None:
        raise UserError(
            f"{folder} is damaged: its checksums do not match. Restore it or give another --start."
        )
    check_adapter(folder, p)
    return folder


def copy_adapter(source: Path, folder: Path) -> None:
    """PEFT's two files."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, folder / name)


def check_adapter(folder: Path, p: Profile) -> None:
    """Refuse an adapter that cannot be read, or that belongs to another model."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            names = list(weights.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"--start {p.start} is neither an adapter folder nor a run directory: "
            f"adapter_config.json or adapter_model.safetensors is missing in {folder}, or damaged "
            f"({error})."
        ) from error
    if not any("lora_" in name for name in names):
        raise UserError(f"The adapter in {folder} has no LoRA weights. Give another --start.")
    kinds = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
    if beyond := [name for name in kinds if config.get(name)]:
        raise UserError(
            f"The adapter in {folder} was made with {' and '.join(beyond)}. Here every matrix has "
            "the scale lora_alpha / lora_r, so M_t would differ. Give another --start."
        )
    hub = models.HUB_NAMES.get(p.model, p.model)
    base = config.get("base_model_name_or_path")
    compared = (
        ("model", hub if base == p.model else base, hub),
        ("lora_r", config.get("r"), p.lora_r),
        ("lora_alpha", config.get("lora_alpha"), p.lora_alpha),
    )
    for name, there, now in compared:
        if there != now:
            raise UserError(
                f"The adapter in {folder} was made with {name} {there!r}, this run has {now!r}. "
                f"Give --{name.replace('_', '-')} {there}, or another --start."
            )
