"""`python -m irpo_utils run` in several processes, and with the methods and losses of the studies.

    torchrun --nproc_per_node 8 scripts/run.py --profile llama-3.1-8b --out runs/llama
    python scripts/run.py --method self_consistency --out runs/majority

Processes share the run as in `scripts/cluster/shared.py`. `--shard` splits the model over them as
in `scripts/cluster/fsdp.py`. The methods are those of `scripts/studies/baselines.py` and
`scripts/studies/grpo.py`. `--probe-every` logs the log-probabilities of fixed pairs during training
(`scripts/studies/probe.py`).
"""

import sys

from irpo_utils.ops import cli


def run(arguments: list[str]) -> None:
    """Add the methods, losses and callbacks, and the engine of several processes, then run."""
    cli.quiet_libraries()
    from cluster import fsdp
    from irpo_utils.scale import processes
    from studies import baselines, grpo, probe  # noqa: F401 (they add methods and callbacks)

    processes.engine = fsdp.engine
    cli.run(arguments)


if __name__ == "__main__":
    sys.exit(cli.run_command(run, sys.argv[1:], again="the same command resumes it"))
