"""Patterns: N:M of every group, and mixed N:M whose average is as exact as it can be.

python -m pytest tests/tasks/test_pruning_patterns.py
"""

from itertools import accumulate, product
from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.records import MatrixRecord
from infra.spec_files import parse_spec
from infra.specs import PruneSpec
from tasks.pruning.patterns import Budget, budgets, mixed_groups, parse_pattern, smallest_places


def matrix(block: int, rate: float, params: int = 64) -> MatrixRecord:
    zeros = round(rate * params)
    return MatrixRecord(block=block, matrix="up", params=params, rate=rate, zeros=zeros)


def test_patterns_are_read() -> None:
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("N:8") == (None, 8)


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "2:4:8", "N:M", "", "columns", "-1:4"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"prune\.pattern=.* is none: unstructured, N:M such"):
        parse_pattern(pattern)
    raw = {"model": {"source": "m"}, "data": {"source": "d"}, "prune": {"pattern": pattern}}
    with pytest.raises(UserError, match=r"prune\.pattern=.*: write unstructured, structured, N:M"):
        parse_spec(raw, "mine.toml")
    assert PruneSpec(pattern="N:8").pattern == "N:8"


def test_unstructured_budgets_are_the_zeros_of_the_allocation() -> None:
    found = budgets("unstructured", [matrix(0, 0.5), matrix(1, 0.25)], [(8, 8), (4, 16)])
    assert found == [Budget(32), Budget(16)]


def test_a_fixed_pattern_is_that_of_every_matrix() -> None:
    found = budgets("1:4", [matrix(0, 0.75), matrix(1, 0.75)], [(8, 8), (4, 16)])
    assert found == [Budget(48, (1, 4))] * 2


def test_a_dense_sweep_has_no_pattern() -> None:
    assert budgets("2:4", [matrix(0, 0.0)], [(8, 8)]) == [Budget(0)]


def test_a_fixed_pattern_refuses_other_rates() -> None:
    with pytest.raises(UserError, match=r"2:4 makes 0\.5 of every matrix zero, not 0\.6: set"):
        budgets("2:4", [matrix(0, 0.5), matrix(1, 0.6)], [(8, 8)] * 2)


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"up of block 1 has 6 inputs, which groups of 4 do not"):
        budgets("2:4", [matrix(0, 0.5), matrix(1, 0.5)], [(8, 8), (8, 6)])


def test_mixed_groups_follow_the_rates_of_blocks() -> None:
    rates = [0.4, 0.5, 0.6]
    found = budgets("N:8", [matrix(b, r) for b, r in enumerate(rates)], [(8, 8)] * 3)
    assert found == [Budget(24, (5, 8)), Budget(32, (4, 8)), Budget(40, (3, 8))]
    # one rate per matrix: their weighted mean decides the block's
    uneven = [matrix(0, 0.125, 32), matrix(0, 0.3125, 64), matrix(1, 0.5, 96)]
    found = budgets("N:8", uneven, [(4, 8), (8, 8), (12, 8)])
    assert [budget.group for budget in found] == [(6, 8), (6, 8), (4, 8)]


@settings(deadline=None, max_examples=60)
@given(
    blocks=st.lists(
        st.tuples(st.floats(0, 0.999).map(lambda rate: round(rate, 4)), st.integers(1, 40)),
        min_size=1,
        max_size=8,
    ),
    size=st.sampled_from([4, 8]),
)
def test_the_mean_of_mixed_groups_is_the_nearest_there_is(
    blocks: list[tuple[float, int]], size: int
) -> None:
    rates, params = [rate for rate, _ in blocks], [count for _, count in blocks]
    groups = mixed_groups(rates, params, size)
    zeros = [size - kept for kept in groups]
    assert all(1 <= kept <= size for kept in groups)
    assert all(abs(z - min(r * size, size - 1)) < 1 for z, r in zip(zeros, rates, strict=True))
    wanted = sum(r * p for r, p in blocks) * size

    def missed(choice: tuple[int, ...]) -> float:
        return abs(sum(z * p for z, p in zip(choice, params, strict=True)) - wanted)

    exact = [min(rate * size, size - 1) for rate in rates]
    best = min(missed(choice) for choice in product(*({floor(x), ceil(x)} for x in exact)))
    assert missed(tuple(zeros)) <= best + 1e-3


def test_mixed_groups_of_equal_blocks_are_exact() -> None:
    """80 blocks on a line: no rounding is left over, up to any depth no more than half a step."""
    rates = [0.7 + 0.004 * (i - 39.5) for i in range(80)]
    groups = mixed_groups(rates, [1000] * 80, 8)
    assert sum(8 - kept for kept in groups) == 0.7 * 8 * 80
    wanted, zeros = accumulate(8 * rate for rate in rates), accumulate(8 - n for n in groups)
    assert all(abs(a - b) <= 0.5 + 1e-6 for a, b in zip(wanted, zeros, strict=True))


@pytest.mark.parametrize("rate", [0.55, 0.6, 0.65, 0.7])
def test_equal_rates_stay_level_over_depth(rate: float) -> None:
    """What uniform is compared with must not be tilted by rounding."""
    groups = mixed_groups([rate] * 30, [1000] * 30, 8)
    assert abs(sum(groups[:15]) - sum(groups[15:])) <= 1


def test_mixed_groups_of_many_sizes_end_soon() -> None:
    """Every sum of 60 blocks of different sizes is another one."""
    params = [1_000_003 + 7919 * i * i for i in range(60)]
    rates = [0.3 + 0.007 * i for i in range(60)]
    groups = mixed_groups(rates, params, 8)
    mean = sum((8 - kept) * count for kept, count in zip(groups, params, strict=True)) / 8
    wanted = sum(rate * count for rate, count in zip(rates, params, strict=True))
    assert abs(mean - wanted) / sum(params) < 1e-3


def test_smallest_places_are_in_order_and_equal_ones_by_index() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0], [torch.inf, 0.0, torch.inf, torch.inf]])
    assert smallest_places(scores, 3).tolist() == [[1, 3, 2], [1, 0, 2]]


def test_patterns_that_cannot_hold_a_sparsity_are_refused() -> None:
    for pattern in ("N:0", "N:1", "1:1", "0:4"):
        with pytest.raises(UserError, match=r"prune\.pattern"):
            parse_pattern(pattern)
    high = [matrix(block, 0.9, 64) for block in range(4)]
    with pytest.raises(UserError, match=r"multiples of 1/4, not 0\.9: set prune\.sparsity=0\.75"):
        budgets("N:4", high, [(8, 8)] * 4)
    sizes = (64, 256, 256, 4096)
    rates = [0.5, 0.5, 0.5, (0.625 * sum(sizes) - 0.5 * 576) / 4096]
    unequal = [
        matrix(b, rate, size) for b, (rate, size) in enumerate(zip(rates, sizes, strict=True))
    ]
    with pytest.raises(UserError, match=r"of these blocks at the nearest, not 0\.625"):
        budgets("N:8", unequal, [(size // 8, 8) for size in sizes])
