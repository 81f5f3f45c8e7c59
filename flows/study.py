"""The dispatch loop: the trials of many runs on one cluster, none of them done twice.

    drive(cluster, [run])                                   # a single search
    drive(cluster, runs, known=results, keep_going=True)    # many of them, one beside the other

A run is asked for its next trial when a worker is free, those that began first before the others;
the next run begins only when those that are going have nothing to offer, so that a worker keeps its
model for as long as it can. Equal trials of several runs are run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from infra.cluster import Cluster
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from tasks.trial import run_trial


class Driven(Protocol):
    """What the loop asks of a run; see flows.search.Run."""

    def trials(self) -> Iterator[TrialSpec | None]:
        """The trials to run, in order; None while the last of a wave are still out."""

    def take(self, result: TrialResult) -> None:
        """The result of a trial that was offered."""

    def finish(self) -> None:
        """No trial is left."""

    def stop(self, error: BaseException) -> None:
        """The run ends early."""


def drive(
    cluster: Cluster,
    runs: Iterable[Driven],
    known: Iterable[TrialResult] = (),
    *,
    keep_going: bool = False,
) -> None:
    """Drive every run to its end; `runs` is read as workers come free.

    `known` are finished results of these runs, from which equal trials are answered. What a run
    raises ends it alone where `keep_going` says so, else all of them.
    """
    _Study(cluster, known, keep_going).drive(runs)


class _Study:
    def __init__(self, cluster: Cluster, known: Iterable[TrialResult], keep_going: bool) -> None:
        self.cluster, self.keep_going = cluster, keep_going
        self.finished = {_work(result.spec): result for result in known}
        self.claims: dict[str, list[tuple[Driven, TrialSpec]]] = {}
        self.going: dict[Driven, Iterator[TrialSpec | None]] = {}

    def drive(self, runs: Iterable[Driven]) -> None:
        try:
            for result in self.cluster.run(run_trial, self._offers(iter(runs))):
                work = _work(result.spec)
                if result.state == "complete":  # a failure may be of this one moment
                    self.finished[work] = result
                for run, trial in self.claims.pop(work):
                    self._give(run, trial, result)
        except BaseException as error:
            for run in self.going:
                run.stop(error)
            raise

    def _offers(self, runs: Iterator[Driven]) -> Iterator[TrialSpec | None]:
        """One trial for each time that a worker is free; None where there is nothing to do now."""
        while True:
            trial = next(filter(None, map(self._offer, list(self.going))), None)
            while trial is None and (run := next(runs, None)) is not None:
                self.going[run] = run.trials()
                trial = self._offer(run)
            if trial is None and not self.going:
                return
            yield trial

    def _offer(self, run: Driven) -> TrialSpec | None:
        """A trial of the run that nobody has done or is doing."""
        try:
            for trial in self.going[run]:
                if trial is None:
                    return None
                work = _work(trial)
                if work in self.claims:
                    self.claims[work].append((run, trial))
                elif work in self.finished and not trial.checkpoint:  # those are on a node only
                    run.take(self.finished[work].model_copy(update={"spec": trial}))
                else:
                    self.claims[work] = [(run, trial)]
                    return trial
            run.finish()
            del self.going[run]
        except UserError as error:
            self._end(run, error)
        return None

    def _give(self, run: Driven, trial: TrialSpec, result: TrialResult) -> None:
        if run not in self.going:  # it ended early
            return
        try:
            run.take(result.model_copy(update={"spec": trial}))
        except UserError as error:
            self._end(run, error)

    def _end(self, run: Driven, error: Exception) -> None:
        if not self.keep_going:
            raise error
        del self.going[run]
        run.stop(error)


def _work(trial: TrialSpec) -> str:
    """What a trial does, by whatever number it goes."""
    return trial.model_copy(update={"number": 0}).model_dump_json()
