"""Optuna's dashboard of a run, or MLflow's, on copies that follow the run while it goes on.

    sparseramp dashboard runs/night             # Optuna's studies, those of all cells in one place
    sparseramp dashboard runs/night --mlflow

Optuna's storage is filled from the files of the run, as the run's own is: whether that one is a
journal or a database, locked or down, it is neither asked nor changed.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from infra.dashboards import mlflow_page, optuna_page
from infra.errors import UserError
from infra.samplers import StudyMirror
from infra.store import RunStore
from infra.tracking import uri_of
from tasks.allocation import bounds_of

FOLLOW_S = 3.0
Page = tuple[str, Callable[[], object]]


def dashboard(folder: Path, *, mlflow: bool, port: int, as_json: bool) -> None:
    """Show the page until interrupted, or say where it is if a server has it.

    Raises UserError where there is nothing to show or no way to show it.
    """
    name = "MLflow" if mlflow else "Optuna"

    def say(url: str) -> None:
        found = {"kind": "dashboard", "of": name.lower(), "run": str(folder), "url": url}
        print(json.dumps(found) if as_json else f"{name} of {folder}: {url}", flush=True)

    store = RunStore.read(folder)
    tracked = _tracked(store) if mlflow else store
    if mlflow and uri_of(tracked).startswith("http"):
        say(re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", uri_of(tracked)))  # no password
        return
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a terminal that is closed
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    if not as_json:
        hint = ", which takes a minute where the machine is busy" if mlflow else ""
        print(f"starting {name}'s page{hint}; Ctrl-C ends it", file=sys.stderr)
    with _mlflow(tracked, port) if mlflow else _optuna(store, port) as (url, follow):
        say(url)
        while True:
            follow()
            time.sleep(FOLLOW_S)


def _runs(store: RunStore) -> list[RunStore]:
    """The run itself, or the cells that have begun."""
    if store.command not in ("compare", "study"):
        return [store]
    return [RunStore.read(file.parent) for file in sorted(store.dir.glob("*/run.json"))]


def _tracked(store: RunStore) -> RunStore:
    """A run that MLflow has a copy of."""
    for run in _runs(store):
        if run.spec.tracking.enabled:
            return run
    raise UserError(f"MLflow has no copy of {store.dir}: tracking.enabled is false")


@contextlib.contextmanager
def _mlflow(store: RunStore, port: int) -> Iterator[Page]:
    uri = uri_of(store)
    file = uri.removeprefix("sqlite:///")
    if "://" in file:
        raise UserError(
            f"tracking.uri of {store.dir} is neither a server nor SQLite: show it with the MLflow "
            "server that uses it"
        )
    with mlflow_page(Path(file), store.spec.tracking.experiment, port) as page:
        yield page


@contextlib.contextmanager
def _optuna(store: RunStore, port: int) -> Iterator[Page]:
    with TemporaryDirectory(prefix="sparseramp-") as folder:
        journal = Path(folder, "optuna.log")
        told: dict[Path, set[int]] = {}

        def tell(run: RunStore) -> bool:
            """Add what is new; whether that was anything."""
            known = told.setdefault(run.dir, set())
            results = [run.result(number) for number in run.numbers() if number not in known]
            model = run.model()
            if not results or model is None:
                return False
            bounds = bounds_of(run.spec.prune, model.matrices)
            objective = run.spec.search.objective
            mirror = StudyMirror(run.dir, run.id, "", bounds, objective, journal)
            mirror.rebuild(results)
            mirror.close()
            known |= {result.spec.number for result in results}
            return any(result.spec.stage == "search" for result in results)

        if not any(tell(run) for run in _runs(store)):  # with the first of them the page begins
            raise UserError(f"no trial of a search has ended yet in {store.dir}: nothing to show")
        with optuna_page(journal, port) as url:
            yield url, lambda: [tell(run) for run in _runs(store)]
