"""The MLflow copy: complete, never twice, and harmless while the server is down, slow or killed."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run, ViewType

from infra import tracking
from infra.records import ModelRecord, TrialResult
from infra.specs import Spec
from infra.store import RunStore

MakeSpec = Callable[..., Spec]
MakeResult = Callable[..., TrialResult]
REPORT = {
    "dense": {"metrics": {"perplexity": {"mean": 20.0, "stderr": 1.0, "n": 32, "unit": ""}}},
    "uniform": {"metrics": {"perplexity": {"mean": 80.0}}, "beta": 0.0},
    "best": {"metrics": {"perplexity": {"mean": 70.0}}, "beta": 0.01, "tilt": 0.36},
    "gain": {"mean": 0.13, "interval": {"low": 0.1, "high": 0.16}, "verdict": "better"},
}


def runs(store: RunStore) -> dict[str, Run]:
    """What MLflow shows, by the name it shows; fails on a name that is there twice."""
    client = mlflow.MlflowClient(tracking.uri_of(store))
    experiment = client.get_experiment_by_name("sparseramp")
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    by_name = {run.info.run_name: run for run in found}
    assert len(found) == len(by_name)
    return by_name


def sync(run_dir: Path) -> int:
    """What a mirror does whose driver has gone; how many trials it could not push."""
    tracking._follow(RunStore.read(run_dir), until_pid=0, give_up_s=0)
    return tracking.pending(run_dir)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, because MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(
    make_spec: MakeSpec, make_result: MakeResult, empty: Path, tmp_path: Path
) -> Iterator[RunStore]:
    """A run of three trials, one of which failed."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty, tmp_path / "runs" / "mlflow.db")
    with RunStore.open(make_spec()) as opened:
        opened.write_result(make_result(0))
        opened.write_result(make_result(1, 0.01, loss=4.0))
        opened.write_result(make_result(2, 0.02, state="failed"))
        yield opened


def test_a_run_without_a_first_event_arrives(store: RunStore) -> None:
    (store.dir / "events.jsonl").unlink()
    assert sync(store.dir) == 0
    assert len(runs(store)) == 4


def test_search_and_trials_arrive_whole(store: RunStore) -> None:
    assert tracking.pending(store.dir) == 3
    assert sync(store.dir) == 0
    found = runs(store)
    assert sorted(found) == ["tiny", "trial 00000", "trial 00001", "trial 00002"]
    assert [found[f"trial 0000{n}"].info.status for n in range(3)] == [
        "FINISHED", "FINISHED", "FAILED"
    ]  # fmt: skip
    trial, parent = found["trial 00001"], found["tiny"]
    assert trial.data.metrics["loss"] == pytest.approx(4.0)
    assert trial.data.metrics["perplexity"] == pytest.approx(math.exp(4))
    assert trial.data.metrics["cost.sweep_s"] == 12.5
    assert trial.data.params["prune.beta"] == "0.01"
    assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert trial.data.tags["device"] == "cpu" and trial.data.tags["stage"] == "search"
    assert found["trial 00002"].data.tags["cause"] == "loss is NaN"
    client = mlflow.MlflowClient(tracking.uri_of(store))
    rates = client.get_metric_history(trial.info.run_id, "block_rate")
    assert [(point.step, point.value) for point in rates] == [(0, 0.55), (1, 0.65)]
    assert parent.data.params["prune.sparsity"] == "0.6"
    assert parent.data.tags["torch"] == store.provenance["torch"]
    assert parent.info.status == "KILLED"  # no report

    # The search goes on and ends.
    store.event("data", report="1234")
    store.write_model(
        ModelRecord(
            source="x", architecture="Llama", dtype="float32", sha256="ab12", blocks=["0"],
            matrices=[], total_params=1, context=8, adds_bos=False,
        )
    )  # fmt: skip
    store.path("report.json").write_text(json.dumps(REPORT))
    store.path("report.html").write_text("<html>")
    assert sync(store.dir) == 0
    parent = runs(store)["tiny"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["model.sha256"] == "ab12" and parent.data.tags["data.report"] == "1234"
    assert parent.data.metrics.items() >= {
        "dense.perplexity": 20.0, "uniform.perplexity": 80.0, "best.perplexity": 70.0,
        "best.tilt": 0.36, "gain.mean": 0.13, "gain.interval.low": 0.1,
    }.items()  # fmt: skip
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"report.json", "report.html"}
    assert (store.dir.parent / "mlartifacts").is_dir()


def test_what_is_there_is_completed_and_what_is_there_twice_goes(
    store: RunStore, make_result: MakeResult
) -> None:
    assert sync(store.dir) == 0
    before = runs(store)
    client = mlflow.MlflowClient(tracking.uri_of(store))
    experiment = before["tiny"].info.experiment_id
    # A slow server: the creation arrived although the client had given up on it, and began anew.
    client.create_run(experiment, tags=before["trial 00001"].data.tags)
    # A mirror that was killed between creating and completing.
    tags = before["trial 00001"].data.tags | {
        "sparseramp.trial": "3", "mlflow.runName": "trial 00003"
    }  # fmt: skip
    half = client.create_run(experiment, tags=tags)
    client.log_param(half.info.run_id, "prune.beta", "0.015")
    store.write_result(make_result(3, 0.015))
    store.path("tracking.json").unlink()  # no more than a note

    assert sync(store.dir) == 0
    found = runs(store)
    assert len(found) == 5
    assert found["trial 00001"].info.run_id == before["trial 00001"].info.run_id
    assert found["trial 00003"].info.run_id == half.info.run_id
    assert found["trial 00003"].info.status == "FINISHED"
    assert found["trial 00003"].data.metrics["loss"] == pytest.approx(4.5)


def test_numbers_that_are_none_leave_the_rest(store: RunStore, make_result: MakeResult) -> None:
    """Nobody measured the dense model, and a candidate's perplexity is no number."""
    store.write_result(make_result(3, 0.03, loss=800.0))
    store.path("report.json").write_text(json.dumps(REPORT | {"dense": None}))
    assert sync(store.dir) == 0
    found = runs(store)
    assert found["trial 00003"].data.metrics["loss"] == pytest.approx(800.0)
    assert "perplexity" not in found["trial 00003"].data.metrics
    assert found["tiny"].data.metrics["best.perplexity"] == 70.0


def test_scores_arrive_and_images_have_no_perplexity(
    store: RunStore, make_result: MakeResult
) -> None:
    scores = {"top1": [1.0, 0.0], "mmlu@5/acc": [1.0, 0.0, 0.0, 0.0]}
    store.write_result(make_result(3, 0.03, scores=scores, tokens=[1, 1], bytes=[0, 0]))
    assert sync(store.dir) == 0
    told = runs(store)["trial 00003"].data.metrics
    assert (told["top1"], told["mmlu_5/acc"]) == (0.5, 0.25)
    assert "loss" in told and "perplexity" not in told


def test_server_that_refuses_or_hangs_costs_little_and_loses_nothing(
    make_spec: MakeSpec, make_result: MakeResult, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with RunStore.open(make_spec(tracking={"uri": uri})) as store:
            store.write_result(make_result(0))
            start = time.monotonic()
            assert sync(store.dir) == 1
    assert sync(store.dir) == 1  # and now the port is closed
    assert time.monotonic() - start < 5
    shutil.copy(empty, store.dir.parent / "mlflow.db")
    with RunStore.open(make_spec()) as store:  # another place for it, at the next start
        assert sync(store.dir) == 0
    assert len(runs(store)) == 2


def test_disabled_does_nothing(make_spec: MakeSpec, make_result: MakeResult) -> None:
    with RunStore.open(make_spec(tracking={"enabled": False})) as store:
        store.write_result(make_result(0))
        assert tracking.start(store.dir, store.spec.tracking) is None
        assert tracking.pending(store.dir) == 0
    assert not (store.dir.parent / "mlflow.db").exists()


# Starts the mirror, finishes one more trial and dies without a word.
DRIVER = """
import os, sys, time
from infra import tracking
from infra.records import TrialResult
from infra.spec_files import load_spec
from infra.store import RunStore
store = RunStore.open(load_spec(sys.argv[1]))
begun = time.perf_counter()
mirror = tracking.start(store.dir, store.spec.tracking)
print(mirror.pid, time.perf_counter() - begun, "mlflow" in sys.modules, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""


def test_mirror_outlives_a_killed_driver_until_all_is_pushed(
    store: RunStore, make_result: MakeResult
) -> None:
    store.close()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(store.path("spec.toml"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin and driver.stdout
    pid, took_s, imported = driver.stdout.readline().split()
    try:
        assert float(took_s) < 0.5 and imported == "False"
        wait(lambda: tracking.pending(store.dir) == 0, 60)
        assert tracking._alive(int(pid))  # more may come
        driver.stdin.write("\n")
        driver.stdin.flush()
        driver.stdin.close()  # now it dies; a zombie, because nobody asks for its exit code yet
        wait(lambda: not tracking._alive(int(pid)), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        driver.wait()
    found = runs(store)
    assert len(found) == 4 and found["tiny"].info.status == "KILLED"


# Forks, because each mirror would otherwise spend seconds on importing mlflow. Kills one shortly
# after it has pushed something.
KILLED_MIRRORS = """
import os, random, sys, time
import mlflow, sqlalchemy
from infra import tracking
from infra.store import RunStore
chance = random.Random(0)
for _ in range(5):
    left = tracking.pending(sys.argv[1])
    child = os.fork()
    if not child:
        tracking._follow(RunStore.read(sys.argv[1]), until_pid=0)
        os._exit(0)
    while tracking.pending(sys.argv[1]) == left:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def test_mirror_killed_at_any_moment_leaves_nothing_twice(
    store: RunStore, make_result: MakeResult
) -> None:
    for number in range(3, 40):
        store.write_result(make_result(number, 0.0005 * number))
    subprocess.run([sys.executable, "-c", KILLED_MIRRORS, str(store.dir)], check=True)
    assert sync(store.dir) == 0
    found = runs(store)
    assert len(found) == 41
    statuses = [found[f"trial {n:05d}"].info.status for n in range(40)]
    assert statuses == ["FINISHED", "FINISHED", "FAILED"] + ["FINISHED"] * 37
    client = mlflow.MlflowClient(tracking.uri_of(store))
    experiment = found["tiny"].info.experiment_id
    assert len(client.search_runs([experiment], run_view_type=ViewType.ALL)) == 41  # none deleted
    for run in found.values():
        if run.info.status == "FINISHED" and run.info.run_name.endswith("5"):
            assert len(client.get_metric_history(run.info.run_id, "block_rate")) == 2
            assert len(client.get_metric_history(run.info.run_id, "loss")) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_real_server_down_at_the_start_and_in_the_middle(
    make_spec: MakeSpec, make_result: MakeResult, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    with RunStore.open(make_spec(tracking={"uri": uri})) as store:
        store.write_result(make_result(0))
        mirror = tracking.start(store.dir, store.spec.tracking)
        assert mirror
        try:
            time.sleep(5)
            assert mirror.poll() is None and tracking.pending(store.dir) == 1
            with server(port, tmp_path):
                wait(lambda: tracking.pending(store.dir) == 0, 60)
            store.write_result(make_result(1, 0.01))
            time.sleep(3)
            assert mirror.poll() is None and tracking.pending(store.dir) == 1
            with server(port, tmp_path):
                wait(lambda: tracking.pending(store.dir) == 0, 60)
                store.path("report.json").write_text(json.dumps(REPORT))
                assert len(runs(store)) == 3
                wait(lambda: "best.perplexity" in runs(store)["tiny"].data.metrics, 30)
        finally:
            mirror.kill()
            mirror.wait()


@contextlib.contextmanager
def server(port: int, folder: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
