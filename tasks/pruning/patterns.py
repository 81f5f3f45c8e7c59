"""Patterns of zeros: which of a matrix's scores are the small ones that go.

    Budget(zeros=600).of_rows(scores)                       # spread evenly over the rows
    Budget.in_groups((2, 4), scores.shape).of_rows(scores)  # 2 of every 4 along the input

Masks are True where a weight goes, and their counts are exact: equal scores go in the order of
their index, so that all devices agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from infra.bits import GROUP
from infra.errors import UserError
from infra.records import MatrixRecord

if TYPE_CHECKING:
    from tasks.pruning.grids import Grid

UNSTRUCTURED = "unstructured"
STRUCTURED = "structured"  # whole channels and heads: tasks/structure.py, modalities/smaller.py
_FAR = 1e-3  # how far a mean of N per block may be from the sparsity
_MOST_SUMS = 4_000  # that mixed_groups tells apart


@dataclass(frozen=True)
class Budget:
    """How many weights of one matrix go; `group` = (N, M) keeps N of every M along the input.
    `grid` has the values that the others may have."""

    zeros: int
    group: tuple[int, int] | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.grid and self.group and GROUP % self.group[1]:
            raise UserError(
                f"groups of {self.group[1]} do not divide the {GROUP} weights that share a scale: "
                "leave prune.bits out, or use groups of 2, 4, 8, 16, 32, 64 or 128"
            )

    @classmethod
    def in_groups(cls, group: tuple[int, int], shape: Sequence[int], name: str = "") -> Budget:
        """The budget of an N:M pattern. Raises UserError where M does not divide the inputs."""
        kept, size = group
        if shape[1] % size:
            raise UserError(
                f"{name or 'the weight'} has {shape[1]} inputs, which groups of {size} do not "
                "divide: use prune.pattern=unstructured, or groups of another size"
            )
        return cls(shape[0] * shape[1] // size * (size - kept), group)

    def of_matrix(self, scores: Tensor) -> Tensor:
        """Mask of the smallest scores of the whole matrix, or of every group. scores: out x in."""
        if self.group:
            return smallest_per_group(scores, *self.group)
        return smallest_per_row(scores.reshape(1, -1), self.zeros).reshape(scores.shape)

    def of_rows(self, scores: Tensor) -> Tensor:
        """Mask of the smallest scores of every row, or of every group. scores: out x in."""
        if self.group:
            return smallest_per_group(scores, *self.group)
        return smallest_per_row(scores, self.zeros)


def smallest_per_group(scores: Tensor, kept: int, size: int) -> Tensor:
    """Mask of all but the `kept` largest of every `size` neighbours of a row."""
    groups = scores.reshape(-1, size)
    return smallest_per_row(groups, (size - kept) * groups.shape[0]).reshape(scores.shape)


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


def smallest_places(scores: Tensor, count: int) -> Tensor:
    """Columns of each row's `count` smallest scores, the smallest first: rows x count."""
    rows = scores.shape[0]
    places = smallest_per_row(scores, count * rows).nonzero()[:, 1].reshape(rows, count)
    return places.gather(1, scores.gather(1, places).argsort(dim=1, stable=True))


def _order_statistics(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest of each row and the one after it; -1 and infinity where there is none."""
    rows, columns = scores.shape
    nothing = scores.new_full((rows,), -1.0)
    infinity = scores.new_full((rows,), torch.inf)
    on_cpu = scores.device.type == "cpu"
    if on_cpu or rows == 1:
        # numpy's partition is five times as fast as kthvalue, which on a GPU leaves a row to one
        # block of threads.
        parts = (
            torch.from_numpy(np.partition(scores.numpy(), min(k, columns - 1), axis=1))
            if on_cpu
            else scores.sort(dim=1).values
        )
        last = parts[:, :k].amax(1) if k > 0 else nothing
        return last, parts[:, k].clone() if k < columns else infinity
    last = scores.kthvalue(k, dim=1).values if k > 0 else nothing
    return last, scores.kthvalue(k + 1, dim=1).values if k < columns else infinity


def budgets(
    pattern: str, matrices: Sequence[MatrixRecord], shapes: Sequence[Sequence[int]]
) -> list[Budget]:
    """What goes of each matrix, whose records hold the rates and zeros of an allocation.

    Raises UserError where a pattern does not fit a shape, or fixes another rate than was asked.
    """
    found = parse_pattern(pattern)
    if found is None or not any(matrix.zeros for matrix in matrices):
        return [Budget(matrix.zeros) for matrix in matrices]
    kept, size = found
    blocks = range(max(matrix.block for matrix in matrices) + 1)
    if kept is None:
        params = [sum(m.params for m in matrices if m.block == b) for b in blocks]
        zeros = [sum(m.params * m.rate for m in matrices if m.block == b) for b in blocks]
        rates = [z / max(1, p) for z, p in zip(zeros, params, strict=True)]
        groups = mixed_groups(rates, params, size)
    else:
        fixed = 1 - kept / size
        if wrong := [m for m in matrices if abs(m.rate - fixed) > 1e-6]:
            raise UserError(
                f"prune.pattern={pattern} makes {fixed:g} of every matrix zero, not "
                f"{wrong[0].rate:g}: set prune.sparsity={fixed:g} and prune.allocation=uniform"
            )
        groups = [kept for _ in blocks]
    chosen = [
        Budget.in_groups((groups[m.block], size), shape, f"{m.matrix} of block {m.block}")
        for m, shape in zip(matrices, shapes, strict=True)
    ]
    _refuse_far(pattern, matrices, chosen, size)
    return chosen


def _refuse_far(
    pattern: str, matrices: Sequence[MatrixRecord], chosen: Sequence[Budget], size: int
) -> None:
    """Raise UserError where one N per block has another mean than the sparsity.

    Only multiples of 1 / M let uniform be uniform, so that a line has as many zeros as it; blocks
    of very different sizes may miss even those.
    """
    total = sum(m.params for m in matrices)
    asked = sum(m.rate * m.params for m in matrices) / total
    found = sum(budget.zeros for budget in chosen) / total
    if abs(asked * size - round(asked * size)) > _FAR:
        raise UserError(
            f"prune.pattern={pattern} removes multiples of 1/{size}, not {asked:.4g}: set "
            f"prune.sparsity={min(max(1, round(asked * size)), size - 1) / size:g}"
        )
    if abs(found - asked) > _FAR:
        raise UserError(
            f"prune.pattern={pattern} removes {found:.4g} of these blocks at the nearest, not "
            f"{asked:.4g}: choose rates nearer to one another, or larger groups"
        )


def settled(matrix: MatrixRecord, budget: Budget) -> MatrixRecord:
    """The record with the rate that its pattern really has."""
    if budget.group is None:
        return matrix
    kept, size = budget.group
    return matrix.model_copy(update={"rate": 1 - kept / size, "zeros": budget.zeros})


def parse_pattern(pattern: str) -> tuple[int | None, int] | None:
    """(N, M) of "N:M"; (None, M) of "N:8", one N per block; None of the others."""
    if pattern in (UNSTRUCTURED, STRUCTURED):
        return None
    found = re.fullmatch(r"(\d+|N):(\d+)", pattern)
    if (
        found is None
        or int(found[2]) < 2
        or not 0 < int(found[1].replace("N", "1")) < int(found[2])
    ):
        raise UserError(
            f"prune.pattern={pattern!r} is none: unstructured, N:M such as 2:4, or N:8 for one N "
            "per block"
        )
    return None if found[1] == "N" else int(found[1]), int(found[2])


def mixed_groups(rates: Sequence[float], params: Sequence[int], size: int) -> list[int]:
    """How many of every `size` weights each block keeps, by the rates of an allocation.

    rates, params: one per block. Each rate is rounded down or up to a multiple of 1 / size below
    one, such that the parameter-weighted mean comes as near to that of `rates` as these choices
    allow; among those, such that the mean up to any block is near as well: equal rates stay level.
    """
    wanted = sum(rate * count for rate, count in zip(rates, params, strict=True)) * size
    sums: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    so_far, scale = 0.0, max(params)
    for rate, count in zip(rates, params, strict=True):
        exact = min(rate * size, size - 1.0)
        so_far += count * exact
        choices = {int(exact + 1e-9), int(np.ceil(exact - 1e-9))}
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, (moved, chosen) in sums.items():
            for zeros in sorted(choices):
                key = total + count * zeros
                step = (round(moved + ((key - so_far) / scale) ** 2, 9), (*chosen, zeros))
                if key not in reached or step < reached[key]:
                    reached[key] = step
        if len(reached) > _MOST_SUMS:  # blocks of many sizes: keep those that stay level
            reached = dict(sorted(reached.items(), key=lambda item: item[1])[:_MOST_SUMS])
        sums = reached
    best = min(sums, key=lambda total: (round(abs(total - wanted), 3), sums[total]))
    return [size - zeros for zeros in sums[best][1]]
