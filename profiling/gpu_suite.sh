#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most nineteen minutes, into one dated report:
#
#     profiling/gpu_suite.sh [WHEELS] [PANEL] [RESULTS]
#
# WHEELS   folder of wheels to install first, without a network, into a folder of their own ("" or "-": nothing is
#          installed): what setup.py names and the machine lacks, msprime for the tests included
# PANEL    folder that `embrag simulate` made ("" or "-": the embedded default, which needs msprime)
# RESULTS  where the report goes (default: profiling/results/<date>-gpu): report.md, suite.log, and results.tar.gz with
#          every table, plot and profile
#
# It runs from the source tree. The first part says in ten seconds what works. Each part fails alone, and is stopped at
# its own limit or at the deadline of all, DEADLINE seconds after the start (default: 1140). Report, log and archive are
# complete after every part. The exit status is that of the worst. Three environment variables: PYTHON names the
# interpreter (default: python3), ONLY lists the parts to run, and REHEARSAL=1 runs all of it small, on a CPU.
#
# Where a command may take ten minutes only, run it twice, with DEADLINE=570 and a folder of results each:
# ONLY="check tests memory-v17 memory-v18 training", then ONLY="eager compiled kernels retrieval impute".
#
# Two more measurements have calls of their own: profiling/equal_time.py, V17 beside V18, and compare.py --only largest.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${1:--} panel=${2:--} results=${3:-profiling/results/$(date +%F)-gpu}
python=${PYTHON:-python3} deadline=${DEADLINE:-1140}
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
check=() samples=32 few=16 rounds=2 steps=60 network=() wide=(--set embrag.model.dims=384) panels=(--rounds 3)
if [ -n "${REHEARSAL:-}" ]; then
    export DS_ACCELERATOR=cpu
    check=(--device cpu) samples=2 few=2 rounds=1 steps=6
    network=(--set embrag.model.dims=16 --set embrag.model.layers=1 --set embrag.model.heads=2)
    network+=(--set embrag.data.validation_samples=2 --set embrag.validation.windows=1) wide=()
    panels=(--haplotypes 200 --reference 100 --sites 100 --windows 6 --literal-windows 2 --micro-batch 2 --steps 2 --rounds 1)
fi
mkdir -p "$results" "$work/results"
report=$results/report.md
worst=0

{
    echo "# GPU suite, $(date -u +'%F %H:%M') UTC"
    echo
    [ -n "${REHEARSAL:-}" ] && printf '**A rehearsal on a CPU: no figure here is that of a GPU.**\n\n'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    echo
    echo "| part | result | seconds |"
    echo "|---|---|---|"
} >"$work/heading"

# part NAME LIMIT COMMAND...: run it for at most LIMIT seconds, its output in suite.log while it runs.
part() {
    local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)) result=ok status=0
    shift 2
    : >"$work/said"
    if [[ -n ${ONLY:-} && " $ONLY " != *" $name "* ]]; then return; fi
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "== $name: $*" | tee -a "$results/suite.log"
    local before
    before=$(wc -c <"$results/suite.log")
    if [ "$limit" -lt 10 ]; then
        status=124 result="not begun: the deadline is near"
    else
        timeout --kill-after=5 "$limit" "$@" >>"$results/suite.log" 2>&1 || status=$?
        if [ $status -eq 124 ]; then
            result="over $limit s"
        elif [ $status -ne 0 ]; then
            result="failed ($status)"
        fi
    fi
    tail -c "+$((before + 1))" "$results/suite.log" >"$work/said"
    tail -n 3 "$work/said"
    if [ $status -gt $worst ]; then worst=$status; fi
    echo "| $name | $result | $((SECONDS - began)) |" >>"$work/parts"
}

# written [TITLE FILE]: put a text file into the report, write it, and archive all results so far.
written() {
    if [ -s "${2:-}" ]; then
        { printf '\n## %s\n\n' "$1"; sed 's/^#/###/' "$2"; } >>"$work/details"
    fi
    cat "$work/heading" "$work/parts" "$work/details" >"$report" 2>/dev/null
    tar -czf "$results/results.tar.gz" -C "$work" results
}

# fenced FILE: its text as a block, nothing for an empty or absent one.
fenced() {
    if [ -s "$1" ]; then printf '```\n%s\n```\n' "$(cat "$1")"; fi
}

: >"$results/suite.log"
: >"$work/details"
part check 60 "$python" profiling/gpu_check.py "${check[@]}"
fenced "$work/said" >"$work/check.md"
written "What works" "$work/check.md"

# A warning of versions that constraints.txt does not pin is no failure here.
part tests 300 "$python" -m pytest -m gpu -q -p no:cacheprovider -W default
written

# Every variant as v18.json is; then V18 alone, compiled.
compare() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" profiling/compare.py --deepspeed_config "$config" --only time \
        --out "$work/results/$name" --micro-batch "$samples" --rounds "$rounds" "${files[@]}" "${network[@]}" "$@"
    written "Comparison: $name" "$work/results/$name/compare.md"
}
compare eager 170
compare compiled 240 --variants "V18 fixed" "V18 refresh" --set embrag.train.compile=true

if [ -z "${REHEARSAL:-}" ]; then  # torch's profiler records kernels of a GPU only
    part kernels 90 "$python" profiling/kernels.py --deepspeed_config "$config" --micro-batch "$samples" \
        --out "$work/results/kernels" "${files[@]}"
    written "Kernels" "$work/results/kernels/kernels.md"
fi

# NVML's peak beside torch's, of V17 and V18 at 16 samples, 384 dims and 1,030 sites (so many are in each window of the
# default panel with that overlap).
for version in v17 v18; do
    out=$work/results/memory-$version
    part "memory-$version" 60 "$python" profiling/memory.py --deepspeed_config "ds_configs/$version.json" --steps 20 \
        --out "$out" --set "train_micro_batch_size_per_gpu=$few" --set embrag.data.window_sites=1030 \
        --set embrag.data.overlap_sites=53 "${wide[@]}" "${network[@]}" "${files[@]}"
    fenced "$work/said" >"$work/memory.md"
    written "Memory of $version, $few samples" "$work/memory.md"
done

part training 80 "$python" launch/train.py --deepspeed_config "$config" --run-dir "$work/run" --max-steps "$steps" \
    --profile nvml --set 'embrag.retrieval.refresh={"every_steps": 20}' --set "embrag.train.eval_every=$steps" \
    --set "train_micro_batch_size_per_gpu=$samples" "${network[@]}" "${files[@]}"
for name in profile.json profile.png trace.json metrics.jsonl run.log; do
    if [ -f "$work/run/$name" ]; then cp "$work/run/$name" "$work/results/"; fi
done
fenced "$work/run/metrics.jsonl" >"$work/metrics.md"
written "Training" "$work/metrics.md"

part retrieval 90 "$python" profiling/bench_retrieval.py --json "$work/results/retrieval.json" "${panels[@]}"
fenced "$work/said" >"$work/retrieval.md"
written "Retrieval" "$work/retrieval.md"

target=()
if [ "$panel" != - ]; then target=(--panel "$panel/panel.vcf.gz" --map "$panel/genetic.map" --target "$panel/target.vcf.gz"); fi
part impute 60 "$python" profiling/impute_rate.py --json "$work/results/impute_rate.json" --rounds "$rounds" "${target[@]}"
fenced "$work/said" >"$work/impute.md"
written "Imputation" "$work/impute.md"
echo "written to $report"
exit $worst
