#!/bin/bash
# Gates learned on 2 nodes of 8 GPUs: sbatch examples/slurm.sh MODEL DATA RUN
#
# All nodes see MODEL, DATA and RUN, and the environment that has Secateur in it. What does not fit one GPU takes --shard.
# Two minutes before its time is up SLURM tells all ranks, the state is saved, and the job queues again and goes on.
#SBATCH --job-name=secateur
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
MODEL=$1 DATA=$2 RUN=$3

if [ -f "$RUN/config.yaml" ]; then
    command=(prune --resume "$RUN")
else
    # 16 ranks × 1 sequence of 2,048 tokens at once: 32,768 tokens a step, 32.8 M in 1,000 steps.
    command=(prune "$MODEL" --data "$DATA" --out "$RUN" --sparsity 0.2 --steps 1000 --batch-size 16 --micro-batch-size 1)
fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m secateur "${command[@]}"
code=$?

if [ $code -ne 0 ] && [ -d "$RUN/checkpoints" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
