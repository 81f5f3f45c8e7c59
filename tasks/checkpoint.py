"""Sparse checkpoints: saved by the model's own library, opened again and compared bit by bit.

    folder, sha256 = save_checkpoint(modality, spec, rates, outcome, evaluation)

A checkpoint is an ordinary one with zeros in it, plus `sparsity.json`: which matrix was pruned at
which rate, how, on what, and the SHA-256 of every file. Where weights were rounded,
`grids.safetensors` holds NAME.widths (uint8, one per row) and NAME.scales (float16, rows x groups)
of every parameter, experts one after another. One that lost whole channels and heads is smaller,
with a `structure.json`; modalities/smaller.py loads it.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from infra.cache import cache_dir, remove_older
from infra.errors import UserError
from infra.records import RecoveryRecord, TrialSpec
from infra.sources import sha256_of

if TYPE_CHECKING:
    from modalities.base import Batch, LoadedModality
    from tasks.sweep import Outcome

SPARSITY_FILE = "sparsity.json"
GRIDS_FILE = "grids.safetensors"


def save_checkpoint(
    modality: LoadedModality,
    spec: TrialSpec,
    rates: Sequence[float],
    outcome: Outcome,
    evaluation: Sequence[Batch],
    recovery: RecoveryRecord | None = None,
) -> tuple[str, dict[str, str]]:
    """Save the pruned model into a folder of its own; returns it and the SHA-256 of each file.

    Raises UserError where it cannot be written, and RuntimeError where the saved model is not the
    pruned one: other weights, other sparsity or another loss on the first evaluated batch.
    """
    folder = cache_dir() / "outbox" / uuid.uuid4().hex
    try:
        remove_older(folder.parent, days=1)  # a driver that lives fetches it long before
        folder.mkdir(parents=True)
        modality.save(folder)
        _save_grids(modality, folder, outcome)
        _verify(modality, folder, outcome, evaluation[0])
        if outcome.removed:
            _make_smaller(modality, spec, folder, outcome, evaluation[0])
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        hashes = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
        facts = {
            "version": 1,
            "model": spec.model.source,
            "modality": spec.model.modality,
            "towers": spec.model.towers,
            "dtype": spec.model.dtype,
            "dense_sha256": modality.weights.sha256,
            "method": spec.prune.method,
            "pattern": spec.prune.pattern,
            "allocation": spec.prune.allocation,
            "pause": spec.prune.pause,
            "sparsity": spec.prune.sparsity,
            "bits": spec.prune.bits,
            "beta": spec.prune.beta,
            "parameters": spec.prune.parameters,
            "block_rates": list(rates),
            "calibration": spec.calibration.model_dump(),
            "data": spec.data.model_dump(mode="json"),
            "evaluation": {"context": spec.context, "report_windows": spec.windows},
            "matrices": [matrix.model_dump() for matrix in outcome.matrices],
            **_recovered(spec, recovery),
            "sha256": hashes,
        }
        (folder / SPARSITY_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot write a checkpoint to {folder.parent}: {reason}") from error
        raise
    return str(folder), hashes | {SPARSITY_FILE: sha256_of(folder / SPARSITY_FILE)}


def _make_smaller(
    modality: LoadedModality, spec: TrialSpec, folder: Path, outcome: Outcome, batch: Batch
) -> None:
    """Leave out what was removed; the smaller model is the masked one up to rounding."""
    import torch

    from infra.structure import is_structured, read_structure, shrink_model
    from modalities.smaller import load_smaller, save_smaller
    from tasks.structure import structure_of

    structure = structure_of(modality, outcome.removed)
    masked = modality.reopen(folder)
    shrink_model(masked.model, structure)
    with torch.no_grad(), masked.streaming():
        losses = masked.losses(batch)
    exact = next(masked.model.parameters()).dtype == torch.float32
    for smaller, pruned in zip(losses, outcome.losses, strict=False):
        if not math.isclose(smaller, pruned, rel_tol=1e-3 if exact else 5e-2, abs_tol=1e-4):
            raise RuntimeError(f"the smaller model gives {smaller}, the masked one {pruned}")
    if is_structured(folder):  # it was smaller already
        structure = read_structure(folder).then(structure)
    save_smaller(masked.model, structure, folder)
    saved = load_smaller(folder, trust_remote_code=spec.model.trust_remote_code)
    for name, parameter in masked.model.named_parameters():
        if not torch.equal(parameter.cpu(), saved.get_parameter(name)):
            raise RuntimeError(f"{name} was saved with other values")


def _recovered(spec: TrialSpec, recovery: RecoveryRecord | None) -> dict[str, Any]:
    """How the model was fine-tuned; of a sparse checkpoint, how that was pruned as well."""
    if spec.recovery is None or recovery is None:
        return {}
    how = spec.recovery.model_dump() | recovery.model_dump(exclude={"losses"})
    facts = Path(spec.model.source, SPARSITY_FILE)
    if spec.prune.sparsity or not facts.is_file():
        return {"recovery": how}
    pruned = json.loads(facts.read_text(encoding="utf-8"))
    kept = set(pruned) - {"version", "modality", "towers", "dtype", "evaluation", "sha256"}
    return {key: pruned[key] for key in kept} | {"recovery": how}


def _save_grids(modality: LoadedModality, folder: Path, outcome: Outcome) -> None:
    import torch
    from safetensors.torch import save_file

    parts: dict[str, list[torch.Tensor]] = {}
    transposed: dict[str, bool] = {}
    for block in modality.blocks:
        for matrix in block.matrices:
            if grid := outcome.grids.get(matrix):
                name = f"{block.name}.{matrix.parameter}"
                transposed[name] = matrix.transposed
                parts.setdefault(f"{name}.widths", []).append(grid.widths.byte().cpu())
                parts.setdefault(f"{name}.scales", []).append(grid.scales.half().cpu())
    if parts:
        tensors = {name: torch.cat(each) for name, each in parts.items()}
        flipped = [name for name, flip in transposed.items() if flip]
        save_file(tensors, folder / GRIDS_FILE, metadata={"transposed": json.dumps(flipped)})


def _verify(modality: LoadedModality, folder: Path, outcome: Outcome, batch: Batch) -> None:
    import torch

    saved = modality.reopen(folder)
    for name, parameter in modality.model.named_parameters():
        if not torch.equal(parameter.cpu(), saved.model.get_parameter(name).cpu()):
            raise RuntimeError(f"{name} was saved with other values")
    blocks = modality.blocks
    for matrix in outcome.matrices:
        block = blocks[matrix.block]
        name, _, expert = matrix.matrix.partition("[")
        weight = saved.model.get_parameter(f"{block.name}.{name}").data
        weight = weight[int(expert.rstrip("]"))] if expert else weight
        zeros = int(weight.numel() - weight.count_nonzero())
        if zeros != matrix.zeros:
            raise RuntimeError(f"{block.name}.{matrix.matrix} was saved with {zeros} zeros")
    with torch.no_grad(), saved.streaming():
        losses = saved.losses(batch)
    if losses != outcome.losses[: len(losses)]:
        raise RuntimeError(f"the saved model gives {losses}, the sweep {outcome.losses}")
