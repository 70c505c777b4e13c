"""Whole files or none: exceptions, kills, full and read-only disks, locks, and the cache of hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, List

import pytest

from cldm import files
from cldm.files import (
    atomic_path,
    cached_sha256,
    locked,
    naming_full_disk,
    require_room,
    sha256,
    source_digest,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent


def names_in(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_comes_whole_and_readable(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.bin"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent, "a rename must not cross file systems"
        temporary.write_bytes(b"content")
        assert not target.exists()
    assert target.read_bytes() == b"content" and names_in(target.parent) == ["a.bin"]


UNDER_A_MASK = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cldm.files import atomic_path
os.umask(int(sys.argv[3], 8))
with atomic_path(Path(sys.argv[2])) as temporary:
    temporary.write_bytes(b"x")
assert os.umask(0) == int(sys.argv[3], 8), "the mask was not put back"
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize(("mask", "mode"), [("022", 0o644), ("002", 0o664), ("077", 0o600)])
def test_permissions_are_those_of_any_new_file(mask: str, mode: int, tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    subprocess.run([sys.executable, "-c", UNDER_A_MASK, str(ROOT), str(target), mask], check=True, timeout=60)
    assert target.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EIO, "x"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_leaves_nothing_behind(error: BaseException, old: Any, tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(type(error)) as caught, atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert names_in(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or target.read_bytes() == old


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cldm.files import atomic_path
with atomic_path(Path(sys.argv[2])) as temporary, open(temporary, "wb") as file:
    file.write(b"half of it")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_kill_leaves_no_half_file(old: Any, tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)
    command = [sys.executable, "-c", KILLED, str(ROOT), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    assert target.exists() == (old is not None)
    assert old is None or target.read_bytes() == old
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"second run")
    assert target.read_bytes() == b"second run"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Below a regular file: an obstacle for root as well, whom permissions do not stop."""
    (tmp_path / "file").write_bytes(b"")
    target = tmp_path / "file" / "folder" / "a.bin"
    for attempt in (
        lambda: write_json(target, {}),
        lambda: require_room(target.parent, 1),
        lambda: locked(target.parent, lambda: None).__enter__(),
    ):
        with pytest.raises(OSError, match=r"cannot write .*file/folder.*; choose another folder") as caught:
            attempt()
        assert caught.value.errno == errno.ENOTDIR


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to: /proc")
def test_file_system_that_nobody_can_write_to() -> None:
    with pytest.raises(OSError, match=r"cannot write /proc/canny/a.bin: .*; choose another folder"):
        write_json(Path("/proc/canny/a.bin"), {})


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folder_that_cannot_be_written(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    for attempt in (lambda: write_json(tmp_path / "a.json", {}), lambda: require_room(tmp_path, 1)):
        with pytest.raises(OSError, match=f"cannot write {tmp_path}.*{os.strerror(code)}") as caught:
            attempt()
        assert caught.value.errno == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_is_full_when_written(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    said = f"cannot write {target}: .*; choose another folder or free it"
    with pytest.raises(OSError, match=said) as caught, atomic_path(target), open("/dev/full", "wb") as full:
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC and names_in(tmp_path) == []


def test_full_disk_is_named_once(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.json", tmp_path / "outer.bin"
    with pytest.raises(OSError) as caught, naming_full_disk(outer), naming_full_disk(inner):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value).count("cannot write") == 1 and str(inner) in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught, naming_full_disk(outer):
        (tmp_path / "absent").read_bytes()
    assert Path(caught.value.filename).name == "absent", "other errors pass as they are"


def test_disk_that_fills_up(tmp_path: Path) -> None:
    """The limit on the size of files stands in for a disk's end: writes fail after some have succeeded."""
    resource = pytest.importorskip("resource")
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {target}"):
            write_json(target, {"new": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == ["a.json"] and json.loads(target.read_text()) == {"old": 1}


def test_room_is_asked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "build"
    require_room(folder, 1)
    assert folder.is_dir() and names_in(folder) == []
    usage = shutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000_000))
    require_room(folder, 1_500_000_000)
    with pytest.raises(OSError, match=r"build has 1,500 MB free, 2,500 MB are needed; free some") as caught:
        require_room(folder, 2_500_000_000)
    assert caught.value.errno == errno.ENOSPC


HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cldm.files import locked
with locked(Path(sys.argv[2]), lambda: None):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_lock_is_held_by_one_and_let_go_by_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "build"
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(folder)]
    waited = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"

        def kill() -> None:
            waited.append(1)
            process.kill()

        with locked(folder, kill):  # goes on only because the holder is killed once this one waits
            assert waited == [1]
    with locked(folder, lambda: waited.append(2)):
        assert waited == [1]


def test_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError), locked(tmp_path, lambda: None):
        raise ValueError("x")
    with locked(tmp_path, lambda: pytest.fail("still locked")):
        pass


def test_hash_is_sha256(tmp_path: Path) -> None:
    for content in (b"", b"abc", bytes(range(256)) * 20_000):
        (tmp_path / "a").write_bytes(content)
        assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_source_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    contents = [(b"a\nb\n", b""), (b"a\nc\n", b""), (b"a\n", b"b\n"), (b"", b"a\nb\n")]
    digests = []
    for content in contents:
        one.write_bytes(content[0])
        two.write_bytes(content[1])
        digests.append(source_digest([one, two]))
    assert len(set(digests)) == len(contents)
    assert source_digest([two, one]) not in digests and source_digest([one]) not in digests
    one.write_bytes(b"a\r\nb\r\n")
    two.write_bytes(b"")
    assert source_digest([one, two]) == digests[0], "line ends of Windows"


def test_cached_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a", tmp_path / "deep" / "cache.json"
    read = []
    monkeypatch.setattr(files, "sha256", lambda file: read.append(file) or sha256(file))
    path.write_bytes(b"one")
    wanted = sha256(path)
    for _ in range(3):
        assert cached_sha256(path, cache) == wanted
    monkeypatch.chdir(tmp_path)
    assert cached_sha256(Path("a"), cache) == wanted and len(read) == 1, "by any name of the file"
    assert cached_sha256(path, None) == wanted and len(read) == 2
    os.utime(path, ns=(0, 5))
    assert cached_sha256(path, cache) == wanted and len(read) == 3, "another time"
    path.write_bytes(b"three")
    os.utime(path, ns=(0, 5))
    assert cached_sha256(path, cache) == sha256(path) != wanted and len(read) == 4, "another size"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"x": 1}'], ids=repr)
def test_damaged_cache_is_made_anew(content: bytes, tmp_path: Path) -> None:
    path, cache = tmp_path / "a", tmp_path / "cache.json"
    path.write_bytes(b"one")
    cache.write_bytes(content)
    assert cached_sha256(path, cache) == sha256(path)
    assert str(path.resolve()) in json.loads(cache.read_text())
    stat = path.stat()
    for entry in ("text", {"stamp": [stat.st_size, stat.st_mtime_ns]}, {"stamp": None, "sha256": "0"}):
        cache.write_text(json.dumps({str(path.resolve()): entry}))
        assert cached_sha256(path, cache) == sha256(path)


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert cached_sha256(path, path / "cache.json") == sha256(path)
