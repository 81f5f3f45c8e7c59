"""The comparison: models x methods x allocations x sparsities, each cell a run of its own.

    compare(load_spec("flows/specs/compare_smollm2.toml"))

Cells whose allocation has numbers to vary are searches, the others are compared with uniform as
they are. All share one cluster through the loop that also drives a single search. What cells have
in common, the model's description, what an allocation measures, uniform trials, is done once. A
cell that fails is a row that says why. Start and resume are the same call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flows.cells import Cell, cells_of
from flows.comparison import Comparison, row_of, write_comparison
from flows.live import Event
from flows.pins import pin, refuse
from flows.plan import (
    Results,
    final_wave,
    kinds_of_trial,
    next_wave,
    refuse_objective,
    search_trial,
)
from flows.search import Run
from flows.study import drive
from infra import tracking
from infra.cluster import Cluster, connect
from infra.errors import UserError
from infra.records import ModelRecord, TrialResult, TrialSpec
from infra.specs import Spec
from infra.store import RunStore
from tasks.allocation import ALLOCATIONS, allocation_named, bounds_of
from tasks.trial import check_names, describe_model, measure_profile


def compare(spec: Spec, *, as_json: bool = False) -> Comparison:
    """Run every cell that is not finished yet and write compare.json and compare.html.

    Raises UserError for what holds for all cells; what holds for one is in its row.
    """
    cells = cells_of(spec)
    console = Console(stderr=as_json, quiet=as_json, highlight=False)
    with ExitStack() as stack:
        store = stack.enter_context(RunStore.open(spec, "compare"))
        tracking.start(store.dir, spec.tracking)
        shared = _Shared()
        todo = [cell for cell in cells if not shared.look_at(cell)]
        if todo:
            shared.pin(todo)
            progress = stack.enter_context(_progress(console))
            task = progress.add_task("starting", total=len(cells), completed=len(cells) - len(todo))
            shared.cluster = stack.enter_context(connect(spec.cluster))
            methods = sorted({cell.spec.prune.method for cell in todo})
            shared.cluster.call(check_names, methods)  # one that is misspelt is no row
            views = {cell.name: _CellView(cell, progress, task) for cell in todo}
            runs = _runs(todo, shared, views, stack)
            drive(shared.cluster, runs, shared.known, keep_going=True)
        return write_comparison(store.dir)


def _runs(
    cells: list[Cell], shared: _Shared, views: dict[str, _CellView], stack: ExitStack
) -> Iterator[Run]:
    """A run per cell, opened when the loop comes to it."""
    for cell in cells:
        store = stack.enter_context(RunStore.open(cell.spec))
        view, source = views[cell.name], cell.spec.model.source
        if error := shared.refused_because(cell):
            store.event("stopped", cause="UserError", reason=str(error))
            view.event({"kind": "stopped", "reason": str(error)})
            continue
        model, data = shared.pins[source]
        pinned = cell.spec.model_copy(update={"model": model, "data": data})
        yield Run(store, pinned, shared.cluster, view, _plan, shared.describe)


def _plan(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
    """A search where there is something to vary, else the allocation as it is."""
    if bounds_of(spec.prune, model.matrices):
        wave = next_wave(spec, model, results)
    else:
        wave = final_wave(spec, spec.prune, results, model.profile)
    if spec.compare.checkpoints:
        return wave
    return [trial.model_copy(update={"checkpoint": False}) for trial in wave]


class _Shared:
    """What cells have in common, from the files of earlier starts or found out once."""

    cluster: Cluster

    def __init__(self) -> None:
        self.known: list[TrialResult] = []
        self.pins: dict[str, tuple[Any, Any]] = {}  # by source: model and data as they were read
        self.refused: dict[str, UserError] = {}
        self._models: dict[str, ModelRecord] = {}
        self._profiles: dict[str, list[float]] = {}

    def look_at(self, cell: Cell) -> bool:
        """Take over what a cell has finished; whether that is all of it.

        Raises UserError where it belongs to another spec.
        """
        if not (cell.folder / "run.json").exists():
            return False
        with RunStore.open(cell.spec) as store:
            results = list(store.results().values())
            model = store.model()
            waves = store.waves()
            reported = store.path("report.json").exists()
            saved = store.path("best").exists() or not cell.spec.compare.checkpoints
        self.known += [result for result in results if result.state == "complete"]
        if model is not None and waves:
            first = waves[0][0]  # later cells read the revisions that this one read
            self.pins.setdefault(cell.spec.model.source, (first.model, first.data))
            pinned = cell.spec.model_copy(update={"model": first.model, "data": first.data})
            self._models.setdefault(first.model.source, model)
            self._profiles.setdefault(_measurement(pinned), model.profile)
        lost = any(r.state == "failed" and r.spec.stage == "final" for r in results)
        return reported and saved and not lost

    def pin(self, cells: list[Cell]) -> None:
        """Resolve every model once; raises UserError where none of them can be read."""
        for cell in cells:
            source = cell.spec.model.source
            if source in self.pins or source in self.refused:
                continue
            try:
                pinned = pin(cell.spec)
                self.pins[source] = pinned.model, pinned.data
            except UserError as error:
                self.refused[source] = error
        if not self.pins:
            raise next(iter(self.refused.values()))

    def refused_because(self, cell: Cell) -> UserError | None:
        """Why a cell cannot begin: its model cannot be read, or its spec contradicts itself."""
        try:
            refuse(cell.spec)
        except UserError as error:
            return error
        return self.refused.get(cell.spec.model.source)

    def describe(self, spec: Spec) -> ModelRecord:
        """The model as one cell found it, with this cell's own measurement."""
        allocation = allocation_named(spec.prune.allocation)
        trials, source = kinds_of_trial(spec), spec.model.source
        if source not in self._models:
            self._models[source] = self.cluster.call(describe_model, trials)
        refuse_objective(spec, self._models[source])
        measured = _measurement(spec)
        if allocation.measure is None:
            self._profiles[measured] = []
        elif measured not in self._profiles:
            self._profiles[measured] = self.cluster.call(
                measure_profile, search_trial(spec, spec.prune, -1)
            )
        return self._models[source].model_copy(update={"profile": self._profiles[measured]})


def _measurement(spec: Spec) -> str:
    """What decides the measurement of an allocation: the method only where it prunes for it."""
    allocation = ALLOCATIONS.get(spec.prune.allocation)
    method = spec.prune.method if allocation is None or allocation.prunes else ""
    prune = spec.prune.model_copy(update={"method": method})
    return json.dumps([spec.model.source, prune.model_dump()])


class _CellView:
    """A line for every cell that has ended; in between, what is being done."""

    def __init__(self, cell: Cell, progress: Progress, task: Any) -> None:
        self.cell, self.progress, self.task = cell, progress, task

    def event(self, event: Event) -> None:
        """Show one event."""
        kind, name = event["kind"], self.cell.name
        if kind in ("finished", "stopped"):
            row = row_of(self.cell)
            said = kind if kind == "finished" else f"{row['state']}: {row['cause']}"
            self.progress.console.print(f"{name}  {said}", markup=False, soft_wrap=True)
            self.progress.advance(self.task)
        else:
            what = f"trial {event['number']}" if kind == "trial" else kind
            self.progress.update(self.task, description=f"{name}  {what}")


def _progress(console: Console) -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
