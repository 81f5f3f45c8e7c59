"""The cache of a node: what can be fetched or made again, in ~/.cache/sparseramp.

    folder = made_once(source, "converted-9f2c...", make)  # make(folder), once

Copies of checkpoints, made for workers to map, take more room than all else. They are kept up to a
tenth of the disk or SPARSERAMP_CACHE_GB; beyond that, those go that were not used for longest. A
process holds the copies it was given, by a shared lock, until it ends: what is held stays.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from infra.errors import UserError

FORGOTTEN_S = 24 * 3600  # a driver that lives takes up what is its own long before

_held: dict[Path, int] = {}  # the locks of this process, open until it ends


def cache_dir() -> Path:
    """Where downloads and copies are kept: $SPARSERAMP_CACHE, else ~/.cache/sparseramp."""
    return Path(os.environ.get("SPARSERAMP_CACHE") or "~/.cache/sparseramp").expanduser()


def made_once(source: str | Path, key: str, make: Callable[[Path], None]) -> Path:
    """The copy of that name, which `make(folder)` makes of a source unless an earlier process has.

    It appears when it is complete, and stays while this process lives. Raises UserError where it
    cannot be written.
    """
    copy = cache_dir() / "copies" / key
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        bound = _bound(copy.parent)
        if copy not in _held:
            _held[copy] = os.open(copy.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        lock = _held[copy]
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not copy.is_dir():
            fcntl.flock(lock, fcntl.LOCK_UN)  # two that share it would wait for each other
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_dir():
                _make(copy, make)
                _make_room(copy.parent, bound)
            fcntl.flock(lock, fcntl.LOCK_SH)  # not in one step: it may have had to make room
        os.utime(lock)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise UserError(f"cannot keep {source} in {cache_dir()}: {reason}") from error
    return copy


def remove_forgotten(folder: Path) -> None:
    """Remove what nothing has touched for FORGOTTEN_S: the processes that wanted it were killed."""
    for path in folder.glob("*"):
        with suppress(OSError):  # its owner may remove it meanwhile
            if path.stat().st_mtime < time.time() - FORGOTTEN_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _make(copy: Path, make: Callable[[Path], None]) -> None:
    making = copy.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)  # an earlier process was killed
    try:
        make(making)
        making.rename(copy)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _make_room(copies: Path, bound: float) -> None:
    """Remove copies that no process holds, the oldest use first, until `bound` bytes are left."""
    sizes = {lock: _bytes(lock) for lock in copies.glob("*.lock")}
    for lock in sorted(sizes, key=lambda lock: lock.stat().st_mtime):
        if sum(sizes.values()) <= bound:
            return
        if lock.with_suffix("") in _held:
            continue
        opened = os.open(lock, os.O_RDWR)
        with suppress(BlockingIOError):  # held by another process
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in _folders(lock):
                shutil.rmtree(folder, ignore_errors=True)
            sizes[lock] = 0
        os.close(opened)


def _bound(copies: Path) -> float:
    """In bytes."""
    stated = os.environ.get("SPARSERAMP_CACHE_GB", "")
    try:
        return float(stated) * 1e9 if stated else shutil.disk_usage(copies).total / 10
    except ValueError:
        raise UserError(f"SPARSERAMP_CACHE_GB={stated}: give a number of gigabytes") from None


def _folders(lock: Path) -> list[Path]:
    """A copy, and what a process left that was killed while it made it."""
    return [lock.with_suffix(""), lock.with_suffix(".making")]


def _bytes(lock: Path) -> int:
    total = 0
    for folder in _folders(lock):
        for file in folder.glob("*"):
            with suppress(FileNotFoundError):  # being made or removed
                total += file.stat().st_size
    return total
