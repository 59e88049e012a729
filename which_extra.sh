#!/bin/sh
# which_extra.sh [PYTHON]: the extra of setup.py that fits the NVIDIA driver, and why, in one line: "gpu (...)".
# CUDA 13 needs driver 580, CUDA 12 driver 525. FAISS for CUDA 13 has code for GPUs of compute capability 8 to 10 alone,
# and no wheel for Python 3.10.
"${1:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && wheel=1 || wheel=0
query() {
    nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null
}
{ query driver_version,compute_cap || query driver_version; } | awk -F', *' -v wheel=$wheel '
    $1 ~ /^[0-9]+\./ { driver = $1 }
    driver && $2 ~ /^[0-9]/ && ($2 < 8 || $2 >= 11) { other = $2 }
    END {
        if (!driver) print "cpu (nvidia-smi finds no driver)"
        else if (driver + 0 < 525) print "cpu (driver " driver " has no CUDA 12: 525 has, 580 has CUDA 13)"
        else if (driver + 0 < 580) print "gpu-cu12 (driver " driver " has CUDA 12: 580 has CUDA 13)"
        else if (other) print "gpu-cu12 (a GPU of compute capability " other ": the packages for CUDA 13 serve 8 to 10)"
        else if (!wheel) print "gpu-cu12 (driver " driver " has CUDA 13, but FAISS for it needs Python 3.11)"
        else print "gpu (driver " driver " has CUDA 13)"
    }'
