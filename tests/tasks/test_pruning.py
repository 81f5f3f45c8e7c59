"""Which weights go: equal to published code, exact in number, the same for every tie.

python -m pytest tests/tasks/test_pruning.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import UserError
from tasks.pruning import METHODS, ColumnNorms, method_named, prune_in_place, prune_weight

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "reference.npz"
RATES = (0.3, 0.5, 0.7)


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.is_file():
        pytest.skip(f"arrays made by published code are not at {GOLDEN}")
    return np.load(GOLDEN)


def norms_of(*batches: Tensor) -> ColumnNorms:
    norms = ColumnNorms()
    for batch in batches:
        norms.add(batch)
    return norms


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_masks_equal_published_code(golden: Any, method: str, shape: str, rate: float) -> None:
    weight = torch.from_numpy(golden[f"{shape}_weight"])
    inputs = torch.from_numpy(golden[f"{shape}_inputs"]).reshape(-1, weight.shape[1])
    pruned = prune_weight(weight, inputs, method=method, rate=rate)
    expected = torch.from_numpy(golden[f"{shape}_{method}_pruned_mask_{rate}"])
    assert torch.equal(pruned == 0, expected)
    assert torch.equal(pruned[~expected], weight[~expected])


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_norms_equal_published_code(golden: Any, shape: str) -> None:
    """Published: mean over batches of the squared norms; here: their sum over tokens."""
    batches = torch.from_numpy(golden[f"{shape}_inputs"]).split(128)
    norms = norms_of(*batches)
    assert norms.tokens == 512
    expected = torch.from_numpy(golden[f"{shape}_wanda_scaler_row"]) * len(batches)
    assert norms.squares is not None
    torch.testing.assert_close(norms.squares, expected, rtol=1e-5, atol=0)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@settings(deadline=None)
@given(
    shape=shapes,
    share=st.floats(0, 1),
    method=st.sampled_from(sorted(METHODS)),
    levels=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
def test_counts_are_exact_whatever_the_ties(
    shape: tuple[int, int],
    share: float,
    method: str,
    levels: int,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    """Weights of few levels, so that most scores are equal."""
    rows, columns = shape
    torch.manual_seed(rows * columns)
    weight = torch.randint(1, levels + 1, (columns, rows) if transposed else shape).to(dtype)
    weight *= torch.randint(0, 2, weight.shape) * 2 - 1
    view = weight.t() if transposed else weight
    before = view.clone()
    zeros = round(share * rows * columns)
    norms = norms_of(torch.randint(1, 3, (5, columns)).float())
    assert prune_in_place(view, norms, method=method, zeros=zeros)
    gone = view == 0
    assert int(gone.sum()) == zeros
    assert torch.equal(view[~gone], before[~gone])
    scores = before.float().abs()
    if method == "wanda":
        assert norms.squares is not None
        scores = scores * norms.squares.sqrt()
        per_row = gone.sum(1)
        assert int(per_row.max() - per_row.min()) <= 1
        for row, mask in zip(scores, gone, strict=True):
            assert_smallest_first(row, mask)
        if 0 < int((per_row == per_row.max()).sum()) < rows:  # who gives one more
            fuller = per_row == per_row.max()
            given = torch.stack(
                [
                    row[mask].max()
                    for row, mask in zip(scores, gone, strict=True)
                    if mask.sum() == per_row.max()
                ]
            )
            spared = torch.stack(
                [row[~mask].min() for row, mask in zip(scores[~fuller], gone[~fuller], strict=True)]
            )
            assert given.max() <= spared.min()
    else:
        assert_smallest_first(scores.flatten(), gone.flatten())


def assert_smallest_first(scores: Tensor, gone: Tensor) -> None:
    """What is pruned is what a stable sort puts first."""
    order = scores.argsort(stable=True)
    expected = torch.zeros_like(gone)
    expected[order[: int(gone.sum())]] = True
    assert torch.equal(gone, expected)


def test_ties_go_to_earlier_columns() -> None:
    weight = torch.ones(2, 6)
    prune_in_place(weight, norms_of(torch.ones(1, 6)), method="wanda", zeros=7)
    assert weight.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    weight = torch.ones(2, 6)
    prune_in_place(weight, ColumnNorms(), method="magnitude", zeros=7)
    assert weight.tolist() == [[0] * 6, [0, 1, 1, 1, 1, 1]]


def test_zeros_already_there_are_counted() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 1.0], [5.0, 0.0, 2.0, 4.0]])
    prune_in_place(weight, norms_of(torch.ones(1, 4)), method="wanda", zeros=4)
    assert weight.tolist() == [[0, 3, 0, 1], [5, 0, 0, 4]]


def test_wanda_weighs_by_the_norm_of_the_input() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    inputs = torch.tensor([[9.0, 1.0, 1.0], [9.0, 1.0, 1.0]])
    assert prune_weight(weight, inputs, method="wanda", rate=0.34).tolist() == [[1, 0, 3]]
    assert prune_weight(weight, inputs, method="magnitude", rate=0.32).tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("rate", [0.0, 0.1, 1 / 3, 0.999])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_published_counts_at_any_rate(method: str, rate: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 10)
    pruned = prune_weight(weight, torch.randn(20, 10), method=method, rate=rate)
    counts = {"wanda": 7 * int(10 * rate), "magnitude": int(70 * rate) + 1}
    assert int((pruned == 0).sum()) == counts[method]


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=rf"rate={rate:g} is not in \[0, 1\)"):
        prune_weight(torch.ones(2, 2), torch.ones(1, 2), rate=rate)


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown prune\.method='wnada': did you mean 'wanda'"):
        method_named("wnada")


def test_norms_do_not_depend_on_how_tokens_are_cut() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(24, 5, dtype=torch.float64).float()
    whole = norms_of(inputs)
    parts = norms_of(inputs[:7], inputs[7:7], inputs[7:8])
    rest = norms_of(inputs[8:])
    parts.merge(ColumnNorms())
    parts.merge(rest)
    assert parts.tokens == whole.tokens == 24
    assert parts.squares is not None
    assert whole.squares is not None
    torch.testing.assert_close(parts.squares, whole.squares)
    torch.testing.assert_close(whole.squares, inputs.square().sum(0))


def test_norms_of_half_precision_do_not_overflow() -> None:
    norms = norms_of(torch.full((4, 2), 60000.0, dtype=torch.float16))
    assert norms.squares is not None
    assert norms.squares.tolist() == pytest.approx([4 * 60000.0**2] * 2, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_what_saw_no_token_falls_back_to_magnitude(method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    expected = weight.clone()
    prune_in_place(expected, ColumnNorms(), method="magnitude", zeros=11)
    measured = prune_in_place(weight, norms_of(torch.empty(0, 6)), method=method, zeros=11)
    assert measured == (method == "magnitude")
    assert torch.equal(weight, expected)
