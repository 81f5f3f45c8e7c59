"""Cells whose folders fail, beside others that go on.

python -m pytest tests/flows/test_cell_faults.py
"""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from flows.cell_runs import CellRuns, Connect
from flows.cells import Cell, study_cells
from infra.specs import ClusterSpec
from infra.store import RunStore
from infra.study_files import load_study
from tests.faults import processes
from tests.flows.commands import write_project

STUDY = """
[study]
dir = "{folder}/study"
[[cells]]
spec = "tiny.toml"
allocations = ["uniform"]
sparsities = [0.4, 0.5]
overrides = {{ "evaluation.calibration_seeds" = 1 }}
[[cells]]
spec = "tiny.toml"
name = "large"
overrides = {{ "cluster.cpus_per_trial" = 4000 }}
"""


class Removes:
    """A view that notes the events; at `when` it removes the folder of its cell."""

    def __init__(self, cell: Cell, when: str) -> None:
        self.cell, self.when = cell, when
        self.events: list[dict[str, Any]] = []

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == self.when:
            shutil.rmtree(self.cell.folder)


@pytest.mark.timeout(120)
def test_a_folder_that_is_gone_or_locked_is_the_end_of_its_cell_alone(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY.format(folder=tmp_path))
    cells = study_cells(load_study(tmp_path / "study.toml"))
    gone, well, large = cells
    views = {cell.name: Removes(cell, "model" if cell is gone else "") for cell in cells}
    runs = CellRuns(cells, lambda cell: views[cell.name])
    with RunStore.open(large.spec):
        assert runs.drive(ClusterSpec(), connect=cast(Connect, processes.connect)) == ""
    last = {name: view.events[-1] for name, view in views.items()}
    assert last[gone.name]["kind"] == last[large.name]["kind"] == "stopped"
    assert str(gone.folder) in last[gone.name]["reason"]
    assert "no node holds a trial of 4000 CPUs" in last[large.name]["reason"]
    assert last[well.name]["kind"] == "finished"
