#!/usr/bin/env bash
# Builds the TensorRT plugin library with one nvcc command, for the TensorRT whose headers are found and the GPU of this
# machine: build/plugins/libgroup_norm_trt<major>.so with a JSON manifest beside it. What is there and matches is kept.
# `bash plugins/build.sh --help` lists the options.
set -euo pipefail

HERE="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
ROOT="$(dirname "$HERE")"
PYTHON="${PYTHON:-python3}"
# Compute capabilities where this machine has no GPU to ask: A100, A10 and RTX 30, L4 and RTX 40, H100.
DEFAULT_ARCHITECTURES="80 86 89 90"
OLDEST_ARCHITECTURE=80

tensorrt=""
output="$ROOT/build/plugins"
architectures=""
kernels=()
host_check=0
force=0

usage() {
    cat <<END
Usage: bash plugins/build.sh [options]

  --tensorrt DIR   where TensorRT's headers lie (DIR or DIR/include); by default \$TENSORRT_ROOT, else the system's
  --output DIR     where the library goes; by default build/plugins
  --arch LIST      compute capabilities, such as 80,90; by default this machine's GPU, else 80,86,89,90
  --kernels FILE   other source of the kernels than plugins/group_norm*.cu, for tests
  --host-check     build host_check_trt<major>, too, which checks the library on a machine without TensorRT
  --force          build what is already there
  --help           this text

nvcc is \$NVCC, or the PATH's, or \$CUDA_HOME's. CUDA 11.8 to 13 and TensorRT 8.6, 10 and 11 are supported.
END
}

fail() {
    echo "plugins/build.sh: error: $1" >&2
    exit "${2:-1}"
}

parse_options() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --tensorrt | --output | --arch | --kernels)
                [ $# -ge 2 ] || fail "$1 needs a value; see --help" 2
                ;;&
            --tensorrt) tensorrt="$2" && shift ;;
            --output) output="$2" && shift ;;
            --arch) architectures="${2//,/ }" && shift ;;
            --kernels) kernels=("$2") && shift ;;
            --host-check) host_check=1 ;;
            --force) force=1 ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) fail "unknown option '$1'; --help lists the options" 2 ;;
        esac
        shift
    done
}

find_nvcc() {
    local candidate
    for candidate in "${NVCC:-}" nvcc ${CUDA_HOME:+"$CUDA_HOME/bin/nvcc"} /usr/local/cuda/bin/nvcc; do
        if [ -n "$candidate" ] && nvcc="$(command -v -- "$candidate")"; then
            nvcc_version="$("$nvcc" --version | sed -n 's/.*release [^,]*, V\([0-9.]*\).*/\1/p')"
            [ -n "$nvcc_version" ] || fail "$nvcc --version names no version; is it a CUDA compiler?"
            return
        fi
    done
    fail "no nvcc; install the CUDA toolkit (11.8 to 13), or name its compiler with NVCC=/path/to/nvcc"
}

find_headers() {
    local roots=() root folder
    if [ -n "$tensorrt" ]; then
        roots=("$tensorrt")
    elif [ -n "${TENSORRT_ROOT:-}" ]; then
        roots=("$TENSORRT_ROOT")
    else
        roots=(/usr /usr/local/tensorrt /usr/local/TensorRT /opt/tensorrt /opt/TensorRT)
    fi
    for root in "${roots[@]}"; do
        for folder in "$root" "$root/include" "$root/include/$(uname -m)-linux-gnu"; do
            if [ -f "$folder/NvInferRuntime.h" ] && [ -f "$folder/NvInferVersion.h" ]; then
                headers="$(CDPATH='' cd -- "$folder" && pwd -P)"
                return
            fi
        done
    done
    fail "no TensorRT headers (NvInferRuntime.h, NvInferVersion.h) under: ${roots[*]}. Install libnvinfer-headers-dev, or unpack a TensorRT and name its folder with --tensorrt DIR or TENSORRT_ROOT"
}

# header_value NAME: what NvInferVersion.h defines NAME as; from TensorRT 10 on that may be the name of another macro.
header_value() {
    awk -v name="NV_TENSORRT_$1" '
        $1 == "#define" && !($2 in value) { value[$2] = $3 }
        END { found = value[name]; print (found in value) ? value[found] : found }' "$headers/NvInferVersion.h"
}

read_version() {
    major="$(header_value MAJOR)"
    version="$major.$(header_value MINOR).$(header_value PATCH).$(header_value BUILD)"
    case "$major" in
        8)
            [ "$(header_value MINOR)" -ge 6 ] || fail "$headers is TensorRT $version; of TensorRT 8 it takes 8.6"
            glue="$HERE/tensorrt_v2.cpp"
            ;;
        10 | 11) glue="$HERE/tensorrt_v3.cpp" ;;
        *) fail "$headers is TensorRT '$version'; 8.6, 10 and 11 are supported" ;;
    esac
}

find_sources() {
    local file
    if [ ${#kernels[@]} -eq 0 ]; then
        for file in "$HERE"/group_norm*.cu; do
            [ ! -f "$file" ] || kernels+=("$file")
        done
    fi
    [ ${#kernels[@]} -gt 0 ] || fail "there are no kernels: no $HERE/group_norm*.cu"
    for file in "${kernels[@]}"; do
        [ -f "$file" ] || fail "there is no $file"
    done
    digested=("$HERE/build.sh" "$HERE/tensorrt_common.h" "$HERE/tensorrt_common.cpp" "$glue" "${kernels[@]}")
    for file in "$HERE"/group_norm*.h "$HERE"/group_norm*.cuh; do
        [ ! -f "$file" ] || digested+=("$file")
    done
}

# Prints the compute capabilities of this machine's GPUs, such as "80 90"; nothing where there is none to ask.
gpu_architectures() {
    command -v nvidia-smi >/dev/null || return 0
    { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
        sed -n 's/^ *\([0-9]*\)\.\([0-9]\) *$/\1\2/p' | sort -nu | tr '\n' ' '
}

# Sets `gencode`: machine code for each capability that this nvcc knows, and PTX, which newer GPUs compile when they
# load it, of the highest.
choose_architectures() {
    local known arch newest=0 usable=()
    known=" $("$nvcc" --list-gpu-arch | sed -n 's/^compute_\([0-9]*\)$/\1/p' | sort -n | tr '\n' ' ') "
    [ -n "$architectures" ] || architectures="$(gpu_architectures)"
    [ -n "${architectures// /}" ] || architectures="$DEFAULT_ARCHITECTURES"
    for arch in $architectures; do
        [[ "$arch" =~ ^[0-9]+$ ]] || fail "'$arch' is no compute capability; write 8.0 as 80" 2
        [ "$arch" -ge "$OLDEST_ARCHITECTURE" ] ||
            fail "compute capability $arch is too old; the kernels need $OLDEST_ARCHITECTURE (Ampere) or later"
        if [[ "$known" == *" $arch "* ]]; then
            usable+=("$arch")
            [ "$arch" -le "$newest" ] || newest="$arch"
        else
            echo "nvcc $nvcc_version does not know compute capability $arch; such a GPU will run the PTX"
        fi
    done
    if [ ${#usable[@]} -eq 0 ]; then
        for arch in $known; do  # in rising order: the newest that is not newer than the GPU
            [ "$arch" -lt "$OLDEST_ARCHITECTURE" ] || [ "$arch" -gt "${architectures%% *}" ] || newest="$arch"
        done
        [ "$newest" -gt 0 ] || fail "nvcc $nvcc_version has no target that compute capability $architectures can run"
    fi
    gencode=()
    for arch in ${usable[@]+"${usable[@]}"}; do
        gencode+=(-gencode "arch=compute_$arch,code=sm_$arch")
    done
    gencode+=(-gencode "arch=compute_$newest,code=compute_$newest")
    machine_code="${usable[*]+"${usable[*]}"}"
    ptx="$newest"
    targets="compute capabilities ${machine_code:-none} and PTX $ptx"
}

# manifest ACTION: "digest" prints the sources' hash, "matches" is true where the library is what would be built,
# "write" writes its manifest.
manifest() {
    "$PYTHON" -B - "$ROOT" "$1" "$library" "$version" "$machine_code" "$ptx" "$nvcc_version" "${digested[@]}" <<'END'
import json
import sys
from pathlib import Path

root, action, library, version, machine_code, ptx, nvcc = sys.argv[1:8]
sys.path.insert(0, root)
from cldm.files import sha256, source_digest, write_json

library = Path(library)
path = library.with_name(library.name + ".json")
source = source_digest([Path(name) for name in sys.argv[8:]])
fields = {
    "format": 1,
    "kind": "plugin",
    "plugin": "GroupNormSiLU",
    "plugin_version": "1",
    "source": source,
    "tensorrt": version,
    "tensorrt_major": int(version.split(".")[0]),
    "architectures": machine_code.split(),
    "ptx": ptx,
    "nvcc": nvcc,
}
if action == "digest":
    print(source)
elif action == "write":
    entry = {"bytes": library.stat().st_size, "sha256": sha256(library)}
    write_json(path, {**fields, "files": {library.name: entry}})
else:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(found[key] == fields[key] for key in fields)
        sys.exit(not (same and found["files"][library.name]["sha256"] == sha256(library)))
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(1)
END
}

# Sets `common`: what the library and the host check are compiled with alike.
choose_flags() {
    common=(-std=c++17 -O3 -I "$HERE" -Xcompiler -Wall,-Wextra)
    # A folder that the compiler searches anyway must not be named again: that changes the order of the C library's.
    case "$headers" in
        /usr/include | /usr/include/*-linux-gnu) ;;
        *) common+=(-isystem "$headers") ;;
    esac
}

build_library() {
    local temporary="$output/.${library##*/}.$$.tmp" begin=$SECONDS command
    # No TensorRT library is linked: the plugin looks up in the process what it needs of them, and -z defs shows that
    # nothing else is left open.
    command=("$nvcc" "${common[@]}" -shared --threads 0 "${gencode[@]}" -Xcompiler -fPIC,-fvisibility=hidden
        -Xlinker -z,defs "-DCANNY2IMAGE_SOURCE_DIGEST=$(manifest digest)" -o "$temporary"
        "${kernels[@]}" "$HERE/tensorrt_common.cpp" "$glue" -ldl)
    trap 'rm -f "$temporary"' EXIT
    echo "building $library for TensorRT $version ($headers), $targets, with nvcc $nvcc_version"
    printf '%q ' "${command[@]}" && echo
    "${command[@]}" || fail "nvcc could not build the plugin; its own message is above"
    rm -f "$library.json"  # so that a kill from here on leaves a library that counts as not made
    mv -f "$temporary" "$library"
    manifest write
    trap - EXIT
    echo "built $library in $((SECONDS - begin)) s"
}

build_host_check() {
    local program="$output/host_check_trt$major" temporary="$output/.host_check_trt$major.$$.tmp"
    trap 'rm -f "$temporary"' EXIT
    "$nvcc" "${common[@]}" -Xlinker --export-dynamic -o "$temporary" "$HERE/host_check.cpp" -ldl ||
        fail "nvcc could not build the host check; its own message is above"
    mv -f "$temporary" "$program"
    trap - EXIT
    echo "built $program; run: $program $library   (--no-gpu: without enqueue)"
}

parse_options "$@"
command -v "$PYTHON" >/dev/null || fail "no '$PYTHON'; name a Python 3.8 or later with PYTHON=/path/to/python3"
find_nvcc
find_headers
read_version
find_sources
choose_architectures
choose_flags
mkdir -p "$output" || fail "cannot write to $output"
output="$(CDPATH='' cd -- "$output" && pwd -P)"
library="$output/libgroup_norm_trt$major.so"
if [ "$force" -eq 0 ] && manifest matches; then
    echo "$library matches: TensorRT $version, $targets, nvcc $nvcc_version"
else
    build_library
fi
[ "$host_check" -eq 0 ] || build_host_check
