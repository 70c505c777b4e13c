"""Whole files or none: atomic writing and content hashes. No torch here."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Optional

CHUNK = 1 << 22
# What a file system says where the fault is its own and not the path's.
FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that is renamed to it if the block ends well, and removed if it does not.

    Raises
    ------
    OSError
        The folder cannot be written, or its disk is full; the message names the path.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=str(path.parent))
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        with naming_full_disk(path):
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets the owner alone read it
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@functools.lru_cache(maxsize=None)
def _umask() -> int:
    """The permissions that new files of this process must not have; read once, as reading sets it for a moment."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Give an error of a full or read-only disk in the block, which says nothing but that, a text that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_OR_READ_ONLY and error.__cause__ is None:  # with a cause it is named already
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot write {path}: {error.strerror}; choose another folder or free it")


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Make `folder` and hold it alone; of several processes one goes on, the others wait and call `waiting` once.

    A killed process lets go. Where the system has no `fcntl` (Windows) nothing is guarded.

    Raises
    ------
    OSError
        The folder cannot be written; the message names it.
    """
    try:
        import fcntl
    except ImportError:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "ab")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _cannot_write(Path(folder), error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_room(folder: Path, num_bytes: int) -> None:
    """Make `folder` and check, before work is done for it, that it can be written and has room.

    Raises
    ------
    OSError
        It cannot be written or its disk has less than `num_bytes` free.
    """
    folder = Path(folder)
    probe = folder / ".write-probe"
    with atomic_path(probe) as temporary:
        temporary.write_bytes(b"x")
    with contextlib.suppress(FileNotFoundError):  # another process that looks at the same time may have been faster
        probe.unlink()
    free = shutil.disk_usage(str(folder)).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e6:,.0f} MB free, {num_bytes / 1e6:,.0f} MB are needed; free some or"
            " choose another",
        )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def source_digest(files: Iterable[Path]) -> str:
    """Hash over the names and contents of source files, the same whether their lines end as on Linux or on Windows."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def cached_sha256(path: Path, cache: Optional[Path]) -> str:
    """`sha256`, remembered in the JSON file `cache` while size and modification time stay what they were."""
    path = Path(path).resolve()
    if cache is None:
        return sha256(path)
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    known = _read_cache(cache)
    entry = known.get(str(path))
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    digest = sha256(path)
    known[str(path)] = {"stamp": stamp, "sha256": digest}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_json(cache, known)
    return digest


def _read_cache(cache: Path) -> Dict[str, Any]:
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
