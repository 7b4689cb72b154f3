#!/bin/bash
# One run on all GPUs of several machines, which goes on by itself after its time limit and after a preemption:
#
#     sbatch docs/slurm.sh --config recipes/resnet50.yaml          # from the project's folder, which all machines share,
#                                                                  # with its environment active
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

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm.sh: submit it, so that the job has a number: sbatch docs/slurm.sh [options of train.py]" >&2
    exit 2
fi
folder=${OUTPUT_DIR:-runs} # which all machines share
run=$folder/slurm-$SLURM_JOB_ID
for option in "$@"; do
    case $option in
    --output_dir* | --run_name* | --resume*)
        echo "slurm.sh: it names the run itself, below \$OUTPUT_DIR (runs): leave $option out" >&2
        exit 2
        ;;
    esac
done
if [ -f "$run/config.yaml" ]; then
    set -- "$@" --output_dir "$folder" --resume "$run"
else
    set -- "$@" --output_dir "$folder" --run_name "${run##*/}"
fi

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job by itself

stopped=
step=
trap 'stopped=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1

# One launcher a machine, which hands signals on to its processes and waits 100 seconds for their checkpoint; accelerate
# launch would be ended by SIGUSR1. What is in single quotes is evaluated on each machine.
# shellcheck disable=SC2016
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" --master_addr "$HEAD" --master_port "${PORT:-29500}" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout 100 train.py "$@"' launch "$@" &
step=$!

wait "$step"
code=$?
if [ "$stopped" ]; then # it was the signal that ended the wait
    wait "$step"
    code=$?
    [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
