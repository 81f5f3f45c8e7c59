"""The lockstep sweep: one pass over the weights prunes a model and evaluates it.

    outcome = sweep(modality, rates, method="wanda", pause_at="linear",
                    calibration=calibration_batches, evaluation=evaluation_batches)
    outcome.losses

All batches wait for each other at every block. There the dense copies pass first, the calibration
batches show the block its inputs, its matrices are pruned, and everything else goes through the
pruned block once; where dense copies ride along, it has been through the dense block before, which
tells what the block makes of its error from what it carries. A block's weights are on the device
only while batches stand at it.
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
from modalities.base import Batch, Measured, Modality
from modalities.products import Matrix, ProductWatcher
from modalities.units import Units
from tasks.asked import Asked, asked_of
from tasks.errors import ErrorCurve
from tasks.gradients import matrix_gradients
from tasks.lockstep import Lockstep, Pass, Run, pause
from tasks.meter import Meter, identity
from tasks.pruning import prune_in_place, remove_in_place
from tasks.pruning.grids import Grid
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import UNSTRUCTURED
from tasks.structure import UnitBudget


@dataclass
class Outcome:
    """What a sweep gives: what was measured of each window, and what became of every matrix."""

    measured: Measured = field(default_factory=lambda: Measured([]))
    dense: Measured = field(default_factory=lambda: Measured([]))
    matrices: list[MatrixRecord] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[BlockError] = field(default_factory=list)
    removed: list[tuple[Units, Tensor]] = field(default_factory=list)  # of each, the mask that went
    grids: dict[Matrix, Grid] = field(default_factory=dict)  # of rounded matrices that are kept
    token_passes: int = 0

    @property
    def losses(self) -> list[float]:
        """Of the pruned model, one per window."""
        return self.measured.losses

    @property
    def dense_losses(self) -> list[float]:
        """The same of the dense model, where it rode along."""
        return self.dense.losses


@dataclass(frozen=True, eq=False)
class AtProduct:
    """A calibration run stands before the product of a matrix with `inputs`, tokens x in."""

    matrix: Matrix
    inputs: Tensor


def sweep(
    modality: Modality,
    rates: Sequence[float],
    *,
    method: str,
    pattern: str = UNSTRUCTURED,
    bits: float = 0,
    pause_at: Literal["block", "linear"],
    calibration: Sequence[Batch],
    evaluation: Sequence[Batch],
    dense: bool = False,
    keep: bool = False,
) -> Outcome:
    """Prune the matrices at one rate each, as modality.matrices() orders them, and evaluate.

    `pattern` is unstructured, N:M for N of every M kept, N:8 for one N per block by its rate, or
    structured for whole channels and heads.
    What stays of a matrix is rounded to `bits` per weight; rtn and gptq, which remove nothing, take
    them from the rates (infra.bits.bits_of) wherever bits are given.
    `dense` lets a dense copy of the evaluation ride along, for its losses and the error of every
    block. `keep` leaves the pruned weights in the model; otherwise each block is dense again as
    soon as all batches have passed it. Raises RuntimeError where the result is not what was asked
    for: a wrong number of zeros or bits, something changed that is not prunable, a loss that is not
    finite.
    """
    asked = asked_of(modality, rates, method=method, pattern=pattern, bits=bits)
    return _Sweep(modality, asked, method, pause_at, keep).run(calibration, evaluation, dense)


class _Sweep:
    def __init__(
        self, modality: Modality, asked: Asked, method: str, pause_at: str, keep: bool
    ) -> None:
        self.modality, self.method, self.pause_at, self.keep = modality, method, pause_at, keep
        self.asked, self.needs, self.pruning = asked, asked.needs, asked.changes
        watched = asked.watched
        self.plan = [[m for m in block.matrices if m in watched] for block in modality.blocks]
        self.outcome = Outcome(matrices=asked.untouched())
        self.gradients: dict[Matrix, Tensor] = {}
        self._touched: set[int] = set()

    def run(
        self, calibration: Sequence[Batch], evaluation: Sequence[Batch], dense: bool
    ) -> Outcome:
        modality, outcome = self.modality, self.outcome
        blocks = [(block.name, block.module) for block in modality.blocks]
        calibration = calibration if self.pruning else ()
        if self.pruning and "gradient" in self.needs:
            self.gradients = matrix_gradients(modality, calibration)
        last = len(blocks) - 1
        with torch.no_grad(), ExitStack() as stack:
            limit = modality.states_limit_bytes()
            lockstep = stack.enter_context(Lockstep(blocks, limit_bytes=limit))
            stack.callback(self._restore)
            calibrating = [lockstep.start(partial(modality.run, b)) for b in calibration]
            evaluating = [lockstep.start(partial(modality.measure, b)) for b in evaluation]
            riding = [
                lockstep.start(partial(modality.measure, b)) for b in (evaluation if dense else ())
            ]
            groups = calibrating, evaluating, riding
            self._lockstep = lockstep
            self._pairs = dict(zip(map(id, evaluating), map(id, riding), strict=False))
            while (index := lockstep.lowest([*calibrating, *evaluating, *riding])) is not None:
                standing = [lockstep.standing(group, index) for group in groups]
                self._block(index, *standing, close=index == last)
            outcome.measured = joined([run.result for run in evaluating])
            outcome.dense = joined([run.result for run in riding])
            modality.check_untouched(None)
            self._check(len(modality.matrices()))
            self._touched.clear()  # what is kept stays as it is
        passes = 2 if self.pause_at == "block" else 1
        passes += 4 if "gradient" in self.needs else 0  # two forwards; a backward is about two more
        outcome.token_passes = sum(b.tokens for b in calibration) * passes
        passes = (3 if self.pruning else 2) if dense else 1
        outcome.token_passes += sum(b.tokens for b in evaluation) * passes
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
        self.asked.check_bits()

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
        room = self._lockstep.limit_bytes - self._lockstep.held_bytes
        curve = ErrorCurve(index, limit_bytes=room)
        for run in riding:
            run.resume(Pass(seen=partial(curve.dense, id(run))))
        if self.pruning:
            for run in evaluating if riding else ():
                carried = partial(curve.carried, self._pairs[id(run)])
                run.resume(Pass(again=True, apart=True, seen=carried))
            if self.pause_at == "block":
                self._prune_block(index, calibrating, close)
            else:
                self._prune_products(index, calibrating, close)
        for run in evaluating:
            seen = partial(curve.pruned, self._pairs[id(run)]) if riding else None
            run.resume(Pass(seen=seen))
        if riding:
            before = self.outcome.errors[-1].absolute if self.outcome.errors else 0.0
            self.outcome.errors.append(curve.result(before))
        self.modality.check_untouched(index)
        if self.keep:
            self.modality.park_block(index)
        else:
            self.modality.release_block(index)
            self._touched.remove(index)

    def _prune_block(self, index: int, calibrating: list[Run], close: bool) -> None:
        """Two passes: all inputs of the dense block first, then its pruned outputs."""
        meter, matrices = Meter(self.needs), self.plan[index]
        for run in calibrating:
            run.resume(Pass(ProductWatcher(matrices, meter), again=True))
            meter.close()
        measured = meter.result(matrices)
        for matrix in matrices:
            self._prune(matrix, measured.pop(matrix))  # freed with its last user
        for run in calibrating:
            run.close() if close else run.resume(Pass())

    def _prune_products(self, index: int, calibrating: list[Run], close: bool) -> None:
        """One pass: every matrix is pruned the moment all its inputs are there."""
        measured, keys = InputStatistics(self.needs), list[Any]()
        order = {matrix: place for place, matrix in enumerate(self.plan[index])}
        done: set[Matrix] = set()

        def watch(matrix: Matrix, inputs: Tensor) -> None:
            if matrix in done:
                raise UserError(
                    f"{self.modality.blocks[index].name}.{matrix.name} is multiplied again after "
                    "it was pruned: use prune.pause=block"
                )
            pause(AtProduct(matrix, inputs))

        for run in calibrating:
            run.resume(Pass(ProductWatcher(order, watch), seen=pause if close else None))
        while waiting := [run for run in calibrating if isinstance(run.place, AtProduct)]:
            matrix = min((run.place.matrix for run in waiting), key=order.__getitem__)
            here = [run for run in waiting if run.place.matrix is matrix]
            inputs = [run.place.inputs for run in here]
            if (new := [identity(each) for each in inputs]) != keys:
                keys, measured, held = new, InputStatistics(self.needs), inputs
                for each in held:  # kept until then, so that no other tensor gets their address
                    measured.add(each)
            self._prune(matrix, measured)
            done.add(matrix)
            for run in here:
                run.resume(None)
        for matrix in self.plan[index]:
            if matrix not in done:
                self._prune(matrix, InputStatistics(self.needs))
        if close:
            for run in calibrating:
                run.close()

    def _prune(self, matrix: Matrix, inputs: InputStatistics) -> None:
        weight, record = matrix.weight(), self.asked.records[matrix]
        name = f"{self.modality.blocks[record.block].name}.{matrix.name}"
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise RuntimeError(f"{name} holds NaN or infinity")
        if matrix in self.gradients:
            inputs.gradient = self.gradients.pop(matrix).to(weight.device)
        if not inputs.are_finite:
            raise RuntimeError(f"the inputs of {name} hold NaN or infinity, or its gradients do")
        if matrix in self.asked.removals:
            self._remove(self.asked.removals[matrix], inputs)
        else:
            budget = self.asked.budgets[matrix]
            prune_in_place(weight, inputs, method=self.method, budget=budget)
            zeros, realised = int(weight.numel() - weight.count_nonzero()), 0.0
            if zeros < budget.zeros:
                raise RuntimeError(f"{name}: {zeros} zeros instead of {budget.zeros}")
            if grid := budget.grid:
                if not grid.holds(weight):
                    raise RuntimeError(f"{name}: weights that are not of {grid.asked}")
                realised = grid.bits / weight.numel()
                if self.keep:
                    self.outcome.grids[matrix] = grid
            update = {"zeros": zeros, "bits": realised}
            self.outcome.matrices.append(record.model_copy(update=update))
        if not inputs.measured:
            self.outcome.fallbacks.append(name)
        elif inputs.note:
            self.outcome.notes.append(f"{name}: {inputs.note}")

    def _remove(self, budget: UnitBudget, inputs: InputStatistics) -> None:
        """Whole units: the columns that use them, and the rows that make them."""
        units = budget.units
        weight = units.consumer.weight()
        gone = remove_in_place(
            weight, inputs, method=self.method, count=units.count, goes=budget.goes
        )
        lost = {units.consumer: units.columns(gone)}
        for producer in units.producers:
            lost[producer.matrix] = producer.rows(gone)
            producer.matrix.weight()[lost[producer.matrix]] = 0
        for matrix, mask in lost.items():
            weight = matrix.weight()
            zeros = int(weight.numel() - weight.count_nonzero())
            update = {"zeros": zeros, "rate": float(mask.float().mean())}
            self.outcome.matrices.append(self.asked.records[matrix].model_copy(update=update))
        self.outcome.removed.append((units, gone))


def joined(measured: Sequence[Measured]) -> Measured:
    """What was measured of all batches, in their order."""
    names = measured[0].scores if measured else ()
    return Measured(
        [loss for each in measured for loss in each.losses],
        {name: [score for each in measured for score in each.scores[name]] for name in names},
        [answer for each in measured for answer in each.answers],
        [answer for each in measured for answer in each.expected],
    )
