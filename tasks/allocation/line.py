"""Rates on a line, and on a line with a bend.

    rates = arithmetic_rates(params=[100] * 30, sparsity=0.6, beta=0.008)

The rates of an arithmetic progression are decided by its common difference beta
(ATP, arXiv 2502.14770, section 3); its centre is weighted by the blocks' parameters here, which
equals the published (L + 1) / 2 where blocks are of one size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from infra.errors import UserError
from tasks.allocation.budget import MOST, Plan, fit


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


def arithmetic_rates(
    params: Sequence[int], sparsity: float, beta: float, name: str = "beta"
) -> list[float]:
    """Rates s_i = S + beta * (i - c), i = 1..L, of blocks with `params` weights each.

    Their parameter-weighted mean is S. Raises UserError where beta, called `name` there, takes a
    rate out of [0, 1).
    """
    c = centre(params)
    rates = [sparsity + beta * (i - c) for i in range(1, len(params) + 1)]
    if not all(0 <= rate < 1 for rate in rates):
        low, high = beta_bounds(params, sparsity)
        too, limit = ("large", "at most ") if beta > 0 else ("small", "at least -")
        bound = high if beta > 0 else -low
        steps = max(0, math.ceil(bound * 1e5 - 1e-6) - 1)  # the bound itself is excluded
        raise UserError(
            f"{name}={beta:g} is too {too} for {len(params)} blocks at sparsity {sparsity:g}: "
            f"{limit}{steps / 1e5:.5f}"
        )
    return rates


def bend_shape(params: Sequence[int]) -> list[float]:
    """The square of the depth, 0 at the first block and 1 at the last, less its weighted mean.

    Most of its rise is in the last blocks, which a line cannot treat by themselves.
    """
    last = max(len(params) - 1, 1)
    squares = [(i / last) ** 2 for i in range(len(params))]
    mean = sum(q * p for q, p in zip(squares, params, strict=True)) / sum(params)
    return [q - mean for q in squares]


def bend_bounds(params: Sequence[int], sparsity: float) -> tuple[float, float]:
    """The open interval of bend in which, with beta = 0, every rate lies in [0, 1)."""
    shape = bend_shape(params)
    low, high = min(shape), max(shape)
    if high <= low:
        return 0.0, 0.0
    return (
        -min(sparsity / high, (1 - sparsity) / -low),
        min((1 - sparsity) / high, sparsity / -low),
    )


def bent_rates(params: Sequence[int], sparsity: float, beta: float, bend: float) -> Plan:
    """Rates s_i = S + beta * (i - c) + bend * (q_i - mean of q), q the square of the depth.

    Each number alone has bounds; where both together leave the range, rates are clamped.
    """
    c = centre(params)
    rates = [
        sparsity + beta * (i - c) + bend * q for i, q in enumerate(bend_shape(params), start=1)
    ]
    return fit(rates, [1.0] * len(rates), params, sparsity, high=max(MOST, sparsity))
