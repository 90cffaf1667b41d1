"""The options of `run` and `plan`: every field of a profile, from the command line or a file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path

from irpo_utils import UserError


def parse_profile(arguments: list[str], command: str = "run", text: str | None = None):
    """The profile with the options given (None for all profiles), and the other options.

    text: what `--help` says of the command.
    """
    from transformers import HfArgumentParser

    from irpo_utils import profiles

    common = _common_options(command, profiles.names())
    options, words = common.parse_known_args(arguments)
    if options.config:
        options, words = common.parse_known_args(_words_of_file(options.config) + arguments)
    name = "cpu" if options.profile == "all" and command == "plan" else options.profile
    defaults = dataclasses.asdict(profiles.get(name))
    own = {"prog": f"python -m irpo_utils {command}", "description": text, "allow_abbrev": False}
    parser = HfArgumentParser(profiles.Profile, parents=[common], **own)
    parser.error = common.error
    shows_defaults = bool({"-h", "--help"} & set(words))
    for action in parser._actions:
        if action.dest in defaults:  # without a default, what was not given stays out of `given`
            action.default = defaults[action.dest] if shows_defaults else argparse.SUPPRESS
        kind = profiles.Profile.__annotations__.get(action.dest, "")
        if action.type and "None" in kind:
            action.type = _optional(action.type)
            if "bool" in kind:  # the option alone means true, as for every bool
                action.nargs, action.const = "?", True
    given, unknown = parser.parse_known_args(words)
    if unknown:
        option = unknown[0].partition("=")[0]
        known = [flag for flag in parser._option_string_actions if "_" not in flag]
        close = difflib.get_close_matches(option, known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        _refuse(f"There is no option {option}.{hint}", command)
    changes = {name: value for name, value in vars(given).items() if name in defaults}
    profile = profiles.get(name, **changes)
    if command == "run":
        options.out = options.out or f"runs/{options.profile}"
    return (None if options.profile == "all" else profile), options


def _common_options(command: str, names: list[str]) -> argparse.ArgumentParser:
    """The options that are not fields of the profile."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda text: _refuse(f"{text[:1].upper()}{text[1:].rstrip('.')}.", command)
    default, listed = {"run": "cpu", "plan": "all"}[command], ", ".join(names)
    parser.add_argument("--profile", default=default, help=f"one of {listed} (default: {default})")
    parser.add_argument("--config", help="YAML file of options, which those given here override")
    parser.add_argument("--price", type=float, help="price of the machine per hour")
    if command == "run":
        parser.add_argument("--out", help="run directory (default: runs/PROFILE)")
        parser.add_argument("--quiet", action="store_true", help="no plan and no progress bars")
        text = "run although the plan says it does not fit"
        parser.add_argument("--ignore-plan", action="store_true", help=text)
    else:
        machines = "8xA100-80GB, cpu, 2xcpu for two cores, ..."
        parser.add_argument("--gpus", help=f"{machines} (default: this computer)")
    return parser


def _words_of_file(path: str) -> list[str]:
    """The fields of a YAML file as options, so that they are checked as options are."""
    import yaml

    try:
        fields = dict(yaml.safe_load(Path(path).expanduser().read_text()) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--config {path} is not a YAML file of options such as `n_samples: 8` ({reason})."
        ) from error
    words = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else ["none" if value is None else value]
        values = [] if value is True else values  # a switch takes no value
        words += [f"--{str(name).replace('_', '-')}", *map(str, values)]
    return words


def _optional(kind):
    """A type that also takes `none`; for a number `all` means the same."""

    def read(word: str):
        nothing = word.lower() == "none" or (word == "all" and kind is int)
        return None if nothing else kind(word)

    read.__name__ = kind.__name__  # argparse names it in its messages
    return read


def _refuse(message: str, command: str):
    raise UserError(
        f"{message} `python -m irpo_utils {command} --help` lists the options and what they take."
    )
