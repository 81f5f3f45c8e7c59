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

from infra.cluster.machines import Machines, Slot
from infra.cluster.resources import Node, Share, capacity, decide_share
from infra.errors import UserError
from infra.specs import ClusterSpec, ModelSpec

MAX_FAILED_STARTS = 3
ROUNDING = 1e-6  # of a third of a GPU, taken three times
HELD_NODES = 8  # one in so many is held for large trials at most
NO_NODE_S = 900.0  # how long trials wait for one where no autoscaler is to add it
LOOK_S = 1.0  # how old what is known of the nodes may be


class Pool:
    """The workers, the room that they leave, and how many of them may be at work."""

    def __init__(self, machines: Machines, spec: ClusterSpec, *, only: str = "") -> None:
        """With `only`, all of them are on that node."""
        self.machines, self._only = machines, only
        self._spec = spec
        self._nodes: dict[str, Node] = {}
        self._looked = -math.inf
        self._able_of: dict[Share, set[str]] = {}
        self.share = self.share_of(spec)
        self.limit = spec.parallel or math.inf
        self.slots: list[Slot] = []
        self.patience_s = math.inf if machines.grows() else NO_NODE_S
        self._unheld: dict[Share, float] = {}  # since when no node holds one
        self.wanted: set[Share] = set()  # that found no room since this was last emptied
        self._claims: Counter[Share] = Counter()  # trials that wait for a worker
        self._on: dict[str, set[Slot]] = {}  # workers by the node that they take room on
        self._taken: dict[str, list[float]] = {}  # CPUs, GPUs and memory, by node
        self._free: Counter[Share] = Counter()  # workers with a place and without a trial
        self._idle: dict[Share, dict[Slot, None]] = {}  # those of them that have started
        self.held: dict[str, Share] = {}  # nodes that are kept for one share
        self.emptied = ""  # the node that is kept for one trial
        self._failed_starts = 0

    @property
    def nodes(self) -> dict[str, Node]:
        """Those that are there, by id."""
        if (now := self.machines.now()) - self._looked >= LOOK_S:
            found = self.machines.nodes()
            self._nodes = {n.node: n for n in found if not self._only or n.node == self._only}
            self._looked = now
            self._able_of.clear()
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

    def unheld_s(self, share: Share) -> float:
        """For how long no node that is there could hold one, were it empty, as far as asked."""
        if self._able(share):
            self._unheld.pop(share, None)
            return 0.0
        return self.machines.now() - self._unheld.setdefault(share, self.machines.now())

    def give_up(self, share: Share) -> None:
        """A trial that has claimed a worker waits no more."""
        self._claims[share] -= 1

    def is_warm(self, share: Share, model: ModelSpec) -> bool:
        """Whether a worker that is free for it has the model already."""
        return any(slot.model == model for slot in self.idle(share))

    def hold(self, share: Share) -> bool:
        """Let no other share have the node that can make room for this one soonest; whether one
        was left to hold. Without it, small trials would take all room that a large one waits for.
        """
        if len(self.held) >= max(1, len(self._nodes) // HELD_NODES):
            return False
        name = self._least_busy(self._able(share) - self.held.keys() - {self.emptied})
        if name:
            self.held[name] = share
        return bool(name)

    def release(self) -> None:
        """Begin anew with what is wanted; workers asked for in vain are given up."""
        for slot in [s for s in self.slots if not s.place and s.share not in self.wanted]:
            if not self._claims[slot.share]:
                self.stop(slot)
        self.wanted.clear()
        for slot in self.slots:  # a node that has come since is for those that waited for it
            if not slot.place and (found := self._place(slot.share, new=0)) and not found[1]:
                self._put(slot, found[0])

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
            if self._able(share) and not self.machines.grows():
                continue
            mine = [slot for slot in self.slots if slot.share == share]
            coming = sum(not slot.place for slot in mine)
            if len(self.slots) < self.limit and coming < max(1, len(mine) - coming):
                self._start(share, "")

    def take(self, share: Share, model: ModelSpec) -> Slot | None:
        """An idle worker for a trial that waits, now busy; one that has the model, if any."""
        idle = self.idle(share)
        if not idle:
            return None
        slot = next((slot for slot in idle if slot.model == model), idle[0])
        slot.busy, slot.model = True, model
        del self._idle[share][slot]
        self._claims[share] -= 1
        self._free[share] -= 1
        return slot

    def take_alone(self, share: Share, model: ModelSpec) -> Slot | None:
        """As `take`, on a node with nothing else of ours, not even idle workers, which hold memory;
        none while one is emptied. Claims are not for it. One at a time, until `emptied` is reset.
        """
        if self.emptied not in self.nodes:
            self.emptied = self._least_busy(self._able(share))
        here = list(self._on.get(self.emptied, ()))
        if not self._able(share):
            self.wanted.add(share)
        if self.emptied not in self._able(share) or any(slot.busy for slot in here):
            return None
        mine = next((slot for slot in here if slot.share == share), None)
        for other in [slot for slot in here if slot is not mine]:
            self.stop(other)
        mine = mine or self._start(share, self.emptied)
        if not mine.node:
            return None
        mine.busy, mine.model = True, model
        del self._idle[share][mine]
        self._free[share] -= 1
        return mine

    def ended(self, slot: Slot) -> None:
        """Its trial has."""
        slot.busy = False
        self._free[slot.share] += 1
        self._idle.setdefault(slot.share, {})[slot] = None

    def idle(self, share: Share) -> list[Slot]:
        """Workers of that share that a trial can be sent to."""
        return [slot for slot in self._idle.get(share, ()) if slot.place != self.emptied]

    def started(self, slot: Slot) -> None:
        """Wait until a worker has started.

        Raises UserError when several in a row could not, which is a node without our dependencies,
        or none is left with the driver's versions.
        """
        place = slot.place
        slot.node, problem = self.machines.started(slot.starting)
        if slot.node != place:
            self._put(slot, slot.node)
        if not problem:
            self._idle.setdefault(slot.share, {})[slot] = None
            self._failed_starts = 0
            return
        self.stop(slot)
        self._looked, refused, slot.node = -math.inf, bool(slot.node), ""
        gone = bool(place) and place not in self.nodes
        if not (refused or gone):  # neither of which is tried again
            self._failed_starts += 1
        none_left = refused and not self._able(slot.share) and not self.machines.grows()
        if none_left or self._failed_starts == MAX_FAILED_STARTS:
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
            self._put(slot, "")
            self._idle.get(slot.share, {}).pop(slot, None)
            self.slots.remove(slot)
            self.machines.stop(slot.worker)

    def stop_all(self) -> None:
        """Stop every worker."""
        for slot in list(self.slots):
            self.stop(slot)

    def forget_claims(self) -> None:
        """No trial waits any more."""
        self._claims.clear()
        self.emptied = ""

    def drop_dead_workers(self) -> None:
        """So that a lost node costs a trial one dispatch, not one for each worker it had."""
        self._looked = -math.inf
        idle = [slot for slot in self.slots if slot.node and not slot.busy]
        dead = self.machines.dead([slot.worker for slot in idle])
        for slot in [slot for slot in idle if slot.worker in dead]:
            self.stop(slot)

    def _start(self, share: Share, place: str) -> Slot:
        worker = self.machines.start(share, place)
        self.slots.append(Slot(worker, share, self.machines.ready(worker), ""))
        self._put(self.slots[-1], place)
        return self.slots[-1]

    def _able(self, share: Share) -> set[str]:
        """The nodes that are there and could hold one, were they empty."""
        nodes = self.nodes
        if share not in self._able_of:
            able = {name for name, node in nodes.items() if capacity(share, [node])}
            self._able_of[share] = able
        return self._able_of[share]

    def _least_busy(self, names: set[str]) -> str:
        """Of these nodes, the one that can be made free soonest; empty if there is none."""

        def busy(name: str) -> float:
            weights = sum(slot.share.weight for slot in self._on.get(name, ()) if slot.busy)
            return weights / (self._nodes[name].gpus or 1)

        return min(sorted(names), key=busy, default="")

    def _put(self, slot: Slot, place: str) -> None:
        """Move what a worker takes from one node's account to another's; empty is none's."""
        for name, sign in ((slot.place, -1), (place, 1)):
            if name:
                old = self._taken.get(name, [0.0, 0.0, 0.0])
                needs = slot.share.needs
                self._taken[name] = [a + sign * b for a, b in zip(old, needs, strict=True)]
                here = self._on.setdefault(name, set())
                (here.add if sign > 0 else here.discard)(slot)
                self._free[slot.share] += sign * (not slot.busy)
        slot.place = place

    def _spare(self, share: Share) -> int:
        """Workers of that share, starting ones included, that no trial waits for."""
        free = self._free[share] - self._claims[share]
        for name, other in {**self.held, self.emptied: None}.items():
            if other != share:
                held = self._on.get(name, ())
                free -= sum(not slot.busy and slot.share == share for slot in held)
        return free

    def _place(self, share: Share, *, new: int = 1) -> tuple[str, list[Slot]] | None:
        """A node with room for one more worker, and the idle ones of other shares that go for it.

        The node with the most room, so that trials spread; with workers of different shares the
        one with the least, so that large ones find a node.
        """
        cpus, gpus, memory = share.needs
        room: dict[str, tuple[float, float, float]] = {}  # that a worker would leave
        for name in self._able(share):
            if self.held.get(name, share) == share and name != self.emptied:
                node = self._nodes[name]
                taken = self._taken.get(name, (0.0, 0.0, 0.0))
                room[name] = (
                    node.cpus - taken[0] - cpus,
                    node.gpus - taken[1] - gpus,
                    node.memory_bytes - taken[2] - memory,
                )
        over = max(0.0, len(self.slots) + new - self.limit)  # workers that must go for any new one
        sign = -1 if len(self._free) == 1 else 1
        fitting = [
            (sign * left[1], sign * left[0], name)
            for name, left in room.items()
            if min(left) >= -ROUNDING
        ]
        if fitting and not over:
            return min(fitting)[2], []
        surplus = {other: self._spare(other) for other in self._free if other != share}
        if not any(count > 0 for count in surplus.values()):
            return None
        best: tuple[int, str, list[Slot]] | None = None
        for name, left in room.items():
            going, spare = list[Slot](), dict(surplus)
            for slot in self._on.get(name, ()):
                if min(left) >= -ROUNDING:
                    break
                if slot.node and not slot.busy and spare.get(slot.share, 0) > 0:
                    spare[slot.share] -= 1
                    going.append(slot)
                    needs = slot.share.needs
                    left = (left[0] + needs[0], left[1] + needs[1], left[2] + needs[2])
            if min(left) >= -ROUNDING and (best is None or len(going) < best[0]):
                best = (len(going), name, going)
        if best is None:
            return None
        going = best[2]
        for slot in [slot for slot in self.slots if slot.node and not slot.busy]:
            left_of = surplus.get(slot.share, 0) - sum(s.share == slot.share for s in going)
            if len(going) < over and slot not in going and left_of > 0:
                going.append(slot)
        return (best[1], going) if len(going) >= over else None
