"""Checkpoints on their way into a run while the loop goes on with others.

python -m pytest tests/flows/test_fetching.py
"""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flows.dispatch_loop import FAIR, IN_TURN, Order, Step, drive
from flows.fetching import Fetching, FetchStoppedError, Writing
from infra.cluster import transfer
from infra.errors import UserError
from infra.records import TrialResult
from infra.store import RunStore
from tests.flows.test_dispatch_loop import Many, entry
from tests.flows.test_plan import make_spec
from tests.infra.trials import trial
from tests.infra.virtual import VirtualCluster, node

DONE = TrialResult(spec=trial(0, "m"), state="complete")


class Fetches(Many):
    """A run without trials that waits for something outside the loop."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 0)
        self.awaited: Future[None] = Future()

    def trials(self) -> Iterator[Step]:
        yield self.awaited
        self.awaited.result()


class Frees(Many):
    """A run whose end is what the other waits for."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        super().__init__(name, 8)
        self.then = then

    def finish(self) -> None:
        super().finish()
        self.then()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("order", [IN_TURN, FAIR])
def test_trials_of_others_run_while_a_checkpoint_travels(order: Order) -> None:
    """On a single worker: a loop that waited for it would never end."""
    fetches = Fetches("a")
    other = Frees("b", lambda: fetches.awaited.set_result(None))
    cluster = VirtualCluster([node("n", cpus=1, gpus=1)])
    drive(cluster, [entry(fetches), entry(other)], order=order)
    assert (fetches.end, other.end, len(other.taken)) == ("finished", "finished", 8)


@pytest.mark.timeout(30)
def test_the_last_checkpoint_is_waited_for(tmp_path: Path) -> None:
    """Though no trial is out, and none is left; its error is that of its run alone."""
    runs = [Fetches("a"), Fetches("b")]
    timer = threading.Timer(0.2, runs[0].awaited.set_result, [None])
    runs[1].awaited.set_exception(UserError("the disk is full"))
    timer.start()
    cluster = VirtualCluster([node("n", cpus=1, gpus=1)])
    assert drive(cluster, [entry(run) for run in runs], keep_going=True) == ""
    assert [run.end for run in runs] == ["finished", "stopped: the disk is full"]


def test_nothing_is_written_once_the_run_has_ended(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fetch(result: TrialResult, destination: Path, writing: Writing) -> None:
        with writing():
            (destination / "first").touch()
        begun.set()
        go_on.wait(10)
        with writing():
            (destination / "second").touch()

    fetching = Fetching(fetch, DONE, tmp_path, lambda: None)
    assert begun.wait(10)
    fetching.stop()
    go_on.set()
    with pytest.raises(FetchStoppedError):
        fetching.ended.result(10)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_run_that_was_taken_over_is_not_written(tmp_path: Path) -> None:
    with RunStore.open(make_spec(run={"dir": str(tmp_path / "run")})) as store:
        (tmp_path / "run" / "lock").write_text("another's")

        def fetch(result: TrialResult, destination: Path, writing: Writing) -> None:
            with writing():
                destination.mkdir()

        fetching = Fetching(fetch, DONE, store.path("best"), store.check_owner)
        with pytest.raises(UserError, match="was taken over by"):
            fetching.ended.result(10)
        assert not store.path("best").exists()


@pytest.mark.parametrize("across", [False, True])
def test_a_checkpoint_of_this_node_is_renamed_or_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool
) -> None:
    """Copied where the run is on another file system, each piece as a write of its own."""
    made, rename = tmp_path / "made", Path.rename
    made.mkdir()
    content = os.urandom(3 * 2**20)
    (made / "model.safetensors").write_bytes(content)

    def refuse(path: Path, target: Path) -> Path:
        if across and path == made:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("infra.cluster.worker.CHUNK_BYTES", 2**20)
    monkeypatch.setattr(transfer, "_node_now", lambda result, own: own)
    here: Any = type("Here", (), {"get_node_id": lambda self: "here"})
    monkeypatch.setattr(transfer.ray, "get_runtime_context", here)
    writes = []

    def writing() -> Any:
        writes.append(1)
        return nullcontext()

    hashes = {"model.safetensors": hashlib.sha256(content).hexdigest()}
    saved = DONE.model_copy(update={"checkpoint": str(made), "checkpoint_sha256": hashes})
    transfer.fetch(saved, tmp_path / "run" / "best", writing)
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == content
    assert not made.exists()
    assert (len(writes) > 6) == across
