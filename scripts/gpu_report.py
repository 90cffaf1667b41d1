"""Measure a GPU in one command: tests, sampling, training, a real run, the plan, and notebooks.

    python scripts/gpu_report.py                                  # eight minutes at most
    python scripts/gpu_report.py --model FOLDER --data FOLDER     # another model and GSM8K
    python scripts/gpu_report.py --seconds 1800                   # a slower GPU
    python scripts/gpu_report.py --device cpu --tiny              # the same steps without a GPU

Writes gpu_NAME.json, gpu_NAME.csv and gpu_NAME_files.tar.gz after every phase. The same command
resumes: finished phases are skipped. It needs no network.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> None:
    """Measure the phases; errors that a user can fix end with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="model folder (default: SmolLM2-135M, or random weights of its shape)")
    add("--data", help="folder with the questions of --task (default: questions of word_problems)")
    add("--task", help="task of the data (default: gsm8k with --data, otherwise word_problems)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="the smallest sizes, to see that everything works")
    add("--seconds", type=float, default=480.0, help="time for all phases (default: %(default)g)")
    add("--only", nargs="+", metavar="PHASE", default=[], help="phases to measure again")
    add("--name", help="name of the files (default: the name of the GPU)")
    add("--out", default="figures", help="folder of the files (default: %(default)s)")
    add("--runs", default="runs", help="folder for the run and the logs (default: %(default)s)")
    options = vars(parser.parse_args(arguments))

    from irpo_utils import UserError
    from studies import gpu_report

    names = ("model", "data", "task", "device", "tiny")
    settings = gpu_report.Settings.of(**{name: options.pop(name) for name in names})
    try:
        report = gpu_report.measure(settings, **options)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished phases are kept: run the same command to resume.")
    print(f"\n{report.table()}\n\nResults: {report.json_file}")


if __name__ == "__main__":
    main()
