"""The page of a comparison, from the files of synthetic cells.

python -m pytest tests/flows/test_comparison.py
"""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from flows.cell_runs import CellRuns, unfinished
from flows.cells import Cell, cells_of
from flows.compare import _CellView
from flows.comparison import _table, print_comparison, write_comparison
from flows.report import write_report
from flows.status import status
from infra.store import RunStore
from tests.browser import draw, needs_browser
from tests.flows.test_report import make_model, make_run, make_spec

LISTS = {
    "methods": ["magnitude", "sparsegpt"],
    "allocations": ["uniform", "arithmetic", "als"],
    "models": ["org/SmolLM2-135M-Instruct"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods by three allocations, one of which has no result; the numbers are all alike."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    spec = make_spec(compare=LISTS, run={"dir": str(folder)})
    with RunStore.open(spec, "compare"):
        for cell in cells_of(spec):
            if cell.spec.prune.allocation == "als":
                continue
            with RunStore.open(cell.spec) as store:
                store.write_model(make_model())
                for result in make_run():
                    store.write_result(result)
            write_report(store.dir)
    write_comparison(folder)
    return folder


@needs_browser
@pytest.mark.parametrize("width", [1100, 1300, 1420])
def test_every_column_is_seen(folder: Path, tmp_path: Path, width: int) -> None:
    seen = draw(folder / "compare.html", tmp_path, width)
    assert (seen.errors, seen.too_wide, seen.hidden_px) == ([], [], 0)
    assert len(seen.links) == 4 and all((folder / link).is_file() for link in seen.links)


def test_what_other_lists_have_finished_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under equal settings as rows that say so, under others by name."""
    copy = shutil.copytree(folder, tmp_path / "compare")
    name = "smollm2-135m-instruct_{}_{}_0.6".format
    narrow = LISTS | {"methods": ["magnitude"], "allocations": ["uniform", "als"]}
    with RunStore.open(make_spec(compare=narrow, run={"dir": str(copy)}), "compare"):
        found = write_comparison(copy)
    assert {row["cell"]: (row["asked"], row["state"]) for row in found["rows"]} == {
        name("magnitude", "uniform"): (True, "complete"),
        name("magnitude", "als"): (True, "not begun"),
        name("magnitude", "arithmetic"): (False, "complete"),
        name("sparsegpt", "arithmetic"): (False, "complete"),
        name("sparsegpt", "uniform"): (False, "complete"),
    }
    assert found["other_settings"] == []
    assert (copy / "compare.html").read_text().count("(earlier)</td>") == 3
    print_comparison(found, str(copy))
    text = capsys.readouterr().out
    assert text.count(" (earlier) ") == 3 and "\n(earlier): finished by a start" in text
    assert "search cost: token passes of all candidates" in text

    other = make_spec(
        compare=LISTS | {"methods": ["wanda"]}, calibration={"seed": 7}, run={"dir": str(copy)}
    )
    with RunStore.open(other, "compare"):
        found = write_comparison(copy)
    assert {row["method"] for row in found["rows"]} == {"wanda"}
    assert found["other_settings"] == [
        name(method, allocation)
        for method in ("magnitude", "sparsegpt")
        for allocation in ("arithmetic", "uniform")
    ]
    print_comparison(found, str(copy))
    assert f"of other settings: {name('magnitude', 'arithmetic')}, " in capsys.readouterr().out


def test_an_allocation_without_numbers_shows_the_span_of_its_rates(folder: Path) -> None:
    row = write_comparison(folder)["rows"][1]
    assert _table([row])[1][0][4] == row["label"]
    row |= {"allocation": "my/rates.json", "label": "my/rates.json", "rates": [0.5, 0.72]}
    assert _table([row])[1][0][4] == "0.500 to 0.720"


@pytest.mark.parametrize("trials, state", [(0, "refused"), (1, "failed")])
def test_a_cell_that_ends_is_called_as_in_its_row(tmp_path: Path, trials: int, state: str) -> None:
    spec = make_spec(compare=LISTS, run={"dir": str(tmp_path)})
    cell, file = cells_of(spec)[0], io.StringIO()
    with RunStore.open(spec, "compare"), RunStore.open(cell.spec) as store:
        for result in make_run()[:trials]:
            store.write_result(result)
        store.event("stopped", cause="UserError", reason="no room")
        progress = Progress(console=Console(file=file), disable=True)
        _CellView(cell, progress, progress.add_task("")).event({"kind": "stopped"})
        (row, *_) = write_comparison(tmp_path)["rows"]
    assert file.getvalue() == f"{cell.name}  {state}: no room\n"
    assert (row["state"], row["cause"]) == (state, "no room")


@pytest.mark.parametrize("left", [None, b"", b'{"time": "2026-01-'])
def test_a_cell_whose_start_was_killed_before_its_first_event_goes_on(
    tmp_path: Path, left: bytes | None
) -> None:
    spec = make_spec(compare=LISTS, run={"dir": str(tmp_path)})
    cell = cells_of(spec)[0]
    with RunStore.open(spec, "compare"):
        RunStore.open(cell.spec).close()
        (cell.folder / "events.jsonl").unlink()
        if left is not None:
            (cell.folder / "events.jsonl").write_bytes(left)
        (row, *_) = write_comparison(tmp_path)["rows"]
    assert (row["state"], row["cause"]) == ("unfinished", "the same command goes on")
    assert status(tmp_path)["cells"][0]["state"] == "unfinished"


def test_a_cell_whose_driver_was_killed_while_it_wrote_the_report_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "compare")
    saving = LISTS | {"allocations": ["uniform"], "checkpoints": True}
    cells = cells_of(make_spec(compare=saving, run={"dir": str(copy)}))
    for cell in cells:
        (cell.folder / "best").mkdir()
    assert unfinished(cells) == cells  # neither checkpoint has its card
    for cell in cells:
        (cell.folder / "best" / "README.md").touch()
    assert unfinished(cells) == []
    (cells[0].folder / "report.html").unlink()
    assert unfinished(cells) == cells[:1]


class Told:
    """What a cell tells while nothing else is shown."""

    def __init__(self, events: dict[str, Any], cell: Cell) -> None:
        self.events, self.cell = events, cell

    def event(self, event: dict[str, Any]) -> None:
        self.events[self.cell.name] = event


@pytest.mark.parametrize(
    "name", ["trials/00003.json", "model.json", "run.json", "events.jsonl", "report.json"]
)
def test_a_damaged_file_ends_its_own_cell_alone(folder: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "compare")
    spec = make_spec(compare=LISTS | {"allocations": ["uniform"]}, run={"dir": str(copy)})
    cell, other = cells_of(spec)
    (cell.folder / name).write_bytes(b'{"a": [\n')
    if name not in ("report.json", "run.json"):
        (cell.folder / "report.json").unlink()
    with RunStore.open(spec, "compare"):
        rows = {row["cell"]: row for row in write_comparison(copy)["rows"]}
        shown = {row["cell"]: row for row in status(copy)["cells"]}
    assert rows[other.name]["state"] == shown[other.name]["state"] == "complete"
    if name != "model.json":  # which no row reads
        assert rows[cell.name]["state"] == "damaged"
        assert rows[cell.name]["cause"].startswith(f"{cell.folder / name} is damaged (")
    assert shown[cell.name]["state"] == "damaged"
    assert unfinished([cell, other]) == [cell]
    if name in ("report.json", "events.jsonl"):  # a start makes or reads them later
        return
    told: dict[str, Any] = {}
    runs = CellRuns([cell, other], lambda cell: Told(told, cell))
    assert runs.todo == [] and list(told) == [cell.name]
    assert told[cell.name]["kind"] == "stopped"
    assert f"{cell.folder / name} is damaged (" in told[cell.name]["reason"]
