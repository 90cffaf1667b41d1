"""Evaluate a finished run again: another task, more samples, another split.

    python scripts/evaluate.py runs/cpu --split validation --k 32
    python scripts/evaluate.py runs/qwen2.5-0.5b --split test --iterations best

With `best` the M_t of highest greedy accuracy in metrics.csv is evaluated, the earliest of a tie.
That needs a run that was evaluated on the validation split, and another split here.
`torchrun` or `accelerate launch` before the script splits the questions over several GPUs.
"""

from __future__ import annotations

import argparse
import sys

from irpo_utils.ops import cli


def evaluate(arguments: list[str]) -> None:
    """Write the metrics into RUN/evaluations/TASK_SPLIT.csv and print them."""
    from transformers.hf_argparser import string_to_bool

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--task", help="another task than the run's")
    parser.add_argument("--data", help="local folder or file of that task")
    parser.add_argument("--split", help="validation, test or (math) math500 (default: the run's)")
    which = "which M_t, or best, which the run's evaluation chooses (default: the first, the last)"
    parser.add_argument("--iterations", type=iteration, nargs="+", help=which)
    parser.add_argument("--k", type=int, default=32, help="completions per question (default: 32)")
    parser.add_argument("--out", help="folder for the table (default: RUN/evaluations)")
    allow = "continue although these questions are among the training questions"
    parser.add_argument("--allow-overlap", type=string_to_bool, nargs="?", const=True, help=allow)
    options = parser.parse_args(arguments)
    cli.quiet_libraries()
    from cluster import fsdp
    from irpo_utils.scale import processes
    from studies import evaluate_again

    processes.engine = fsdp.engine
    text = evaluate_again.evaluate_run(**vars(options))
    if processes.is_first():
        print(text)


def iteration(word: str) -> int | str:
    return word if word == "best" else int(word)


if __name__ == "__main__":
    sys.exit(cli.run_command(evaluate, sys.argv[1:]))
