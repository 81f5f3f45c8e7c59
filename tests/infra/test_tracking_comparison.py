"""The MLflow copy of a comparison: one process serves all of its cells.

python -m pytest tests/infra/test_tracking_comparison.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow

from infra import tracking
from infra.records import TrialResult
from infra.specs import Spec
from infra.store import RunStore
from tests.infra.test_tracking import REPORT, sync, wait


def test_one_mirror_serves_the_cells_of_a_comparison(
    make_spec: Callable[..., Spec], make_result: Callable[..., TrialResult], tmp_path: Path
) -> None:
    """A cell arrives once it has a report, while the driver goes on with the others."""
    folder = tmp_path / "runs" / "table"
    spec = make_spec(run={"dir": str(folder)})
    with RunStore.open(spec, "compare"):
        cells = [RunStore.open(make_spec(run={"dir": str(folder / name)})) for name in "ab"]
        for cell in cells:
            cell.write_result(make_result(0))
        report(cells[0])
        assert tracking.pending(folder) == 1
        mirror = tracking.start(folder, spec.tracking)
        assert mirror
        try:
            wait(lambda: tracking.pending(folder) == 0, 60)
            wait(lambda: finished(cells[0]) == ["a", "trial 00000"], 30)
            cells[0].write_result(make_result(1, 0.01))  # another start adds to it
            report(cells[0])
            wait(lambda: finished(cells[0]) == ["a", "trial 00000", "trial 00001"], 30)
            assert mirror.poll() is None and len(list(folder.glob("*/tracking.json"))) == 1
        finally:
            mirror.kill()
            mirror.wait()
    report(cells[1])
    assert sync(folder) == 0  # what the killed one left
    assert finished(cells[0]) == ["a", "b", "trial 00000", "trial 00000", "trial 00001"]


def test_a_cell_without_tracking_is_not_mirrored(
    make_spec: Callable[..., Spec], make_result: Callable[..., TrialResult], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "night"
    with RunStore.open(make_spec(run={"dir": str(folder)}), "study"):
        for name, enabled in (("a", True), ("b", False)):
            run = {"dir": str(folder / name)}
            with RunStore.open(make_spec(run=run, tracking={"enabled": enabled})) as cell:
                cell.write_result(make_result(0))
                report(cell)
    assert tracking.pending(folder) == 1
    assert sync(folder) == 0
    assert [path.parent.name for path in folder.glob("*/tracking.json")] == ["a"]


def finished(cell: RunStore) -> list[str]:
    """What MLflow shows of all cells and has ended."""
    client = mlflow.MlflowClient(tracking.uri_of(cell))
    experiment = client.get_experiment_by_name("sparseramp")
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    return sorted(run.info.run_name for run in found if run.info.status == "FINISHED")


def report(cell: RunStore) -> None:
    for name, text in (("report.json", json.dumps(REPORT)), ("report.html", "<html>")):
        cell.path(name).write_text(text)
