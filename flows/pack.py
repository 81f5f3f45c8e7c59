"""A saved checkpoint in the space of its nonzero weights, for storing and sending.

sparseramp pack runs/quickstart/best
sparseramp evaluate runs/quickstart/best-packed
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flows.evaluate import checkpoint_folder


def pack_checkpoint(
    checkpoint: Path, destination: Path | None = None, *, as_json: bool = False
) -> dict[str, Any]:
    """Pack a checkpoint, beside it where no destination is given; prints what that saved."""
    from tasks.packed import pack

    checkpoint_folder(checkpoint)
    whole = checkpoint.resolve()
    destination = destination or whole.with_name(f"{whole.name}-packed")
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
    print(f"  bound of all files       {sizes.file_bound:.3f}, since the rest stays dense")
    return answer


def _mib(size: int) -> str:
    return f"{size / 2**20:10,.2f} MiB"
