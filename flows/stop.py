"""How a run is ended from elsewhere: a signal to its driver, or a file that the driver looks for.

with stoppable(store.dir):    # in the driver
    ...
stop(Path("runs/night"))      # or: sparseramp stop runs/night
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.driver import Driver, driver_of
from infra.errors import UserError
from infra.store import RunStore

WAIT_S = 0.2
LOOK_S = 1.0
FILE = "stop"


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """End this process as SIGTERM would when a file `stop` appears in the run directory."""
    file, done = folder / FILE, threading.Event()
    file.unlink(missing_ok=True)  # it meant an earlier driver

    def look() -> None:
        while not done.wait(LOOK_S):
            if file.exists():
                file.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=look, name="stop", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def stop(folder: Path) -> dict[str, Any]:
    """Ask the driver of a run to end, wait until it has, and say what was kept.

    Raises UserError where nobody is at work on it, or it is a cell that another run drives.
    """
    store = RunStore.read(folder)
    driver = driver_of(folder)
    if driver is None:
        raise UserError(f"nobody is at work on {folder}: there is nothing to stop")
    above = folder.resolve().parent
    if _same_process(driver, driver_of(above)):
        raise UserError(f"{folder} is a cell of {above}, whose driver works on all: stop {above}")
    told = False
    if driver.is_here:
        try:
            os.kill(driver.pid, signal.SIGTERM)
            told = True
        except PermissionError:
            pass
        except ProcessLookupError:  # it has ended by itself
            told = True
    while driver_of(folder) == driver:
        if not told:  # again and again: a driver that begins removes one that is there
            (folder / FILE).touch()
        time.sleep(WAIT_S)
    (folder / FILE).unlink(missing_ok=True)
    numbers = sum(len(RunStore.read(f).numbers()) for f in _runs(folder))
    return {"run": str(folder), "command": store.command, "pid": driver.pid, "trials": numbers}


def _same_process(one: Driver, other: Driver | None) -> bool:
    return other is not None and (one.pid, one.host) == (other.pid, other.host)


def _runs(folder: Path) -> list[Path]:
    """The run, and the cells that are in it."""
    return [folder, *(file.parent for file in folder.glob("*/run.json"))]
