"""The dispatch loop: trials to idle workers, results as they return, retries by cause.

for result in dispatch(pool, run_trial, trials, timeout_s=0):
    ...
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from infra.cluster.deadlines import Deadlines
from infra.cluster.pool import Pool, Slot
from infra.cluster.worker import TrialFunction, describe_error, failed, first_line
from infra.records import TrialResult, TrialSpec

MAX_LOST = 3  # dispatches of a trial whose worker or node died
BACKOFF_S = 0.5


@dataclass(eq=False)
class Trial:
    """A trial on its way through its dispatches."""

    spec: TrialSpec
    attempts: int = 0
    lost: int = 0
    batch_divisor: int = 1
    alone: bool = False  # the host was out of memory
    not_before: float = 0.0
    begun: float = 0.0
    deadline: float = math.inf


Busy = dict[Any, tuple[Slot, Trial]]  # by the reference to the result


def dispatch(
    pool: Pool, function: TrialFunction, specs: Iterable[TrialSpec | None], timeout_s: float
) -> Iterator[TrialResult]:
    """Yield the result of every trial as it returns; see `Cluster.run`."""
    source = iter(specs)
    waiting: deque[Trial] = deque()
    busy: Busy = {}
    deadlines = Deadlines(timeout_s)
    pool.drop_dead_workers()
    try:
        while True:
            trials = [*waiting, *(trial for _, trial in busy.values())]
            limit = 1 if any(trial.alone for trial in trials) else pool.parallel
            while len(waiting) + len(busy) < limit and (spec := next(source, None)):
                waiting.append(Trial(spec))
            if not waiting and not busy:
                return
            _send(pool, function, waiting, busy, limit)
            for _, trial in busy.values():
                trial.deadline = trial.begun + deadlines.limit_s(trial.spec)
            for ref in _wait(pool, waiting, busy):
                slot, trial = busy.pop(ref)
                slot.busy = False
                result = _collect(pool, ref, slot, trial, timeout_s)
                if result is None:
                    waiting.appendleft(trial)
                else:
                    if result.state == "complete":
                        deadlines.note(trial.spec, time.monotonic() - trial.begun)
                    yield result.model_copy(update={"attempts": trial.attempts})
    finally:
        for slot, _ in busy.values():
            pool.stop(slot)


def _send(
    pool: Pool,
    function: TrialFunction,
    waiting: deque[Trial],
    busy: Busy,
    limit: int,
) -> None:
    """Give waiting trials to idle workers, and start workers for the others."""
    now = time.monotonic()
    idle = pool.idle()
    for trial in [trial for trial in waiting if trial.not_before <= now]:
        if not idle or len(busy) >= limit:
            break
        # A worker that has the model need not load it.
        slot = next((slot for slot in idle if slot.model == trial.spec.model), idle[0])
        idle.remove(slot)
        slot.model = trial.spec.model
        if trial.alone:  # idle workers hold memory, too
            for other in [other for other in pool.slots if other is not slot]:
                pool.stop(other)
        waiting.remove(trial)
        trial.attempts += 1
        trial.begun = now
        slot.busy = True
        # Only a started worker is sent a trial, so the time it waits for room does not count.
        ref = slot.actor.trial.remote(function, trial.spec, trial.batch_divisor, slot.node)
        busy[ref] = (slot, trial)
    while len(pool.slots) < min(limit, len(waiting) + len(busy)):
        pool.start()


def _wait(pool: Pool, waiting: deque[Trial], busy: Busy) -> list[Any]:
    """Dispatches that came to an end, on their own or at their deadline."""
    now = time.monotonic()
    starting = {slot.starting: slot for slot in pool.slots if not slot.node}
    times = [trial.deadline for _, trial in busy.values()]
    times += [trial.not_before for trial in waiting if trial.not_before > now]
    pause = max(0.0, min(times, default=math.inf) - now)
    refs = [*busy, *starting]
    if not refs:
        time.sleep(pause)
        return []
    done, _ = ray.wait(refs, timeout=None if pause == math.inf else pause)
    for ref in done:
        if ref in starting:
            pool.started(starting[ref])
    now = time.monotonic()
    late = [ref for ref, (_, trial) in busy.items() if trial.deadline <= now]
    return [ref for ref in done if ref in busy] or late


def _collect(
    pool: Pool, ref: Any, slot: Slot, trial: Trial, timeout_s: float
) -> TrialResult | None:
    """The result of a dispatch; None where the trial is to be dispatched again."""
    if not ray.wait([ref], timeout=0)[0]:
        pool.stop(slot)
        if timeout_s:
            return failed(trial.spec, f"TimeoutError: not done in trial_timeout_s={timeout_s:g}")
        return _again(trial, f"hung for {trial.deadline - trial.begun:.0f} s")
    try:
        kind, result = ray.get(ref)
    except OutOfMemoryError as error:
        pool.stop(slot)
        if trial.alone:
            return failed(trial.spec, f"OutOfMemoryError: {first_line(error)}")
        trial.alone = True
        return None
    except RayTaskError as error:  # the function or its answer could not be sent
        return failed(trial.spec, describe_error(error.cause))
    except RayError as error:
        pool.stop(slot)
        pool.drop_dead_workers()
        return _again(trial, type(error).__name__)
    if kind == "broken":
        pool.stop(slot)
    if kind == "cuda-out-of-memory" and trial.batch_divisor == 1:
        trial.batch_divisor = 2
        return None
    answer: TrialResult = result
    return answer


def _again(trial: Trial, cause: str) -> TrialResult | None:
    """The trial was lost with its worker; a failure when that happens for the last time."""
    trial.lost += 1
    if trial.lost == MAX_LOST:
        return failed(trial.spec, f"lost {MAX_LOST} times: {cause}")
    trial.not_before = time.monotonic() + BACKOFF_S * trial.lost
    return None
