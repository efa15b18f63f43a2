#!/bin/bash
# A run by a job array: every task is the same command and takes units of work that no other task is at.
#
#     sbatch examples/slurm.sh infer-imagenet-ipc50 /shared/runs/imagenet --data.root /shared/imagenet
#     stillroom run infer-imagenet-ipc50 --engine shared --out /shared/runs/imagenet --data.root /shared/imagenet  # table
#
# Tasks may start and end when they like: with one alone all is done too, only later. One that is stopped or killed is
# missed by nobody; submitted again, the run goes on. The run and the cache must lie where all nodes see them.
#SBATCH --job-name=stillroom
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=stillroom-%A_%a.log
set -euo pipefail
recipe=$1 out=$2
shift 2
export STILLROOM_CACHE=${STILLROOM_CACHE:-$out/../teachers}
# Ten minutes before the job's own limit all work is saved. Equal threads, since they are part of the numerical plan.
srun stillroom run "$recipe" --engine shared --out "$out" --time-limit 3h50m \
    --compute.threads "${SLURM_CPUS_PER_TASK:-1}" "$@"
