"""Packing checkpoints, and models of what was packed (the format: infra/packed.py).

Rounded matrices are stored as the codes and scales that `grids.safetensors` tells of.

sizes = pack(Path("runs/quickstart/best"), Path("runs/quickstart/packed"))
model = load_packed("runs/quickstart/packed")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from infra.bits import GROUP, WIDTHS
from infra.checkpoints import check_safetensors, inspect_checkpoint
from infra.errors import UserError
from infra.packed import (
    DENSE,
    ITEM_BYTES,
    MANIFEST,
    WEIGHTS,
    Manifest,
    PackedCheckpoint,
    PackedTensor,
    complete_folder,
    copy_file,
    header_of,
    is_carried,
    short,
    unpacked,
    write_safetensors,
)
from infra.packed_codes import Array, PackedCodes, codes_of, items_of, packed_codes
from infra.sources import sha256_of
from infra.structure import is_structured
from modalities.smaller import UNLOADABLE, load_smaller
from tasks.checkpoint import GRIDS_FILE
from tasks.model_card import packed_card

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = "fetch it again"
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_TORCH |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class PackedSizes:
    """What packing saved: of the packed matrices, and of all weights."""

    num_packed: int
    num_kept: int  # tensors that stay dense
    sparsity: float  # of the packed matrices
    bits: float  # per weight of those that are stored as codes; 0: there are none
    dense_bytes: int  # of the packed matrices
    packed_bytes: int
    kept_bytes: int
    file_dense_bytes: int  # of the checkpoint's files of weights
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Of the packed matrices to their dense bytes."""
        return self.packed_bytes / self.dense_bytes

    @property
    def file_ratio(self) -> float:
        """Of all weights, as files with their headers."""
        return self.file_bytes / self.file_dense_bytes

    @property
    def file_bound(self) -> float:
        """`file_ratio` without headers: the tensors that stay dense are the rest of it."""
        return (self.kept_bytes + self.packed_bytes) / (self.kept_bytes + self.dense_bytes)


def pack(folder: Path, destination: Path) -> PackedSizes:
    """Write a packed copy of a checkpoint of transformers or timm, read it back and compare it.

    Works tensor by tensor. Raises UserError where the folder is no checkpoint or has no matrix
    that gets smaller, or where the destination exists or cannot be written; RuntimeError where
    what was read back differs.
    """
    source = DenseCheckpoint(folder)
    grids = Grids(folder)
    tensors, zeros = {}, {}
    for name, tensor in source.tensors.items():
        items = source.items(name)
        nonzeros = int(np.count_nonzero(items))
        ways = [tensor.model_copy(update={"num_nonzeros": nonzeros})]
        if name in grids.scales:
            ways += [
                tensor.model_copy(update={"codes": c}) for c in grids.ways(name, tensor, items)
            ]
        packed = min(ways, key=lambda way: way.packed_bytes)
        used = ("bits", "values", "codes", "scales", "widths")
        free = not any(f"{name}.{part}" in source.tensors for part in used)
        smaller = len(tensor.shape) > 1 and packed.packed_bytes < tensor.dense_bytes
        tensors[name] = packed if smaller and free else tensor
        if smaller and free:
            zeros[name] = tensor.elements - nonzeros
    matrices = [tensors[name] for name in zeros]
    if not matrices:
        removed = ": what its blocks lost is gone already" if is_structured(folder) else ""
        raise UserError(
            f"{folder} has no matrix with enough zeros to be smaller when packed{removed}"
        )

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors.items():
            items = source.items(name)
            if tensor.codes is not None:
                yield from grids.parts(name, tensor, tensor.codes, items)
            elif tensor.num_nonzeros is None:
                yield name, items
            else:
                mask = items != 0
                yield f"{name}.bits", np.packbits(mask, bitorder="little")
                yield f"{name}.values", items[np.flatnonzero(mask)]

    with complete_folder(destination) as made:
        write_safetensors(made / WEIGHTS, header_of(tensors, folder), parts())
        for file in folder.rglob("*"):
            if file.is_file() and is_carried(name := file.relative_to(folder).as_posix()):
                copy_file(folder, made, name)
        card = made / "README.md"
        if card.is_file():
            card.write_text(packed_card(card.read_text(encoding="utf-8")), encoding="utf-8")
        names = sorted(f.relative_to(made).as_posix() for f in made.rglob("*") if f.is_file())
        # A model card is edited before it is published.
        sha256 = {name: sha256_of(made / name) for name in names if not name.endswith(".md")}
        has_codes = any(tensor.codes is not None for tensor in tensors.values())
        manifest = Manifest(version=2 if has_codes else 1, tensors=tensors, sha256=sha256)
        text = manifest.model_dump_json(exclude_none=True, indent=1)
        (made / MANIFEST).write_text(text, encoding="utf-8")
        for name, _, data in PackedCheckpoint(made).tensors():
            if not np.array_equal(data, source.items(name).view(np.uint8)):
                raise RuntimeError(f"{name} was packed with other values")
        file_bytes = (made / WEIGHTS).stat().st_size
    kept = [tensor for name, tensor in tensors.items() if name not in zeros]
    coded = [tensor for tensor in matrices if tensor.codes is not None]
    weights = sum(tensor.elements for tensor in coded)
    return PackedSizes(
        num_packed=len(matrices),
        num_kept=len(kept),
        sparsity=sum(zeros.values()) / sum(tensor.elements for tensor in matrices),
        bits=8 * sum(tensor.packed_bytes for tensor in coded) / weights if coded else 0.0,
        dense_bytes=sum(tensor.dense_bytes for tensor in matrices),
        packed_bytes=sum(tensor.packed_bytes for tensor in matrices),
        kept_bytes=sum(tensor.dense_bytes for tensor in kept),
        file_dense_bytes=source.file_bytes,
        file_bytes=file_bytes,
    )


def load_packed(folder: Path | str) -> Any:
    """The model of a packed folder, on the CPU, in the dtype it was saved in; in evaluation mode.

    Its config.json decides the class: timm's `architecture`, or the first of transformers'
    `architectures`. Code that comes with a checkpoint is never run. Raises UserError where the
    folder is damaged or its tensors are not those of the model.
    """
    folder = Path(folder)
    if is_structured(folder):
        return load_smaller(unpacked(folder))
    packed = PackedCheckpoint(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object")
    opened = _of_timm if "architecture" in config else _of_transformers
    try:
        state = {name: _tensor(tensor, data) for name, tensor, data in packed.tensors()}
        return opened(folder, state)
    except UNLOADABLE as error:
        raise UserError(f"cannot load {folder}: {_line(error)}") from error


def _of_transformers(folder: Path, state: dict[str, Tensor]) -> Any:
    import transformers

    from modalities.pretrained import refuse_incomplete

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = str((config.architectures or ["no architecture"])[0])
    found: Any = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UserError(f"{folder / 'config.json'} names {short(name)}: no model of transformers")
    options: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        options["generation_config"] = transformers.GenerationConfig.from_pretrained(folder)
    opened: Any = found.from_pretrained(
        None, config=config, state_dict=state, dtype="auto", output_loading_info=True, **options
    )
    model, info = opened
    refuse_incomplete(str(folder), sorted(info["missing_keys"]), [])
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def _of_timm(folder: Path, state: dict[str, Tensor]) -> Any:
    import timm

    given = {"source": "", "state_dict": state, "custom_load": False}
    model: Any = timm.create_model(
        f"local-dir:{folder.absolute()}", pretrained=True, pretrained_cfg_overlay=given
    )
    model.pretrained_cfg |= {"source": "local-dir", "state_dict": None}  # it would keep them
    kinds = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    return model.to(kinds[0]).eval()


def _tensor(facts: PackedTensor, data: np.ndarray) -> Tensor:
    import torch

    kind = _TORCH.get(facts.dtype) or facts.dtype.replace("U", "uint").replace("I", "int")
    own = data if data.flags.writeable else data.copy()  # what is mapped belongs to the file
    return torch.from_numpy(own).view(getattr(torch, kind)).reshape(facts.shape)


class Grids:
    """What grids.safetensors of a checkpoint says; empty where there is none."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / GRIDS_FILE
        self.scales: dict[str, Array] = {}
        self.widths: dict[str, Array] = {}
        self.transposed: set[str] = set()
        if not self.file.is_file():
            return
        check_safetensors(self.file)
        try:
            with safe_open(self.file, "np") as opened:
                for key in opened.keys():  # noqa: SIM118  it is no dictionary
                    name, _, kind = key.rpartition(".")
                    parts = self.scales if kind == "scales" else self.widths
                    parts[name] = opened.get_tensor(key)
                self.transposed = set(json.loads((opened.metadata() or {}).get("transposed", "[]")))
        except (SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.file} is damaged: {_line(error)}: {_AGAIN}") from None
        for name in sorted(self.scales.keys() | self.widths.keys()):
            scales, widths = (parts.get(name, np.empty(0)) for parts in (self.scales, self.widths))
            kinds = scales.dtype == np.float16 and widths.dtype == np.uint8
            known = widths.size > 0 and bool(np.isin(widths, WIDTHS).all())
            if not (kinds and known and scales.ndim == 2 and widths.shape == scales.shape[:1]):
                raise UserError(f"{self.file} is damaged: widths or scales of {short(name)}")

    def codes(self, name: str, tensor: PackedTensor, items: Array) -> Array:
        """The codes of a tensor by rows; raises UserError where its weights have no such codes."""
        scales, widths = self.scales[name], self.widths[name]
        columns, rest = divmod(tensor.elements, len(widths))
        fits = not rest and len(tensor.shape) > 1 and tensor.dtype in ("F32", "F16", "BF16")
        if fits and scales.shape[1] == -(-columns // GROUP):
            facts = PackedCodes(rows=len(widths), transposed=name in self.transposed, counts={})
            rows = facts.by_rows(items, tensor.shape)
            codes = codes_of(rows, scales, tensor.dtype)
            most = (1 << widths.astype(np.int16)[:, None] - 1) - 1
            inside = np.all((codes <= most) & (codes >= -most - 1))
            if inside and np.array_equal(items_of(codes, scales, tensor.dtype), rows):
                return codes
        raise UserError(
            f"{short(name)} is not what {self.file} tells of: its weights were changed since; "
            "remove that file to pack it without codes"
        )

    def ways(self, name: str, tensor: PackedTensor, items: Array) -> Iterator[PackedCodes]:
        """How the codes of a tensor may be stored: all of them, or a bitmask and the others."""
        codes, widths = self.codes(name, tensor, items), self.widths[name]
        for masked in (False, True):
            counts = {
                str(width): int(np.count_nonzero(rows) if masked else rows.size)
                for width in np.unique(widths)
                for rows in (codes[widths == width],)
            }
            flipped = name in self.transposed
            yield PackedCodes(rows=len(widths), transposed=flipped, masked=masked, counts=counts)

    def parts(
        self, name: str, tensor: PackedTensor, facts: PackedCodes, items: Array
    ) -> Iterator[tuple[str, Array]]:
        """What a tensor is stored as."""
        codes = self.codes(name, tensor, items)
        mask = codes != 0 if facts.masked else None
        yield f"{name}.codes", packed_codes(codes, self.widths[name], mask)
        yield f"{name}.scales", self.scales[name]
        yield f"{name}.widths", self.widths[name]
        if mask is not None:
            yield f"{name}.bits", np.packbits(mask, bitorder="little")


class DenseCheckpoint:
    """The tensors of a checkpoint, mapped; raises UserError where they are not whole."""

    def __init__(self, folder: Path) -> None:
        if (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is packed already")
        layout = inspect_checkpoint(folder, trust_remote_code=True)  # nothing of it is run
        index = folder / f"{DENSE}.index.json"
        places: dict[str, str] = {}  # transformers as well takes the one file first
        if index.is_file() and not (folder / DENSE).is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif layout.gguf or layout.pickle or not (folder / DENSE).is_file():
            raise UserError(f"{folder} has no {DENSE}: nothing else is packed")
        self.tensors: dict[str, PackedTensor] = {}
        self._items: dict[str, np.ndarray] = {}
        files = [folder / name for name in sorted(set(places.values()) or {DENSE})]
        for file in files:
            self._add(file)
        if missing := sorted(places.keys() - self.tensors.keys()):
            raise UserError(f"{folder / places[missing[0]]} lacks {short(missing[0])}: {_AGAIN}")
        self.file_bytes = sum(file.stat().st_size for file in files)

    def _add(self, file: Path) -> None:
        header = check_safetensors(file)
        try:
            with safe_open(file, "np"):  # which checks every shape and place
                data = np.memmap(file, np.uint8, "r")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged: {_line(error)}: {_AGAIN}") from None
        first = 8 + int(data[:8].view("<u8")[0])
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            if name in self.tensors:
                raise UserError(f"{file}: {short(name)} is in another file as well: {_AGAIN}")
            if facts["dtype"] not in ITEM_BYTES:
                raise UserError(f"{file}: {short(name)} is {facts['dtype']}, which is not packed")
            self.tensors[name] = PackedTensor(shape=facts["shape"], dtype=facts["dtype"])
            start, stop = facts["data_offsets"]
            part = data[first + start : first + stop].view(np.ndarray)
            self._items[name] = part.view(f"u{ITEM_BYTES[facts['dtype']]}")

    def items(self, name: str) -> np.ndarray:
        """Its elements, row by row, as unsigned numbers of their size."""
        return self._items[name]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
