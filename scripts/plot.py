"""Draw accuracy per iteration of one or several finished runs, with the table behind it.

    python scripts/plot.py runs/seed_0 runs/seed_1 runs/seed_2

The runs differ in their seed alone. The intervals of the means resample seeds and questions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from irpo_utils.ops import cli


def plot(arguments: list[str]) -> None:
    """Write NAME.svg, .png, .csv (all rows), .json and NAME_mean.csv; print the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run directories that differ in their seed")
    parser.add_argument("--out", help="folder (default: that of the first run)")
    name = "accuracy_of_seeds"  # the run itself writes accuracy_per_iteration
    parser.add_argument("--name", default=name, help=f"name of the files (default: {name})")
    options = parser.parse_args(arguments)
    options.out = options.out or options.runs[0]
    cli.quiet_libraries()
    from irpo_utils import plots
    from irpo_utils.ops.storage import check_path
    from studies import figures, finished_runs

    for name in ("out", "name"):
        check_path(getattr(options, name), name)
    metrics, means, record = finished_runs.collect(options.runs)
    figure = figures.accuracy_of_seeds(metrics, means)
    command = " ".join(["python scripts/plot.py", *arguments])
    plots.save(figure, options.out, options.name, metrics, {"command": command, **record})
    means.to_csv(Path(options.out) / f"{options.name}_mean.csv", index=False)
    print(f"{cli.accuracy_table(means)}\n\nFigure: {Path(options.out) / options.name}.png")


if __name__ == "__main__":
    sys.exit(cli.run_command(plot, sys.argv[1:]))
