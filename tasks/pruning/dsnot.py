"""DSnoT: start from Wanda's mask and swap weights until each row's expected error is small.

mask = dsnot(weight, inputs, Budget(zeros=600))
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget, smallest_places
from tasks.pruning.scores import wanda

_SWAPS = 50  # of a row, at most
_SMALL = 0.1  # expected error at which a row is left alone


def dsnot(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """Wanda's mask, with the swaps of DSnoT (arXiv 2310.08915, section 3).

    A row's expected error is the sum of W_rj * mean(x_j) over what is pruned. The pruned weight
    whose share of it, over the variance of its input, is largest comes back; in its place goes the
    kept weight of the smallest Wanda score that lowers the error too, from the same group where
    there are groups. A swap that does not bring the error nearer to zero is the row's end.
    """
    mask = wanda(weight, inputs, budget)
    rows, columns = weight.shape
    size = budget.group[1] if budget.group else columns
    share = weight * inputs.mean
    error = expected_error(weight, inputs, mask)
    toward = share * error.sign()[:, None]  # positive: pruned weights that made the error
    # The sign of a row's error never changes before its last swap, so no weight moves twice and
    # the swaps of a group are its best to regrow with its best to prune, one after another.
    back = -toward / inputs.variance.clamp(min=torch.finfo(torch.float32).tiny)
    back = back.masked_fill_(~mask | (toward <= 0), torch.inf).reshape(-1, size)
    gone = weight.abs().mul_(inputs.squares.sqrt())
    gone = gone.masked_fill_(mask | (toward >= 0), torch.inf).reshape(-1, size)
    count = min(_SWAPS, size)
    regrown, pruned = smallest_places(back, count), smallest_places(gone, count)
    order = back.gather(1, regrown).masked_fill_(gone.gather(1, pruned).isinf(), torch.inf)
    start = torch.arange(0, columns, size, device=weight.device).repeat(rows)[:, None]
    order, regrown, pruned = (x.reshape(rows, -1) for x in (order, regrown + start, pruned + start))
    chosen = smallest_places(order, min(_SWAPS, order.shape[1]))
    regrown, pruned = regrown.gather(1, chosen), pruned.gather(1, chosen)
    steps = toward.gather(1, regrown) - toward.gather(1, pruned)
    after = error.abs()[:, None] - steps.cumsum(1)
    before = torch.cat([error.abs()[:, None], after[:, :-1]], dim=1)
    large = before >= _SMALL
    large[:, 0] = True  # as published, the error is looked at after a swap
    good = order.gather(1, chosen).isfinite() & large & (after.abs() < before)
    good = good.cumprod(1).bool()
    row = torch.arange(rows, device=weight.device)[:, None].expand_as(good)[good]
    mask[row, regrown[good]] = False
    mask[row, pruned[good]] = True
    return mask


def expected_error(weight: Tensor, inputs: InputStatistics, mask: Tensor) -> Tensor:
    """By how much each row's mean output falls without its pruned weights."""
    return (weight * inputs.mean).masked_fill_(~mask, 0).sum(1)
