"""What is going on in a run, a comparison or a study, from its files alone.

    status(Path("runs/night"))["trials"]    # or: sparseramp status runs/night

Nothing is written and no cluster is asked, so that it can be called while the driver is at work.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from flows.cells import Cell, cells_of
from flows.comparison import NOT_BEGUN, STOPPED, UNFINISHED, row_of
from flows.following import FILE
from flows.leaderboard import STUDY, spent_of, study_cells_in
from flows.live import duration, steps_in_words
from flows.plan import best_so_far, planned_trials
from flows.recovered import FILE as RECOVERY
from flows.recovered import conclusion, kept_recovery
from infra.driver import driver_of
from infra.errors import UserError
from infra.store import RunStore

Status = dict[str, Any]
_FACTS = TypeAdapter(dict[str, Any])


def status(folder: Path) -> Status:
    """Raises UserError where the folder is no run directory."""
    store = RunStore.read(folder)
    driver, events = driver_of(folder), store.events()
    found: Status = {
        "run": str(folder),
        "command": store.command,
        "driver": driver and vars(driver),
        "last_event": events[-1]["event"] if events else "",
        "age_s": _age_s(events[-1]["time"]) if events else None,
    }
    if store.command == "recover":
        return found | _recovery(store)
    if cells := cells_in(store):
        spent = spent_of(store) if driver is None else ""
        rows = [_cell(cell, spent) for cell in cells]
        newest = [row["age_s"] for row in rows if row["age_s"] is not None]
        return found | {
            "age_s": min([*newest, *([found["age_s"]] if events else [])], default=None),
            "states": dict(Counter(row["state"] for row in rows)),
            "trials": {
                key: sum(row["trials"][key] for row in rows)
                for key in ("complete", "failed", "planned")
            },
            "cells": rows,
        }
    return found | _run(store)


def at_work(folder: Path) -> Path | None:
    """Of a run that a driver is at work on, or a cell that it is to end, the page that it writes.

    None where nobody would be disturbed by a new report.
    """
    if driver_of(folder):
        pages = {"compare": "compare.html", "study": "leaderboard.html"}
        return folder / pages.get(RunStore.read(folder).command, "report.html")
    ended = (folder / "report.json").exists()
    return None if ended or not driver_of(folder.resolve().parent) else folder / "report.html"


def cells_in(store: RunStore) -> list[Cell]:
    """The cells of a comparison or a study; none of a run."""
    if store.command == "compare":
        return cells_of(store.spec, store.dir)
    if store.command == "study" and store.path(STUDY).exists():
        return study_cells_in(store)
    return []


def _recovery(store: RunStore) -> Status:
    """Of a fine-tune of a checkpoint: how far it is, or what it gave."""
    finished = store.path(RECOVERY).exists()
    facts = store.parse(FILE, _FACTS) if store.path(FILE).exists() and not finished else None
    return {
        "finished": finished,
        "steps": store.spec.recovery.steps,
        "progress": facts and facts | {"age_s": _age_s(facts["time"])},
        "recovery": kept_recovery(store.dir) if finished else None,
    }


def _run(store: RunStore) -> Status:
    results = store.results()
    best = best_so_far(store.spec, results)
    finished = store.path("report.json").exists()
    planned = planned_trials(store.spec, store.model(), results)
    failed = sum(result.state == "failed" for result in results.values())
    return {
        "trials": {
            "complete": len(results) - failed,
            "failed": failed,
            "planned": len(results) if finished else planned,
        },
        "finished": finished,
        "best": best
        and {
            "label": best.spec.prune.label,
            "objective": store.spec.search.objective,
            "value": abs(best.objective_mean(store.spec.search.objective)),
            "rung": best.spec.rung,
        },
        "used_s": sum(result.cost.used_s for result in results.values()),
    }


def _cell(cell: Cell, spent: str) -> Status:
    row = row_of(cell)
    if spent and row["state"] in (NOT_BEGUN, UNFINISHED) and not driver_of(cell.folder):
        row |= {"state": STOPPED, "cause": spent}
    known = {"cell": cell.name, "state": row["state"], "cause": row["cause"], "age_s": None}
    none = {"complete": 0, "failed": 0, "planned": planned_trials(cell.spec, None, {})}
    known |= {"trials": none, "best": None, "used_s": 0.0}
    if row["state"] == "damaged" or not (cell.folder / "run.json").exists():
        return known
    store = RunStore.read(cell.folder)
    events = store.events()
    if row["state"] == UNFINISHED and driver_of(cell.folder):
        known |= {"state": "going", "cause": events[-1]["event"] if events else ""}
    try:
        return known | _run(store) | {"age_s": _age_s(events[-1]["time"]) if events else None}
    except UserError as error:
        return known | {"state": "damaged", "cause": str(error)}


def _age_s(time: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def print_status(found: Status) -> None:
    """As few lines as say it; of many cells a line for each that has begun or ended."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200  # in a file, nothing has to fit a screen
    driver = found["driver"]
    who = f"driven by pid {driver['pid']} on {driver['host']}" if driver else "no driver is at work"
    if not driver and found["last_event"] in ("finished", "stopped"):
        who = f"{found['last_event']}, {who}"
    age = "" if found["age_s"] is None else f"; last event {duration(found['age_s'])} ago"
    console.print(f"{found['run']}: {found['command']}, {who}{age}", markup=False)
    if found["command"] == "recover":
        console.print(_how_far(found), markup=False)
        return
    trials = found["trials"]
    failed = f", {trials['failed']} failed" if trials["failed"] else ""
    done = trials["complete"] + trials["failed"]
    console.print(f"trials  {done} of at most {trials['planned']}{failed}")
    if "cells" not in found:
        console.print(f"best    {_best(found['best'])}", markup=False)
        return
    states = ", ".join(
        f"{count} {'stopped by the budget' if state == STOPPED else state}"
        for state, count in found["states"].items()
    )
    console.print(f"cells   {states}")
    table = Table()
    for column in ("cell", "state", "trials", "best so far", "used"):
        table.add_column(column, overflow="fold")
    for row in found["cells"]:
        if row["state"] == NOT_BEGUN:
            continue
        numbers = row["trials"]
        table.add_row(
            row["cell"],
            f"{row['state']}: {row['cause']}" if row["cause"] else row["state"],
            f"{numbers['complete'] + numbers['failed']} of {numbers['planned']}",
            _best(row["best"]),
            duration(row["used_s"]),
        )
    console.print(table, markup=False)


def _how_far(found: Status) -> str:
    """Of a fine-tune, in a line."""
    if recovery := found["recovery"]:
        return conclusion(recovery)
    again = "" if found["driver"] else "; the same command goes on"
    if facts := found["progress"]:
        pace = {} if found["driver"] else {"begun": facts["step"]}  # nobody is at work: none
        return f"{steps_in_words(facts | pace)}; told {duration(facts['age_s'])} ago{again}"
    return f"no step of {found['steps']} yet{again}"


def _best(best: Status | None) -> str:
    if best is None:
        return "none yet"
    return f"{best['label']}, {best['objective']} {best['value']:.4f}, rung {best['rung']}"
