"""Image classifiers: any model of timm that has blocks, with its own transforms.

    modality = VisionModality.load(ModelSpec(source="path", modality="vision"), torch.device("cpu"))
    modality.measure(modality.evaluation_batches(data, "report", windows=512, context=0)[0]).scores

A checkpoint is a folder or hub repository in timm's format (config.json and model.safetensors). It
is converted once per node into one mapped file; calibration needs images only, evaluation the class
of each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.checkpoints import inspect_checkpoint
from infra.errors import UserError
from infra.images import Example, evaluated, usable
from infra.records import Split
from infra.recovery_spec import RecoverySpec
from infra.sources import fetch
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from infra.structure import copy_structure, is_structured, read_structure, shrink_model
from infra.weights import MappedWeights, save_mapped
from modalities.base import (
    Batch,
    ExampleBatch,
    HeldWeights,
    LoadedModality,
    Measured,
    Weights,
    resolve_dtype,
)
from modalities.blocks import Block, find_blocks
from modalities.classes import class_numbers
from modalities.converted import WEIGHTS, convert_once, licence_of, stated_licence
from modalities.smaller import load_smaller

_FORMAT = 1  # of a converted checkpoint; a change makes all of them anew
_CONFIG = "config.json"
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}
_TRAINING_IMAGES = 4096  # without augmentation
_CACHED_BYTES = 2 << 30  # of transformed images that wait for the next trial


@dataclass(frozen=True)
class ImageBatch(ExampleBatch):
    """`ids`: images x channels x height x width, transformed; `labels`: the class of each, -1
    where it is not known."""

    labels: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Self:
        """Some of the images."""
        return replace(super().rows(start, stop), labels=self.labels[start:stop])

    def pick(self, numbers: Sequence[int]) -> Self:
        """Some of them, by number."""
        return replace(super().pick(numbers), labels=tuple(self.labels[i] for i in numbers))


class VisionModality(LoadedModality):
    """An image classifier; its loss is nats per image, its scores top-1 and top-5."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        weights: Weights,
        device: torch.device,
        folder: Path,
        positions: int,
    ) -> None:
        super().__init__(model, blocks, weights, device)
        self.folder, self.positions = folder, positions
        self._cache: dict[tuple[DataSpec, str, int], tuple[Tensor, list[Example]]] = {}

    @classmethod
    def load(cls, spec: ModelSpec, device: torch.device) -> VisionModality:
        """Convert where this node has not yet, then map.

        Raises UserError for weights that are missing, damaged, unsafe or of another shape, for a
        configuration that is not timm's, and for a model without blocks that can be pruned.
        """
        folder = convert(spec, resolve_dtype(spec.dtype, device))
        weights = MappedWeights(folder / WEIGHTS)
        model = _created(folder, pretrained=False).eval().requires_grad_(False)
        if is_structured(folder):
            shrink_model(model, read_structure(folder))
        weights.attach(model, "", torch.device("cpu"))
        model.to(next(model.parameters()).dtype)  # tables that are no weights
        probe = _some_image(model)
        blocks = find_blocks(model, lambda: model(probe))
        state = _hidden_elements(model, blocks[0], probe)
        return cls(model, blocks, weights, device, folder, state // _width(blocks))

    @cached_property
    def _transform(self) -> Any:
        config = _data().resolve_model_data_config(self.model)
        return _data().create_transform(**config, is_training=False)

    @cached_property
    def _names(self) -> list[str]:
        """Of the classes of the head, in order; [] where nobody states them."""
        config: Any = self.model.pretrained_cfg
        stated = config.get("label_names") or ()
        if isinstance(stated, dict):
            stated = [stated[key] for key in sorted(stated, key=int)]
        if not stated and (subset := _data().infer_imagenet_subset(self.model)):
            stated = _data().ImageNetInfo(subset).label_names()
        return [str(name) for name in stated]

    def calibration_batches(
        self, data: DataSpec, calibration: CalibrationSpec, *, divisor: int = 1
    ) -> list[Batch]:
        """The first images of the calibration split in the order of the seed; no class is read."""
        pixels, _ = self._images(data, "calibration", calibration.seed, calibration.samples)
        return self._batches(pixels, [-1] * len(pixels), divisor)

    def evaluation_batches(
        self, data: DataSpec, split: Split, windows: int, context: int, *, divisor: int = 1
    ) -> list[Batch]:
        """The first images of a split, in an order that never changes, with their classes."""
        pixels, found = self._images(data, split, 0, windows)
        labels = class_numbers(found, data, split, self._names, self._outputs)
        return self._batches(pixels, labels, divisor)

    def training_windows(self, data: DataSpec, recovery: RecoverySpec) -> Batch:
        """Calibration images with their classes; so many at most are held in memory."""
        if recovery.source or recovery.column or recovery.has_answers:
            raise UserError("recovery.source: a vision model is trained on the images of [data]")
        wanted = min(recovery.steps * recovery.batch, _TRAINING_IMAGES)
        there = len(evaluated(data, "calibration", recovery.seed))
        count = min(wanted, max(1, int(there * (1 - data.broken))))
        pixels, found = self._images(data, "calibration", recovery.seed, count)
        labels = class_numbers(found, data, "calibration", self._names, self._outputs)
        return ImageBatch(pixels, (0,) * count, tuple(labels))

    def num_together(self, batch: Batch) -> int:
        """Images per forward."""
        return self._rows()

    def _images(
        self, data: DataSpec, split: Any, seed: int, count: int
    ) -> tuple[Tensor, list[Example]]:
        """Transformed images; those of the last trial are kept for the next one."""
        key = (data, split, seed)
        if key not in self._cache or len(self._cache[key][0]) < count:
            good = usable(evaluated(data, split, seed), count, data, f"data.{split}")
            if text := next((e.name for e, image in good if image is None), ""):
                raise UserError(f"data.{split}: {text} has no image: set data.image")
            dtype = next(self.model.parameters()).dtype
            pixels = torch.stack([self._transform(image).to(dtype) for _, image in good])
            self._cache.pop(key, None)
            self._cache[key] = pixels, [example for example, _ in good]
            while sum(p.nbytes for p, _ in self._cache.values()) > _CACHED_BYTES:
                oldest = next(iter(self._cache))
                if oldest == key:
                    break
                del self._cache[oldest]
        pixels, found = self._cache[key]
        return pixels[:count], found[:count]

    def _batches(self, pixels: Tensor, labels: list[int], divisor: int) -> list[Batch]:
        rows = max(1, self._rows() // divisor)
        return [
            ImageBatch(part, (0,) * len(part), tuple(labels[i : i + rows]))
            for i, part in zip(range(0, len(pixels), rows), pixels.split(rows), strict=True)
        ]

    def _rows(self) -> int:
        return max(1, _TOKENS_PER_BATCH[self.device.type] // self.positions)

    @property
    def _outputs(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type]

    def run(self, batch: Batch) -> Tensor:
        """One forward of the whole model: images x classes."""
        logits: Tensor = self.model(batch.ids.to(self.device))
        return logits

    def probe(self) -> Any:
        """An image of noise."""
        return self.model(_some_image(self.model).to(self.device))

    def losses(self, batch: Batch) -> list[float]:
        """Cross-entropy of each image, in nats."""
        return self.measure(batch).losses

    def window_losses(self, batch: Batch) -> list[Tensor]:
        """The same as tensors of one graph; an image without a class counts as what it is taken
        for."""
        logits, labels = self._scored(batch)
        return list(F.cross_entropy(logits, labels, reduction="none"))

    def measure(self, batch: Batch) -> Measured:
        """Cross-entropy, and whether the class is the first, or among the first five."""
        logits, labels = self._scored(batch)
        losses = F.cross_entropy(logits, labels, reduction="none").tolist()
        first = logits.topk(min(5, logits.shape[1])).indices
        hits = first == labels[:, None]
        scores = {"top1": hits[:, 0].float().tolist()}
        if logits.shape[1] > 5:
            scores["top5"] = hits.any(1).float().tolist()
        return Measured(losses, scores, self._words(first[:, 0]), self._words(labels))

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.run(batch).float()
        assert isinstance(batch, ImageBatch)
        labels = torch.tensor(batch.labels, device=logits.device)
        return logits, torch.where(labels < 0, logits.argmax(1), labels)

    def _words(self, classes: Tensor) -> list[str]:
        return [self._names[i] if i < len(self._names) else str(i) for i in classes.tolist()]

    def scored_tokens(self, batch: Batch) -> list[int]:
        """One class per image."""
        return [1] * batch.windows

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors, as timm writes them."""
        shutil.copy(self.folder / _CONFIG, folder)
        copy_structure(self.folder, folder)
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def reopen(self, folder: Path) -> VisionModality:
        """Load what `save` wrote, as any user of timm would, in the precision of this one."""
        dtype = next(self.model.parameters()).dtype
        model = _opened(folder).to(dtype).eval()
        model.requires_grad_(False)  # torch picks other kernels where a weight wants a gradient
        blocks = [replace(b, module=model.get_submodule(b.name)) for b in self.blocks]
        rest = (self.device, folder, self.positions)
        return VisionModality(model, blocks, HeldWeights(), *rest)

    def facts(self) -> dict[str, Any]:
        """Width, classes, positions per batch and licence; an image has no context."""
        return {
            "modality": "vision",
            "unit": "image",
            "context": 0,
            "width": _width(self.blocks),
            "outputs": self._outputs,
            "batch_tokens": self._rows() * self.positions,
            "window_tokens": self.positions,
            "licence": licence_of(self.folder),
        }


def convert(spec: ModelSpec, dtype: torch.dtype) -> Path:
    """The folder of a converted checkpoint; made once per node."""
    path = fetch(spec.source, allow_pickle=spec.allow_pickle)
    layout = inspect_checkpoint(path, allow_pickle=spec.allow_pickle)
    if layout.gguf or "architecture" not in json.loads((layout.folder / _CONFIG).read_text()):
        raise UserError(
            f"{spec.source} is no model of timm: its config.json states no architecture; save it "
            "with timm.models.save_for_hf, or set model.modality"
        )

    def make(folder: Path) -> None:
        try:
            model = _opened(layout.folder)
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot load {spec.source} with timm: {reason}") from error
        config: Any = model.pretrained_cfg
        if not model.num_classes:
            raise UserError(f"{spec.source} has no head: it does not classify images")
        if config["num_classes"] != model.num_classes:
            raise UserError(
                f"{spec.source}: config.json states {config['num_classes']} classes, its "
                f"model_args {model.num_classes}: correct it"
            )
        save_mapped(model.to(dtype), folder / WEIGHTS)
        copy_structure(layout.folder, folder)
        text = json.dumps(_native(layout.folder / _CONFIG), indent=1)
        (folder / _CONFIG).write_text(text, encoding="utf-8")

    licence = stated_licence(layout.folder) or _licence(layout.folder)
    return convert_once(
        spec.source, ["timm", _FORMAT, str(dtype), layout.stamp()], make, licence=licence
    )


def _native(config: Path) -> dict[str, Any]:
    """A configuration for weights that are timm's own: what had to be done on loading is done."""
    stated: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    for name in ("custom_load", "label_offset"):
        stated.get("pretrained_cfg", stated).pop(name, None)
    return stated


def _data() -> Any:
    """timm's transforms and names of classes, which are not typed."""
    import timm.data

    return timm.data


def _created(folder: Path, *, pretrained: bool) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder.absolute()}", pretrained=pretrained)


def _opened(folder: Path) -> Any:
    """With the weights of the folder."""
    return load_smaller(folder) if is_structured(folder) else _created(folder, pretrained=True)


def _licence(folder: Path) -> str:
    config = json.loads((folder / _CONFIG).read_text())
    return str(config.get("pretrained_cfg", config).get("license") or "")


def _some_image(model: Any) -> Tensor:
    size = _data().resolve_model_data_config(model)["input_size"]
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).dtype)


def _width(blocks: Sequence[Block]) -> int:
    """Channels of the hidden state of the first block: what its first product takes in."""
    return blocks[0].matrices[0].weight().shape[1]


def _hidden_elements(model: nn.Module, block: Block, probe: Tensor) -> int:
    """Numbers in the hidden state of one image after a block."""
    sizes: list[int] = []
    handle = block.module.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    try:
        with torch.no_grad():
            model(probe)
    finally:
        handle.remove()
    return sizes[0]
