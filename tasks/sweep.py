"""The lockstep sweep: one pass over the weights prunes a model and evaluates it.

    outcome = sweep(modality, rates, method="wanda", pause="linear",
                    calibration=calibration_batches, evaluation=evaluation_batches)
    outcome.losses

All batches wait for each other at every block. There the dense copies pass first, the calibration
batches show the block its inputs, its matrices are pruned, and everything else goes through the
pruned block once. A block's weights are on the device only while batches stand at it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from infra.errors import UserError
from infra.records import BlockError, MatrixRecord
from modalities.base import Batch, Modality
from modalities.products import Matrix, ProductWatcher
from tasks.allocation import zeros_per_matrix
from tasks.errors import ErrorCurve
from tasks.lockstep import Lockstep, Pass, Run, pause
from tasks.pruning import ColumnNorms, prune_in_place


@dataclass
class Outcome:
    """What a sweep gives: a loss per window, and what became of every matrix."""

    losses: list[float] = field(default_factory=list)
    dense_losses: list[float] = field(default_factory=list)
    matrices: list[MatrixRecord] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    errors: list[BlockError] = field(default_factory=list)
    token_passes: int = 0


@dataclass(frozen=True)
class AtProduct:
    """A calibration run stands before the product with a matrix, its inputs already counted."""

    matrix: Matrix


def sweep(
    modality: Modality,
    rates: Sequence[float],
    *,
    method: str,
    pause_at: Literal["block", "linear"],
    calibration: Sequence[Batch],
    evaluation: Sequence[Batch],
    dense: bool = False,
    keep: bool = False,
) -> Outcome:
    """Prune the matrices at one rate each, as modality.matrices() orders them, and evaluate.

    `dense` lets a dense copy of the evaluation ride along, for its losses and the error of every
    block. `keep` leaves the pruned weights in the model; otherwise each block is dense again as
    soon as all batches have passed it. Raises RuntimeError where the result is not what was asked
    for: a wrong number of zeros, something changed that is not prunable, a loss that is not finite.
    """
    return _Sweep(modality, rates, method, pause_at, keep).run(calibration, evaluation, dense)


class _Sweep:
    def __init__(
        self, modality: Modality, rates: Sequence[float], method: str, pause_at: str, keep: bool
    ) -> None:
        self.modality, self.method, self.pause_at, self.keep = modality, method, pause_at, keep
        self.outcome = Outcome()
        plan = modality.matrices()
        zeros = zeros_per_matrix(rates, [m.params for m in plan])
        records = iter(
            m.model_copy(update={"rate": rate, "zeros": z})
            for m, rate, z in zip(plan, rates, zeros, strict=True)
        )
        self.plan = [[(m, next(records)) for m in block.matrices] for block in modality.blocks]
        self.pruning = any(zeros)
        self._touched: set[int] = set()

    def run(
        self, calibration: Sequence[Batch], evaluation: Sequence[Batch], dense: bool
    ) -> Outcome:
        modality, outcome = self.modality, self.outcome
        blocks = [(block.name, block.module) for block in modality.blocks]
        calibration = calibration if self.pruning else ()
        last = len(blocks) - 1
        with torch.no_grad(), ExitStack() as stack:
            limit = modality.states_limit_bytes()
            lockstep = stack.enter_context(Lockstep(blocks, limit_bytes=limit))
            stack.callback(self._restore)
            calibrating = [lockstep.start(partial(modality.run, b)) for b in calibration]
            evaluating = [lockstep.start(partial(modality.losses, b)) for b in evaluation]
            riding = [
                lockstep.start(partial(modality.losses, b)) for b in (evaluation if dense else ())
            ]
            groups = calibrating, evaluating, riding
            self._pairs = dict(zip(map(id, evaluating), map(id, riding), strict=False))
            while (index := lockstep.lowest([*calibrating, *evaluating, *riding])) is not None:
                standing = [lockstep.standing(group, index) for group in groups]
                self._block(index, *standing, close=index == last)
            outcome.losses = [loss for run in evaluating for loss in run.result]
            outcome.dense_losses = [loss for run in riding for loss in run.result]
            modality.check_untouched(None)
            self._check(len(modality.matrices()))
            self._touched.clear()  # what is kept stays as it is
        passes = 2 if self.pause_at == "block" else 1
        outcome.token_passes = sum(b.tokens for b in calibration) * passes
        outcome.token_passes += sum(b.tokens for b in evaluation) * (2 if dense else 1)
        return outcome

    def _check(self, planned: int) -> None:
        """What a sweep must have given; every matrix was counted when it was pruned."""
        for kind, losses in (
            ("dense" if not self.pruning else "pruned", self.outcome.losses),
            ("dense", self.outcome.dense_losses),
        ):
            if wrong := [loss for loss in losses if not math.isfinite(loss)]:
                raise RuntimeError(f"the loss is {wrong[0]:g}: the {kind} model overflows")
        if self.pruning and len(self.outcome.matrices) != planned:
            raise RuntimeError(f"{len(self.outcome.matrices)} of {planned} matrices were reached")

    def _restore(self) -> None:
        """After a failure too: the next sweep finds the dense model."""
        for index in self._touched:
            self.modality.release_block(index)

    def _block(
        self,
        index: int,
        calibrating: list[Run],
        evaluating: list[Run],
        riding: list[Run],
        *,
        close: bool,
    ) -> None:
        self._touched.add(index)
        self.modality.attach_block(index)
        curve = ErrorCurve(index)
        for run in riding:
            run.resume(Pass(seen=partial(curve.dense, id(run))))
        if self.pruning:
            if self.pause_at == "block":
                self._prune_block(index, calibrating, close)
            else:
                self._prune_products(index, calibrating, close)
        for run in evaluating:
            seen = partial(curve.pruned, self._pairs[id(run)]) if riding else None
            run.resume(Pass(seen=seen))
        if riding:
            self.outcome.errors.append(curve.result())
        self.modality.check_untouched(index)
        if self.keep:
            self.modality.park_block(index)
        else:
            self.modality.release_block(index)
            self._touched.remove(index)

    def _prune_block(self, index: int, calibrating: list[Run], close: bool) -> None:
        """Two passes: all inputs of the dense block first, then its pruned outputs."""
        norms = {matrix: ColumnNorms() for matrix, _ in self.plan[index]}
        for run in calibrating:
            run.resume(Pass(ProductWatcher(norms, _Meter(norms)), again=True))
        for matrix, record in self.plan[index]:
            self._prune(matrix, record, norms[matrix])
        for run in calibrating:
            run.close() if close else run.resume(Pass())

    def _prune_products(self, index: int, calibrating: list[Run], close: bool) -> None:
        """One pass: every matrix is pruned the moment all its inputs are there."""
        norms = {matrix: ColumnNorms() for matrix, _ in self.plan[index]}
        order = {matrix: place for place, (matrix, _) in enumerate(self.plan[index])}
        done: set[Matrix] = set()

        def watch(meter: _Meter, matrix: Matrix, inputs: Tensor) -> None:
            if matrix in done:
                raise UserError(
                    f"{self.modality.blocks[index].name}.{matrix.name} is multiplied again after "
                    "it was pruned: use prune.pause=block"
                )
            meter(matrix, inputs)
            pause(AtProduct(matrix))

        for run in calibrating:
            watcher = ProductWatcher(norms, partial(watch, _Meter(norms)))
            run.resume(Pass(watcher, seen=pause if close else None))
        while waiting := [run for run in calibrating if isinstance(run.place, AtProduct)]:
            matrix = min((run.place.matrix for run in waiting), key=order.__getitem__)
            self._prune(matrix, self.plan[index][order[matrix]][1], norms[matrix])
            done.add(matrix)
            for run in waiting:
                if run.place.matrix is matrix:
                    run.resume(None)
        for matrix, record in self.plan[index]:
            if matrix not in done:
                self._prune(matrix, record, norms[matrix])
        if close:
            for run in calibrating:
                run.close()

    def _prune(self, matrix: Matrix, record: MatrixRecord, norms: ColumnNorms) -> None:
        weight, name = matrix.weight(), f"{self.modality.blocks[record.block].name}.{matrix.name}"
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise RuntimeError(f"{name} holds NaN or infinity")
        if norms.squares is not None and not torch.isfinite(norms.squares.sum()):
            raise RuntimeError(f"the inputs of {name} hold NaN or infinity")
        if not prune_in_place(weight, norms, method=self.method, zeros=record.zeros):
            self.outcome.fallbacks.append(name)
        zeros = int(weight.numel() - weight.count_nonzero())
        if zeros < record.zeros:
            raise RuntimeError(f"{name}: {zeros} zeros instead of {record.zeros}")
        self.outcome.matrices.append(record.model_copy(update={"zeros": zeros}))


class _Meter:
    """Adds inputs to the norms of a matrix; inputs shared by several matrices are read once."""

    def __init__(self, norms: dict[Matrix, ColumnNorms]) -> None:
        self.norms = norms
        self._last: tuple[Any, Tensor] | None = None
        self._shared = ColumnNorms()

    def __call__(self, matrix: Matrix, inputs: Tensor) -> None:
        version = object() if inputs.is_inference() else inputs._version  # never equal, if unknown
        key = (inputs.data_ptr(), inputs.shape, inputs.stride(), version)
        if self._last is None or self._last[0] != key:
            self._shared = ColumnNorms()
            self._shared.add(inputs)
            self._last = (key, inputs)  # holding the tensor keeps its address from being reused
        self.norms[matrix].merge(self._shared)
