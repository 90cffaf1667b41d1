"""Everything that studies and checks call of the package's command-line side, in one place."""

from __future__ import annotations

import sys
from pathlib import Path

from irpo_utils import checksums, iteration, methods, profiles, run_directory
from irpo_utils.__main__ import calm_libraries as quiet_libraries
from irpo_utils.evaluation import seed_and_question_interval
from irpo_utils.iteration import accuracy_per_question, load_model, load_profile, run
from irpo_utils.profiles import EVALUATION, MAY_CHANGE, SAMPLING, Profile
from irpo_utils.run_directory import is_whole

__all__ = [
    "EVALUATION",
    "MAY_CHANGE",
    "SAMPLING",
    "Profile",
    "accuracy_per_question",
    "checksums",
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
TITLES = {
    "star": "Rejection-sampling SFT",
    "star_2x": "Rejection-sampling SFT, twice the data",
    "shuffled": "Random labels",
    "spin": "Gold vs. sampled (SPIN-style)",
    "zero_shot": "M0, zero-shot",
}


def make_profile(fields: dict) -> Profile:
    """The default profile with `fields` changed, and with the settings that its method fixes."""
    fixed = methods.get(fields["method"]).settings
    changes = {name: value for name, value in fields.items() if name not in fixed}
    return methods.apply(methods.doubled(profiles.get("cpu", **changes)))


def profile_from(settings: dict) -> Profile:
    """The profile with kept settings; fields that are newer than these have their defaults."""
    return Profile(**settings)


def method_title(name: str) -> str:
    """The name of a method in figures and tables."""
    return TITLES.get(name) or methods.get(name).title


def prepare_run_directory(path: Path, profile: Profile) -> None:
    """Write the settings of a run, so that stages of another run can be put into its directory."""
    iteration.RunDirectory(path, profile).check_profile()


def environment() -> dict:
    """Versions, hardware and commit, with the command as it is run in the repository's root."""
    record, script = run_directory.environment(), Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT / "scripts"):
        script = script.relative_to(ROOT).as_posix()
        record["command"] = " ".join(["python", script, *sys.argv[1:]])
    return record
