"""Trains the vision transformer that ships as test data: CIFAR-10, 12 blocks, 16 tokens.

    torchrun --nproc-per-node 2 -m tests.train.vit_cifar10 --out tests/data/vit_cifar10

Half an hour on two idle cores, a minute or two on a GPU: patches over a convolutional stem, trained
as tests/train/cifar10.py says.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor

from tests.train.cifar10 import CLASSES, add_options, mimetic, train_and_write, waves

ARCHITECTURE = "vit_tiny_r_s16_p8_224"


def main() -> None:
    """Train, measure the test images and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/vit_cifar10"))
    parser.add_argument("--patch", type=int, default=2, help="1: 64 tokens; 2: 16 tokens")
    add_options(parser, epochs=12)
    options = parser.parse_args()
    model, arguments = _model(options.width, options.patch, options.seed)
    train_and_write(
        model,
        "blocks",
        _logits,
        options,
        architecture=ARCHITECTURE,
        arguments=arguments,
        title="A vision transformer for CIFAR-10",
        shape=f"{ARCHITECTURE} of timm with {len(model.blocks)} blocks, width {options.width} and "
        f"{model.patch_embed.num_patches} tokens over a convolutional stem",
        script="tests.train.vit_cifar10",
    )


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


if __name__ == "__main__":
    main()
