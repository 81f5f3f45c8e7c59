"""The leaderboard of a study, from the files of its cells: leaderboard.html, .csv and .json.

    write_leaderboard(Path("runs/night"))    # or: sparseramp report runs/night

Every cell is a row, whatever became of it. It is written again whenever a cell has ended.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from flows.cells import Cell, study_cells
from flows.comparison import NOT_BEGUN, STOPPED, UNFINISHED, Row, row_of
from flows.figures import RUNG_COLOURS, Figure
from flows.live import duration
from flows.report import page
from infra.bits import ROUNDING
from infra.errors import UserError
from infra.store import RunStore, write_atomic
from infra.study_files import StudySpec
from tasks.statistics import plus_minus

STUDY = "study.json"  # the study as it was read
COLUMNS = ["cell", "model", "modality", "family", "blocks", "method", "allocation", "goal"]
COLUMNS += ["sparsity", "bits", "realised", "realised_bits", "state", "verdict", "cause"]
COLUMNS += ["headline", "dense", "uniform", "best"]
COLUMNS += ["gain", "gain_stderr", "gain_low", "gain_high", "gain_unit", "beta", "tilt", "trials"]
COLUMNS += ["used_s", "peak_memory_bytes", "priority", "report"]
# Columns that a narrow terminal may lack, those that are kept longest first.
SPARED = ["allocation", "best", "uniform", "dense", "tilt", "beta", "trials", "used"]
SPARED += ["95 % interval", "metric", "memory"]
FOLDED = 24  # characters of an outcome, on as many lines as it takes


def write_leaderboard(folder: Path) -> dict[str, Any]:
    """Make the three files from those of the cells, and return what leaderboard.json holds."""
    store = RunStore.read(folder)
    board = Leaderboard(store, study_cells_in(store))
    return board.write(spent_of(store))


def spent_of(store: RunStore) -> str:
    """Why the budget has ended a study; empty where it has not, or where a later start goes on."""
    ends = [e for e in store.events() if e["event"] in ("stopped", "finished", "resumed")]
    return ends[-1].get("reason", "") if ends and ends[-1].get("cause") == "BudgetSpent" else ""


def unfit_cells(board: dict[str, Any]) -> list[Row]:
    """Rows without a result, but for those that a spent budget has left for a later start."""
    return [row for row in board["rows"] if row["state"] not in ("complete", STOPPED)]


def study_cells_in(store: RunStore) -> list[Cell]:
    """The cells of a study; raises UserError where study.json cannot be read."""
    study = store.parse(STUDY, TypeAdapter(StudySpec))
    return study_cells(study.model_copy(update={"dir": str(store.dir)}))  # it may have been moved


class Leaderboard:
    """Rows that are made once for each cell that has ended, since there may be hundreds."""

    def __init__(self, store: RunStore, cells: Sequence[Cell]) -> None:
        self.store = store
        self.cells = {cell.name: cell for cell in cells}
        earlier = _earlier_rows(store)
        self.rows: dict[str, Row] = {}
        for cell in cells:
            row = earlier.get(cell.name, {})
            is_new = row.get("state") != "complete" or row["stamp"] != _stamp(cell)
            is_new = is_new or "goal" not in row  # of an earlier version
            self.rows[cell.name] = _row(cell) if is_new else row | {"priority": cell.priority}

    def update(self, name: str) -> None:
        """Look at a cell again."""
        self.rows[name] = _row(self.cells[name])

    def write(self, spent: str = "") -> dict[str, Any]:
        """Write the three files; `spent` is why the budget ended the study."""
        rows = list(self.rows.values())
        if spent:
            stopped = {"state": STOPPED, "cause": spent}
            left = (NOT_BEGUN, UNFINISHED)  # the latter since an earlier start
            rows = [row | stopped if row["state"] in left else row for row in rows]
        rows.sort(key=lambda row: (row["model"], row["sparsity"], row["method"]))
        plots = _plots([row for row in rows if row["state"] == "complete"])
        board = {
            "command": "study",
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "spent": spent,
            "used_s": sum(row["used_s"] for row in rows),
            "rows": rows,
            "provenance": self.store.provenance,
            "version": self.store.provenance.get("sparseramp", "checkout"),
        }
        data = json.dumps(board, indent=1, allow_nan=False)
        write_atomic(self.store.path("leaderboard.json"), data.encode())
        write_atomic(self.store.path("leaderboard.csv"), _csv(rows).encode())
        html = page(
            "leaderboard.html",
            page=board,
            study=self.store.dir.resolve().name,
            words=[_words(row, _recovers(rows)) for row in rows],
            plots=plots,
            figures={name: figure for name, (_, figure) in plots.items()},
        )
        write_atomic(self.store.path("leaderboard.html"), html.encode())
        return board


def _earlier_rows(store: RunStore) -> dict[str, Row]:
    """Of the leaderboard that is there: of finished cells it need not be found out again."""
    try:
        board = store.parse("leaderboard.json", TypeAdapter(dict[str, Any]))
    except UserError:  # there is none, or it is damaged
        return {}
    return {row["cell"]: row for row in board["rows"]}


def _stamp(cell: Cell) -> int:
    """When the report of a cell was written; 0 where there is none."""
    path = cell.folder / "report.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def _row(cell: Cell) -> Row:
    row: Row = {"trials": 0, "used_s": 0.0, "peak_memory_bytes": 0, **row_of(cell)}
    if row["state"] not in (NOT_BEGUN, "damaged"):
        store = RunStore.read(cell.folder)
        row["trials"] = len(store.numbers())
        if row["state"] != "complete":
            costs = [store.result(number).cost for number in store.numbers()]
            row["used_s"] = sum(cost.used_s for cost in costs)
            row["peak_memory_bytes"] = max((c.peak_memory_bytes for c in costs), default=0)
    has_report = (cell.folder / "report.html").exists()
    return row | {
        "priority": cell.priority,
        "stamp": _stamp(cell),
        "report": f"{cell.name}/report.html" if has_report else "",
    }


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    columns = [*COLUMNS, *(["recovered"] if _recovers(rows) else [])]
    table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in rows:
        gain = row.get("gain", {})
        table.writerow(
            row
            | {side: _headline(row, side).get("mean", "") for side in ("dense", "uniform", "best")}
            | {f"gain_{key}": gain.get(key, "") for key in ("stderr", "low", "high", "unit")}
            | {"gain": gain.get("mean", ""), "recovered": _recovered(row).get("mean", "")}
        )
    return file.getvalue()


def _headline(row: Row, side: str) -> dict[str, Any]:
    """The metric that a report opens with, of one side; empty where there is none."""
    metrics = row.get("metrics" if side == "best" else side) or {}
    found: dict[str, Any] = metrics.get(row.get("headline", ""), {})
    return found


def _recovers(rows: Sequence[Row]) -> bool:
    """Whether any best model was fine-tuned."""
    return any(name.startswith("recovered ") for row in rows for name in row.get("metrics") or ())


def _recovered(row: Row) -> dict[str, Any]:
    """The headline metric of the best model after its fine-tune; empty where there was none."""
    found: dict[str, Any] = (row.get("metrics") or {}).get(f"recovered {row.get('headline')}", {})
    return found


def _words(row: Row, with_recovered: bool) -> dict[str, str]:
    """A row as it is shown, by heading."""
    sides = {side: _headline(row, side) for side in ("dense", "uniform", "best")}
    shown = {
        "model": row["model"],
        "sparsity": row["goal"].removesuffix(" sparsity"),
        "method": row["method"],
        "allocation": row["allocation"],
        **{side: plus_minus(m["mean"], m["stderr"]) if m else "" for side, m in sides.items()},
        "metric": row.get("headline", ""),
    }
    gain = row.get("gain")
    measured = gain is not None and row["verdict"] != "baseline"
    recovered = _recovered(row)
    after = plus_minus(recovered["mean"], recovered["stderr"]) if recovered else ""
    return (
        shown
        | ({"recovered": after} if with_recovered else {})
        | {
            "gain": f"{gain['mean']:.3f} {gain['unit']}" if gain and measured else "",
            "95 % interval": f"{gain['low']:.3f} to {gain['high']:.3f}"
            if gain and measured
            else "",
            "beta": f"{row['beta']:.3g}" if "beta" in row else "",
            "tilt": f"{row['tilt']:.2f}" if "tilt" in row else "",
            "trials": str(row["trials"]),
            "used": duration(row["used_s"]),
            "memory": f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
            if row["peak_memory_bytes"]
            else "",
            "outcome": row["cause"] or row.get("verdict", row["state"])
            if row["state"] == "complete"
            else f"{row['state']}: {row['cause']}",
        }
    )


def _plots(rows: Sequence[Row]) -> dict[str, tuple[str, Figure]]:
    """Title and figure by the id of its element: gains in each unit, and tilts by family."""
    plots: dict[str, tuple[str, Figure]] = {}
    gains = [row for row in rows if row["verdict"] != "baseline"]
    for unit in dict.fromkeys(row["gain"]["unit"] for row in gains):
        inside = [row for row in gains if row["gain"]["unit"] == unit]
        for key, title in (("sparsity", "sparsity"), ("blocks", "depth, in blocks")):
            name = f"Gain over uniform against {title}"
            shown = [r for r in inside if key == "blocks" or r["method"] not in ROUNDING]
            if shown:
                plots[f"plot{len(plots)}"] = name, _gains(shown, key, title, unit)
    searched = [row for row in gains if row["allocation"] == "arithmetic"]
    if searched:
        plots[f"plot{len(plots)}"] = "Best tilt by family", _tilts(searched)
    return plots


def _gains(rows: Sequence[Row], key: str, title: str, unit: str) -> Figure:
    """Points with 95 % intervals, one colour per family."""
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": family,
            "x": [row[key] for row in mine],
            "y": [row["gain"]["mean"] for row in mine],
            "text": [row["cell"] for row in mine],
            "hovertemplate": f"%{{text}}<br>%{{y:.4f}} {unit}<extra></extra>",
            "error_y": {
                "type": "data",
                "array": [row["gain"]["high"] - row["gain"]["mean"] for row in mine],
                "arrayminus": [row["gain"]["mean"] - row["gain"]["low"] for row in mine],
                "thickness": 1.2,
                "width": 3,
            },
            "marker": {"size": 9, "color": colour},
        }
        for family, mine, colour in _families(rows)
    ]
    yaxis = {"title": {"text": f"gain, {unit}"}}
    return {"data": data, "layout": {"xaxis": {"title": {"text": title}}, "yaxis": yaxis}}


def _tilts(rows: Sequence[Row]) -> Figure:
    """The tilt of the best line of every cell, one column per family."""
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": family,
            "x": [family for _ in mine],
            "y": [row["tilt"] for row in mine],
            "text": [row["cell"] for row in mine],
            "hovertemplate": "%{text}<br>tilt %{y:.2f}<extra></extra>",
            "marker": {"size": 9, "color": colour},
        }
        for family, mine, colour in _families(rows)
    ]
    yaxis = {"title": {"text": "tilt: beta over its bound"}}
    return {"data": data, "layout": {"xaxis": {"type": "category"}, "yaxis": yaxis}}


def _families(rows: Sequence[Row]) -> list[tuple[str, list[Row], str]]:
    names = list(dict.fromkeys(row["family"] for row in rows))
    return [
        (name, [row for row in rows if row["family"] == name], RUNG_COLOURS[i % len(RUNG_COLOURS)])
        for i, name in enumerate(names)
    ]


def _fitting(rows: Sequence[dict[str, str]], width: int) -> tuple[list[str], bool]:
    """The columns that a terminal has room for, and whether all but the outcome are shown in one
    piece; the page and the CSV have all of them."""

    def needed(name: str) -> int:
        longest = max(len(name), *(len(row[name]) for row in rows))
        return 3 + (min(longest, FOLDED) if name == "outcome" else longest)

    kept = [name for name in rows[0] if name not in SPARED]
    left = width - 1 - sum(map(needed, kept))
    for name in SPARED:
        if needed(name) <= left:
            kept.append(name)
            left -= needed(name)
    squeezed = left + needed("outcome") - 3  # characters that the others leave it
    return [name for name in rows[0] if name in kept], squeezed >= len("outcome")


def print_leaderboard(board: dict[str, Any], folder: str) -> None:
    """The table on a terminal, and where to look next."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    rows = [_words(row, _recovers(board["rows"])) for row in board["rows"]]
    table = Table(
        title=f"{len(rows)} cells, {duration(board['used_s'])} used", title_justify="left"
    )
    # In a file, nothing has to fit a screen.
    shown, whole = list(rows[0]), False
    if console.is_terminal:
        shown, whole = _fitting(rows, console.width)
    for name in shown:
        table.add_column(name, overflow="fold", no_wrap=whole and name != "outcome")
    for words in rows:
        table.add_row(*(words[name] for name in shown))
    console.print(table, markup=False)
    if board["spent"]:
        console.print(f"stopped, {board['spent']}: with a larger one the same command goes on")
    console.print(f"report  {Path(folder) / 'leaderboard.html'}", soft_wrap=True)
