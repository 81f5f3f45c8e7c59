"""Trains the ConvNeXt that ships as test data: CIFAR-10, 12 blocks in four stages.

    torchrun --nproc-per-node 2 -m tests.train.convnext_cifar10 --out tests/data/convnext_cifar10

A few minutes on two idle cores; trained as tests/train/cifar10.py says. It is small and hardly
trained, which `--width 128 --epochs 12` would change.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tests.train.cifar10 import CLASSES, add_options, train_and_write

ARCHITECTURE = "convnext_atto"
DEPTHS = (2, 2, 6, 2)


def main() -> None:
    """Train, measure the test images and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/convnext_cifar10"))
    add_options(parser, epochs=6, width=64, rate=3e-3)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    arguments: dict[str, Any] = {
        "patch_size": 2,
        "depths": DEPTHS,
        "kernel_sizes": 3,
        "conv_mlp": False,
    }
    arguments["dims"] = tuple(options.width // part for part in (4, 2, 1, 1))
    model: Any = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), **arguments)
    train_and_write(
        model,
        "stages",
        _logits,
        options,
        architecture=ARCHITECTURE,
        arguments=arguments,
        title="A ConvNeXt for CIFAR-10",
        shape=f"{ARCHITECTURE} of timm with {sum(DEPTHS)} blocks in stages of {DEPTHS}, widths "
        f"{arguments['dims']}, kernels of 3 x 3 and patches of 2 x 2",
        script="tests.train.convnext_cifar10",
    )


def _logits(model: Any, images: Tensor) -> Tensor:
    features = model.stem(images)
    dtype = next(model.stages.parameters()).dtype
    logits: Tensor = model.forward_head(model.norm_pre(model.stages(features.to(dtype)).float()))
    return logits


if __name__ == "__main__":
    main()
