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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from infra.driver import Driver, driver_of
from infra.errors import UserError
from infra.store import RunStore

WAIT_S = 0.2
LOOK_S = 1.0
FILE = "stop"


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """End this process as SIGTERM would when a file `stop` appears in the run directory.

    The KeyboardInterrupt that ends it says what asked for it; see `cause_of`.
    """
    file, done = folder / FILE, threading.Event()
    file.unlink(missing_ok=True)  # it meant an earlier driver

    def look() -> None:
        while not done.wait(LOOK_S):
            if file.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def told(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt("stop" if file.exists() else "SIGTERM")

    threading.Thread(target=look, name="stop", daemon=True).start()
    has_signals = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    if has_signals:
        signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        done.set()
        if signal.getsignal(signal.SIGTERM) is told:
            signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)


def cause_of(error: BaseException) -> dict[str, str]:
    """What the event of a run that ends early says: `stop`, SIGTERM, SIGINT, or the error."""
    if isinstance(error, KeyboardInterrupt):  # Ctrl-C's says nothing
        return {"cause": str(error) or "SIGINT", "reason": ""}
    return {"cause": type(error).__name__, "reason": str(error)}


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
        with suppress(OSError):  # of a folder that may not be written: the signal is enough
            (folder / FILE).touch()  # says who has sent it
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
