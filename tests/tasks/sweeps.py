"""What tests of sweeps share: losses of a model as it stands, and checks of what was removed.

with kept(modality):
    outcome = sweep(modality, TILTED, keep=True, **options)
    check_zeros(modality, outcome, TILTED)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from modalities.base import Batch
from tasks import sweep as swept
from tasks.allocation import arithmetic_rates, spread, zeros_per_matrix
from tasks.sweep import Outcome

Loaded = Callable[..., Any]
Batches = Callable[[Any], tuple[list[Batch], list[Batch]]]
PAUSES: tuple[Literal["block", "linear"], ...] = ("block", "linear")
TILTED = [0.4, 0.5, 0.6]


def plain(modality: Any, batches: list[Batch]) -> list[float]:
    """The losses of the model as it stands, one forward after another."""
    with torch.no_grad():
        return [loss for batch in batches for loss in modality.losses(batch)]


def weights(modality: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in modality.model.named_parameters()}


@contextmanager
def kept(modality: Any) -> Iterator[None]:
    """Dense again afterwards."""
    try:
        yield
    finally:
        for index in range(len(modality.blocks)):
            modality.release_block(index)


def sweep(modality: Any, rates: list[float], **options: Any) -> Outcome:
    """A sweep with one rate per block."""
    return swept.sweep(modality, spread(modality.matrices(), rates), **options)


def rates_of(modality: Any, beta: float = 0.0, sparsity: float = 0.5) -> list[float]:
    return arithmetic_rates(modality.record("").block_params(), sparsity, beta)


def check_zeros(modality: Any, outcome: Outcome, rates: list[float]) -> None:
    """As many zeros per matrix as planned, in the model as in the records."""
    plan = modality.matrices()
    planned = zeros_per_matrix([rates[m.block] for m in plan], [m.params for m in plan])
    by_name = {(m.block, m.matrix): m for m in outcome.matrices}
    matrices = [(i, matrix) for i, block in enumerate(modality.blocks) for matrix in block.matrices]
    for (index, matrix), zeros in zip(matrices, planned, strict=True):
        record = by_name.pop((index, matrix.name))
        assert record.zeros == zeros == int((matrix.weight() == 0).sum())
        assert (record.params, record.rate) == (matrix.params, rates[index])
    assert not by_name


def check_untouched(
    modality: Any, before: dict[str, torch.Tensor], *, updated: bool = False
) -> None:
    """What is not prunable is as it was, and so is what was not removed unless it is `updated`."""
    prunable = {f"{b.name}.{m.parameter}" for b in modality.blocks for m in b.matrices}
    for name, parameter in modality.model.named_parameters():
        same = parameter == before[name]
        if name in prunable:
            assert updated or bool((same | (parameter == 0)).all()), name
        else:
            assert bool(same.all()), name
