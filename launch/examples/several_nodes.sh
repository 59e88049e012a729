#!/usr/bin/env bash
# Training on several machines without ssh between them. Start it on each, with the machine's number from 0:
#
#     NODE=0 HOSTS="node0 node1" GPUS=8 RUN=/shared/runs/mine launch/examples/several_nodes.sh --panel ... --map ...
#
# HOSTS are the same on all machines, and the first is where rank 0 runs: the others must reach it by this name on PORT.
# RUN lies on a file system that all machines share. INTERFACE names the network card for gloo, on the CPU and beside
# NCCL; without it gloo takes the address that the machine's own name has.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NODE:?the number of this machine, from 0}" "${HOSTS:?the names of all machines}" "${RUN:?a shared folder}"
gpus=${GPUS:-8} port=${PORT:-29500} config=${CONFIG:-v18}
hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
for host in $HOSTS; do echo "$host slots=$gpus"; done >"$hosts"
if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi
resume=()
if compgen -G "$RUN/checkpoints/step*" >/dev/null; then resume=(--resume); fi
deepspeed --hostfile "$hosts" --no_ssh --node_rank "$NODE" --master_addr "${HOSTS%% *}" --master_port "$port" \
    launch/train.py --deepspeed_config "$config" --run-dir "$RUN" "${resume[@]}" "$@"
