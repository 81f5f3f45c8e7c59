"""Worker processes on the nodes of a Ray cluster: what a pool needs of it, and no more.

machines = RayMachines()
ready = machines.ready(machines.start(Share(cpus=1, gpus=0), node=""))
machines.wait([ready], timeout_s=30)
"""

import math
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.cluster.machines import Outcome
from infra.cluster.resources import Node, Share
from infra.cluster.told import keep
from infra.cluster.worker import TrialFunction, Worker, describe_error
from infra.errors import first_line
from infra.progress import listen
from infra.provenance import compared_versions
from infra.records import TrialSpec

PING_S = 5.0


@ray.remote(max_restarts=0, max_task_retries=0)  # retries are ours: by cause, and counted
class RayWorker(Worker):
    """A worker process on a node of the cluster."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        listen(keep)

    def node(self) -> tuple[str, str, dict[str, str]]:
        """Ray's id of the node, its host and versions; answered when the process has started."""
        return ray.get_runtime_context().get_node_id(), socket.gethostname(), compared_versions()


class RayMachines:
    """The nodes of the cluster that this process is connected to; see machines.Machines."""

    def __init__(self, *, grows: bool = False) -> None:
        self._grows = grows
        self._refused: dict[str, str] = {}  # why, by node

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def nodes(self) -> list[Node]:
        """The nodes that are alive, without those whose versions are not the driver's."""
        return [
            Node(
                node=node["NodeID"],
                host=node["NodeManagerHostname"],
                cpus=node["Resources"].get("CPU", 0),
                gpus=node["Resources"].get("GPU", 0),
                memory_bytes=int(node["Resources"].get("memory", 0)),
                labels=node.get("Labels") or {},
            )
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"] and node["NodeID"] not in self._refused
        ]

    def grows(self) -> bool:
        """Whether an autoscaler adds nodes; Ray's own tell nobody, so the spec does."""
        return self._grows

    def start(self, share: Share, node: str) -> Any:
        """Ask for a worker, on that node unless it is gone; without one, wherever there is room."""
        options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
        if share.memory_bytes:
            options["memory"] = share.memory_bytes
        if node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        labels = dict(share.labels)
        if self._refused and not node:
            labels.setdefault("ray.io/node-id", f"!in({','.join(self._refused)})")
        if labels:
            options["label_selector"] = labels
        actor: Any = RayWorker  # Ray's stubs know no options of an actor class
        return actor.options(**options).remote(max(1, int(share.cpus)))

    def ready(self, worker: Any) -> Any:
        """A reference to wait for: the worker has started, or could not."""
        return worker.node.remote()

    def started(self, reference: Any) -> tuple[str, str]:
        """The node of a worker, and why it is of no use: with a node, nothing on that node is."""
        try:
            node, host, versions = ray.get(reference)
        except RayError as error:
            return "", str(error).strip().splitlines()[-1]
        ours = compared_versions()
        other = [name for name in ours if versions[name] != ours[name]]
        if other and node not in self._refused:
            there = ", ".join(f"{name} {versions[name] or 'missing'}" for name in other)
            here = ", ".join(f"{name} {ours[name] or 'missing'}" for name in other)
            self._refused[node] = f"{host} has {there} where the driver has {here}"
            print(f"sparseramp: {self._refused[node]}: no trial runs there", file=sys.stderr)
        return node, self._refused.get(node, "")

    def send(
        self, worker: Any, function: TrialFunction, spec: TrialSpec, batch_divisor: int, node: str
    ) -> Any:
        """Begin a trial; a reference to wait for."""
        return worker.trial.remote(function, spec, batch_divisor, node)

    def wait(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those that are done, as soon as one is."""
        if not references:
            time.sleep(timeout_s)
            return []
        timeout = None if timeout_s == math.inf else timeout_s
        return list(ray.wait(list(references), timeout=timeout)[0])

    def outcome(self, reference: Any) -> Outcome:
        """How a trial that is done has ended."""
        try:
            kind, result = ray.get(reference)
        except OutOfMemoryError as error:
            return Outcome("host-out-of-memory", cause=f"OutOfMemoryError: {first_line(error)}")
        except RayTaskError as error:  # the function or its answer could not be sent
            return Outcome("unsent", cause=describe_error(error.cause))
        except RayError as error:
            return Outcome("lost", cause=type(error).__name__)
        return Outcome(kind, result)

    def dead(self, workers: Sequence[Any]) -> list[Any]:
        """Those of idle workers that do not answer."""
        asked = {worker.node.remote(): worker for worker in workers}
        if not asked:
            return []
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=PING_S)
        return [asked[ref] for ref in silent] + [
            asked[ref] for ref in answered if self.started(ref)[1]
        ]

    def stop(self, worker: Any) -> None:
        """End a worker, whatever it is doing."""
        ray.kill(worker)
