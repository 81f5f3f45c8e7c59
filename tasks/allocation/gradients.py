"""ECoFLaP's score: how steeply the loss changes with each matrix, without backpropagation.

    scores = ecoflap(modality, batches, PruneSpec(allocation="ecoflap"))    # one per matrix

Two forwards per matrix and batch (arXiv 2310.02998, zeroth order with one noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infra.specs import PruneSpec
from modalities.base import Batch, Modality
from modalities.products import Matrix
from tasks.allocation.objectives import first_windows

STEP, SAMPLES = 1e-3, 32


def ecoflap(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """abs(L(w + e z) - L(w - e z)) / 2e of every matrix, z normal, L the mean loss of a window."""
    step = prune.parameters.get("step", STEP)
    batches = first_windows(batches, int(prune.parameters.get("samples", SAMPLES)))
    scores: list[float] = []
    with torch.no_grad(), modality.streaming():
        for block in modality.blocks:
            for matrix in block.matrices:
                # From the host, so that every device gives the same.
                generator = torch.Generator().manual_seed(len(scores))
                noise = torch.randn(matrix.weight().shape, generator=generator)
                up, down = (_loss(modality, batches, matrix, s * noise) for s in (step, -step))
                scores.append(abs(up - down) / (2 * step))
    return scores


def _loss(modality: Modality, batches: Sequence[Batch], matrix: Matrix, change: Tensor) -> float:
    def perturb(module: Any, args: Any) -> None:
        weight = matrix.weight()
        weight.add_(change.to(weight.device))

    # After the hook that brings the block's dense weights; they come back when it has run.
    with matrix.block.register_forward_pre_hook(perturb):
        losses = [loss for batch in batches for loss in modality.losses(batch)]
    return sum(losses) / len(losses)
