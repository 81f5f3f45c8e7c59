"""Cells of a study in one process and its forks: what they share, and what they do not.

python -m pytest tests/flows/test_cell_runs.py
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flows.study import study
from infra.cluster import Share
from infra.store import RunStore
from infra.study_files import load_study
from tests.faults import processes
from tests.flows.commands import write_project

CONNECT: Any = processes.connect  # which has all that a study asks of a cluster

TWO_TEXTS = """
[study]
dir = "{dir}"
[[cells]]
spec = "tiny.toml"
allocations = ["owl"]
overrides = {{ "search.scouts" = 2, "evaluation.calibration_seeds" = 1 }}
"""
OTHER = """
[[cells]]
spec = "tiny.toml"
name = "other"
allocations = ["owl"]
[cells.overrides]
"search.scouts" = 2
"evaluation.calibration_seeds" = 1
"data.source" = "{text}"
"model.dtype" = "bfloat16"
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("starts", [1, 2])
def test_two_groups_on_one_model_read_each_its_own_text(tmp_path: Path, starts: int) -> None:
    """In one start, and where the first of them was finished by an earlier one."""
    write_project(tmp_path)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Paragraph {i} of another text." for i in range(160)))
    one = TWO_TEXTS.format(dir=tmp_path / "study")
    (tmp_path / "s.toml").write_text(one)
    if starts == 2:
        study(load_study(tmp_path / "s.toml"), connect=CONNECT)
    (tmp_path / "s.toml").write_text(one + OTHER.format(text=other))
    board = study(load_study(tmp_path / "s.toml"), connect=CONNECT)
    assert [row["state"] for row in board["rows"]] == ["complete"] * 2
    stores = [RunStore.read(file.parent) for file in sorted((tmp_path / "study").glob("*/waves"))]
    read = [
        {(r.spec.data.report, r.spec.model.dtype) for r in store.results().values()}
        for store in stores
    ]
    assert read == [{(str(tmp_path / "text.txt"), "float32")}, {(str(other), "bfloat16")}]
    models = [store.model() for store in stores]
    assert models[0] and models[1] and models[0].profile != models[1].profile
    for split in ("calibration", "selection", "report"):
        assert models[0].data_sha256[split] != models[1].data_sha256[split]


GROWS = """
[study]
dir = "{dir}"
[[cells]]
spec = "tiny.toml"
methods = ["wandaa", "magnitude"]
allocations = ["uniform"]
overrides = {{ "evaluation.calibration_seeds" = 1, "cluster.grows" = true }}
"""


class Growing(processes.Processes):
    """One that has no node yet: whoever waits for a worker outside the loop, waits for ever."""

    def holds(self, share: Share) -> bool:
        return False

    def call(self, function: Any, *args: object, share: Share | None = None) -> Any:
        raise AssertionError("no node will ever come")


@pytest.mark.timeout(300)
def test_names_are_not_asked_of_a_node_that_is_still_to_come(tmp_path: Path) -> None:
    """A cell whose method is misspelt is then refused by whoever describes its model."""
    write_project(tmp_path)
    (tmp_path / "s.toml").write_text(GROWS.format(dir=tmp_path / "study"))
    connect: Any = lambda spec: nullcontext(Growing(spec))  # noqa: E731
    board = study(load_study(tmp_path / "s.toml"), connect=connect)
    rows = {row["method"]: row for row in board["rows"]}
    assert rows["magnitude"]["state"] == "complete"
    assert rows["wandaa"]["state"] == "refused"
    assert rows["wandaa"]["cause"].endswith("did you mean 'wanda'?")
