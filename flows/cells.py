"""The cells of a comparison: one spec for each model, sparsity and bits, method and allocation.

cells_of(load_spec("flows/specs/compare_smollm2.toml"))[0].name   # smollm2-135m_wanda_owl_0.6
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.bits import ROUNDING
from infra.errors import UserError
from infra.specs import CompareSpec, PruneSpec, Spec
from infra.store import RunStore
from infra.study_files import StudySpec
from tasks.allocation import ALLOCATIONS, NOT_REPRODUCED, allocation_named
from tasks.methods import check_pattern


@dataclass(frozen=True)
class Cell:
    """One search, or one comparison with uniform; `model` is how its model is called."""

    name: str
    model: str
    spec: Spec
    priority: float = 1.0
    where: str = ""  # the group and the files that ask for it

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.spec.run.dir)


def cells_of(spec: Spec, folder: Path | None = None) -> list[Cell]:
    """All cells, those of one model together, so that a worker loads it once.

    A method that only rounds has no sparsity, so it has cells for the bits alone. Raises UserError
    for a name that is misspelt; an allocation that is not reproduced has its cells.
    """
    compare, prune = spec.compare, spec.prune
    folder = folder or Path(spec.run.dir)
    models = _named(compare.models or [spec.model.source])
    methods = _named(compare.methods or [prune.method])
    allocations = _named(compare.allocations or [prune.allocation])
    for allocation in allocations.values():
        if allocation not in NOT_REPRODUCED:
            allocation_named(allocation)
    for method in methods.values():
        check_pattern(method, prune.pattern)
    sparsities = list(dict.fromkeys(compare.sparsities or [prune.sparsity]))
    bits = dict.fromkeys(compare.bits or [prune.bits])
    mixed = prune.method in ROUNDING and not set(methods.values()) <= set(ROUNDING)
    if mixed and not compare.sparsities:
        raise UserError("compare.methods has methods that remove weights: add compare.sparsities")
    return [
        Cell(
            name := f"{model}_{method}_{allocation}_{_goal(methods[method], sparsity, each)}",
            model,
            spec.model_copy(
                update={
                    "model": spec.model.model_copy(update={"source": models[model]}),
                    "prune": _changed(
                        prune,
                        method=methods[method],
                        allocation=allocations[allocation],
                        sparsity=sparsity,
                        bits=each,
                        beta=0.0,
                        parameters=_own(prune, allocations[allocation]),
                    ),
                    "compare": CompareSpec(checkpoints=compare.checkpoints),
                    "run": spec.run.model_copy(update={"dir": str(folder / name)}),
                }
            ),
        )
        for model in models
        for sparsity, each in product(sparsities, bits)
        for method in methods
        if methods[method] not in ROUNDING or sparsity == sparsities[0]
        for allocation in allocations
    ]


def study_cells(study: StudySpec) -> list[Cell]:
    """The cells of all groups, with the address and the limit that the study has.

    Raises UserError for a name that is misspelt, where two that differ have one name, and where
    groups name different clusters.
    """
    cells: dict[str, Cell] = {}
    for group in study.groups:
        try:
            cells_of_group = cells_of(group.spec, Path(study.dir))
        except UserError as error:
            raise UserError(f"{error} ({group.where})") from None
        for cell in cells_of_group:
            name = f"{group.name}-{cell.name}".lstrip("-")
            run = cell.spec.run.model_copy(update={"dir": str(Path(study.dir) / name)})
            spec = cell.spec.model_copy(update={"run": run})
            if name in cells and cells[name].spec.identity() != spec.identity():
                raise UserError(
                    f"two cells of different settings are called {name!r}: give one of their "
                    'groups a name = "..." in [[cells]]'
                )
            cells.setdefault(name, Cell(name, cell.model, spec, group.priority, group.where))
    addresses = {cell.spec.cluster.address for cell in cells.values()}
    if len(addresses) > 1:
        raise UserError(
            f"the cells name different clusters, {', '.join(map(repr, sorted(addresses)))}: set "
            'overrides = {"cluster.address" = "..."} to one of them'
        )
    return list(cells.values())


def earlier_cells(spec: Spec, asked: Sequence[Cell], folder: Path) -> list[Cell]:
    """Cells in the folder that were finished for other lists, under the settings of this spec."""
    names = {cell.name for cell in asked}
    found = []
    for path in sorted(folder.glob("*/report.json")):
        name = path.parent.name
        if name in names:
            continue
        try:
            earlier = RunStore.read(path.parent).spec
            prune = earlier.prune
            lists = CompareSpec(
                models=[earlier.model.source],
                methods=[prune.method],
                allocations=[prune.allocation],
                sparsities=[] if prune.method in ROUNDING else [prune.sparsity],
                bits=[prune.bits] if prune.bits else [],
            )
            (cell,) = cells_of(spec.model_copy(update={"compare": lists}), folder)
        except UserError:  # of another version
            continue
        if cell.spec.identity() == earlier.identity():
            run = cell.spec.run.model_copy(update={"dir": str(path.parent)})
            spec_of_run = cell.spec.model_copy(update={"run": run})
            found.append(Cell(name, name.partition("_")[0], spec_of_run))
    return found


def _goal(method: str, sparsity: float, bits: float) -> str:
    """0.6; 3bits; 0.5_4bits."""
    zeros = [] if method in ROUNDING else [f"{sparsity:g}"]
    return "_".join([*zeros, *([f"{bits:g}bits"] if bits else [])])


def _changed(prune: PruneSpec, **update: Any) -> PruneSpec:
    """The section with other values; raises UserError where they do not go together."""
    values = prune.model_dump() | update
    if update["method"] in ROUNDING:  # the rate follows from the bits
        del values["sparsity"]
        values["pattern"] = "unstructured"
    try:
        return PruneSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _own(prune: PruneSpec, allocation: str) -> dict[str, float]:
    """The numbers that an allocation has; it would refuse those of others."""
    if allocation == prune.allocation or allocation not in ALLOCATIONS or allocation == "free":
        return prune.parameters if allocation == prune.allocation else {}
    names = {parameter.name for parameter in ALLOCATIONS[allocation].parameters(())}
    return {name: value for name, value in prune.parameters.items() if name in names}


def _named(values: Sequence[str]) -> dict[str, str]:
    """Distinct values by short names that a file may have; a clash is told apart by a hash."""
    named: dict[str, str] = {}
    for value in dict.fromkeys(values):
        name = short = _short(value)
        if short in named:
            name = f"{short}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
        named[name] = value
    return named


def _short(value: str) -> str:
    """SmolLM2-135M of org/SmolLM2-135M@main, or of a path that ends in SmolLM2-135M.Q4.gguf."""
    last = re.split(r"[#@]", value)[0].rstrip("/").rpartition("/")[2]
    last = re.sub(r"\.(gguf|json|safetensors)$", "", last)
    return re.sub(r"[^a-z0-9.-]+", "-", last.lower()).strip(".-") or "model"
