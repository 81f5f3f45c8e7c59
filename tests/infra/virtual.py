"""Simulated machines: workers that take their time on a clock that nobody waits for.

    cluster = VirtualCluster([node("a", cpus=8, gpus=8)], seconds=lambda spec: 90.0)
    for result in cluster.dispatch(run_trial, source):   # the real dispatch loop

A worker that is asked for beyond what a node holds is an error here; Ray would let it wait.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from infra.cluster import Node, Outcome, Pool, Share, Source, TrialFunction, dispatch
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec, ModelSpec


def node(name: str, cpus: float = 1, gpus: float = 0, **labels: str) -> Node:
    """A machine with 100 GB."""
    return Node(node=name, host=name, cpus=cpus, gpus=gpus, memory_bytes=100 * 10**9, labels=labels)


def answered(spec: TrialSpec) -> TrialResult:
    """A result without content."""
    return TrialResult(spec=spec, state="complete", losses=[1.0], tokens=[1])


class VirtualWorker:
    """A process on a node; `place` is empty while it waits for one."""

    def __init__(self, share: Share, place: str, ready: float) -> None:
        self.share, self.place, self.ready = share, place, ready
        self.alive = True
        self.lost = False  # with its node
        self.model: ModelSpec | None = None


class VirtualMachines:
    """See infra.cluster.machines.Machines."""

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        seconds: Callable[[TrialSpec], float] = lambda spec: 60.0,
        answer: Callable[[TrialSpec], TrialResult] = answered,
        start_s: float = 0.0,
        load_s: float = 0.0,
        grows: Callable[[Share], Node | None] | None = None,
        changes: Sequence[tuple[float, str | Node]] = (),
    ) -> None:
        """Of `changes`, a name is a node that goes at that moment, a Node one that comes."""
        self._changes = sorted(changes, key=lambda change: change[0])
        self._nodes = {each.node: each for each in nodes}
        self.seconds, self.answer, self.start_s, self.load_s = seconds, answer, start_s, load_s
        self.grow = grows
        self.clock = 0.0
        self.log: list[tuple[float, str, TrialSpec]] = []  # when, where, what
        self.loads = 0
        self.busy_s = 0.0  # GPU-seconds, else CPU-seconds
        self._results: dict[int, TrialResult] = {}
        self._events: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        self._done: set[int] = set()
        self._worker_of: dict[int, VirtualWorker] = {}  # by event
        self._starting: dict[int, VirtualWorker] = {}
        self._sent_to: dict[int, VirtualWorker] = {}  # trials
        self._workers: set[VirtualWorker] = set()

    def now(self) -> float:
        """Of the clock that only `wait` moves."""
        return self.clock

    def nodes(self) -> list[Node]:
        """All of them."""
        return list(self._nodes.values())

    def grows(self) -> bool:
        """Whether nodes are added for workers that wait."""
        return self.grow is not None

    def free(self, name: str) -> tuple[float, float, float]:
        """CPUs, GPUs and memory that no worker holds."""
        there = self._nodes[name]
        here = [w.share for w in self._workers if w.place == name]
        return (
            there.cpus - sum(share.cpus for share in here),
            there.gpus - sum(share.gpus for share in here),
            there.memory_bytes - sum(share.memory_bytes for share in here),
        )

    def start(self, share: Share, node: str) -> VirtualWorker:
        """A worker on that node, or on one that is added for it."""
        ready = self.clock + self.start_s
        if not node and self.grow is not None and (added := self.grow(share)):
            self._nodes[added.node] = added
            node, ready = added.node, ready + 300.0
        worker = VirtualWorker(share, node, ready if node else math.inf)
        self._workers.add(worker)
        if node:
            assert min(self.free(node)) > -1e-6, f"{node} cannot hold {share}"
        return worker

    def ready(self, worker: VirtualWorker) -> int:
        """Fires when it has started."""
        number = next(self._numbers)
        heapq.heappush(self._events, (worker.ready, number))
        self._worker_of[number] = worker
        self._starting[number] = worker
        return number

    def started(self, reference: int) -> tuple[str, str]:
        """Its node."""
        self._done.remove(reference)
        worker = self._starting.pop(reference)
        return ("", "the worker died") if worker.lost else (worker.place, "")

    def send(
        self,
        worker: VirtualWorker,
        function: TrialFunction,
        spec: TrialSpec,
        batch_divisor: int,
        node: str,
    ) -> int:
        """Begin a trial."""
        number = next(self._numbers)
        takes = self.seconds(spec)
        if worker.model != spec.model:
            worker.model, takes = spec.model, takes + self.load_s
            self.loads += 1
        self.log.append((self.clock, node, spec))
        self.busy_s += takes * worker.share.weight
        self._results[number] = self.answer(spec)
        heapq.heappush(self._events, (self.clock + takes, number))
        self._worker_of[number] = worker
        self._sent_to[number] = worker
        return number

    def wait(self, references: Sequence[int], timeout_s: float) -> list[int]:
        """Those that are done; else move the clock to the first that is, or by the timeout."""
        if done := [each for each in references if each in self._done]:
            return done
        end = self.clock + timeout_s
        first = min(end, self._events[0][0]) if self._events else end
        while self._changes and self._changes[0][0] <= first:
            self._change(*self._changes.pop(0))
        while self._events and (self._events[0][0] <= end or timeout_s == math.inf):
            when, number = heapq.heappop(self._events)
            if not self._worker_of.pop(number).alive:
                continue
            self.clock = max(self.clock, when)
            self._done.add(number)
            return [number]
        assert timeout_s < math.inf, "nothing will ever end"
        self.clock = end
        return []

    def _change(self, when: float, what: str | Node) -> None:
        """A node comes, or it goes with its workers, and what waits for them hears of it."""
        self.clock = max(self.clock, when)
        if isinstance(what, Node):
            self._nodes[what.node] = what
        else:
            del self._nodes[what]
        events = self._events
        for index, (_, number) in enumerate(events):
            worker = self._worker_of[number]
            if worker.place == what:
                worker.lost = True
                events[index] = (self.clock, number)
            elif isinstance(what, Node) and worker.alive and not worker.place:
                left = zip(self.free(what.node), worker.share.needs, strict=True)
                if all(free >= needed for free, needed in left):
                    worker.place = what.node
                    events[index] = (self.clock + self.start_s, number)
        heapq.heapify(events)
        for worker in self._workers:
            worker.lost = worker.lost or worker.place == what

    def outcome(self, reference: int) -> Outcome:
        """A result, unless the node was lost."""
        self._done.remove(reference)
        if self._sent_to.pop(reference).lost:
            return Outcome("lost", cause="the node died")
        return Outcome("done", self._results.pop(reference))

    def dead(self, workers: Sequence[VirtualWorker]) -> list[Any]:
        """Those whose node is gone."""
        return [worker for worker in workers if worker.lost]

    def stop(self, worker: VirtualWorker) -> None:
        """Its room is free at once."""
        worker.alive = False
        self._workers.discard(worker)


class VirtualCluster:
    """The real pool and the real dispatch loop over simulated machines."""

    def __init__(
        self, nodes: Sequence[Node], spec: ClusterSpec | None = None, **options: Any
    ) -> None:
        self.machines = VirtualMachines(nodes, **options)
        self.pool = Pool(self.machines, spec or ClusterSpec())

    @property
    def share(self) -> Share:
        """What a trial of the cluster's own spec gets."""
        return self.pool.share

    def share_of(self, spec: ClusterSpec) -> Share:
        """What a trial of another spec gets."""
        return self.pool.share_of(spec)

    def now(self) -> float:
        """The simulated time."""
        return self.machines.now()

    def dispatch(self, function: TrialFunction, source: Source) -> Iterator[TrialResult]:
        """As `Cluster.dispatch`."""
        return dispatch(self.pool, function, source)
