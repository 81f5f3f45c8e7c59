"""Allocations: which share of each block's weights is removed.

    rates = arithmetic_rates(params=[100] * 30, sparsity=0.6, beta=0.008)

The rates of an arithmetic progression are decided by its common difference beta
(ATP, arXiv 2502.14770, section 3); its centre is weighted by the blocks' parameters here, which
equals the published (L + 1) / 2 where blocks are of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from infra.errors import UserError, nearest
from infra.specs import PruneSpec


def centre(params: Sequence[int]) -> float:
    """Parameter-weighted mean position, counted from 1, of blocks with `params` weights each."""
    return sum(i * p for i, p in enumerate(params, 1)) / sum(params)


def beta_bounds(params: Sequence[int], sparsity: float) -> tuple[float, float]:
    """The open interval of beta in which every rate lies in [0, 1).

    For equal blocks +-min(2S, 2(1 - S)) / (L - 1). With a single block beta has no effect: (0, 0).
    """
    blocks, c = len(params), centre(params)
    if blocks < 2:
        return 0.0, 0.0
    rise, fall = (1 - sparsity) / (blocks - c), sparsity / (c - 1)
    drop, climb = (1 - sparsity) / (c - 1), sparsity / (blocks - c)
    return -min(drop, climb), min(rise, fall)


def tilt(beta: float, params: Sequence[int], sparsity: float) -> float:
    """Beta over the bound on its side, in (-1, 1): comparable across depths."""
    low, high = beta_bounds(params, sparsity)
    bound = high if beta > 0 else -low
    return beta / bound if beta and bound else 0.0


def arithmetic_rates(params: Sequence[int], sparsity: float, beta: float) -> list[float]:
    """Rates s_i = S + beta * (i - c), i = 1..L, of blocks with `params` weights each.

    Their parameter-weighted mean is S. Raises UserError where beta takes a rate out of [0, 1).
    """
    c = centre(params)
    rates = [sparsity + beta * (i - c) for i in range(1, len(params) + 1)]
    if not all(0 <= rate < 1 for rate in rates):
        low, high = beta_bounds(params, sparsity)
        too, limit = ("large", "at most ") if beta > 0 else ("small", "at least -")
        bound = high if beta > 0 else -low
        steps = max(0, math.ceil(bound * 1e5 - 1e-6) - 1)  # the bound itself is excluded
        raise UserError(
            f"beta={beta:g} is too {too} for {len(params)} blocks at sparsity {sparsity:g}: "
            f"{limit}{steps / 1e5:.5f}"
        )
    return rates


def uniform_rates(params: Sequence[int], sparsity: float, beta: float = 0.0) -> list[float]:
    """The same rate for every block."""
    return [sparsity] * len(params)


ALLOCATIONS: dict[str, Callable[[Sequence[int], float, float], list[float]]] = {
    "arithmetic": arithmetic_rates,
    "uniform": uniform_rates,
}


def block_rates(spec: PruneSpec, params: Sequence[int]) -> list[float]:
    """The rate of every block, by the allocation that a spec names."""
    if spec.allocation not in ALLOCATIONS:
        raise UserError(
            f"unknown prune.allocation={spec.allocation!r}: {nearest(spec.allocation, ALLOCATIONS)}"
        )
    return ALLOCATIONS[spec.allocation](params, spec.sparsity, spec.beta)


def zeros_per_matrix(rates: Sequence[float], params: Sequence[int]) -> list[int]:
    """How many weights of each matrix become zero, one rate and size per matrix.

    What rounding leaves is carried to the next matrix, so that the total is the rounded exact
    budget: two allocations of one mean sparsity have equally many zeros.
    """
    counts, carry = [], 0.0
    for rate, size in zip(rates, params, strict=True):
        exact = rate * size + carry
        # A half goes up, also where the sum of another allocation comes out a little below it.
        count = min(size, max(0, math.floor(exact + 0.5 + 1e-6)))
        carry = exact - count
        counts.append(count)
    return counts
