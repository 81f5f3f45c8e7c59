"""Models that match images and texts, such as CLIP: an image is classified by the nearest text.

    modality = MultimodalModality.load(ModelSpec(source="path/to/clip", ...), cpu)
    modality.measure(modality.evaluation_batches(data, "report", 8, 0)[0]).scores["accuracy"]

The texts are the image's `choices`, or else all answers of the windows that are measured. A
`question` such as "a photo of a {}." is put around each. The loss is the cross-entropy over texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from infra.images import Example, evaluated, usable
from infra.records import Split
from infra.specs import CalibrationSpec, DataSpec
from modalities.base import Batch, ExampleBatch, Measured
from modalities.blocks import Block, find_blocks
from modalities.multimodal import MultimodalModality, right_answer
from modalities.prompts import noise

_IMAGES_PER_BATCH = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class MatchBatch(ExampleBatch):
    """Images (`ids` are their pixels), the texts that are compared, and the right one of each."""

    images: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    right: tuple[int, ...] = ()

    def rows(self, start: int, stop: int) -> Self:
        """Some of the images, against all texts."""
        part = super().rows(start, stop)
        images = {name: tensor[start:stop] for name, tensor in self.images.items()}
        return replace(part, images=images, right=self.right[start:stop])


class ContrastiveModality(MultimodalModality):
    """A model of two towers that says how well a text fits an image."""

    unit = "image"

    def _prepare(self) -> None:
        self.dtype = next(self.model.parameters()).dtype

    def probe(self) -> list[Block]:
        """Find the blocks."""
        batch = self._matched([Example(b"", "probe")], [noise()], ["a", "b"], [0])
        return find_blocks(self.model, lambda: self.run(batch))

    def calibration_batches(
        self, data: DataSpec, calibration: CalibrationSpec, *, divisor: int = 1
    ) -> list[Batch]:
        """Pairs of an image and its text, those with texts of one length together."""
        found, images = self._usable(data, "calibration", calibration.seed, calibration.samples)
        texts = [_around(example, right_answer(example, "data.calibration")) for example in found]
        lengths = [len(self.processor.tokenizer(text)["input_ids"]) for text in texts]
        order = sorted(range(len(found)), key=lambda i: lengths[i])
        batches: list[Batch] = []
        for _, same in groupby(order, key=lambda i: lengths[i]):
            for part in _parts(list(same), self._rows(divisor)):
                some, looks = [found[i] for i in part], [images[i] for i in part]
                words = [texts[i] for i in part]
                batches.append(self._matched(some, looks, words, range(len(part))))
        return batches

    def evaluation_batches(
        self, data: DataSpec, split: Split, windows: int, context: int, *, divisor: int = 1
    ) -> list[Batch]:
        """The first images of a split, in an order that never changes."""
        what = f"data.{split}"
        found, images = self._usable(data, split, 0, windows)
        rights = [right_answer(example, what) for example in found]
        every = sorted(set(rights))
        choices = [list(example.choices) or every for example in found]
        batches: list[Batch] = []
        for _, same in groupby(range(len(found)), key=lambda i: (found[i].question, choices[i])):
            for part in _parts(list(same), self._rows(divisor)):
                words = choices[part[0]]
                for i in part:
                    if rights[i] not in words:
                        raise UserError(
                            f"{what}: the answer {rights[i]!r} of {found[i].name} is none of its "
                            f"choices ({', '.join(words)}): set data.answer"
                        )
                right = [words.index(rights[i]) for i in part]
                some = [found[i] for i in part]
                texts = [_around(some[0], word) for word in words]
                batch = self._matched(some, [images[i] for i in part], texts, right)
                batches.append(replace(batch, words=tuple(words)))
        return batches

    def _rows(self, divisor: int) -> int:
        return max(1, _IMAGES_PER_BATCH[self.device.type] // divisor)

    def _usable(
        self, data: DataSpec, split: Any, seed: int, count: int
    ) -> tuple[list[Example], list[Any]]:
        good = usable(evaluated(data, split, seed), count, data, f"data.{split}")
        if name := next((e.name for e, image in good if image is None), ""):
            kind = type(self.model).__name__
            raise UserError(f"data.{split}: {name} has no image: {kind} takes none without")
        return [example for example, _ in good], [image for _, image in good]

    def _matched(
        self, some: Sequence[Example], images: Any, texts: Sequence[str], right: Sequence[int]
    ) -> MatchBatch:
        pixels = self.processor.image_processor(list(images), return_tensors="pt")
        config: Any = self.model.config
        # SigLIP was trained on texts padded to the full length, which it reads without a mask.
        padding = "max_length" if "siglip" in config.model_type else True
        longest = config.get_text_config().max_position_embeddings
        options = {"padding": padding, "truncation": True, "max_length": longest}
        words = self.processor.tokenizer(list(texts), return_tensors="pt", **options)
        moved = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in pixels.items()}
        ids = moved["pixel_values"]
        return MatchBatch(ids, (0,) * len(some), moved, dict(words), tuple(texts), tuple(right))

    def run(self, batch: Batch) -> Any:
        """One forward of the whole model."""
        assert isinstance(batch, MatchBatch)
        inputs = {n: t.to(self.device) for n, t in (batch.images | batch.texts).items()}
        return self.model(**inputs)

    def window_losses(self, batch: Batch) -> list[Tensor]:
        """Raises UserError: one pair has nothing to be told from, so its loss has no gradient."""
        raise UserError(
            f"{type(self.model).__name__} has no loss of single pairs: choose a method and an "
            "allocation that need no gradient"
        )

    def measure(self, batch: Batch) -> Measured:
        """The same, and whether the right text is the nearest."""
        logits, losses = self._scored(batch)
        assert isinstance(batch, MatchBatch)
        best = logits.argmax(1).tolist()
        hits = [float(a == b) for a, b in zip(best, batch.right, strict=True)]
        said, expected = ([batch.words[i] for i in each] for each in (best, batch.right))
        return Measured([float(x) for x in losses], {"accuracy": hits}, said, expected)

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, MatchBatch)
        logits: Tensor = self.run(batch).logits_per_image.float()
        right = torch.tensor(batch.right, device=logits.device)
        return logits, F.cross_entropy(logits, right, reduction="none")


def _parts(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _around(example: Example, word: str) -> str:
    return example.question.replace("{}", word) if "{}" in example.question else word
