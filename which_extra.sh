#!/bin/sh
# The extra of setup.py that fits this machine's NVIDIA driver, and why, in one line: "gpu (...)". For `make install`.
# CUDA 13 needs driver 580, CUDA 12 driver 525. FAISS for CUDA 13 has no code for GPUs below compute capability 8.0.
query() {
    nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null
}
{ query driver_version,compute_cap || query driver_version; } | awk -F', *' '
    $1 ~ /^[0-9]+\./ { driver = $1 }
    driver && $2 ~ /^[0-9]/ && (!least || $2 + 0 < least) { least = $2 + 0 }
    END {
        if (!driver) print "cpu (nvidia-smi finds no driver)"
        else if (driver + 0 < 525) print "cpu (driver " driver " has no CUDA 12: 525 has, 580 has CUDA 13)"
        else if (driver + 0 < 580) print "gpu-cu12 (driver " driver " has CUDA 12: 580 has CUDA 13)"
        else if (least && least < 8) print "gpu-cu12 (a GPU of compute capability " least ": CUDA 13 packages want 8.0)"
        else print "gpu (driver " driver " has CUDA 13)"
    }'
