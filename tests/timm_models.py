"""Tiny random models of timm, checkpoints of them and images, for the tests of vision.

modality = load_vision(write_timm("vit", folder))
batches = modality.evaluation_batches(write_images(other), "report", windows=8, context=0)
"""

import io
from pathlib import Path
from typing import Any

import torch

from infra.specs import DataSpec, ModelSpec
from modalities.vision import VisionModality

CLASSES = ("blue", "green", "red", "white", "black", "grey", "pink")
SIDE = 32
_VIT: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 3}
_VIT |= {"num_heads": 2}

# timm's architecture and what it is given.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _VIT),
    "vit-hybrid": (
        "vit_tiny_r_s16_p8_224",
        _VIT | {"patch_size": 2, "class_token": False, "global_pool": "avg"},
    ),
    "deit": ("deit_tiny_distilled_patch16_224", _VIT),
    "beit": ("beit_base_patch16_224", _VIT),
    "eva": ("eva02_tiny_patch14_224", _VIT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 64,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 32,
            "depths": (2, 2),
            "num_heads": (2, 2),
        },
    ),
    "convnext": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "convnextv2": ("convnextv2_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "convnext-conv": (
        "convnext_atto",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "conv_mlp": True},
    ),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64}),
}


def build_timm(family: str, *, classes: int = len(CLASSES), **options: Any) -> Any:
    """A random model of a family, the same one every time."""
    import timm

    name, arguments = TIMM[family]
    side = arguments.get("img_size", SIDE)
    torch.manual_seed(len(family))
    model = timm.create_model(
        name,
        num_classes=classes,
        pretrained_cfg_overlay={
            "num_classes": classes,
            "input_size": (3, side, side),
            "crop_pct": 1.0,
            "label_names": list(CLASSES[:classes]),
        }
        | options,
        **arguments,
    )
    for parameter in model.parameters():  # so that pruning is felt
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def write_timm(family: str, folder: Path, **options: Any) -> Path:
    """A checkpoint as timm writes it."""
    from timm.models import save_for_hf

    folder.mkdir(parents=True, exist_ok=True)
    save_for_hf(build_timm(family, **options), folder, safe_serialization=True)
    return folder


def load_vision(folder: Path, dtype: Any = "float32") -> VisionModality:
    """The checkpoint in a folder, as a trial loads it."""
    spec = ModelSpec(source=str(folder), modality="vision", dtype=dtype)
    return VisionModality.load(spec, torch.device("cpu"))


def png(number: int, side: int = SIDE) -> bytes:
    """An image of its own for every number."""
    import PIL.Image

    torch.manual_seed(number)
    pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
    made = io.BytesIO()
    PIL.Image.fromarray(pixels.numpy()).save(made, "png")
    return made.getvalue()


def write_images(folder: Path, count: int = 84, classes: tuple[str, ...] = CLASSES) -> DataSpec:
    """A folder per class, dealt out to the three splits."""
    for number in range(count):
        file = folder / classes[number % len(classes)] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return DataSpec(source=str(folder))
