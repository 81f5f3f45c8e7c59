"""Which weights go by score: exact in number, the same for every tie, refused where it must be.

python -m pytest tests/tasks/test_pruning.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.bits import ROUNDING
from infra.errors import UserError
from tasks.pruning import METHODS, method_named, prune_in_place, prune_weight
from tasks.pruning.patterns import Budget
from tests.tasks.layers import measured

shapes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@settings(deadline=None)
@given(
    shape=shapes,
    share=st.floats(0, 1),
    method=st.sampled_from(["magnitude", "wanda"]),
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
    norms = measured("wanda", torch.randint(1, 3, (5, columns)).float())
    assert prune_in_place(view, norms, method=method, budget=Budget(zeros))
    gone = view == 0
    assert int(gone.sum()) == zeros
    assert torch.equal(view[~gone], before[~gone])
    scores = before.float().abs()
    if method == "wanda":
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
    prune_in_place(weight, measured("wanda", torch.ones(1, 6)), method="wanda", budget=Budget(7))
    assert weight.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    weight = torch.ones(2, 6)
    prune_in_place(weight, measured("magnitude"), method="magnitude", budget=Budget(7))
    assert weight.tolist() == [[0] * 6, [0, 1, 1, 1, 1, 1]]


def test_zeros_already_there_are_counted() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 1.0], [5.0, 0.0, 2.0, 4.0]])
    prune_in_place(weight, measured("wanda", torch.ones(1, 4)), method="wanda", budget=Budget(4))
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
    counts = {"wanda": 7 * int(10 * rate), "magnitude": min(69, int(70 * rate) + bool(rate))}
    assert int((pruned == 0).sum()) == counts[method]


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=rf"rate={rate:g} is not in \[0, 1\)"):
        prune_weight(torch.ones(2, 2), torch.ones(1, 2), rate=rate)


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown prune\.method='wnada': did you mean 'wanda'"):
        method_named("wnada")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs a rate or a pattern"),
        ({"rate": 0.5, "pattern": "2:4"}, "needs a rate or a pattern, and not both"),
        ({"pattern": "4:2"}, r"prune\.pattern='4:2' is none: unstructured, N:M such as 2:4"),
        ({"pattern": "N:8"}, "pattern='N:8' has no numbers"),
        ({"pattern": "2:5"}, "has 8 inputs, which groups of 5 do not divide"),
        ({"rate": 0.5, "method": "pruner-zero"}, "needs a gradient of the weight's shape"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_weight(torch.ones(4, 8), torch.ones(3, 8), **options)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"weight \(4, 8\) and inputs \(3, 7\) do not fit"):
        prune_weight(torch.ones(4, 8), torch.ones(3, 7), rate=0.5)
    with pytest.raises(UserError, match="method='wanda' needs inputs"):
        prune_weight(torch.ones(4, 8), torch.ones(0, 8), rate=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": [[1.0, 2.0]]}, "weight must be a tensor of floats, not list"),
        ({"inputs": None}, "inputs must be a tensor of floats, not NoneType"),
        ({"inputs": torch.ones(3, 8, dtype=torch.int64)}, "tensor of floats, not torch.int64"),
        ({"gradient": 1.0, "method": "pruner-zero"}, "gradient must be a tensor of floats"),
        ({"rate": "0.5"}, "rate must be a number such as 0.7, not '0.5'"),
        ({"rate": True}, "rate must be a number such as 0.7, not True"),
        ({"rate": None, "pattern": (2, 4)}, r"pattern must be a string, not \(2, 4\)"),
        ({"method": 3}, "method must be a string, not 3"),
    ],
)
def test_what_is_of_another_type_is_refused_by_name(
    options: dict[str, object], message: str
) -> None:
    given = {"weight": torch.ones(4, 8), "inputs": torch.ones(3, 8), "rate": 0.5} | options
    with pytest.raises(TypeError, match=f"prune_weight: .*{message}"):
        prune_weight(**given)  # type: ignore[arg-type]


def test_a_weight_that_wants_gradients_is_left_as_it_is() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    before = weight.detach().clone()
    pruned = prune_weight(weight, torch.randn(9, 8), pattern="2:4")
    assert int((pruned == 0).sum()) == 16
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", METHODS)
def test_what_saw_no_token_falls_back_to_magnitude(method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    expected = weight.clone()
    prune_in_place(expected, measured("magnitude"), method="magnitude", budget=Budget(11))
    nothing = measured(method, torch.empty(0, 6), gradient=torch.zeros(4, 6))
    found = prune_in_place(weight, nothing, method=method, budget=Budget(11))
    assert found == (method == "magnitude")
    assert torch.equal(weight, expected)


def asked(method: str) -> dict[str, float]:
    """Half of the weights, or of what only rounds few bits."""
    return {"bits": 3.0} if method in ROUNDING else {"rate": 0.5}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("where", ["weight", "inputs", "overflow"])
def test_what_is_not_finite_is_refused(method: str, where: str) -> None:
    """Nothing is pruned by an order that NaN decides."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 32), torch.randn(64, 32)
    gradient = torch.randn(16, 32)
    if where == "weight":
        weight[3, 7] = float("nan")
    elif where == "inputs":
        inputs[0, 7] = gradient[2, 5] = float("nan")
    else:
        inputs, gradient = inputs * 1e30, gradient * float("inf")
    if method == "magnitude" and where != "weight":
        return  # it looks at no inputs
    with pytest.raises(UserError, match="NaN or infinity"):
        prune_weight(weight, inputs, method=method, gradient=gradient, **asked(method))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_double_precision_is_taken(method: str) -> None:
    torch.manual_seed(0)
    weight, inputs, gradient = (torch.randn(s, 32) for s in (16, 64, 16))
    wide = prune_weight(
        weight.double(), inputs.double(), method=method, gradient=gradient.double(), **asked(method)
    )
    single = prune_weight(weight, inputs, method=method, gradient=gradient, **asked(method))
    assert wide.dtype == torch.float64 and torch.equal(wide == 0, single == 0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", None])
@pytest.mark.parametrize("size", [30.0, 100.0, 300.0])
def test_alps_is_below_sparsegpt_where_some_inputs_are_huge(
    size: float, pattern: str | None
) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        weight, inputs = torch.randn(64, 128), torch.randn(1024, 128)
        inputs[:, :3] *= size
        rate = None if pattern else 0.7
        lost = [
            float((inputs @ (new - weight).T).square().sum())
            for new in (
                prune_weight(weight, inputs, method=name, rate=rate, pattern=pattern)
                for name in ("alps", "sparsegpt")
            )
        ]
        assert lost[0] <= lost[1] * (1 + 1e-5)
