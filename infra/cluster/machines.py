"""What a pool asks of the machines that its workers run on, and how a dispatch to one may end.

machines: Machines = RayMachines()  # a cluster; tests/infra/virtual.py has a simulated one
machines.outcome(reference).kind    # "done", "lost"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from infra.cluster.resources import Node, Share
from infra.cluster.worker import TrialFunction
from infra.records import TrialResult, TrialSpec
from infra.specs import ModelSpec

Ending = Literal["done", "cuda-out-of-memory", "broken", "host-out-of-memory", "lost", "unsent"]


@dataclass(frozen=True)
class Outcome:
    """How a dispatch ended; there is a result where the worker could still answer."""

    kind: Ending
    result: TrialResult | None = None
    cause: str = ""


class Machines(Protocol):
    """Where worker processes live; see ray_machines.RayMachines for what each is to do."""

    def now(self) -> float: ...
    def nodes(self) -> list[Node]: ...
    def grows(self) -> bool: ...
    def start(self, share: Share, node: str) -> Any: ...
    def ready(self, worker: Any) -> Any: ...
    def started(self, reference: Any) -> tuple[str, str]: ...
    def send(
        self, worker: Any, function: TrialFunction, spec: TrialSpec, batch_divisor: int, node: str
    ) -> Any: ...
    def wait(self, references: Sequence[Any], timeout_s: float) -> list[Any]: ...
    def outcome(self, reference: Any) -> Outcome: ...
    def dead(self, workers: Sequence[Any]) -> list[Any]: ...
    def stop(self, worker: Any) -> None: ...


@dataclass(eq=False)
class Slot:
    """A worker as the driver sees it."""

    worker: Any
    share: Share
    starting: Any  # resolves to the id of its node
    place: str  # the node that it takes room on; empty while that is for the cluster to find
    node: str = ""  # empty until it has started
    busy: bool = False
    model: ModelSpec | None = None  # of its last trial
