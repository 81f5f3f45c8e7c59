"""What a model is: how it loads, where its blocks are, what calibrates and measures it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from infra.specs import ModelSpec
    from modalities.base import LoadedModality

MODALITIES = {
    "language": ("modalities.language", "LanguageModality"),
    "vision": ("modalities.vision", "VisionModality"),
    "multimodal": ("modalities.multimodal", "MultimodalModality"),
}


def load(spec: ModelSpec, device: torch.device) -> LoadedModality:
    """Load a model with the modality that its spec names."""
    module, name = MODALITIES[spec.modality]
    chosen: type[LoadedModality] = getattr(import_module(module), name)
    return chosen.load(spec, device)
