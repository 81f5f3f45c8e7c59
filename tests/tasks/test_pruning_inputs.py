"""What is measured of inputs: the same however tokens are cut, in float32 whatever they are.

python -m pytest tests/tasks/test_pruning_inputs.py
"""

import pytest
import torch
from torch import Tensor

from tasks.pruning.inputs import InputStatistics, hessian

EVERYTHING = ("norms", "moments", "gram")


def statistics(needs: tuple[str, ...], *batches: Tensor) -> InputStatistics:
    made = InputStatistics(needs)
    for batch in batches:
        made.add(batch)
    return made


@pytest.mark.parametrize("needs", [("norms",), ("norms", "moments"), ("gram",), EVERYTHING])
def test_sums_do_not_depend_on_how_tokens_are_cut(needs: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(24, 5, dtype=torch.float64).add(3).float()
    parts = statistics(needs, inputs[:7], inputs[7:7], inputs[7:8])
    parts.merge(InputStatistics(needs))
    rest = statistics(needs, inputs[8:])
    parts.merge(rest)
    first = InputStatistics(needs)
    first.merge(rest)
    first.merge(parts)
    assert rest.tokens == 16  # what was merged is left as it was
    torch.testing.assert_close(rest.squares, inputs[8:].square().sum(0))
    assert parts.tokens == 24
    torch.testing.assert_close(parts.squares, inputs.square().sum(0))
    if "gram" in needs:
        torch.testing.assert_close(parts.gram, inputs.T @ inputs)
    if "moments" in needs:
        torch.testing.assert_close(parts.mean, inputs.mean(0))
        torch.testing.assert_close(parts.variance, inputs.var(0, correction=0))


def test_nothing_is_computed_that_is_not_needed() -> None:
    made = statistics(("norms",), torch.ones(3, 2))
    for unknown in ("gram", "mean", "variance"):
        with pytest.raises(AssertionError, match="needs"):
            getattr(made, unknown)
    assert statistics((), torch.ones(3, 2)).are_finite


@pytest.mark.parametrize("dtype, value", [(torch.float16, 60000.0), (torch.bfloat16, 1e18)])
def test_half_precision_does_not_overflow(dtype: torch.dtype, value: float) -> None:
    made = statistics(EVERYTHING, torch.full((4, 2), value, dtype=dtype))
    assert made.squares.dtype == made.gram.dtype == made.mean.dtype == torch.float32
    assert made.squares.tolist() == pytest.approx([4 * value**2] * 2, rel=1e-2)
    assert made.are_finite


def test_a_variance_far_from_zero_is_exact() -> None:
    """The difference of two large sums would be lost in float32."""
    torch.manual_seed(0)
    inputs = torch.randn(4000, 3) + 1000
    made = statistics(("moments",), *inputs.split(500))
    torch.testing.assert_close(made.variance, inputs.double().var(0, correction=0).float())


@pytest.mark.parametrize("needs", [("norms",), ("moments",), ("gram",)])
def test_inputs_that_are_not_finite_are_seen(needs: tuple[str, ...]) -> None:
    assert not statistics(needs, torch.tensor([[1.0, float("nan")]])).are_finite
    assert not statistics(needs, torch.tensor([[1.0, float("inf")]])).are_finite


def test_what_is_derived_is_computed_once_and_anew_for_new_tokens() -> None:
    made = statistics(("gram",), torch.randn(9, 4))
    assert made.derived(hessian) is made.derived(hessian)
    before = made.derived(hessian)
    made.add(torch.randn(9, 4))
    assert made.derived(hessian) is not before


def test_the_hessian_is_damped_and_dead_inputs_are_one() -> None:
    inputs = torch.randn(30, 4)
    inputs[:, 2] = 0
    made = statistics(("gram",), inputs)
    found = made.derived(hessian)
    plain = 2 / 30 * inputs.T @ inputs
    plain[2, 2] = 1
    expected = plain + 0.01 * plain.diagonal().mean() * torch.eye(4)
    torch.testing.assert_close(found.matrix, expected)
    assert found.dead.tolist() == [False, False, True, False]
    lower = found.reversed_factor
    torch.testing.assert_close((lower @ lower.T).flip(0, 1), expected)
    assert made.note == ""


def test_a_hessian_that_is_not_positive_is_damped_more_and_noted() -> None:
    made = statistics(("gram",), torch.eye(4))
    made._gram = torch.ones(4, 4) * 2 - torch.eye(4)  # eigenvalues -1 and 7
    found = made.derived(hessian)
    assert bool((torch.linalg.eigvalsh(found.matrix) > 0).all())
    assert made.note == "Hessian not positive definite: damped by 10 of its mean diagonal"


def test_a_hessian_of_nan_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="the Hessian holds NaN"):
        statistics(("gram",), torch.full((2, 3), float("nan"))).derived(hessian)
