"""Recovery: a short fine-tune of a pruned model, in place, that keeps every zero a zero.

    record = recover(modality, trial)      # trial.recovery says how

What is trained is what is saved: LoRA's update is masked and rounded in every forward as it is when
it is merged, and full fine-tuning rounds its float32 copies into the model after every step. The
number of zeros is counted per matrix before and after, and must be the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from infra.progress import tell
from infra.records import MatrixRecord, RecoveryRecord, TrialSpec
from infra.recovery_spec import RecoverySpec
from modalities.base import Batch, LoadedModality, Measured, Modality
from tasks.gradients import run_again
from tasks.recovery.full import Full, Trained
from tasks.recovery.states import State
from tasks.recovery.workers import all_sum, from_first, is_first, num_workers, share
from tasks.sweep import joined

LARGEST_NORM = 1.0  # of all gradients together; larger ones are scaled down
BETAS = (0.9, 0.999)


def recover(modality: LoadedModality, trial: TrialSpec, *, divisor: int = 1) -> RecoveryRecord:
    """Fine-tune the model as it stands; its weights keep the values that they end with.

    A trial that was interrupted goes on from its last state, to the same bits. With several
    workers, in torch.distributed, each takes its share of every batch. Raises UserError for what
    cannot be trained, for a loss that is not finite and where a state cannot be written, and
    RuntimeError where the number of zeros changed.
    """
    spec = trial.recovery
    assert spec is not None
    check_recovery(modality, spec)
    windows = modality.training_windows(trial.data, spec)
    order = _order(windows.windows, spec)
    before = counted(modality)
    state = State(_key(modality, trial))
    with (
        modality.resident(whole=True),
        run_again([block.module for block in modality.blocks]),
        _deterministic(modality.device),
        _trained(modality, spec) as trained,
    ):
        optimizer = torch.optim.AdamW(
            trained.tensors, lr=spec.learning_rate, betas=BETAS, weight_decay=0.0
        )
        found = state.restore(trained.tensors, optimizer) if is_first() else (0, [], 0.0)
        begun, losses, earlier_s = from_first(found, trained.tensors, optimizer)
        trained.settle()
        started = time.perf_counter()

        def how_far(step: int) -> None:
            if is_first():
                tell(
                    always=step in (begun, spec.steps),
                    trial=trial.number,
                    begun=begun,
                    step=step,
                    steps=spec.steps,
                    loss=losses[-1] if losses else None,
                    seconds=time.perf_counter() - started,
                )

        how_far(begun)
        for step in range(begun, spec.steps):
            batch = windows.pick(order[step * spec.batch : (step + 1) * spec.batch])
            losses.append(_step(modality, trained, batch, divisor))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"recovery: the loss of step {step} is {losses[-1]:g}: set a smaller "
                    "recovery.learning_rate"
                )
            torch.nn.utils.clip_grad_norm_(trained.tensors, LARGEST_NORM)
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * rate_at(step, spec.steps)
            optimizer.step()
            optimizer.zero_grad()
            trained.settle()
            if (step + 1) % spec.save_every == 0 and step + 1 < spec.steps and is_first():
                seconds = earlier_s + time.perf_counter() - started
                state.save(trained.tensors, optimizer, losses, seconds)
            how_far(step + 1)
        seconds = earlier_s + time.perf_counter() - started
        num_trained = sum(tensor.numel() for tensor in trained.tensors)
        if spec.method == "full":
            num_trained -= sum(matrix.zeros for matrix in before)
    after = counted(modality)
    for old, new in zip(before, after, strict=True):
        if old.zeros != new.zeros:
            name = f"{modality.blocks[old.block].name}.{old.matrix}"
            raise RuntimeError(f"{name} had {old.zeros} zeros and has {new.zeros} after recovery")
    return RecoveryRecord(
        method=spec.method,
        steps=spec.steps,
        tokens=spec.steps * spec.batch * (windows.tokens // windows.windows),
        trained_params=num_trained,
        zeros_before=sum(matrix.zeros for matrix in before),
        zeros_after=sum(matrix.zeros for matrix in after),
        losses=losses,
        seconds=seconds,
    )


def forget(modality: LoadedModality, trial: TrialSpec) -> None:
    """Remove the state of a fine-tune, once its weights are kept elsewhere or not wanted."""
    if is_first():
        State(_key(modality, trial)).remove()


def check_recovery(modality: Modality, spec: RecoverySpec) -> None:
    """Raise UserError where the method cannot train the model's matrices."""
    if spec.method == "lora":
        from tasks.recovery.lora import refuse_other_layers

        refuse_other_layers(modality)
    if spec.workers > spec.batch:
        raise UserError(
            f"recovery.workers={spec.workers} share a batch of {spec.batch}: set a larger "
            "recovery.batch"
        )


def counted(modality: Modality) -> list[MatrixRecord]:
    """Every matrix with the zeros that it holds."""
    matrices = [matrix for block in modality.blocks for matrix in block.matrices]
    found = []
    for record, matrix in zip(modality.matrices(), matrices, strict=True):
        zeros = record.params - int(matrix.weight().count_nonzero())
        found.append(record.model_copy(update={"zeros": zeros, "rate": zeros / record.params}))
    return found


def measured_again(modality: Modality, evaluation: Sequence[Batch]) -> Measured:
    """What a plain loop measures of the model as it stands."""
    with torch.no_grad(), modality.resident():
        return joined([modality.measure(batch) for batch in evaluation])


def rate_at(step: int, steps: int) -> float:
    """The learning rate over its highest: a tenth of the steps warm up, a cosine follows."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _step(modality: LoadedModality, trained: Trained, batch: Batch, divisor: int) -> float:
    """Gradients of the mean loss of a batch, in as many forwards as memory asks for; the loss."""
    scored = modality.num_scored(batch)
    rows = max(1, modality.num_together(batch) // divisor)
    mine = batch.pick(share(batch.windows))
    total = torch.zeros((), dtype=torch.float64, device=modality.device)
    for first in range(0, mine.windows, rows):
        part = mine.pick(range(first, min(first + rows, mine.windows)))
        loss = modality.training_loss(part) / scored
        loss.backward()
        total += loss.detach()
    trained.check_gradients()
    all_sum([total, *(_gradient(tensor) for tensor in trained.tensors)])
    return float(total)


def _gradient(tensor: Tensor) -> Tensor:
    """Of an expert that no token reached it is zero."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def _trained(modality: Modality, spec: RecoverySpec) -> Any:
    """A context that makes the model trainable, and leaves it trained and frozen."""
    if spec.method == "full":
        return Full(modality)
    from tasks.recovery.lora import Lora  # with peft, which takes a second

    return Lora(modality, spec)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Inside, GPU kernels that add up in any order are replaced; those of CPUs do not."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _order(num_windows: int, spec: RecoverySpec) -> list[int]:
    """The number of the window at every place of every batch: each once, then each again."""
    places = spec.steps * spec.batch
    order: list[int] = []
    while len(order) < places:
        epoch = list(range(num_windows))
        random.Random(f"{spec.seed} {len(order)}").shuffle(epoch)
        order += epoch
    return order[:places]


def _key(modality: LoadedModality, trial: TrialSpec) -> str:
    """The same for whatever ends with the same weights."""
    assert trial.recovery is not None
    fields = ("model", "data", "calibration", "prune", "profile")
    decides = trial.model_dump(mode="json", include=set(fields))
    decides |= {"recovery": trial.recovery.replayable(), "weights": modality.weights.sha256}
    decides |= {"device": str(modality.device), "workers": num_workers()}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
