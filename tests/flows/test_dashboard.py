"""Our report, and Optuna's and MLflow's pages of a run, in a browser; and what refuses to be shown.

python -m pytest tests/flows/test_dashboard.py
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows.dashboard import dashboard
from flows.report import build_report, render
from infra.errors import UserError
from infra.store import RunStore
from tests.browser import document, draw, needs_browser
from tests.flows.commands import start
from tests.flows.test_report import make_model, make_run, make_spec

Drivers = list[subprocess.Popen[str]]


@needs_browser
@pytest.mark.parametrize("width", [1280, 800])
def test_the_report_in_a_browser(width: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    page = folder / "report.html"
    page.write_text(render(build_report(make_spec(), make_model(), make_run(), 1.0)))
    seen = draw(page, tmp_path, width)
    assert (seen.errors, seen.too_wide, seen.num_plots) == ([], [], 4)


def test_an_engine_that_does_not_run_is_said_once() -> None:
    report = build_report(make_spec(), make_model(), make_run(), 1.0)
    refusal = "engine deltas cannot run this model: no GPU; use another engine"
    speed = {"conclusion": "no gain", "dtype": "float32", "device": "cpu", "threads": 1}
    speed |= {"cases": [], "stored_bytes": 1, "engines": [{"name": "deltas", "refusal": refusal}]}
    assert f"<dt>deltas</dt><dd>{refusal}</dd>" in render(report | {"speed": speed})


def make_files(folder: Path, *, trials: int = 99, **tracking: Any) -> RunStore:
    """A run of synthetic trials."""
    spec = make_spec(run={"dir": str(folder)}, tracking=tracking)
    with RunStore.open(spec) as store:
        store.write_model(make_model())
        for result in make_run()[:trials]:
            store.write_result(result)
    return store


def hashes(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def begin(driver: Drivers, *arguments: str | Path, cache: Path) -> str:
    """Start the command; the address that it prints."""
    process = start("dashboard", *arguments, "--json", cache=cache)
    driver.append(process)
    assert process.stdout
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return str(json.loads(line)["url"])


def end(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C does; nothing that was copied stays."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "sparseramp: stopped\n")
    assert not list(Path(os.environ["TMPDIR"]).iterdir())


def ask(url: str, method: str = "GET", body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies are made."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    return tmp_path / "temp"


@needs_browser
@pytest.mark.slow
def test_optuna_shows_all_cells_as_they_go_on(tmp_path: Path, driver: Drivers, temp: Path) -> None:
    study = tmp_path / "study"
    RunStore.open(make_spec(run={"dir": str(study)}), "study").close()
    make_files(study / "one")
    make_files(study / "two", trials=3)
    url = begin(driver, study, cache=tmp_path)
    api = url.replace("/dashboard/", "/api/studies")

    def trials() -> dict[str, int]:
        found = ask(api)["study_summaries"]
        detail = {s["study_name"]: ask(f"{api}/{s['study_id']}?after=0") for s in found}
        return {name: len(each["trials"]) for name, each in detail.items()}

    def wait(expected: dict[str, int]) -> None:
        deadline = time.monotonic() + 60
        while (found := trials()) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.5)

    wait({"one/rung0": 8, "one/rung1": 3, "two/rung0": 3})
    page = document(url, tmp_path)
    assert "one/rung1" in page and "two/rung0" in page
    make_files(study / "two")
    wait({"one/rung0": 8, "one/rung1": 3, "two/rung0": 8, "two/rung1": 3})
    before = hashes(study)
    ask(f"{api}/1", "DELETE")
    assert len(trials()) == 3 and hashes(study) == before
    end(driver[0])


@needs_browser
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_mlflow_shows_the_runs_of_a_search(tmp_path: Path, driver: Drivers, temp: Path) -> None:
    runs = tmp_path / "runs"
    store = make_files(runs / "quick", trials=3)
    mirror = [sys.executable, "-m", "infra.tracking", store.dir]
    subprocess.run(mirror, check=True, timeout=200)
    before = hashes(runs)
    url = begin(driver, store.dir, "--mlflow", cache=tmp_path)
    api, number = url.split("/#/")[0] + "/api/2.0/mlflow", url.split("/")[-2]
    assert ">quick<" in document(url, tmp_path, budget_ms=20000)
    found = ask(f"{api}/runs/search", "POST", {"experiment_ids": [number]})["runs"]
    names = {run["info"]["run_name"]: run["info"]["run_id"] for run in found}
    assert sorted(names) == ["quick", "trial 00000", "trial 00001", "trial 00002"]
    ask(f"{api}/runs/delete", "POST", {"run_id": names["quick"]})
    assert hashes(runs) == before
    end(driver[0])
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)


def test_what_cannot_be_shown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path, port: int = 0, mlflow: bool = True) -> str:
        with pytest.raises(UserError) as error:
            dashboard(folder, mlflow=mlflow, port=port, as_json=True)
        return str(error.value)

    off = make_files(tmp_path / "off", enabled=False).dir
    assert "tracking.enabled is false" in refused(off)
    assert "MLflow has nothing of this run yet" in refused(make_files(tmp_path / "new").dir)
    database = make_files(tmp_path / "base", uri="postgresql://me:secret@host/db").dir
    assert "neither a server nor SQLite" in (said := refused(database)) and "secret" not in said
    empty = make_files(tmp_path / "empty", trials=0).dir
    assert "no trial of a search has ended yet" in refused(empty, mlflow=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be used" in refused(off, port, mlflow=False)
    assert "--port 99999 cannot be used" in refused(off, 99999, mlflow=False)

    served = make_files(tmp_path / "served", uri="http://me:secret@10.0.0.7:5000").dir
    dashboard(served, mlflow=True, port=0, as_json=False)
    assert capsys.readouterr().out == f"MLflow of {served}: http://me:***@10.0.0.7:5000\n"
