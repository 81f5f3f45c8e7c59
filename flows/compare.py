"""The comparison: models x methods x allocations x sparsities, each cell a run of its own.

    compare(load_spec("flows/specs/compare_smollm2.toml"))

It is a study of one group without a budget, whose cells are served in turn: each ends as early as
it can, and a worker keeps its model. A cell that fails is a row that says why. Start and resume are
the same call.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flows.cell_runs import CellRuns, unfinished
from flows.cells import Cell, cells_of
from flows.comparison import Comparison, row_of, write_comparison
from flows.live import Event
from flows.stop import stoppable
from infra import tracking
from infra.specs import Spec
from infra.store import RunStore


def compare(spec: Spec, *, as_json: bool = False) -> Comparison:
    """Run every cell that is not finished yet and write compare.json and compare.html.

    Raises UserError for what holds for all cells; what holds for one is in its row.
    """
    cells = cells_of(spec)
    console = Console(stderr=as_json, quiet=as_json, highlight=False)
    with ExitStack() as stack:
        store = stack.enter_context(RunStore.open(spec, "compare"))
        stack.enter_context(stoppable(store.dir))
        tracking.start(store.dir, spec.tracking)
        left = len(unfinished(cells))
        progress = _progress(console)
        task = progress.add_task("starting", total=len(cells), completed=len(cells) - left)
        runs = CellRuns(cells, lambda cell: _CellView(cell, progress, task))
        if runs.todo:
            stack.enter_context(progress)
            runs.drive(spec.cluster)
        return write_comparison(store.dir)


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
