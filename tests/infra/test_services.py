"""A search with PostgreSQL as Optuna's storage and behind an MLflow server, read by their clients.

python -m pytest tests/infra/test_services.py -m slow

PostgreSQL is Debian's package, MLflow and the driver psycopg are on the index of Python packages.
"""

import contextlib
import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.dashboards import free_port
from infra.store import RunStore
from tests.flows.commands import run, write_project

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not PROGRAMS, reason="no PostgreSQL: apt-get install postgresql"),
    pytest.mark.skipif(
        not importlib.util.find_spec("psycopg"), reason="no driver: pip install 'psycopg[binary]'"
    ),
]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server, without the name of a database; `optuna` and `mlflow` are there."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    options: dict[str, int | list[int]] = {}
    if os.getuid() == 0:  # which PostgreSQL refuses
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def program(name: str, *arguments: str) -> None:
        subprocess.run(
            [PROGRAMS[-1] / name, *arguments],
            check=True, cwd=folder, capture_output=True, timeout=60, **options,  # type: ignore[call-overload]
        )  # fmt: skip

    port = free_port()
    data = folder / "data"
    try:
        program("initdb", "-D", str(data), "-U", "me", "--auth=trust", "--no-sync")
        given = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        log = folder / "log"
        program("pg_ctl", "-D", str(data), "-l", str(log), "-w", "-o", given, "start")
        for name in ("optuna", "mlflow"):
            program("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "me", name)
        yield f"postgresql://me:unused@127.0.0.1:{port}"
        program("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        with contextlib.suppress(OSError, ValueError):  # the first line of its file is its number
            os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def mlflow_server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that keeps its runs in PostgreSQL and serves artifacts from a folder."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
             "--workers", "1", "--backend-store-uri", f"{postgres}/mlflow",
             "--artifacts-destination", str(folder / "artifacts")],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=20).close()
                break
            assert process.poll() is None and time.monotonic() < deadline, (
                folder / "log"
            ).read_text()
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it holds nothing of its own
        process.wait()


def test_a_search_is_told_to_both_whole(postgres: str, mlflow_server: str, tmp_path: Path) -> None:
    import mlflow
    import optuna

    spec = write_project(tmp_path)
    storage = f"{postgres}/optuna"
    tracking = ("tracking.enabled=true", f"tracking.uri={mlflow_server}")
    done = run("search", spec, f"search.storage={storage}", *tracking, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    store = RunStore.read(tmp_path / "run")
    results = store.results()
    assert not any(event["event"] == "storage" for event in store.events())

    for rung in {result.spec.rung for result in results.values() if result.spec.stage == "search"}:
        study = optuna.load_study(study_name=f"run/rung{rung}", storage=storage)
        told = {trial.user_attrs["number"]: trial.value for trial in study.trials}
        assert told == pytest.approx(
            {
                number: result.loss
                for number, result in results.items()
                if (result.spec.stage, result.spec.rung) == ("search", rung)
            }
        )

    client = mlflow.MlflowClient(mlflow_server)
    deadline = time.monotonic() + 120  # its mirror goes on when the driver has gone
    while True:
        found = {}
        if experiment := client.get_experiment_by_name("sparseramp"):
            listed = client.search_runs([experiment.experiment_id])
            found = {each.info.run_name: each for each in listed}
            assert len(found) == len(listed)
        if "run" in found and found["run"].info.status == "FINISHED":
            break
        assert time.monotonic() < deadline, store.path("tracking.log").read_text()
        time.sleep(1)
    assert found.keys() == {"run", *(f"trial {number:05d}" for number in results)}
    for number, result in results.items():
        assert found[f"trial {number:05d}"].data.metrics["loss"] == pytest.approx(result.loss)
    parent = found["run"].info
    assert parent.artifact_uri.startswith("mlflow-artifacts:")
    report = client.download_artifacts(parent.run_id, "report.json", str(tmp_path))
    assert json.loads(Path(report).read_text()) == json.loads(store.path("report.json").read_text())
