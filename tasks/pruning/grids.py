"""Weights of few bits: whole numbers times a scale, which 128 neighbours of a row share.

    widths = widths_per_matrix([3.5], [(1024, 4096)])[0]      # rows of 3 and of 4 bits
    grid = Grid(widths, torch.bfloat16)
    grid.begin(weight, inputs)
    new = grid.nearest(weight)

A number (code) of b bits is one of -2^(b-1) .. 2^(b-1) - 1, so that zero is one. A scale is stored
in fp16 and counts: 16 bits for each group, which is 1/8 bit per weight where groups are full. It
may be negative: the code that has no opposite stands for the group's largest weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.bits import GROUP, WIDTHS
from infra.errors import UserError
from tasks.pruning.inputs import InputStatistics

SCALE_BITS = 16
_TRIES = 8  # scales that are tried for each group
_SMALLEST = {2: 0.55, 3: 0.7, 4: 0.85, 8: 0.97}  # of them, over the one that reaches every weight


@dataclass(frozen=True)
class Widths:
    """Bits of the codes of one matrix: `num_high` of its rows have `high`, all others `low`."""

    low: int
    high: int
    num_high: int = 0


def widths_per_matrix(
    bits: Sequence[float], shapes: Sequence[Sequence[int]], names: Sequence[str] = ()
) -> list[Widths]:
    """How many rows of each matrix have which width, so that its weights take `bits` on average.

    bits: one per matrix, scales counted. shapes: out x in of each. Two neighbouring widths are
    mixed; what whole rows leave is carried to the next matrix, so that two allocations of one mean
    take equally many bits to within a row. Raises UserError for what the widths cannot reach.
    """
    found, carry = [], 0.0
    for place, (each, (rows, in_)) in enumerate(zip(bits, shapes, strict=True)):
        scales = SCALE_BITS * math.ceil(in_ / GROUP) / in_
        code = round(each - scales, 9)  # 4.125 bits are codes of 4 bits, whatever way they came
        if not WIDTHS[0] <= code <= WIDTHS[-1]:
            name = names[place] if names else "a matrix"
            raise UserError(
                f"{name} has rows of {in_} inputs, whose scales take {scales:.4g} bits a weight: "
                f"{each:.4g} bits leave {code:.4g} for a code, which has {WIDTHS[0]} to "
                f"{WIDTHS[-1]}: choose other prune.bits, or a smaller tilt"
            )
        low = max(width for width in WIDTHS if width <= code)
        high = min(width for width in WIDTHS if width >= code)
        missing = (code - low) * rows * in_ + carry
        one = in_ * (high - low)
        count = min(rows, max(0, math.floor(missing / one + 0.5 + 1e-6))) if one else 0
        carry = missing - count * one
        found.append(Widths(low, high, count))
    return found


class Grid:
    """The values that the weights of one matrix may have, group by group.

    dtype: of the weights in the model, which hold every scale exactly, as fp16 does.
    """

    widths: Tensor  # of each row: out, int64
    scales: Tensor  # out x groups, float32

    def __init__(self, asked: Widths, dtype: torch.dtype = torch.float32) -> None:
        self.asked, self.dtype = asked, dtype

    def begin(self, weight: Tensor, inputs: InputStatistics) -> None:
        """Decide which rows get more bits: those whose output would lose most without them.

        weight: out x in, float32. A code's error is taken to be even within its step, and inputs
        to be uncorrelated; where their norms were not measured, all count the same.
        """
        rows, in_ = weight.shape
        asked, device, self._in = self.asked, weight.device, in_
        self.widths = torch.full((rows,), asked.low, dtype=torch.int64, device=device)
        self.scales = torch.ones(rows, math.ceil(in_ / GROUP), device=device)
        if asked.num_high == rows:
            self.widths[:] = asked.high
        elif asked.num_high:
            known = inputs.tokens and inputs.needs & {"norms", "gram"}
            energy = inputs.squares if known else torch.ones(in_, device=device)
            losses = torch.zeros(rows, device=device)
            for start in range(0, in_, GROUP):
                largest = weight[:, start : start + GROUP].abs().amax(1)
                losses += largest.square() * energy[start : start + GROUP].sum()
            self.widths[losses.argsort(descending=True, stable=True)[: asked.num_high]] = asked.high
        self._least = -torch.exp2(self.widths - 1.0)
        self._most = -self._least - 1
        smallest = torch.tensor([_SMALLEST.get(width, 0.0) for width in range(9)], device=device)
        self._step = (1 - smallest[self.widths]) / (_TRIES - 1)

    def fit(self, start: int, columns: Tensor) -> None:
        """Choose the scales of the group that begins at an input. columns: inputs x out.

        Of some scales, the one with the least squared error of the weights; what is zero has none.
        """
        low, high = columns.aminmax(dim=0)
        far = torch.where(-low >= high, low, high) / self._least
        best = torch.full_like(far, torch.inf)
        chosen = torch.ones_like(far)
        for place in range(_TRIES):
            scale = self._held(far * (1 - place * self._step))
            error = (self._rounded(columns, scale) - columns).square_().sum(0)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, scale, chosen)
        self.scales[:, start // GROUP] = chosen

    def rounded(self, start: int, columns: Tensor) -> Tensor:
        """The nearest values. columns: inputs x out or out, of the group that holds `start`."""
        return self._rounded(columns, self.scales[:, start // GROUP])

    def nearest(self, weight: Tensor) -> Tensor:
        """Every weight rounded by itself, on scales that fit. weight: out x in, float32."""
        new = torch.empty_like(weight)
        for start in range(0, weight.shape[1], GROUP):
            columns = weight[:, start : start + GROUP].t().contiguous()
            self.fit(start, columns)
            new[:, start : start + GROUP] = self.rounded(start, columns).t()
        return new

    def holds(self, weight: Tensor) -> bool:
        """Whether every weight has a value of the grid, in the dtype of the model. out x in."""
        for start in range(0, weight.shape[1], GROUP):
            columns = weight[:, start : start + GROUP].t()
            if not torch.equal(self.rounded(start, columns.float()).to(weight.dtype), columns):
                return False
        return True

    @property
    def bits(self) -> int:
        """Of the whole matrix, scales counted."""
        return int(self.widths.sum()) * self._in + SCALE_BITS * self.scales.numel()

    @property
    def row_bits(self) -> int:
        """What more bits for one row cost."""
        return (self.asked.high - self.asked.low) * self._in

    def _held(self, scale: Tensor) -> Tensor:
        """What fp16 and the model's dtype both hold; 1 for nothing but zeros."""
        scale = scale.half().to(self.dtype).half().float()
        return torch.where(scale == 0, 1.0, scale)

    def _rounded(self, columns: Tensor, scale: Tensor) -> Tensor:
        codes = (columns / scale).round_()
        return codes.clamp_(self._least, self._most).mul_(scale).add_(0.0)  # no zero is negative
