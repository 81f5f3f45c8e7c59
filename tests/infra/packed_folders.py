"""A small packed folder of several dtypes, and what spoils one.

folder = write_packed(tmp_path)
write_weights(folder, joined(*split(folder)))
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infra.errors import UserError
from infra.packed import MANIFEST, WEIGHTS, PackedCheckpoint
from tasks.packed import pack

Json = dict[str, Any]


def write_packed(folder: Path) -> Path:
    """`dense` and `packed` in a folder; `a` ends within a byte of its bitmask."""
    dense = folder / "dense"
    dense.mkdir()
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5, 13),
        "b": torch.randn(8, 16, dtype=torch.bfloat16),
        "norm": torch.randn(16, dtype=torch.bfloat16),
        "table": torch.randn(4, 8, dtype=torch.float16),
    }
    for name in "ab":
        tensors[name][torch.rand(tensors[name].shape) < 0.7] = 0
    tensors["b"][0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])
    save_file(tensors, dense / "model.safetensors")
    (dense / "config.json").write_text('{"model_type": "llama"}')
    pack(dense, folder / "packed")
    return folder / "packed"


def contents(folder: Path) -> dict[str, tuple[list[int], str, bytes]]:
    checkpoint = PackedCheckpoint(folder)
    return {n: (t.shape, t.dtype, data.tobytes()) for n, t, data in checkpoint.tensors()}


def refused(folder: Path) -> str:
    """The one line with which a folder is refused; it names a file of it."""
    with pytest.raises(UserError) as error:
        contents(folder)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert message.isprintable()
    assert str(folder) in message
    assert len(message) < 1000
    return message


def manifest_of(folder: Path) -> Json:
    found: Json = json.loads((folder / MANIFEST).read_text())
    return found


def rewrite(folder: Path, manifest: Json) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))


def write_weights(folder: Path, content: bytes) -> None:
    """Weights that are what the manifest's hash says, as somebody would who means harm."""
    (folder / WEIGHTS).write_bytes(content)
    manifest = manifest_of(folder)
    manifest["sha256"][WEIGHTS] = hashlib.sha256(content).hexdigest()
    rewrite(folder, manifest)


def split(folder: Path) -> tuple[Json, bytes]:
    """Header and data."""
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Json | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data
