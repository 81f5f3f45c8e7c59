"""Rates as JSON: one object of full names and rates.

save_rates(allocate("owl", model, 0.7, calibration), "rates.json")
allocate("rates.json", model, 0.7)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError, nearest
from infra.specs import PruneSpec
from tasks.allocation.budget import weighted_mean

if TYPE_CHECKING:
    from modalities.base import Batch, Modality

_ROUNDED = 1e-3  # how far the mean of rates from a file may be from the sparsity, and is repaired


def save_rates(rates: Mapping[str, float], path: str | Path) -> None:
    """Write named rates as JSON, which `prune.allocation` reads back.

    Raises UserError where they are no rates, before anything is written.
    """
    text = json.dumps(_checked(rates, path), indent=1) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write rates to {path}: {error.strerror}") from error


def load_rates(path: str | Path) -> dict[str, float]:
    """Read what `save_rates` wrote; raises UserError where it is something else."""
    try:
        rates = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read rates from {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return _checked(rates, path)


def _checked(rates: Any, path: str | Path) -> dict[str, float]:
    if not isinstance(rates, Mapping):
        raise UserError(f"{path}: expected one object of names and rates")
    for name, rate in rates.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r} is no name of a matrix")
        number = isinstance(rate, Real) and not isinstance(rate, bool)
        if not number or not 0 <= rate < 1:
            raise UserError(f"{path}: {name} has rate {rate!r}, which is not in [0, 1)")
    return {name: float(rate) for name, rate in rates.items()}


def full_names(modality: Modality) -> list[str]:
    """Every prunable matrix by its name in the model; experts end in their number."""
    return [f"{b.name}.{matrix.name}" for b in modality.blocks for matrix in b.matrices]


def from_file(
    path: str, modality: Modality, batches: Sequence[Batch], prune: PruneSpec
) -> list[float]:
    """The rates of a file in the order of a model's matrices.

    Raises UserError where they are not those of the model, or of another sparsity.
    """
    rates, names = load_rates(path), full_names(modality)
    if lacking := [name for name in names if name not in rates]:
        raise UserError(f"{path} has no rate for {lacking[0]} ({len(lacking)} are missing)")
    if unknown := sorted(rates.keys() - set(names)):
        raise UserError(f"{path}: the model has no {unknown[0]}: {nearest(unknown[0], names)}")
    profile = [rates[name] for name in names]
    mean = weighted_mean(profile, [m.params for m in modality.matrices()])
    if abs(mean - prune.sparsity) > _ROUNDED:
        raise UserError(f"{path} removes {mean:.6g} on average: set prune.sparsity={mean:.6g}")
    return profile
