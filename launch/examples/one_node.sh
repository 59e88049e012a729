#!/usr/bin/env bash
# Training on some GPUs of one machine:
#
#     GPUS=4 RUN=runs/mine launch/examples/one_node.sh --panel PANEL.vcf.gz --map MAP
#
# Options of `embrag train` follow. A run in the folder RUN goes on if it has a checkpoint. PORT must differ between
# runs that share a machine; by default a free one is taken. CONFIG is a file, or the name of a shipped configuration.
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)} run=${RUN:-runs/mine} config=${CONFIG:-v18}
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
resume=()
if compgen -G "$run/checkpoints/step*" >/dev/null; then resume=(--resume); fi
# On machines without a GPU it starts as many ranks on the CPU, two if GPUS is not set.
if [ "$gpus" = 0 ]; then gpus=2; fi
exec deepspeed --num_accelerators "$gpus" --master_port "$port" launch/train.py \
    --deepspeed_config "$config" --run-dir "$run" "${resume[@]}" "$@"
