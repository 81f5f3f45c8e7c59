"""The cells of a comparison or a study, each a run of its own, through one dispatch loop.

    spent = run_cells(cells, ClusterSpec(), views, order=FAIR, budget=budget)

Cells whose allocation has numbers to vary are searches, the others are compared with uniform as
they are. What cells have in common, the model's description, what an allocation measures, equal
trials, is done once. A cell that fails ends alone. Finished cells are not touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from flows.budget import Budget
from flows.cells import Cell
from flows.descriptions import Descriptions
from flows.dispatch_loop import IN_TURN, Entry, Known, Order, drive
from flows.live import View
from flows.pins import pin, refuse
from flows.plan import Results, final_wave, next_wave
from flows.search import Run
from infra.cluster import Cluster, connect
from infra.errors import UserError
from infra.records import ModelRecord, TrialSpec
from infra.specs import ClusterSpec, Spec
from infra.store import RunStore
from tasks.allocation import bounds_of
from tasks.trial import check_names

Connect = Callable[[ClusterSpec], AbstractContextManager[Cluster]]


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """Those that a start has to look after; raises UserError where one belongs to another spec."""
    return [cell for cell in cells if not _is_finished(cell)]


class CellRuns:
    """Cells and what they have in common, from the files of earlier starts or found out once."""

    cluster: Cluster

    def __init__(self, cells: Sequence[Cell], views: Callable[[Cell], View]) -> None:
        """Resolve every model once; raises UserError where none of them can be read."""
        self.views = views
        self.known = Known()
        self.num_known = 0
        self.entries: dict[str, Entry] = {}
        self.used_s: dict[str, float] = {}  # by earlier starts
        self._pins: dict[str, tuple[Any, Any]] = {}  # by source: model and data as they were read
        self._refused: dict[str, UserError] = {}
        self._descriptions = Descriptions()
        self.todo = unfinished(cells)
        for cell in cells if self.todo else []:
            self._look_at(cell)
        self._pin(self.todo)

    def drive(
        self,
        spec: ClusterSpec,
        *,
        order: Order = IN_TURN,
        budget: Budget | None = None,
        connect: Connect = connect,
    ) -> str:
        """Run what is to do on the cluster of a spec; why the budget is spent, or nothing."""
        with connect(spec) as self.cluster:
            for cell in self.todo:
                if entry := self._entry(cell):
                    self.entries[cell.name] = entry
            if not self.entries:
                return ""
            methods = sorted({cell.spec.prune.method for cell in self.todo})
            share = next(iter(self.entries.values())).share
            self.cluster.call(check_names, methods, share=share)  # one that is misspelt is no row
            if budget is not None:
                budget.num_begun = self.num_known
                budget.used_before_s = sum(
                    used_s for name, used_s in self.used_s.items() if name not in self.entries
                )
                budget.until += self.cluster.now()
            entries = list(self.entries.values())
            return drive(
                self.cluster, entries, self.known, order=order, budget=budget, keep_going=True
            )

    def _entry(self, cell: Cell) -> Entry | None:
        """A cell as the loop sees it; none where it cannot begin, which its files then say."""
        try:
            refuse(cell.spec)
            if error := self._refused.get(cell.spec.model.source):
                raise error
            share = self.cluster.share_of(cell.spec.cluster)
        except UserError as error:
            with suppress(UserError), RunStore.open(cell.spec) as store:  # another driver's, say
                store.event("stopped", cause="UserError", reason=str(error))
            self.views(cell).event({"kind": "stopped", "reason": str(error)})
            return None
        if not self.cluster.holds(share):
            self.views(cell).event({"kind": "waiting", "problem": share.no_node})
        return Entry(
            partial(self._open, cell),
            share,
            priority=cell.priority,
            at_once=cell.spec.cluster.parallel,
            timeout_s=cell.spec.cluster.trial_timeout_s,
            used_s=self.used_s.get(cell.name, 0.0),
        )

    def _open(self, cell: Cell) -> Run | None:
        view = self.views(cell)
        try:
            store = RunStore.open(cell.spec)
        except UserError as error:
            view.event({"kind": "stopped", "reason": str(error)})
            return None
        model, data = self._pins[cell.spec.model.source]
        pinned = cell.spec.model_copy(update={"model": model, "data": data})
        return _CellRun(store, pinned, self.cluster, view, _plan, self._descriptions)

    def _look_at(self, cell: Cell) -> None:
        """Take over what a cell has finished; raises UserError where it belongs to another spec."""
        if not (cell.folder / "run.json").exists():
            return
        store = RunStore.read(cell.folder)
        if store.spec.identity() != cell.spec.identity():
            RunStore.open(cell.spec).close()  # which says what differs, where trials were begun
            return
        used_s = 0.0
        for number in store.numbers():
            result = store.result(number)
            new = self.known.note(result, partial(store.result, number))
            self.num_known += new
            used_s += result.cost.used_s * new
        self.used_s[cell.name] = used_s
        model, waves = store.model(), store.waves()
        if model is not None and waves:
            first = waves[0][0]  # later cells read the revisions that this one read
            self._pins.setdefault(cell.spec.model.source, (first.model, first.data))
            pinned = cell.spec.model_copy(update={"model": first.model, "data": first.data})
            self._descriptions.note(pinned, model)

    def _pin(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            source = cell.spec.model.source
            if source in self._pins or source in self._refused:
                continue
            try:
                pinned = pin(cell.spec)
                self._pins[source] = pinned.model, pinned.data
            except UserError as error:
                self._refused[source] = error
        if cells and not self._pins:
            raise next(iter(self._refused.values()))


class _CellRun(Run):
    """One that lets go of its files when it has ended, since there may be hundreds of them."""

    def finish(self) -> None:
        super().finish()
        self.store.close()

    def stop(self, error: BaseException) -> None:
        try:
            super().stop(error)
        finally:
            self.store.close()


def _is_finished(cell: Cell) -> bool:
    """Whether a cell has its report, of finals that all succeeded, and what it was to save."""
    path = cell.folder / "report.json"
    if not path.exists() or RunStore.read(cell.folder).spec.identity() != cell.spec.identity():
        return False
    if cell.spec.compare.checkpoints and not (cell.folder / "best").exists():
        return False
    trials = json.loads(path.read_bytes())["trials"]
    return not any(t["state"] == "failed" and t["stage"] == "final" for t in trials)


def _plan(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
    """A search where there is something to vary, else the allocation as it is."""
    if bounds_of(spec.prune, model.matrices):
        wave = next_wave(spec, model, results)
    else:
        wave = final_wave(spec, spec.prune, results, model.profile)
    if spec.compare.checkpoints:
        return wave
    return [trial.model_copy(update={"checkpoint": False}) for trial in wave]
