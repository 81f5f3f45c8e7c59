"""A cluster of plain processes: the real pool and dispatch loop over forked workers.

    with connect(ClusterSpec()) as cluster:
        list(cluster.dispatch(run_trial, source))

Workers end with this process. Forked ones, whose parent has torch, pay nothing to start, but wait
for ever for OpenMP's threads where their parent had any: a process that has computed must spawn.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from infra.cluster import Share
from infra.cluster.dispatch import Source, dispatch
from infra.cluster.machines import Outcome
from infra.cluster.pool import Pool
from infra.cluster.resources import Node, check_address
from infra.cluster.transfer import damaged
from infra.cluster.worker import TrialFunction, Worker
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec

PARALLEL = 2  # so that results return out of order
HERE = "here"
_PR_SET_PDEATHSIG = 1


@contextmanager
def connect(spec: ClusterSpec, method: str = "spawn") -> Iterator["Processes"]:
    """Workers of this process; an address is only checked."""
    if spec.address:
        check_address(spec.address)
    cluster = Processes(spec, method)
    try:
        yield cluster
    finally:
        for process in cluster.machines.processes:
            process.stop()


class Process:
    """One worker."""

    def __init__(self, method: str) -> None:
        context = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.process.kill()


@dataclass(eq=False)
class Reference:
    """What is waited for: that a worker has started, or its answer."""

    process: Process
    started: bool = False


class ProcessMachines:
    """This machine, with room for two workers; see infra.cluster.machines.Machines."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.processes = [Process(method) for _ in range(PARALLEL)]
        self.unused = list(self.processes)

    def now(self) -> float:
        return time.monotonic()

    def nodes(self) -> list[Node]:
        host = socket.gethostname()
        return [Node(node=HERE, host=host, cpus=PARALLEL, gpus=0, memory_bytes=2**40)]

    def grows(self) -> bool:
        return False

    def start(self, share: Share, node: str) -> Process:
        if not self.unused:
            self.unused.append(Process(self.method))
            self.processes += self.unused
        return self.unused.pop()

    def ready(self, worker: Process) -> Reference:
        return Reference(worker, started=True)

    def started(self, reference: Reference) -> tuple[str, str]:
        return HERE, ""

    def send(
        self, worker: Process, function: TrialFunction, spec: TrialSpec, divisor: int, node: str
    ) -> Reference:
        worker.pipe.send(("trial", function, (spec, divisor, node)))
        return Reference(worker)

    def wait(self, references: Sequence[Reference], timeout_s: float) -> list[Reference]:
        if started := [each for each in references if each.started]:
            return started
        pipes = {each.process.pipe: each for each in references}
        return [pipes[pipe] for pipe in connection.wait(list(pipes), timeout_s) if pipe in pipes]  # type: ignore[index, operator]

    def outcome(self, reference: Reference) -> Outcome:
        try:
            kind, result = reference.process.pipe.recv()
        except (EOFError, ConnectionError) as error:
            return Outcome("lost", cause=type(error).__name__)
        return Outcome(kind, result)

    def dead(self, workers: Sequence[Process]) -> list[Process]:
        return [worker for worker in workers if not worker.process.is_alive()]

    def stop(self, worker: Process) -> None:
        worker.stop()


class Processes:
    """What a flow asks of a cluster; see infra.cluster.Cluster."""

    def __init__(self, spec: ClusterSpec, method: str = "spawn") -> None:
        self.machines = ProcessMachines(method)
        self.pool = Pool(self.machines, spec.model_copy(update={"cpus_per_trial": 1}))
        self.share, self.parallel = self.pool.share, PARALLEL

    def share_of(self, spec: ClusterSpec) -> Share:
        return self.pool.share_of(spec)

    def holds(self, share: Share) -> bool:
        return True

    def now(self) -> float:
        return self.machines.now()

    def describe(self) -> dict[str, Any]:
        return {"address": "processes", "nodes": [], "parallel": PARALLEL}

    def dispatch(self, function: TrialFunction, source: Source) -> Iterator[TrialResult]:
        return dispatch(self.pool, function, source)

    def call(self, function: Callable[..., Any], *args: object, share: Share | None = None) -> Any:
        worker = self.pool.any(share or self.share).worker
        worker.pipe.send(("call", function, args))
        answer = worker.pipe.recv()
        if isinstance(answer, UserError):
            raise answer
        if answer[2]:
            raise UserError(f"{function.__name__} failed: {answer[2]}")
        return answer[1]

    def fetch(
        self,
        result: TrialResult,
        destination: Path,
        writing: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        partial = destination.with_name(f".{destination.name}.partial")
        if damaged(result, partial):
            with writing():
                shutil.rmtree(partial, ignore_errors=True)
                shutil.move(result.checkpoint, partial)
            assert not damaged(result, partial)
        with writing():
            partial.rename(destination)

    def stop_workers(self) -> None:
        self.pool.stop_all()


def _work(orders: connection.Connection) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for file in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:  # the lock, too
        if file > 2 and file != orders.fileno():
            with contextlib.suppress(OSError):
                os.close(file)
    worker = Worker(threads=1)
    with contextlib.suppress(EOFError):  # whoever gives orders has gone
        while True:
            kind, function, args = orders.recv()
            try:
                if kind == "trial":
                    spec, divisor, node = args
                    orders.send(worker.trial(function, spec, divisor, node))
                else:
                    orders.send(worker.call(function, args, {}))
            except UserError as error:
                orders.send(error)
