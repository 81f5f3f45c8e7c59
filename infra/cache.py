"""The cache of a node: what can be fetched or made again, in ~/.cache/sparseramp.

    folder = made_once(source, "converted-9f2c", make)  # make(folder), unless it is there
    let_go()                                            # of every copy that this process was given

Copies of checkpoints, made for workers to map, take more room than all else. They are kept up to a
tenth of the disk or SPARSERAMP_CACHE_GB; beyond that, those go that were not used for longest. A
process holds what it was given by a shared lock on the folder, and what is held stays.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from infra.errors import UserError, first_line

_held: dict[Path, int] = {}  # open folders, each with a shared lock


def cache_dir() -> Path:
    """Where downloads and copies are kept: $SPARSERAMP_CACHE, else ~/.cache/sparseramp."""
    return Path(os.environ.get("SPARSERAMP_CACHE") or "~/.cache/sparseramp").expanduser()


def made_once(source: str | Path, key: str, make: Callable[[Path], None]) -> Path:
    """The copy of a source under a key, which `make(folder)` makes where it is not there.

    It appears when it is complete, and stays until this process lets go of it or ends. The folder
    that `make` is given does not exist. Raises UserError where it cannot be written.
    """
    copies = cache_dir() / "copies"
    copy = copies / key
    try:
        copies.mkdir(parents=True, exist_ok=True)
        bound = _bound(copies)
        if not _hold(copy):
            with _lock(copy):
                if not _hold(copy):
                    _make(copy, make)
                    _hold(copy)
            _make_room(copies, bound)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot keep {source} in {cache_dir()}: {reason}: make room, or set SPARSERAMP_CACHE "
            "to another folder"
        ) from error
    return copy


def let_go() -> None:
    """From here on, what this process was given may be removed; what it has mapped stays mapped."""
    while _held:
        os.close(_held.popitem()[1])


def remove_older(folder: Path, days: float) -> None:
    """Remove what was last written so long ago: the processes that wanted it were killed."""
    for path in folder.glob("*"):
        with suppress(OSError):  # its owner may remove it meanwhile
            if path.stat().st_mtime < time.time() - days * 24 * 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hold(copy: Path) -> bool:
    """Whether it is there; then it stays."""
    try:
        opened = os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        return False
    fcntl.flock(opened, fcntl.LOCK_SH)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(opened), copy.stat()):
            with suppress(PermissionError):  # another user made it
                os.utime(copy)
            if copy in _held:
                os.close(_held[copy])
            _held[copy] = opened
            return True
    os.close(opened)  # it was removed while this process waited for the lock
    return False


def _lock(copy: Path, *, blocking: bool = True) -> FileLock:
    """Whoever makes or removes the copy has it."""
    return FileLock(copy.with_suffix(".lock"), blocking=blocking)


def _make(copy: Path, make: Callable[[Path], None]) -> None:
    making = copy.with_suffix(".making")
    try:
        shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
        try:
            make(making)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(making, ignore_errors=True)
            if not (_is_full(error) and _make_room(copy.parent, 0)):
                raise
            make(making)
        making.rename(copy)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    stated = any(f"(os error {number})" in str(error) for number in full)
    return stated or (isinstance(error, OSError) and error.errno in full)


def _make_room(copies: Path, bound: float) -> bool:
    """Remove copies, the longest unused first, until `bound` bytes are left; whether any went."""
    found: list[tuple[float, Path, int]] = []
    for folder in copies.iterdir():
        with suppress(OSError):  # made or removed meanwhile
            if folder.is_dir():
                size = sum(file.stat().st_size for file in folder.rglob("*"))
                found.append((folder.stat().st_mtime, folder, size))
    total, gone = sum(size for _, _, size in found), False
    for _, folder, size in sorted(found):
        if total > bound and _remove(folder):
            total, gone = total - size, True
    return gone


def _remove(folder: Path) -> bool:
    """A copy that no process holds, or what is left of one that was being made; whether it went."""
    making = folder.with_suffix(".making")
    with suppress(OSError), _lock(folder, blocking=False):  # held, or another user's
        if folder != making:
            opened = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(making, ignore_errors=True)
                folder.rename(making)  # half a copy is none
            finally:
                os.close(opened)
        shutil.rmtree(making)
        return True
    return False


def _bound(copies: Path) -> float:
    """In bytes."""
    stated = os.environ.get("SPARSERAMP_CACHE_GB", "")
    with suppress(ValueError):
        bound = float(stated) * 1e9 if stated else shutil.disk_usage(copies).total / 10
        if bound >= 0:
            return bound
    raise UserError(f"SPARSERAMP_CACHE_GB={stated}: give a number of gigabytes, 0 or more")
