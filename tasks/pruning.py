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
    return smallest_per_row(weight.float().abs().reshape(1, -1), zeros).reshape(weight.shape)


def wanda_mask(weight: Tensor, norms: ColumnNorms, zeros: int) -> Tensor:
    """The smallest abs(W) * ||X_column|| of every output row (Wanda, arXiv 2306.11695, eq. 1)."""
    assert norms.squares is not None
    return smallest_per_row(weight.float().abs().mul_(norms.squares.sqrt()), zeros)


def smallest_per_row(scores: Tensor, zeros: int) -> Tensor:
    """Mask of exactly `zeros` small scores, spread evenly over the rows. scores: rows x columns.

    Every row gives its zeros // rows smallest, the earlier column where two are equal; the rest
    come from the rows whose next score is smallest.
    """
    rows = scores.shape[0]
    each, rest = divmod(zeros, rows)
    last, following = _order_statistics(scores, each)
    if rest:
        chosen = following.argsort(stable=True)[:rest]
        last[chosen] = following[chosen]
    mask = scores <= last[:, None]
    if int(mask.sum()) != zeros:  # equal scores at a threshold
        counts = torch.full((rows,), each, device=scores.device)
        if rest:
            counts[chosen] += 1
        strictly = scores < last[:, None]
        room = counts - strictly.sum(1)
        ties = mask & ~strictly
        mask = strictly | (ties & (ties.cumsum(1) <= room[:, None]))
    return mask


def _order_statistics(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest of each row and the one after it; -1 and infinity where there is none."""
    rows, columns = scores.shape
    nothing = scores.new_full((rows,), -1.0)
    infinity = scores.new_full((rows,), torch.inf)
    if scores.device.type == "cpu":  # numpy's partition is five times as fast as kthvalue
        parts = torch.from_numpy(np.partition(scores.numpy(), min(k, columns - 1), axis=1))
        last = parts[:, :k].amax(1) if k > 0 else nothing
        return last, parts[:, k].clone() if k < columns else infinity
    last = scores.kthvalue(k, dim=1).values if k > 0 else nothing
    return last, scores.kthvalue(k + 1, dim=1).values if k < columns else infinity


@dataclass(frozen=True)
class Method:
    """`mask` gives the weights to remove; `needs_inputs` says whether it looks at ColumnNorms;
    `published_zeros` is the count that the published rule gives for (out, in, rate)."""

    mask: Callable[[Tensor, ColumnNorms, int], Tensor]
    needs_inputs: bool
    published_zeros: Callable[[int, int, float], int]


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude_mask, False, lambda out, in_, s: int(out * in_ * s) + 1),
    "wanda": Method(wanda_mask, True, lambda out, in_, s: out * int(in_ * s)),
}


def method_named(name: str) -> Method:
    """Look a method up; raises UserError with the nearest known name."""
    if name not in METHODS:
        raise UserError(f"unknown prune.method={name!r}: {nearest(name, METHODS)}")
    return METHODS[name]


def prune_weight(weight: Tensor, inputs: Tensor, *, method: str = "wanda", rate: float) -> Tensor:
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
