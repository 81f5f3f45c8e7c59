"""A trial: one plain function of a frozen spec, from weights on disk to a measured result.

    result = run_trial(TrialSpec(number=0, stage="search", ...))

It knows nothing of Ray, Optuna or MLflow. The model stays in the process for the next trial of
the same model; the weights are mapped, so that what one trial pruned is dense again in the next.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from typing import TYPE_CHECKING

from infra.records import Cost, ModelRecord, TrialResult, TrialSpec
from infra.specs import ModelSpec
from tasks.allocation import block_rates, tilt

if TYPE_CHECKING:
    import torch

    from modalities.base import Modality

_loaded: dict[tuple[ModelSpec, str], Modality] = {}  # at most one: a worker serves one model


def run_trial(spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult:
    """Prune at the rates of `spec.prune` and measure on `spec.split`.

    Raises UserError for what the user can put right and RuntimeError where the sweep's own
    assertions fail; nothing is written but a checkpoint, where one is asked for.
    """
    started = time.perf_counter()
    from tasks.checkpoint import save_checkpoint
    from tasks.sweep import sweep

    modality = loaded(spec.model)
    params = modality.record(spec.model.source).block_params()
    rates = [0.0] * len(params) if spec.stage == "dense" else block_rates(spec.prune, params)
    calibration = modality.calibration_batches(
        spec.data, spec.calibration, divisor=batch_divisor
    )
    evaluation = modality.evaluation_batches(
        spec.data, spec.split, spec.windows, spec.context, divisor=batch_divisor
    )
    if spec.stage == "dense":
        check_against_plain(modality, spec)
    ready = time.perf_counter()
    outcome = sweep(
        modality,
        rates,
        method=spec.prune.method,
        pause_at=spec.prune.pause,
        calibration=calibration,
        evaluation=evaluation,
        dense=spec.error_curves,
        keep=spec.checkpoint,
    )
    swept = time.perf_counter()
    where, hashes = ("", {})
    if spec.checkpoint:
        try:
            where, hashes = save_checkpoint(modality, spec, rates, outcome, evaluation)
        finally:
            for index in range(len(modality.blocks)):
                modality.release_block(index)
    return TrialResult(
        spec=spec,
        state="complete",
        tilt=tilt(spec.prune.beta, params, spec.prune.sparsity),
        losses=outcome.losses,
        dense_losses=outcome.dense_losses,
        tokens=[n for batch in evaluation for n in modality.scored_tokens(batch)],
        bytes=[n for batch in evaluation for n in batch.bytes],
        block_rates=rates,
        matrices=outcome.matrices,
        fallbacks=outcome.fallbacks,
        errors=outcome.errors,
        cost=Cost(
            load_s=ready - started,
            sweep_s=swept - ready,
            total_s=time.perf_counter() - started,
            token_passes=outcome.token_passes,
            peak_memory_bytes=_peak_memory(modality.device),
        ),
        host=socket.gethostname(),
        device=_device_name(modality.device),
        checkpoint=where,
        checkpoint_sha256=hashes,
    )


def describe_model(spec: ModelSpec) -> ModelRecord:
    """Load a model and say what it is made of."""
    return loaded(spec).record(spec.source)


def loaded(spec: ModelSpec) -> Modality:
    """The model, from this process's memory where it is there."""
    import torch

    from modalities import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = (spec, str(device))
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load(spec, device)
    return _loaded[key]


def check_against_plain(modality: Modality, spec: TrialSpec) -> None:
    """Compare the sweep's dense loss with a plain loop over the same windows.

    Raises RuntimeError where they differ in a single bit.
    """
    import torch

    from tasks.sweep import sweep

    batches = modality.evaluation_batches(spec.data, spec.split, 2, spec.context)
    for index in range(len(modality.blocks)):
        modality.attach_block(index)
    with torch.no_grad():
        plain = [loss for batch in batches for loss in modality.losses(batch)]
    for index in range(len(modality.blocks)):
        modality.release_block(index)
    rates = [0.0] * len(modality.blocks)
    swept = sweep(
        modality, rates, method="magnitude", pause_at="linear", calibration=(), evaluation=batches
    )
    if swept.losses != plain:
        raise RuntimeError(f"lockstep gives a dense loss of {swept.losses}, a plain loop {plain}")


def _peak_memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
