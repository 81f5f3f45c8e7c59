"""Rates of blocks, their bounds, and how many weights of each matrix go.

python -m pytest tests/tasks/test_allocation.py
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from infra.errors import UserError
from tasks.allocation import (
    arithmetic_rates,
    beta_bounds,
    centre,
    load_rates,
    save_rates,
    tilt,
    zeros_per_matrix,
)

sizes = st.lists(st.integers(1, 10_000), min_size=2, max_size=60)
sparsities = st.floats(0.01, 0.99)
tilts = st.floats(-0.999, 0.999)


def weighted_mean(rates: list[float], params: list[int]) -> float:
    return sum(r * p for r, p in zip(rates, params, strict=True)) / sum(params)


def test_the_published_formula_for_equal_blocks() -> None:
    """s_i = S - beta * (L - 1) / 2 + beta * (i - 1)."""
    rates = arithmetic_rates([7] * 32, 0.7, 0.01)
    published = [0.7 - 0.01 * 31 / 2 + 0.01 * (i - 1) for i in range(1, 33)]
    assert rates == pytest.approx(published, abs=1e-15)
    assert centre([7] * 32) == 16.5


def test_the_mean_of_unequal_blocks_is_weighted() -> None:
    """Stages of ConvNeXt-T: centred by count, 0.70 would come out as 0.86."""
    stages = [(3, 96), (3, 192), (9, 384), (3, 768)]
    params = [8 * width**2 for depth, width in stages for _ in range(depth)]
    beta = 0.9 * beta_bounds([1] * 18, 0.7)[1]
    by_count = [0.7 + beta * (i - 9.5) for i in range(1, 19)]
    assert weighted_mean(by_count, params) > 0.8
    low, high = beta_bounds(params, 0.7)
    for beta in (0.99 * low, 0.0, 0.5 * high, 0.99 * high):
        assert weighted_mean(arithmetic_rates(params, 0.7, beta), params) == pytest.approx(
            0.7, abs=1e-12
        )


@given(sizes, sparsities, tilts)
def test_rates_are_legal_and_keep_the_mean(
    params: list[int], sparsity: float, share: float
) -> None:
    low, high = beta_bounds(params, sparsity)
    assert low < 0 < high
    beta = share * (high if share > 0 else -low)
    rates = arithmetic_rates(params, sparsity, beta)
    assert all(0 <= rate < 1 for rate in rates)
    assert weighted_mean(rates, params) == pytest.approx(sparsity, abs=1e-12)
    assert all(b - a == pytest.approx(beta, abs=1e-12) for a, b in pairwise(rates))
    assert tilt(beta, params, sparsity) == pytest.approx(share, abs=1e-9)


@given(sizes, sparsities, st.floats(1.001, 50), st.sampled_from([-1, 1]))
def test_beyond_the_bounds_is_refused_never_clamped(
    params: list[int], sparsity: float, factor: float, sign: int
) -> None:
    bound = beta_bounds(params, sparsity)[(sign + 1) // 2]
    with pytest.raises(UserError) as refused:
        arithmetic_rates(params, sparsity, bound * factor)
    message = str(refused.value)
    assert "\n" not in message
    assert f"for {len(params)} blocks at sparsity {sparsity:g}: " in message
    named = float(message.rpartition(" ")[2])
    if named:  # what a message names is legal itself
        assert arithmetic_rates(params, sparsity, named)


@pytest.mark.parametrize(
    "blocks, sparsity, beta, message",
    [
        (32, 0.7, 0.08, "beta=0.08 is too large for 32 blocks at sparsity 0.7: at most 0.01935"),
        (
            32,
            0.7,
            -0.02,
            "beta=-0.02 is too small for 32 blocks at sparsity 0.7: at least -0.01935",
        ),
        (31, 0.7, 0.02, "beta=0.02 is too large for 31 blocks at sparsity 0.7: at most 0.01999"),
        (2, 0.0, 0.1, "beta=0.1 is too large for 2 blocks at sparsity 0: at most 0.00000"),
        (4, 0.5, math.inf, "beta=inf is too large for 4 blocks at sparsity 0.5: at most 0.33333"),
        (4, 0.5, math.nan, "beta=nan is too small for 4 blocks at sparsity 0.5: at least -0.33333"),
    ],
)
def test_messages(blocks: int, sparsity: float, beta: float, message: str) -> None:
    with pytest.raises(UserError) as refused:
        arithmetic_rates([10] * blocks, sparsity, beta)
    assert str(refused.value) == message


def test_bounds_of_equal_blocks() -> None:
    for sparsity in (0.3, 0.5, 0.7):
        low, high = beta_bounds([10] * 12, sparsity)
        assert high == pytest.approx(min(2 * sparsity, 2 * (1 - sparsity)) / 11)
        assert low == pytest.approx(-high)


def test_one_block_has_no_slope() -> None:
    assert beta_bounds([10], 0.7) == (0.0, 0.0)
    assert arithmetic_rates([10], 0.7, 0.3) == [0.7]
    assert tilt(0.3, [10], 0.7) == 0.0


def test_tilt_is_zero_at_uniform() -> None:
    assert tilt(0.0, [1, 2, 3], 0.5) == 0.0


matrices = st.lists(st.integers(1, 3000), min_size=1, max_size=12)


@given(st.lists(matrices, min_size=2, max_size=8), sparsities, tilts)
def test_uniform_and_tilted_have_equally_many_zeros(
    blocks: list[list[int]], sparsity: float, share: float
) -> None:
    params = [sum(block) for block in blocks]
    low, high = beta_bounds(params, sparsity)
    tilted = arithmetic_rates(params, sparsity, share * (high if share > 0 else -low))
    flat = [size for block in blocks for size in block]
    counts = []
    for rates in ([sparsity] * len(blocks), tilted):
        each = [rate for rate, block in zip(rates, blocks, strict=True) for _ in block]
        zeros = zeros_per_matrix(each, flat)
        counts.append(sum(zeros))
        assert all(0 <= zero <= size for zero, size in zip(zeros, flat, strict=True))
        assert all(
            abs(zero - rate * size) <= 1.001
            for zero, rate, size in zip(zeros, each, flat, strict=True)
        )
    assume(max(flat) > 0)
    exact = sparsity * sum(flat)
    assert abs(counts[0] - exact) <= 0.51
    assert counts[0] == counts[1]


@given(st.integers(2, 40), st.integers(1, 99), tilts)
def test_budgets_that_end_in_a_half_are_equal_too(blocks: int, odd: int, share: float) -> None:
    """Half of an odd number of weights: the sums of two allocations differ in the last bit."""
    params = [2 * odd + 1] * blocks
    low, high = beta_bounds(params, 0.5)
    tilted = arithmetic_rates(params, 0.5, share * (high if share > 0 else -low))
    assert sum(zeros_per_matrix(tilted, params)) == sum(zeros_per_matrix([0.5] * blocks, params))


def test_remainders_are_carried() -> None:
    assert zeros_per_matrix([0.5] * 4, [1, 1, 1, 1]) == [1, 0, 1, 0]
    assert zeros_per_matrix([0.3] * 10, [1] * 10) == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert zeros_per_matrix([0.0, 0.0], [5, 5]) == [0, 0]


@pytest.mark.parametrize(
    "rates, message",
    [
        ({"a": 7}, r"a has rate 7, which is not in \[0, 1\)"),
        ({"a": "0.5"}, "a has rate '0.5'"),
        ({"a": torch.tensor(0.5)}, "a has rate tensor"),
        ({1: 0.5}, "1 is no name of a matrix"),
        ([0.5], "expected one object of names and rates"),
    ],
)
def test_what_are_no_rates_is_not_saved(tmp_path: Path, rates: Any, message: str) -> None:
    path = tmp_path / "rates.json"
    with pytest.raises(UserError, match=f"rates.json: {message}"):
        save_rates(rates, path)
    assert not path.exists()
    save_rates({"a": np.float32(0.5)}, path)  # type: ignore[dict-item]
    assert load_rates(path) == {"a": 0.5}
