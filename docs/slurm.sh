#!/bin/bash
# One run on all GPUs of several machines, which goes on by itself after its time limit and after a preemption:
#
#     sbatch docs/slurm.sh --config recipes/resnet50.yaml          # from the project's folder, which all machines share
#
# Two minutes before the limit the script is told (SIGUSR1), passes it on, and puts itself back into the queue. A job that
# is queued again keeps its number, finds its run by it, and resumes. Where a site preempts, Slurm queues it again itself.
#SBATCH --job-name=phases
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

run=runs/slurm-$SLURM_JOB_ID
if [ -f "$run/config.yaml" ]; then
    set -- "$@" --resume "$run"
else
    set -- "$@" --run_name "slurm-$SLURM_JOB_ID"
fi

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}

# One launcher a machine, which hands signals on to its processes and waits for their checkpoint; accelerate launch would
# be ended by SIGUSR1. What is in single quotes is evaluated on each machine.
# shellcheck disable=SC2016
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" --master_addr "$HEAD" --master_port "${PORT:-29500}" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@"' launch "$@" &
step=$!

stopped=
trap 'stopped=yes; kill -USR1 "$step"' USR1
wait "$step"
code=$?
if [ "$stopped" ]; then # it was the signal that ended the wait
    wait "$step"
    code=$?
    [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
