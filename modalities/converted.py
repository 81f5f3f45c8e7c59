"""Checkpoints converted once per node: made under a lock, renamed when they are complete.

    folder = convert_once(source, [dtype, layout.stamp()], lambda folder: write(model, folder))

A folder holds mapped weights (infra/weights.py) and what its library needs beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.cache import made_once

WEIGHTS = "weights.safetensors"
_FACTS = "source.json"


def convert_once(
    source: str, key: list[Any], make: Callable[[Path], None], *, licence: str = ""
) -> Path:
    """The folder that `make` filled for this key, now or in an earlier process.

    Raises UserError where it cannot be written.
    """

    def made(folder: Path) -> None:
        folder.mkdir()
        make(folder)
        facts = {"source": source, "licence": licence}
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return made_once(source, f"converted-{name}", made)


def licence_of(converted: Path) -> str:
    """What `convert_once` was told."""
    return str(json.loads((converted / _FACTS).read_text())["licence"])


def stated_licence(checkpoint: Path) -> str:
    """The licence that a model card states in its front matter."""
    card = checkpoint / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    stated = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return stated[0] if stated else ""
