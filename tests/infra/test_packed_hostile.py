"""A packed folder is refused where it contradicts itself, whoever wrote it.

python -m pytest tests/infra/test_packed_hostile.py
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.packed import MANIFEST, WEIGHTS
from tests.infra.packed_folders import (
    Json,
    joined,
    manifest_of,
    refused,
    rewrite,
    split,
    write_weights,
)


def put(*path: Any, value: Any) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        *most, last = path
        for key in most:
            manifest = manifest[key]
        manifest[last] = value

    return change


def drop(*path: Any) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        *most, last = path
        for key in most:
            manifest = manifest[key]
        del manifest[last]

    return change


A, HEX = ("tensors", "a"), "0" * 64
MANIFESTS = {
    "a later version": put("version", value=3),
    "a version in words": put("version", value="1\n2"),
    "a version that is true": put("version", value=True),
    "no version": drop("version"),
    "an unknown key": put("code", value="import os"),
    "an unknown key of a tensor": put(*A, "code", value="import os"),
    "no tensors": put("tensors", value={}),
    "a list of tensors": put("tensors", value=[]),
    "tensors missing": drop("tensors"),
    "no hashes": drop("sha256"),
    "no hash of the weights": drop("sha256", WEIGHTS),
    "no hash of the configuration": drop("sha256", "config.json"),
    "another hash": put("sha256", "config.json", value=HEX),
    "a hash that is none": put("sha256", "config.json", value="0x" + HEX[2:]),
    "a file above": put("sha256", "../config.json", value=HEX),
    "a file far above": put("sha256", "a/../../config.json", value=HEX),
    "an absolute file": put("sha256", "/etc/passwd", value=HEX),
    "a file of another system": put("sha256", "a\\..\\b", value=HEX),
    "a file with an empty part": put("sha256", "a//b", value=HEX),
    "a hidden file": put("sha256", ".bashrc", value=HEX),
    "a pickle": put("sha256", "model.bin", value=HEX),
    "other weights": put("sha256", "sub/Model.SafeTensors", value=HEX),
    "an index": put("sha256", "model.safetensors.index.json", value=HEX),
    "itself": put("sha256", MANIFEST, value=HEX),
    "two lines": put("sha256", "a\nb", value=HEX),
    "a terminal's codes": put("sha256", "a\x1b[2Jb", value=HEX),
    "half a character": put("sha256", "a\ud800b", value=HEX),
    "a NUL": put("sha256", "a\0b", value=HEX),
    "no name": put("sha256", "", value=HEX),
    "a file that is not there": put("sha256", "more.json", value=HEX),
    "a name too long": put("sha256", "a" * 5000, value=HEX),
    "a negative size": put(*A, "shape", value=[-5, -13]),
    "half a row": put(*A, "shape", value=[2.5, 26]),
    "a size that is a float": put(*A, "shape", value=[5.0, 13.0]),
    "a size that is NaN": put(*A, "shape", value=[float("nan"), 13]),
    "an infinite size": put(*A, "shape", value=[float("inf"), 13]),
    "a size that is true": put(*A, "shape", value=[5, 13, True]),
    "a size in words": put(*A, "shape", value=["5", "13"]),
    "nine dimensions": put(*A, "shape", value=[5, 13] + [1] * 7),
    "an impossible size": put(*A, "shape", value=[1 << 62, 1 << 62]),
    "a terabyte": put(*A, "shape", value=[1 << 20, 1 << 20]),
    "a terabyte that is dense": put("tensors", "norm", "shape", value=[1 << 40]),
    "another size": put(*A, "shape", value=[5, 15]),
    "no elements": put(*A, "shape", value=[0, 13]),
    "no shape": put(*A, "shape", value=None),
    "an unknown dtype": put(*A, "dtype", value="F12\nF13"),
    "another dtype": put(*A, "dtype", value="I32"),
    "a wider dtype": put(*A, "dtype", value="F64"),
    "no dtype": put(*A, "dtype", value=None),
    "one value more": lambda m: put(
        *A, "num_nonzeros", value=m["tensors"]["a"]["num_nonzeros"] + 1
    )(m),
    "one value less": lambda m: put(
        *A, "num_nonzeros", value=m["tensors"]["a"]["num_nonzeros"] - 1
    )(m),
    "more values than elements": put(*A, "num_nonzeros", value=66),
    "fewer values than none": put(*A, "num_nonzeros", value=-1),
    "NaN values": put(*A, "num_nonzeros", value=float("nan")),
    "values in words": put(*A, "num_nonzeros", value="19"),
    "a packed tensor said to be dense": drop(*A, "num_nonzeros"),
    "a dense tensor said to be packed": put("tensors", "table", "num_nonzeros", value=32),
    "a tensor less": drop(*A),
    "a dense tensor less": drop("tensors", "norm"),
    "a tensor more": put("tensors", "more", value={"shape": [1], "dtype": "F32"}),
    "a tensor of no elements more": put("tensors", "x\ny", value={"shape": [0], "dtype": "F32"}),
    "a name twice": put("tensors", "a.bits", value={"shape": [9], "dtype": "U8"}),
    "the metadata": put("tensors", "__metadata__", value={"shape": [0], "dtype": "U8"}),
    "a long name": put("tensors", "n" * 100_000, value={"shape": [1], "dtype": "F32"}),
    "a tensor that is none": put("tensors", "a", value=7),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_hostile_manifest(packed: Path, change: Callable[[Json], None]) -> None:
    manifest = manifest_of(packed)
    change(manifest)
    rewrite(packed, manifest)
    refused(packed)


TEXTS: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "a list": lambda text: b"[]",
    "a number": lambda text: b"1",
    "deep": lambda text: b"[" * 200_000,
    "deep objects": lambda text: b'{"a":' * 200_000,
    "too many digits": lambda text: text.replace(
        '"version": 1', '"version": ' + "1" * 9999
    ).encode(),
    "no text": lambda text: text.encode().replace(b"version", b"v\xffrsion"),
    "more after it": lambda text: text.encode() + b"{}",
    "twice the version": lambda text: text.replace("{", '{"version": 1,', 1).encode(),
    "twice a tensor": lambda text: text.replace('"tensors": {', '"tensors": {"b": 1,', 1).encode(),
    "code": lambda text: b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("make", TEXTS.values(), ids=TEXTS)
def test_a_manifest_that_is_not_one_object(packed: Path, make: Callable[[str], bytes]) -> None:
    content = make((packed / MANIFEST).read_text())
    assert content != (packed / MANIFEST).read_bytes()
    (packed / MANIFEST).write_bytes(content)
    assert MANIFEST in refused(packed)


HEADERS: dict[str, Callable[[Json, bytes], bytes]] = {
    "a tensor less": lambda h, d: joined({n: p for n, p in h.items() if n != "norm"}, d),
    "a tensor more": lambda h, d: joined(h | {"x\ny": h["norm"]}, d),
    "an empty one more": lambda h, d: joined(
        h | {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, d
    ),
    "overlapping": lambda h, d: joined(h | {"b.bits": h["a.bits"]}, d),
    "exchanged": lambda h, d: joined(h | {"norm": h["table"], "table": h["norm"]}, d),
    "beyond the end": lambda h, d: joined(
        h | {"norm": h["norm"] | {"data_offsets": [len(d), len(d) + 32]}}, d
    ),
    "before the start": lambda h, d: joined(
        h | {"norm": h["norm"] | {"data_offsets": [-32, 0]}}, d
    ),
    "another dtype": lambda h, d: joined(h | {"norm": h["norm"] | {"dtype": "F16"}}, d),
    "another shape": lambda h, d: joined(h | {"norm": h["norm"] | {"shape": [4, 4]}}, d),
    "NaN": lambda h, d: joined(h | {"norm": h["norm"] | {"shape": [float("nan")]}}, d),
    "a key more": lambda h, d: joined(h | {"norm": h["norm"] | {"code": "x"}}, d),
    "a list": lambda h, d: joined("[]", d),
    "metadata": lambda h, d: joined(h | {"__metadata__": {"format": "pt", "x": "y"}}, d),
    "a name twice": lambda h, d: joined(json.dumps(h).replace('"norm"', '"norm": 1, "norm"', 1), d),
    "deep": lambda h, d: joined("[" * 100_000, d),
    "empty": lambda h, d: joined("", d),
    "none": lambda h, d: b"",
    "too long": lambda h, d: struct.pack("<Q", 1 << 63) + b"{}" + d,
    "a byte more": lambda h, d: joined(h, d + b"x"),
    "a byte less": lambda h, d: joined(h, d[:-1]),
    "no data": lambda h, d: joined(h, b""),
    "a pickle": lambda h, d: b"\x80\x04cos\nsystem\n",
}


@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS)
def test_hostile_weights(packed: Path, make: Callable[[Json, bytes], bytes]) -> None:
    write_weights(packed, make(*split(packed)))
    assert WEIGHTS in refused(packed)


@pytest.mark.parametrize("bit", [0, 7, 64])
def test_bits_that_are_not_as_many_as_the_values(packed: Path, bit: int) -> None:
    header, data = split(packed)
    spoiled = bytearray(data)
    spoiled[header["a.bits"]["data_offsets"][0] + bit // 8] ^= 1 << bit % 8
    write_weights(packed, joined(header, bytes(spoiled)))
    assert "'a'.bits has " in refused(packed)


def test_a_bit_beyond_the_last_element(packed: Path) -> None:
    """As many as there are values, but one of them has no place."""
    header, data = split(packed)
    start, stop = header["a.bits"]["data_offsets"]
    spoiled = np.frombuffer(data, np.uint8).copy()
    first = int(np.flatnonzero(spoiled[start:stop])[0]) + start
    spoiled[first] &= spoiled[first] - 1
    spoiled[stop - 1] |= 1 << 7
    write_weights(packed, joined(header, spoiled.tobytes()))
    assert "'a'.bits has " in refused(packed)
