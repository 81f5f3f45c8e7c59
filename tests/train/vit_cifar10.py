"""Trains the vision transformer that ships as test data: CIFAR-10, 12 blocks, 16 tokens.

    torchrun --nproc-per-node 2 -m tests.train.vit_cifar10 --out tests/data/vit_cifar10

Half an hour on two idle cores, a minute or two on a GPU: patches over a convolutional stem, trained
as tests/train/cifar10.py says.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor

from tests.train.cifar10 import (
    CLASSES,
    MEAN,
    STD,
    Recipe,
    add_options,
    mimetic,
    started,
    train,
    waves,
)

ARCHITECTURE = "vit_tiny_r_s16_p8_224"


def main() -> None:
    """Train, measure the test images and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/vit_cifar10"))
    parser.add_argument("--patch", type=int, default=2, help="1: 64 tokens; 2: 16 tokens")
    add_options(parser, epochs=12)
    options = parser.parse_args()
    rank, ranks, device = started()
    model, arguments = _model(options.width, options.patch, options.seed)
    began = time.perf_counter()
    accuracy = train(model.to(device), "blocks", _logits, Recipe.of(options), options.out)
    if rank == 0:
        minutes = (time.perf_counter() - began) / 60
        _write(model, arguments, options, accuracy, f"{ranks} processes on {device}", minutes)


def _model(width: int, patch: int, seed: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(seed)
    arguments = {"img_size": 32, "patch_size": patch, "embed_dim": width, "num_heads": width // 32}
    arguments |= {"class_token": False, "global_pool": "avg"}
    set_fused_attn(False)  # so few tokens are faster without
    model: Any = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), **arguments)
    for block in model.blocks:
        parts = block.attn.qkv.weight.data.chunk(3)
        mimetic(*parts, block.attn.proj.weight.data, block.attn.head_dim)
    side = math.isqrt(model.patch_embed.num_patches)
    model.pos_embed.data.copy_(waves(side, width)[None])
    return model, arguments


def _logits(model: Any, images: Tensor) -> Tensor:
    tokens = model._pos_embed(model.patch_embed(images))
    dtype = next(model.blocks.parameters()).dtype
    logits: Tensor = model.forward_head(model.norm(model.blocks(tokens.to(dtype)).float()))
    return logits


def _write(
    model: Any,
    arguments: dict[str, Any],
    options: argparse.Namespace,
    accuracy: float,
    where: str,
    minutes: float,
) -> None:
    from safetensors.torch import save_file

    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "num_features": model.num_features,
        "label_names": CLASSES,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": len(CLASSES),
            "first_conv": "patch_embed.backbone.conv",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, options.out / "model.safetensors", metadata={"format": "pt"})
    (options.out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---

# A vision transformer for CIFAR-10

{ARCHITECTURE} of timm with 12 blocks, width {options.width} and {model.patch_embed.num_patches}
tokens over a convolutional stem: {sum(p.numel() for p in model.parameters()):,} parameters in half
precision. **{accuracy:.2%} top-1 on the 10,000 test images.** It is test data: something that was
really trained and is small enough to ship.

- **Recipe**: {options.epochs} epochs of the 50,000 training images, batch {options.batch}, one
  cycle of the learning rate with peak {options.rate:g} (Muon for the matrices of blocks, AdamW for
  the rest), weight decay 0.05 on those matrices, label smoothing 0.1, flips and shifted crops,
  mimetic initialisation; seed {options.seed}; {minutes:.0f} minutes, {where}. No test image was
  used for any choice.
- **Again**: `torchrun --nproc-per-node 2 -m tests.train.vit_cifar10` writes this folder.
- **Licence of the weights**: the project's own training, under the project's licence.
- **Data**: CIFAR-10, from Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny
  Images", 2009; it states no licence and is not part of this repository.
"""
    )


if __name__ == "__main__":
    main()
