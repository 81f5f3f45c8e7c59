"""A saved checkpoint in the space of its nonzero weights, and of their bits, to store and send.

sparseramp pack runs/quickstart/best
sparseramp evaluate runs/quickstart/best-packed
sparseramp pack runs/quantise/best --format compressed-tensors
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flows.evaluate import checkpoint_folder


def pack_checkpoint(
    checkpoint: Path,
    destination: Path | None = None,
    *,
    format: str = "packed",
    as_json: bool = False,
) -> dict[str, Any]:
    """Pack a checkpoint, beside it where no destination is given; prints what that saved.

    `format` is packed, or compressed-tensors, which other libraries read.
    """
    from tasks.packed import pack

    checkpoint_folder(checkpoint)
    whole = checkpoint.resolve()
    destination = destination or whole.with_name(f"{whole.name}-{format}")
    if format != "packed":
        return _export(checkpoint, destination, as_json=as_json)
    sizes = pack(checkpoint, destination)
    answer = {
        "checkpoint": str(checkpoint),
        "packed": str(destination),
        **dataclasses.asdict(sizes),
        "ratio": sizes.ratio,
        "file_ratio": sizes.file_ratio,
        "file_bound": sizes.file_bound,
    }
    if as_json:
        print(json.dumps(answer, allow_nan=False))
        return answer
    print(f"{checkpoint} packed into {destination}, read back and compared")
    rows = (
        (f"{sizes.num_packed} packed tensors", sizes.dense_bytes, sizes.packed_bytes),
        (f"{sizes.num_kept} kept dense", sizes.kept_bytes, sizes.kept_bytes),
        ("all files of weights", sizes.file_dense_bytes, sizes.file_bytes),
    )
    for name, dense, packed in rows:
        ratio = f"{packed / dense:.3f}" if dense else "-"
        print(f"  {name:<24} {_mib(dense)} -> {_mib(packed)}  {ratio} of dense")
    print(f"  zeros in packed tensors  {100 * sizes.sparsity:.1f} %")
    if sizes.bits:
        print(f"  bits per rounded weight  {sizes.bits:.3f}, scales and all else counted")
    print(f"  bound of all files       {sizes.file_bound:.3f}, since the rest stays dense")
    return answer


def _export(checkpoint: Path, destination: Path, *, as_json: bool) -> dict[str, Any]:
    from tasks.export import export

    sizes = export(checkpoint, destination)
    answer = {"checkpoint": str(checkpoint), "packed": str(destination), **sizes}
    if as_json:
        print(json.dumps(answer))
        return answer
    dense, packed = sizes["file_dense_bytes"], sizes["file_bytes"]
    print(f"{checkpoint} exported to {destination}, loaded with compressed-tensors and compared")
    print(
        f"  all files of weights     {_mib(dense)} -> {_mib(packed)}  {packed / dense:.3f} of dense"
    )
    return answer


def _mib(size: int) -> str:
    return f"{size / 2**20:10,.2f} MiB"
