"""Dispatch and retries on two Ray nodes; they are started once.

python -m pytest tests/infra/test_cluster.py
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayNodes

from infra.cluster import Cluster, LostCheckpointError, connect
from infra.environment import CHECKOUT
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.specs import CalibrationSpec, ClusterSpec, ModelSpec
from tests.infra.trials import act, environment, measure, refuse, trial

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    nodes = RayNodes(initialize_head=True, head_node_args={"num_cpus": 1, **SMALL})
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    yield nodes.address
    nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[Cluster]:
    with connect(ClusterSpec(address=address)) as cluster:
        yield cluster


def run(cluster: Cluster, *what: str) -> list[TrialResult]:
    """Results in the order of the trials."""
    results = cluster.run(act, (trial(number, each) for number, each in enumerate(what)))
    return sorted(results, key=lambda result: result.spec.number)


def test_two_trials_at_once_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    results = run(cluster, f"meet:{tmp_path}", f"meet:{tmp_path}")
    assert [result.state for result in results] == ["complete", "complete"]
    nodes = {node["node"] for node in cluster.describe()["nodes"]}
    assert {result.node for result in results} == nodes
    assert len(nodes) == len(cluster.told()) == 2


def test_each_node_loads_the_model_once(cluster: Cluster, tmp_path: Path) -> None:
    from tasks.trial import run_trial  # torch is for this test alone
    from tests.models import write_checkpoint, write_text

    model = ModelSpec(source=str(write_checkpoint("llama", tmp_path)))
    data = write_text(tmp_path / "text.txt")
    specs = [
        trial(number, "").model_copy(
            update={
                "model": model,
                "data": data,
                "calibration": CalibrationSpec(samples=2, length=16),
                "context": 16,
            }
        )
        for number in range(6)
    ]
    results = list(cluster.run(run_trial, specs))
    assert [result.cause for result in results] == [""] * 6
    loads = Counter(result.node for result in results if result.cost.cold)
    assert set(loads.values()) == {1}  # the first may have done all before the second had it


def test_workers_stay_warm(cluster: Cluster) -> None:
    cluster.stop_workers()
    results = run(cluster, *["ok"] * 6)
    trials_of = {
        pid: [r.cost.peak_memory_bytes for r in results if r.device == pid]
        for pid in {result.device for result in results}
    }
    assert len(trials_of) <= 2
    # Every trial of a process found what the ones before it had left.
    assert all(sorted(seen) == list(range(1, len(seen) + 1)) for seen in trials_of.values())
    # A worker that was still starting may have come too late for the first round.
    again = run(cluster, "ok", "ok")
    assert len(trials_of.keys() | {result.device for result in again}) <= 2


def test_killed_worker_is_replaced_and_counted(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    killed = []

    def kill() -> None:
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
        killed.append(time.monotonic())
        os.kill(int(file.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    lost, other = run(cluster, f"pid:{file}", "ok")
    killer.join()
    assert (lost.state, lost.attempts) == ("complete", 2)
    assert (other.state, other.attempts) == ("complete", 1)
    assert time.monotonic() - killed[0] < 5


def test_trial_that_always_kills_its_worker_fails(cluster: Cluster) -> None:
    lost, other = run(cluster, "exit", "ok")
    assert (lost.state, lost.attempts) == ("failed", 3)
    assert lost.cause.startswith("lost 3 times")
    assert other.state == "complete"


def test_failed_trial_says_why_and_where_and_the_others_go_on(cluster: Cluster) -> None:
    failed, *others = run(cluster, "raise", "ok", "ok")
    assert (failed.state, failed.attempts) == ("failed", 1)
    assert failed.cause.startswith("ValueError: no such layer (tests/infra/trials.py:")
    assert [other.state for other in others] == ["complete", "complete"]


def test_cuda_out_of_memory_halves_the_batch_once(cluster: Cluster) -> None:
    fits, never = run(cluster, "cuda:2", "cuda:4")
    assert (fits.state, fits.attempts, fits.losses) == ("complete", 2, [2.0])
    assert (never.state, never.attempts) == ("failed", 2)
    assert never.cause.startswith("OutOfMemoryError: CUDA out of memory")


def test_worker_with_a_broken_cuda_context_is_not_used_again(cluster: Cluster) -> None:
    warm = {result.device for result in run(cluster, "ok", "ok", "ok", "ok")}
    failed, *others = run(cluster, "broken", "ok", "ok", "ok")
    assert failed.state == "failed"
    assert len({other.device for other in others} - warm) <= 1
    assert all(other.attempts == 1 for other in others)


def test_hung_trial_is_stopped_at_its_deadline(address: str, cluster: Cluster) -> None:
    cluster._timeout_s = 1.0
    try:
        started = time.monotonic()
        hung, other = run(cluster, "sleep:60", "ok")
    finally:
        cluster._timeout_s = 0.0
    assert (hung.state, other.state) == ("failed", "complete")
    assert "trial_timeout_s=1" in hung.cause
    assert time.monotonic() - started < 30  # it would sleep for a minute


def test_worker_that_hangs_is_replaced_by_the_median_of_the_others(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pid"
    monkeypatch.setattr("infra.cluster.deadlines.SHORTEST_S", 1.0)
    results = run(cluster, *[f"pid:{file}"] * 5)  # the first of them to run sleeps for a minute
    assert [result.state for result in results] == ["complete"] * 5
    assert {result.attempts for result in results} == {1, 2}


def test_specs_are_asked_for_as_workers_come_free(cluster: Cluster) -> None:
    asked: list[int] = []

    def specs() -> Iterator[TrialSpec]:
        for number in range(5):
            asked.append(number)
            yield trial(number, "ok")

    results = cluster.run(act, specs())
    next(results)
    assert len(asked) <= 3
    assert len(list(results)) == 4


def test_leaving_early_stops_what_is_in_flight(cluster: Cluster) -> None:
    results: Any = cluster.run(act, [trial(0, "ok"), trial(1, "sleep:60"), trial(2, "ok")])
    next(results)
    results.close()
    started = time.monotonic()
    assert [result.state for result in run(cluster, "ok", "ok")] == ["complete"] * 2
    assert time.monotonic() - started < 10


def test_call_gives_the_answer_or_the_user_error(cluster: Cluster) -> None:
    assert cluster.call(environment, "OMP_NUM_THREADS") == "1"
    assert cluster.call(environment, "MLFLOW_DISABLE_TELEMETRY") == "true"
    with pytest.raises(UserError) as caught:
        cluster.call(refuse, "model.source")
    assert str(caught.value) == "model.source is missing"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", r"RuntimeError: the dense model overflows \(tests/infra/trials\.py:\d+\)"),
        ("cuda:4", r"OutOfMemoryError: CUDA out of memory \(tests/infra/trials\.py:\d+\)"),
        ("exit", "lost 3 times: ActorDiedError"),
    ],
)
def test_what_a_called_function_raises_is_said_on_one_line(
    cluster: Cluster, what: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"^measure failed: {message}$"):
        cluster.call(measure, what)


def test_a_called_function_out_of_cuda_memory_gets_half_the_batch(cluster: Cluster) -> None:
    assert cluster.call(measure, "ok") == 1
    assert cluster.call(measure, "cuda:2") == 2


def test_fetch_from_either_node(cluster: Cluster, tmp_path: Path) -> None:
    data = {"model.safetensors": os.urandom(9 * 2**20), "config.json": b"{}"}  # two pieces
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    for node in cluster.describe()["nodes"]:
        folder = tmp_path / "outbox"
        folder.mkdir()
        for name, content in data.items():
            (folder / name).write_bytes(content)
        made = TrialResult(
            spec=trial(0, "ok"),
            state="complete",
            node=node["node"],
            checkpoint=str(folder),
            checkpoint_sha256=hashes,
        )
        best = tmp_path / "run" / "best"  # the second replaces the first
        cluster.fetch(made, best)
        assert {file.name: file.read_bytes() for file in best.iterdir()} == data
        assert not folder.exists()
        assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_fetch_takes_what_a_killed_driver_had_already_moved(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Else its trial would be run again, and its file written anew."""
    (tmp_path / ".best.partial").mkdir()
    (tmp_path / ".best.partial" / "config.json").write_text("{}")
    moved = TrialResult(
        spec=trial(0, "ok"),
        state="complete",
        node=cluster.describe()["nodes"][0]["node"],
        checkpoint=str(tmp_path / "none"),
        checkpoint_sha256={"config.json": hashlib.sha256(b"{}").hexdigest()},
    )
    cluster.fetch(moved, tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_fetch_refuses_what_is_damaged_or_gone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "config.json").write_text("{]")
    best = tmp_path / "best"
    best.mkdir()
    here = cluster.describe()["nodes"]
    made = TrialResult(
        spec=trial(0, "ok"),
        state="complete",
        node=here[1]["node"],
        checkpoint=str(tmp_path / "outbox"),
        checkpoint_sha256={"config.json": hashlib.sha256(b"{}").hexdigest()},
    )
    with pytest.raises(LostCheckpointError, match="not the file that was saved"):
        cluster.fetch(made, best)
    with pytest.raises(LostCheckpointError, match="out of reach"):
        cluster.fetch(made.model_copy(update={"checkpoint": str(tmp_path / "none")}), best)
    with pytest.raises(LostCheckpointError, match="out of reach"):
        cluster.fetch(made.model_copy(update={"node": "0" * 56, "host": "elsewhere"}), best)
    assert best.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):  # no fault of the checkpoint's
        cluster.fetch(made, tmp_path / "file" / "best")


def test_fetch_after_ray_was_started_again(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "config.json").write_text("{}")
    made = TrialResult(
        spec=trial(0, "ok"),
        state="complete",
        node="0" * 56,
        host=socket.gethostname(),
        checkpoint=str(tmp_path / "outbox"),
        checkpoint_sha256={"config.json": hashlib.sha256(b"{}").hexdigest()},
    )
    cluster.fetch(made, tmp_path / "best")
    assert (tmp_path / "best" / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_code_is_shipped_to_an_existing_cluster(
    address: str, cluster: Cluster, tmp_path: Path
) -> None:
    """A driver elsewhere; the worker's `infra` is what the driver sent."""
    cluster.stop_workers()  # idle ones keep their CPUs
    code = f"""
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
from infra.cluster import connect
from infra.specs import ClusterSpec
def where():
    import infra.errors
    return infra.errors.__file__
with connect(ClusterSpec()) as cluster:
    print(cluster.call(where))
"""
    assert "py_modules_files" in subdriver(["-c", code], address, tmp_path)


@pytest.mark.slow
def test_doctor_describes_the_cluster(address: str) -> None:
    found = json.loads(subdriver(["-m", "flows.cli", "doctor", "--json"], address, CHECKOUT))
    assert [node["cpus"] for node in found["cluster"]["nodes"]] == [1, 1]
    assert found["cluster"]["parallel"] == 2


def subdriver(arguments: list[str], address: str, folder: Path) -> str:
    """What a driver of its own prints, with RAY_ADDRESS set."""
    environment = os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_port_without_ray_is_refused_soon() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with (
            pytest.raises(UserError, match="no Ray cluster answers"),
            connect(ClusterSpec(address=f"127.0.0.1:{port}")),
        ):
            pass
