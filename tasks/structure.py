"""Structured pruning: how many channels and heads each block loses.

    counts = unit_counts([0.3, 0.3], [3_000, 3_000], [[(300, 3), (3, 700)]] * 2)  # [[1, 200], ...]

While it is pruned and evaluated a model keeps its shape, with zeros where units went; what is saved
lacks them, and modalities/smaller.py loads it. modalities/units.py finds the units,
tasks/pruning/structured.py chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from infra.errors import UserError
from infra.structure import Structure

if TYPE_CHECKING:
    from modalities.base import Modality
    from modalities.units import Units


@dataclass(frozen=True, eq=False)
class UnitBudget:
    """How many of some units go."""

    units: Units
    goes: int


def unit_counts(
    rates: Sequence[float], params: Sequence[int], units: Sequence[Sequence[tuple[int, int]]]
) -> list[list[int]]:
    """How many units of each kind every block loses, such that it loses its share of weights.

    rates, params: one per block, params all of its prunable weights. units: of each block
    (weights of one, how many there are) per kind, the largest first. All kinds of a block have its
    rate; what rounding leaves of the large ones is carried to the same kind of the next block and
    made up for by the smallest kind of this one, so that a block, and with it two allocations of
    one mean, are exact to one smallest unit. One unit of each kind always stays.

    Raises UserError where that leaves too many.
    """
    carried: dict[int, float] = {}
    found: list[list[int]] = []
    carry, smallest = 0.0, 0
    for rate, total, kinds in zip(rates, params, units, strict=True):
        wanted = rate * total + carry
        if not kinds:  # of each only one is left
            carry = wanted
            found.append([])
            continue
        counts = []
        for place, (size, count) in enumerate(kinds[:-1]):
            exact = rate * count + carried.get(place, 0.0)
            counts.append(min(count - 1, max(0, math.floor(exact + 0.5))))
            carried[place] = max(-0.5, min(0.5, exact - counts[-1]))  # no more than rounding
            wanted -= counts[-1] * size
        size, count = kinds[-1]
        counts.append(min(count - 1, max(0, math.floor(wanted / size + 0.5))))
        carry = wanted - counts[-1] * size
        smallest = max(smallest, size)
        found.append(counts)
    if abs(carry) > smallest:
        raise UserError(
            "prune.pattern=structured: one channel and one head of each block must stay, so "
            f"{carry / sum(params):.1%} of the weights cannot go: choose less sparsity or tilt"
        )
    return found


def unit_budgets(modality: Modality, rates: Sequence[float]) -> list[list[UnitBudget]]:
    """What goes of every block. rates: one per matrix, as modality.matrices() orders them."""
    units = modality.units()
    left = iter(rates)
    params = [[matrix.params for matrix in block.matrices] for block in modality.blocks]
    means = [sum(next(left) * p for p in each) / sum(each) for each in params]
    sizes = [[(kind.params, kind.count) for kind in block] for block in units]
    counts = unit_counts(means, [sum(each) for each in params], sizes)
    return [
        [UnitBudget(kind, goes) for kind, goes in zip(kinds, each, strict=True)]
        for kinds, each in zip(units, counts, strict=True)
    ]


def counts_of(gone: Sequence[tuple[Units, Tensor]]) -> dict[str, tuple[int, int]]:
    """Units that went and how many there were, of all blocks, by what they are. gone: of each, a
    mask of units."""
    found: dict[str, tuple[int, int]] = {}
    for units, mask in gone:
        kind = "channels" if units.count == units.consumer.weight().shape[1] else "heads or groups"
        name = f"{kind} ({units.consumer.name.removesuffix('.weight')})"
        lost, count = found.get(name, (0, 0))
        found[name] = lost + int(mask.sum()), count + units.count
    return found


def structure_of(modality: Modality, gone: Sequence[tuple[Units, Tensor]]) -> Structure:
    """What removing units makes of a model. gone: of each, a mask of units."""
    names = {id(block.module): block.name for block in modality.blocks}
    blocks: dict[str, Any] = {}
    for units, mask in gone:
        blocks.setdefault(names[id(units.consumer.block)], []).append(units.removed(mask.cpu()))
    return Structure(blocks=blocks)
