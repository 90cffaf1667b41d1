"""Everything that studies and checks call of the package's command-line side, in one place."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from irpo_utils import methods, profiles
from irpo_utils.ops import checksums, run_directory
from irpo_utils.ops import environment as environments
from irpo_utils.ops.cli import quiet_libraries
from irpo_utils.ops.run import engine_of, load_model, run
from irpo_utils.ops.run_directory import FIELDS, MAY_CHANGE
from irpo_utils.ops.storage import profile_from
from irpo_utils.ops.storage import read_profile as load_profile
from irpo_utils.profiles import Profile
from studies import baselines, grpo, probe  # noqa: F401 (they add methods and callbacks)
from studies.finished_runs import is_whole
from studies.significance import seed_and_question_interval

__all__ = [
    "EVALUATION",
    "MAY_CHANGE",
    "SAMPLING",
    "Profile",
    "checksums",
    "engine_of",
    "environment",
    "is_whole",
    "load_model",
    "load_profile",
    "make_profile",
    "method_title",
    "prepare_run_directory",
    "profile_from",
    "quiet_libraries",
    "run",
    "seed_and_question_interval",
]
ROOT = Path(__file__).resolve().parents[2]
SAMPLING, EVALUATION = (tuple(FIELDS[name].split()) for name in ("samples", "evaluation"))


def make_profile(fields: dict) -> Profile:
    """The default profile with `fields` changed; a setting that the method fixes is left to it."""
    fixed = methods.get(fields["method"]).settings
    return profiles.get("cpu", **{k: value for k, value in fields.items() if k not in fixed})


def method_title(name: str) -> str:
    """The name of a method in figures and tables."""
    return "M0, zero-shot" if name == "zero_shot" else methods.get(name).title


def prepare_run_directory(path: Path, profile: Profile) -> None:
    """Write the settings of a run, so that stages of another run can be put into its directory."""
    keep, settings = run_directory.RunDirectory(path), dataclasses.asdict(methods.apply(profile))
    keep.write(path / "profile.json", json.dumps(settings, indent=1) + "\n")
    keep.write(path / "environment.json", json.dumps(environments.environment(), indent=1) + "\n")


def environment() -> dict:
    """Versions, hardware and commit, with the command as it is run in the repository's root."""
    record, script = environments.environment(), Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT / "scripts"):
        script = script.relative_to(ROOT).as_posix()
        record["command"] = " ".join(["python", script, *sys.argv[1:]])
    return record
