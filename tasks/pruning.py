"""Pruning methods: which weights of one matrix become zero.

    new = prune_weight(weight, inputs, method="wanda", rate=0.7)

`weight` is out x in, `inputs` tokens x in. A method is one function from a weight, what was
measured of its inputs, and a number of zeros, to the weights that go; adding one is that function
plus a line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError, nearest


class ColumnNorms:
    """Sum of squares of each input column, over all the tokens it was given."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, tokens x in."""
        if inputs.shape[0] == 0:
            return
        squares = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_()
        self.squares = squares if self.squares is None else self.squares + squares
        self.tokens += inputs.shape[0]

    def merge(self, other: ColumnNorms) -> None:
        """Take in what another one has seen."""
        if other.squares is not None:
            self.squares = other.squares if self.squares is None else self.squares + other.squares
            self.tokens += other.tokens


def magnitude_mask(weight: Tensor, norms: ColumnNorms, zeros: int) -> Tensor:
    """The `zeros` smallest abs(W) of the whole matrix; ties in the order they are stored."""
    scores = weight.abs().reshape(1, -1)
    return smallest(scores, torch.tensor([zeros], device=weight.device)).reshape(weight.shape)


def wanda_mask(weight: Tensor, norms: ColumnNorms, zeros: int) -> Tensor:
    """The smallest abs(W) * ||X_column|| of every output row (Wanda, arXiv 2306.11695, eq. 1).

    Every row loses zeros // rows weights; the rest goes to the rows whose next score is smallest.
    """
    assert norms.squares is not None
    scores = weight.abs().float() * norms.squares.sqrt()
    rows = weight.shape[0]
    each, rest = divmod(zeros, rows)
    counts = torch.full((rows,), each, device=weight.device)
    if rest:
        following = kth_smallest(scores, each)
        counts[following.argsort(stable=True)[:rest]] += 1
    return smallest(scores, counts)


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Value at 0-based index k of each row in ascending order. scores: rows x columns."""
    if scores.device.type == "cpu":  # numpy's partition is five times faster than kthvalue
        return torch.from_numpy(np.partition(scores.float().numpy(), k, axis=1)[:, k].copy())
    return scores.float().kthvalue(k + 1, dim=1).values


def smallest(scores: Tensor, counts: Tensor) -> Tensor:
    """Mask of the counts[r] smallest scores of each row r; ties go to earlier columns.

    scores: rows x columns; counts: rows, of at most two neighbouring values.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for count in counts.unique().tolist():
        chosen = (counts == count).nonzero().squeeze(1)
        if count == 0:
            continue
        part = scores[chosen].float()
        threshold = kth_smallest(part, count - 1)[:, None]
        below = part <= threshold
        over = (below.sum(1) > count).nonzero().squeeze(1)
        if len(over):  # ties at the threshold
            strictly = part[over] < threshold[over]
            ties = part[over] == threshold[over]
            room = count - strictly.sum(1, keepdim=True)
            below[over] = strictly | (ties & (ties.cumsum(1) <= room))
        mask[chosen] = below
    return mask


@dataclass(frozen=True)
class Method:
    """`mask` gives the weights to remove; `needs_inputs` says whether it looks at ColumnNorms;
    `published_zeros` is the count that the published rule gives for (out, in, rate)."""

    mask: Callable[[Tensor, ColumnNorms, int], Tensor]
    needs_inputs: bool
    published_zeros: Callable[[int, int, float], int]


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude_mask, False, lambda out, in_, s: min(int(out * in_ * s) + 1, out * in_)),
    "wanda": Method(wanda_mask, True, lambda out, in_, s: out * int(in_ * s)),
}


def method_named(name: str) -> Method:
    """Look a method up; raises UserError with the nearest known name."""
    if name not in METHODS:
        raise UserError(f"unknown prune.method={name!r}: {nearest(name, METHODS)}")
    return METHODS[name]


def prune_weight(
    weight: Tensor, inputs: Tensor, *, method: str = "wanda", rate: float
) -> Tensor:
    """A pruned copy of one matrix, by the published rule for how many weights go.

    weight: out x in. inputs: tokens x in. rate: share of zeros in [0, 1).
    """
    if not 0 <= rate < 1:
        raise UserError(f"rate={rate:g} is not in [0, 1)")
    chosen = method_named(method)
    norms = ColumnNorms()
    norms.add(inputs)
    zeros = chosen.published_zeros(weight.shape[0], weight.shape[1], rate)
    return weight.masked_fill(chosen.mask(weight, norms, zeros), 0)


def prune_in_place(weight: Tensor, norms: ColumnNorms, *, method: str, zeros: int) -> bool:
    """Set exactly `zeros` weights of a matrix to zero. weight: out x in, a view into the model.

    Returns False where the method needs inputs and saw none, so that magnitude was used instead:
    an expert that no calibration token reached.
    """
    chosen = method_named(method)
    measured = not chosen.needs_inputs or norms.tokens > 0
    mask = (chosen if measured else METHODS["magnitude"]).mask(weight, norms, zeros)
    weight.masked_fill_(mask, 0)
    return measured
