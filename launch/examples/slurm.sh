#!/usr/bin/env bash
#SBATCH --job-name=embrag
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Training under SLURM for longer than a job may last:
#
#     sbatch launch/examples/slurm.sh --panel /shared/PANEL.vcf.gz --map /shared/MAP
#
# srun starts one rank for each GPU. Two minutes before the job's end SLURM sends them SIGUSR1. They save a checkpoint,
# and say in RUN/outcome.json whether to go on. The job then goes back to the queue, and resumes when it starts again.
# RUN lies on a file system that all nodes share. Leave --gpus-per-task and --gpu-bind out: a rank picks its GPU by its
# number on the node, among all of them.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
run=${RUN:-runs/$SLURM_JOB_ID} config=${CONFIG:-v18}
resume=()
if compgen -G "$run/checkpoints/step*" >/dev/null; then resume=(--resume); fi
srun --kill-on-bad-exit=0 embrag train --deepspeed_config "$config" --run-dir "$run" "${resume[@]}" "$@"
status=$?
again='import json, sys; sys.exit(not json.load(open(sys.argv[1]))["restart"])'
if [ -e "$run/outcome.json" ] && python -c "$again" "$run/outcome.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
