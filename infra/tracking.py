"""MLflow: a copy of a run directory, made by a process of its own that the driver never waits for.

    python -m infra.tracking runs/quickstart [--until-pid PID]

The server may be down, slow or absent: files are the truth, what is missing there is pushed when it
is back, and a run is looked for by its tags before it is created, so that nothing is there twice.
Only this module imports mlflow, and only in that process.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError, first_line
from infra.records import TrialResult
from infra.specs import TrackingSpec
from infra.store import RunStore, write_atomic

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

POLL_S, SLOWEST_POLL_S = 1.0, 30.0  # the latter while the server does not answer
GIVE_UP_S = 60.0  # after the driver has gone and the server does not answer
TAG_RUN, TAG_TRIAL, TAG_REPORT = "sparseramp.run", "sparseramp.trial", "sparseramp.report"
_NO_KEY = r"[^\w.\-: /]"  # what MLflow takes in no name, such as the @ of mmlu@5/acc
PARENT = "search"  # TAG_TRIAL of the parent run
_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow would go on for minutes, and repeat a creation that the server has already done.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def start(run_dir: str | Path, spec: TrackingSpec) -> subprocess.Popen[bytes] | None:
    """Begin mirroring a run, or a comparison's, until this process has gone; None if disabled."""
    if not spec.enabled:
        return None
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "infra.tracking", str(Path(run_dir).resolve())]
    with (Path(run_dir) / "tracking.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--until-pid", str(os.getpid())],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the driver
        )


def pending(run_dir: str | Path) -> int:
    """How many finished trials MLflow does not have yet, without asking it."""
    store = RunStore.read(run_dir)
    if not store.spec.tracking.enabled:
        return 0
    left = 0
    read = (RunStore.read(folder) for folder, _ in _runs(store))
    for run in (each for each in read if each.spec.tracking.enabled):
        path = run.path("tracking.json")
        state = json.loads(path.read_bytes()) if path.exists() else {}
        pushed = state["trials"] if state.get("uri") == uri_of(run) else []
        left += len(set(run.numbers()) - set(pushed))
    return left


def _runs(store: RunStore) -> list[tuple[Path, int]]:
    """The run itself; of many cells, those that have a report, and when each was written."""
    if store.command not in ("compare", "study"):
        return [(store.dir, 0)]
    reports = sorted(store.dir.glob("*/report.html"))  # a run writes it last
    return [(path.parent, path.stat().st_mtime_ns) for path in reports]


class _Mirror:
    """One connection: what the server has of a run, and the pushing of the rest."""

    def __init__(self, store: RunStore) -> None:
        from mlflow import MlflowClient

        self.store = store
        with _lock(store.dir.parent / "mlflow.lock"):  # two that make one database break it
            self.client: MlflowClient = MlflowClient(tracking_uri=uri_of(store))
        self.experiment = self._experiment()
        self.runs = self._list()
        self.pushed = {
            int(key)
            for key, run in self.runs.items()
            if key != PARENT and run.info.status in ("FINISHED", "FAILED")
        }
        self.details: dict[str, str] = {}
        self.noted = b""
        self.parent = self._parent()

    def push(self) -> None:
        """Bring the server up to date with the files."""
        self._push_details()
        for number in sorted(set(self.store.numbers()) - self.pushed):
            self._push_trial(self.store.result(number))
            self.pushed.add(number)
            self._note()
        self._push_report()
        self._note()

    def finish(self) -> None:
        """Say how the search ended, once its driver has gone."""
        done = any(self.store.path(f"{name}.json").exists() for name in ("report", "recovery"))
        self.client.set_terminated(self.parent, "FINISHED" if done else "KILLED")

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.store.spec.tracking.experiment
        if found := self.client.get_experiment_by_name(name):
            return str(found.experiment_id)
        file = uri_of(self.store).removeprefix("sqlite:///")  # a server has its own place for them
        beside = None if "://" in file else str(Path(file).resolve().parent / "mlartifacts")
        try:
            return str(self.client.create_experiment(name, beside))
        except MlflowException:
            if found := self.client.get_experiment_by_name(name):  # another search was faster
                return str(found.experiment_id)
            raise

    def _list(self) -> dict[str, Run]:
        """Runs of this search by trial; a second one, left by a slow server, is deleted."""
        search = partial(
            self.client.search_runs, [self.experiment], f"tags.`{TAG_RUN}` = '{self.store.id}'"
        )
        found = list(page := search())
        while page.token:
            found += (page := search(page_token=page.token))
        runs: dict[str, Run] = {}
        for run in sorted(found, key=lambda r: (r.info.status == "RUNNING", r.info.run_id)):
            if runs.setdefault(run.data.tags[TAG_TRIAL], run) is not run:
                self.client.delete_run(run.info.run_id)
        return runs

    def _open(self, key: str, name: str, start_ms: int, tags: Mapping[str, str]) -> str:
        """The run of a trial, created unless the server has it."""
        if key not in self.runs:
            tags = {TAG_RUN: self.store.id, TAG_TRIAL: key, "mlflow.runName": name, **tags}
            self.runs[key] = self.client.create_run(self.experiment, start_ms, tags)
        return str(self.runs[key].info.run_id)

    def _parent(self) -> str:
        events = self.store.events()  # none where a start was killed before its first
        begun = datetime.fromisoformat(events[0]["time"]) if events else datetime.now()
        run = self._open(PARENT, self.store.dir.resolve().name, int(begun.timestamp() * 1000), {})
        self._log(run, 0, _flat(self.store.spec.identity()), {})
        if self.runs[PARENT].info.status != "RUNNING":  # resumed
            self.client.update_run(run, status="RUNNING")
        return run

    def _push_details(self) -> None:
        """Where the numbers come from; of model and data some time after the start."""
        details = dict(self.store.provenance)
        if model := self.store.model():
            details["model.sha256"] = model.sha256
        for event in self.store.events():
            if event.pop("event") == "data":
                details |= {f"data.{k}": str(v) for k, v in event.items() if k != "time"}
        for key, value in details.items():
            if self.details.get(key) != value:
                self.client.set_tag(self.parent, key, value)
        self.details = details

    def _push_trial(self, result: TrialResult) -> None:
        spec, cost = result.spec, result.cost
        end = self.store.path(f"trials/{spec.number:05d}.json").stat().st_mtime_ns // 1_000_000
        run = self._open(
            str(spec.number),
            f"trial {spec.number:05d}",
            end - int(cost.total_s * 1000),
            {
                "mlflow.parentRunId": self.parent,
                **{key: str(getattr(spec, key)) for key in ("stage", "rung")},
                **{key: getattr(result, key) for key in ("host", "device", "cause")},
                **{key: self.details.get(key, "") for key in ("commit", "model.sha256")},
            },
        )
        metrics = {
            **_flat(cost.model_dump(), "cost."),
            "beta": result.beta,
            "tilt": result.tilt,
            "attempts": result.attempts,
            "block_rate": result.block_rates,
            "block_error": [error.relative for error in result.errors],
        }
        if result.state == "complete":
            metrics |= result.metrics()
        self._log(run, end, _flat(spec.model_dump(exclude={"profile"})), metrics)
        status = "FINISHED" if result.state == "complete" else "FAILED"
        self.client.set_terminated(run, status, end)  # last: one that has ended counts as pushed

    def _push_report(self) -> None:
        path = self.store.path("report.json")
        if not path.exists():
            return
        data = path.read_bytes()
        html = self.store.path("report.html")
        digest = hashlib.sha256(data + (html.read_bytes() if html.exists() else b"")).hexdigest()
        if self.runs[PARENT].data.tags.get(TAG_REPORT) == digest:
            return
        report = json.loads(data)
        metrics = _flat({name: report.get(name) or {} for name in ("gain", "recovery")})
        for row in ("dense", "uniform", "best"):
            measured = report.get(row) or {}  # no dense model was measured
            metrics |= {f"{row}.{k}": v["mean"] for k, v in measured.pop("metrics", {}).items()}
            metrics |= {f"{row}.{k}": measured.get(k) for k in ("beta", "tilt", "sparsity")}
        self._log(self.parent, path.stat().st_mtime_ns // 1_000_000, {}, metrics)
        for file in (path, html):
            if file.exists():
                self.client.log_artifact(self.parent, str(file))
        self.client.set_tag(self.parent, TAG_REPORT, digest)
        self.runs[PARENT].data.tags[TAG_REPORT] = digest

    def _log(
        self, run: str, time_ms: int, params: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        """Params, and those metrics that are numbers or one number per block.

        With equal times MLflow drops what it has already.
        """
        from mlflow.entities import Metric, Param

        points = [
            Metric(re.sub(_NO_KEY, "_", key), value, time_ms, step)
            for key, values in metrics.items()
            for step, value in enumerate(values if isinstance(values, list) else [values])
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        pairs = [Param(key, str(value)) for key, value in params.items()]
        for first in range(0, len(points) + 1, 800):  # one call takes 1000 in all, 100 params
            self.client.log_batch(run, points[first : first + 800], pairs)

    def _note(self) -> None:
        """For `pending`, which must not wait for a server."""
        state = json.dumps({"uri": uri_of(self.store), "trials": sorted(self.pushed)}).encode()
        if state != self.noted:
            write_atomic(self.store.path("tracking.json"), state)
            self.noted = state


def _follow(store: RunStore, until_pid: int, give_up_s: float = GIVE_UP_S) -> bool:
    """Push until the process has gone and all is pushed; False if the server did not answer."""
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    mirror: _Mirror | None = None
    done: set[tuple[Path, int]] = set()
    driver = _alive(until_pid)
    poll_s, failing_since, said = POLL_S, 0.0, ""
    while True:  # the driver is asked for first: all that it wrote before it went is then pushed
        alive = driver != "" and _alive(until_pid) == driver
        try:
            for folder, reported in [run for run in _runs(store) if run not in done]:
                if mirror is None or mirror.store.dir != folder:
                    cell = RunStore.read(folder)
                    if reported and not cell.spec.tracking.enabled:
                        done.add((folder, reported))
                        continue
                    mirror = _Mirror(cell)
                mirror.push()
                if reported or not alive:
                    mirror.finish()
                    done.add((folder, reported))
            if not alive:
                return True
            poll_s, failing_since, said = POLL_S, 0.0, ""
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError, UserError) as error:
            mirror = None  # what the server has is asked anew
            failing_since = failing_since or time.monotonic()
            reason = f"{type(error).__name__}: {first_line(error)[:300]}"
            if reason != said:
                print(f"{datetime.now().isoformat(timespec='seconds')} {reason}", flush=True)
                said = reason
            if not alive and time.monotonic() - failing_since >= give_up_s:
                return False
            poll_s = min(2 * poll_s, SLOWEST_POLL_S)
        time.sleep(poll_s)


def _alive(pid: int) -> str:
    """A mark of the process that no later one of this number shares; empty once it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # state; start time


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One mirror per run; a resumed search's waits for that of the killed one."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def uri_of(store: RunStore) -> str:
    """Where the copy of a run is."""
    return store.spec.tracking.uri or f"sqlite:///{store.dir.resolve().parent / 'mlflow.db'}"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"prune": {"beta": 0.01}}` as `{"prune.beta": 0.01}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        key = prefix + key
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def main() -> int:
    """Mirror a run, or a comparison's; exit code 1 if something is left for the next start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("--until-pid", type=int, default=0, help="go on until this one has gone")
    args = parser.parse_args()
    os.nice(19)
    store = RunStore.read(args.run_dir)
    with _lock(store.path("tracking.lock")):
        if _follow(store, args.until_pid):
            return 0
    print(f"gave up: {pending(args.run_dir)} trials left for the next start")
    return 1


if __name__ == "__main__":
    sys.exit(main())
