"""Checkpoints that lost whole channels and heads, as models: `structure.json` says which.

model = load_smaller("runs/small/best")     # of transformers or timm, ready to run

Weights have the names that the model's modules have, whatever its library calls them in files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from infra.checkpoints import check_safetensors, refuse_unfit
from infra.errors import UserError
from infra.packed import DENSE
from infra.structure import STRUCTURE, Structure, is_structured, read_structure, shrink_model
from infra.weights import MappedWeights, save_mapped

# What libraries raise on files that anybody may have written.
UNLOADABLE = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError)


def load_smaller(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The smaller model of a structured checkpoint: of transformers or timm, in eval mode.

    Raises UserError where the folder is none, where a file is damaged or does not fit, and where it
    brings code that is not to be run.
    """
    folder = Path(folder)
    if not is_structured(folder):
        raise UserError(f"{folder} has no {STRUCTURE}: load it with its own library")
    structure = read_structure(folder)
    names = [file.name for file in folder.iterdir()]
    shards = refuse_unfit(folder, names, trust_remote_code=trust_remote_code)
    state: dict[str, Tensor] = {}
    for name in [DENSE] if DENSE in shards else shards:  # beside it may be grids
        check_safetensors(folder / name)
        state |= MappedWeights(folder / name).read()
    is_timm = "architecture" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        model: Any = _of_timm(folder) if is_timm else _of_transformers(folder, trust_remote_code)
        shrink_model(model, structure)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except UNLOADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"{folder} does not fit its {STRUCTURE}: {reason}") from error
    if not is_timm:  # a tied head has no weights of its own
        model.tie_weights()
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or unexpected:
        raise UserError(f"{folder} does not fit its config.json: {(missing or unexpected)[0]}")
    if is_timm:  # tables that are no weights
        model.to(next(model.parameters()).dtype)
    return model.eval().requires_grad_(False)


def save_smaller(model: nn.Module, structure: Structure, folder: Path) -> None:
    """Write a smaller model's weights and `structure.json`, beside its configuration."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        file.unlink()
    save_mapped(model, folder / DENSE)
    (folder / STRUCTURE).write_text(structure.model_dump_json(indent=1), encoding="utf-8")


def _of_transformers(folder: Path, trust: bool) -> Any:
    import transformers
    from accelerate import init_empty_weights

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _of_timm(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder.absolute()}", pretrained=False)
