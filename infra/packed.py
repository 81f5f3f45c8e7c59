"""Packed checkpoints: each sparse matrix as a bitmask and its nonzero values, in safetensors.

    for name, tensor, data in PackedCheckpoint(Path("runs/quickstart/packed")).tensors(): ...
    unpack(Path("runs/quickstart/packed"), Path("dense-again"))

tasks/packed.py makes them, and models of them. A packed folder is its checkpoint with
`packed.safetensors` and `packed.json` in place of the weights. A tensor NAME that is smaller so is
stored there as two:

    NAME.bits     uint8, ceil(elements / 8): element i, row by row, is bit i % 8 of byte i // 8
    NAME.values   in the dtype of NAME: the elements whose bit is set, in that order

and one whose weights were rounded as its codes (infra/packed_codes.py), if need be beside `.bits`:

    NAME.codes    uint8;  NAME.scales  float16, rows x groups;  NAME.widths  uint8, rows

A bit is set unless all bytes of its element are zero, so that -0.0 and NaN come back as they were.
`packed.json` states the version, the shape and dtype of every tensor of the model, the number of
values of those that are packed, and the SHA-256 of the files. The header of `packed.safetensors`
follows from it, so that any other is refused. No library takes that file for a dense model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from infra.cache import made_once
from infra.errors import UserError
from infra.frozen import Frozen
from infra.packed_codes import Count, PackedCodes
from infra.sources import sha256_of

MANIFEST = "packed.json"
WEIGHTS = "packed.safetensors"
DENSE = "model.safetensors"
_AGAIN = "fetch it again, or pack its checkpoint again"
_JSON_BYTES = 100 << 20  # of a manifest or header; the library's own bound for headers
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
_LEFT_OUT = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|npy|npz|gguf|h5|msgpack|onnx|index\.json)"
)


class PackedTensor(Frozen):
    """A tensor of the model; one that is stored as it is has no `num_nonzeros`."""

    shape: Annotated[list[Count], Field(max_length=8)]
    dtype: str
    num_nonzeros: Count | None = None
    codes: PackedCodes | None = None

    @property
    def elements(self) -> int:
        """How many it has when dense."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """What it takes when dense."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def packed_bytes(self) -> int:
        """What it takes in a packed file."""
        if self.codes is not None:
            return self.codes.total_bytes(self.elements)
        if self.num_nonzeros is None:
            return self.dense_bytes
        return -(-self.elements // 8) + self.num_nonzeros * ITEM_BYTES[self.dtype]

    @model_validator(mode="after")
    def _possible(self) -> PackedTensor:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype[:20]!r} is not known")
        if (self.num_nonzeros or 0) > self.elements:
            raise ValueError(f"{self.num_nonzeros} values of {self.elements} elements")
        if (codes := self.codes) is not None:
            whole = codes.stored <= self.elements if codes.masked else codes.stored == self.elements
            fits = len(self.shape) > 1 and self.elements and self.elements % codes.rows == 0
            if not (whole and fits and self.dtype in ("F32", "F16", "BF16")):
                raise ValueError(f"{codes.stored} codes in {codes.rows} rows do not fit its shape")
        return self


class Manifest(Frozen):
    """What `packed.json` says; paths are relative to its folder."""

    version: Literal[1, 2] = 1  # 2: it has codes
    tensors: Annotated[dict[str, PackedTensor], Field(min_length=1)]
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]


class PackedCheckpoint:
    """A packed folder whose manifest, header and hashes were checked.

    Raises UserError, naming file and tensor, where anything is missing, damaged or contradictory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / WEIGHTS
        self.manifest = _manifest(folder / MANIFEST)
        self._header = header_of(self.manifest.tensors, folder / MANIFEST)
        self._data = _checked_data(self.file, self._header)
        for name, digest in self.manifest.sha256.items():
            try:
                found = sha256_of(folder / name) if (folder / name).is_file() else "no such file"
            except OSError as error:
                raise UserError(f"cannot read {folder / name}: {error.strerror}") from error
            if found != digest:
                raise UserError(f"{folder / name} is not what was packed ({found}): fetch it again")

    def tensors(self) -> Iterator[tuple[str, PackedTensor, np.ndarray]]:
        """Name, facts and dense bytes (one dimension of uint8) of every tensor, one at a time."""
        for name, tensor in self.manifest.tensors.items():
            if tensor.codes is not None:
                yield name, tensor, self._decoded(name, tensor, tensor.codes)
                continue
            if tensor.num_nonzeros is None:
                yield name, tensor, self._bytes(name)
                continue
            bits, elements = self._bytes(f"{name}.bits"), tensor.elements
            found = int(np.bitwise_count(bits).sum(dtype=np.int64))
            if found != tensor.num_nonzeros or (elements % 8 and bits[-1] >> elements % 8):
                raise UserError(
                    f"{self.file} is damaged: {short(name)}.bits has {found} bits set, or some "
                    f"beyond its {elements} elements, for {tensor.num_nonzeros} values: {_AGAIN}"
                )
            kind = f"u{ITEM_BYTES[tensor.dtype]}"
            dense = np.zeros(elements, kind)
            mask = np.unpackbits(bits, count=elements, bitorder="little").view(bool)
            # By number, which takes numpy 2.6 ns per element; by mask it takes 6.6.
            dense[np.flatnonzero(mask)] = self._bytes(f"{name}.values").view(kind)
            yield name, tensor, dense.view(np.uint8)

    def _decoded(self, name: str, tensor: PackedTensor, codes: PackedCodes) -> np.ndarray:
        try:
            return codes.decoded(tensor.shape, tensor.dtype, lambda part: self._bytes(name + part))
        except ValueError as error:
            raise UserError(f"{self.file} is damaged: {short(name)}: {error}: {_AGAIN}") from None

    def _bytes(self, name: str) -> np.ndarray:
        start, stop = self._header[name]["data_offsets"]
        return self._data[start:stop]


def unpack(folder: Path, destination: Path) -> None:
    """Write the checkpoint that was packed into a new folder, its weights in one file.

    Raises UserError as `PackedCheckpoint` does.
    """
    packed = PackedCheckpoint(folder)
    dense = {
        name: tensor.model_copy(update={"num_nonzeros": None, "codes": None})
        for name, tensor in packed.manifest.tensors.items()
    }
    destination.mkdir()
    parts = ((name, data) for name, _, data in packed.tensors())
    write_safetensors(destination / DENSE, header_of(dense, folder / MANIFEST), parts)
    cards = [file.name for file in folder.glob("*.md")]
    for name in {*packed.manifest.sha256, *cards} - {WEIGHTS}:
        copy_file(folder, destination, name)
    written = (folder / MANIFEST).stat().st_mtime
    for file in destination.rglob("*"):  # what is made from it knows it by its times
        os.utime(file, (written, written))


def unpacked(folder: Path) -> Path:
    """The checkpoint that was packed, unpacked once per node."""
    key = sha256_of(folder / MANIFEST)[:24]
    return made_once(folder, f"unpacked-{key}", partial(unpack, folder))


def header_of(tensors: dict[str, PackedTensor], where: Path) -> dict[str, Any]:
    """The header of the safetensors file that holds them, largest items first: all are aligned.

    Raises UserError where two would have one name.
    """
    parts: list[tuple[str, str, list[int]]] = []
    for name, tensor in tensors.items():
        if (codes := tensor.codes) is not None:
            parts += [(name + p, kind, shape) for p, kind, shape in codes.parts(tensor.elements)]
        elif tensor.num_nonzeros is None:
            parts.append((name, tensor.dtype, tensor.shape))
        else:
            parts.append((f"{name}.values", tensor.dtype, [tensor.num_nonzeros]))
            parts.append((f"{name}.bits", "U8", [-(-tensor.elements // 8)]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(parts, key=lambda part: -ITEM_BYTES[part[1]]):
        if name in header:
            raise UserError(f"{where} is damaged: {short(name)} would be two tensors: {_AGAIN}")
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header


def write_safetensors(
    file: Path, header: dict[str, Any], parts: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write tensors, in any order, to where the header has them."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name, data in parts:
            opened.seek(8 + len(text) + header[name]["data_offsets"][0])
            opened.write(data.view(np.uint8).data)


@contextmanager
def complete_folder(destination: Path) -> Iterator[Path]:
    """A folder that gets its name once the block is through; nothing is left of a failure.

    Raises UserError where it exists or cannot be written.
    """
    if destination.exists():
        raise UserError(f"{destination} exists: remove it, or name another folder")
    making = destination.absolute().with_name(f".{destination.absolute().name}.{os.getpid()}")
    try:
        making.mkdir(parents=True)
        yield making
        for file in making.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        making.rename(destination)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def is_carried(name: str) -> bool:
    """Whether a file of this relative path goes along: no weights, nothing hidden or outside."""
    hidden = any(not part or part.startswith(".") for part in name.split("/"))
    plain = name.isprintable() and "\\" not in name and len(name) < 256 and not hidden
    return plain and name not in (MANIFEST, WEIGHTS) and not _LEFT_OUT.fullmatch(name.lower())


def copy_file(source: Path, folder: Path, name: str) -> None:
    """Copy a file, its folders included."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, folder / name)


def short(name: str) -> str:
    """A name from a file that anybody may have written, for a message of one line."""
    return repr(name if len(name) < 120 else f"{name[:120]}...")


def _manifest(path: Path) -> Manifest:
    raw = _parsed(_read(path, 0), path)
    version = raw.get("version")
    if type(version) is not int or version not in (1, 2):
        raise UserError(
            f"{path} has version {short(str(version))}, this sparseramp reads 1 and 2: update "
            "it, or pack the checkpoint again"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        at = ": ".join(short(str(part)) for part in first["loc"])
        raise UserError(f"{path} is damaged: {at}: {first['msg']}: {_AGAIN}") from None
    for name in manifest.sha256:
        if name != WEIGHTS and not is_carried(name):
            raise UserError(f"{path} is damaged: it must not name the file {short(name)}: {_AGAIN}")
    for name in (WEIGHTS, "config.json"):
        if name not in manifest.sha256:
            raise UserError(f"{path} is damaged: it does not name the file {name}: {_AGAIN}")
    return manifest


def _checked_data(file: Path, header: dict[str, Any]) -> np.ndarray:
    """The bytes after the header, mapped."""
    try:
        (length,) = struct.unpack("<Q", _read(file, 0, 8))
    except struct.error:
        raise UserError(f"{file} is truncated: {_AGAIN}") from None
    found = _parsed(_read(file, 8, length), file)
    for name in header | found:
        if name not in found:
            raise UserError(f"{file} is damaged: it lacks {short(name)}: {_AGAIN}")
        if found[name] != header.get(name):
            problem = "is not in" if name not in header else "has another shape, dtype or place in"
            raise UserError(f"{file} is damaged: {short(name)} {problem} {MANIFEST}: {_AGAIN}")
    size, promised = file.stat().st_size, 8 + length
    promised += max(
        (part["data_offsets"][1] for n, part in header.items() if n[:2] != "__"), default=0
    )
    if size != promised:
        raise UserError(
            f"{file} is truncated: {size} bytes, its header promises {promised}: {_AGAIN}"
        )
    return np.memmap(file, np.uint8, "r")[8 + length :].view(np.ndarray)


def _read(file: Path, start: int, length: int = _JSON_BYTES) -> bytes:
    """A part of a file that must not be a pipe, a device or larger than any header."""
    if not file.is_file():
        raise UserError(f"{file} is missing: {_AGAIN}")
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read(min(length, _JSON_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object without a key that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{short(twice)} is there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is truncated or damaged: {error}: {_AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is truncated or damaged: no JSON object: {_AGAIN}")
    return value
