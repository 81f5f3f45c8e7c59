"""A few faults of each kind on a whole search; `make test-faults` does all of them.

python -m pytest tests/faults/test_search.py
"""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra import tracking
from infra.store import RunStore
from tests.faults.invariants import Trials, ended_as, read_trials, within
from tests.faults.launcher import OVERRIDES, ROOT, write_tiny_project

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")  # Debian's libfaketime


def harness(tmp_path: Path, module: str, *arguments: str) -> dict[str, int]:
    """The counts that a harness prints last."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("fault", "step"), [("kill", 23), ("term", 45), ("hang", 45), ("corrupt", 45)]
)
def test_faults_at_a_few_points(tmp_path: Path, fault: str, step: int) -> None:
    results = ("--results", str(tmp_path / "results.jsonl"))
    counts = harness(tmp_path, "kill", "--fault", fault, "--step", str(step), *results)
    assert counts["trials"] == 12
    assert counts["points"] == -(-90 // step)
    assert counts["violations"] == 0


@pytest.mark.timeout(500)
def test_a_few_hostile_inputs(tmp_path: Path) -> None:
    counts = harness(tmp_path, "hostile", "--step", "9")
    assert counts["inputs"] > 20
    assert counts["violations"] == 0


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec, and an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("project")
    write_tiny_project(folder)
    assert search(folder, "undisturbed").returncode == 0
    return folder


def search(
    folder: Path, run: str, *overrides: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The whole command, with trials in plain processes."""
    process = start(folder, run, *overrides, **environment)
    output, errors = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(folder: Path, run: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    arguments = ["search", str(folder / "tiny.toml"), f"run.dir={folder / run}", "--json"]
    given = {"FAULT_CLUSTER": "processes", "SPARSERAMP_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.child", *arguments, *OVERRIDES, *overrides],
        cwd=ROOT,
        env=os.environ | given | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def silent_server() -> Iterator[str]:
    """It takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_mlflow_that_never_answers_holds_up_nothing(project: Path, silent_server: str) -> None:
    overrides = ("tracking.enabled=true", f"tracking.uri={silent_server}")
    try:
        done = search(project, "silent", *overrides)
    finally:
        for process in psutil.process_iter(["cmdline"]):  # the mirror goes on for a minute
            if str(project / "silent") in (process.info["cmdline"] or []):
                process.kill()
    assert done.returncode == 0, done.stderr
    assert not ended_as(project / "undisturbed", project / "silent")
    assert tracking.pending(project / "silent") == 12  # it did not wait for any of them


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_storage_that_is_locked_or_deleted_is_filled_from_the_files(project: Path) -> None:
    run = project / "locked"
    run.mkdir()
    shutil.copytree(project / "undisturbed" / "waves", run / "waves")  # and nothing finished
    for name in ("run.json", "spec.toml", "model.json"):
        shutil.copy(project / "undisturbed" / name, run / name)
    override = f"search.storage=sqlite:///{run}/optuna.db"
    with sqlite3.connect(run / "optuna.db", isolation_level=None) as storage:
        storage.execute("BEGIN EXCLUSIVE")
        done = search(project, "locked", override)
        storage.execute("ROLLBACK")
    assert done.returncode == 0, done.stderr
    assert not ended_as(project / "undisturbed", run)
    told = [event for event in RunStore.read(run).events() if event["event"] == "storage"]
    assert told and "locked" in told[-1]["problem"] and told[-1]["untold"] == 6
    for delete in (False, True):
        if delete:
            (run / "optuna.db").unlink()
        assert search(project, "locked", override).returncode == 0
        with sqlite3.connect(run / "optuna.db") as storage:
            assert storage.execute("SELECT count(*) FROM trials").fetchone() == (6,)
    assert not ended_as(project / "undisturbed", run)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif(not FAKETIME.exists(), reason="no apt-get install libfaketime")
@pytest.mark.parametrize("jump", ["+3d", "-3d"])
def test_clock_that_jumps(project: Path, jump: str) -> None:
    run, clock = project / f"clock{jump}", project / f"clock{jump}.txt"
    clock.write_text("+0")
    process = start(
        project,
        run.name,
        LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    while process.poll() is None and not (run / "trials" / "00001.json").exists():
        time.sleep(0.01)
    clock.write_text(jump)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert not ended_as(project / "undisturbed", run)
    store = RunStore.read(run)
    times = [event["time"] for event in store.events()]
    assert times[0][:10] != times[-1][:10]  # it did jump
    assert all(0 < result.cost.total_s < 200 for result in store.results().values())


@pytest.fixture
def small_disk(project: Path) -> Iterator[Path]:
    """A disk of its own, that only root can mount."""
    disk = project / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk],
            check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_disk_that_is_full_or_read_only(project: Path, small_disk: Path) -> None:
    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", small_disk], check=True)

    run, sizes = small_disk / "run", ["64k"]
    kept: Trials = {}
    while True:
        done = search(project, "disk/run")
        assert not within(kept, kept := read_trials(run))
        if done.returncode == 0:
            break
        line = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and str(small_disk) in line, done.stderr
        assert "No space left on device" in line, line
        if len(sizes) == 2:
            remount("ro")
            done = search(project, "disk/run")
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert "Read-only file system" in done.stderr
            remount("rw")
        sizes.append(f"{int(1.6 * int(sizes[-1][:-1]))}k")
        remount(f"size={sizes[-1]}")
    assert not ended_as(project / "undisturbed", run)
    print(sizes)
