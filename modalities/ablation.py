"""A block that is run once with some of its weights zero, to see what depends on them.

with without((matrix, mask)):
    model(input_ids=ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from modalities.products import Matrix


@contextmanager
def without(*masks: tuple[Matrix, Tensor], columns: bool = False) -> Iterator[None]:
    """Some rows, or columns, of weights are zero inside; their own memory is not touched."""
    kept = []
    try:
        for matrix, mask in masks:
            parameter = matrix.block.get_parameter(matrix.parameter)
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.clone()
            weight = matrix.weight()
            (weight.t() if columns else weight)[mask.to(weight.device)] = 0
        yield
    finally:
        for parameter, own in reversed(kept):
            parameter.data = own


@contextmanager
def forward_of(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """`replacement(original, ...)` is called instead of a module's forward, once."""
    before = module.__dict__.get("forward")
    original = module.forward

    def restore() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()
        return replacement(original, *args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        restore()
