"""Cells of a study in one process and its forks: what they share, and what they do not.

python -m pytest tests/flows/test_cell_runs.py
"""

from pathlib import Path
from typing import Any

import pytest

from flows.study import study
from infra.errors import UserError
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


MISTAKES = """
[study]
dir = "{dir}"
[[cells]]
spec = "tiny.toml"
[[cells]]
spec = "tiny.toml"
name = "second"
{list} = ["{name}", "{right}"]
"""


@pytest.mark.parametrize(
    ("list_", "name", "right"), [("methods", "wandaa", "wanda"), ("allocations", "owll", "owl")]
)
def test_a_misspelt_name_is_refused_before_anything_starts(
    tmp_path: Path, list_: str, name: str, right: str
) -> None:
    """Named with its group and files: no cluster is asked, and nothing is written."""
    write_project(tmp_path)
    text = MISTAKES.format(dir=tmp_path / "study", list=list_, name=name, right=right)
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        study(load_study(tmp_path / "s.toml"), connect=never)
    assert str(caught.value).endswith(
        f"{name!r}: did you mean {right!r}? "
        f"({tmp_path / 'tiny.toml'}, group 2 of {tmp_path / 's.toml'})"
    )
    assert not (tmp_path / "study").exists()


def never(spec: Any) -> Any:
    """In place of a cluster."""
    raise AssertionError("a cluster was started")
