"""The structure of a model that lost whole channels and heads: what `structure.json` states.

    structure = read_structure(Path("runs/small/best"))
    shrink(model, structure.blocks["model.layers.0"])     # a module becomes smaller, in place
    expand(folder, elsewhere)

Blocks differ in width then, which no library's configuration can say: a model is built at full
size, without weights, and made smaller before it gets them. With zeros in the place of what went
the folder is an ordinary checkpoint again, beside which the smaller model is timed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.cache import made_once
from infra.errors import UserError, first_line
from infra.frozen import Frozen
from infra.sources import sha256_of

STRUCTURE = "structure.json"
_LONGEST, _MOST = 1 << 20, 1 << 31  # rows, and weights, of a matrix that is filled up with zeros

Count = Annotated[int, Field(strict=True, ge=1, lt=_LONGEST)]
# What modules say of their heads and sizes; nothing else is set from a file.
Attribute = Literal[
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "num_key_value_groups",
    "attn_dim",
    "all_head_size",
    "embed_dim",
    "split_size",
]


class Cut(Frozen):
    """A parameter that loses a share of one dimension, which is `segments` runs of all units."""

    parameter: str = Field(description="its name inside the block")
    dim: Literal[0, 1]
    segments: Count = 1

    def places(self, count: int, kept: Sequence[int], size: int) -> Tensor:
        """Indices along the dimension, `size` long at first, that stay."""
        each = size // (self.segments * count)
        whole = torch.arange(size).reshape(self.segments, count, each)
        return whole[:, list(kept)].flatten()


class Removed(Frozen):
    """Units of one block that went together: channels, or heads."""

    count: Count = Field(description="units that there were")
    kept: list[Annotated[int, Field(strict=True, ge=0)]]
    cuts: list[Cut]
    holder: str = Field("", description="the module that the attributes belong to")
    attributes: dict[Attribute, int] = Field({}, description="as they have become")

    @model_validator(mode="after")
    def _some_stay(self) -> Removed:
        if not self.kept or self.kept != sorted(set(self.kept)) or self.kept[-1] >= self.count:
            raise ValueError(f"what is kept are no units of {self.count}, in order")
        return self


class Structure(Frozen):
    """All of a model."""

    version: Literal[1] = 1
    blocks: dict[str, list[Removed]] = Field(description="by the name of the block, in order")

    def then(self, later: Structure) -> Structure:
        """What both make of a model, one after the other."""
        names = self.blocks | later.blocks
        both = {name: [*self.blocks.get(name, []), *later.blocks.get(name, [])] for name in names}
        return Structure(blocks=both)


def is_structured(folder: Path) -> bool:
    """Whether a checkpoint's blocks lack units."""
    return (folder / STRUCTURE).is_file()


def shrink_model(model: nn.Module, structure: Structure) -> None:
    """Take the removed units out of a model of full size, in place."""
    for name, removed in structure.blocks.items():
        shrink(model.get_submodule(name), removed)


def shrink(block: nn.Module, removed: Sequence[Removed]) -> None:
    """Take the removed units out of a block, in place; what is on `meta` only changes its shape."""
    for units in removed:
        for cut in units.cuts:
            path, _, name = cut.parameter.rpartition(".")
            owner, whole = block.get_submodule(path), block.get_parameter(cut.parameter)
            places = cut.places(units.count, units.kept, whole.shape[cut.dim]).to(whole.device)
            part = whole.detach().index_select(cut.dim, places)
            setattr(owner, name, nn.Parameter(part, requires_grad=whole.requires_grad))
            _state_sizes(owner)
        holder = block.get_submodule(units.holder)
        for name, value in units.attributes.items():
            if not 1 <= value <= getattr(holder, name):
                raise ValueError(f"{units.holder}.{name} cannot become {value}")
            setattr(holder, name, value)


def _state_sizes(owner: nn.Module) -> None:
    """What a layer says of its sizes."""
    weight = owner.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(owner).__name__} has no weight")
    first, last = ("nx", "nf") if hasattr(owner, "nf") else ("out_features", "in_features")
    if isinstance(owner, nn.Conv2d):
        first, last = "out_channels", "in_channels"
    for name, size in zip((first, last), weight.shape, strict=False):
        setattr(owner, name, size)


def read_structure(folder: Path) -> Structure:
    """Raises UserError where it is damaged, or of a later version."""
    path = folder / STRUCTURE
    try:
        return Structure.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {first_line(error)}: fetch the checkpoint again"
        ) from None


def copy_structure(folder: Path, destination: Path) -> None:
    """What a checkpoint states of its blocks, where it does."""
    if is_structured(folder):
        shutil.copy(folder / STRUCTURE, destination)


def expand(folder: Path, destination: Path) -> None:
    """Write the checkpoint with zeros where units were removed, which any library loads.

    The destination does not exist. Raises UserError where a file is damaged or does not fit its
    structure.json.
    """
    cuts = _cuts(read_structure(folder))
    destination.mkdir()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            try:
                tensors = load_file(file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {file}: {error}: fetch it again") from None
            whole = {name: _whole(t, cuts.get(name, [])) for name, t in tensors.items()}
            save_file(whole, destination / file.name, metadata={"format": "pt"})
        elif file.name != STRUCTURE and file.is_file():
            shutil.copyfile(file, destination / file.name)


def _whole(tensor: Tensor, cuts: Sequence[tuple[Cut, Removed]]) -> Tensor:
    for cut, units in reversed(cuts):  # what went last is put back first
        kept, size = len(units.kept), tensor.shape[cut.dim] if cut.dim < tensor.ndim else 0
        if not size or size % (kept * cut.segments):
            raise UserError(
                f"{cut.parameter} has {size} rows or columns, {STRUCTURE} keeps {kept} of "
                f"{units.count} units: fetch both again"
            )
        full = size // kept * units.count
        if full > _LONGEST or full * tensor.numel() // size > _MOST:
            raise UserError(f"{cut.parameter} would have {full} rows or columns: fetch it again")
        shape = [full if d == cut.dim else n for d, n in enumerate(tensor.shape)]
        places = cut.places(units.count, units.kept, full)
        tensor = tensor.new_zeros(shape).index_copy_(cut.dim, places, tensor)
    return tensor.contiguous()


def _cuts(structure: Structure) -> dict[str, list[tuple[Cut, Removed]]]:
    """By the full name of the parameter."""
    found: dict[str, list[tuple[Cut, Removed]]] = {}
    for block, removed in structure.blocks.items():
        for units in removed:
            for cut in units.cuts:
                found.setdefault(f"{block}.{cut.parameter}", []).append((cut, units))
    return found


def expanded(folder: Path) -> Path:
    """The checkpoint with zeros where units were removed, made once per node."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([sha256_of(folder / STRUCTURE), stamps]).encode()).hexdigest()
    return made_once(folder, f"expanded-{key[:24]}", partial(expand, folder))
