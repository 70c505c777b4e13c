#!/usr/bin/env bash
# What only a GPU can show of the GroupNorm kernels, in one run of under nine minutes: builds everything, then checks the
# kernels, the torch operator and the TensorRT plugins, looks for bad accesses and races, and measures the speed: of what
# is chosen, of every plan (plans.csv), and with no launch overlapping the one ahead.
#
#     bash benchmarks/group_norm_gpu.sh LOGS [HEADERS...]
#
# LOGS is a folder for the logs; summary.txt in it says what passed. Each of HEADERS is a folder with the headers of one
# TensorRT: its plugin is built and driven by the host check. PYTHON names the interpreter, python3 by default.
# Exits with 1 where anything failed or did not end in time.
set -uo pipefail

if [ $# -lt 1 ] || [[ "$1" == -* ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
LOGS="$(CDPATH='' cd -- "$1" && pwd -P)"
shift
HEADERS=()
for folder in "$@"; do
    HEADERS+=("$(CDPATH='' cd -- "$folder" && pwd -P)") || exit 2
done
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON="${PYTHON:-python3}"
BUILD="$PWD/build/plugins/gpu_check"
TOTAL_SECONDS=520
# Of the kernel check, under the sanitizer: each norm of the pipeline in both layouts, which come first, and as many
# random ones again. Under racecheck, which takes four times as long, a few.
SANITIZED_CASES=100
RACE_CASES=54
SUMMARY="$LOGS/summary.txt"
SECONDS=0
export PYTHONUNBUFFERED=1
export PATH="$PATH:/usr/local/cuda/bin"
mkdir -p "$BUILD" || exit 2
: >"$SUMMARY"
rm -f "$LOGS"/*.log "$LOGS"/benchmark*.json "$BUILD"/*.result

# stage NAME LOG LIMIT COMMAND...: run it for at most LIMIT seconds and within the total; its output is added to LOG.
stage() {
    local name="$1" log="$LOGS/$2.log" limit="$3" begin=$SECONDS left code verdict
    shift 3
    left=$((TOTAL_SECONDS - SECONDS))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        printf 'SKIPPED  %-22s no time left\n' "$name" | tee -a "$SUMMARY"
        return 1
    fi
    # One stage's output is written at one go: stages that share a log may run at the same time.
    timeout -k 5 "$limit" "$@" >"$BUILD/$name.part" 2>&1
    code=$?
    { echo "==== $name: $*" && cat "$BUILD/$name.part"; } >>"$log"
    case $code in
        0) verdict=passed ;;
        124 | 137) verdict="TIMEOUT" ;;
        *) verdict="FAILED" ;;
    esac
    printf '%-8s %-22s %4d s  %s\n' "$verdict" "$name" $((SECONDS - begin)) \
        "$(tail -n 1 "$BUILD/$name.part" | tr -d '\r' | cut -c1-150)" | tee -a "$SUMMARY"
    [ "$code" -eq 0 ] || tail -n 25 "$BUILD/$name.part" | sed 's/^/    | /'
    rm -f "$BUILD/$name.part"
    return "$code"
}

# The compute capability of the GPU, such as 90.
architecture() {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. \r'
}

# All at the same time, each in a file of its own for what the next stages may count on.
build_all() {
    local arch="$1" folder number=0
    (stage build-operator build 180 "$PYTHON" -m plugins.torch_operator --build && touch "$BUILD/operator.result") &
    # With the compiler's report of registers and spills, and with lines for the sanitizer.
    (stage build-kernel-check build 180 nvcc -std=c++17 -O3 -lineinfo -Xptxas -v -Xcompiler -Wall,-Wextra -Iplugins \
        "-gencode=arch=compute_$arch,code=sm_$arch" -o "$BUILD/kernel_check" \
        plugins/kernel_check.cu plugins/group_norm_kernels.cu && touch "$BUILD/kernels.result") &
    for folder in ${HEADERS[@]+"${HEADERS[@]}"}; do
        number=$((number + 1))
        (stage "build-plugin-$number" build 180 bash plugins/build.sh --tensorrt "$folder" --arch "$arch" \
            --output "$BUILD/plugin-$number" --host-check && touch "$BUILD/plugin-$number.result") &
    done
    wait
}

check_plugins() {
    local number library name
    for number in $(seq 1 ${#HEADERS[@]}); do
        [ -e "$BUILD/plugin-$number.result" ] || continue
        for library in "$BUILD/plugin-$number"/libgroup_norm_trt*.so; do
            name="$(basename "$library" .so)"
            stage "$name" host_check 40 "$BUILD/plugin-$number/host_check_trt${name##*trt}" "$library"
        done
    done
}

# Three tools over fewer cases, at the same time: they are slow and nothing is timed.
sanitize() {
    local tool cases
    for tool in memcheck racecheck initcheck; do
        cases=$SANITIZED_CASES
        [ "$tool" != racecheck ] || cases=$RACE_CASES
        (stage "$tool" sanitizer 140 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$BUILD/kernel_check" --cases "$cases" --no-timing) &
    done
    wait
}

# Once with launches that wait for the end of the one ahead, as all other candidates' do, then as they are meant to be.
measure() {
    local left budget
    stage benchmark-no-overlap benchmark_no_overlap 60 "$PYTHON" benchmarks/group_norm.py --no-overlap \
        --compile-mode none --output "$LOGS/benchmark_no_overlap.json"
    left=$((TOTAL_SECONDS - SECONDS))
    # About 50 s go into the build's look-up, the timing and the start of the compilers.
    budget=$((left - 60 < 150 ? left - 60 : 150))
    if [ "$budget" -lt 0 ]; then
        budget=0
    fi
    stage benchmark benchmark "$left" "$PYTHON" benchmarks/group_norm.py --compile-budget "$budget" \
        --output "$LOGS/benchmark.json"
}

main() {
    local arch
    arch="$(architecture)"
    if ! [[ "$arch" =~ ^[0-9]+$ ]]; then
        echo "nvidia-smi names no GPU" | tee -a "$SUMMARY" >&2
        return 1
    fi
    # Without this every test would be skipped, which counts as passed.
    stage torch-sees-gpu build 60 "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' ||
        return 1
    { nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader && nvcc --version | tail -n 1; } |
        tee -a "$SUMMARY"
    build_all "$arch"
    if [ -e "$BUILD/kernels.result" ]; then
        stage kernel-check kernel_check 120 "$BUILD/kernel_check"
        stage plans plans 90 "$BUILD/kernel_check" --cases 0 --plans "$LOGS/plans.csv"
    fi
    if [ -e "$BUILD/operator.result" ]; then
        stage gpu-tests tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_torch_operator.py
    fi
    check_plugins
    if [ -e "$BUILD/kernels.result" ]; then
        sanitize
    fi
    if [ -e "$BUILD/operator.result" ]; then
        measure
    fi
    echo "$SECONDS s in all" | tee -a "$SUMMARY"
    ! grep -Eq '^(FAILED|TIMEOUT|SKIPPED)' "$SUMMARY"
}

main
