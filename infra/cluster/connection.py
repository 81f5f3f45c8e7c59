"""The connection to Ray, and what the driver does over it.

    with connect(ClusterSpec()) as cluster:
        model = cluster.call(describe_model, spec.model)

Ray must be imported after `environment.prepare()` to be quiet; the command line sees to that.
"""

import inspect
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from infra import environment
from infra.cluster.dispatch import BACKOFF_S, MAX_LOST, Job, Source, dispatch
from infra.cluster.pool import Pool
from infra.cluster.ray_machines import RayMachines
from infra.cluster.resources import Share, capacity, check_address
from infra.cluster.told import forget, told
from infra.cluster.transfer import fetch
from infra.cluster.worker import Kind, TrialFunction, describe_error
from infra.devices import num_cores
from infra.errors import UserError, first_line
from infra.progress import Facts
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec

OBJECT_STORE_BYTES = 100 * 2**20  # holds specs, results and pieces of checkpoints only
LONGEST_FOLDER = 32  # of 107 characters in the path of a socket, Ray adds up to 70

T = TypeVar("T")


@contextmanager
def connect(spec: ClusterSpec) -> Iterator["Cluster"]:
    """Ray at `spec.address`, at RAY_ADDRESS, or started here; what was started here is stopped.

    Raises UserError where no cluster answers or where it has no room for a trial.
    """
    environment.prepare()
    address = spec.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    scratch = ""
    if address == "local":
        folder = tempfile.gettempdir()
        scratch = tempfile.mkdtemp(
            prefix="ramp-", dir=folder if len(folder) <= LONGEST_FOLDER else "/tmp"
        )
        options |= {
            "num_cpus": num_cores(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": scratch,
        }
    else:
        check_address(address)
        modules = [str(environment.CHECKOUT / name) for name in environment.PACKAGES]
        options["runtime_env"] = {"py_modules": modules, "excludes": ["__pycache__"]}
    try:
        _init(address, options)
        cluster = Cluster(spec, address)
        try:
            yield cluster
        finally:
            cluster.stop_workers()
            forget()
    finally:
        ray.shutdown()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


class Cluster:
    """A cluster, and this driver's workers on it, which keep their CPUs and GPUs between trials."""

    def __init__(self, spec: ClusterSpec, address: str) -> None:
        self._address, self._spec = address, spec
        self._timeout_s = spec.trial_timeout_s
        self._pool = Pool(RayMachines(grows=spec.grows), spec)

    @property
    def share(self) -> Share:
        """What one trial gets."""
        return self._pool.share

    def share_of(self, spec: ClusterSpec) -> Share:
        """What a trial of another spec gets; raises UserError where no node could ever hold it."""
        return self._pool.share_of(spec)

    def holds(self, share: Share) -> bool:
        """Whether a node that is there now could hold it; an autoscaler may add one that can."""
        return bool(capacity(share, list(self._pool.nodes.values())))

    def now(self) -> float:
        """Seconds since some moment, by the clock that dispatching goes by."""
        return self._pool.machines.now()

    @property
    def parallel(self) -> int:
        """Trials at once: as asked for, else as many as the nodes that are there now hold."""
        return self._pool.parallel

    def describe(self) -> dict[str, Any]:
        """Nodes and what is on them, and how trials are placed there."""
        alive = list(self._pool.nodes.values())
        return {
            "address": self._address,
            "nodes": [node.model_dump() for node in alive],
            "cpus": sum(node.cpus for node in alive),
            "gpus": sum(node.gpus for node in alive),
            "memory_bytes": sum(node.memory_bytes for node in alive),
            "parallel": self.parallel,
            "cpus_per_trial": self.share.cpus,
            "gpus_per_trial": self.share.gpus,
        }

    def run(
        self, function: TrialFunction, specs: Iterable[TrialSpec | None]
    ) -> Iterator[TrialResult]:
        """Run trials, `parallel` at a time, and yield each result as it returns.

        A trial never raises: it fails with its cause, after these retries: its worker or node is
        lost, or it takes 10 times as long as those like it, again, at most 3 dispatches; CUDA is
        out of memory, once with half the batch; the host is out of memory, once with nothing
        beside it on its node. `specs` is read as workers come free; a None in it says that there
        is nothing now, and is asked again after the next result. Leaving the iterator early stops
        the trials in flight.
        """
        source = iter(specs)

        def jobs(pool: Pool) -> Job | None:
            spec = next(source, None) if pool.fits(self.share) else None
            return Job(spec, self.share, self._timeout_s) if spec else None

        return self.dispatch(function, jobs)

    def dispatch(self, function: TrialFunction, source: Source) -> Iterator[TrialResult]:
        """`run` for trials of different needs: `source(room)` looks for a job that fits."""
        return dispatch(self._pool, function, source)

    def call(self, function: Callable[..., T], *args: object, share: Share | None = None) -> T:
        """Run one function in a worker; a UserError raised there is raised here, others as one.

        A lost worker is replaced, at most 3 dispatches. Where CUDA is out of memory, a function
        that takes `batch_divisor` is given 2, once.
        """
        divisible = "batch_divisor" in inspect.signature(function).parameters
        for attempt in range(1, MAX_LOST + 1):
            try:
                kind, answer, cause = self._call(function, args, {}, share)
                if kind == "cuda-out-of-memory" and divisible:
                    kind, answer, cause = self._call(function, args, {"batch_divisor": 2}, share)
            except RayError as error:
                self._pool.drop_dead_workers()
                lost = type(error).__name__
                time.sleep(BACKOFF_S * attempt)
                continue
            if cause:
                raise UserError(f"{function.__name__} failed: {cause}")
            return answer
        raise UserError(f"{function.__name__} failed: lost {MAX_LOST} times: {lost}")

    def alone(self, function: Callable[..., T], *args: object) -> T:
        """`call` on this node, with a GPU or all its processors, and none of our workers beside.

        Raises UserError as `call` does, and where Ray gives away nothing of this node.
        """
        self.stop_workers()
        whole = {"parallel": 1, "cpus_per_trial": -1, "gpus_per_trial": -1}
        pool = self._pool
        here = ray.get_runtime_context().get_node_id()
        self._pool = Pool(RayMachines(), self._spec.model_copy(update=whole), only=here)
        try:
            return self.call(function, *args)
        finally:
            self.stop_workers()
            self._pool = pool

    def together(self, function: TrialFunction, spec: TrialSpec, workers: int) -> TrialResult:
        """Run one trial on several workers that share every batch of its recovery; see training.py.

        Raises UserError where the cluster has too few CPUs or GPUs for them.
        """
        from infra.cluster.training import train_together  # Ray Train takes seconds to import

        self.stop_workers()
        share = self.share
        cpus = share.cpus
        if not share.gpus:  # one worker may have been given all of them
            cpus = min(cpus, sum(n.cpus for n in self._pool.nodes.values()) // workers)
        if cpus < 1:
            raise UserError(f"recovery.workers={workers}: there are too few CPUs for so many")
        return train_together(function, spec, workers=workers, cpus=cpus, gpus=share.gpus)

    def told(self) -> list[Facts]:
        """The last that each trial of this driver told of how far it is; see infra/progress.py."""
        return told()

    def fetch(
        self,
        result: TrialResult,
        destination: Path,
        writing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Bring a trial's checkpoint from the node that made it, verified, to `destination`.

        What was there is replaced. `writing` is entered around each write, and may raise; it may be
        called in a thread. Raises LostCheckpointError where the node or the folder is gone or a
        file is not what its SHA-256 says, and OSError where `destination` cannot be written.
        """
        fetch(result, destination, writing)

    def stop_workers(self) -> None:
        """Stop every worker, whatever it is doing; the next trial starts new ones."""
        self._pool.stop_all()

    def _call(
        self,
        function: Callable[..., T],
        args: tuple[object, ...],
        options: dict[str, int],
        share: Share | None,
    ) -> tuple[Kind, T, str]:
        slot = self._pool.any(share or self.share)
        try:
            ended: tuple[Kind, T, str] = ray.get(slot.worker.call.remote(function, args, options))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            # the function or its answer could not be sent
            raise UserError(f"{function.__name__} failed: {describe_error(error.cause)}") from error
        if ended[0] == "broken":
            self._pool.stop(slot)
        return ended


def _init(address: str, options: dict[str, Any]) -> None:
    """`ray.init`, twice where a busy machine took too long; raises UserError where it cannot."""
    for again in (True, False):
        try:
            with _own_signal_handlers(), _silence():
                ray.init(logging_level=logging.ERROR, **options)
            return
        except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            if reason.startswith("Version mismatch"):  # one line for each version
                reason = " ".join(str(error).split())
            if "AuthenticationError" in f"{type(error)} {error.__cause__}":
                reason = (
                    "its token is missing here, or another one: set RAY_AUTH_MODE=token and "
                    "RAY_AUTH_TOKEN_PATH to a file that holds it"
                )
            raise UserError(f"cannot use Ray at {address}: {reason}") from error
        except Exception as error:
            if type(error) is not Exception:  # Ray's own, of a node that does not start in 30 s
                raise
            ray.shutdown()
            if not again:
                raise UserError(
                    f"Ray does not start here: {first_line(error)} Is the machine overloaded?"
                ) from error


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that exits at once."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


@contextmanager
def _silence() -> Iterator[None]:
    """Ray's library prints a line for each attempt without a token; the exception says it all."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
