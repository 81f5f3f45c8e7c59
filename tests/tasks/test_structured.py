"""Whole units of a matrix: which go, what the rest becomes, and how many of each block.

python -m pytest tests/tasks/test_structured.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import UserError
from tasks.pruning.inputs import DAMPING, InputStatistics
from tasks.pruning.structured import (
    magnitude_units,
    obs_units,
    remove_units,
    taylor_units,
    wanda_units,
)
from tasks.structure import unit_counts


def layer(out: int = 6, in_: int = 12, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that are correlated, so that some can stand for others."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(in_, in_, generator=generator)
    inputs = torch.randn(tokens, in_, generator=generator) @ mixed
    return torch.randn(out, in_, generator=generator), inputs


def measured(inputs: Tensor) -> InputStatistics:
    statistics = InputStatistics({"gram"})
    statistics.add(inputs)
    return statistics


def least_squares(weight: Tensor, inputs: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """In float64, by lstsq on the inputs and the damping: the weights, and the damped error."""
    w, x = weight.double(), inputs.double()
    hessian = 2 / len(x) * x.T @ x
    damping = DAMPING * hessian.diagonal().mean()
    rows = torch.cat([x * (2 / len(x)) ** 0.5, damping.sqrt() * torch.eye(x.shape[1]).double()])
    new = torch.zeros_like(w)
    new[:, kept] = torch.linalg.lstsq(rows[:, kept], rows @ w.T, driver="gelsd").solution.T
    return new, float((rows @ (new - w).T).square().sum())


@pytest.mark.parametrize("width", [1, 3])
def test_what_stays_makes_up_for_what_goes(width: int) -> None:
    weight, inputs = layer()
    new, gone = remove_units(weight, measured(inputs), wanda_units, 12 // width, 2)
    assert int(gone.sum()) == 2
    columns = gone.repeat_interleave(width)
    assert not new[:, columns].any()
    wanted, _ = least_squares(weight, inputs, (~columns).nonzero().flatten().tolist())
    torch.testing.assert_close(new.double(), wanted, rtol=1e-3, atol=1e-4)
    masked = weight.masked_fill(columns, 0)
    assert (inputs @ (new - weight).T).norm() < 0.9 * (inputs @ (masked - weight).T).norm()


@pytest.mark.parametrize("width", [1, 2])
def test_the_surgeon_takes_what_the_rest_can_best_replace(width: int) -> None:
    """One by one, as a loop over all candidates with a solution of each would."""
    weight, inputs = layer()
    count, goes = 12 // width, 4
    taken: list[int] = []
    for _ in range(goes):
        errors = {}
        for unit in set(range(count)) - set(taken):
            kept = [i for i in range(12) if i // width not in {*taken, unit}]
            errors[unit] = least_squares(weight, inputs, kept)[1]
        taken.append(min(errors, key=errors.__getitem__))
    gone = obs_units(weight, measured(inputs), count, goes)
    assert gone.nonzero().flatten().tolist() == sorted(taken)


def test_the_surgeon_beats_scores_that_know_of_no_replacement() -> None:
    weight, inputs = layer(in_=24, tokens=200)
    inputs[:, 1] = inputs[:, 0] * 3  # large, but another one says the same
    statistics = measured(inputs)

    def error(choose: object) -> float:
        new, _ = remove_units(weight, statistics, choose, 24, 8)  # type: ignore[arg-type]
        return float((inputs @ (new - weight).T).norm())

    assert error(obs_units) < error(wanda_units)
    assert bool(obs_units(weight, statistics, 24, 2)[:2].any())


@pytest.mark.parametrize("width", [1, 2])
def test_the_surgeon_takes_what_only_sees_zeros_first(width: int) -> None:
    weight, inputs = layer(in_=24)
    inputs *= 0.01  # the Hessian of a dead input is 1, which is large beside this
    dead = [6, 7, 14, 15]
    inputs[:, dead] = 0
    gone = obs_units(weight, measured(inputs), 24 // width, 4 // width)
    assert gone.repeat_interleave(width).nonzero().flatten().tolist() == dead


def test_scores_are_sums_over_the_columns_of_a_unit() -> None:
    weight, inputs = layer(in_=6)
    statistics = measured(inputs)
    statistics.gradient = torch.rand(6, 6)
    scores = {
        magnitude_units: weight**2,
        wanda_units: weight**2 * inputs.norm(dim=0) ** 2,
        taylor_units: (weight * statistics.gradient) ** 2,
    }
    for choose, each in scores.items():
        units = [float(each[:, 2 * u : 2 * u + 2].sum()) for u in range(3)]
        gone = choose(weight, statistics, 3, 1).tolist()
        assert gone == [u == units.index(min(units)) for u in range(3)]


def test_without_inputs_nothing_is_made_up_for() -> None:
    weight, _ = layer()
    new, gone = remove_units(weight, InputStatistics({"gram"}), magnitude_units, 12, 3)
    assert torch.equal(new, weight.masked_fill(gone, 0))


KINDS = st.lists(
    st.tuples(st.integers(2, 40), st.integers(200, 900)), min_size=2, max_size=6
)  # groups of heads, channels


@given(KINDS, st.floats(0.05, 0.6), st.floats(-0.9, 0.9))
def test_every_block_loses_its_share(
    blocks: list[tuple[int, int]], mean: float, tilt: float
) -> None:
    """Within one channel, whatever the heads leave: a group is as large as a block's share."""
    units = [[(600, heads), (3, channels)] for heads, channels in blocks]
    params = [sum(size * count for size, count in kinds) for kinds in units]
    step = tilt * min(mean, 0.6 - mean) / len(blocks)
    rates = [mean + step * (i - (len(blocks) - 1) / 2) for i in range(len(blocks))]
    try:
        counts = unit_counts(rates, params, units)
    except UserError:
        return
    removed = [
        sum(n * size for n, (size, _) in zip(each, kinds, strict=True))
        for each, kinds in zip(counts, units, strict=True)
    ]
    wanted = sum(rate * total for rate, total in zip(rates, params, strict=True))
    assert abs(sum(removed) - wanted) <= 3
    assert all(
        n < count
        for e, k in zip(counts, units, strict=True)
        for n, (_, count) in zip(e, k, strict=True)
    )
    for rate, each, ((_, heads), _) in zip(rates, counts, units, strict=True):
        assert abs(each[0] - rate * heads) <= 1 or each[0] == heads - 1


def test_counts_of_equal_blocks() -> None:
    units = [[(300, 3), (3, 700)]] * 3  # at 30 %: 0.9 groups of three in each block
    assert unit_counts([0.3] * 3, [3000] * 3, units) == [[1, 200], [1, 200], [1, 200]]
    assert unit_counts([0.0, 0.3, 0.6], [3000] * 3, units) == [[0, 0], [1, 200], [2, 400]]


def test_one_unit_of_each_kind_stays() -> None:
    with pytest.raises(UserError, match=r"one channel and one head .* choose less sparsity"):
        unit_counts([0.99, 0.99], [600, 600], [[(100, 3), (30, 10)]] * 2)


def test_a_block_with_nothing_left_to_lose_is_made_up_for_by_the_next() -> None:
    counts = unit_counts([0.2, 0.2], [100, 1_000], [[], [(10, 100)]])
    assert counts == [[], [22]]
