"""Checkpoints converted once per node: made under a lock, renamed when they are complete.

    folder = convert_once(source, [dtype, layout.stamp()], lambda folder: write(model, folder))

A folder holds mapped weights (infra/weights.py) and what its library needs beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from infra.errors import UserError
from infra.sources import cache_dir

WEIGHTS = "weights.safetensors"
_DONE = "source.json"


def convert_once(
    source: str, key: list[Any], make: Callable[[Path], None], *, licence: str = ""
) -> Path:
    """The folder that `make` filled for this key, now or in an earlier process.

    Raises UserError where it cannot be written.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    folder = cache_dir() / "converted" / name
    making = folder.with_suffix(f".{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not (folder / _DONE).is_file():
                making.mkdir(exist_ok=True)
                make(making)
                facts = {"source": source, "licence": licence}
                (making / _DONE).write_text(json.dumps(facts))
                making.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot keep {source} in {cache_dir()}: {reason}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def licence_of(converted: Path) -> str:
    """What `convert_once` was told."""
    return str(json.loads((converted / _DONE).read_text())["licence"])


def stated_licence(checkpoint: Path) -> str:
    """The licence that a model card states in its front matter."""
    card = checkpoint / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    stated = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return stated[0] if stated else ""


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
