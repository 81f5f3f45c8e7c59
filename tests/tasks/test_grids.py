"""Rounding to few bits: averages are exact, and GPTQ is what a plain double loop gives.

python -m pytest tests/tasks/test_grids.py
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.bits import bits_of
from infra.errors import UserError
from tasks.allocation import arithmetic_rates, beta_bounds
from tasks.pruning import METHODS, prune_in_place, prune_weight
from tasks.pruning.grids import WIDTHS, Grid, Widths, widths_per_matrix
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget
from tests.tasks.layers import layer, measured

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(64, 400)), min_size=2, max_size=12)


def bits_taken(widths: list[Widths], shapes: list[tuple[int, int]]) -> int:
    """Counted row by row."""
    total = 0
    for each, (rows, in_) in zip(widths, shapes, strict=True):
        for row in range(rows):
            total += in_ * (each.high if row < each.num_high else each.low) + 16 * -(-in_ // 128)
    return total


@settings(deadline=None, max_examples=200)
@given(shapes=SHAPES, mean=st.floats(0.05, 0.95), tilt=st.floats(-0.99, 0.99))
def test_averages_are_exact(shapes: list[tuple[int, int]], mean: float, tilt: float) -> None:
    """Of uniform and of any line, to within the bits of one row."""
    params = [rows * in_ for rows, in_ in shapes]
    low, high = beta_bounds(params, mean)
    for beta in (0.0, tilt * (high if tilt > 0 else -low)):
        rates = arithmetic_rates(params, mean, beta)
        widths = widths_per_matrix([bits_of(rate) for rate in rates], shapes)
        assert all(w.low in WIDTHS and w.high in WIDTHS for w in widths)
        asked = bits_of(mean) * sum(params)
        assert abs(bits_taken(widths, shapes) - asked) <= 4 * max(in_ for _, in_ in shapes)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_whole_width_is_that_of_every_row(width: int) -> None:
    """Whatever way the bits came: a rate is a rounded number."""
    shapes = [(30, 128), (1000, 1280), (7, 4096)] * 20
    bits = bits_of((8 - (width + 0.125)) / 5.75)
    for each in widths_per_matrix([bits] * len(shapes), shapes):
        assert {each.low, each.high if each.num_high else each.low} == {width}


def test_what_the_widths_cannot_reach_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"up of block 3 has rows of 16 inputs, whose scales take 1"
    ):
        widths_per_matrix([2.5], [(8, 16)], ["up of block 3"])
    with pytest.raises(UserError, match=r"8\.5 bits leave 8\.375 for a code"):
        widths_per_matrix([8.5], [(8, 128)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_goes_to_the_nearest_value_of_its_grid(dtype: torch.dtype) -> None:
    weight, _ = layer(1, out=10, in_=300)
    weight[3, 128:256] = 0
    grid = Grid(Widths(2, 3, 4), dtype)
    grid.begin(weight, InputStatistics(()))
    new = grid.nearest(weight)
    assert sorted(grid.widths.tolist()) == [2] * 6 + [3] * 4
    assert grid.bits == 300 * (6 * 2 + 4 * 3) + 16 * 30
    scales = grid.scales
    assert torch.equal(scales, scales.half().to(dtype).float())  # both hold it
    for row in range(10):
        half = 2 ** (int(grid.widths[row]) - 1)
        for column in range(300):
            levels = scales[row, column // 128] * torch.arange(-half, half)
            nearest = (levels - weight[row, column]).abs().min()
            assert abs(new[row, column] - weight[row, column]) <= nearest * (1 + 1e-5)
            assert bool((levels == new[row, column]).any())
    assert not (new == 0).logical_and(new.signbit()).any()
    assert grid.holds(new.to(dtype))
    new[5, 7] += scales[5, 0] / 3
    assert not grid.holds(new.to(dtype))


def test_the_rows_that_lose_most_get_more_bits() -> None:
    """By the errors that rounding them with fewer would really make in the outputs."""
    weight, inputs = layer(2, out=40, in_=256, tokens=2000)
    weight = weight * torch.linspace(0.2, 2, 40)[torch.randperm(40)][:, None]
    inputs = torch.randn_like(inputs) * torch.linspace(0.1, 3, 256)
    grid = Grid(Widths(3, 4, 10))
    grid.begin(weight, measured("rtn", inputs))
    lost = []
    for width in (3, 4):
        whole = Grid(Widths(width, width))
        whole.begin(weight, InputStatistics(()))
        lost.append((inputs @ (whole.nearest(weight) - weight).T).square().sum(0))
    best = set((lost[0] - lost[1]).argsort(descending=True)[:10].tolist())
    chosen = set(torch.nonzero(grid.widths == 4)[:, 0].tolist())
    assert len(best & chosen) >= 8


def slow_gptq(weight: Tensor, inputs: Tensor, widths: Tensor, zeros: list[int]) -> Tensor:
    """Row by row and column by column in float64; zeros: of each panel of 128 columns."""
    new = weight.double().clone()
    H = inputs.double().T @ inputs.double() * (2 / inputs.shape[0])
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    rows, columns = weight.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    scales = torch.ones(rows, dtype=torch.float64)
    for j in range(columns):
        if j % 128 == 0:
            panel = slice(j, min(j + 128, columns))
            score = (new[:, panel] / U.diagonal()[panel]).square()
            chosen = torch.zeros(score.numel(), dtype=torch.bool)
            chosen[score.flatten().argsort()[: zeros[j // 128]]] = True
            mask[:, panel] = chosen.reshape(score.shape)
            for row in range(rows):
                group = new[row, panel].masked_fill(mask[row, panel], 0)
                scales[row] = slow_scale(group, int(widths[row]))
        for row in range(rows):
            value = 0.0
            if not mask[row, j]:
                half = 2 ** (int(widths[row]) - 1)
                code = float((new[row, j] / scales[row]).round().clamp(-half, half - 1))
                value = code * float(scales[row])
            error = (new[row, j] - value) / U[j, j]
            new[row, j:] -= error * U[j, j:]
            new[row, j] = value
    return new


def slow_scale(group: Tensor, width: int) -> float:
    """The best of eight scales, the largest first, of which each is a number of fp16."""
    half = 2 ** (width - 1)
    extreme = float(group[group.abs().argmax()])
    smallest = {2: 0.55, 3: 0.7, 4: 0.85, 8: 0.97}[width]
    tried = []
    for place in range(8):
        scale = (
            float(torch.tensor(extreme / -half * (1 - place * (1 - smallest) / 7)).half()) or 1.0
        )
        values = (group / scale).round().clamp(-half, half - 1) * scale
        tried.append((float((values - group).square().sum()), place, scale))
    return min(tried)[2]


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("widths", [Widths(4, 4), Widths(2, 3, 7), Widths(4, 8, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_gptq_and_joint_pruning_equal_a_plain_reference(
    seed: int, widths: Widths, rate: float
) -> None:
    """Rounded alone, and half of the weights removed in the same pass; a last group is ragged."""
    weight, inputs = layer(seed, out=16, in_=300, tokens=700)
    zeros = round(rate * weight.numel())
    grid = Grid(widths)
    new = weight.clone()
    method = "sparsegpt" if rate else "gptq"
    prune_in_place(new, measured(method, inputs), method=method, budget=Budget(zeros, grid=grid))
    bounds = [round(zeros * stop / 300) for stop in (0, 128, 256, 300)]
    panels = [b - a for a, b in pairwise(bounds)]
    expected = slow_gptq(weight, inputs, grid.widths, panels)
    assert float((new - expected).norm() / expected.norm()) < 1e-4
    assert bool(((new == 0) | (expected != 0)).all())


def output_error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - new).T).square().sum())


@pytest.mark.parametrize("bits", [2.25, 3, 4.125, 6])
def test_gptq_is_below_rounding_to_nearest(bits: float) -> None:
    for seed in range(3):
        weight, inputs = layer(seed, out=24, in_=160, tokens=800)
        errors = [
            output_error(weight, prune_weight(weight, inputs, method=m, bits=bits), inputs)
            for m in ("gptq", "rtn")
        ]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"rtn", "gptq"}))
def test_every_method_prunes_and_rounds(method: str) -> None:
    """As many zeros as without rounding, or more; the better the more bits there are."""
    weight, inputs = layer(5, out=16, in_=160, tokens=400)
    options: dict[str, Any] = {"method": method, "gradient": weight}
    plain = prune_weight(weight, inputs, rate=0.5, **options)
    errors = []
    for bits in (8.2, 4.2, 3.2):
        new = prune_weight(weight, inputs, rate=0.5, bits=bits, **options)
        assert int((new == 0).sum()) >= int((plain == 0).sum())
        assert max(len(row.unique()) for row in new[:, :128]) <= 2 ** min(8, int(bits + 1))
        errors.append(output_error(weight, new, inputs))
    assert errors == sorted(errors)
    assert errors[0] < 1.05 * output_error(weight, plain, inputs)
    groups = prune_weight(weight, inputs, pattern="2:4", bits=4.2, **options)
    assert bool(((groups.reshape(-1, 4) == 0).sum(1) >= 2).all())


def test_what_does_not_go_together_is_refused() -> None:
    weight, inputs = layer(6, out=4, in_=96)
    for options in ({"rate": 0.5, "bits": 4}, {}, {"pattern": "2:4"}):
        with pytest.raises(UserError, match="method='gptq' only rounds: give bits, and no rate"):
            prune_weight(weight, inputs, method="gptq", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="groups of 3 do not divide the 128 weights"):
        prune_weight(weight, inputs, pattern="1:3", bits=4)
    with pytest.raises(TypeError, match="bits must be a number"):
        prune_weight(weight, inputs, rate=0.5, bits="4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="do not divide"):
        replace(Budget(10, (1, 3)), grid=Grid(Widths(4, 4)))
