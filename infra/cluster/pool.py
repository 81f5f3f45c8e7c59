"""The workers of one driver: started where there is room, kept warm, replaced when lost.

pool = Pool(ClusterSpec(parallel=2))
slot = pool.any()
ray.get(slot.actor.call.remote(os.getpid, (), {}))
"""

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.cluster.resources import Node, Share, capacity, decide_share
from infra.cluster.worker import Worker
from infra.errors import UserError
from infra.specs import ClusterSpec, ModelSpec

MAX_FAILED_STARTS = 3
PING_S = 5.0


@ray.remote(max_restarts=0, max_task_retries=0)  # retries are ours: by cause, and counted
class RayWorker(Worker):
    """A worker process on a node of the cluster."""

    def node(self) -> str:
        """Ray's id of the node; answered when the process has started."""
        return ray.get_runtime_context().get_node_id()


@dataclass(eq=False)
class Slot:
    """A worker as the driver sees it."""

    actor: Any
    starting: Any  # resolves to the id of its node
    node: str = ""  # empty until it has started
    busy: bool = False
    model: ModelSpec | None = None  # of its last trial


def nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            node=node["NodeID"],
            host=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            memory_bytes=int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


class Pool:
    """The workers, and how many of them there may be."""

    def __init__(self, spec: ClusterSpec, *, here: bool = False) -> None:
        """With `here`, all of them are on the driver's node."""
        self._where: Any = "SPREAD"
        found = nodes()
        if here:
            node = ray.get_runtime_context().get_node_id()
            found = [each for each in found if each.node == node]
            self._where = NodeAffinitySchedulingStrategy(node, soft=False)
        self.share: Share = decide_share(spec, found)
        self.slots: list[Slot] = []
        self._parallel = spec.parallel
        self._failed_starts = 0

    @property
    def parallel(self) -> int:
        """As many as asked for, else as the nodes that are there now hold."""
        return self._parallel or max(1, capacity(self.share, nodes()))

    def idle(self) -> list[Slot]:
        """Workers that a trial can be sent to."""
        return [slot for slot in self.slots if slot.node and not slot.busy]

    def start(self) -> Slot:
        """Ask for one more worker, on the node with the most room; it starts when there is any."""
        options: Any = RayWorker  # Ray's stubs know no options of an actor class
        actor = options.options(
            num_cpus=self.share.cpus, num_gpus=self.share.gpus, scheduling_strategy=self._where
        ).remote(max(1, int(self.share.cpus)))
        self.slots.append(Slot(actor, actor.node.remote()))
        return self.slots[-1]

    def started(self, slot: Slot) -> None:
        """Wait until a worker has started.

        Raises UserError when several in a row could not, which is a node without our dependencies.
        """
        try:
            slot.node = slot.node or ray.get(slot.starting)
            self._failed_starts = 0
        except RayError as error:
            self.stop(slot)
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"no worker starts on the cluster: {reason}") from error

    def any(self) -> Slot:
        """A started worker, an idle one where there is any."""
        while True:
            idle = self.idle()
            if idle or len(self.slots) >= self.parallel:
                slot = (idle or self.slots)[0]
            else:
                slot = self.start()
            self.started(slot)
            if slot.node:
                return slot

    def stop(self, slot: Slot) -> None:
        """Stop a worker, whatever it is doing."""
        if slot in self.slots:
            self.slots.remove(slot)
            ray.kill(slot.actor)

    def stop_all(self) -> None:
        """Stop every worker."""
        for slot in list(self.slots):
            self.stop(slot)

    def drop_dead_workers(self) -> None:
        """So that a lost node costs a trial one dispatch, not one for each worker it had."""
        idle = {slot.actor.node.remote(): slot for slot in self.idle()}
        if not idle:
            return
        answered, silent = ray.wait(list(idle), num_returns=len(idle), timeout=PING_S)
        for ref in silent:
            self.stop(idle[ref])
        for ref in answered:
            try:
                ray.get(ref)
            except RayError:
                self.stop(idle[ref])
