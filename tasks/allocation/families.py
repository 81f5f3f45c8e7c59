"""What an allocation is, and the pure part of each: from what was measured to one rate per matrix.

    plan = owl(matrices, 0.7, {"lambda": 0.08}, profile)      # profile: one number per matrix
    plan.rates

Measuring is costly and done once per model and calibration; these turn it into rates for any value
of the numbers that a search varies. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.records import MatrixRecord
from infra.specs import PruneSpec
from tasks.allocation.budget import MOST, Plan, fit, weighted_mean
from tasks.allocation.line import arithmetic_rates, bent_rates, beta_bounds

if TYPE_CHECKING:
    from modalities.base import Batch, Modality

Matrices = Sequence[MatrixRecord]
Values = Mapping[str, float]
Bounds = Callable[[Matrices, float], tuple[float, float]]


# Published, but not as a formula that could be followed; the reason is told to who asks for one.
NOT_REPRODUCED: dict[str, str] = {
    "als": "its rates come from a linear program over a redundancy between layers, whose "
    "estimator and limits are not given as a formula that could be followed",
    "dsa": "its rule is the result of an evolutionary search over formulas; the one found is not "
    "given as a formula that could be followed",
    "lsa": "how its blocks' minimal reconstruction errors become rates is not given as a formula "
    "that could be followed",
}


@dataclass(frozen=True)
class Parameter:
    """A number of an allocation.

    `bounds`, of matrices and sparsity, is the open interval that a search may vary it in; without
    them it belongs to the measurement and stays as it is. `least` and `most` are what it may be.
    """

    name: str
    default: float
    bounds: Bounds | None = None
    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Allocation:
    """`rates(matrices, sparsity, values, profile)` is pure; `measure` fills the profile, one number
    per matrix, with calibration batches where `needs_data`; where it `prunes`, the method matters
    too. `cost` says what measuring takes; `passes`, of values, windows and matrices, is that in
    windows that pass all blocks."""

    rates: Callable[[Matrices, float, Values, Sequence[float]], Plan]
    parameters: Callable[[Matrices], Sequence[Parameter]] = lambda matrices: ()
    measure: Callable[[Modality, Sequence[Batch], PruneSpec], list[float]] | None = None
    needs_data: bool = False
    prunes: bool = False
    cost: str = "none"
    passes: Callable[[Values, int, int], float] = lambda values, windows, matrices: 0.0


def fixed(*parameters: Parameter) -> Callable[[Matrices], Sequence[Parameter]]:
    """The same numbers whatever the model is."""
    return lambda matrices: parameters


def params_of(matrices: Matrices) -> list[int]:
    """Number of weights of each matrix."""
    return [matrix.params for matrix in matrices]


def block_params(matrices: Matrices) -> list[int]:
    """Number of prunable weights of each block."""
    sizes = [0] * (max(matrix.block for matrix in matrices) + 1)
    for matrix in matrices:
        sizes[matrix.block] += matrix.params
    return sizes


def spread(matrices: Matrices, blocks: Sequence[float]) -> list[float]:
    """The value of its block for every matrix."""
    return [blocks[matrix.block] for matrix in matrices]


def block_rates(matrices: Matrices, rates: Sequence[float], num_blocks: int) -> list[float]:
    """Mean rate over the weights of each block; 0 for a block without prunable ones."""
    means = []
    for block in range(num_blocks):
        inside = [(r, m.params) for r, m in zip(rates, matrices, strict=True) if m.block == block]
        if len({rate for rate, _ in inside}) > 1:
            means.append(weighted_mean([r for r, _ in inside], [p for _, p in inside]))
        else:  # equal rates as they are, without the rounding of a mean
            means.append(inside[0][0] if inside else 0.0)
    return means


def of_blocks(matrices: Matrices, profile: Sequence[float]) -> list[float]:
    """Mean over the matrices of each block; one without any is like the first that has some."""
    inside: list[list[float]] = [[] for _ in block_params(matrices)]
    for matrix, value in zip(matrices, profile, strict=True):
        inside[matrix.block].append(value)
    means = [sum(values) / len(values) if values else None for values in inside]
    first = next(mean for mean in means if mean is not None)
    return [first if mean is None else mean for mean in means]


def minmax(values: Sequence[float]) -> list[float]:
    """Scaled so that the smallest is 0 and the largest 1; all 0 where they are equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # what rounding told apart is equal
        return [0.0] * len(values)
    return [(value - low) / (high - low) for value in values]


def uniform(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """The same rate everywhere."""
    return Plan([sparsity] * len(matrices))


def arithmetic(
    matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]
) -> Plan:
    """A line over depth; a slope that leaves [0, 1) is refused."""
    rates = arithmetic_rates(block_params(matrices), sparsity, values["beta"])
    return Plan(spread(matrices, rates))


def towers(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """A line over the depth of each tower; the mean over the weights of each is S."""
    sizes = block_params(matrices)
    rates = [sparsity] * len(sizes)
    for name, blocks in tower_blocks(matrices).items():
        line = arithmetic_rates([sizes[b] for b in blocks], sparsity, values[name], name)
        for block, rate in zip(blocks, line, strict=True):
            rates[block] = rate
    return Plan(spread(matrices, rates))


def tower_parameters(matrices: Matrices) -> list[Parameter]:
    """The slope of each tower: beta_vision, beta_language..., beta of a model that is one."""

    def bounds_in(name: str) -> Bounds:
        def bounds(matrices: Matrices, sparsity: float) -> tuple[float, float]:
            sizes = block_params(matrices)
            return beta_bounds([sizes[b] for b in tower_blocks(matrices)[name]], sparsity)

        return bounds

    return [Parameter(name, 0.0, bounds_in(name)) for name in tower_blocks(matrices)]


def tower_blocks(matrices: Matrices) -> dict[str, list[int]]:
    """The blocks of each tower in order, by the name of its slope."""
    found: dict[str, list[int]] = {}
    for matrix in matrices:
        blocks = found.setdefault(f"beta_{matrix.tower}" if matrix.tower else "beta", [])
        if matrix.block not in blocks:
            blocks.append(matrix.block)
    return found


def bent(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """A line with a bend towards the last blocks."""
    plan = bent_rates(block_params(matrices), sparsity, values["beta"], values["bend"])
    return Plan(spread(matrices, plan.rates), plan.clamped)


def free(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """Any rate for any block: S plus a number for each, shifted so that the mean is S."""
    blocks = block_params(matrices)
    return _shifted(matrices, [values[f"block_{i}"] for i in range(len(blocks))], sparsity)


def free_parameters(matrices: Matrices) -> list[Parameter]:
    """One number per block, 0 where its rate is S; as far up as down."""

    def bounds(matrices: Matrices, sparsity: float) -> tuple[float, float]:
        room = min(sparsity, 1 - sparsity)
        return -room, room

    return [Parameter(f"block_{i}", 0.0, bounds) for i in range(len(block_params(matrices)))]


def er(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """1 - s proportional to (in + out) / (in * out), which is the profile (1707.04780)."""
    keep = _keep([0.0] * len(matrices), profile, params_of(matrices), sparsity)
    return Plan([1 - k for k in keep.rates], keep.clamped)


def measured(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """The profile holds rates already; their mean is repaired where it has to be."""
    params = params_of(matrices)
    legal = all(0 <= rate < 1 for rate in profile)
    if legal and abs(weighted_mean(profile, params) - sparsity) < 1e-12:
        return Plan(list(profile))
    return fit(profile, [1.0] * len(profile), params, sparsity, high=max(MOST, sparsity))


def thresholded(
    matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]
) -> Plan:
    """The profile holds the rates of one threshold over all matrices: in range after clamping."""
    params = params_of(matrices)
    return fit(profile, [1.0] * len(profile), params, sparsity, high=max(MOST, sparsity))


def owl(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """Blocks with many outliers keep up to 2 lambda more; the profile is their per cent.

    keep = 2 lambda minmax(D), re-centred to 1 - S (OWL, arXiv 2310.05175).
    """
    keep = minmax(of_blocks(matrices, profile))
    return _shifted(matrices, [-2 * values["lambda"] * k for k in keep], sparsity)


def dlp(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """The smaller the median of |W| * ||X|| of a block, the more it keeps (arXiv 2505.23807).

    I = 1 - M / sum(M), d = 2 alpha minmax(I), s = S + mean(d) - d.
    """
    medians = of_blocks(matrices, profile)
    total = sum(medians)
    importance = minmax([1 - m / total for m in medians] if total else medians)
    return _shifted(matrices, [-2 * values["alpha"] * i for i in importance], sparsity)


def alphapruning(
    matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]
) -> Plan:
    """The heavier the tail of its spectra, the more a block keeps (arXiv 2410.10912).

    s proportional to (1 - epsilon) + 2 epsilon minmax(alpha), alpha averaged over the block.
    """
    epsilon, params = values["epsilon"], block_params(matrices)
    shares = [max(0.0, 1 - epsilon + 2 * epsilon * a) for a in minmax(of_blocks(matrices, profile))]
    plan = fit([0.0] * len(params), shares, params, sparsity, high=max(MOST, sparsity))
    return Plan(spread(matrices, plan.rates), plan.clamped)


def ecoflap(matrices: Matrices, sparsity: float, values: Values, profile: Sequence[float]) -> Plan:
    """At least 1 - S - reach is kept; the rest of the budget goes by score (arXiv 2310.02998)."""
    params, total = params_of(matrices), sum(profile)
    most = min(max(MOST, sparsity), sparsity + max(values["reach"], 0.0))
    shares = [
        score / total * sum(params) / size if total else 0.0
        for score, size in zip(profile, params, strict=True)
    ]
    keep = fit([1 - most] * len(params), shares, params, 1 - sparsity, low=1 - most, high=1.0)
    return Plan([min(most, max(0.0, 1 - k)) for k in keep.rates], keep.clamped)


def _keep(
    start: Sequence[float], slope: Sequence[float], params: Sequence[int], sparsity: float
) -> Plan:
    return fit(start, slope, params, 1 - sparsity, low=1 - max(MOST, sparsity), high=1.0)


def _shifted(matrices: Matrices, blocks: Sequence[float], sparsity: float) -> Plan:
    params = block_params(matrices)
    start = [sparsity + value for value in blocks]
    plan = fit(start, [1.0] * len(params), params, sparsity, high=max(MOST, sparsity))
    return Plan(spread(matrices, plan.rates), plan.clamped)
