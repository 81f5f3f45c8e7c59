"""The cells of a comparison or a study, each a run of its own, through one dispatch loop.

    spent = run_cells(cells, ClusterSpec(), views, order=FAIR, budget=budget)

Cells whose allocation has numbers to vary are searches, the others are compared with uniform as
they are. What cells have in common, the model's description, what an allocation measures, equal
trials, is done once. A cell that fails ends alone. Finished cells are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from flows.budget import Budget
from flows.cells import Cell
from flows.descriptions import Descriptions
from flows.dispatch_loop import IN_TURN, Entry, Order, drive
from flows.known import Known
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
        # By what a spec asks for: model and data as they were read, or why they cannot be.
        self._pins: dict[str, dict[str, Any]] = {}
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
            if error := self._refused.get(_sources(cell.spec)):
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
        pinned = cell.spec.model_copy(update=self._pins[_sources(cell.spec)])
        return _CellRun(store, pinned, self.cluster, view, _plan, self._descriptions)

    def _look_at(self, cell: Cell) -> None:
        """Take over what a cell has finished; one whose files are damaged ends alone.

        Raises UserError where it belongs to another spec.
        """
        if not (cell.folder / "run.json").exists():
            return
        try:
            store = RunStore.read(cell.folder)
            if is_ours := store.spec.identity() == cell.spec.identity():
                self._take_over(cell, store)
        except UserError as error:
            self.todo = [each for each in self.todo if each is not cell]
            self.views(cell).event({"kind": "stopped", "reason": str(error)})
            return
        if not is_ours:
            RunStore.open(cell.spec).close()  # which says what differs, where trials were begun

    def _take_over(self, cell: Cell, store: RunStore) -> None:
        used_s = 0.0
        for number in store.numbers():
            result = store.result(number)
            self.num_known += self.known.note(result, partial(store.result, number))
            used_s += result.cost.used_s
        self.used_s[cell.name] = used_s
        model, waves = store.model(), store.waves()
        if model is not None and waves:
            first = waves[0][0]  # later cells read the revisions that this one read
            read = {"model": first.model, "data": first.data}
            self._pins.setdefault(_sources(cell.spec), read)
            self._descriptions.note(cell.spec.model_copy(update=read), model)

    def _pin(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            sources = _sources(cell.spec)
            if sources in self._pins or sources in self._refused:
                continue
            try:
                pinned = pin(cell.spec)
                self._pins[sources] = {"model": pinned.model, "data": pinned.data}
            except UserError as error:
                self._refused[sources] = error
        if cells and not self._pins:
            raise next(iter(self._refused.values()))


def _sources(spec: Spec) -> str:
    return spec.model_dump_json(include={"model", "data"})


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
    # The card of a checkpoint and the page are written last.
    last = ["report.html", *(["best/README.md"] if cell.spec.compare.checkpoints else [])]
    if not all((cell.folder / name).exists() for name in ["report.json", *last]):
        return False
    try:
        store = RunStore.read(cell.folder)
        report = store.report() or {"trials": []}
    except UserError:  # a report is made again; of other files a start says what is wrong
        return False
    failed = any(t["state"] == "failed" and t["stage"] == "final" for t in report["trials"])
    return not failed and store.spec.identity() == cell.spec.identity()


def _plan(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
    """A search where there is something to vary, else the allocation as it is."""
    if bounds_of(spec.prune, model.matrices):
        wave = next_wave(spec, model, results)
    else:
        wave = final_wave(spec, spec.prune, results, model.profile)
    if spec.compare.checkpoints:
        return wave
    return [trial.model_copy(update={"checkpoint": False}) for trial in wave]
