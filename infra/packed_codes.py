"""Rounded matrices in packed files: codes of 2, 3, 4 or 8 bits, and fp16 scales.

    data = packed_codes(codes, widths, mask)       # uint8
    codes = unpacked_codes(data, facts, widths, mask)
    items = items_of(codes, scales, "BF16")        # the weights, bit for bit

A row has one width; 128 of its neighbours share a scale (tasks/pruning/grids.py). Codes of rows of
one width stand together, narrow ones first, row by row, b bits each, the lowest bit first, with an
offset of 2^(b-1), and begin with a byte. Where `masked`, only those that are not zero are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from infra.bits import GROUP, WIDTHS
from infra.frozen import Frozen

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]
Array = np.ndarray[Any, np.dtype[Any]]


class PackedCodes(Frozen):
    """How the codes of a tensor are stored; `counts` is how many there are of each width."""

    rows: Annotated[int, Field(strict=True, ge=1, lt=1 << 48)]
    transposed: bool = False  # it is stored in x out
    masked: bool = False
    counts: dict[Literal["2", "3", "4", "8"], Count]

    @property
    def stored(self) -> int:
        """How many codes are stored."""
        return sum(self.counts.values())

    @property
    def code_bytes(self) -> int:
        """What they take."""
        return sum(-(-count * int(width) // 8) for width, count in self.counts.items())

    def parts(self, elements: int) -> list[tuple[str, str, list[int]]]:
        """Suffix, dtype and shape of what a tensor is stored as."""
        groups = -(-elements // self.rows // GROUP)
        found = [
            (".codes", "U8", [self.code_bytes]),
            (".scales", "F16", [self.rows, groups]),
            (".widths", "U8", [self.rows]),
        ]
        return found + [(".bits", "U8", [-(-elements // 8)])] * self.masked

    def total_bytes(self, elements: int) -> int:
        """What they take."""
        sizes = {"U8": 1, "F16": 2}
        return sum(sizes[kind] * math.prod(shape) for _, kind, shape in self.parts(elements))

    def by_rows(self, items: Array, shape: Sequence[int]) -> Array:
        """The elements of a tensor as a matrix of the rows that have one width each."""
        if self.transposed:
            items = items.reshape(shape).swapaxes(-1, -2)
        return items.reshape(self.rows, -1)

    def decoded(self, shape: Sequence[int], dtype: str, part: Callable[[str], Array]) -> Array:
        """The bytes of a tensor; `part` gives those that were stored. Raises ValueError."""
        mask, widths = None, part(".widths")
        if self.masked:
            bits = np.unpackbits(part(".bits"), count=math.prod(shape), bitorder="little")
            mask = bits.view(bool).reshape(self.rows, -1)
        scales = part(".scales").view(np.float16).reshape(self.rows, -1)
        codes = unpacked_codes(part(".codes"), self, widths, mask)
        items = items_of(codes, scales, dtype)
        if self.transposed:
            *outer, first, last = shape
            items = np.ascontiguousarray(items.reshape(*outer, last, first).swapaxes(-1, -2))
        return items.reshape(-1).view(np.uint8)

    @model_validator(mode="after")
    def _sorted(self) -> PackedCodes:
        if list(self.counts) != sorted(self.counts):
            raise ValueError("widths are not in their order")
        return self


def packed_codes(codes: Array, widths: Array, mask: Array | None) -> Array:
    """The bytes of codes, rows x columns; mask: those that are stored, or None for all."""
    parts = []
    for width in WIDTHS:
        chosen = widths == width
        if chosen.any():
            inside = codes[chosen]
            inside = inside.reshape(-1) if mask is None else inside[mask[chosen]]
            offset = (inside.astype(np.int16) + (1 << (width - 1))).astype(np.uint8)
            bits = np.unpackbits(offset[:, None], axis=1, count=width, bitorder="little")
            parts.append(np.packbits(bits, bitorder="little"))
    return np.concatenate(parts)


def unpacked_codes(data: Array, facts: PackedCodes, widths: Array, mask: Array | None) -> Array:
    """Codes again, rows x columns of a mask. Raises ValueError where counts and widths differ."""
    if set(map(str, np.unique(widths))) != set(facts.counts):
        raise ValueError("its rows have other widths")
    start, found = 0, []
    for name, count in facts.counts.items():
        width, chosen = int(name), widths == int(name)
        stop = start + -(-count * width // 8)
        bits = np.unpackbits(data[start:stop], count=count * width, bitorder="little")
        offset = np.packbits(bits.reshape(count, width), axis=1, bitorder="little")[:, 0]
        values = (offset.astype(np.int16) - (1 << (width - 1))).astype(np.int8)
        found.append((chosen, values))
        start = stop
    columns = facts.stored // len(widths) if mask is None else mask.shape[1]
    codes = np.zeros((len(widths), columns), np.int8)
    for chosen, values in found:
        inside = np.zeros((int(chosen.sum()), columns), np.int8)
        places = np.ones_like(inside, bool) if mask is None else mask[chosen]
        if int(places.sum()) != len(values):
            raise ValueError("its rows hold another number of codes")
        inside[places] = values
        codes[chosen] = inside
    return codes


def codes_of(items: Array, scales: Array, dtype: str) -> Array:
    """The codes of weights, rows x columns of unsigned numbers; scales: rows x groups, float16."""
    if dtype == "BF16":
        values = (items.astype(np.uint32) << 16).view(np.float32)
    else:
        values = items.view(f"f{items.itemsize}").astype(np.float32)
    with np.errstate(all="ignore"):
        return np.clip(np.rint(values / _wide(scales, items.shape[1])), -128, 127).astype(np.int8)


def items_of(codes: Array, scales: Array, dtype: str) -> Array:
    """The weights as unsigned numbers of their size."""
    values = codes.astype(np.float32) * _wide(scales, codes.shape[1]) + np.float32(0)
    if dtype == "BF16":
        whole = values.view(np.uint32)
        return ((whole + 0x7FFF + (whole >> 16 & 1)) >> 16).astype(np.uint16)  # a half to even
    return values.view(np.uint32) if dtype == "F32" else values.astype(np.float16).view(np.uint16)


def _wide(scales: Array, columns: int) -> Array:
    return np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, :columns]
