"""Cells whose folders or nodes fail, beside others that go on.

python -m pytest tests/flows/test_cell_faults.py
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from flows.cell_runs import CellRuns, Connect
from flows.cells import Cell, study_cells
from flows.dispatch_loop import drive
from infra.cluster import Node, Share
from infra.errors import UserError
from infra.records import TrialSpec
from infra.specs import ClusterSpec
from infra.store import RunStore
from infra.study_files import load_study
from tests.faults import processes
from tests.flows.commands import write_project
from tests.flows.test_dispatch_loop import Many, entry
from tests.infra.trials import trial
from tests.infra.virtual import VirtualCluster, node

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


@pytest.mark.parametrize("returns", [True, False])
def test_a_cell_whose_only_node_is_lost_says_so_and_ends_alone(returns: bool) -> None:
    """Unless the node comes back in time; a cell of it that has not begun ends, too."""
    large = node("large", cpus=16, gpus=8)
    changes: list[tuple[float, str | Node]] = [(90.0, "large")]
    changes += [(600.0, large)] if returns else []
    cluster = VirtualCluster([large, node("n", cpus=2)], changes=changes)
    runs = [Many("a", 40, wave=40), Many("b", 8), Many("cpu", 100)]
    entries = [entry(runs[0]), entry(runs[1]), entry(runs[2], Share(cpus=1, gpus=0), at_once=2)]
    assert drive(cluster, entries, keep_going=True) == ""
    assert runs[2].end == "finished"
    assert len(runs[2].taken) == 100
    said = "no node that is there holds a trial of 1 CPUs and 1 GPUs: it waits for one to be added"
    assert runs[0].waited == [said]
    if returns:
        assert runs[0].end == runs[1].end == "finished"
        assert cluster.now() < 600 + 60 * 100 / 2
    else:
        ended = "stopped: no node has held a trial of 1 CPUs and 1 GPUs for 15 min: bring one back"
        assert runs[0].end.startswith(ended)
        assert runs[1].end.startswith(ended)
        assert (len(runs[0].taken), runs[1].taken) == (8 + 8, [])


def test_a_search_whose_only_node_is_lost_ends_with_one_line() -> None:
    cluster = VirtualCluster([node("a", cpus=2, gpus=2)], changes=[(90.0, "a")])
    with pytest.raises(UserError, match="no node has held a trial of 1 CPUs and 1 GPUs for 15 min"):
        drive(cluster, [entry(Many("a", 40))])
    assert cluster.now() < 90 + 900 + 10


class Late(Many):
    """A run that asks for what another has begun after a trial of its own."""

    def trials(self) -> Iterator[TrialSpec | None]:
        self.out += 1
        yield trial(9, "a").model_copy(update={"windows": 99})
        while self.out:
            yield None
        yield from super().trials()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("grows", [None, lambda share: None])
@pytest.mark.parametrize("kind", [Many, Late])
def test_what_waits_for_a_dead_node_is_done_where_another_cell_has_one(
    kind: type[Many], grows: Any
) -> None:
    """Whether that cell wanted it before the node died or asks for it afterwards, and whether or
    not an autoscaler might bring a node some day."""
    x, y = (Share(cpus=1, gpus=1, labels=(("kind", name),)) for name in "xy")
    nodes = [node(name, cpus=1, gpus=1, kind=name) for name in "xy"]
    cluster = VirtualCluster(nodes, changes=[(30.0, "x")], grows=grows)
    first, second = Many("a", 1), kind("a", 1)
    drive(cluster, [entry(first, x), entry(second, y)], keep_going=True)
    assert (first.end, second.end) == ("finished", "finished")
    assert [where for _, where, spec in cluster.machines.log if spec.windows == 2] == ["x", "y"]
    assert cluster.now() < 200
    assert first.taken == [0] and second.taken[-1:] == [0]
