"""Methods that score every weight and remove the smallest: magnitude, Wanda, Taylor, Pruner-Zero.

mask = wanda(weight, inputs, Budget(zeros=600))
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget


def magnitude(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """The smallest abs(W) of the whole matrix."""
    return budget.of_matrix(weight.abs())


def wanda(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """The smallest abs(W) * ||X_column|| of every output row (Wanda, arXiv 2306.11695, eq. 1)."""
    return budget.of_rows(weight.abs().mul_(inputs.squares.sqrt()))


def taylor(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """The smallest abs(W * G) of the whole matrix, G the root of the summed squared gradients of
    the dense model's loss: its square sums over windows what the loss changes by without a weight,
    to first order and squared (Molchanov et al., CVPR 2019)."""
    assert inputs.gradient is not None
    return budget.of_matrix((weight * inputs.gradient).abs_())


def pruner_zero(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """The smallest W^2 * minmax(abs(G)) of every output row (Pruner-Zero, arXiv 2406.02924).

    G is the gradient of the dense model's loss; minmax maps the matrix's range to [0, 1].
    """
    assert inputs.gradient is not None
    size = inputs.gradient.float().abs()
    low, high = size.aminmax()
    size = size.sub(low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return budget.of_rows(size.mul_(weight).mul_(weight))
