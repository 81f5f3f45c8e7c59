"""What allocations measure of weights and dense inputs: A = |W| * ||X_column|| of every matrix.

    percent = owl(modality, batches, PruneSpec(allocation="owl"))    # one per matrix

One lockstep pass of the dense model; a block's inputs are summed up while all batches stand at it
and forgotten before the next. Matrices that no token reached (experts) are left out of their block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from infra.specs import PruneSpec
from modalities.base import Batch, Modality
from modalities.products import Matrix, ProductWatcher
from tasks.lockstep import Lockstep, Pass, pause

OUTLIER = 5.0


def owl(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """Per cent of a block's A that are above M times their mean."""
    times = prune.parameters.get("M", OUTLIER)
    return measured_per_block(modality, batches, partial(outlier_percent, times=times))


def dlp(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """Median of a block's A."""
    return measured_per_block(modality, batches, median)


def outlier_percent(scores: list[Tensor], *, times: float) -> float:
    """100 * share of all scores that are above `times` their mean."""
    size = sum(s.numel() for s in scores)
    limit = times * sum(float(s.sum(dtype=torch.float64)) for s in scores) / size
    return 100 * sum(int((s > limit).sum()) for s in scores) / size


def median(scores: list[Tensor]) -> float:
    """The lower median of all scores."""
    return float(torch.cat([s.flatten() for s in scores]).median())


def measured_per_block(
    modality: Modality, batches: Sequence[Batch], measure: Callable[[list[Tensor]], float]
) -> list[float]:
    """`measure` of the A of each block, for every matrix of it.

    A block that no token reached is like the mean of the others.
    """
    found: dict[int, float] = {}

    def visit(index: int, squares: dict[Matrix, Tensor]) -> None:
        scores = [m.weight().float().abs() * x.sqrt() for m, x in squares.items()]
        if scores:
            found[index] = measure(scores)

    dense_pass(modality, batches, visit)
    mean = sum(found.values()) / len(found) if found else 0.0
    return [found.get(i, mean) for i, block in enumerate(modality.blocks) for _ in block.matrices]


def dense_pass(
    modality: Modality,
    batches: Sequence[Batch],
    visit: Callable[[int, dict[Matrix, Tensor]], None],
) -> None:
    """One dense forward of all batches; `visit(block, squares)` while its weights are there.

    `squares` holds the sum of squares of each input column of the matrices that were used, in
    float32 and in the block's order.
    """
    blocks = [(block.name, block.module) for block in modality.blocks]
    limit = modality.states_limit_bytes()
    with torch.no_grad(), Lockstep(blocks, limit_bytes=limit) as lockstep:
        runs = [lockstep.start(partial(modality.run, batch)) for batch in batches]
        while (index := lockstep.lowest(runs)) is not None:
            matrices = modality.blocks[index].matrices
            sums: dict[Matrix, Tensor] = {}
            last = index == len(blocks) - 1
            modality.attach_block(index)
            try:
                for run in lockstep.standing(runs, index):
                    watcher = ProductWatcher(matrices, partial(_add, sums))
                    run.resume(Pass(watcher, seen=pause if last else None))
                    if last:
                        run.close()  # the head tells nothing
                visit(index, {m: sums[m] for m in matrices if m in sums})
            finally:
                modality.release_block(index)


def _add(sums: dict[Matrix, Tensor], matrix: Matrix, inputs: Tensor) -> None:
    if inputs.shape[0] == 0:
        return
    squares = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_()
    sums[matrix] = sums[matrix] + squares if matrix in sums else squares
