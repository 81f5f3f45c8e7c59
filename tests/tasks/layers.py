"""Random layers for the tests of pruning methods, and statistics of their inputs.

weight, inputs = layer(seed=1)
prune_in_place(weight, measured("alps", inputs), method="alps", budget=Budget(300))
"""

import torch
from torch import Tensor

from tasks.pruning import METHODS
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget

PATTERNS = ("unstructured", "2:4", "4:8", "1:4")


def layer(seed: int, out: int = 24, in_: int = 40, tokens: int = 160) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that are correlated, of different sizes and not centred."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(in_) + 0.5 * torch.randn(in_, in_, generator=generator) / in_**0.5
    inputs = torch.randn(tokens, in_, generator=generator) @ mix
    inputs = inputs * (0.2 + torch.rand(in_, generator=generator) * 2)
    inputs = inputs + 0.5 * torch.randn(in_, generator=generator)
    return torch.randn(out, in_, generator=generator), inputs


def measured(method: str, *batches: Tensor, gradient: Tensor | None = None) -> InputStatistics:
    """What a method needs of some inputs; a gradient where it needs that."""
    statistics = InputStatistics(METHODS[method].needs)
    for batch in batches:
        statistics.add(batch)
    statistics.gradient = gradient
    return statistics


def budget_of(pattern: str, shape: tuple[int, ...], zeros: int) -> Budget:
    """Of a pattern; `zeros` counts where it is unstructured."""
    if pattern == "unstructured":
        return Budget(zeros)
    kept, size = map(int, pattern.split(":"))
    return Budget.in_groups((kept, size), shape)


def only_masks(method: str) -> bool:
    """Whether a method leaves the weights that it keeps as they are."""
    weight, inputs = layer(0, 4, 8, 20)
    statistics = InputStatistics({"norms", "moments", "gram"})
    statistics.add(inputs)
    statistics.gradient = weight
    return METHODS[method].prune(weight, statistics, Budget(9)).dtype == torch.bool
