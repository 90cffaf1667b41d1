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
    common.error = lambda message: _refuse(message, command)
    options, words = common.parse_known_args(arguments)
    if options.config:
        options, words = common.parse_known_args(_words_of_file(options.config) + arguments)
    name = "cpu" if options.profile == "all" and command == "plan" else options.profile
    base = profiles.get(name)
    own = {"prog": f"python -m irpo_utils {command}", "description": text, "allow_abbrev": False}
    parser = HfArgumentParser(profiles.Profile, parents=[common], **own)
    parser.set_defaults(**dataclasses.asdict(base))
    parser.error = common.error
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    _check_known(words, flags, command)
    words, changes = _split_off_none(words)
    values = vars(parser.parse_args(words))
    given = [flags.get(word.partition("=")[0]) for word in words]
    changes |= {field: values[field] for field in given if field is not None}
    profile = profiles.get(name, **changes)
    if command == "run":
        options.out = options.out or f"runs/{options.profile}"
    return (None if options.profile == "all" else profile), options


def _common_options(command: str, names: list[str]) -> argparse.ArgumentParser:
    """The options that are not fields of the profile."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
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
        words += [f"--{str(name).replace('_', '-')}", *map(str, values)]
    return words


def _check_known(words: list[str], flags: dict[str, str], command: str) -> None:
    for word in (word.partition("=")[0] for word in words if word.startswith("--")):
        if word not in flags:
            close = difflib.get_close_matches(word, [f for f in flags if "_" not in f], n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise UserError(
                f"There is no option {word}.{hint} `python -m irpo_utils {command} --help` lists "
                "them."
            )


def _split_off_none(words: list[str]) -> tuple[list[str], dict]:
    """Take out `--option none`; for a number `all` means the same."""
    from irpo_utils.profiles import Profile

    kinds, rest, changes = Profile.__annotations__, [], {}
    for word in words:
        option, equals, value = word.partition("=")
        if not equals and rest and rest[-1].startswith("--"):  # a value after its option
            option, value = rest[-1], word
        name = option[2:].replace("-", "_") if option.startswith("--") else ""
        kind = kinds.get(name, "")
        if "None" in kind and (value.lower() == "none" or (value == "all" and "int" in kind)):
            changes[name] = None
            rest = rest if equals else rest[:-1]
        else:
            rest.append(word)
            changes.pop(name, None)  # the last one counts
    return rest, changes


def _refuse(message: str, command: str):
    raise UserError(
        f"{message[:1].upper()}{message[1:]}. `python -m irpo_utils {command} --help` lists the "
        "options and what they take."
    )
