"""The dispatch loop: jobs to idle workers, results as they return, retries by cause.

    for result in dispatch(pool, run_trial, source):
        ...

`source(pool)` is asked for the next job whenever there may be room, and looks for one that fits. It
is asked every POLL_S at least, so that it can keep a deadline. The machines are the pool's: a
cluster, or simulated ones with a clock of their own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infra.cluster.deadlines import Deadlines, kind_of
from infra.cluster.machines import Slot
from infra.cluster.pool import Pool
from infra.cluster.resources import Share
from infra.cluster.worker import TrialFunction, failed
from infra.records import TrialResult, TrialSpec

MAX_LOST = 3  # dispatches of a trial whose worker or node died
BACKOFF_S = 0.5
POLL_S = 2.0


@dataclass(eq=False)
class Job:
    """A trial, what it needs, and after how long it counts as hung (0: see deadlines.py).

    Another share, given to it while it waits for a worker, is what it waits for from then on.
    """

    spec: TrialSpec
    share: Share
    timeout_s: float = 0.0


# None: nothing fits now, or there is nothing now; it is over when nothing is out either.
Source = Callable[[Pool], Job | None]


@dataclass(eq=False)
class Trial:
    """A trial on its way through its dispatches."""

    job: Job
    share: Share  # of the worker that it has or waits for
    attempts: int = 0
    lost: int = 0
    batch_divisor: int = 1
    alone: bool = False  # the host was out of memory: nothing beside it on its node
    not_before: float = 0.0
    sent_at: float = 0.0
    deadline: float = math.inf  # when it counts as hung
    held_s: float = 0.0

    @cached_property
    def kind(self) -> str:
        """What its duration depends on."""
        return kind_of(self.job.spec)

    def ended(self, result: TrialResult) -> TrialResult:
        """Its result, with what the driver knows of it."""
        share = self.share
        held = {"held_s": self.held_s, "gpus": share.gpus, "cpus": share.cpus}
        cost = result.cost.model_copy(update=held)
        return result.model_copy(update={"attempts": self.attempts, "cost": cost})


Busy = dict[Any, tuple[Slot, Trial]]  # by the reference to the result


def dispatch(pool: Pool, function: TrialFunction, source: Source) -> Iterator[TrialResult]:
    """Yield the result of every trial as it returns; see `Cluster.run`."""
    waiting: deque[Trial] = deque()
    busy: Busy = {}
    deadlines = Deadlines()
    too_large: dict[str, str] = {}  # of kinds of trial that had a node to themselves: how it ended
    pool.drop_dead_workers()
    try:
        while True:
            for trial in waiting:
                _move(pool, trial)
            for trial, cause in _hopeless(pool, waiting, too_large):
                waiting.remove(trial)
                if not trial.alone:
                    pool.give_up(trial.share)
                yield trial.ended(failed(trial.job.spec, cause))
            _send(pool, function, waiting, busy)
            pool.release()
            while len(waiting) + len(busy) < pool.limit and (job := source(pool)):
                waiting.append(Trial(job, job.share))
                pool.claim(job.share)
            pool.provide()
            _send(pool, function, waiting, busy)
            if not waiting and not busy and not pool.wanted:
                return
            for _, trial in busy.values():
                limit_s = trial.job.timeout_s or deadlines.limit_s(trial.kind)
                trial.deadline = trial.sent_at + limit_s
            for ref in _wait(pool, waiting, busy):
                slot, trial = busy.pop(ref)
                pool.ended(slot)
                trial.held_s += pool.machines.now() - trial.sent_at
                pool.emptied = "" if trial.alone else pool.emptied
                result = _collect(pool, ref, slot, trial, too_large)
                if result is None:
                    waiting.appendleft(trial)
                    if not trial.alone:
                        pool.claim(trial.share)
                else:
                    if result.state == "complete":
                        deadlines.note(trial.kind, pool.machines.now() - trial.sent_at)
                    yield trial.ended(result)
    finally:
        for slot, _ in busy.values():
            pool.stop(slot)
        pool.forget_claims()


def _move(pool: Pool, trial: Trial) -> None:
    """Let a trial wait for the share that its job was given since."""
    if trial.share != trial.job.share:
        if not trial.alone:
            pool.give_up(trial.share)
            pool.claim(trial.job.share)
        trial.share = trial.job.share


def _hopeless(
    pool: Pool, waiting: deque[Trial], too_large: dict[str, str]
) -> list[tuple[Trial, str]]:
    """Trials that wait in vain, and why: for memory that no node has, or for a lost node."""
    found = []
    for trial in waiting:
        share = trial.share
        if trial.alone and trial.kind in too_large:
            found.append((trial, too_large[trial.kind]))
        elif pool.unheld_s(share) >= pool.patience_s:
            found.append((trial, f"lost: {share.given_up(pool.patience_s)}"))
    return found


def _send(pool: Pool, function: TrialFunction, waiting: deque[Trial], busy: Busy) -> None:
    """Give waiting trials to idle workers that have their share."""
    now = pool.machines.now()
    for trial in [trial for trial in waiting if trial.not_before <= now]:
        take = pool.take_alone if trial.alone else pool.take
        slot = take(trial.share, trial.job.spec.model)
        if slot is None:
            continue
        waiting.remove(trial)
        trial.attempts += 1
        trial.sent_at = now
        # Only a started worker is sent a trial, so the time it waits for room does not count.
        ref = pool.machines.send(
            slot.worker, function, trial.job.spec, trial.batch_divisor, slot.node
        )
        busy[ref] = (slot, trial)


def _wait(pool: Pool, waiting: deque[Trial], busy: Busy) -> list[Any]:
    """Dispatches that came to an end, on their own or at their deadline."""
    now = pool.machines.now()
    starting = {slot.starting: slot for slot in pool.slots if not slot.node}
    times = [now + POLL_S]
    times += [trial.deadline for _, trial in busy.values()]
    times += [trial.not_before for trial in waiting if trial.not_before > now]
    done = pool.machines.wait([*busy, *starting], max(0.0, min(times) - now))
    for ref in done:
        if ref in starting:
            pool.started(starting[ref])
    now = pool.machines.now()
    late = [ref for ref, (_, trial) in busy.items() if trial.deadline <= now]
    return [ref for ref in done if ref in busy] or late


def _collect(
    pool: Pool, ref: Any, slot: Slot, trial: Trial, too_large: dict[str, str]
) -> TrialResult | None:
    """The result of a dispatch; None where the trial is to be dispatched again."""
    spec = trial.job.spec
    if not pool.machines.wait([ref], 0.0):
        pool.stop(slot)
        if limit_s := trial.job.timeout_s:
            return failed(spec, f"TimeoutError: not done in trial_timeout_s={limit_s:g}")
        return _again(pool, trial, f"hung for {trial.deadline - trial.sent_at:.0f} s")
    ended = pool.machines.outcome(ref)
    match ended.kind:
        case "unsent":
            return failed(spec, ended.cause)
        case "host-out-of-memory":
            pool.stop(slot)
            if trial.alone:
                too_large[trial.kind] = ended.cause
            if trial.kind in too_large:  # the next of its kind leave the others their node
                return failed(spec, ended.cause)
            trial.alone = True
            return None
        case "lost":
            pool.stop(slot)
            pool.drop_dead_workers()
            return _again(pool, trial, ended.cause)
        case "broken":
            pool.stop(slot)
        case "cuda-out-of-memory" if trial.batch_divisor == 1:
            trial.batch_divisor = 2
            return None
        case _:
            pass
    return ended.result


def _again(pool: Pool, trial: Trial, cause: str) -> TrialResult | None:
    """The trial was lost with its worker; a failure when that happens for the last time."""
    trial.lost += 1
    if trial.lost == MAX_LOST:
        return failed(trial.job.spec, f"lost {MAX_LOST} times: {cause}")
    trial.not_before = pool.machines.now() + BACKOFF_S * trial.lost
    return None
