"""A cluster of plain processes, with what the dispatch loop asks of one; see infra/cluster.

    with connect(ClusterSpec()) as cluster:
        list(cluster.run(run_trial, trials))

Workers are forked, so that one whose parent has torch pays nothing to start; they end with it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from infra.cluster import Share
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
        for process in cluster.processes:
            process.kill()


class Processes:
    """Two workers, which stay warm."""

    share = Share(cpus=1, gpus=0)
    parallel = PARALLEL

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self.workers: list[Connection] = []
        self.processes = []
        for _ in range(PARALLEL):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self.workers.append(ours)
            self.processes.append(process)

    def describe(self) -> dict[str, Any]:
        return {"address": "processes", "nodes": [], "parallel": PARALLEL}

    def run(
        self, function: TrialFunction, specs: Iterable[TrialSpec | None]
    ) -> Iterator[TrialResult]:
        source, idle, busy = iter(specs), list(self.workers), []
        while True:
            while idle and (spec := next(source, None)):
                worker = idle.pop()
                worker.send(("trial", function, (spec,)))
                busy.append(worker)
            if not busy:
                return
            for worker in wait(busy):
                assert isinstance(worker, Connection)
                busy.remove(worker)
                idle.append(worker)
                yield worker.recv()[1]

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        worker = self.workers[0]
        worker.send(("call", function, args))
        answer = worker.recv()
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
                orders.send(worker.trial(function, *args, batch_divisor=1, node=""))
            else:
                orders.send(worker.call(function, args, {}))
        except UserError as error:
            orders.send(error)
