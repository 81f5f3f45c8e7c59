"""Rounded checkpoints in the format of compressed-tensors, which transformers reads.

    export(Path("runs/quantise/best"), Path("runs/quantise/best-compressed-tensors"))
    AutoModelForCausalLM.from_pretrained("runs/quantise/best-compressed-tensors")

Its `pack-quantized` has one width for all rows of a matrix and full groups of 128. Everything else
is refused, and what was written is loaded with that library and compared bit by bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infra.bits import GROUP
from infra.errors import UserError
from infra.packed import (
    DENSE,
    PackedTensor,
    complete_folder,
    copy_file,
    header_of,
    is_carried,
    write_safetensors,
)
from infra.structure import is_structured
from tasks.checkpoint import SPARSITY_FILE
from tasks.packed import DenseCheckpoint, Grids

WIDTHS = (4, 8)  # of what pack-quantized can say, those that engines have kernels for
_KINDS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def export(folder: Path, destination: Path) -> dict[str, int]:
    """Write the checkpoint as compressed-tensors reads it; the bytes of the files of weights.

    Raises UserError where the format cannot hold it or the library is missing, and RuntimeError
    where the library reads other weights.
    """
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError:
        raise UserError(
            "compressed-tensors is not installed: pip install 'compressed-tensors>=0.20'"
        ) from None
    import torch

    if is_structured(folder):
        raise UserError(f"{folder} has blocks of several widths: no engine's configuration says so")
    source, grids = DenseCheckpoint(folder), Grids(folder)
    if not grids.scales:
        raise UserError(
            f"{folder} has no rounded weights: set prune.bits, such as prune.method=gptq "
            f"prune.bits={4 + 16 / GROUP:g}"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architectures" not in config:
        raise UserError(f"{folder} is no checkpoint of transformers: nothing else reads the format")
    for name in grids.scales:
        _refuse_unfit(name, source, grids)
    widths = {name: _width(name, grids) for name in grids.scales}
    tensors, made_of = dict[str, PackedTensor](), dict[str, np.ndarray]()
    for name, tensor in source.tensors.items():
        if name not in widths:
            tensors[name] = tensor
            continue
        codes = torch.from_numpy(grids.codes(name, tensor, source.items(name)))
        packed = pack_to_int32(codes, widths[name]).numpy()
        scales = torch.from_numpy(grids.scales[name])
        # The library multiplies in the dtype of the scales; the model's holds each of them.
        stored = scales.to(getattr(torch, _KINDS[tensor.dtype])).view(torch.uint8).numpy()
        for part, dtype, values in (
            ("packed", "I32", packed),
            ("scale", tensor.dtype, stored),
            ("shape", "I64", np.array(tensor.shape, np.int64)),
        ):
            shape = list(scales.shape if part == "scale" else values.shape)
            tensors[f"{name}_{part}"] = PackedTensor(shape=shape, dtype=dtype)
            made_of[f"{name}_{part}"] = values

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        for name in tensors:
            yield name, made_of[name] if name in made_of else source.items(name)

    with complete_folder(destination) as made:
        write_safetensors(made / DENSE, header_of(tensors, folder), parts())
        for file in folder.rglob("*"):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and is_carried(name) and name != SPARSITY_FILE:
                copy_file(folder, made, name)
        _write_config(made, config, widths)
        _verify(folder, made)
        size = (made / DENSE).stat().st_size
    return {"file_dense_bytes": source.file_bytes, "file_bytes": size}


def _refuse_unfit(name: str, source: DenseCheckpoint, grids: Grids) -> None:
    """Raise UserError where the format has no such matrix, whatever its bits."""
    if name not in source.tensors:
        raise UserError(f"{name} is stored under another name: compressed-tensors cannot hold it")
    shape = source.tensors[name].shape
    is_linear = len(shape) == 2 and name.endswith(".weight") and name not in grids.transposed
    if not is_linear:
        raise UserError(f"{name} is no plain linear layer: compressed-tensors cannot hold it")
    if shape[1] % GROUP:
        raise UserError(
            f"{name} has {shape[1]} inputs, which groups of {GROUP} do not divide: "
            "compressed-tensors cannot hold it; sparseramp pack without --format does"
        )


def _width(name: str, grids: Grids) -> int:
    """The bits of a matrix's codes; raises UserError where the format has no such codes."""
    whole = f"set prune.allocation=uniform and prune.bits={4 + 16 / GROUP:g}"
    found = sorted({int(width) for width in grids.widths[name]})
    if len(found) > 1 or found[0] not in WIDTHS:
        these = " and ".join(map(str, found))
        raise UserError(
            f"{name} has rows of {these} bits, engines read matrices of 4 or 8: {whole}, or pack "
            "without --format"
        )
    return found[0]


def _write_config(made: Path, config: dict[str, Any], widths: dict[str, int]) -> None:
    groups = {}
    for place, bits in enumerate(sorted(set(widths.values()))):
        mine = [name.removesuffix(".weight") for name, width in widths.items() if width == bits]
        groups[f"group_{place}"] = {
            "targets": [f"re:^{re.escape(name)}$" for name in mine],
            "weights": {"num_bits": bits, "type": "int", "symmetric": True}
            | {"strategy": "group", "group_size": GROUP},
            "format": "pack-quantized",
        }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
    (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _verify(folder: Path, made: Path) -> None:
    """Load both with transformers; its quantiser is compressed-tensors'."""
    import torch
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    found: Any = getattr(transformers, config.architectures[0])
    how = transformers.CompressedTensorsConfig(dequantize=True)
    ours = found.from_pretrained(folder, dtype="auto").state_dict()
    theirs = found.from_pretrained(made, dtype="auto", quantization_config=how).state_dict()
    if wrong := sorted(ours.keys() ^ theirs.keys()):
        raise RuntimeError(f"compressed-tensors reads no or another {wrong[0]}")
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name].to(tensor.dtype)):
            raise RuntimeError(f"compressed-tensors reads other values of {name}")
