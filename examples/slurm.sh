#!/usr/bin/env bash
# Flash-GRPO on several nodes under Slurm: sbatch examples/slurm.sh RECIPE.yaml [key=value ...]
# Submit the same command again after a time limit or a failure: the run goes on from its last checkpoint. The run
# directory (out=...) has to lie on storage that all nodes share.
#SBATCH --job-name=flashgrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # reads to the end: head would break the pipe
port=$((20000 + SLURM_JOB_ID % 20000))

# One torchrun a node; they meet at the first node (c10d rendezvous) and start one process a GPU.
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$host:$port" \
    -m flashgrpo train "$@"
