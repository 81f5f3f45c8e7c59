"""Images with what is known of them: class, question and answer, caption; dealt out by a hash.

    examples(DataSpec(source="photos/"), "selection")[0].label    # "cat": the folder it lies in

A source is a folder of images (a folder per class, or none), a table (parquet, jsonl, a folder of
`save_to_disk`) whose column `data.image` holds images or their paths, or CIFAR-10 as PNG strips or
in its binary version. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.documents import TABLES, Split, deal, files_inside, load_table, suffix_of
from infra.errors import UserError
from infra.sources import fetch
from infra.specs import DataSpec

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SIDE = 32  # of a CIFAR image
_COLUMNS = ("image", "label", "question", "answer", "choices")  # that a spec names
_SPLIT = re.compile(r"/(train|validation|valid|val|dev|test)[-_./]")


@dataclass(frozen=True)
class Example:
    """One image, or text alone where `image` is empty; `label` is a class or the name of one.

    `number` is the place of that class in the data set's own order, where it has one.
    """

    image: bytes | Path
    name: str
    label: int | str | None = None
    number: int | None = None
    question: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()

    def read(self) -> bytes:
        """The encoded image."""
        return self.image.read_bytes() if isinstance(self.image, Path) else self.image


def examples(data: DataSpec, split: Split) -> list[Example]:
    """The distinct images of a split, in the order of their source.

    Raises UserError where there are none, where report shares any with another split, and for a
    class that `data.classes` does not name.
    """

    def read(source: str) -> tuple[Example, ...]:
        path = fetch(source, "dataset")
        columns = tuple((name, getattr(data, name)) for name in _COLUMNS)
        return _read(path, path.stat().st_mtime_ns, source, columns, data.files)

    found = deal(data, split, read, _key, lambda example: example.name, "image")
    return [_asked(example, data) for example in found] if data.ask or data.classes else found


def _asked(example: Example, data: DataSpec) -> Example:
    """With the question and the classes that the spec gives."""
    label = example.label
    if data.classes and isinstance(label, int):
        if not 0 <= label < len(data.classes):
            raise UserError(
                f"{example.name} is of class {label}, data.classes names {len(data.classes)} "
                f"(0 to {len(data.classes) - 1})"
            )
        example = replace(example, label=data.classes[label], number=label)
    return replace(
        example,
        question=example.question or data.ask,
        choices=example.choices or data.classes,
    )


def evaluated(data: DataSpec, split: Split, seed: int = 0) -> list[Example]:
    """The same in the order in which they are measured, or with a seed, calibrate."""
    found = examples(data, split)
    random.Random(seed).shuffle(found)
    return found


def usable(
    found: Iterable[Example], count: int, data: DataSpec, what: str
) -> list[tuple[Example, Image | None]]:
    """The first `count` examples whose image can be decoded, with it; None for text alone.

    Raises UserError naming the first broken one where more are broken than `data.broken` allows,
    and where there are not enough.
    """
    from PIL.Image import DecompressionBombError

    good: list[tuple[Example, Image | None]] = []
    broken: list[str] = []
    for example in found:
        if len(good) == count:
            break
        try:
            good.append((example, decode(example) if example.image else None))
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
            reason = str(error).partition("\n")[0].partition(" <")[0]
            broken.append(f"{example.name} ({reason or type(error).__name__})")
    # One is not yet a share of a few images.
    allowed = max(1, data.broken * (len(good) + len(broken))) if data.broken else 0
    if len(broken) > allowed:
        seen = len(good) + len(broken)
        share = math.ceil(100 * len(broken) / seen) / 100
        raise UserError(
            f"{what}: {len(broken)} of {seen} images cannot be read, the first is {broken[0]}: "
            f"repair or remove them, or allow such a share with data.broken={share:g}"
        )
    if len(good) < count:
        dealt = "" if getattr(data, what.removeprefix("data."), "") else ", its part of data.source"
        raise UserError(
            f"{what} has {len(good)} images{dealt}, {count} are asked for: give more, or ask for "
            "fewer"
        )
    return good


def decode(example: Example) -> Image:
    """The image in RGB; raises OSError or ValueError where it is broken."""
    import PIL.Image

    image = PIL.Image.open(io.BytesIO(example.read())).convert("RGB")
    if min(image.size) < 2:
        raise ValueError(f"it has {image.size[0]} x {image.size[1]} pixels")
    return image


def examples_sha256(data: DataSpec, split: Split) -> str:
    """A fingerprint of all images of a split, what is known of them, and their order."""
    digest = hashlib.sha256()
    for example in examples(data, split):
        known = [example.label, example.question, example.answer, example.choices]
        digest.update(_digest(example) + json.dumps(known).encode())
    return digest.hexdigest()


def _key(example: Example) -> bytes:
    """What makes two of them the same: the image, or the question where there is none."""
    return _digest(example) if example.image else example.question.encode()


@functools.lru_cache(maxsize=1 << 20)
def _digest(example: Example) -> bytes:
    try:
        return hashlib.sha256(example.read()).digest()
    except OSError:  # it is counted as broken where it is used
        return hashlib.sha256(str(example.image).encode()).digest()


@functools.lru_cache(maxsize=4)  # every trial of a worker asks for the same few
def _read(
    path: Path, stamp: int, source: str, columns: tuple[tuple[str, str], ...], pattern: str
) -> tuple[Example, ...]:
    if path.name.endswith("_batch.png") or "data_batch_" in path.name:
        found: Iterator[Example] = _cifar(path)
    else:
        images, tables = _inside(path, pattern, source)
        found = _rows(tables, source, dict(columns)) if tables else _folder(path, images)
    seen: dict[bytes, Example] = {}
    for example in found:  # one image may be asked about twice, and have several captions
        asked = json.dumps([example.question, example.choices, example.answer])
        seen.setdefault(_key(example) + asked.encode(), example)
    return tuple(seen.values())


def _inside(path: Path, pattern: str, source: str) -> tuple[list[Path], list[Path]]:
    """The images of a source, and what is its table: those of the first kind, beside images no
    .json, which tells other things."""
    if path.is_file() and suffix_of(path) not in TABLES:
        known = ", ".join(TABLES)
        raise UserError(f"{source} is no folder of images, no table ({known}), and not CIFAR-10's")
    if path.is_file() or (path / "state.json").exists():
        return [], [path]
    files = files_inside(path, pattern, source)
    images = [file for file in files if file.suffix.lower() in _IMAGES]
    tables = [f for f in files if suffix_of(f) in TABLES and not (images and f.suffix == ".json")]
    tables = [file for file in tables if suffix_of(file) == suffix_of(tables[0])]
    splits = {found[1] for file in tables if (found := _SPLIT.search(f"/{file.relative_to(path)}"))}
    if len(splits) > 1:
        raise UserError(
            f"{source} holds the splits {', '.join(sorted(splits))}: choose one with "
            f"data.files={tables[0].relative_to(path).as_posix()!r} or a pattern"
        )
    return images, tables


def _folder(path: Path, images: list[Path]) -> Iterator[Example]:
    for file in images:
        inside = file.relative_to(path)
        label = inside.parts[0] if len(inside.parts) > 1 else None
        yield Example(file, inside.as_posix(), label)


def _cifar(path: Path) -> Iterator[Example]:
    """A batch of CIFAR-10: a strip with an image per line of pixels, or the binary version."""
    if path.suffix == ".bin":
        data, size = path.read_bytes(), 1 + 3 * _SIDE**2
        if len(data) % size:
            raise UserError(f"{path} is cut off: {len(data)} bytes are no multiple of {size}")
        records = (data[i : i + size] for i in range(0, len(data), size))
        pairs = [(record[0], _interleaved(record[1:])) for record in records]
    else:
        import PIL.Image

        most, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:  # a strip of 10,000 images is large, and no bomb
            with PIL.Image.open(path) as strip:
                pixels, size = strip.convert("RGB").tobytes(), 3 * _SIDE**2
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = most
        images = [pixels[i : i + size] for i in range(0, len(pixels), size)]
        pairs = list(zip(_strip_labels(path, len(images)), images, strict=True))
    header = f"P6 {_SIDE} {_SIDE} 255\n".encode()
    for number, (label, pixels) in enumerate(pairs):
        yield Example(header + pixels, f"{path.name}[{number}]", label)


def _interleaved(planes: bytes) -> bytes:
    third = len(planes) // 3
    return bytes(
        x
        for pixel in zip(*(planes[i * third :][:third] for i in range(3)), strict=True)
        for x in pixel
    )


def _strip_labels(path: Path, count: int) -> list[int]:
    """From the file beside a strip; that of the training strips holds those of all five."""
    test = path.name.startswith("test")
    name = "test_lables.json" if test else "train_lables.json"  # as the package spells it
    try:
        labels: list[int] = json.loads((path.parent / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no labels beside it in {name}: fetch both again") from error
    first = 0 if test else (int(path.stem.rpartition("_")[2]) - 1) * count
    return labels[first : first + count]


def _rows(files: list[Path], source: str, columns: dict[str, str]) -> Iterator[Example]:
    """The rows of a table; paths of images are relative to its folder."""
    import datasets

    image, label, question, answer, choices = (columns[name] for name in _COLUMNS)
    table = load_table(files, source)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    if image not in table.column_names and question not in table.column_names:
        raise _without(source, image, table.column_names, "image")
    for name, column in columns.items():
        usual = DataSpec.model_fields[name].default
        if column not in ("", usual, *table.column_names):
            raise _without(source, column, table.column_names, name)
    root = files[0] if files[0].is_dir() else files[0].parent
    classes = getattr(table.features.get(label), "names", None)
    for number, row in enumerate(table):
        kind, what = row.get(label), f"{source}[{number}]"
        if not isinstance(kind, int | str | None):
            raise UserError(f"{what} has a {type(kind).__name__} for a class: set data.label")
        place = kind if classes and isinstance(kind, int) and kind >= 0 else None
        if classes and place is not None:
            kind = classes[place]
        yield Example(
            _encoded(row.get(image), root, what),
            what,
            kind,
            place,
            str(row.get(question) or ""),
            str(row.get(answer) if row.get(answer) is not None else ""),
            tuple(map(str, row.get(choices) or ())),
        )


def _without(source: str, column: str, names: list[str], key: str) -> UserError:
    has = ", ".join(names)
    return UserError(f"{source} has no column {column!r}, it has {has}: set data.{key}")


def _encoded(value: Any, root: Path, what: str) -> bytes | Path:
    if value is None:
        return b""
    if isinstance(value, dict):  # as the hub stores images
        value = value["bytes"] or value["path"]
    if not isinstance(value, bytes | str):
        raise UserError(f"{what} has a {type(value).__name__} for an image: set data.image")
    return value if isinstance(value, bytes) else root / value
