"""preprocess.sh, the Makefile and .ci/run, on a copy of the repository's thin parts with a stand-in for Python and pip.

The stand-in is a shell script that runs the real interpreter without its site-packages, so that the only packages it
has are empty stubs; `-m venv` and `-m pip` of it write stubs instead of installing anything, and are written down.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import pytest

import build_engines

ROOT = Path(__file__).resolve().parent.parent
BASE_PACKAGES = ["torch", "onnx", "onnx_graphsurgeon", "numpy", "cv2", "yaml", "transformers", "polygraphy", "tqdm"]
BASE_PACKAGES += ["onnxruntime"]
DEV_PACKAGES = ["pytest", "pytest_timeout", "xdist", "ruff", "diffusers", "accelerate", "skimage", "psutil", "mypy"]
TOOLS = [
    "bash",
    "basename",
    "cat",
    "cp",
    "dirname",
    "echo",
    "env",
    "find",
    "flock",
    "grep",
    "make",
    "mkdir",
    "mktemp",
    "rm",
]
TOOLS += ["sleep", "tail", "tee"]
EXPORT_ARGUMENTS = ["--model", "auto", "--height", "256", "--width", "384", "--samples", "1"]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

FAKE_PYTHON = r"""#!/usr/bin/env bash
home="$(dirname "$(dirname "$0")")"
if [ "${1:-} ${2:-}" = "-m venv" ]; then
    echo "venv" >>"$FAKE_LOG"
    mkdir -p "$3/bin" "$3/stubs"
    cp "$0" "$3/bin/python"
    exit 0
elif [ "${1:-} ${2:-}" = "-m pip" ]; then
    [ "$3" != --version ] || exit 0
    echo "pip ${*:3}" >>"$FAKE_LOG"
    [ "${FAKE_PIP:-}" != fail ] || exit 1
    : >"$home/stubs/torch.py"
    if [ "${FAKE_PIP:-}" = kill ]; then
        kill -9 "$PPID"
        exit 1
    fi
    for name in $FAKE_INSTALLS; do : >"$home/stubs/$name.py"; done
    exit 0
elif [ -n "${FAKE_TOO_OLD:-}" ] && [ "${0##*/}" = python3 ] && [[ "${2:-}" == *version_info* ]]; then
    exit 1
fi
PYTHONPATH="$home/stubs" exec "$REAL_PYTHON" -S "$@"
"""

LOG_ARGUMENTS = """import json, os, sys
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(os.path.basename(sys.argv[0]) + " " + json.dumps(sys.argv[1:]) + "\\n")
    log.write("cwd " + os.getcwd() + "\\n")
sys.exit(int(os.environ.get("FAKE_EXPORT_STATUS", "0")))
"""


class Machine:
    """A clone in a folder with spaces in its name, a Python with no packages, and a PATH with a few tools."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "a clone with spaces"
        self.prefix = folder / "the machine"
        self.log = folder / "log.txt"
        self.python = self.prefix / "bin" / "python3"
        self.venv = self.clone / ".venv"
        self.environment: Dict[str, str] = {
            "PATH": str(self.prefix / "bin"),
            "REAL_PYTHON": sys.executable,
            "FAKE_LOG": str(self.log),
            "FAKE_INSTALLS": " ".join(BASE_PACKAGES + DEV_PACKAGES),
        }
        (self.clone / "cldm").mkdir(parents=True)
        self.python.parent.mkdir(parents=True)
        for name in ("preprocess.sh", "environment.py", "Makefile", "cldm/__init__.py", "cldm/machine.py"):
            shutil.copy(str(ROOT / name), str(self.clone / name))
        (self.clone / "requirements.txt").write_text("torch==0\n")
        (self.clone / "requirements-dev.txt").write_text("-r requirements.txt\npytest==0\n")
        for name in ("export_onnx.py", "build_engines.py", "compute_score.py"):
            (self.clone / name).write_text(LOG_ARGUMENTS)
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is not None:
                (self.python.parent / tool).symlink_to(found)
        self.add_interpreter(self.python)

    def add_interpreter(self, path: Path) -> None:
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)

    def add_packages(self, *names: str) -> None:
        (self.prefix / "stubs").mkdir(exist_ok=True)
        for name in names:
            (self.prefix / "stubs" / (name + ".py")).touch()

    def run(
        self, *options: str, cwd: Optional[Path] = None, script: str = "preprocess.sh", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        cwd = cwd or self.clone
        return subprocess.run(
            ["bash", os.path.relpath(str(self.clone / script), str(cwd)), *options],
            env={**self.environment, **variables},
            cwd=str(cwd),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, program: str) -> List[str]:
        """The arguments of every call of the program so far, one line each."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line[len(program) :].strip() for line in lines if line.split()[0] == program]

    def stamps(self) -> List[Path]:
        return sorted(self.venv.glob(".requirements-*"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def equipped(machine: Machine) -> Machine:
    """A machine whose own Python has the packages already."""
    machine.add_packages(*BASE_PACKAGES)
    return machine


def test_an_environment_with_the_packages_is_used_as_it_is(equipped: Machine) -> None:
    result = equipped.run()
    assert result.returncode == 0, result.stderr
    assert not equipped.calls("pip") and not equipped.calls("venv") and not equipped.venv.exists()
    assert [json.loads(call) for call in equipped.calls("export_onnx.py")] == [EXPORT_ARGUMENTS]
    assert result.stdout.splitlines()[-1] == f"Python for later commands: {equipped.python}"
    for number in (1, 2, 3):
        assert f"== stage {number} of 3: " in result.stdout and f"== stage {number} took " in result.stdout


@pytest.mark.parametrize("lacking", [["cv2"], ["onnxruntime"], ["onnx_graphsurgeon"], BASE_PACKAGES])
def test_one_lacking_package_is_enough_to_make_an_environment(machine: Machine, lacking: List[str]) -> None:
    machine.add_packages(*(name for name in BASE_PACKAGES if name not in lacking))
    result = machine.run("--env-only")
    assert result.returncode == 0, result.stderr
    assert len(machine.calls("venv")) == len(machine.calls("pip")) == 1
    assert machine.calls("pip")[0].endswith(f"-r {machine.clone}/requirements.txt")
    assert result.stdout.splitlines()[-1] == f"Python for later commands: {machine.venv}/bin/python"
    assert not machine.calls("export_onnx.py")


def test_an_environment_that_is_used_has_what_the_engine_build_needs(machine: Machine) -> None:
    needed = build_engines.needed_packages(build_engines.parse_arguments([]))
    assert set(needed) <= set(BASE_PACKAGES) and "onnx_graphsurgeon" in needed
    for name in needed:
        assert f" {name} " in _packages_line() or f" {name})" in _packages_line()


def _packages_line() -> str:
    lines = (ROOT / "preprocess.sh").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("PACKAGES=(")).replace("(", " ")


def test_tensorrt_does_not_stand_in_for_onnxruntime_which_engines_are_compared_with(machine: Machine) -> None:
    machine.add_packages(*BASE_PACKAGES[:-1], "tensorrt")
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert len(machine.calls("pip")) == 1 and not machine.calls("build_engines.py")
    # TensorRT is in the Python that the environment was made beside, and not in it.
    assert f"skipped: {machine.venv}/bin/python has no tensorrt package ({machine.python} has one" in result.stdout
    command = f"'{machine.venv}/bin/python' -m pip install tensorrt-cu13 (or tensorrt-cu12 with"
    assert f"install it: {command}" in result.stdout


def test_a_stamped_environment_is_not_installed_again(machine: Machine) -> None:
    assert machine.run("--env-only").returncode == 0
    assert len(machine.stamps()) == 1
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert len(machine.calls("pip")) == len(machine.calls("venv")) == 1
    assert len(machine.calls("export_onnx.py")) == 1
    assert f"{machine.venv}/bin/python has no tensorrt package; with" in result.stdout


def test_changed_requirements_are_installed_into_the_environment_that_is_there(machine: Machine) -> None:
    assert machine.run("--env-only").returncode == 0
    first = machine.stamps()
    (machine.clone / "requirements.txt").write_text("torch==1\n")
    assert machine.run("--env-only").returncode == 0
    assert len(machine.calls("pip")) == 2 and len(machine.calls("venv")) == 1
    assert len(machine.stamps()) == 1 and machine.stamps() != first


def test_the_packages_of_the_tests_are_added_on_request_and_include_the_others(machine: Machine) -> None:
    assert machine.run("--env-only").returncode == 0
    assert machine.run("--env-only", "--dev").returncode == 0
    assert machine.calls("pip")[1].endswith("requirements-dev.txt")
    assert machine.run("--env-only", "--dev").returncode == 0
    assert machine.run("--env-only").returncode == 0
    assert len(machine.calls("pip")) == 2 and len(machine.calls("venv")) == 1


def test_a_kill_in_the_middle_of_the_install_is_noticed(machine: Machine) -> None:
    killed = machine.run("--env-only", FAKE_PIP="kill")
    assert killed.returncode == -9
    # What pip had written by then must not pass for a whole environment.
    assert (machine.venv / "stubs" / "torch.py").exists() and not machine.stamps()
    assert machine.run("--which").returncode != 0
    (machine.venv / "left-behind").touch()
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert "cut short" in result.stdout
    assert len(machine.calls("venv")) == 2 and len(machine.stamps()) == 1
    assert not (machine.venv / "left-behind").exists() and not (machine.venv / ".incomplete").exists()
    assert machine.run("--env-only").returncode == 0
    assert len(machine.calls("pip")) == 2


def test_a_kill_during_an_update_is_noticed(machine: Machine) -> None:
    assert machine.run("--env-only").returncode == 0
    assert machine.run("--env-only", "--dev", FAKE_PIP="kill").returncode == -9
    assert not machine.stamps()
    assert machine.run("--env-only").returncode == 0
    assert len(machine.calls("venv")) == 2


def test_an_environment_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    assert machine.run("--env-only").returncode == 0
    (machine.venv / "bin" / "python").unlink()
    assert machine.run("--env-only").returncode == 0
    assert len(machine.calls("venv")) == 2


def test_a_failing_install_says_what_to_do_and_leaves_no_stamp(machine: Machine) -> None:
    result = machine.run(FAKE_PIP="fail")
    assert result.returncode == 1
    assert "pip could not install" in result.stderr and "Without a network" in result.stderr
    assert not machine.stamps() and not machine.calls("export_onnx.py")
    assert machine.run().returncode == 0


def test_a_python_without_venv_is_named_with_the_package_to_install(machine: Machine) -> None:
    machine.add_packages("ensurepip")
    (machine.prefix / "stubs" / "ensurepip.py").write_text("raise ImportError\n")
    result = machine.run()
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert not machine.calls("venv")


def test_an_unsupported_python_is_refused_or_replaced(machine: Machine) -> None:
    result = machine.run(FAKE_TOO_OLD="1")
    assert result.returncode == 1
    assert "need Python 3.11 to 3.14" in result.stderr and not machine.calls("venv")
    machine.add_interpreter(machine.python.parent / "python3.12")
    result = machine.run("--env-only", FAKE_TOO_OLD="1")
    assert result.returncode == 0, result.stderr
    assert f"making {machine.venv} with {machine.python}.12" in result.stdout


def test_an_unsupported_python_that_has_the_packages_is_used(equipped: Machine) -> None:
    result = equipped.run(FAKE_TOO_OLD="1")
    assert result.returncode == 0, result.stderr


def test_no_python_at_all(machine: Machine) -> None:
    machine.python.unlink()
    result = machine.run()
    assert result.returncode == 1
    assert "no Python interpreter at 'python3'" in result.stderr


def test_a_python_that_does_not_run(machine: Machine) -> None:
    machine.python.write_text("#!/usr/bin/env bash\nexit 3\n")
    result = machine.run()
    assert result.returncode == 1
    assert "does not run" in result.stderr


def test_a_folder_that_cannot_be_written(equipped: Machine) -> None:
    # A plain file where the folder should be stops root, too, which permissions would not.
    (equipped.clone / "build").touch()
    result = equipped.run()
    assert result.returncode == 1
    assert "cannot write to" in result.stderr and "read-only" in result.stderr


@pytest.mark.parametrize("options", [["--fast"], ["extra"], ["--python"], ["--precision"]])
def test_bad_options_are_errors(machine: Machine, options: List[str]) -> None:
    result = machine.run(*options)
    assert result.returncode == 2
    assert options[0] in result.stderr and "--help" in result.stderr
    assert not machine.log.exists()


def test_help_names_every_option(machine: Machine) -> None:
    result = machine.run("--help")
    assert result.returncode == 0
    for option in ("--model", "--precision", "--force", "--python", "--env-only", "--no-engines", "--dev", "--which"):
        assert option in result.stdout


def test_options_reach_the_export(equipped: Machine) -> None:
    assert equipped.run("--precision", "fp16", "--model", "tiny", "--force").returncode == 0
    expected = [*EXPORT_ARGUMENTS, "--precision", "fp16", "--model", "tiny", "--force"]
    assert [json.loads(call) for call in equipped.calls("export_onnx.py")] == [expected]


def test_a_failing_export_ends_the_run(equipped: Machine) -> None:
    result = equipped.run(FAKE_EXPORT_STATUS="7")
    assert result.returncode == 7
    assert "stage 3" not in result.stdout and "Python for later commands" not in result.stdout


def test_runs_from_any_folder_and_takes_a_relative_python(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "some" / "where else"
    elsewhere.mkdir(parents=True)
    other = tmp_path / "some" / "other"
    shutil.copytree(str(machine.prefix), str(other), symlinks=True)
    (other / "stubs").mkdir()
    for name in BASE_PACKAGES:
        (other / "stubs" / (name + ".py")).touch()
    result = machine.run("--python", "../other/bin/python3", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert not machine.calls("pip") and len(machine.calls("export_onnx.py")) == 1
    # Not in the user's folder, where a file called torch.py would take the place of the package.
    assert machine.calls("cwd") == [str(machine.clone)]
    # The variable means the same as the option.
    assert machine.run(cwd=elsewhere, PYTHON=str(other / "bin" / "python3")).returncode == 0
    assert not machine.calls("pip") and list(elsewhere.iterdir()) == []


def test_without_tensorrt_the_last_stage_is_skipped_and_says_why(equipped: Machine) -> None:
    result = equipped.run()
    assert result.returncode == 0
    assert f"skipped: {equipped.python} has no tensorrt package; with an NVIDIA GPU, install it: " in result.stdout
    assert f"'{equipped.python}' -m pip install tensorrt-cu13 " in result.stdout
    assert "; the pipeline runs without TensorRT" in result.stdout and "has one" not in result.stdout
    equipped.add_packages("tensorrt")
    cuda = "class cuda:\n    @staticmethod\n    def is_available():\n        return {}\n"
    (equipped.prefix / "stubs" / "torch.py").write_text(cuda.format(False))
    result = equipped.run()
    assert result.returncode == 0
    assert "skipped: torch sees no NVIDIA GPU" in result.stdout
    assert not equipped.calls("build_engines.py")


@pytest.fixture
def with_tensorrt(equipped: Machine) -> Machine:
    """A machine with TensorRT and a GPU."""
    equipped.add_packages("tensorrt")
    (equipped.prefix / "stubs" / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    return equipped


def test_with_tensorrt_and_a_gpu_the_engines_are_built(with_tensorrt: Machine) -> None:
    result = with_tensorrt.run("--precision", "fp16", "--force")
    assert result.returncode == 0, result.stderr
    expected = [*EXPORT_ARGUMENTS, "--precision", "fp16", "--force"]
    assert [json.loads(call) for call in with_tensorrt.calls("build_engines.py")] == [expected]
    # Every option of the stage is one that the real command takes.
    assert build_engines.parse_arguments(expected).precision == "fp16"


def test_engines_can_be_left_out(with_tensorrt: Machine) -> None:
    result = with_tensorrt.run("--no-engines")
    assert result.returncode == 0, result.stderr
    assert "stage 2 of 2" in result.stdout and "stage 3" not in result.stdout
    assert len(with_tensorrt.calls("export_onnx.py")) == 1 and not with_tensorrt.calls("build_engines.py")
    assert result.stdout.splitlines()[-1] == f"Python for later commands: {with_tensorrt.python}"


def test_failing_engines_end_the_run_and_say_how_to_do_without(with_tensorrt: Machine) -> None:
    script = with_tensorrt.clone / "build_engines.py"
    script.write_text(LOG_ARGUMENTS.replace("FAKE_EXPORT_STATUS", "FAKE_ENGINE_STATUS"))
    result = with_tensorrt.run(FAKE_ENGINE_STATUS="5")
    assert result.returncode == 5
    assert "no engines" in result.stderr and "--no-engines" in result.stderr
    assert "Python for later commands" not in result.stdout


def test_which_prints_the_interpreter_and_changes_nothing(machine: Machine) -> None:
    result = machine.run("--which")
    assert result.returncode == 1 and result.stdout == ""
    assert "run bash preprocess.sh" in result.stderr
    assert not (machine.clone / "build").exists() and not machine.venv.exists()
    assert machine.run("--env-only").returncode == 0
    assert machine.run("--which").stdout == f"{machine.venv}/bin/python\n"
    assert machine.run("--dev", "--which").returncode == 1


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_of_two_runs_at_once_the_second_waits_and_finds_the_work_done(machine: Machine, tmp_path: Path) -> None:
    assert machine.run("--env-only").returncode == 0
    machine.venv.rename(tmp_path / "made by the first run")
    with open(str(machine.clone / "build" / ".preprocess.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = subprocess.Popen(
            ["bash", str(machine.clone / "preprocess.sh"), "--env-only"],
            env=machine.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert second.stdout is not None
        line = ""
        while "waiting for it" not in line:
            line = second.stdout.readline()
            assert line, "preprocess.sh ended without waiting for the lock"
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=0.5)
        (tmp_path / "made by the first run").rename(machine.venv)
    assert "Python for later commands" in second.communicate(timeout=60)[0]
    assert second.returncode == 0 and len(machine.calls("pip")) == len(machine.calls("venv")) == 1


@needs_make
def test_make_score_from_a_fresh_clone(machine: Machine) -> None:
    subprocess.run(
        ["make", "-C", str(machine.clone), "score", "ARGS=--limit 2"],
        env=machine.environment,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    assert len(machine.calls("pip")) == 1
    assert [json.loads(call) for call in machine.calls("compute_score.py")] == [["--limit", "2"]]


CLOSING_LINE = "====== 12 passed, 1 skipped in 75.20s (0:01:15) ======"


@needs_make
@pytest.mark.parametrize(
    ("lint", "test", "succeeds"),
    [
        ("exit 0", f"echo '{CLOSING_LINE}'", True),
        ("exit 0", f"echo '{CLOSING_LINE}'; exit 1", False),
        ("exit 0", "exit 0", False),
        ("exit 1", f"echo '{CLOSING_LINE}'", False),
    ],
    ids=["all pass", "tests fail", "no closing line", "lint fails"],
)
def test_ci_fails_where_a_part_fails_and_closes_as_pytest_does(
    equipped: Machine, lint: str, test: str, succeeds: bool
) -> None:
    equipped.add_packages(*DEV_PACKAGES)
    (equipped.clone / ".ci").mkdir()
    shutil.copy(str(ROOT / ".ci" / "run"), str(equipped.clone / ".ci" / "run"))
    (equipped.clone / "Makefile").write_text(f"lint:\n\t@{lint}\ntest:\n\t@{test}\n")
    result = equipped.run(script=".ci/run")
    assert (result.returncode == 0) == succeeds, result.stderr
    if CLOSING_LINE in result.stdout:
        assert result.stdout.splitlines()[-1] == CLOSING_LINE


def test_every_requirement_is_pinned_exactly() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith(("#", "-r ")) or line.count("==") == 1, f"{name}: {line}"
