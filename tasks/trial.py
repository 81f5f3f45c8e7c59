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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from infra.cache import let_go
from infra.documents import Split, data_sha256
from infra.errors import UserError
from infra.records import (
    PASSES,
    SHOWN,
    Cost,
    ModelAnswer,
    ModelQuestion,
    ModelRecord,
    TrialResult,
    TrialSpec,
)
from infra.specs import ModelSpec
from tasks.allocation import block_rates, check_rates, measure_rates, plan_of, tilt_of
from tasks.methods import method_named

if TYPE_CHECKING:
    import torch

    from modalities.base import Batch, LoadedModality, Measured

_loaded: dict[tuple[str, str], LoadedModality] = {}  # at most one: a worker serves one model


def run_trial(spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult:
    """Prune at the rates of `spec.prune` and measure on `spec.split`.

    Raises UserError for what the user can put right and RuntimeError where the sweep's own
    assertions fail; nothing is written but a checkpoint, where one is asked for. A ModelQuestion
    is answered by a ModelAnswer.
    """
    if isinstance(spec, ModelQuestion):
        return _answer(spec, batch_divisor)
    started = time.perf_counter()
    from tasks.checkpoint import save_checkpoint
    from tasks.recovery import counted, forget, measured_again, recover
    from tasks.structure import counts_of
    from tasks.sweep import sweep
    from tasks.zero_shot import check_tasks, zero_shot

    before = list(_loaded)
    modality = loaded(spec.model)
    if spec.tasks:
        check_tasks(modality, **_asked_of_tasks(spec))  # before the sweep, which takes longer
    _reset_peak_memory(modality.device)
    matrices = modality.matrices()
    plan = plan_of(spec.prune, matrices, spec.profile)
    calibration = []
    if any(plan.rates) or spec.prune.bits:
        calibration = modality.calibration_batches(
            spec.data, spec.calibration, divisor=batch_divisor
        )
    evaluation = modality.evaluation_batches(
        spec.data, spec.split, spec.windows, spec.context, divisor=batch_divisor
    )
    keep = spec.checkpoint or bool(spec.tasks) or spec.recovery is not None
    ready = time.perf_counter()
    outcome = sweep(
        modality,
        plan.rates,
        method=spec.prune.method,
        pattern=spec.prune.pattern,
        bits=spec.prune.bits,
        pause_at=spec.prune.pause,
        calibration=calibration,
        evaluation=evaluation,
        dense=spec.error_curves,
        keep=keep,
    )
    swept = time.perf_counter()
    if spec.recovery and not outcome.matrices:
        outcome.matrices = counted(modality)  # of a checkpoint that is pruned already
    pruned = outcome.matrices or matrices  # none where nothing was to be pruned
    per_block = block_rates(pruned, [matrix.rate for matrix in pruned], len(modality.blocks))
    where, hashes = "", dict[str, str]()
    scores, dense_scores = outcome.measured.scores, outcome.dense.scores
    saved, recovery, recovered_scores = outcome, None, dict[str, list[float]]()
    measure_tasks = partial(
        zero_shot, modality, **_asked_of_tasks(spec), batch_divisor=batch_divisor
    )
    try:
        if spec.tasks:
            scores = scores | measure_tasks()
        if spec.recovery:
            recovery = recover(modality, spec, divisor=batch_divisor)
            after = measured_again(modality, evaluation)
            recovered_scores = after.scores | (measure_tasks() if spec.tasks else {})
            saved = replace(outcome, measured=after)
        if spec.checkpoint:
            kept = (per_block, saved, evaluation, recovery)
            where, hashes = save_checkpoint(modality, spec, *kept)
        if spec.recovery:
            forget(modality, spec)
        if spec.tasks and spec.error_curves and spec.prune.is_uniform:  # once is enough
            _make_dense(modality)
            dense_scores = dense_scores | measure_tasks()
    finally:
        if keep:
            _make_dense(modality)
    return TrialResult(
        spec=spec,
        state="complete",
        tilt=tilt_of(spec.prune, matrices),
        losses=outcome.losses,
        dense_losses=outcome.dense_losses,
        scores=scores,
        dense_scores=dense_scores,
        recovered_losses=saved.losses if recovery else [],
        recovered_scores=recovered_scores,
        recovery=recovery,
        answers=outcome.measured.answers[:SHOWN],
        dense_answers=outcome.dense.answers[:SHOWN],
        expected=outcome.measured.expected[:SHOWN],
        tokens=[n for batch in evaluation for n in modality.scored_tokens(batch)],
        bytes=[n for batch in evaluation for n in batch.bytes],
        block_rates=per_block,
        clamped=plan.clamped,
        matrices=outcome.matrices,
        fallbacks=outcome.fallbacks,
        notes=outcome.notes,
        errors=outcome.errors,
        removed=counts_of(outcome.removed),
        weights_sha256=modality.weights.sha256,
        cost=Cost(
            cold=list(_loaded) != before,
            load_s=ready - started,
            sweep_s=swept - ready,
            total_s=time.perf_counter() - started,
            token_passes=outcome.token_passes + PASSES * (recovery.tokens if recovery else 0),
            peak_memory_bytes=_peak_memory(modality.device),
        ),
        host=socket.gethostname(),
        device=device_name(modality.device),
        checkpoint=where,
        checkpoint_sha256=hashes,
    )


def describe_model(trials: Sequence[TrialSpec], *, batch_divisor: int = 1) -> ModelRecord:
    """Load the model and the text of some trials, and say what the model is made of.

    Raises UserError where a trial could not run, and RuntimeError where the dense loss of a sweep
    differs from a plain loop's in a single bit.
    """
    from tasks.asked import asked_of
    from tasks.zero_shot import check_tasks

    first = trials[0]
    method_named(first.prune.method)
    modality = loaded(first.model)
    scores: dict[str, None] = {}
    for trial in reversed(trials):  # what asks for most text is refused first, with its full size
        rates = check_rates(trial.prune, modality.matrices())
        asked = trial.prune.model_dump(include={"method", "pattern", "bits"})
        asked_of(modality, rates, **asked)
        modality.calibration_batches(trial.data, trial.calibration)
        modality.evaluation_batches(trial.data, trial.split, trial.windows, trial.context)
        if trial.recovery:
            refuse_unrecoverable(trial)
        if trial.tasks:
            scores |= dict.fromkeys(check_tasks(modality, **_asked_of_tasks(trial)))
    batches = modality.evaluation_batches(
        first.data, first.split, first.windows, first.context, divisor=batch_divisor
    )
    dense = _dense_loss(modality, batches[0])
    splits: tuple[Split, ...] = ("calibration", "selection", "report")
    return modality.record(first.model.source).model_copy(
        update={
            "dense_loss": sum(dense.losses) / len(dense.losses),
            "scores": [*dense.scores, *scores],
            "data_sha256": {s: data_sha256(first.model.modality, first.data, s) for s in splits},
        }
    )


def measure_profile(spec: TrialSpec, *, batch_divisor: int = 1) -> list[float]:
    """What the trial's allocation measures, once for all trials that differ in its numbers only.

    One number per matrix for `TrialSpec.profile`, [] for an allocation that measures nothing.
    """
    modality = loaded(spec.model)
    return measure_rates(
        modality,
        spec.prune,
        lambda: modality.calibration_batches(spec.data, spec.calibration, divisor=batch_divisor),
    )


def time_dense(spec: TrialSpec, *, batch_divisor: int = 1) -> tuple[int, float]:
    """Tokens and seconds of a dense evaluation, the head included: what a token pass costs here."""
    dense = spec.prune.model_copy(
        update={"sparsity": 0.0, "bits": 0, "allocation": "uniform", "beta": 0.0, "parameters": {}}
    )
    alone = spec.model_copy(update={"prune": dense, "tasks": [], "recovery": None})
    result = run_trial(alone, batch_divisor=batch_divisor)
    return sum(result.tokens), result.cost.sweep_s


def _answer(question: ModelQuestion, batch_divisor: int) -> ModelAnswer:
    answer = ModelAnswer(spec=question, state="complete")
    try:
        if question.sizes:
            found = describe_model(question.sizes, batch_divisor=batch_divisor)
            return answer.model_copy(update={"model": found})
        measured = measure_profile(question, batch_divisor=batch_divisor)
        return answer.model_copy(update={"measured": measured})
    except UserError as error:
        return answer.model_copy(update={"state": "failed", "cause": str(error)})


def loaded(spec: ModelSpec) -> LoadedModality:
    """The model, from this process's memory where it is there."""
    import torch

    from modalities import load
    from modalities.base import resolve_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(resolve_dtype(spec.dtype, device)).removeprefix("torch.")
    key = (spec.model_copy(update={"dtype": dtype}).model_dump_json(), str(device))
    if key not in _loaded:
        _loaded.clear()
        let_go()
        _loaded[key] = load(spec, device)
    return _loaded[key]


def refuse_unrecoverable(spec: TrialSpec) -> str:
    """Raise UserError where a recovery could not begin; else what its loss is the mean of."""
    from tasks.recovery import check_recovery

    modality = loaded(spec.model)
    if spec.recovery:
        check_recovery(modality, spec.recovery)
        modality.training_windows(spec.data, spec.recovery)
    modality.evaluation_batches(spec.data, spec.split, spec.windows, spec.context)
    return modality.record(spec.model.source).unit


def _asked_of_tasks(spec: TrialSpec) -> dict[str, Any]:
    """The first rows of a task are reported, so a selection uses those after them."""
    skip = spec.task_rows if spec.split == "selection" else 0
    return {"tasks": spec.tasks, "rows": spec.task_rows, "skip": skip, "data": spec.task_data}


def _make_dense(modality: LoadedModality) -> None:
    for index in range(len(modality.blocks)):
        modality.release_block(index)


def _dense_loss(modality: LoadedModality, batch: Batch) -> Measured:
    import torch

    from tasks.sweep import sweep

    with torch.no_grad(), modality.streaming():
        plain = modality.measure(batch)
    swept = sweep(
        modality,
        [0.0] * len(modality.matrices()),
        method="magnitude",
        pause_at="linear",
        calibration=(),
        evaluation=[batch],
    ).losses
    if swept != plain.losses:
        raise RuntimeError(f"lockstep gives a dense loss of {swept}, a plain loop {plain.losses}")
    return plain


def _reset_peak_memory(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """The GPU, or the threads of the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
