"""A trial that the host had no memory for, in the real dispatch loop over a stand-in for Ray.

python -m pytest tests/infra/test_host_memory.py
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from infra.cluster import dispatch as loop
from infra.records import TrialResult, TrialSpec
from tests.infra.trials import act, trial


@dataclass(eq=False)
class Answer:
    """What a dispatch returns at once."""

    spec: TrialSpec
    others: int


class Workers:
    """Two, on a node where the trials that `never` or `alone` name need all memory."""

    parallel = 2

    def __init__(self) -> None:
        self.slots: list[Any] = []
        self.beside: list[tuple[int, int]] = []  # trial, other workers at its dispatch

    def idle(self) -> list[Any]:
        return [slot for slot in self.slots if slot.node and not slot.busy]

    def start(self) -> None:
        actor = SimpleNamespace(trial=SimpleNamespace(remote=self.send))
        slot = SimpleNamespace(actor=actor, starting=object(), node="", busy=False, model=None)
        self.slots.append(slot)

    def started(self, slot: Any) -> None:
        slot.node = "n"

    def stop(self, slot: Any) -> None:
        if slot in self.slots:
            self.slots.remove(slot)

    def drop_dead_workers(self) -> None:
        pass

    def send(self, function: object, spec: TrialSpec, divisor: int, node: str) -> Any:
        self.beside.append((spec.number, len(self.slots) - 1))
        return Answer(spec, len(self.slots) - 1)

    def wait(self, refs: list[Any], timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    def get(self, ref: Any) -> tuple[str, TrialResult]:
        what = ref.spec.model.source
        if what == "never" or (what == "alone" and ref.others):
            raise OutOfMemoryError("killed by the memory monitor\nmore")
        return "done", TrialResult(spec=ref.spec, state="complete")


def test_it_is_run_once_more_with_nothing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: Any = Workers()
    monkeypatch.setattr(loop, "ray", workers)
    what = ["ok", "alone", "ok", "never", "ok"]
    specs = [trial(number, each) for number, each in enumerate(what)]
    results = {r.spec.number: r for r in loop.dispatch(workers, act, specs, timeout_s=0)}
    states = [results[number].state for number in range(5)]
    assert states == ["complete", "complete", "complete", "failed", "complete"]
    assert results[3].cause == "OutOfMemoryError: killed by the memory monitor"
    assert [results[number].attempts for number in range(5)] == [1, 2, 1, 2, 1]
    again = {number: others for number, others in workers.beside if number in (1, 3)}
    assert again == {1: 0, 3: 0}  # the last dispatch of each
