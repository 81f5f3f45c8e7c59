"""The study: groups of cells that share one cluster fairly, within a budget.

    study(load_study("flows/specs/study_smollm2.toml"))

Each cell is a run in a folder of its own, as `compare` makes them. Whichever cell has used the
least of the cluster for its priority is served next. When the budget is spent, what runs is
finished, and the same command with a larger one goes on; so it does with more cells in the file.
"""

from __future__ import annotations

import math
import resource
import time
from contextlib import ExitStack
from typing import Any

from flows.budget import Budget
from flows.cell_runs import CellRuns, Connect
from flows.cells import study_cells
from flows.dispatch_loop import FAIR
from flows.leaderboard import STUDY, Leaderboard
from flows.overview import Overview
from flows.report import working_time
from flows.stop import cause_of, stoppable
from infra import tracking
from infra.cluster import connect
from infra.specs import ClusterSpec, CompareSpec
from infra.store import RunStore, write_atomic
from infra.study_files import BudgetSpec, StudySpec

WRITE_S = 5.0  # the leaderboard is not written more often while the study runs
TELL_S = 60.0  # so much of `budget.hours` may be lost with a driver that is killed


def study(spec: StudySpec, *, as_json: bool = False, connect: Connect = connect) -> dict[str, Any]:
    """Run every cell that is not finished yet, and return what leaderboard.json holds.

    Raises UserError for what holds for all cells; what holds for one is in its row.
    """
    cells = study_cells(spec)
    _open_many_files()
    first = cells[0].spec
    own = first.model_copy(
        update={
            "compare": CompareSpec(),
            "run": first.run.model_copy(update={"dir": spec.dir}),
            "tracking": next(
                (c.spec.tracking for c in cells if c.spec.tracking.enabled), first.tracking
            ),
        }
    )
    with ExitStack() as stack:
        store = stack.enter_context(RunStore.open(own, "study"))
        stack.enter_context(stoppable(store.dir))
        write_atomic(store.path(STUDY), spec.model_dump_json(indent=1).encode())
        tracking.start(store.dir, own.tracking)
        board = Leaderboard(store, cells)
        writer = _Writer(store, board)
        overview = Overview(cells, writer.ended, writer.going, as_json=as_json)
        overview.say(f"{len(cells)} cells: their files are read, and their sources looked up")
        runs = CellRuns(cells, overview.view_of)
        overview.entries = runs.entries
        spent = ""
        try:
            if runs.todo:
                overview.say(f"{len(runs.todo)} cells to do: Ray starts, then their models load")
                with overview.shown():
                    spent = runs.drive(
                        ClusterSpec(
                            address=first.cluster.address,
                            parallel=spec.parallel,
                            grows=any(cell.spec.cluster.grows for cell in cells),
                        ),
                        order=FAIR,
                        budget=_budget(spec.budget, store),
                        connect=connect,
                    )
        except BaseException as error:
            store.event("stopped", **cause_of(error))
            board.write()
            raise
        if spent:
            store.event("stopped", cause="BudgetSpent", reason=spent)
        else:
            store.event("finished")
        return board.write(spent)


class _Writer:
    """The leaderboard follows the cells that end, and the events of the study say when."""

    def __init__(self, store: RunStore, board: Leaderboard) -> None:
        self.store, self.board = store, board
        self.written, self.told = -math.inf, time.monotonic()

    def going(self) -> None:
        """A cell has told something: until then the study was at work, which its budget counts."""
        if time.monotonic() - self.told >= TELL_S:
            self.store.event("going")
            self.told = time.monotonic()

    def ended(self, cell: str) -> None:
        """A cell is finished, stopped or refused."""
        self.board.update(cell)
        self.store.event("cell", cell=cell, state=self.board.rows[cell]["state"])
        if time.monotonic() - self.written >= WRITE_S:
            self.board.write()
            self.written = time.monotonic()


def _budget(spec: BudgetSpec, store: RunStore) -> Budget:
    """What is left of it; how much was used, the loop knows."""
    worked_s = working_time(store.events())
    return Budget(
        trials=spec.trials or math.inf,
        used_s=3600 * spec.gpu_hours or math.inf,
        until=max(0.0, 3600 * spec.hours - worked_s) if spec.hours else math.inf,
        grace_s=spec.grace_s,
    )


def _open_many_files() -> None:
    """Every cell that is going holds a lock and a database."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
