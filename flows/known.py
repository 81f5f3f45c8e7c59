"""Finished trials by what they do, from which equal trials of other runs are answered.

known = Known()
known.note(result, partial(store.result, number))
known.answer(trial, work_of(trial))   # None: it is to be run
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from infra.records import ModelQuestion, TrialResult, TrialSpec


class Known:
    """Where the results of finished trials are; only that is kept in memory, of whatever many."""

    def __init__(self) -> None:
        self._works: set[str] = set()
        self._read: dict[str, Callable[[], TrialResult]] = {}

    def note(self, result: TrialResult, read: Callable[[], TrialResult]) -> bool:
        """Note a finished trial; whether it is the first of its work.

        One that failed answers nothing: it may have been of that one moment.
        """
        work = work_of(result.spec)
        is_new = work not in self._works
        self._works.add(work)
        if result.state == "complete":
            self._read[work] = read
        return is_new

    def answer(self, trial: TrialSpec, work: str) -> TrialResult | None:
        """The result of an equal trial; none where a checkpoint is wanted, which is on a node."""
        if trial.checkpoint or work not in self._read:
            return None
        return unpaid(self._read[work]()).model_copy(update={"spec": trial})


def unpaid(result: TrialResult) -> TrialResult:
    """For whoever shares a trial: the time that a worker was held is in the first one's files."""
    return result.model_copy(update={"cost": result.cost.model_copy(update={"held_s": 0.0})})


def work_of(trial: TrialSpec) -> str:
    """What a trial does, by whatever number it goes; of a question, its key."""
    if isinstance(trial, ModelQuestion):
        return hashlib.sha256(trial.key.encode()).hexdigest()
    work = trial.model_copy(update={"number": 0}).model_dump_json()
    return hashlib.sha256(work.encode()).hexdigest()
