"""What all checkpoints of transformers have in common: how they are opened, refused and copied.

model = mapped(AutoModelForCausalLM, folder, spec, weights)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from infra.specs import ModelSpec
from infra.structure import is_structured, read_structure, shrink_model
from infra.weights import MappedWeights
from modalities.blocks import Block
from modalities.smaller import load_smaller


def mapped(auto: Any, folder: Path, spec: ModelSpec, weights: MappedWeights) -> Any:
    """A model of a converted folder with real buffers and mapped weights.

    Raises UserError where a parameter has none.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    trust = spec.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, trust_remote_code=trust)
    _prepare(model)
    if is_structured(folder):
        shrink_model(model, read_structure(folder))
    weights.attach(model, "", torch.device("cpu"))
    model.tie_weights()
    if empty := [name for name, p in model.named_parameters() if p.is_meta]:
        raise UserError(f"{spec.source} has no weights for {empty[0]}: fetch it again")
    return model


def reopened(auto: Any, folder: Path, blocks: Sequence[Block]) -> tuple[Any, list[Block]]:
    """A saved model, as any user of transformers would load it, and its blocks."""
    trust = any(folder.glob("*.py"))  # there only after consent
    if is_structured(folder):
        model = load_smaller(folder, trust_remote_code=trust)
    else:
        model = auto.from_pretrained(folder, dtype="auto", trust_remote_code=trust)
    _prepare(model)
    return model, [replace(b, module=model.get_submodule(b.name)) for b in blocks]


def _prepare(model: Any) -> None:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # fused kernels hide the products of experts
    # torch picks other kernels where a weight wants a gradient
    model.eval().requires_grad_(False)


def refuse_incomplete(source: str, missing: Sequence[str], mismatched: Sequence[Any]) -> None:
    """Raise UserError naming a weight that a checkpoint lacks, or that has another shape."""
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights of its model, {missing[0]} first")
    for name, found, wanted in sorted(mismatched):
        raise UserError(
            f"{source}: {name} has shape {list(found)}, its config.json asks for "
            f"{list(wanted)}: fetch both again"
        )


def copy_code(source: Path, folder: Path) -> None:
    """The code that came with a model."""
    for file in source.glob("*.py"):
        shutil.copy(file, folder)
