"""Run comparisons over methods, settings and seeds. A study that was stopped resumes.

    python scripts/study.py tuning         # a learning rate for each method
    python scripts/study.py comparison     # the paper's table, with seeds
    python scripts/study.py ablations      # one setting at a time
    python scripts/study.py stability      # learning rate x alpha
    python scripts/study.py regimes        # when do rejected completions help?
    python scripts/study.py long           # iterations 5 to 8
    python scripts/study.py curves         # log-probabilities during training
    python scripts/study.py lesson         # β, the NLL term and methods on the second seed model

Run tuning first, then comparison, then the others. Without a name, all of them but `lesson` are
run. `lesson` takes many hours and has its own settings: `scripts/lesson_study.py` runs its parts.
"""

from __future__ import annotations

import argparse
import sys


def lesson(options: argparse.Namespace) -> None:
    """All runs of the second seed model's study that are missing, then its tables and figures."""
    import lesson_report
    import lesson_study
    from irpo_utils import UserError

    if options.small or options.only or (options.runs, options.out) != ("runs/study", "figures"):
        raise UserError(
            "`lesson` has --seeds and --jobs alone. See python scripts/lesson_study.py --help."
        )
    lesson_study.study(list(lesson_study.PARTS), options.seeds, options.jobs)
    lesson_report.main([])


def main(arguments: list[str] | None = None) -> None:
    """Run the studies that are named; errors that a user can fix end with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="studies to run (default: all)")
    add("--only", nargs="+", metavar="TRIAL", help="methods, factors or trials to run")
    add("--seeds", type=int, help="number of seeds (default: what the study has)")
    add("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    add("--small", action="store_true", help="a few questions only, to see that everything works")
    add("--runs", default="runs/study", help="folder of the run directories (%(default)s)")
    add("--out", default="figures", help="folder of tables and figures (%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.jobs, options.seeds or 1) < 1:
        parser.error("--jobs and --seeds must be at least 1")

    from irpo_utils import UserError
    from studies import api, runner, trials

    api.quiet_libraries()
    settings = {name: value for name, value in vars(options).items() if name != "names"}
    try:
        for name in options.names or trials.STUDIES:
            if name == "lesson":
                lesson(options)
                continue
            table = runner.run_study(name, **settings)
            print(f"{name}: {table.seed.nunique()} seeds, {len(table)} rows in {options.out}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished work is kept: run the same command to resume.")


if __name__ == "__main__":
    main()
