"""Weights that are mapped from one safetensors file, never copied.

    mapped = MappedWeights(path)
    mapped.attach(block, "model.layers.3.", device)   # dense weights of one block
    mapped.release(block, "model.layers.3.")          # forget what pruning changed

The file is mapped copy-on-write: all processes of a node share its pages, pruning in place makes
only the touched pages private, and attaching again restores the dense block. Every `attach` opens
a mapping of its own, because private pages live as long as any tensor of their mapping does.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from infra.errors import UserError


class MappedWeights:
    """The dense weights of one model, named as its `state_dict` names them."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where the file is missing, truncated or not safetensors."""
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.names: list[str] = list(file.keys())
                self.sha256: str = (file.metadata() or {}).get("sha256", "")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read weights {path}: {error}") from None

    def read(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Freshly mapped tensors under a prefix, with the prefix taken off their names."""
        with safe_open(self.path, framework="pt") as file:
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in self.names
                if name.startswith(prefix)
            }

    def attach(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        """Give a module its dense weights: mapped on the CPU, copied elsewhere."""
        tensors = {name: tensor.to(device) for name, tensor in self.read(prefix).items()}
        module.load_state_dict(tensors, strict=False, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    def release(self, module: nn.Module, prefix: str) -> None:
        """Drop a module's pruned weights and leave the mapped dense ones in their place."""
        self.attach(module, prefix, torch.device("cpu"))


def save_mapped(module: nn.Module, path: Path) -> str:
    """Write a module's weights for `MappedWeights`; returns the SHA-256 of their contents.

    Tied weights are written once, under the first of their names.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor.contiguous()
    digest = content_sha256(iter(tensors.items()))
    save_file(tensors, path, metadata={"format": "pt", "sha256": digest})
    return digest


def content_sha256(tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
