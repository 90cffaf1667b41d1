#!/bin/bash
# Two nodes with eight GPUs each; from the repository's folder, after `make`, on a file system that all nodes see:
#
#   sbatch scripts/cluster/slurm.sh --profile llama-3.1-8b --out /shared/runs/llama
#
# The options after slurm.sh are those of `python -m irpo_utils run`; all nodes must see the run directory. Three minutes before
# the time limit the run is stopped as with Ctrl-C, and the job queues again with the same command, which resumes the run. Slurm
# queues the job again when a node fails, and after preemption if the cluster is configured so. Partition, account and other sizes
# are options before the script: sbatch --nodes 1 --gpus-per-node 4 scripts/cluster/slurm.sh ...
#SBATCH --job-name=irpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=irpo-%j.log
set -euo pipefail

BIN=${BIN:-.venv/bin}
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${names%%$'\n'*}

# scancel with a signal reaches the processes of the run but not this script. Without a signal it ends both for good.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    "$BIN/torchrun" --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:${PORT:-29500}" \
    scripts/run.py "$@" &
step=$!
status=0
wait "$step" || status=$?
if [ -n "$stopped" ]; then                      # the signal ended `wait`, not yet the run
    status=0
    wait "$step" || status=$?
    [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
