"""What a sweep is asked to do to every matrix: how much goes, in which form, and what must be seen.

asked = asked_of(modality, rates, method="wanda", pattern="2:4", bits=0)
asked.budgets[matrix], asked.records[matrix]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from infra.bits import ROUNDING, bits_of
from infra.errors import UserError
from infra.records import MatrixRecord
from modalities.base import Modality
from modalities.products import Matrix
from tasks.allocation import MOST, zeros_per_matrix
from tasks.methods import check_pattern, method_named
from tasks.pruning.grids import Grid, widths_per_matrix
from tasks.pruning.patterns import STRUCTURED, UNSTRUCTURED, Budget, budgets, settled
from tasks.structure import UnitBudget, unit_budgets


@dataclass(frozen=True, eq=False)
class Asked:
    """Of each matrix a record and a budget; of one whose columns go in units, how many do.

    `needs` is what must be measured of inputs, `bits` what all weights may take, 0 where they are
    not rounded.
    """

    records: dict[Matrix, MatrixRecord]
    budgets: dict[Matrix, Budget]
    needs: frozenset[str]
    changes: bool
    bits: float = 0.0
    removals: dict[Matrix, UnitBudget] = field(default_factory=dict)

    @property
    def watched(self) -> dict[Matrix, MatrixRecord]:
        """The matrices whose inputs decide what goes."""
        return {m: r for m, r in self.records.items() if m in self.removals or not self.removals}

    def untouched(self) -> list[MatrixRecord]:
        """Of matrices that no unit is a part of."""
        used = {m for each in self.removals.values() for m in each.units.matrices}
        whole = [r for m, r in self.records.items() if self.removals and m not in used]
        return [record.model_copy(update={"rate": 0.0, "zeros": 0}) for record in whole]

    def check_bits(self) -> None:
        """Raise RuntimeError where the weights take more or fewer than was asked, by over a row."""
        grids = [budget.grid for budget in self.budgets.values() if budget.grid]
        found = sum(grid.bits for grid in grids)
        if grids and abs(found - self.bits) > max(grid.row_bits for grid in grids):
            raise RuntimeError(f"the weights take {found} bits instead of {self.bits:.0f}")


def asked_of(
    modality: Modality,
    rates: Sequence[float],
    *,
    method: str,
    pattern: str = UNSTRUCTURED,
    bits: float = 0,
) -> Asked:
    """At one rate for each matrix, as modality.matrices() orders them.

    Raises UserError for a pattern or bits that a matrix cannot take, and for a rate that would
    leave nothing of one.
    """
    plan = modality.matrices()
    only_rounds = method in ROUNDING and bits > 0
    removed = [0.0 for _ in rates] if only_rounds else rates
    zeros = zeros_per_matrix(removed, [m.params for m in plan])
    asked = [
        m.model_copy(update={"rate": rate, "zeros": z})
        for m, rate, z in zip(plan, rates, zeros, strict=True)
    ]
    for record in asked:
        if record.rate > MOST and record.zeros >= record.params:
            raise UserError(
                f"{record.matrix} of block {record.block} would lose every weight at rate "
                f"{record.rate:.6f}: choose a smaller tilt, or less sparsity"
            )
    flat = [matrix for block in modality.blocks for matrix in block.matrices]
    weights = [matrix.weight() for matrix in flat]
    chosen = budgets(pattern, asked, [weight.shape for weight in weights])
    total_bits = 0.0
    if bits:
        each = [bits_of(rate) if only_rounds else bits for rate in rates]
        names = [f"{m.matrix} of block {m.block}" for m in plan]
        widths = widths_per_matrix(each, [weight.shape for weight in weights], names)
        grids = [Grid(w, weight.dtype) for w, weight in zip(widths, weights, strict=True)]
        chosen = [replace(b, grid=g) for b, g in zip(chosen, grids, strict=True)]
        total_bits = math.fsum(b * m.params for b, m in zip(each, plan, strict=True))
    needs = frozenset(method_named(method).needs)
    removals = {}
    if pattern == STRUCTURED and any(zeros):
        check_pattern(method, pattern)
        needs |= {"gram"}  # what stays makes up for what goes
        units = [each for block in unit_budgets(modality, rates) for each in block]
        removals = {each.units.consumer: each for each in units}
    return Asked(
        records=dict(zip(flat, map(settled, asked, chosen), strict=True)),
        budgets=dict(zip(flat, chosen, strict=True)),
        needs=needs,
        changes=any(zeros) or bits > 0,
        bits=total_bits,
        removals=removals,
    )
