"""Study files: which cells, how much of the cluster each may have, and when to stop.

study = load_study("flows/specs/study_smollm2.toml", ["budget.trials=40"])
study.groups[0].spec.prune.method

[study]
dir = "runs/night"
[budget]                      # 0, or left out: none
gpu_hours = 80
[[cells]]
spec = "quickstart.toml"      # an ordinary spec, beside this file or in the working directory
overrides = {"search.scouts" = 12, "cluster.gpus_per_trial" = 0.5}
methods = ["wanda", "sparsegpt"]
sparsities = [0.5, 0.6]
priority = 2                  # gets twice as much of the cluster as a cell of 1
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from infra.errors import UserError
from infra.frozen import Frozen
from infra.spec_files import apply_overrides, explain, parse_spec, read_toml
from infra.specs import NO_NUL, CompareSpec, Spec


class BudgetSpec(Frozen):
    """When no more trials begin; 0 is no limit. Earlier starts of the study count."""

    trials: int = Field(0, ge=0, description="that may begin")
    gpu_hours: float = Field(0, ge=0, description="of all trials; CPU-hours where they have no GPU")
    hours: float = Field(0, ge=0, description="of work: pauses between starts do not count")
    grace_s: float = Field(300, ge=0, description="after `hours`, until what still runs is stopped")


class Group(Frozen):
    """Cells of one spec: its [compare] lists, or those of the study file, span them."""

    name: str = ""
    spec: Spec
    priority: float = 1.0
    where: str = ""  # for messages


class StudySpec(Frozen):
    """A study as it was read: every group with its whole spec."""

    dir: str
    parallel: int = 0
    budget: BudgetSpec = BudgetSpec()
    groups: list[Group]


class _Study(Frozen):
    dir: str = Field("", pattern=NO_NUL, description="empty: runs/<name of the study file>")
    parallel: int = Field(0, ge=0, description="trials at once, of all cells; 0: as many as fit")


class _Cells(Frozen):
    spec: str = Field(pattern=NO_NUL, description="path of an ordinary spec")
    name: str = Field("", pattern=r"^[a-z0-9.-]*$", description="prefix of the cells' folders")
    overrides: dict[str, Any] = {}
    models: list[str] = []
    methods: list[str] = []
    allocations: list[str] = []
    sparsities: list[Annotated[float, Field(gt=0, lt=1)]] = []
    priority: float = Field(1.0, gt=0)


class _File(Frozen):
    study: _Study = _Study()
    budget: BudgetSpec = BudgetSpec()
    cells: list[_Cells] = Field(min_length=1)


def load_study(path: str | Path, overrides: list[str] | None = None) -> StudySpec:
    """Read a study file and the specs that it names.

    Raises UserError for a missing file, malformed TOML, an unknown key or a wrong type in any.
    """
    path = Path(path)
    raw = read_toml(path)
    if "cells" not in raw and "model" in raw:
        raise UserError(f"{path} is the spec of one search: sparseramp search {path}")
    apply_overrides(raw, overrides or [])
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{explain(error, _File)} ({path})") from None
    return StudySpec(
        dir=file.study.dir or f"runs/{path.stem}",
        parallel=file.study.parallel,
        budget=file.budget,
        groups=[_group(cells, path, number) for number, cells in enumerate(file.cells, 1)],
    )


def _group(cells: _Cells, study: Path, number: int) -> Group:
    path = study.parent / cells.spec
    path = path if path.exists() else Path(cells.spec)
    if not path.exists():
        raise UserError(
            f"no spec {cells.spec} beside {study} or in the working directory: correct cells.spec"
        )
    raw = read_toml(path)
    for key, value in cells.overrides.items():
        *sections, last = key.split(".")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"overrides {key!r}: {part!r} is a value, not a section ({study})")
        section[last] = value
    spec = parse_spec(raw, f"{path}, of {study}")
    lists = cells.model_dump(include={"models", "methods", "allocations", "sparsities"})
    kept = spec.compare.model_dump() | {name: found for name, found in lists.items() if found}
    return Group(
        name=cells.name,
        spec=spec.model_copy(update={"compare": CompareSpec(**kept)}),
        priority=cells.priority,
        where=f"{path}, group {number} of {study}",
    )
