"""What a model is: how it loads, where its blocks are, what calibrates and measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from infra.specs import ModelSpec
    from modalities.base import LoadedModality


def load(spec: ModelSpec, device: torch.device) -> LoadedModality:
    """Load a model with the modality that its spec names."""
    from modalities.language import LanguageModality

    modalities = {"language": LanguageModality}
    return modalities[spec.modality].load(spec, device)
