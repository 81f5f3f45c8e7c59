"""Budgets: rates whose parameter-weighted mean is exact, and how many weights go.

plan = fit([0.2, 0.9, 1.3], [1.0] * 3, params=[10, 10, 10], mean=0.7)
plan.rates, plan.clamped        # [0.16, 0.95, 0.99] or so, 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MOST = 0.99  # no allocation that is not a line may remove more of a matrix


class Plan(NamedTuple):
    """One rate per matrix or block, and how many of them were clamped to stay in range."""

    rates: list[float]
    clamped: int = 0


def weighted_mean(values: Sequence[float], params: Sequence[int]) -> float:
    """Mean over all weights, of values that stand for `params` weights each."""
    return math.fsum(v * p for v, p in zip(values, params, strict=True)) / sum(params)


def fit(
    start: Sequence[float],
    slope: Sequence[float],
    params: Sequence[int],
    mean: float,
    *,
    low: float = 0.0,
    high: float = MOST,
) -> Plan:
    """clip(start_i + t * slope_i, low, high), with t such that the weighted mean is `mean`.

    Slopes of 1 shift, a start of 0 scales. slope >= 0. Where the slopes cannot reach the mean
    (all of what may still move is at its end), what is missing is shared out by a shift.
    """
    if not low <= mean <= high:
        raise ValueError(f"a mean of {mean} with values between {low} and {high}")

    def values(t: float) -> list[float]:
        return [min(high, max(low, a + t * b)) for a, b in zip(start, slope, strict=True)]

    # The least t in size that reaches the mean, by doubling and halving.
    away = mean - weighted_mean(values(0.0), params)
    sign = 1.0 if away > 0 else -1.0

    def reached(t: float) -> bool:
        return sign * (mean - weighted_mean(values(sign * t), params)) <= 1e-15

    near, far = 0.0, 0.0 if reached(0.0) else 1.0
    while not reached(far) and far < 1e300:
        near, far = far, far * 2
    for _ in range(100):
        middle = near / 2 + far / 2
        near, far = (near, middle) if reached(middle) else (middle, far)
    raw = [a + sign * far * b for a, b in zip(start, slope, strict=True)]
    clamped = sum(not low - 1e-9 <= r <= high + 1e-9 for r in raw)
    return Plan(_exact(values(sign * far), params, mean, low, high), clamped)


def _exact(
    rates: list[float], params: Sequence[int], mean: float, low: float, high: float
) -> list[float]:
    """What rounding, or slopes of zero, left open is shared out where there is room."""
    target, before = mean * sum(params), math.inf
    while True:
        missing = target - math.fsum(r * p for r, p in zip(rates, params, strict=True))
        free = [low < r < high for r in rates]
        if not any(free):  # only then is one moved that was clamped
            free = [r < high if missing > 0 else r > low for r in rates]
        room = sum(p for p, f in zip(params, free, strict=True) if f)
        if not missing or not room or abs(missing) >= before:
            return rates
        before = abs(missing)
        rates = [
            min(high, max(low, r + missing / room)) if f else r
            for r, f in zip(rates, free, strict=True)
        ]


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
