"""What every method owes at every pattern, and what each of them is better at than another.

python -m pytest tests/tasks/test_pruning_methods.py
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.bits import ROUNDING
from tasks.pruning import METHODS, prune_in_place, prune_weight
from tasks.pruning.dsnot import expected_error
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget
from tests.tasks.layers import PATTERNS, budget_of, layer, measured, only_masks

MASKS = [method for method in METHODS if only_masks(method)]
WITH_GRAM = [method for method in METHODS if "gram" in METHODS[method].needs]
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def pruned(
    weight: Tensor, inputs: Tensor, method: str, pattern: str = "unstructured", rate: float = 0.6
) -> Tensor:
    new = weight.clone()
    budget = budget_of(pattern, tuple(weight.shape), round(rate * weight.numel()))
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    prune_in_place(new, measured(method, inputs, gradient=gradient), method=method, budget=budget)
    return new


def check_counts(new: Tensor, pattern: str, zeros: int, *, exactly: bool = True) -> None:
    """As many zeros as asked for, in every group where there are groups."""
    gone = new == 0
    if pattern == "unstructured":
        count = int(gone.sum())
        assert count == zeros if exactly else count >= zeros
    else:
        kept, size = map(int, pattern.split(":"))
        counts = gone.reshape(-1, size).sum(1)
        assert bool((counts == size - kept).all() if exactly else (counts >= size - kept).all())


@settings(deadline=None, max_examples=80)
@given(
    method=st.sampled_from(sorted(METHODS)),
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 30),
    dead=st.integers(0, 5),
    rate=st.floats(0, 1),
    levels=st.integers(1, 9),
    dtype=st.sampled_from(HALVES),
    transposed=st.booleans(),
)
def test_counts_are_exact_and_nothing_else_is_touched(
    method: str,
    pattern: str,
    rows: int,
    groups: int,
    tokens: int,
    dead: int,
    rate: float,
    levels: int,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    """Also of equal weights, dead inputs, fewer tokens than inputs, and views."""
    columns = groups * 8
    torch.manual_seed(rows * columns + tokens)
    stored = torch.randint(1, levels + 1, (columns, rows) if transposed else (rows, columns))
    weight = ((torch.randint(0, 2, stored.shape) * 2 - 1) * stored).to(dtype)
    weight = weight.t() if transposed else weight
    inputs = torch.randn(tokens, columns).to(dtype)
    inputs[:, :dead] = 0
    before, zeros = weight.clone(), round(rate * weight.numel())
    budget = budget_of(pattern, tuple(weight.shape), zeros)
    gradient = torch.randn(rows, columns)
    for _ in range(2):  # the second time there is nothing left to do
        statistics = measured(method, inputs, gradient=gradient)
        assert prune_in_place(weight, statistics, method=method, budget=budget)
        assert bool(torch.isfinite(weight).all())
        # What is updated may come out as zero, or round to it.
        check_counts(weight, pattern, zeros, exactly=method in MASKS)
        if method not in MASKS:
            return
        gone = weight == 0
        assert torch.equal(weight[~gone], before[~gone])
        before = weight.clone()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_counts_of_random_weights_are_exact(method: str, pattern: str) -> None:
    weight, inputs = layer(1)
    for rate in (0.0, 0.31, 0.999):
        check_counts(pruned(weight, inputs, method, pattern, rate), pattern, round(rate * 960))
    if pattern != "unstructured" and method not in ROUNDING:
        public = prune_weight(weight, inputs, method=method, pattern=pattern, gradient=weight)
        check_counts(public, pattern, 0)


@pytest.mark.parametrize("method", WITH_GRAM)
def test_weights_of_dead_inputs_go_first_and_stay_what_they_are(method: str) -> None:
    weight, inputs = layer(2, in_=144)
    inputs[:, ::4] = 0
    new = pruned(weight, inputs, method, rate=0.4)
    assert bool((new[:, ::4] == 0).all())
    check_counts(new, "unstructured", round(0.4 * weight.numel()))
    new = pruned(weight, inputs, method, rate=0.1)  # fewer than are dead
    check_counts(new, "unstructured", round(0.1 * weight.numel()))
    kept = new != 0
    kept[:, [i for i in range(144) if i % 4]] = False
    assert kept.any()
    assert torch.equal(new[kept], weight[kept])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_all_dead(method: str, pattern: str) -> None:
    weight, inputs = layer(3)
    new = pruned(weight, torch.zeros_like(inputs), method, pattern)
    assert bool(torch.isfinite(new).all())
    check_counts(new, pattern, round(0.6 * weight.numel()))


@pytest.mark.parametrize("method", WITH_GRAM)
def test_a_singular_hessian(method: str) -> None:
    """Two tokens for forty inputs; then one that rounding has made indefinite."""
    weight, inputs = layer(4)
    new = pruned(weight, inputs[:2], method)
    assert bool(torch.isfinite(new).all())
    check_counts(new, "unstructured", round(0.6 * weight.numel()))
    statistics = measured(method, inputs)
    statistics._gram = statistics.gram - 0.5 * statistics.gram.diagonal().mean() * torch.eye(40)
    statistics._gram.fill_diagonal_(float(statistics.gram.diagonal().mean().abs()))
    statistics._gram[0, 1] = statistics._gram[1, 0] = 3 * statistics._gram[0, 0]
    new = weight.clone()
    assert prune_in_place(new, statistics, method=method, budget=Budget(500))
    check_counts(new, "unstructured", 500)
    assert bool(torch.isfinite(new).all())
    assert statistics.note.startswith("Hessian not positive definite: damped by ")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "dsnot", "pruner-zero"])
def test_ties_go_by_index(method: str, pattern: str) -> None:
    gradient = torch.ones(2, 8)
    gradient[:, -1] = 2  # the last of each row is the only one that it does not score zero
    statistics = measured(method, torch.ones(3, 8), gradient=gradient)
    weight = torch.ones(2, 8)
    prune_in_place(weight, statistics, method=method, budget=budget_of(pattern, (2, 8), 9))
    kept = {
        "unstructured": [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]],
        "2:4": [[0, 0, 1, 1, 0, 0, 1, 1]] * 2,
        "4:8": [[0, 0, 0, 0, 1, 1, 1, 1]] * 2,
        "1:4": [[0, 0, 0, 1, 0, 0, 0, 1]] * 2,
    }[pattern]
    if method == "magnitude" and pattern == "unstructured":
        kept = [[0] * 8, [0, 1, 1, 1, 1, 1, 1, 1]]
    assert weight.tolist() == kept


@pytest.mark.parametrize("dtype", HALVES[1:])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_pruned_in_float32(method: str, dtype: torch.dtype) -> None:
    """The same weights and inputs, only stored in half."""
    weight, inputs = (x.to(dtype) for x in layer(6))
    half = pruned(weight, inputs, method)
    full = pruned(weight.float(), inputs.float(), method)
    assert half.dtype == dtype
    assert torch.equal(half == 0, full == 0)
    torch.testing.assert_close(half, full.to(dtype))


def test_weights_that_their_dtype_cannot_hold_are_an_error() -> None:
    weight, inputs = layer(7)
    weight = (weight / weight.abs().max() * 65000).half()
    with pytest.raises(RuntimeError, match=r"sparsegpt gives weights that torch\.float16 cannot"):
        pruned(weight, inputs + 1, "sparsegpt", rate=0.9)


SEEDS = range(4)
CASES = [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.5)]


def output_error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - new).T).square().sum())


@pytest.mark.parametrize("pattern, rate", CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_alps_is_below_sparsegpt_and_that_below_wanda(seed: int, pattern: str, rate: float) -> None:
    """The output's error on the calibration inputs, which all of them look at."""
    weight, inputs = layer(seed, out=24, in_=160 if seed % 2 else 48, tokens=400)
    errors = [
        output_error(weight, pruned(weight, inputs, method, pattern, rate), inputs)
        for method in ("alps", "sparsegpt", "wanda", "magnitude")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("pattern, rate", CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_dsnot_lowers_the_expected_error_of_every_row(seed: int, pattern: str, rate: float) -> None:
    weight, inputs = layer(seed, out=32, in_=64)
    statistics = measured("dsnot", inputs)
    start, new = (pruned(weight, inputs, method, pattern, rate) for method in ("wanda", "dsnot"))
    before, after = (expected_error(weight, statistics, w == 0).abs() for w in (start, new))
    assert bool((after <= before + 1e-5).all())
    assert after.sum() < 0.5 * before.sum()
    assert torch.equal((new == 0).sum(1), (start == 0).sum(1))


def slow_dsnot(weight: Tensor, statistics: InputStatistics, mask: Tensor, size: int) -> Tensor:
    """The rule swap by swap, as it is told; mask: what Wanda prunes."""
    mask = mask.clone()
    norms = statistics.squares.sqrt()
    for row in range(weight.shape[0]):
        share = weight[row] * statistics.mean
        score, worth = weight[row].abs() * norms, share / statistics.variance
        error = float(share[mask[row]].sum())
        for _ in range(50):
            sign = 1 if error > 0 else -1
            groups = [range(start, start + size) for start in range(0, weight.shape[1], size)]
            pairs: list[tuple[float, int, int]] = []
            for group in groups:
                back = [j for j in group if mask[row, j] and share[j] * sign > 0]
                gone = [j for j in group if not mask[row, j] and share[j] * sign < 0]
                if back and gone:
                    best = max(back, key=lambda j: float(worth[j]) * sign)
                    least = min(gone, key=lambda j: float(score[j]))
                    pairs.append((float(worth[best]) * sign, best, least))
            if not pairs:
                break
            _, best, least = max(pairs)
            new = error - float(share[best]) + float(share[least])
            if abs(new) >= abs(error):
                break
            mask[row, best], mask[row, least] = False, True
            flipped, error = new * error < 0, new
            if flipped or abs(error) < 0.1:
                break
    return mask


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dsnot_equals_its_rule_told_slowly(pattern: str) -> None:
    weight, inputs = layer(11, out=8, in_=32)
    start, new = (pruned(weight, inputs + 1, method, pattern) for method in ("wanda", "dsnot"))
    size = 32 if pattern == "unstructured" else int(pattern[-1])
    expected = slow_dsnot(weight, measured("dsnot", inputs + 1), start == 0, size)
    assert torch.equal(new == 0, expected)
    assert not torch.equal(new == 0, start == 0)


def slow_sparsegpt(weight: Tensor, inputs: Tensor, group: Any, zeros: list[int]) -> Tensor:
    """Column by column with an explicit inverse; zeros: of each panel of 128."""
    new = weight.double()
    H = inputs.double().T @ inputs.double() * (2 / inputs.shape[0])
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    mask = torch.zeros_like(new, dtype=torch.bool)
    for j in range(new.shape[1]):
        width, kept = (128, 0) if group is None else (group[1], group[0])
        if j % width == 0:
            panel = slice(j, j + width)
            score = (new[:, panel] / U.diagonal()[panel]).square()
            if group is None:
                order = score.flatten().argsort()[: zeros[j // 128]]
                chosen = torch.zeros(score.numel(), dtype=torch.bool)
                chosen[order] = True
                mask[:, panel] = chosen.reshape(score.shape)
            else:
                chosen = score.argsort(1)[:, : width - kept]
                mask[:, panel] = mask[:, panel].scatter(1, chosen, True)
        error = torch.where(mask[:, j], new[:, j] / U[j, j], 0)
        new -= error[:, None] * U[j]
        new[mask[:, j], j] = 0
    return new.float()


@pytest.mark.parametrize("group", [None, (2, 4), (1, 3), (5, 20), (30, 60), (100, 300)])
def test_sparsegpt_equals_its_rule_told_slowly(group: Any) -> None:
    """Groups that do not divide a panel, and a last panel that is narrow, as well."""
    weight, inputs = layer(12, out=16, in_=300, tokens=700)
    budget = Budget(2880) if group is None else Budget.in_groups(group, weight.shape)
    new = weight.clone()
    prune_in_place(new, measured("sparsegpt", inputs), method="sparsegpt", budget=budget)
    shares = [round(2880 * stop / 300) for stop in (0, 128, 256, 300)]
    panels = [b - a for a, b in pairwise(shares)]
    expected = slow_sparsegpt(weight, inputs, group, panels)
    assert torch.equal(new == 0, expected == 0)
    torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-4)
