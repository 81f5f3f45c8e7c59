"""NeuronAl's choice of a slope: the line under which the outputs of the blocks move least.

    rates = neuronal(modality, batches, PruneSpec(allocation="neuronal"))    # one per matrix

Rates rise over depth within S +- lambda, which is the arithmetic family with
beta = 2 lambda / (L - 1); each of the published lambdas is tried on a few windows (2411.07066).
"""

from __future__ import annotations

from collections.abc import Sequence

from infra.specs import PruneSpec
from modalities.base import Batch, Modality
from tasks.allocation.families import block_params, spread
from tasks.allocation.line import arithmetic_rates, beta_bounds
from tasks.sweep import sweep

LAMBDAS = (0.01, 0.02, 0.03, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
SAMPLES = 8


def neuronal(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """The rates of the best lambda, pruned as the spec says; a lambda out of range is skipped.

    What moves is the relative error of a block's output against dense, averaged over the blocks.
    """
    batches = first_windows(batches, int(prune.parameters.get("samples", SAMPLES)))
    matrices = modality.matrices()
    params = block_params(matrices)
    _, high = beta_bounds(params, prune.sparsity)
    betas = [2 * width / max(len(params) - 1, 1) for width in LAMBDAS]
    tried: list[tuple[float, list[float]]] = []
    for beta in [b for b in betas if b < high] or [0.0]:
        rates = spread(matrices, arithmetic_rates(params, prune.sparsity, beta))
        outcome = sweep(
            modality,
            rates,
            method=prune.method,
            pattern=prune.pattern,
            bits=prune.bits,
            pause_at=prune.pause,
            calibration=batches,
            evaluation=batches,
            dense=True,
        )
        moved = sum(error.relative for error in outcome.errors) / len(outcome.errors)
        tried.append((moved, rates))
    return min(tried)[1]


def first_windows(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Batches that hold the first `count` windows, or a few more where one cannot be cut."""
    chosen: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        chosen.append(batch.rows(0, count))
        count -= chosen[-1].windows
    return chosen
