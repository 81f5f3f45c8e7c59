"""Checkpoints of vision-language models: converted once, with what transformers needs beside them.

    folder = convert(ModelSpec(source="path/to/llava", modality="multimodal"), torch.bfloat16)
    folder = convert(spec, torch.float32)
    processor = processor_of(folder)

A checkpoint may leave out a part of the model and name the source of it in `parts.json`:
{"model.language_model": "org/name"} takes the weights of that language model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.checkpoints import CheckpointLayout, inspect_checkpoint
from infra.errors import UserError, first_line
from infra.sources import fetch
from infra.specs import ModelSpec
from infra.structure import is_structured
from infra.weights import save_mapped
from modalities.converted import WEIGHTS, convert_once, stated_licence
from modalities.pretrained import copy_code, refuse_incomplete

_FORMAT = 1  # of a converted checkpoint; a change makes all of them anew
_PARTS = "parts.json"
_UNLOADABLE = (OSError, ValueError, LookupError, RuntimeError, ImportError)


def convert(spec: ModelSpec, dtype: torch.dtype) -> Path:
    """The folder of a converted checkpoint; made once per node."""
    layout = inspect_checkpoint(
        fetch(spec.source, allow_pickle=spec.allow_pickle),
        allow_pickle=spec.allow_pickle,
        trust_remote_code=spec.trust_remote_code,
    )
    if layout.gguf:
        raise UserError(f"{spec.source} is GGUF, which holds no images: name a checkpoint")
    other = fetch(spec.tokenizer, "tokenizer") if spec.tokenizer else None
    stamp = CheckpointLayout(other).stamp() if other else []
    key = ["multimodal", _FORMAT, str(dtype), layout.stamp(), stamp, spec.trust_remote_code]
    return convert_once(
        spec.source,
        key,
        lambda folder: _convert(spec, layout, other or layout.folder, dtype, folder),
        licence=stated_licence(layout.folder),
    )


def _convert(
    spec: ModelSpec, layout: CheckpointLayout, processor: Path, dtype: torch.dtype, folder: Path
) -> None:
    from transformers import AutoConfig, logging

    logging.disable_progress_bar()
    trust = spec.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(layout.folder, trust_remote_code=trust)
        auto = auto_class(config, spec.source)
        model, info = auto.from_pretrained(
            layout.folder,
            output_loading_info=True,
            dtype=dtype,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # they are named below
            use_safetensors=not layout.pickle,
        )
    except _UNLOADABLE as error:
        raise UserError(f"cannot load {spec.source}: {first_line(error)}") from error
    missing = _filled(model, layout.folder, sorted(info["missing_keys"]), dtype)
    refuse_incomplete(spec.source, missing, info["mismatched_keys"])
    try:
        made = processor_of(processor, trust=trust)
    except _UNLOADABLE as error:
        raise UserError(
            f"cannot load the processor of {spec.tokenizer or spec.source}: {first_line(error)}"
        ) from error
    save_mapped(model, folder / WEIGHTS)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    made.save_pretrained(folder)
    if trust:
        copy_code(layout.folder, folder)


def _filled(model: nn.Module, folder: Path, lost: list[str], dtype: torch.dtype) -> list[str]:
    """Load the parts that are another model's; what is missing then."""
    from modalities.language import LanguageModality

    parts = json.loads((folder / _PARTS).read_text()) if (folder / _PARTS).is_file() else {}
    for name, source in parts.items():
        cpu = torch.device("cpu")
        kind: Any = str(dtype).removeprefix("torch.")
        loaded: Any = LanguageModality.load(ModelSpec(source=source, dtype=kind), cpu)
        if is_structured(loaded.weights.path.parent):
            raise UserError(f"{folder / _PARTS}: {source} lacks channels or heads")
        other = loaded.model
        place = model.get_submodule(name)
        state = {n: t.clone() for n, t in other.base_model.state_dict().items()}
        place.load_state_dict(state, assign=True)
        if "lm_head.weight" in lost:
            head = other.get_output_embeddings().weight
            model.get_output_embeddings().weight.data = head.data.clone()  # type: ignore[operator]
        model.tie_weights()  # type: ignore[operator]
        lost = [
            each for each in lost if not each.startswith(f"{name}.") and each != "lm_head.weight"
        ]
    return lost


def auto_class(config: Any, source: str) -> Any:
    """What opens a model of this configuration; UserError where it is not of images and text."""
    from transformers import AutoModelForImageTextToText, AutoModelForZeroShotImageClassification

    if matches(config):
        return AutoModelForZeroShotImageClassification
    kinds: Any = AutoModelForImageTextToText._model_mapping
    if type(config) in kinds or hasattr(config, "auto_map"):
        return AutoModelForImageTextToText
    raise UserError(
        f"{source} ({config.model_type}) is no model of images and text: set model.modality"
    )


def matches(config: Any) -> bool:
    """Whether the model says how well a text fits an image, and writes none."""
    from transformers import AutoModelForImageTextToText, AutoModelForZeroShotImageClassification

    writing: Any = AutoModelForImageTextToText._model_mapping
    matching: Any = AutoModelForZeroShotImageClassification._model_mapping
    return type(config) in matching and type(config) not in writing


def processor_of(folder: Path, *, trust: bool | None = None) -> Any:
    """The processor of a checkpoint, or its tokenizer and image processor as one."""
    from transformers import (
        AutoImageProcessor,
        AutoProcessor,
        AutoTokenizer,
        VisionTextDualEncoderProcessor,
    )

    trust = any(folder.glob("*.py")) if trust is None else trust  # there only after consent
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        processor = VisionTextDualEncoderProcessor(
            AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=trust),
        )
    return processor
