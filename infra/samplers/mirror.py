"""A view of a search for Optuna's own tools, told by a thread that the search never waits for.

mirror = StudyMirror(Path("runs/quickstart"), run_id, "", bounds)
mirror.record(result)   # then: optuna-dashboard runs/quickstart/optuna.log
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from infra.errors import UserError, first_line
from infra.records import TrialResult
from infra.samplers.proposals import Bounds, frozen

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

RETRY_S = 60.0
CLOSE_S = 5.0  # what a storage that does not answer may hold up at the end of a run


class StudyMirror:
    """Finished search trials as Optuna studies, one per rung: `<run name>/rung<k>`.

    They stand in a journal, which is in the run directory unless given, or in the database that
    `storage` names. A loss is minimised, a score maximised. Files are the truth: a trial goes in by
    one transaction and carries its `number`, so that none is told twice or stays RUNNING for ever.
    A thread of its own does the work, because a storage that is locked or gone would hold up the
    search; `problem` then says why, what was not told is tried again once a minute and at `close`,
    and `rebuild` at the next start tells the rest. `close` waits no longer than CLOSE_S.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        storage: str,
        bounds: Bounds,
        objective: str = "loss",
        journal: Path | None = None,
    ) -> None:
        self.url, self.journal = storage, journal or run_dir.resolve() / "optuna.log"
        self.problem = ""
        self._name = run_dir.resolve().name
        self._run_id, self._bounds, self._objective = run_id, bounds, objective
        self._waiting: deque[TrialResult] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # of the thread; True is the last one
        # what follows belongs to the thread
        self._storage: BaseStorage | None = None
        self._studies: dict[int, tuple[optuna.Study, set[int]]] = {}
        self._retry_at = 0.0
        if storage:
            _check_url(storage)
        self._thread = threading.Thread(target=self._work, name="optuna", daemon=True)
        self._thread.start()

    def record(self, result: TrialResult) -> None:
        """Tell one trial, unless it is known or not of the search."""
        self.rebuild([result])

    def rebuild(self, results: Iterable[TrialResult]) -> None:
        """Tell whatever search trials the storage lacks, in the given order."""
        self._waiting.extend(r for r in results if r.spec.stage == "search")
        self._calls.put(False)

    @property
    def untold(self) -> int:
        """How many trials the storage lacks at the moment."""
        return len(self._waiting)

    def close(self) -> int:
        """Try once more; how many trials remain untold."""
        self._calls.put(True)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self.problem = self.problem or f"Optuna storage did not answer in {CLOSE_S:g} s"
        return self.untold

    def _work(self) -> None:
        while not (last := self._calls.get()):
            self._tell(last)
        self._tell(last)

    def _tell(self, last: bool) -> None:
        from optuna.exceptions import OptunaError

        expected: list[type[Exception]] = [OptunaError, OSError, ValueError]
        where = str(self.journal)
        if self.url:
            import sqlalchemy

            expected.append(sqlalchemy.exc.SQLAlchemyError)
            where = repr(sqlalchemy.make_url(self.url))  # without its password
        if time.monotonic() < self._retry_at and not last:
            return
        try:
            while self._waiting:
                self._add(self._waiting[0])
                self._waiting.popleft()
            self.problem = ""
        except tuple(expected) as error:
            reason = first_line(error.__cause__ or error)
            self.problem = f"Optuna storage {where} cannot be written: {reason}"
            self._retry_at = time.monotonic() + RETRY_S
            self._storage = None  # what is known there is read anew
            self._studies.clear()

    def _add(self, result: TrialResult) -> None:
        if result.spec.rung not in self._studies:
            self._studies[result.spec.rung] = self._open(result.spec.rung)
        study, known = self._studies[result.spec.rung]
        if result.spec.number in known:
            return
        attrs = {"number": result.spec.number, "tilt": result.tilt}
        metrics = result.metrics() if result.state == "complete" else {}
        numbers = {name: result.numbers.get(name, 0.0) for name in self._bounds}
        value = metrics.get(self._objective)
        study.add_trial(frozen(numbers, value, self._bounds, attrs | metrics))
        known.add(result.spec.number)

    def _open(self, rung: int) -> tuple[optuna.Study, set[int]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = self._storage = self._storage or self._connect()
        loss = self._objective == "loss"
        better: Literal["minimize", "maximize"] = "minimize" if loss else "maximize"
        for name in (f"{self._name}/rung{rung}", f"{self._name}-{self._run_id[:8]}/rung{rung}"):
            # A shared storage may hold another run of the same name.
            study = optuna.create_study(
                storage=storage, study_name=name, direction=better, load_if_exists=True
            )
            if study.user_attrs.get("run", self._run_id) == self._run_id:
                break
        if "run" not in study.user_attrs:
            study.set_user_attr("run", self._run_id)
        return study, {t.user_attrs["number"] for t in study.get_trials(deepcopy=False)}

    def _connect(self) -> BaseStorage:
        """A journal takes a hundredth of the processor time of an SQLite database."""
        from optuna.storages import JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend

        if self.url:
            limit = {"timeout" if self.url.startswith("sqlite") else "connect_timeout": 2}
            return RDBStorage(self.url, engine_kwargs={"connect_args": limit})
        if self.journal.exists():  # a writer that was killed may have left half a line
            os.truncate(self.journal, self.journal.read_bytes().rfind(b"\n") + 1)
        # No other process writes it; a lock in a file would outlive a driver that is killed.
        lock = threading.Lock()
        return JournalStorage(JournalFileBackend(str(self.journal), lock))  # type: ignore[arg-type]


def _check_url(url: str) -> None:
    """Refuse what is no database URL, or one whose driver is not installed."""
    import sqlalchemy

    try:
        sqlalchemy.make_url(url).get_dialect().import_dbapi()
    except (ImportError, ValueError, sqlalchemy.exc.ArgumentError) as error:
        shown = re.sub(r"//.*@", "//***@", url)  # no password
        raise UserError(f"search.storage={shown!r} cannot be used: {error}") from error
