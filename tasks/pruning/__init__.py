"""Pruning methods: which weights of one matrix become zero, and what becomes of the others.

Rounding is one of the things that may become of them: `rtn` and `gptq` do nothing else.

    new = prune_weight(weight, inputs, method="sparsegpt", rate=0.7)
    new = prune_weight(weight, inputs, method="wanda", pattern="2:4")
    new = prune_weight(weight, inputs, method="gptq", bits=3.5)

`weight` is out x in, `inputs` tokens x in. A method is one function of a weight, of what was
measured of its inputs, and of a budget of zeros; adding one is that function plus a line in
tasks/methods.py. Read on: inputs.py, patterns.py, then one file per kind of method.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor

from infra.bits import ROUNDING
from infra.errors import UserError
from tasks.methods import METHODS, method_named
from tasks.pruning.grids import Grid, widths_per_matrix
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget, parse_pattern
from tasks.pruning.structured import remove_units

__all__ = ["METHODS", "method_named", "prune_in_place", "prune_weight", "remove_in_place"]


@torch.no_grad()
def prune_weight(
    weight: Tensor,
    inputs: Tensor,
    *,
    method: str = "wanda",
    rate: float | None = None,
    pattern: str | None = None,
    bits: float = 0,
    gradient: Tensor | None = None,
) -> Tensor:
    """A pruned copy of one matrix: by the published count of zeros at a rate, or by a pattern.

    weight: out x in. inputs: tokens x in. rate: share of zeros in [0, 1). pattern: N:M keeps N of
    every M along the input. bits: per weight, scales counted, that what stays is rounded to; for
    rtn and gptq, which take no rate and no pattern. gradient: out x in, of the loss, for
    Pruner-Zero.

    Raises TypeError for what is none of these, and UserError for values that do not fit.
    """
    tensors: dict[str, object] = {"weight": weight, "inputs": inputs}
    if gradient is not None:
        tensors["gradient"] = gradient
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"prune_weight: {name} must be a tensor of floats, not {kind}")
    numbers: dict[str, object] = {"rate": 0 if rate is None else rate, "bits": bits}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"prune_weight: {name} must be a number such as 0.7, not {value!r}")
    words: dict[str, object] = {"method": method, "pattern": "" if pattern is None else pattern}
    for name, value in words.items():
        if not isinstance(value, str):
            raise TypeError(f"prune_weight: {name} must be a string, not {value!r}")
    chosen = method_named(method)
    if method in ROUNDING:
        if not bits or rate is not None or pattern is not None:
            raise UserError(f"method={method!r} only rounds: give bits, and no rate or pattern")
        rate = 0
    if (rate is None) == (pattern is None):
        raise UserError("prune_weight needs a rate or a pattern, and not both")
    if weight.ndim != 2 or inputs.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise UserError(
            f"weight {tuple(weight.shape)} and inputs {tuple(inputs.shape)} do not fit: they must "
            "be out x in and tokens x in"
        )
    if rate is not None:
        if not 0 <= rate < 1:
            raise UserError(f"rate={rate:g} is not in [0, 1)")
        budget = Budget(chosen.published_zeros(weight.shape[0], weight.shape[1], rate))
    else:
        kept, size = parse_pattern(str(pattern)) or (None, 0)
        if kept is None:
            raise UserError(f"pattern={pattern!r} has no numbers: write 2:4, or give a rate")
        budget = Budget.in_groups((kept, size), weight.shape)
    statistics = InputStatistics(chosen.needs)
    if "gradient" in chosen.needs:
        if gradient is None or gradient.shape != weight.shape:
            raise UserError(f"method={method!r} needs a gradient of the weight's shape")
        statistics.gradient = gradient
    elif chosen.needs:
        statistics.add(inputs)
    if not statistics.measured:
        raise UserError(f"method={method!r} needs inputs, or a gradient, that are not all missing")
    if not (torch.isfinite(weight).all() and statistics.are_finite):
        raise UserError("the weight, the inputs or the gradient hold NaN or infinity, or overflow")
    if bits:
        (widths,) = widths_per_matrix([bits], [weight.shape], ["the weight"])
        budget = replace(budget, grid=Grid(widths, weight.dtype))
    new = weight.detach().clone()
    prune_in_place(new, statistics, method=method, budget=budget)
    return new


def prune_in_place(weight: Tensor, inputs: InputStatistics, *, method: str, budget: Budget) -> bool:
    """Set at least `budget.zeros` weights of a matrix to zero: exactly so many, where a method
    leaves no weight at zero by itself. weight: out x in, a view into the model. The others are
    rounded to the budget's grid, where it has one.

    Returns False where the method needs inputs and saw none, so that magnitude was used instead:
    an expert that no calibration token reached.
    """
    measured = inputs.measured
    grid = budget.grid
    if budget.zeros == 0 and grid is None:
        return measured
    chosen = method_named(method) if measured else METHODS["magnitude"]
    new = wide = weight.float()
    if grid:
        grid.begin(wide, inputs)
    if budget.zeros or chosen.rounds:
        new = chosen.prune(wide, inputs, budget if chosen.rounds else replace(budget, grid=None))
    if grid and not chosen.rounds:
        new = grid.nearest(new if new.is_floating_point() else wide.masked_fill(new, 0))
    if new.is_floating_point():
        weight.copy_(new)
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise RuntimeError(f"{method} gives weights that {weight.dtype} cannot hold")
    else:
        weight.masked_fill_(new, 0)
    return measured


def remove_in_place(
    weight: Tensor, inputs: InputStatistics, *, method: str, count: int, goes: int
) -> Tensor:
    """Set `goes` of `count` equal groups of columns to zero, and change the rest to make up for it.

    weight: out x in, a view into the model. Returns a mask of the groups that went; where the
    method needs inputs and saw none, magnitude chose them.
    """
    chosen = (method_named(method) if inputs.measured else METHODS["magnitude"]).units
    assert chosen is not None, f"{method} removes no units"
    new, gone = remove_units(weight.float(), inputs, chosen, count, goes)
    weight.copy_(new)
    if not torch.isfinite(weight.sum(dtype=torch.float32)):
        raise RuntimeError(f"{method} gives weights that {weight.dtype} cannot hold")
    return gone
