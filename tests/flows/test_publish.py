"""A checkpoint that cannot be saved or fetched: what is told, what is kept, what is tried again.

python -m pytest tests/flows/test_publish.py
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.descriptions import Descriptions
from flows.dispatch_loop import Entry, drive
from flows.fetching import Writing
from flows.live import live
from flows.search import Run
from infra.cluster import LostCheckpointError
from infra.records import ModelRecord, TrialResult, TrialSpec
from infra.spec_files import parse_spec
from infra.specs import Spec
from infra.store import RunStore
from tests.flows.commands import run, write_project
from tests.infra.virtual import VirtualCluster, node

LOST = LostCheckpointError("outbox on node1 is out of reach")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Nodes(VirtualCluster):
    """A cluster whose fetches end as listed, and whose trial ends as given."""

    def __init__(self, fetches: list[OSError | None], again: TrialResult) -> None:
        super().__init__([node("a")], answer=lambda spec: again.model_copy(update={"spec": spec}))
        self.fetches = fetches

    @property
    def trials(self) -> int:
        return len(self.machines.log)

    def fetch(self, result: TrialResult, destination: Path, writing: Writing) -> None:
        if error := self.fetches.pop(0):
            raise error
        with writing():
            destination.mkdir()


class Publishing(Run):
    """A run of which only the checkpoint is left to do."""

    def trials(self) -> Iterator[TrialSpec | None]:
        self._model = yield from self.descriptions.of(self.spec)
        yield from self._publish()

    def finish(self) -> None:
        """No report: there is nothing that it could be made from."""


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    raw = {"model": {"source": "org/model"}, "data": {"source": "text.txt"}}
    return parse_spec(raw | {"run": {"dir": str(tmp_path / "run")}}, "test")


@pytest.fixture
def model() -> ModelRecord:
    return ModelRecord(
        source="org/model", architecture="Llama", dtype="float32", sha256="ab", blocks=["0"],
        matrices=[], total_params=1, context=8, adds_bos=False,
    )  # fmt: skip


@pytest.fixture
def saved(spec: Spec) -> TrialResult:
    """The final trial that left a checkpoint."""
    trial = TrialSpec(
        number=4,
        stage="final",
        model=spec.model,
        data=spec.data,
        calibration=spec.calibration,
        prune=spec.prune,
        split="report",
        windows=2,
        context=8,
        checkpoint=True,
    )
    complete = {"losses": [4.0, 5.0], "tokens": [7, 7], "weights_sha256": "ab"}
    return TrialResult(spec=trial, state="complete", checkpoint="outbox/1", **complete)


@pytest.fixture
def publish(spec: Spec, model: ModelRecord) -> Iterator[Callable[..., str]]:
    with RunStore.open(spec) as store, live(spec, 1, as_json=True) as view:

        def call(cluster: Any, result: TrialResult) -> str:
            store.write_result(result)
            descriptions = Descriptions()
            descriptions.note(spec, model)
            run = Publishing(store, spec, cluster, view, lambda *_: [], descriptions)
            drive(cluster, [Entry(lambda: run, cluster.share)])
            return run._problem

        yield call


def test_a_full_disk_does_not_repeat_the_trial(
    publish: Callable[..., str], saved: TrialResult
) -> None:
    nodes = Nodes([FULL], saved)
    problem = publish(nodes, saved)
    assert "run/best: No space left on device; results are kept" in problem
    assert nodes.trials == 0


def test_a_lost_checkpoint_is_made_again_and_remembered(
    publish: Callable[..., str], saved: TrialResult, spec: Spec
) -> None:
    nodes = Nodes([LOST, None], saved.model_copy(update={"checkpoint": "outbox/2"}))
    assert publish(nodes, saved) == ""
    assert nodes.trials == 1
    store = RunStore.read(spec.run.dir)
    assert store.path("best").is_dir()
    assert store.result(4).checkpoint == "outbox/2"
    assert "checkpoint" in [event["event"] for event in store.events()]


def test_a_checkpoint_that_was_damaged_afterwards_is_named_and_left_alone(
    publish: Callable[..., str], saved: TrialResult, spec: Spec
) -> None:
    hashes = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    saved = saved.model_copy(update={"checkpoint_sha256": hashes})
    best = Path(spec.run.dir) / "best"
    best.mkdir()
    weights = best / "model.safetensors"
    weights.write_bytes(b"weights")
    assert publish(Nodes([], saved), saved) == ""
    weights.write_bytes(b"")
    problem = publish(nodes := Nodes([], saved), saved)
    assert problem == (
        f"{weights} is not the file that was saved: move {best} away, and the same command makes "
        "it again"
    )
    assert nodes.trials == 0 and weights.read_bytes() == b""


@pytest.mark.parametrize("second", [LOST, FULL])
def test_a_checkpoint_that_cannot_be_fetched_twice_is_told(
    publish: Callable[..., str], saved: TrialResult, second: OSError
) -> None:
    nodes = Nodes([LOST, second], saved)
    assert (second.strerror or str(second)) in publish(nodes, saved)
    assert nodes.trials == 1


def test_a_trial_that_fails_the_second_time_is_told(
    publish: Callable[..., str], saved: TrialResult, spec: Spec
) -> None:
    again = TrialResult(spec=saved.spec, state="failed", cause="cannot write")
    assert "trial 4 failed, cannot write" in publish(Nodes([LOST], again), saved)
    assert RunStore.read(spec.run.dir).result(4) == saved  # a finished trial stays finished


def test_without_checkpoint_or_storage_results_stay_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    spec, cache = write_project(tmp_path), tmp_path / "cache"
    cache.mkdir()
    (cache / "outbox").touch()
    options = ("search.scouts=1", "evaluation.calibration_seeds=2", "--json")
    storage = "search.storage=sqlite:////proc/none/optuna.db"
    done = run("search", spec, storage, *options, cache=cache)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "no checkpoint in" in done.stderr and "failed, cannot write a checkpoint" in done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["gain"]["n_seeds"] == 1
    events = [json.loads(line) for line in done.stdout.splitlines()]
    told = [event for event in events if event["kind"] == "storage"]
    assert "Optuna storage sqlite:////proc/none/optuna.db cannot be" in told[-1]["problem"]
    assert told[-1]["untold"] == 1

    (cache / "outbox").unlink()
    done = run("search", spec, *options, cache=cache)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best" / "README.md").is_file()
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["state"] for event in events if event["kind"] == "trial"] == ["complete"]
    assert not [event for event in events if event["kind"] == "storage"]
