"""ALPS: the pattern by ADMM, then the weights on it by conjugate gradients.

new = alps(weight, inputs, Budget(zeros=600))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks.pruning.inputs import InputStatistics, hessian
from tasks.pruning.patterns import Budget
from tasks.pruning.sparsegpt import sparsegpt

_STEPS = 300
_CHECK = 3  # steps between looks at the pattern
_POLISH = 10  # steps of conjugate gradients


def alps(weight: Tensor, inputs: InputStatistics, budget: Budget) -> Tensor:
    """The pattern and the weights that keep X W near (ALPS, arXiv 2406.07831, algorithm 1).

    The inputs are scaled to a Hessian H of unit diagonal. Per step, with the scaled dual U:
    B = (H + rho)^-1 (H B_0 + rho (D - U)), D = the largest of B + U, U = the rest of it. rho grows
    the faster the more the pattern still moves; once it stands still, D is solved for on it. So
    are SparseGPT's weights on theirs, and the pattern that loses less is taken: inputs of very
    different size can mislead ADMM.
    """
    found = inputs.derived(hessian)
    scale = found.matrix.diagonal().sqrt()
    H = found.matrix / scale / scale[:, None]
    start = (weight * scale).masked_fill_(found.dead, 0)
    target = start @ H
    mask = budget.of_matrix(start.abs())
    moving, dual = start.masked_fill(mask, 0), torch.zeros_like(start)
    rho, checked = 0.1, mask
    inverse = _inverse(H, rho)
    kept = max(1, mask.numel() - int(mask.sum()))
    for step in range(1, _STEPS + 1):
        dual += target.add(moving - dual, alpha=rho) @ inverse
        mask = budget.of_matrix(dual.abs())
        moving = dual.masked_fill(mask, 0)
        dual.masked_fill_(~mask, 0)
        if step % _CHECK == 0:
            changed = int((mask & ~checked).sum()) / kept
            if not changed:
                break
            growth = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            rho, checked = rho * growth, mask
            dual /= growth
            inverse = _inverse(H, rho)
    # The damping helps to find a pattern; what is lost is measured without it.
    plain = inputs.gram * (2 / inputs.tokens) / scale / scale[:, None]
    goal, best = start @ plain, (math.inf, start, mask)
    second = sparsegpt(weight, inputs, budget) * scale
    for given, gone in ((moving, mask), (second, second == 0)):
        new = _polished(plain, goal, given, ~gone)
        lost = float(((new - start) @ plain).mul_(new - start).sum())
        best = min(best, (lost, new, gone), key=lambda each: each[0])
    _, new, mask = best
    # A dead input's weights have no error to lower: those that stay keep their values.
    return torch.where(found.dead & ~mask, weight, new / scale)


def _inverse(H: Tensor, rho: float) -> Tensor:
    damped = H.clone()
    damped.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _polished(H: Tensor, target: Tensor, found: Tensor, kept: Tensor) -> Tensor:
    """Conjugate gradients for found @ H = target, each row on the weights that it keeps."""
    residual = (target - found @ H).mul_(kept)
    direction, size = residual, residual.square().sum(1)
    for _ in range(_POLISH):
        image = (direction @ H).mul_(kept)
        curvature = (direction * image).sum(1)
        length = torch.where(curvature > 0, size / curvature, 0)[:, None]
        found = found + length * direction
        residual = residual - length * image
        before, size = size, residual.square().sum(1)
        direction = residual + torch.where(before > 0, size / before, 0)[:, None] * direction
    return found
