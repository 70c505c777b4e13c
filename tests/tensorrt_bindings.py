"""The real Python bindings of three TensorRT versions, importable where TensorRT itself is not.

The wheels of the bindings hold one extension module each, linked against TensorRT's libraries. Here those libraries are
stubs, compiled from the list of symbols that the extension asks for, so that `import tensorrt` succeeds in a subprocess
and shows every class, flag and signature of that version. The objects that the stubs make are hollow: a call with
arguments that the bindings take comes through and answers something true, or kills the process where the binding reads
more than that; a call that they refuse raises what it raises with TensorRT. Nothing is built and nothing runs.

Made once under build/tensorrt_bindings/ and shared by all tests; `missing_reason` says why there are none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from cldm.files import atomic_path, locked

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "tensorrt_bindings"
RECORDER = Path(__file__).resolve().parent / "tensorrt_recorder.py"
# By major version: the package that holds the bindings and nothing else, and its version.
PACKAGES = {
    8: ("tensorrt-bindings", "8.6.1"),
    10: ("tensorrt-cu12-bindings", "10.13.3.9"),
    11: ("tensorrt-cu13-bindings", "11.4.0.106"),
}
MAJORS = tuple(PACKAGES)
# No version has wheels for all of these; the interpreter that runs the tests comes first.
OTHER_PYTHONS = ("python3.11", "python3.10", "python3.12", "python3.13")
DOWNLOAD_SECONDS = 120

# One object stands for all that the libraries would make. It is laid out as a TensorRT class is: a table of virtual
# functions, then the pointer to the implementation, which is the same object again. The words before the table are what
# C++ reads there, offset and type, as the bindings ask every object for its type. A returned address is true as a bool.
STUB_START = """
#define ENTRIES 1024
struct hollow { void **table; struct hollow *implementation; };
static struct hollow object;
static void *answer(void) { return &object; }
static struct { void *table; const char *name; } type = {0, "Hollow"};
static void *words[2 + ENTRIES];
static struct hollow object __attribute__((aligned(64))) = {words + 2, &object};
__attribute__((constructor)) static void fill(void)
{
    words[1] = &type;
    for (int entry = 0; entry < ENTRIES; ++entry) { words[2 + entry] = (void *)answer; }
}
"""
# The package that users import. NVIDIA's own has no more in it, but needs the libraries as a package, too.
PACKAGE = """from tensorrt_bindings import *
from tensorrt_bindings import __version__
"""


class BindingsMissing(Exception):
    """The bindings cannot be had here; the message says why, as the reason of a skipped test."""


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings, unpacked beside its stub libraries.

    Parameters
    ----------
    major, version
        Such as 10 and "10.13.3.9".
    folder
        What PYTHONPATH has to name.
    python
        The interpreter that the wheel is for; not always the one that runs the tests.
    """

    major: int
    version: str
    folder: Path
    python: str

    def environment(self) -> Dict[str, str]:
        """The variables with which `import tensorrt` gives this version; nothing else is on the path."""
        return dict(
            os.environ,
            PYTHONPATH=str(self.folder),
            LD_LIBRARY_PATH=str(self.folder / "lib"),
            PYTHONDONTWRITEBYTECODE="1",
            PYTHONIOENCODING="utf-8",
        )

    def run(self, *arguments: str, text: Optional[str] = None, timeout: float = 60.0) -> subprocess.CompletedProcess:
        """Run the interpreter with `arguments`, such as "-c" and code, and `text` on standard input."""
        return subprocess.run(
            [self.python, *arguments],
            env=self.environment(),
            cwd=str(self.folder),
            input=text,
            capture_output=True,
            timeout=timeout,
            encoding="utf-8",
            check=False,
        )

    def evaluate(self, code: str, text: Optional[str] = None) -> Any:
        """What `code`, which may use `tensorrt`, prints as JSON.

        Raises
        ------
        RuntimeError
            It ended with an error or was killed; the message has its last lines.
        """
        done = self.run("-c", code, text=text)
        if done.returncode:
            raise RuntimeError(f"TensorRT {self.version}: status {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def describe(self) -> Dict[str, Any]:
        """The description that tests/tensorrt_recorder.py writes; recorded once for each state of that file."""
        digest = hashlib.sha256(RECORDER.read_bytes()).hexdigest()[:16]
        path = self.folder / f"description-{digest}.json"
        if not path.is_file():
            # From standard input: run as a file, its folder would come first on the path, and there lies a module
            # that has the name of the bindings' package.
            done = self.run("-", text=RECORDER.read_text(encoding="utf-8"))
            if done.returncode:
                raise RuntimeError(f"TensorRT {self.version} cannot be described: {done.stderr[-2000:]}")
            with atomic_path(path) as temporary:
                temporary.write_text(done.stdout, encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))


def missing_reason(major: int) -> Optional[str]:
    """Why there are no bindings of TensorRT `major`; None where there are."""
    try:
        load(major)
    except BindingsMissing as error:
        return str(error)
    return None


def load(major: int) -> Bindings:
    """The bindings of TensorRT `major`: 8, 10 or 11. The first call in a fresh clone downloads 1 MB and compiles.

    Raises
    ------
    BindingsMissing
        No network, no C compiler, or no interpreter that the wheel is for.
    """
    found = _load(major)
    if isinstance(found, str):
        raise BindingsMissing(found)
    return found


@functools.lru_cache(maxsize=None)
def _load(major: int) -> Any:
    """The bindings, or why there are none: kept as well, so that one run of the tests asks the network once."""
    package, version = PACKAGES[major]
    try:
        return _make(major, package, version)
    except BindingsMissing as error:
        return f"no bindings of TensorRT {version}: {error}"


def _make(major: int, package: str, version: str) -> Bindings:
    if sys.platform != "linux":
        raise BindingsMissing("only Linux has stub libraries")
    interpreters = _interpreters()
    for tag, python in interpreters:
        if (CACHE / f"{version}-{tag}").is_dir():
            return Bindings(major, version, CACHE / f"{version}-{tag}", python)
    for tool in ("cc", "nm", "readelf"):
        if shutil.which(tool) is None:
            raise BindingsMissing(f"there is no {tool}, which compiles the stub libraries")
    with locked(CACHE, waiting=lambda: None):
        _remove_leftovers()
        problems = []
        for tag, python in interpreters:
            folder = CACHE / f"{version}-{tag}"
            try:
                if not folder.is_dir():
                    _build(folder, package, version, python)
            except BindingsMissing as error:
                problems.append(f"{tag}: {error}")
                continue
            return Bindings(major, version, folder, python)
    raise BindingsMissing("; ".join(problems))


def _interpreters() -> List[Tuple[str, str]]:
    """Tag and path of each interpreter here that bindings may be for, the running one first."""
    found = {f"cp{sys.version_info[0]}{sys.version_info[1]}": sys.executable}
    for name in OTHER_PYTHONS:
        tag, path = "cp" + name[len("python") :].replace(".", ""), shutil.which(name)
        # A launcher may be there for a version that is not.
        if tag not in found and path and not subprocess.run([path, "-V"], capture_output=True, check=False).returncode:
            found[tag] = path
    return list(found.items())


def _remove_leftovers() -> None:
    """Delete what a killed run left behind; called with the lock held, so nobody is at work in them."""
    for path in CACHE.glob(".making-*"):
        shutil.rmtree(path, ignore_errors=True)


def _build(folder: Path, package: str, version: str, python: str) -> None:
    """Make `folder` whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=str(CACHE)) as name:
        making = Path(name) / folder.name
        wheel = _download(Path(name), package, version, python, folder.name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(making)
        (making / "tensorrt").mkdir()
        (making / "tensorrt" / "__init__.py").write_text(PACKAGE, encoding="utf-8")
        # Stands in front of an installed package of the real libraries, which the bindings load where they find it.
        (making / "tensorrt_libs").mkdir()
        (making / "tensorrt_libs" / "__init__.py").write_text("", encoding="utf-8")
        _compile_stubs(making / "tensorrt_bindings" / "tensorrt.so", making / "lib")
        os.replace(making, folder)


def _download(target: Path, package: str, version: str, python: str, label: str) -> Path:
    tag = label.rsplit("-cp", 1)[1]
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"),
        *("--no-input", "--retries", "0", "--timeout", "20", "--dest", str(target)),
        *("--python-version", f"{tag[0]}.{tag[1:]}", f"{package}=={version}"),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=DOWNLOAD_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise BindingsMissing(f"the download of {package} took more than {DOWNLOAD_SECONDS} s") from None
    wheels = list(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        raise BindingsMissing(f"pip got no wheel of {package}: {lines[-1] if lines else 'it said nothing'}")
    return wheels[0]


# ---- The stub libraries


def _compile_stubs(extension: Path, folder: Path) -> None:
    """Compile every library of TensorRT that `extension` needs, each with all symbols that nothing else has."""
    dynamic = _output(["readelf", "-d", str(extension)])
    libraries = re.findall(r"\(NEEDED\).*\[(libnv[^\]]*)\]", dynamic)
    if not libraries:
        raise RuntimeError(f"{extension} needs no library of TensorRT:\n{dynamic}")
    folder.mkdir()
    source = folder / "stub.c"
    functions = (f"void *{name}(void) {{ return answer(); }}\n" for name in _missing_symbols(extension))
    source.write_text(STUB_START + "".join(functions), encoding="utf-8")
    for name in libraries:
        # Symbols carry no version and are looked up in all libraries, so it does not matter which one has them.
        _output(["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)])


def _missing_symbols(extension: Path) -> List[str]:
    """The symbols that `extension` leaves to TensorRT: undefined, not weak, and known to no system library or Python.

    Those of the system's libraries carry a version ("memcpy@GLIBC_2.14"), apart from a few that this process has.
    """
    process = ctypes.CDLL(None)
    names = []
    for line in _output(["nm", "-D", "--undefined-only", str(extension)]).splitlines():
        kind, name = line.split()
        if kind == "U" and "@" not in name and not name.startswith(("Py", "_Py")) and not hasattr(process, name):
            names.append(name)
    return sorted(names)


def _output(command: List[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
