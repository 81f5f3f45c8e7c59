"""What a study shows while it runs: a line per cell on a terminal, else one JSON line per event.

    overview = Overview(cells, ended=board.update, going=lambda: None, as_json=False)
    with overview.shown():
        overview.view_of(cell).event({"kind": "started"})

Events are those of flows/live.py, with the name of the cell in `cell`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.cells import Cell
from flows.dispatch_loop import Entry
from flows.live import Event, View, duration

ENDED = ("finished", "stopped")


class CellLine:
    """What is shown of one cell."""

    def __init__(self, cell: Cell, overview: Overview) -> None:
        self.cell, self.overview = cell, overview
        self.state = "not begun"
        self.trials = self.failed = self.planned = 0
        self.best: Event | None = None

    def event(self, event: Event) -> None:
        """Take an event of the cell in."""
        kind = event["kind"]
        self.planned = event.get("planned_trials", self.planned)
        if kind == "trial":
            self._trial(event)
        elif kind == "stopped":
            self.state = f"stopped: {event['reason']}"
        elif kind != "storage":
            self.state = "reading the model" if kind == "started" else kind
        self.overview.told(self, event)

    def _trial(self, event: Event) -> None:
        self.trials += 1
        self.failed += event["state"] == "failed"
        if event["stage"] == "search" and event["state"] == "complete":
            name = self.cell.spec.search.objective
            event = event | {"value": -event["loss"] if name == "loss" else event["scores"][name]}
            rank = (event["rung"], event["value"])
            if self.best is None or rank > (self.best["rung"], self.best["value"]):
                self.best = event

    def said(self) -> str:
        """Best candidate so far, on the highest rung that has one."""
        if self.best is None:
            return ""
        value = abs(self.best["value"])
        return f"{self.best['label']}, {self.cell.spec.search.objective} {value:.4f}"


class Overview:
    """All cells of a study."""

    def __init__(
        self,
        cells: Sequence[Cell],
        ended: Callable[[str], None],
        going: Callable[[], None],
        *,
        as_json: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(highlight=False)
        self.as_json = as_json or not self.console.is_terminal
        self.lines = {cell.name: CellLine(cell, self) for cell in cells}
        self.entries: Mapping[str, Entry] = {}  # for what they have used
        self.now: Callable[[], float] = lambda: 0.0  # by the cluster's clock
        self._ended, self._going = ended, going
        self._clock, self._begun = clock, clock()

    def say(self, text: str) -> None:
        """What is being done before the first cell tells anything."""
        if self.as_json:
            event = {"kind": "starting", "stage": text}
            print(json.dumps(event), file=self.console.file, flush=True)
        else:
            self.console.print(Text(text))

    def view_of(self, cell: Cell) -> View:
        """Where the run of a cell tells what happens."""
        return self.lines[cell.name]

    def told(self, line: CellLine, event: Event) -> None:
        """A cell has taken an event in."""
        if self.as_json and not event.get("earlier"):
            print(json.dumps({"cell": line.cell.name} | event), file=self.console.file, flush=True)
        self._going()
        if event["kind"] in ENDED:
            if not self.as_json:
                self.console.print(Text(f"{line.cell.name}  {line.state}"))
            self._ended(line.cell.name)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """For the duration of the study: the table on a terminal."""
        if self.as_json:
            yield
            return
        with Live(console=self.console, get_renderable=self.render, refresh_per_second=1):
            yield

    def render(self) -> Table:
        """The cells that are going, as many as the screen holds, and how many there are."""
        going = [line for line in self.lines.values() if line.trials or line.state != "not begun"]
        ended = [line for line in going if line.state.startswith(ENDED)]
        going = [line for line in going if line not in ended]
        time_s = duration(self._clock() - self._begun)
        title = f"{len(ended)} of {len(self.lines)} cells ended, {len(going)} going, {time_s}"
        table = Table(title=title, title_justify="left")
        for column in ("cell", "state", "trials", "best so far", "used"):
            right = column in ("trials", "used")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        now = self.now()
        for line in going[: max(1, self.console.height - 6)]:
            entry = self.entries.get(line.cell.name)
            failed = f", {line.failed} failed" if line.failed else ""
            table.add_row(
                line.cell.name,
                Text(line.state),
                f"{line.trials} of {line.planned or '?'}{failed}",
                line.said(),
                duration(entry.used_at(now)) if entry else "",
            )
        return table
