"""The workers of one driver: started where there is room, kept warm, replaced when lost.

pool = Pool(RayMachines(), ClusterSpec(parallel=2))
if pool.fits(share):
    pool.claim(share)  # a worker is idle, or one starts; where one of another share idles, it goes

What a trial needs, its share of a node, decides which workers can run it. Ray is not imported here:
`Machines` are a cluster, or a simulated one with a clock of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from infra.cluster.resources import Node, Share, capacity, decide_share
from infra.cluster.worker import TrialFunction
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec, ModelSpec

MAX_FAILED_STARTS = 3
ROUNDING = 1e-6  # of a third of a GPU, taken three times
LOOK_S = 1.0  # how old what is known of the nodes may be

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


class Pool:
    """The workers, the room that they leave, and how many of them may be at work."""

    def __init__(self, machines: Machines, spec: ClusterSpec, *, only: str = "") -> None:
        """With `only`, all of them are on that node."""
        self.machines, self._only = machines, only
        self._spec = spec
        self._nodes: dict[str, Node] = {}
        self._looked = -math.inf
        self.share = self.share_of(spec)
        self.limit = spec.parallel or math.inf
        self.slots: list[Slot] = []
        self.wanted: set[Share] = set()  # that found no room since this was last emptied
        self._claims: Counter[Share] = Counter()  # trials that wait for a worker
        self._held: tuple[str, Share] | None = None
        self._failed_starts = 0

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes that are there, by id."""
        if (now := self.machines.now()) - self._looked >= LOOK_S:
            found = self.machines.nodes()
            self._nodes = {n.node: n for n in found if not self._only or n.node == self._only}
            self._looked = now
        return self._nodes

    @property
    def parallel(self) -> int:
        """As many as asked for, else as the nodes that are there now hold."""
        return self._spec.parallel or max(1, capacity(self.share, list(self.nodes.values())))

    def share_of(self, spec: ClusterSpec) -> Share:
        """What a trial of a spec gets; raises UserError where no node could ever hold it."""
        nodes = list(self.nodes.values())
        return decide_share(spec, nodes, grows=not self._only and self.machines.grows())

    def fits(self, share: Share) -> bool:
        """Whether a trial of that share can begin now; if not, that it would is remembered."""
        found = self._spare(share) > 0 or self._place(share) is not None
        if not found:
            self.wanted.add(share)
        return found

    def is_warm(self, share: Share, model: ModelSpec) -> bool:
        """Whether a worker that is free for it has the model already."""
        return any(slot.model == model for slot in self.idle(share))

    def hold(self, share: Share) -> None:
        """Let no other share have the node that can make room for this one soonest.

        Without it, small trials would take every bit of room that a large one waits for.
        """
        able = {name for name, node in self.nodes.items() if capacity(share, [node])}
        taken = dict.fromkeys(able, 0.0)
        for slot in self.slots:
            if slot.busy and slot.place in able:
                taken[slot.place] += slot.share.weight / (self.nodes[slot.place].gpus or 1)
        if able:
            self._held = min(sorted(able), key=taken.__getitem__), share

    def release(self) -> None:
        """Begin anew with what is held and wanted; workers asked for in vain are given up."""
        for slot in [s for s in self.slots if not s.place and s.share not in self.wanted]:
            if not self._claims[slot.share]:
                self.stop(slot)
        self._held = None
        self.wanted.clear()
        for slot in self.slots:  # a node that has come since is for those that waited for it
            if not slot.place and (found := self._place(slot.share, new=0)) and not found[1]:
                slot.place = found[0]

    def claim(self, share: Share) -> None:
        """A trial waits for a worker of that share: see that there is one, or that one starts."""
        self._claims[share] += 1
        self.provide()

    def provide(self) -> None:
        """Start a worker for every trial that waits, where there is room, and where there may be
        some day for the shares that found none."""
        for share in [share for share, claims in self._claims.items() if claims]:
            while self._spare(share) < 0:
                if (placed := self._place(share)) is None:
                    self.wanted.add(share)
                    break
                node, idle = placed
                for slot in idle:
                    self.stop(slot)
                self._start(share, node)
        for share in self.wanted:
            here = capacity(share, list(self.nodes.values()))
            mine = [slot for slot in self.slots if slot.share == share]
            coming = sum(not slot.place for slot in mine)
            may = not here or self.machines.grows()
            if may and len(self.slots) < self.limit and coming < max(1, len(mine) - coming):
                self._start(share, "")

    def take(self, share: Share, model: ModelSpec) -> Slot | None:
        """An idle worker for a trial that waits, now busy; one that has the model, if any."""
        idle = self.idle(share)
        if not idle:
            return None
        slot = next((slot for slot in idle if slot.model == model), idle[0])
        slot.busy, slot.model = True, model
        self._claims[share] -= 1
        return slot

    def idle(self, share: Share) -> list[Slot]:
        """Workers of that share that a trial can be sent to."""
        return [s for s in self.slots if s.node and not s.busy and s.share == share]

    def started(self, slot: Slot) -> None:
        """Wait until a worker has started.

        Raises UserError when several in a row could not, which is a node without our dependencies.
        """
        slot.node, problem = self.machines.started(slot.starting)
        slot.place = slot.node
        if not problem:
            self._failed_starts = 0
            return
        self.stop(slot)
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise UserError(f"no worker starts on the cluster: {problem}")

    def any(self, share: Share) -> Slot:
        """A started worker of that share: an idle one, a new one, else one that is at work."""
        while True:
            mine = [slot for slot in self.slots if slot.share == share and slot.place]
            if idle := self.idle(share):
                return idle[0]
            placed = self._place(share)
            if placed is not None:
                for slot in placed[1]:
                    self.stop(slot)
                slot = self._start(share, placed[0])
            else:
                slot = mine[0] if mine else self._start(share, "")
            if not slot.node:
                self.started(slot)
            if slot.node:
                return slot

    def stop(self, slot: Slot) -> None:
        """Stop a worker, whatever it is doing."""
        if slot in self.slots:
            self.slots.remove(slot)
            self.machines.stop(slot.worker)

    def stop_all(self) -> None:
        """Stop every worker."""
        for slot in list(self.slots):
            self.stop(slot)

    def forget_claims(self) -> None:
        """No trial waits any more."""
        self._claims.clear()

    def drop_dead_workers(self) -> None:
        """So that a lost node costs a trial one dispatch, not one for each worker it had."""
        self._looked = -math.inf
        idle = [slot for slot in self.slots if slot.node and not slot.busy]
        dead = self.machines.dead([slot.worker for slot in idle])
        for slot in [slot for slot in idle if slot.worker in dead]:
            self.stop(slot)

    def _start(self, share: Share, place: str) -> Slot:
        worker = self.machines.start(share, place)
        self.slots.append(Slot(worker, share, self.machines.ready(worker), place))
        return self.slots[-1]

    def _spare(self, share: Share) -> int:
        """Workers of that share, starting ones included, that no trial waits for."""
        held = self._held and self._held[1] != share and self._held[0]
        free = sum(
            not slot.busy and slot.place not in ("", held)
            for slot in self.slots
            if slot.share == share
        )
        return free - self._claims[share]

    def _place(self, share: Share, *, new: int = 1) -> tuple[str, list[Slot]] | None:
        """A node with room for one more worker, and the idle ones of other shares that go for it.

        Of several the one with the most room, so that trials spread; with workers of different
        shares the one with the least, so that large ones find a node.
        """
        held = self._held and self._held[1] != share and self._held[0]
        room = {
            name: [node.cpus, node.gpus, node.memory_bytes]
            for name, node in self.nodes.items()
            if name != held and share.admits(node)
        }
        surplus = {other: self._spare(other) for other in {slot.share for slot in self.slots}}
        idle: dict[str, list[Slot]] = {}
        for slot in self.slots:
            if slot.place in room:
                room[slot.place] = _less(room[slot.place], slot.share)
            if slot.node and not slot.busy and slot.share != share and surplus[slot.share] > 0:
                surplus[slot.share] -= 1
                idle.setdefault(slot.node, []).append(slot)
        over = max(0.0, len(self.slots) + new - self.limit)  # workers that must go for any new one
        best: tuple[tuple[float, ...], str, list[Slot]] | None = None
        sign = -1 if all(slot.share == share for slot in self.slots) else 1
        for name, free in room.items():
            going, left = list[Slot](), _less(free, share)
            for slot in idle.get(name, []):
                if min(left) >= -ROUNDING:
                    break
                going.append(slot)
                left = _less(left, slot.share, -1)
            if min(left) < -ROUNDING:
                continue
            rank = (len(going), sign * left[1], sign * left[0])
            if best is None or rank < best[0]:
                best = (rank, name, going)
        if best is None:
            return None
        going = best[2]
        going += [s for slots in idle.values() for s in slots if s not in going][: int(over)]
        return (best[1], going) if len(going) >= over else None


def _less(room: Sequence[float], share: Share, times: int = 1) -> list[float]:
    """CPUs, GPUs and memory without those of a worker, which takes a CPU if nothing else."""
    cpus = share.cpus if share.cpus or share.gpus or share.memory_bytes else 1.0
    taken = (cpus, share.gpus, share.memory_bytes)
    return [have - times * part for have, part in zip(room, taken, strict=True)]
