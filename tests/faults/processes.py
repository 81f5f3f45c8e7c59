"""A cluster of plain processes, with what the dispatch loop asks of one; see infra/cluster.

    with connect(ClusterSpec()) as cluster:
        list(cluster.dispatch(run_trial, source))

Workers are forked, so that one whose parent has torch pays nothing to start; they end with it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from infra.cluster import Node, Outcome, Pool, Share, Source, dispatch
from infra.cluster.resources import check_address
from infra.cluster.transfer import arrived
from infra.cluster.worker import TrialFunction, Worker
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec

PARALLEL = 2  # so that results return out of order
_PR_SET_PDEATHSIG = 1


@contextmanager
def connect(spec: ClusterSpec) -> Iterator["Processes"]:
    """Workers of this process; an address is only checked."""
    if spec.address:
        check_address(spec.address)
    cluster = Processes()
    try:
        yield cluster
    finally:
        cluster.machines.stop_all()


class Processes:
    """Two workers, which stay warm; the real loop and pool send them their trials."""

    def __init__(self) -> None:
        self.machines = ProcessMachines()
        self._pool = Pool(self.machines, ClusterSpec(parallel=PARALLEL))
        self.share, self.now = self._pool.share, self.machines.now

    def describe(self) -> dict[str, Any]:
        return {"address": "processes", "nodes": [], "parallel": PARALLEL}

    def dispatch(self, function: TrialFunction, source: Source) -> Iterator[TrialResult]:
        return dispatch(self._pool, function, source)

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        worker = self.machines.start(self.share, "")
        worker.orders.send(("call", function, args))
        answer = worker.orders.recv()
        self.machines.stop(worker)
        if isinstance(answer, UserError):
            raise answer
        if answer[2]:
            raise UserError(f"{function.__name__} failed: {answer[2]}")
        return answer[1]

    def fetch(self, result: TrialResult, destination: Path) -> None:
        partial = destination.with_name(f".{destination.name}.partial")
        if not arrived(result, partial):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.move(result.checkpoint, partial)
            assert arrived(result, partial)
        partial.rename(destination)

    def stop_workers(self) -> None:
        """They hold nothing."""


class ProcessWorker:
    """A forked process and the pipe to it."""

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self.orders, theirs = fork.Pipe()
        self.process = fork.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()


class ProcessMachines:
    """This machine, with as many processors as there are workers; see infra.cluster.pool.Machines."""

    def __init__(self) -> None:
        self.workers: list[ProcessWorker] = []

    def now(self) -> float:
        return time.monotonic()

    def nodes(self) -> list[Node]:
        return [Node(node="here", host="here", cpus=PARALLEL, gpus=0, memory_bytes=0)]

    def grows(self) -> bool:
        return False

    def start(self, share: Share, node: str) -> ProcessWorker:
        self.workers.append(ProcessWorker())
        return self.workers[-1]

    def ready(self, worker: ProcessWorker) -> Any:
        return ("ready", worker)

    def started(self, reference: Any) -> tuple[str, str]:
        return "here", ""

    def send(
        self,
        worker: ProcessWorker,
        function: TrialFunction,
        spec: TrialSpec,
        batch_divisor: int,
        node: str,
    ) -> Any:
        worker.orders.send(("trial", function, (spec, batch_divisor)))
        return ("trial", worker)

    def wait(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        ready = [each for each in references if each[0] == "ready"]
        out = {each[1].orders: each for each in references if each[0] == "trial"}
        done = wait(list(out), 0 if ready else min(timeout_s, 3600.0))
        return ready + [out[orders] for orders in done if isinstance(orders, Connection)]

    def outcome(self, reference: Any) -> Outcome:
        try:
            kind, result = reference[1].orders.recv()
        except EOFError:
            return Outcome("lost", cause="EOFError")
        return Outcome(kind, result)

    def dead(self, workers: Sequence[Any]) -> list[Any]:
        return [worker for worker in workers if not worker.process.is_alive()]

    def stop(self, worker: ProcessWorker) -> None:
        self.workers.remove(worker)
        worker.process.kill()

    def stop_all(self) -> None:
        for worker in list(self.workers):
            self.stop(worker)


def _work(orders: Connection) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for file in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:  # the lock, too
        if file > 2 and file != orders.fileno():
            with contextlib.suppress(OSError):
                os.close(file)
    worker = Worker(threads=1)
    while True:
        kind, function, args = orders.recv()
        try:
            if kind == "trial":
                orders.send(worker.trial(function, *args, node="here"))
            else:
                orders.send(worker.call(function, args, {}))
        except UserError as error:
            orders.send(error)
