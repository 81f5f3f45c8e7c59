"""SparseGPT and GPTQ: change column by column, and let the columns to the right make up for it.

new = sparsegpt(weight, inputs, Budget(zeros=600))
new = sparsegpt(weight, inputs, Budget(zeros=0, grid=grid))  # GPTQ; with zeros, both in one pass
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.methods import PANEL
from tasks.pruning.inputs import InputStatistics, hessian
from tasks.pruning.patterns import Budget, smallest_per_group, smallest_per_row

_NARROW = 16  # columns that are updated one by one; the others wait for a matrix product


def sparsegpt(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """The weights that are left, changed so that X W stays near (SparseGPT, arXiv 2301.00774).

    With U the upper Cholesky factor of the inverse Hessian, the smallest w^2 / U_jj^2 of a panel
    go, or those of an N:M group when its first column is reached; what column j loses, divided by
    U_jj and times row j of U, is taken from the columns to its right. A dead input's weights go
    first; those that stay keep their values.

    With a grid, what stays of a column is rounded when it is reached, and its error is made up for
    in the same way (GPTQ, arXiv 2210.17323, algorithm 1). A panel is a group of the grid, whose
    scales are chosen when it begins.
    """
    found = inputs.derived(hessian)
    factor = inputs.derived(inverse_factor)
    scale, dead = factor.diagonal(), found.dead
    columns = weight.t().contiguous().clone()  # in x out: a column of W is one stretch of memory
    total = columns.shape[0]
    size = budget.group[1] if budget.group else 1
    width = max(1, PANEL // size) * size
    narrow = max(1, _NARROW // size) * size
    removed, grid = 0, budget.grid

    def scores(first: int, last: int) -> Tensor:
        """Of the columns from first to last: out x columns."""
        squares = (columns[first:last] / scale[first:last, None]).square_()
        return squares.masked_fill_(dead[first:last, None], 0).t()

    for start in range(0, total, width):
        stop = min(start + width, total)
        mask = torch.zeros_like(columns[start:stop], dtype=torch.bool)
        lost = torch.empty_like(columns[start:stop])
        if budget.group is None:
            wanted = round(budget.zeros * stop / total) - removed
            removed += wanted
            flat = scores(start, stop).reshape(1, -1)
            mask = smallest_per_row(flat, wanted).reshape(-1, stop - start).t().contiguous()
        if grid:
            grid.fit(start, columns[start:stop].masked_fill(mask, 0))
        for left in range(start, stop, narrow):
            right = min(left + narrow, stop)
            for j in range(left, right):
                if budget.group and j % size == 0:
                    group = smallest_per_group(scores(j, j + size), *budget.group)
                    mask[j - start : j - start + size] = group.t()
                kept = grid.rounded(j, columns[j]) if grid else columns[j]
                new = kept.masked_fill(mask[j - start], 0)
                error = (columns[j] - new).div_(scale[j])
                lost[j - start] = error
                columns[j] = new
                if j + 1 < right:
                    columns[j + 1 : right].addr_(factor[j, j + 1 : right], error, alpha=-1)
            if right < stop:
                step = lost[left - start : right - start]
                columns[right:stop].addmm_(factor[left:right, right:stop].t(), step, alpha=-1)
        if stop < total:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), lost, alpha=-1)
    return columns.t()


def inverse_factor(inputs: InputStatistics) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the Hessian.

    With J the reversal of the order and L L^T = J H J, U = J L^-1 J: no inverse of H is formed.
    """
    lower = inputs.derived(hessian).reversed_factor
    identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)
