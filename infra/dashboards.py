"""MLflow's and Optuna's own pages on 127.0.0.1, of copies that go when the page does.

    with optuna_page(Path("copy.log"), port) as page: ...
    with mlflow_page(Path("runs/mlflow.db"), "sparseramp", port) as (page, follow): ...

What a visitor changes or deletes there is a change of the copy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from tempfile import TemporaryDirectory
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from infra.environment import TELEMETRY_OFF
from infra.errors import UserError

HOST = "127.0.0.1"
START_S = 300.0
STOP_S = 10.0
POLL_S = 0.3
_NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # those of judges, in processes more


class _Server(ThreadingMixIn, WSGIServer):
    """A browser holds connections open, each of which would keep the others waiting."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def optuna_page(journal: Path, port: int = 0) -> Iterator[str]:
    """The address of optuna-dashboard on a journal that it may write to; port 0: a free one.

    Raises UserError where the package is missing or the port is taken.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise UserError("optuna-dashboard is not installed: pip install optuna-dashboard") from None
    with make_server(HOST, free_port(port), wsgi(str(journal)), _Server, _Quiet) as server:
        threading.Thread(target=server.serve_forever, name="dashboard", daemon=True).start()
        try:
            yield f"http://{HOST}:{server.server_port}/dashboard/"
        finally:
            server.shutdown()


@contextlib.contextmanager
def mlflow_page(
    database: Path, experiment: str, port: int = 0
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of MLflow's page of an experiment, and what brings its copy up to date.

    Raises UserError where the database or the experiment is not there yet, the port is taken, or
    MLflow does not start.
    """
    missing = f"MLflow has nothing of this run yet: {database} gets it from the driver"
    if not database.exists():
        raise UserError(missing)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="sparseramp-")))
        copy, log = folder / "mlflow.db", folder / "log"
        copied = _copy(database, copy)
        number = _experiment(copy, experiment)
        if number is None:
            raise UserError(missing)
        port = free_port(port)
        command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{copy}"]
        with log.open("wb") as output:
            server = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | TELEMETRY_OFF | _NO_JOBS,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # it has processes of its own, which end with it
            )
        stack.callback(_end, server)

        def follow() -> None:
            nonlocal copied
            if server.poll() is not None:
                raise UserError(f"MLflow has ended: {_last_line(log)}")
            if database.exists() and copied != database.stat().st_mtime_ns:
                copied = _copy(database, copy)

        deadline = time.monotonic() + START_S
        while not _answers(f"http://{HOST}:{port}/health"):
            follow()
            if time.monotonic() > deadline:
                raise UserError(f"MLflow has not answered for {START_S:.0f} s: {_last_line(log)}")
            time.sleep(POLL_S)
        yield f"http://{HOST}:{port}/#/experiments/{number}/runs", follow


def free_port(wanted: int = 0) -> int:
    """The port itself, or one that is free where it is 0. Raises UserError where it is taken."""
    with socket.socket() as unused:
        unused.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            unused.bind((HOST, wanted))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--port {wanted} cannot be used: {error}; 0 finds a free one"
            ) from None
        return int(unused.getsockname()[1])


def _copy(database: Path, copy: Path) -> int:
    """Copy a database that others may be writing, into one that others may be reading.

    Returns when the database had last changed before that.
    """
    changed = database.stat().st_mtime_ns
    source = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    with contextlib.closing(source), contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return changed


def _experiment(database: Path, name: str) -> int | None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        if not connection.execute("PRAGMA table_list(experiments)").fetchall():
            return None  # another process is making the database
        query = "SELECT experiment_id FROM experiments WHERE name = ?"
        row = connection.execute(query, (name,)).fetchone()
    return row and int(row[0])


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=POLL_S * 10):
        return True
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)
