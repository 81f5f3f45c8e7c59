"""Whole units of a matrix: which of its groups of columns go, and how the others make up for them.

    new, gone = remove_units(weight, inputs, obs_units, count=1536, goes=307)

Columns j of the same unit go together in all rows (a channel, or the heads of a group), so what is
left has a closed form: the least squares over the inputs that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.methods import Choose
from tasks.pruning.inputs import InputStatistics, hessian

_ROUNDS = 16  # in which obs_units takes its units; after each one, what it did is made up for


def remove_units(
    weight: Tensor, inputs: InputStatistics, choose: Choose, count: int, goes: int
) -> tuple[Tensor, Tensor]:
    """The new weights, and the mask of the `goes` of `count` units that went.

    weight: out x in, float32. Where inputs were seen, W' = W H_:K H_KK^-1 on the columns K that
    stay, H the damped Hessian: of all weights on these columns, those that keep X W nearest.
    """
    gone = choose(weight, inputs, count, goes)
    columns = gone.repeat_interleave(weight.shape[1] // count)
    new = weight.clone()
    new[:, columns] = 0
    if goes and inputs.tokens:
        H = inputs.derived(hessian).matrix
        factor = torch.linalg.cholesky(H[~columns][:, ~columns])
        target = H[~columns][:, columns] @ weight[:, columns].T
        new[:, ~columns] += torch.cholesky_solve(target, factor).T
    return new, gone


def smallest_units(scores: Tensor, count: int, goes: int) -> Tensor:
    """Mask of the units whose columns score least together. scores: in, one per column."""
    gone = torch.zeros(count, dtype=torch.bool, device=scores.device)
    order = scores.reshape(count, -1).sum(1).argsort(stable=True)
    gone[order[:goes]] = True
    return gone


def magnitude_units(weight: Tensor, inputs: InputStatistics, count: int, goes: int) -> Tensor:
    """Those of the smallest weights: sum of W^2."""
    return smallest_units(weight.square().sum(0), count, goes)


def wanda_units(weight: Tensor, inputs: InputStatistics, count: int, goes: int) -> Tensor:
    """Those of the smallest weights times inputs: sum of W^2 ||x||^2, Wanda's score squared."""
    return smallest_units(weight.square().sum(0) * inputs.squares, count, goes)


def taylor_units(weight: Tensor, inputs: InputStatistics, count: int, goes: int) -> Tensor:
    """Those whose weights move the loss least: sum of (W dL/dW)^2, over windows as well (Molchanov
    et al., CVPR 2019, equation 8)."""
    assert inputs.gradient is not None, "needs a gradient"
    return smallest_units((weight * inputs.gradient).square().sum(0), count, goes)


def obs_units(weight: Tensor, inputs: InputStatistics, count: int, goes: int) -> Tensor:
    """Those that the rest can best make up for, taken in rounds.

    Without unit u the output error grows by the trace of W_u (H^-1_uu)^-1 W_u^T once the rest is
    solved for (the optimal brain surgeon for groups: Kurtic et al., ZipLM, NeurIPS 2023). A round
    takes the smallest, changes W and H^-1 to what they are without these, and looks again. What
    only sees zeros costs nothing.
    """
    found = inputs.derived(hessian)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(found.matrix))
    left = weight.masked_fill(found.dead, 0)
    width = weight.shape[1] // count
    gone = torch.zeros(count, dtype=torch.bool, device=weight.device)
    step = max(1, -(-goes // _ROUNDS))
    while int(gone.sum()) < goes:
        scores = _errors(left, inverse, width).masked_fill_(gone, torch.inf)
        taken = scores.argsort(stable=True)[: min(step, goes - int(gone.sum()))]
        gone[taken] = True
        columns = torch.zeros_like(gone)
        columns[taken] = True
        places = columns.repeat_interleave(width).nonzero().flatten()
        factor = torch.linalg.cholesky(inverse[places][:, places])
        ratio = torch.cholesky_solve(inverse[places], factor)
        left -= left[:, places] @ ratio
        inverse -= inverse[:, places] @ ratio
        inverse[places] = 0
        inverse[:, places] = 0
        inverse.diagonal()[places] = 1
        left[:, places] = 0
    return gone


def _errors(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """What the removal of each unit alone adds: units."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    parts = weight.reshape(-1, units, width).permute(1, 2, 0)  # units x width x out
    blocks = torch.stack(
        [inverse[i : i + width, i : i + width] for i in range(0, units * width, width)]
    )
    half: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), parts, upper=False)
    return half.square_().sum((1, 2))
