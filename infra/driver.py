"""The process that drives a run, found by the run's lock: whether it is there, and how to end it.

    driver = driver_of(Path("runs/quickstart"))   # None when nobody is at work on it
    driver.pid, driver.host, driver.is_here

Only files are read. On this host a pid is taken for the driver if that process has the lock open;
on another, the lock itself is asked, which file systems that are shared pass on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Driver:
    """Who has a run open; `since` is a time in ISO 8601."""

    pid: int
    host: str
    since: str

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == socket.gethostname()


def driver_of(directory: Path) -> Driver | None:
    """The driver that is at work on a run directory."""
    lock = directory / "lock"
    try:
        fields = json.loads(lock.read_text(encoding="utf-8"))
        driver = Driver(fields["pid"], fields["host"], fields["start"])
    except (OSError, ValueError, KeyError, TypeError):  # never begun, or begun in this moment
        return None
    alive = _has_open(driver.pid, lock) if driver.is_here else None
    if alive is None:
        alive = _is_locked(lock)
    return driver if alive else None


def _has_open(pid: int, lock: Path) -> bool | None:
    """Whether the process holds the lock; None where it is another user's."""
    wanted = lock.stat()
    try:
        handles = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False
    except PermissionError:
        return None
    for handle in handles:
        try:
            found = handle.stat()
        except OSError:  # closed since, or no file
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _is_locked(lock: Path) -> bool:
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
