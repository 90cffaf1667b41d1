"""Time the package's stages side by side with plain `generate` and TRL.

    python scripts/bench.py                       # everything, about 20 minutes on two idle cores
    python scripts/bench.py sampling --repeats 5
    python scripts/bench.py scaling               # time and memory as the work grows

Writes bench.csv and bench_scaling.csv, and prints how many times faster than plain each stage is.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks that are named; errors that a user can fix end with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = "sampling, training, evaluation, iteration, scaling"
    add("what", nargs="*", help=f"{names} (default: all)")
    add("--profile", default="cpu", help="profile with settings and model (%(default)s)")
    add("--repeats", type=int, default=3, help="turns of each variant (%(default)s)")
    add("--questions", type=int, default=200, help="training questions (%(default)s)")
    add("--out", default="figures", help="folder of the tables (%(default)s)")
    options = parser.parse_args(arguments)

    from irpo_utils import UserError
    from studies import api, bench

    record = api.environment()
    try:
        for what in options.what or (*bench.STAGES, "scaling"):
            if what == "scaling":
                _run_scaling(options.out, record)
            else:
                _run_stage(what, options, record)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The benchmarks that had finished are kept.")


def _run_stage(what: str, options, record: dict) -> None:
    from studies import bench

    rows = bench.bench(what, options.repeats, options.questions, options.profile)
    bench.save(rows, options.out, record)
    for row in rows:
        if row["ratio"]:
            turns = f"{row['low']:.2f} to {row['high']:.2f}"
            print(f"{what}: {row['metric']} {row['ratio']:.2f} times better than plain ({turns})")


def _run_scaling(out: str, record: dict) -> None:
    import pandas

    from irpo_utils import plots
    from studies import bench, figures

    table = pandas.DataFrame(bench.scaling())
    bench.save(table.to_dict("records"), out, record, "bench_scaling")
    plots.save(figures.scaling(table), out, "bench_scaling", table, record)


if __name__ == "__main__":
    main()
