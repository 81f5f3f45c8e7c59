"""Allocations: which share of each matrix's weights is removed.

    from tasks.allocation import allocate, save_rates
    rates = allocate("owl", model, 0.7, calibration=[input_ids], lambda_=0.08)
    save_rates(rates, "rates.json")          # prune.allocation="rates.json" uses them

An allocation is a pure function from what was measured of a model to one rate per prunable matrix;
their mean over all weights is the sparsity asked for. Adding one is that function and a line in
ALLOCATIONS. Measuring needs torch, which is imported only then: a search's driver does without.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from infra.errors import UserError, nearest
from infra.specs import PruneSpec
from tasks.allocation import families
from tasks.allocation.budget import MOST, Plan, zeros_per_matrix
from tasks.allocation.families import (
    NOT_REPRODUCED,
    Allocation,
    Matrices,
    Parameter,
    block_params,
    block_rates,
    fixed,
    spread,
)
from tasks.allocation.files import from_file, full_names, load_rates, save_rates
from tasks.allocation.line import (
    arithmetic_rates,
    bend_bounds,
    beta_bounds,
    centre,
    tilt,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modalities.base import Batch, Modality

__all__ = [
    "ALLOCATIONS",
    "MOST",
    "NOT_REPRODUCED",
    "Allocation",
    "Parameter",
    "Plan",
    "allocate",
    "allocation_named",
    "arithmetic_rates",
    "beta_bounds",
    "block_params",
    "block_rates",
    "bounds_of",
    "centre",
    "check_rates",
    "load_rates",
    "measure_rates",
    "measuring_windows",
    "plan_of",
    "rates_of",
    "save_rates",
    "spread",
    "tilt",
    "tilt_of",
    "values_of",
    "with_values",
    "zeros_per_matrix",
]


_OPTIONS = ("beta", "method", "pattern", "bits", "pause")  # of allocate(), that are keys of a spec


def _measure(module: str, function: str) -> Callable[..., list[float]]:
    """A function of a module that imports torch, imported when it is called."""

    def measure(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
        found = getattr(importlib.import_module(f"tasks.allocation.{module}"), function)
        profile: list[float] = found(modality, batches, prune)
        return profile

    return measure


def _beta(matrices: Matrices, sparsity: float) -> tuple[float, float]:
    return beta_bounds(block_params(matrices), sparsity)


def _bend(matrices: Matrices, sparsity: float) -> tuple[float, float]:
    return bend_bounds(block_params(matrices), sparsity)


def _spread_bounds(matrices: Matrices, sparsity: float) -> tuple[float, float]:
    """Of half the distance between the lowest and the highest rate."""
    return 0.0, min(sparsity, 1 - sparsity)


ALLOCATIONS: dict[str, Allocation] = {
    "arithmetic": Allocation(families.arithmetic, fixed(Parameter("beta", 0.0, _beta))),
    "uniform": Allocation(families.uniform),
    "towers": Allocation(families.towers, families.tower_parameters),
    "bent": Allocation(
        families.bent, fixed(Parameter("beta", 0.0, _beta), Parameter("bend", 0.0, _bend))
    ),
    "free": Allocation(families.free, families.free_parameters),
    "er": Allocation(families.er, measure=_measure("weights", "er"), cost="shapes only"),
    "global": Allocation(
        families.thresholded,
        measure=_measure("weights", "global_magnitude"),
        cost="two passes over the weights",
    ),
    "lamp": Allocation(
        families.thresholded, measure=_measure("weights", "lamp"), cost="two sorts of every matrix"
    ),
    "alphapruning": Allocation(
        families.alphapruning,
        fixed(
            Parameter("epsilon", 0.3, lambda matrices, sparsity: (0.0, 1.0), 0.0, 1.0),
            # 0: `peak`, for language models; 1: `mid`, for vision
            Parameter("mid", 0.0, None, 0.0, 1.0),
        ),
        _measure("weights", "alpha"),
        cost="singular values of every matrix",
    ),
    "owl": Allocation(
        families.owl,
        fixed(Parameter("lambda", 0.08, _spread_bounds, 0.0), Parameter("M", 5.0, None, 0.0)),
        _measure("activations", "owl"),
        needs_data=True,
        cost="one dense pass",
        passes=lambda values, windows, matrices: windows,
    ),
    "dlp": Allocation(
        families.dlp,
        fixed(Parameter("alpha", 0.15, _spread_bounds)),
        _measure("activations", "dlp"),
        needs_data=True,
        cost="one dense pass",
        passes=lambda values, windows, matrices: windows,
    ),
    "ecoflap": Allocation(
        families.ecoflap,
        fixed(
            Parameter("reach", 0.1, None, 0.0, 1.0),
            Parameter("step", 1e-3, None, 1e-9),
            Parameter("samples", 32.0, None, 1.0),
        ),
        _measure("gradients", "ecoflap"),
        needs_data=True,
        cost="two forwards per matrix and batch",
        passes=lambda values, windows, matrices: 2 * matrices * min(windows, values["samples"]),
    ),
    "neuronal": Allocation(
        families.measured,
        fixed(Parameter("samples", 8.0, None, 1.0)),
        _measure("objectives", "neuronal"),
        needs_data=True,
        prunes=True,
        cost="13 sweeps over 8 windows",
        # each calibrates, evaluates, and has a dense copy riding along that goes twice
        passes=lambda values, windows, matrices: 13 * 4 * min(windows, values["samples"]),
    ),
}


def allocation_named(name: str) -> Allocation:
    """Look an allocation up; a name that ends in .json is a file of rates.

    Raises UserError with the nearest known name, or with the reason why it is not here.
    """
    if name.endswith(".json"):
        return Allocation(families.measured, measure=partial(from_file, name), cost="none")
    if name in NOT_REPRODUCED:
        raise UserError(f"prune.allocation={name!r} is not reproduced: {NOT_REPRODUCED[name]}")
    if name not in ALLOCATIONS:
        raise UserError(f"unknown prune.allocation={name!r}: {nearest(name, ALLOCATIONS)}")
    return ALLOCATIONS[name]


def values_of(prune: PruneSpec, matrices: Matrices) -> dict[str, float]:
    """Every number of a spec's allocation, with the default where the spec does not give it.

    Raises UserError for a number that the allocation does not have.
    """
    parameters = allocation_named(prune.allocation).parameters(matrices)
    values = {p.name: p.default for p in parameters}
    given = {"beta": prune.beta} if "beta" in values else {}
    if prune.beta and not given:
        raise UserError(f"prune.beta={prune.beta:g}: {prune.allocation} has no beta; leave it out")
    known = [name for name in values if name != "beta"]
    for name, value in prune.parameters.items():
        if name == "beta":
            raise UserError("prune.parameters.beta: beta is a key of its own, set prune.beta")
        if name not in known:
            does = f"{nearest(name, known)}" if known else "it has no numbers"
            raise UserError(f"prune.parameters.{name}: not a number of {prune.allocation}: {does}")
        given[name] = value
    for parameter in parameters:
        value = (values | given)[parameter.name]
        if not parameter.least <= value <= parameter.most:  # NaN is in no range
            where = f"{parameter.least:g} to {parameter.most:g}".replace("to inf", "upwards")
            raise UserError(f"{parameter.name}={value:g} of {prune.allocation}: give {where}")
    return values | given


def with_values(prune: PruneSpec, values: Mapping[str, float]) -> PruneSpec:
    """The spec with other numbers: `beta` is a key of its own, the rest are its parameters."""
    others = {name: value for name, value in values.items() if name != "beta"}
    update: dict[str, Any] = {"parameters": prune.parameters | others}
    if "beta" in values:
        update["beta"] = values["beta"]
    return prune.model_copy(update=update)


def bounds_of(prune: PruneSpec, matrices: Matrices) -> dict[str, tuple[float, float]]:
    """The numbers that a search may vary, each with its open interval; {} where there are none."""
    return {
        p.name: p.bounds(matrices, prune.sparsity)
        for p in allocation_named(prune.allocation).parameters(matrices)
        if p.bounds is not None
    }


def measuring_windows(prune: PruneSpec, windows: int, matrices: Matrices) -> float:
    """How many windows pass all blocks until an allocation has measured what it needs."""
    values = values_of(prune, matrices)
    return allocation_named(prune.allocation).passes(values, windows, len(matrices))


def tilt_of(prune: PruneSpec, matrices: Matrices) -> float:
    """An allocation's first number over the bound on its side, in (-1, 1); 0 where it has none."""
    for name, (low, high) in bounds_of(prune, matrices).items():
        value = values_of(prune, matrices)[name]
        bound = high if value > 0 else -low
        return value / bound if value and bound else 0.0
    return 0.0


def plan_of(prune: PruneSpec, matrices: Matrices, profile: Sequence[float]) -> Plan:
    """One rate per matrix, and how many of them were clamped; their mean over all weights is S.

    `profile` is what `measure_rates` gave, [] for an allocation that measures nothing.
    """
    allocation = allocation_named(prune.allocation)
    values = values_of(prune, matrices)
    if allocation.measure is not None and len(profile) != len(matrices):
        raise ValueError(
            f"{prune.allocation} measured {len(profile)} numbers for {len(matrices)} matrices"
        )
    return allocation.rates(matrices, prune.sparsity, values, profile)


def rates_of(prune: PruneSpec, matrices: Matrices, profile: Sequence[float]) -> list[float]:
    """The rates of `plan_of`."""
    return plan_of(prune, matrices, profile).rates


def check_rates(prune: PruneSpec, matrices: Matrices) -> list[float]:
    """The rates of `plan_of`, the sparsity for all of them where something is to be measured first.

    Raises UserError where a spec names what there is not, or a beta that is infeasible.
    """
    values_of(prune, matrices)
    if allocation_named(prune.allocation).measure is None:
        return rates_of(prune, matrices, ())
    return [prune.sparsity] * len(matrices)


def measure_rates(
    modality: Modality, prune: PruneSpec, batches: Callable[[], Sequence[Batch]]
) -> list[float]:
    """What an allocation measures of a model; `batches` is called where it needs them."""
    allocation = allocation_named(prune.allocation)
    values_of(prune, modality.matrices())
    if allocation.measure is None:
        return []
    profile = allocation.measure(modality, batches() if allocation.needs_data else (), prune)
    if not all(math.isfinite(value) for value in profile):
        raise RuntimeError(
            f"{prune.allocation} measured NaN or infinity: the dense model overflows"
        )
    return profile


def allocate(
    name: str,
    model: nn.Module | Modality,
    sparsity: float,
    calibration: Sequence[Any] | Tensor | None = None,
    **options: Any,
) -> dict[str, float]:
    """The rate of every prunable matrix by its full name, without pruning.

    `calibration` is batches of the modality, or for a plain model a list of input_ids or of keyword
    arguments; what measures no inputs goes without. `options` are the numbers of the allocation
    (`lambda_` for lambda), and method, pattern and pause of an allocation that prunes to measure.
    The model comes back bit for bit as it was. Warns where rates had to be clamped.
    """
    from torch import Tensor

    from modalities.base import Modality
    from modalities.held import HeldModality

    if isinstance(sparsity, int | float) and not 0 <= sparsity < 1:
        raise UserError(f"sparsity={sparsity:g} is not in [0, 1)")
    keys = {k: v for k, v in options.items() if k in _OPTIONS}
    numbers = {k.rstrip("_"): v for k, v in options.items() if k not in keys}
    try:
        prune = PruneSpec(sparsity=sparsity, allocation=name, parameters=numbers, **keys)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"allocate: {where}={first['input']!r}: {first['msg']}") from None
    if isinstance(calibration, (Tensor, Mapping)):
        calibration = [calibration]
    if not callable(getattr(model, "named_parameters", None)) and not isinstance(model, Modality):
        raise UserError(f"allocate needs a model in memory, not {model!r}: load it first")
    if allocation_named(name).needs_data and not calibration:
        raise UserError(f"{name} looks at inputs: give calibration, batches or input_ids")
    if isinstance(model, Modality):
        return _named_rates(model, prune, calibration or ())
    with HeldModality(model, calibration) as held:
        return _named_rates(held, prune, held.calibration)


def _named_rates(
    modality: Modality, prune: PruneSpec, batches: Sequence[Batch]
) -> dict[str, float]:
    matrices = modality.matrices()
    plan = plan_of(prune, matrices, measure_rates(modality, prune, lambda: batches))
    if plan.clamped:
        warnings.warn(
            f"{prune.allocation}: clamped rates: {plan.clamped}; the mean was repaired",
            stacklevel=3,
        )
    return dict(zip(full_names(modality), plan.rates, strict=True))
