"""`python -m irpo_utils run` with the methods, losses and probes of the studies, and split models.

    python scripts/run.py --method self_consistency --out runs/majority
    torchrun --nproc_per_node 8 scripts/run.py --profile paper --shard true --engine vllm

The methods are those of `scripts/studies/baselines.py` and `scripts/studies/grpo.py`. `--shard`
splits the model over the processes as in `scripts/cluster/fsdp.py`. `--probe-every` logs the
log-probabilities of fixed pairs during training (`scripts/studies/probe.py`).
"""

import sys

from irpo_utils.ops import cli


def run(arguments: list[str]) -> None:
    """Add the methods, losses and callbacks, and what splits a model, then run."""
    cli.quiet_libraries()
    from cluster import fsdp
    from irpo_utils.scale import processes
    from studies import baselines, grpo, probe  # noqa: F401 (they add methods and callbacks)

    processes.split = fsdp.split
    cli.run(arguments)


if __name__ == "__main__":
    sys.exit(cli.run_command(run, sys.argv[1:], again="the same command resumes it"))
