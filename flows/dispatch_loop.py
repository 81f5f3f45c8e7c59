"""The dispatch loop: the trials of many runs on one cluster, none of them done twice.

    drive(cluster, [Entry(run, cluster.share)])                         # a single search
    drive(cluster, entries, known, order=FAIR, budget=budget, keep_going=True)     # a study

Whenever there is room, the entries are gone through in an order: `IN_TURN` serves those that began
first, so that a worker keeps its model for as long as it can and cells end one after the other;
`FAIR` serves the one that has used the least of the cluster for its priority. An entry's run is
opened when the loop first comes to it. Equal trials of several runs are run once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from flows.budget import Budget, BudgetSpent
from flows.known import Known, unpaid, work_of
from infra.cluster import Job, Pool, Share, Source, TrialFunction
from infra.errors import UserError
from infra.records import ModelQuestion, TrialResult, TrialSpec
from tasks.trial import run_trial

_END = "no trial is left"
_LOOK_S = 1.0

# A trial to run, something outside the loop that must end first, or None: trials must.
Step = TrialSpec | Future[None] | None


class Driven(Protocol):
    """What the loop asks of a run; see flows.search.Run."""

    def trials(self) -> Iterator[Step]:
        """The trials to run, and what is to be asked of the model before them, in order; None
        while what is out must end first, a Future where it waits for something else."""

    def take(self, result: TrialResult) -> None:
        """The result of a trial that was offered."""

    def reader(self, number: int) -> Callable[[], TrialResult]:
        """What reads a result that was taken from the files, without holding on to the run."""

    def wait(self, problem: str) -> None:
        """Its trials, which ran before, wait for a node."""

    def finish(self) -> None:
        """No trial is left."""

    def stop(self, error: BaseException) -> None:
        """The run ends early; raises UserError where its files cannot take that in."""


class Dispatcher(Protocol):
    """What the loop asks of a cluster; see infra.cluster.Cluster."""

    def now(self) -> float:
        """Seconds by the clock that it goes by."""

    def dispatch(self, function: TrialFunction, source: Source) -> Iterator[TrialResult]:
        """Results as they return, of jobs that `source` finds."""


@dataclass(eq=False)
class Entry:
    """A run in the loop: how it is opened, what its trials need, and what it has used so far."""

    run: Callable[[], Driven | None]  # None: it is refused
    share: Share
    priority: float = 1.0
    at_once: int = 0  # 0: as many as fit
    timeout_s: float = 0.0
    used_s: float = 0.0  # GPU-seconds of trials that have ended, else CPU-seconds
    # what follows is the loop's
    driven: Driven | None = None
    coming: Iterator[Step] | None = None
    awaited: Future[None] | None = None
    next: tuple[TrialSpec, str] | None = None  # looked at and not begun, with its work
    out: dict[str, float] = field(default_factory=dict)  # when each trial was begun, by its work
    num_ended: int = 0
    ended_s: float = 0.0

    def used_at(self, now: float) -> float:
        """What it has used, trials that run included; also asked by the thread that draws."""
        running = sum(now - begun for begun in list(self.out.values()))
        return self.used_s + self.share.weight * running

    def booked_at(self, now: float) -> float:
        """The same, but a trial that runs counts from its start as much as those that have ended
        took on average: else all that is free at one moment would go to one cell."""
        usual = self.ended_s / self.num_ended if self.num_ended else 1.0
        running = (max(now - begun, usual) for begun in self.out.values())
        return self.used_s + self.share.weight * sum(running)


@dataclass(frozen=True)
class Order:
    """Which entry is served first: the one with the least `key(entry, now)`."""

    key: Callable[[Entry, float], float]
    warm_s: float = 0.0  # so far ahead may one be where a worker has its model, in its own seconds
    num_open: float = math.inf  # others begin only where these leave room: each holds memory
    holds: bool = False  # who comes first and finds no room has a node kept free of others


IN_TURN = Order(lambda entry, now: 0.0)
# Loading a model takes about as long as the head start that it gives.
FAIR = Order(
    lambda entry, now: entry.booked_at(now) / entry.priority,
    warm_s=60.0,
    num_open=64,
    holds=True,
)


def drive(
    cluster: Dispatcher,
    entries: Sequence[Entry],
    known: Known | None = None,
    *,
    order: Order = IN_TURN,
    budget: Budget | None = None,
    keep_going: bool = False,
) -> str:
    """Drive every run to its end, or until the budget is spent; why it was, else nothing.

    `known` are finished trials, from which equal ones are answered. What a run raises ends it alone
    where `keep_going` says so, else all of them.
    """
    return _Loop(cluster, entries, known, order, budget or Budget(), keep_going).drive()


class _Loop:
    def __init__(
        self,
        cluster: Dispatcher,
        entries: Sequence[Entry],
        known: Known | None,
        order: Order,
        budget: Budget,
        keep_going: bool,
    ) -> None:
        self.cluster, self.order, self.budget = cluster, order, budget
        self.keep_going = keep_going
        self.entries = list(entries)  # that have not ended
        self.used_s = self.budget.used_before_s + sum(entry.used_s for entry in entries)
        self.known = known or Known()
        # By work: who gets its result, the one that is billed first.
        self.claims: dict[str, list[tuple[Entry, TrialSpec]]] = {}
        self.jobs: dict[str, Job] = {}
        self.unheld: set[Share] = set()  # shares that no node holds now
        self.waiting: set[Entry] = set()  # for a node that holds their share, as they have said

    def drive(self) -> str:
        spent = ""
        try:
            while True:
                for result in self.cluster.dispatch(run_trial, self._next):
                    self._ended(result)
                if not (awaited := [e.awaited for e in self.entries if e.awaited]):
                    break
                wait(awaited, _LOOK_S, FIRST_COMPLETED)
            spent = self._spent() if self.entries else ""
        except BudgetSpent as error:
            spent = str(error)
        except BaseException as error:
            for entry in self.entries:
                _stop(entry.driven, error)
            raise
        for entry in list(self.entries):
            self._end(entry, BudgetSpent(spent), alone=True)
        return spent

    def _spent(self) -> str:
        now = self.cluster.now()
        running = sum(entry.used_at(now) - entry.used_s for entry in self.entries)
        return self.budget.spent(self.used_s + running, now)

    def _next(self, pool: Pool) -> Job | None:
        """The first trial, in the order of the entries, that there is room for."""
        now = self.cluster.now()
        spent = self._spent()
        if now >= self.budget.until + self.budget.grace_s:
            raise BudgetSpent(spent)
        shares = {e.share for e in self.entries} | {job.share for job in self.jobs.values()}
        waited_s = {share: pool.unheld_s(share) for share in shares}
        self.unheld = {share for share in shares if waited_s[share]}
        for entry in list(self.entries) if self.unheld or self.waiting else ():
            self._wait_for_node(entry, waited_s[entry.share], pool.patience_s)
        for entry in [e for e in self.entries if e.awaited and e.awaited.done()]:
            self._look(entry)  # wherever there is room: it may need none
        fits: dict[Share, bool] = {}
        pool.held.clear()
        chosen: Entry | None = None
        limit = math.inf
        num_open, holding = sum(e.coming is not None for e in self.entries), self.order.holds
        ordered = [
            (math.inf, entry)
            if entry.coming is None and num_open >= self.order.num_open
            else (self.order.key(entry, now), entry)
            for entry in self.entries
        ]
        for value, entry in sorted(ordered, key=lambda pair: pair[0]):
            share, begun = entry.share, entry.coming is not None
            if value > limit:
                break
            if chosen and (not begun or share != chosen.share):
                continue
            if fits.get(share) is False and not holding:
                continue
            if (spent and not begun) or 0 < entry.at_once <= len(entry.out):
                continue
            if (begun and not self._look(entry)) or spent:
                continue
            if share not in fits:
                fits[share] = pool.fits(share)
            if holding and not fits[share] and not chosen:
                holding = pool.hold(share)
                fits = {share: False} if holding else fits  # others may fit no more
            if not fits[share] or not (begun or self._look(entry)):
                continue
            if chosen is None:
                chosen, limit = entry, value + self.order.warm_s * share.weight / entry.priority
            if entry.next and (not self.order.warm_s or pool.is_warm(share, entry.next[0].model)):
                chosen = entry
                break
        return self._begin(chosen, now) if chosen else None

    def _begin(self, entry: Entry, now: float) -> Job:
        assert entry.next is not None
        trial, work = entry.next
        self.claims[work] = [(entry, trial)]
        entry.next, entry.out[work] = None, now
        # A question may have to download the model.
        is_question = isinstance(trial, ModelQuestion)
        self.budget.num_begun += not is_question
        job = Job(trial, entry.share, 0.0 if is_question else entry.timeout_s)
        self.jobs[work] = job
        return job

    def _wait_for_node(self, entry: Entry, waited_s: float, patience_s: float) -> None:
        """A run that no node holds any more says so, and when none has come in time it ends."""
        try:
            if waited_s and entry.driven and entry not in self.waiting:
                entry.driven.wait(entry.share.no_node)
            (self.waiting.add if waited_s else self.waiting.discard)(entry)
            if waited_s >= patience_s and not (entry.out or entry.awaited):  # they fail first
                entry.driven = entry.driven or entry.run()  # whose files say why it ends
                raise UserError(entry.share.given_up(patience_s))
        except UserError as error:
            self._end(entry, error)

    def _look(self, entry: Entry) -> bool:
        """Whether the entry has a trial that nobody has done or is doing; it is its next one."""
        try:
            if entry.coming is None:
                entry.driven = entry.run()
                if entry.driven is None:
                    self.entries.remove(entry)
                    return False
                entry.coming = entry.driven.trials()
            assert entry.driven is not None
            while True:
                if entry.awaited and not entry.awaited.done():
                    return False
                entry.awaited = None
                if entry.next is None or isinstance(entry.next[0], ModelQuestion):
                    trial = next(entry.coming, _END)
                    if trial is None:
                        return False
                    if isinstance(trial, Future):
                        entry.awaited = trial
                        continue
                    if isinstance(trial, str):
                        entry.driven.finish()
                        self._remove(entry)
                        return False
                    entry.next = trial, work_of(trial)
                trial, work = entry.next
                if work in self.claims:
                    if self.jobs[work].share in self.unheld and entry.share not in self.unheld:
                        self._hand_over(work, entry, trial)
                    elif isinstance(trial, ModelQuestion):  # what is then asked, the answer decides
                        return False
                    else:
                        self.claims[work].append((entry, trial))
                elif answer := self.known.answer(trial, work):
                    entry.driven.take(answer)
                else:
                    return True
                entry.next = None
        except UserError as error:
            self._end(entry, error)
            return False

    def _hand_over(self, work: str, entry: Entry, trial: TrialSpec) -> None:
        """What waits for a node that is gone is done where another run that needs it has one."""
        first, _ = self.claims[work][0]
        del first.out[work]
        entry.out[work] = self.cluster.now()
        self.jobs[work].share = entry.share
        others = [] if isinstance(trial, ModelQuestion) else self.claims[work]
        self.claims[work] = [(entry, trial), *others]

    def _ended(self, result: TrialResult) -> None:
        work = work_of(result.spec)
        claims = self.claims.pop(work)
        del self.jobs[work]
        first = claims[0][0]
        del first.out[work]
        first.used_s += result.cost.used_s
        first.ended_s += result.cost.held_s
        first.num_ended += 1
        self.used_s += result.cost.used_s
        for entry, trial in claims:
            if entry.driven is None:  # it ended early
                continue
            paid, result = result, unpaid(result)
            try:
                entry.driven.take(paid.model_copy(update={"spec": trial}))
            except UserError as error:
                self._end(entry, error)
                continue
            if not isinstance(trial, ModelQuestion):
                self.known.note(result, entry.driven.reader(trial.number))

    def _remove(self, entry: Entry) -> None:
        """Whatever a run holds in memory goes when it has ended."""
        self.entries.remove(entry)
        self.waiting.discard(entry)
        entry.driven = entry.coming = entry.next = entry.awaited = None

    def _end(self, entry: Entry, error: Exception, *, alone: bool = False) -> None:
        if not (alone or self.keep_going):
            raise error
        driven = entry.driven
        self._remove(entry)
        _stop(driven, error)


def _stop(driven: Driven | None, error: BaseException) -> None:
    """End a run; where its files are what has failed, and cannot say so, that ends no other."""
    with suppress(UserError):
        if driven is not None:
            driven.stop(error)
