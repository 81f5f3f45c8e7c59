"""What `check` says of a study: every cell, each distinct model looked at once, and mistakes.

python -m pytest tests/flows/test_check_study.py
"""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flows import check_study as flow
from flows.cells import study_cells
from flows.check_study import check_study
from flows.cli import _parser
from flows.plan import measuring_passes, planned_passes
from infra.cluster import Share
from infra.errors import UserError
from infra.records import ModelRecord
from infra.specs import ClusterSpec
from infra.study_files import StudySpec, load_study
from tasks.trial import describe_model, time_dense
from tests.flows.commands import write_project
from tests.flows.test_plan import make_model

TWO_MODELS = """
[study]
dir = "{dir}"
[[cells]]
spec = "tiny.toml"
methods = ["wanda", "magnitude"]
sparsities = [0.5, 0.6]
[[cells]]
spec = "tiny.toml"
models = ["{other}"]
allocations = ["uniform"]
"""


class Asked:
    """A cluster of one worker that answers at once, and counts what it is asked."""

    def __init__(self, model: ModelRecord) -> None:
        self.model, self.asked = model, Counter[str]()

    def describe(self) -> dict[str, Any]:
        return {"address": "", "nodes": [], "parallel": 1}

    def share_of(self, spec: ClusterSpec) -> Share:
        if spec.gpus_per_trial > 0:
            raise UserError("no node holds a trial of 1 CPUs and 8 GPUs")
        return Share(cpus=1, gpus=0)

    def holds(self, share: Share) -> bool:
        return True

    def call(self, function: Any, *args: Any, share: Share | None = None) -> Any:
        self.asked[function.__name__] += 1
        if function is describe_model:
            return self.model
        assert function is time_dense
        return 1000, 2.0


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    write_project(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "model")
    text = TWO_MODELS.format(dir=tmp_path / "study", other=tmp_path / "other")
    (tmp_path / "s.toml").write_text(text)
    return load_study(tmp_path / "s.toml")


def check(spec: StudySpec, cluster: Any) -> dict[str, Any]:
    return check_study(spec, connect=lambda spec: nullcontext(cluster))


def test_every_cell_is_a_line_and_every_model_is_timed_once(
    spec: StudySpec, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Asked(make_model(3))
    answer = check(spec, cluster)
    assert cluster.asked == {"describe_model": 2, "time_dense": 2}
    assert answer["refused"] == {} and answer["models"] == 2
    cells = study_cells(spec)
    assert [line["cell"] for line in answer["cells"]] == [cell.name for cell in cells]
    for line, cell in zip(answer["cells"], cells, strict=True):
        passes = measuring_passes(cell.spec, cluster.model)
        passes += planned_passes(cell.spec, cluster.model, {})
        assert line["seconds"] == pytest.approx(passes * 0.002)
        assert line["memory_bytes"] > 0
    shown = capsys.readouterr().out
    assert "model_wanda_arithmetic_0.6" in shown and "1 CPUs and 0 GPUs" in shown
    assert not Path(spec.dir).exists()


def test_what_cannot_run_is_named_with_its_cell_and_its_file(
    spec: StudySpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is not there, a cell that no node holds, and a number that is infeasible."""
    more = [
        ("gone", '"model.source" = "/none/here.gguf"'),
        ("large", '"cluster.gpus_per_trial" = 8'),
        ("steep", '"prune.parameters" = {gamma = 3}'),
    ]
    text = (tmp_path / "s.toml").read_text()
    for name, override in more:
        text += f'[[cells]]\nspec = "tiny.toml"\nname = "{name}"\noverrides = {{{override}}}\n'
    (tmp_path / "s.toml").write_text(text)
    answer = check(load_study(tmp_path / "s.toml"), Asked(make_model(3)))
    refused = {name.partition("-")[0]: cause for name, cause in answer["refused"].items()}
    assert list(refused) == [name for name, _ in more]
    for number, cause in enumerate(refused.values(), 3):
        where = f"({tmp_path / 'tiny.toml'}, group {number} of {tmp_path / 's.toml'})"
        assert cause.endswith(where)
    assert "no such file" in refused["gone"]
    assert "8 GPUs" in refused["large"]
    assert "gamma: not a number of arithmetic" in refused["steep"]
    assert "refused  large-model_wanda_arithmetic_0.5: no node holds" in capsys.readouterr().out


def test_a_study_with_refused_cells_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path)
    (tmp_path / "s.toml").write_text('[[cells]]\nspec = "tiny.toml"\nname = "a"\n')
    for refused, code in (({}, 0), ({"a": "no node"}, 3)):
        found = {"refused": refused}
        monkeypatch.setattr(flow, "check_study", lambda spec, found=found, **_: found)
        options = _parser().parse_args(["check", str(tmp_path / "s.toml")])
        assert options.command(options) == code


def test_a_misspelt_name_is_one_line_before_a_cluster_is_asked(tmp_path: Path) -> None:
    write_project(tmp_path)
    names = json.dumps(["wanda", "sparsgpt"])
    (tmp_path / "s.toml").write_text(f'[[cells]]\nspec = "tiny.toml"\nmethods = {names}\n')
    with pytest.raises(UserError, match=r"did you mean 'sparsegpt'\? \(.*group 1 of .*s\.toml\)$"):
        check(load_study(tmp_path / "s.toml"), None)
