#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most nine minutes, into one dated report:
#
#     profiling/gpu_suite.sh [WHEELS] [PANEL] [RESULTS]
#
# WHEELS   folder of wheels to install first, without a network, into a folder of their own ("" or "-": nothing is
#          installed): what setup.py names and the machine lacks, msprime for the tests included
# PANEL    folder that launch/simulate.py made ("" or "-": the embedded default, which needs msprime)
# RESULTS  where the report goes (default: profiling/results/<date>-gpu)
#
# The search for the largest batch is not in it: compare.py --only largest fills a call of its own.
# It runs from the source tree. Each part has a time limit and fails alone; report.md says which did, and the exit status
# is that of the worst. PYTHON names the interpreter (default: python3).
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${1:--} panel=${2:--} results=${3:-profiling/results/$(date +%F)-gpu}
python=${PYTHON:-python3}
config=ds_configs/v18.json

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "error: nvidia-smi finds no GPU; gpu_suite.sh needs one" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "$wheels" != - ]; then
    site=$work/site
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
files=()
if [ "$panel" != - ]; then
    files=(--panel "$panel/panel.vcf.gz" --map "$panel/genetic.map" --samples "$panel/samples.tsv")
fi
mkdir -p "$results"
report=$results/report.md
worst=0

{
    echo "# GPU suite, $(date -u +'%F %H:%M') UTC"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    echo
    "$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "deepspeed", "cupy-cuda13x", "cupy-cuda12x", "faiss-cuda", "faiss-gpu", "numpy", "numba"):
    try:
        print(f"{name} {version(name)}")
    except PackageNotFoundError:
        continue
PYTHON
    echo
    echo "| part | result | seconds |"
    echo "|---|---|---|"
} >"$report"

# part NAME LIMIT COMMAND...: run it for at most LIMIT seconds, its output in suite.log.
part() {
    local name=$1 limit=$2 began=$SECONDS result=ok status
    shift 2
    echo "== $name: $*" | tee -a "$results/suite.log"
    timeout --kill-after=5 "$limit" "$@" >"$work/out" 2>&1
    status=$?
    [ $status -eq 0 ] || result="failed ($status)"
    [ $status -eq 124 ] && result="over $limit s"
    [ $status -gt $worst ] && worst=$status
    tail -c 200000 "$work/out" >>"$results/suite.log"
    tail -n 3 "$work/out"
    echo "| $name | $result | $((SECONDS - began)) |" >>"$report"
}

: >"$results/suite.log"
# A warning of versions that constraints.txt does not pin is no failure here.
part "tests" 110 "$python" -m pytest -m gpu -q -p no:cacheprovider -W default
part "retrieval" 70 "$python" profiling/bench_retrieval.py --json "$results/retrieval.json"
# Every variant as v18.json is; V18 with its blocks compiled; then 16 samples at 384 dims and 1,030 sites (so many are in
# each window of the default panel with that overlap), whose memory has a bar of its own.
comparisons=()
compare() {
    local name=$1 limit=$2
    shift 2
    comparisons+=("$name")
    part "$name" "$limit" "$python" profiling/compare.py --deepspeed_config "$config" --only time --out "$work/$name" "${files[@]}" "$@"
}
compare compare 150 --micro-batch 32 --rounds 3
compare compiled 75 --micro-batch 32 --rounds 3 --variants "V18 fixed" "V18 refresh" --set embrag.train.compile=true
compare wide 55 --micro-batch 16 --rounds 1 --variants "V18 refresh" --set embrag.model.dims=384 \
    --set embrag.data.window_sites=1030 --set embrag.data.overlap_sites=53
part "training" 80 "$python" launch/train.py --deepspeed_config "$config" --run-dir "$work/run" --max-steps 60 --profile nvml \
    --set 'embrag.retrieval.refresh={"every_steps": 20}' --set embrag.train.eval_every=60 "${files[@]}"

for name in "${comparisons[@]}"; do
    for kind in json png; do
        [ -f "$work/$name/compare.$kind" ] && cp "$work/$name/compare.$kind" "$results/$name.$kind"
    done
done
for name in profile.json profile.png; do
    [ -f "$work/run/$name" ] && cp "$work/run/$name" "$results/"
done
{
    for name in "${comparisons[@]}"; do
        echo
        echo "## $name"
        echo
        [ -f "$work/$name/compare.md" ] && sed 's/^#/###/' "$work/$name/compare.md"
    done
    echo
    echo "## Training"
    echo
    echo '```'
    [ -f "$work/run/metrics.jsonl" ] && cat "$work/run/metrics.jsonl"
    echo '```'
} >>"$report"
echo "written to $report"
exit $worst
