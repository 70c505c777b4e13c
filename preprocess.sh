#!/usr/bin/env bash
# Makes everything that compute_score.py and canny2image_TRT.py run: the Python environment where it is missing, the
# ONNX graphs, and on a machine with TensorRT and a GPU the plugin and the engines. Safe to run again at any time:
# what is already there and matches is skipped. `bash preprocess.sh --help` lists the options.
set -euo pipefail

START_DIR="$PWD"
ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv"
LOCK="$ROOT/build/.preprocess.lock"
# There from before the first change to .venv until the last: what a kill leaves behind is never taken for whole.
INCOMPLETE="$VENV/.incomplete"

# Import names, to tell whether an interpreter has what the entry scripts need. TensorRT is not among them: it is of
# use with an NVIDIA GPU only, and which one fits is for the user to say.
PACKAGES=(torch onnx onnx_graphsurgeon polygraphy numpy cv2 yaml transformers tqdm onnxruntime)
DEV_PACKAGES=(pytest pytest_timeout xdist ruff diffusers accelerate skimage psutil mypy)
# The versions of Python that have wheels of every package that requirements.txt pins.
OLDEST_MINOR=11
NEWEST_MINOR=14

HEIGHT=256
WIDTH=384
SAMPLES=1

base_python="${PYTHON:-}"
dev=0
env_only=0
no_engines=0
which_only=0
network_args=()
force_args=()
python=""

usage() {
    cat <<END
Usage: bash preprocess.sh [options]

Stages: 1 Python environment, 2 ONNX export, 3 plugin and TensorRT engines (skipped without TensorRT or a GPU).

  --model NAME      auto (the default), tiny or sd15, passed on to the export and the engine build
  --precision NAME  fp32, fp16 or auto, passed on to the export and the engine build
  --force           export and build again what is already there
  --python PATH     interpreter to use, or to make .venv with; by default \$PYTHON, else python3
  --env-only        stage 1 only
  --no-engines      stages 1 and 2 only
  --dev             the environment has to have what the tests and the lint need, too
  --which           print the path of the interpreter that has the packages, and do nothing else
  --help            this text
END
}

fail() {
    echo "preprocess.sh: error: $1" >&2
    exit "${2:-1}"
}

need_value() {
    [ "$2" -ge 2 ] || fail "$1 needs a value; see --help" 2
}

parse_options() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --model | --precision)
                need_value "$1" $#
                network_args+=("$1" "$2")
                shift
                ;;
            --python)
                need_value "$1" $#
                base_python="$2"
                shift
                ;;
            --force) force_args=(--force) ;;
            --env-only) env_only=1 ;;
            --no-engines) no_engines=1 ;;
            --dev) dev=1 ;;
            --which) which_only=1 ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) fail "unknown option '$1'; bash preprocess.sh --help lists the options" 2 ;;
        esac
        shift
    done
}

# The full path of a program named by path (relative to where the user is) or by name; not resolved further, because
# a virtual environment's python is a link that has to keep its own path.
program_path() {
    case "$1" in
        /*) [ -x "$1" ] && [ ! -d "$1" ] && echo "$1" ;;
        */*) [ -x "$START_DIR/$1" ] && [ ! -d "$START_DIR/$1" ] && echo "$START_DIR/$1" ;;
        *) command -v -- "$1" ;;
    esac
}

find_base_python() {
    local name="${base_python:-python3}"
    if ! base_python="$(program_path "$name")"; then
        fail "no Python interpreter at '$name'; install Python 3.$OLDEST_MINOR to 3.$NEWEST_MINOR, or name one with --python PATH"
    fi
}

# missing_packages PYTHON: prints the packages, if any, that PYTHON lacks; fails where PYTHON itself does not run.
missing_packages() {
    local wanted=("${PACKAGES[@]}")
    [ "$dev" -eq 0 ] || wanted+=("${DEV_PACKAGES[@]}")
    "$1" -B - "$ROOT" "${wanted[@]}" <<'END'
import sys

sys.path.insert(0, sys.argv[1])
from environment import missing_packages

print(", ".join(missing_packages(sys.argv[2:])))
END
}

# A kill must not look like a finished install, so the stamp carries the hash of what was asked for and comes last.
stamp_of() {
    "$base_python" -B - "$VENV/.requirements-" "$@" <<'END'
import hashlib
import sys

print(sys.argv[1] + hashlib.sha256(b"".join(open(path, "rb").read() for path in sys.argv[2:])).hexdigest()[:16])
END
}

find_stamps() {
    stamp="$(stamp_of "$ROOT/requirements.txt")"
    dev_stamp="$(stamp_of "$ROOT/requirements.txt" "$ROOT/requirements-dev.txt")"
}

venv_runs() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c "" 2>/dev/null
}

# True where .venv is whole for what is asked; --dev's packages include all the others.
venv_is_ready() {
    [ ! -e "$INCOMPLETE" ] || return 1
    [ -e "$dev_stamp" ] || { [ "$dev" -eq 0 ] && [ -e "$stamp" ]; } || return 1
    venv_runs
}

# One run at a time writes; a second waits, then finds the work done. Without flock (macOS) there is no such guard.
take_lock() {
    if ! mkdir -p "$ROOT/build" 2>/dev/null || ! { : >>"$LOCK"; } 2>/dev/null; then
        fail "cannot write to $ROOT/build; is the folder read-only, another user's, or the disk full? Clone the repository to a place that you can write to"
    fi
    command -v flock >/dev/null || return 0
    exec 9>>"$LOCK"
    if ! flock -n 9; then
        echo "another preprocess.sh is at work on $ROOT; waiting for it"
        flock 9
    fi
}

supported() {
    "$1" -c "import sys; sys.exit(not (3, $OLDEST_MINOR) <= sys.version_info[:2] <= (3, $NEWEST_MINOR))" 2>/dev/null
}

# The interpreter to make .venv with: the one at hand, or another on the PATH where that one's version has no wheels.
venv_maker() {
    local minor candidate
    if supported "$base_python"; then
        echo "$base_python"
        return
    fi
    for ((minor = OLDEST_MINOR; minor <= NEWEST_MINOR; minor++)); do
        if candidate="$(command -v "python3.$minor")" && supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

create_venv() {
    local maker
    if ! maker="$(venv_maker)"; then
        fail "$base_python is $("$base_python" --version 2>&1), and the pinned packages need Python 3.$OLDEST_MINOR to 3.$NEWEST_MINOR. Install one of these, or name it with --python PATH"
    fi
    if ! "$maker" -c "import ensurepip, venv" 2>/dev/null; then
        fail "$maker cannot make a virtual environment: its venv or ensurepip module is missing. On Debian and Ubuntu: apt install python3-venv"
    fi
    echo "making $VENV with $maker ($("$maker" --version 2>&1))"
    mkdir -p "$VENV"
    : >"$INCOMPLETE"
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name "${INCOMPLETE##*/}" -exec rm -rf {} +
    "$maker" -m venv "$VENV" || fail "$maker could not make $VENV; its own message is above"
}

# True where pip can add to what is there: an environment that no kill broke and whose own Python and pip work.
venv_takes_packages() {
    [ ! -e "$INCOMPLETE" ] && venv_runs && "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

# Fills .venv with the pinned requirements, then stamps it.
pip_install() {
    local requirements="$ROOT/requirements.txt" stamps=("$stamp") path
    if [ "$dev" -eq 1 ]; then
        requirements="$ROOT/requirements-dev.txt"
        stamps+=("$dev_stamp")
    fi
    : >"$INCOMPLETE"
    rm -f "$VENV"/.requirements-*
    echo "installing $(basename "$requirements"): on Linux about 3 GB to download and 6 GB on the disk, once"
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check -r "$requirements"; then
        fail "pip could not install $requirements; its own message is above. Without a network: install these packages into a Python by other means and run PYTHON=/path/to/that/python bash preprocess.sh"
    fi
    for path in "${stamps[@]}"; do
        : >"$path"
    done
    rm -f "$INCOMPLETE"
}

stage_environment() {
    local missing
    find_base_python
    if ! missing="$(missing_packages "$base_python")"; then
        fail "$base_python does not run, or is no Python 3.8 or later; its own message is above"
    fi
    if [ -z "$missing" ]; then
        python="$base_python"
        [ "$which_only" -eq 1 ] || echo "using $python: it has all packages"
        return
    fi
    find_stamps
    if venv_is_ready; then
        python="$VENV/bin/python"
        [ "$which_only" -eq 1 ] || echo "using $python: it matches the requirements"
        return
    fi
    [ "$which_only" -eq 0 ] || fail "$base_python lacks $missing, and $VENV is not whole; run bash preprocess.sh"
    echo "$base_python lacks $missing"
    take_lock
    if ! venv_is_ready; then
        [ ! -e "$INCOMPLETE" ] || echo "an earlier install was cut short: starting $VENV afresh"
        venv_takes_packages || create_venv
        pip_install
    fi
    python="$VENV/bin/python"
}

stage_export() {
    take_lock
    "$python" "$ROOT/export_onnx.py" "${build_args[@]}"
}

has_tensorrt() {
    "$1" -c "import importlib.util as u, sys; sys.exit(u.find_spec('tensorrt') is None)"
}

# Where TensorRT is missing: in which interpreter, whether the user's own has it, and what installs it.
tensorrt_advice() {
    local text="$python has no tensorrt package"
    if [ "$python" != "$base_python" ] && has_tensorrt "$base_python"; then
        text+=" ($base_python has one, but lacks other packages, so that it is not used)"
    fi
    echo "$text; with an NVIDIA GPU, install it: $("$python" -B - "$ROOT" "$python" <<'END'
import sys

sys.path.insert(0, sys.argv[1])
from cldm.machine import OTHER_TENSORRT, tensorrt_command

print(f"{tensorrt_command(sys.argv[2])} ({OTHER_TENSORRT})")
END
    )"
}

# Prints why no engine can be built here; nothing where one can.
engine_obstacle() {
    if ! has_tensorrt "$python"; then
        tensorrt_advice
    elif ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        echo "torch sees no NVIDIA GPU"
    fi
}

# The plugin is a part of it: build_engines.py has plugins/build.sh make the library where none is there that fits the
# sources, this TensorRT and this GPU.
stage_engines() {
    local obstacle status=0
    obstacle="$(engine_obstacle)"
    if [ -n "$obstacle" ]; then
        echo "skipped: $obstacle; the pipeline runs without TensorRT"
        return
    fi
    "$python" "$ROOT/build_engines.py" "${build_args[@]}" || status=$?
    if [ "$status" -ne 0 ]; then
        fail "no engines; its own message is above. bash preprocess.sh --no-engines makes all the rest, with which the pipeline runs, too" "$status"
    fi
}

# run_stage NUMBER TITLE FUNCTION: heading, work, time.
run_stage() {
    local begin=$SECONDS
    echo "== stage $1 of $last_stage: $2"
    "$3"
    echo "== stage $1 took $((SECONDS - begin)) s"
}

parse_options "$@"
cd -- "$ROOT"
if [ "$which_only" -eq 1 ]; then
    stage_environment
    echo "$python"
    exit 0
fi
last_stage=3
[ "$no_engines" -eq 0 ] || last_stage=2
[ "$env_only" -eq 0 ] || last_stage=1
run_stage 1 "Python environment" stage_environment
if [ "$env_only" -eq 0 ]; then
    build_args=(--model auto --height "$HEIGHT" --width "$WIDTH" --samples "$SAMPLES")
    # Later options win, so a --model of the user's takes the place of auto.
    build_args+=(${network_args[@]+"${network_args[@]}"} ${force_args[@]+"${force_args[@]}"})
    run_stage 2 "ONNX export" stage_export
    [ "$no_engines" -eq 1 ] || run_stage 3 "plugin and TensorRT engines" stage_engines
fi
echo "Python for later commands: $python"
