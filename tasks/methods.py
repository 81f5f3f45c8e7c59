"""The table of pruning methods: their names, what each must know, and which function it is.

    method_named("wanda").needs   # ("norms",)

A method's function is imported when it is first called, so that whoever only looks a name up, a
driver before its run begins, does without torch. Adding one is a function in tasks/pruning/ and a
line in METHODS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.bits import GROUP
from infra.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.pruning.inputs import InputStatistics
    from tasks.pruning.patterns import Budget

PANEL = GROUP  # columns whose zeros SparseGPT chooses together, as published, and their scales

Prune = Callable[["Tensor", "InputStatistics", "Budget"], "Tensor"]
Choose = Callable[["Tensor", "InputStatistics", int, int], "Tensor"]


def _function(module: str, name: str) -> Callable[..., Tensor]:
    """A function of tasks/pruning/, imported when it is called."""

    def call(*args: Any) -> Tensor:
        found: Tensor = getattr(importlib.import_module(f"tasks.pruning.{module}"), name)(*args)
        return found

    return call


def _per_row(out: int, in_: int, rate: float) -> int:
    return out * int(in_ * rate)


def _and_one(out: int, in_: int, rate: float) -> int:
    """The published threshold takes one more; never all, and none where nothing is asked for."""
    return min(out * in_ - 1, int(out * in_ * rate) + 1) if rate else 0


def _per_panel(out: int, in_: int, rate: float) -> int:
    """One more than rate * n, rounded down, in every panel of n weights; never all of them."""
    panels = (out * min(PANEL, in_ - start) for start in range(0, in_, PANEL))
    return min(out * in_ - 1, sum(min(n, int(n * rate) + 1) for n in panels)) if rate else 0


@dataclass(frozen=True)
class Method:
    """`prune(weight, inputs, budget)` gets a float32 weight, which it leaves as it is, and gives a
    mask of the weights that go or, where the others change as well, the new weights.

    `needs` names what InputStatistics must measure: any of norms, moments, gram and gradient.
    `published_zeros` is the count that the published rule gives for (out, in, rate). `units`
    chooses among whole groups of columns, for prune.pattern=structured. One that `rounds` puts the
    weights that stay on the budget's grid; for others they are rounded after it.
    """

    prune: Prune
    needs: Collection[str] = ()
    published_zeros: Callable[[int, int, float], int] = _per_row
    units: Choose | None = None
    rounds: bool = False


METHODS: dict[str, Method] = {
    "magnitude": Method(
        _function("scores", "magnitude"), (), _and_one, _function("structured", "magnitude_units")
    ),
    "wanda": Method(
        _function("scores", "wanda"), ("norms",), units=_function("structured", "wanda_units")
    ),
    "taylor": Method(
        _function("scores", "taylor"), ("gradient",), units=_function("structured", "taylor_units")
    ),
    "pruner-zero": Method(_function("scores", "pruner_zero"), ("gradient",)),
    "dsnot": Method(_function("dsnot", "dsnot"), ("norms", "moments")),
    "sparsegpt": Method(
        _function("sparsegpt", "sparsegpt"),
        ("gram",),
        _per_panel,
        _function("structured", "obs_units"),
        rounds=True,
    ),
    "alps": Method(_function("alps", "alps"), ("gram",), lambda out, in_, s: int(out * in_ * s)),
    # Without zeros these only round; the norms decide which rows get more bits.
    "rtn": Method(_function("scores", "wanda"), ("norms",)),
    "gptq": Method(_function("sparsegpt", "sparsegpt"), ("gram",), _per_panel, rounds=True),
}


def check_pattern(name: str, pattern: str) -> None:
    """Raise UserError for a method that there is not, or that cannot make the pattern."""
    if pattern == "structured" and method_named(name).units is None:
        able = ", ".join(name for name, method in METHODS.items() if method.units)
        raise UserError(
            f"prune.method={name} removes no whole channels: prune.pattern=structured is for {able}"
        )
    method_named(name)


def method_named(name: str) -> Method:
    """Look a method up; raises UserError with the nearest known name."""
    if name not in METHODS:
        raise UserError(f"unknown prune.method={name!r}: {nearest(name, METHODS)}")
    return METHODS[name]
