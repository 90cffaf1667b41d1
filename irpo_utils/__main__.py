"""The command line: `python -m irpo_utils run | plan | evaluate | plot | study | bench`. Nothing heavy is imported before its time."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from irpo_utils import UserError, processes

RESUMED = ("run", "study")  # commands that go on where they stood


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn errors that a user can mend into one paragraph and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "run": run,
        "plan": plan,
        "evaluate": evaluate,
        "plot": plot,
        "study": study,
        "bench": bench,
    }
    parser = argparse.ArgumentParser(
        prog="python -m irpo_utils", description="Iterative RPO, one command a task."
    )
    parser.add_argument("command", choices=commands, help="`COMMAND --help` lists the options")
    parsed = parser.parse_args(arguments[:1] or ["--help"])
    before = signal.signal(signal.SIGTERM, _end)  # what a machine says before it is taken away
    sys.unraisablehook, hook = _again, sys.unraisablehook
    try:
        return _report(commands[parsed.command], arguments[1:])
    except (
        KeyboardInterrupt
    ) as interrupt:  # also one that came while another error was being reported
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends more than one
        if processes.speaks_last():
            kept = (
                "What was finished is kept: the same command goes on where it stood."
                if parsed.command in RESUMED
                else "The same command begins anew."
            )
            print(f"\nStopped. {kept}", file=sys.stderr)
        return 143 if isinstance(interrupt, _Ended) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


def _report(command, arguments: list[str]) -> int:
    """Run a command; an error that a user can mend becomes one paragraph."""
    try:
        command(arguments)
    except UserError as error:
        return _say(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT):
            raise
        return _say(
            f"{error.filename or 'The output'} could not be written ({error.strerror}). Free some space or choose "
            "another --out, and give the same command again."
        )
    except RuntimeError as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if should_reduce_batch_size(error):
            return _say(
                f"Out of memory ({str(error).splitlines()[0][:200]}). What was finished is kept: the same command goes on "
                "with a smaller --sampling-batch-size or --micro-batch-size, with --gradient-checkpointing true, or on a "
                "larger card. `python -m irpo_utils plan` says what a run needs."
            )
        if processes.count() == 1 or not re.search(
            "connection|gloo|nccl|timed out|abort", str(error), re.IGNORECASE
        ):
            raise
        return _say(
            "Another process of this run has ended; if it could say why, that stands above. What was finished is kept: the "
            f"same command goes on where it stood, with any number of processes. ({str(error).splitlines()[0][:200]})"
        )
    return 0


class _Ended(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C."""


def _end(*_):
    raise _Ended


def _again(lost) -> None:
    """Ctrl-C or SIGTERM that came while an object was being deleted, where Python drops what is raised: a moment later again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    number = signal.SIGTERM if isinstance(lost.exc_value, _Ended) else signal.SIGINT
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


def _say(message: str) -> int:
    """One paragraph on the screen and exit status 1; of several processes the first one speaks if it can."""
    if not processes.speaks_last():
        time.sleep(5)  # who does ends all others once it has said the same
    print(f"error: {message}", file=sys.stderr)
    return 1


def run(arguments: list[str]) -> None:
    """Iterative RPO with a profile; every field of the profile is an option."""
    profile, options = _parse_profile(arguments)
    calm_libraries()
    from irpo_utils import methods, planning

    profile = methods.doubled(profile)
    try:
        planned = planning.plan(profile, price=options.price, must_fit=False)
        if not options.quiet and processes.is_first():
            print(f"{planning.table(planned)}\n", flush=True)
        planning.check(planned)
    except UserError as error:
        if not options.ignore_plan:
            raise
        print(f"ignored: {error}\n", file=sys.stderr)
    from irpo_utils import iteration, plots

    import pandas

    metrics = pandas.DataFrame(iteration.run(profile, options.out, progress=not options.quiet))
    if not processes.is_first():
        return
    figure = plots.accuracy_per_iteration(metrics)
    record = {
        "command": _command("run", arguments),
        "seed": profile.seed,
        **iteration.environment(),
    }
    plots.save(figure, options.out, "accuracy_per_iteration", metrics, record)
    print(
        f"\n{accuracy_table(metrics)}\n\nFigure: {Path(options.out) / 'accuracy_per_iteration.png'}"
    )


def plan(arguments: list[str]) -> None:
    """Memory, tokens, hours and cost of a run before it is made; without --profile of all profiles."""
    profile, options = _parse_profile(arguments, "plan")
    calm_libraries()
    from irpo_utils import methods, planning, profiles

    if profile is None:
        if options.price is not None:
            raise UserError(
                "--price needs a --profile: the table of all profiles shows hours alone."
            )
        each = {
            name: _parse_profile([*arguments, "--profile", name], "plan")[0]
            for name in profiles.PROFILES
        }
        print(planning.overview(each, [options.gpus] if options.gpus else planning.OVERVIEW))
        return
    planned = planning.plan(methods.doubled(profile), options.gpus, options.price, must_fit=False)
    print(planning.table(planned))
    planning.check(planned)


def evaluate(arguments: list[str]) -> None:
    """Evaluate the iterations of a finished run again: another task, more samples, another split."""
    parser = argparse.ArgumentParser(
        prog="python -m irpo_utils evaluate", description=evaluate.__doc__
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--task", help="another task than the run's")
    parser.add_argument("--data", help="local folder or file of that task")
    parser.add_argument("--split", help="validation or test (default: the run's)")
    parser.add_argument(
        "--iterations", type=int, nargs="+", help="which M_t (default: the first and the last)"
    )
    parser.add_argument("--k", type=int, default=32, help="completions per question (default 32)")
    parser.add_argument("--out", help="folder for the metrics table (default: RUN/evaluations)")
    parser.add_argument(
        "--allow-overlap",
        choices=("true", "false"),
        default="false",
        help="go on although these are questions that the run was trained on",
    )
    options = parser.parse_args(arguments)
    calm_libraries()
    from irpo_utils import iteration

    text = iteration.evaluate_run(
        options.run,
        options.task,
        options.data,
        options.split,
        options.iterations,
        options.k,
        options.out,
        options.allow_overlap == "true",
    )
    if processes.is_first():
        print(text)


def plot(arguments: list[str]) -> None:
    """Draw accuracy per iteration of one or several runs (seeds) and write its table beside it."""
    parser = argparse.ArgumentParser(prog="python -m irpo_utils plot", description=plot.__doc__)
    parser.add_argument("runs", nargs="+", help="run directories that differ in their seed")
    parser.add_argument("--out", default="figures", help="folder (default: figures)")
    parser.add_argument("--name", default="accuracy_per_iteration", help="name of the files")
    options = parser.parse_args(arguments)
    calm_libraries()
    from irpo_utils import iteration, plots

    metrics, summary, record = iteration.collect(options.runs)
    figure = plots.accuracy_per_iteration(metrics, summary)
    plots.save(
        figure,
        options.out,
        options.name,
        metrics,
        {"command": _command("plot", arguments), **record},
    )
    summary.to_csv(Path(options.out) / f"{options.name}_mean.csv", index=False)
    print(f"{accuracy_table(summary)}\n\nFigure: {Path(options.out) / options.name}.png")


def study(arguments: list[str]) -> None:
    """A comparison over methods, settings and seeds; resumable: tuning first, then comparison, then the others."""
    parser = argparse.ArgumentParser(prog="python -m irpo_utils study", description=study.__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="tuning, comparison, curves, stability, regimes, long, ablations (default: all)",
    )
    parser.add_argument(
        "--only", nargs="+", help="methods or factors to run, instead of all of the study"
    )
    parser.add_argument("--seeds", type=int, help="how many seeds (default: what the study has)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, each with its share of the cores (default 1)",
    )
    parser.add_argument(
        "--small", action="store_true", help="a few questions only, to see that all works"
    )
    parser.add_argument(
        "--runs", default="runs/study", help="folder of the run directories (default: runs/study)"
    )
    parser.add_argument("--out", default="figures", help="folder of the tables (default: figures)")
    options = parser.parse_args(arguments)
    calm_libraries()
    from irpo_utils import study as studies

    if min(options.jobs, options.seeds or 1) < 1:
        raise UserError("--jobs and --seeds must be at least 1.")
    for name in options.names or studies.STUDIES:
        made = studies.study(
            name,
            options.out,
            options.runs,
            options.seeds,
            options.jobs,
            options.only,
            options.small,
        )
        print(f"{name}: {made.seed.nunique()} seeds, {len(made)} rows in {options.out}")


def bench(arguments: list[str]) -> None:
    """Time our stages against plain `generate` and TRL, in turn, and print how many times faster they are."""
    parser = argparse.ArgumentParser(prog="python -m irpo_utils bench", description=bench.__doc__)
    parser.add_argument(
        "what", nargs="*", help="sampling, training, evaluation, iteration, scaling (default: all)"
    )
    parser.add_argument("--profile", default="cpu", help="whose settings and model (default: cpu)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often each takes its turn (default 3)"
    )
    parser.add_argument(
        "--questions", type=int, default=200, help="training questions sampled for (default 200)"
    )
    parser.add_argument("--out", default="figures", help="folder of bench.csv (default: figures)")
    options = parser.parse_args(arguments)
    from irpo_utils import bench as benchmark
    from irpo_utils import iteration, plots

    record = {"command": _command("bench", arguments), **iteration.environment()}
    for what in options.what or (*benchmark.WHAT, "scaling"):
        if what == "scaling":
            rows = benchmark.scaling()
            benchmark.save(rows, options.out, record, "bench_scaling")
            import pandas

            plots.save(
                plots.scaling(pandas.DataFrame(rows)),
                options.out,
                "bench_scaling",
                pandas.DataFrame(rows),
                record,
            )
            continue
        rows = benchmark.bench(what, options.repeats, options.questions, options.profile)
        benchmark.save(rows, options.out, record)
        for row in rows:
            if row["ratio"]:
                print(
                    f"{what}: {row['metric']} {row['ratio']:.2f} times better than plain ({row['low']:.2f} to {row['high']:.2f})"
                )


def accuracy_table(metrics) -> str:
    """Accuracy per iteration as text, with 95 % intervals."""
    names = {
        "greedy": "greedy",
        "sampled": "sampled",
        "majority": "majority",
        "pass_at_k": "pass@k",
        "mean_tokens": "tokens",
    }
    names = {name: title for name, title in names.items() if name in set(metrics.metric)}
    lines = [f"{'':8}" + "".join(f"{title:>24}" for title in names.values())]
    for t, rows in metrics.groupby("iteration"):
        cells = []
        for name in names:
            row = rows[rows.metric == name].sort_values("k").iloc[-1:]
            cells.append(_cell(row.iloc[0]) if len(row) else "")
        lines.append(f"M_{t:<6}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(row) -> str:
    if row.metric == "mean_tokens":
        return f"{row.value:.1f}"
    interval = (
        ""
        if row.low != row.low or row.low is None
        else f" ({100 * row.low:.1f}-{100 * row.high:.1f})"
    )
    k = f" @{int(row.k)}" if row.metric in ("majority", "pass_at_k") else ""
    return f"{100 * row.value:.1f}{interval}{k}"


def _parse_profile(arguments: list[str], command: str = "run"):
    """The profile with its changed fields (None for all profiles), and the options that are not part of it."""
    from transformers import HfArgumentParser

    from irpo_utils import profiles

    common = argparse.ArgumentParser(add_help=False)
    names, default = ", ".join(profiles.PROFILES), {"run": "cpu", "plan": "all"}[command]
    common.add_argument("--profile", default=default, help=f"one of {names} (default: {default})")
    common.add_argument(
        "--price", type=float, help="what the machine costs an hour, for the cost in the plan"
    )
    if command == "run":
        common.add_argument("--out", help="run directory (default: runs/PROFILE)")
        common.add_argument("--quiet", action="store_true", help="no plan and no progress bars")
        common.add_argument(
            "--ignore-plan",
            action="store_true",
            help="go on although the run does not fit by the plan",
        )
    else:
        common.add_argument(
            "--gpus", help="8xA100-80GB, cpu, 2xcpu for two cores, ... (default: this computer)"
        )
    common.error = lambda message: _refuse(message, command)
    options, rest = common.parse_known_args(arguments)
    if command == "run":
        options.out = options.out or f"runs/{options.profile}"
    all_of_them = command == "plan" and options.profile == "all"
    name = "cpu" if all_of_them else options.profile
    profile = profiles.get(name)
    parser = HfArgumentParser(
        profiles.Profile,
        parents=[common],
        prog=f"python -m irpo_utils {command}",
        description=globals()[command].__doc__,
    )
    parser.set_defaults(**dataclasses.asdict(profile))
    known = {flag for action in parser._actions for flag in action.option_strings}
    for word in rest:
        if word.startswith("--") and word.split("=")[0] not in known:
            close = difflib.get_close_matches(
                word, [flag for flag in known if "_" not in flag], n=3
            )
            raise UserError(
                f"There is no option {word.split('=')[0]}."
                + (f" Did you mean {' or '.join(close)}?" if close else "")
                + f" `python -m irpo_utils {command} --help` lists them all."
            )
    parser.error = common.error
    optional = {name for name, kind in profiles.Profile.__annotations__.items() if "None" in kind}
    nothing = {
        flag[2:].replace("-", "_"): None
        for flag, word in zip(rest, rest[1:])
        if word.lower() in ("none", "all") and flag[2:].replace("-", "_") in optional
    }
    rest = [
        word
        for i, word in enumerate(rest)
        if not {w[2:].replace("-", "_") for w in rest[max(0, i - 1) : i + 1] if w.startswith("--")}
        & set(nothing)
    ]
    fields = vars(parser.parse_args(rest)) | nothing
    changed = profiles.get(
        name, **{f.name: fields[f.name] for f in dataclasses.fields(profiles.Profile)}
    )
    return None if all_of_them else changed, options


def _refuse(message: str, command: str):
    raise UserError(
        f"{message[:1].upper()}{message[1:]}. `python -m irpo_utils {command} --help` lists the options and what "
        "they take."
    )


def calm_libraries() -> None:
    """Bars for our own stages only; the libraries' loading bars and advice would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(
        logging.CRITICAL
    )  # "failed to load" of optional kernels
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _command(name: str, arguments: list[str]) -> str:
    return " ".join(["python -m irpo_utils", name, *arguments])


if __name__ == "__main__":
    sys.exit(main())
