"""The command line. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.ops.options import parse_profile
from irpo_utils.scale import processes

NOT_WRITABLE = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)


def main(arguments: list[str] | None = None) -> int:
    """Run `run` or `plan` with its options; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"run": run, "plan": plan}
    parser = argparse.ArgumentParser(prog="python -m irpo_utils", description="Iterative RPO.")
    parser.add_argument("command", choices=commands, help="`COMMAND --help` lists its options")
    command = parser.parse_args(arguments[:1] or ["--help"]).command
    again = "the same command resumes it" if command == "run" else "run it again"
    return run_command(commands[command], arguments[1:], again)


def run_command(command, arguments: list[str], again: str = "run it again") -> int:
    """Exit status of `command(arguments)`; errors that a user can fix become one paragraph.

    again: what the message after Ctrl-C or SIGTERM advises.
    """
    before = signal.signal(signal.SIGTERM, _terminate)  # sent before a preemption
    sys.unraisablehook, hook = _raise_again, sys.unraisablehook
    try:
        return _report(command, arguments)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends more than one
        if processes.speaks_last():
            print(f"\nStopped. What was finished is kept: {again}.", file=sys.stderr)
        return 128 + _signal_of(interrupt)
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


def _report(command, arguments: list[str]) -> int:
    try:
        command(arguments)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        return _fail(
            f"cannot write to {error.filename or 'the output'}: {error.strerror}. Choose another "
            "--out or free some space, then run the same command again."
        )
    except RuntimeError as error:
        from accelerate.utils.memory import should_reduce_batch_size

        first = str(error).splitlines()[0][:200]
        if should_reduce_batch_size(error):
            return _fail(
                f"Out of memory ({first}). Run the same command to resume, with a smaller "
                "--sampling-batch-size or --micro-batch-size, with --gradient-checkpointing true, "
                "or on a GPU with more memory. `python -m irpo_utils plan` shows what a run needs."
            )
        lost = re.search("connection|gloo|nccl|timed out|abort", str(error), re.IGNORECASE)
        if processes.count() == 1 or not lost:
            raise
        return _fail(
            "Another process of this run has ended; its own message, if any, is above. Run the "
            f"same command to resume, with any number of processes. ({first})"
        )
    return 0


def _terminate(number, frame):
    """SIGTERM is treated as Ctrl-C, and its number is kept."""
    raise KeyboardInterrupt(number)


def _signal_of(interrupt: KeyboardInterrupt) -> int:
    return interrupt.args[0] if interrupt.args else signal.SIGINT


def _raise_again(lost) -> None:
    """Repeat an interrupt during the deletion of an object, which Python would drop."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    number = _signal_of(lost.exc_value)
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


def _fail(message: str) -> int:
    """One paragraph on the screen; of several processes the first one prints it if it can."""
    if not processes.speaks_last():
        time.sleep(5)  # the process that prints it then ends the others
    print(f"error: {message}", file=sys.stderr)
    return 1


def run(arguments: list[str]) -> None:
    """Iterative RPO with a profile; every field of the profile is an option."""
    profile, options = parse_profile(arguments, "run", run.__doc__)
    quiet_libraries()
    import pandas

    from irpo_utils import plots
    from irpo_utils.ops import plan as planning
    from irpo_utils.ops import run as runs
    from irpo_utils.ops.environment import environment

    try:
        planned = planning.plan(runs.settled(profile, options.out), price=options.price)
        if not options.quiet and processes.is_first():
            print(f"{planning.table(planned)}\n", flush=True)
        planning.check(planned)
    except UserError as error:
        if not options.ignore_plan:
            raise
        print(f"ignored: {error}\n", file=sys.stderr)
    metrics = pandas.DataFrame(runs.run(profile, options.out, progress=not options.quiet))
    if processes.is_first():
        figure = plots.accuracy_per_iteration(metrics)
        record = {"seed": profile.seed, **environment()}
        plots.save(figure, options.out, "accuracy_per_iteration", metrics, record)
        path = Path(options.out) / "accuracy_per_iteration.png"
        print(f"\n{accuracy_table(metrics)}\n\nFigure: {path}")
        if profile.eval_split == "validation":
            print(f"Next: python scripts/evaluate.py {options.out} --iterations best --split test")


def plan(arguments: list[str]) -> None:
    """Memory, tokens, hours and cost of a run before it starts; by default of all profiles."""
    profile, options = parse_profile(arguments, "plan", plan.__doc__)
    quiet_libraries()
    from irpo_utils import profiles
    from irpo_utils.ops import plan as planning

    if profile is not None:
        made = planning.plan(profile, options.gpus, options.price)
        print(planning.table(made))
        planning.check(made)
        return
    if options.price is not None:
        raise UserError("--price needs a --profile: the table of all profiles shows hours only.")
    each = {n: parse_profile([*arguments, "--profile", n], "plan")[0] for n in profiles.names()}
    print(planning.overview(each, [options.gpus] if options.gpus else planning.OVERVIEW))


def accuracy_table(metrics) -> str:
    """Accuracy per iteration as text, with 95 % intervals."""
    titles = {"greedy": "greedy", "sampled": "sampled", "majority": "majority vote"}
    titles |= {"pass_at_k": "pass@k", "mean_tokens": "tokens"}
    rows = metrics[metrics.metric.isin(titles)].sort_values("k")
    rows = rows.drop_duplicates(["iteration", "metric"], keep="last")  # the largest k
    rows = rows.astype({"low": float, "high": float})  # None is NaN
    rows["cell"] = rows.apply(_cell, axis=1)
    table = rows.pivot(index="iteration", columns="metric", values="cell").fillna("")
    table = table[[name for name in titles if name in table]].rename(columns=titles)
    table = table.set_axis([f"M_{t}" for t in table.index]).rename_axis(columns=None)
    return table.to_string(col_space=24)


def _cell(row) -> str:
    if row.metric == "mean_tokens":
        return f"{row.value:.1f}"
    interval = f" ({100 * row.low:.1f}-{100 * row.high:.1f})" if row.low == row.low else ""
    k = f" @{int(row.k)}" if row.metric in ("majority", "pass_at_k") else ""
    return f"{100 * row.value:.1f}{interval}{k}"


def quiet_libraries() -> None:
    """Progress bars of our own stages only, without the bars and advice of the libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # optional kernels not found
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
