"""`python -m irpo_utils run` with the methods and losses of the studies.

    python scripts/run.py --method self_consistency --out runs/majority

The methods are those of `scripts/studies/baselines.py` and `scripts/studies/grpo.py`.
"""

import sys

from irpo_utils.ops import cli


def run(arguments: list[str]) -> None:
    """Add the methods and losses, then run."""
    cli.quiet_libraries()
    from studies import baselines, grpo  # noqa: F401 (they add methods)

    cli.run(arguments)


if __name__ == "__main__":
    sys.exit(cli.run_command(run, sys.argv[1:], again="the same command resumes it"))
