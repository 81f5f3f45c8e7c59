"""Which output of a head is right for each image of a data set.

    class_numbers(found, data, "report", head_names=["cat", "dog"], outputs=2)    # [1, 0, ...]

By name where the head has names; else by the data set's own numbers, or the order of its names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from infra.documents import Split
from infra.errors import UserError, nearest
from infra.images import Example, examples
from infra.specs import DataSpec


def class_numbers(
    found: Sequence[Example], data: DataSpec, split: Split, head_names: list[str], outputs: int
) -> list[int]:
    """The number of the right class of each image, from 0.

    Raises UserError for an image without a class, a class that the head does not have, and names
    whose order nobody states.
    """
    where = f"data.{split} ({data.source_of(split)})"
    for example in found:
        if example.label is None:
            raise UserError(
                f"{where}: {example.name} has no class: give a folder per class, or set data.label"
            )
    numbers = [e.label if e.number is None or head_names else e.number for e in found]
    if any(isinstance(number, str) for number in numbers):
        names = head_names or _names_of(data, where, outputs)
        places = {name: number for number, name in enumerate(names)}
        for example in found:
            if str(example.label) not in places:
                raise UserError(
                    f"{where}: {example.name} is of class {str(example.label)!r}, which the "
                    f"head does not know: {nearest(str(example.label), names[:1000])}"
                )
        return [places[str(example.label)] for example in found]
    for example, number in zip(found, numbers, strict=True):
        if not 0 <= int(number or 0) < outputs:
            raise UserError(
                f"{where}: {example.name} is of class {number}, the head has {outputs} "
                f"(0 to {outputs - 1}): the labels are of another data set"
            )
    return [int(number or 0) for number in numbers]


def _names_of(data: DataSpec, where: str, outputs: int) -> list[str]:
    """Those of the spec, else those of the data set as they sort."""
    splits: tuple[Split, ...] = ("selection", "report")
    labels = {e.label for s in splits if data.source_of(s) for e in examples(data, s)}
    names = list(data.classes) or sorted(str(label) for label in labels if label is not None)
    if len(names) != outputs:
        raise UserError(
            f"{where} has {len(names)} classes, the head {outputs} and no names for them: give "
            "data.classes, or use its own data set"
        )
    if not data.classes and names != sorted(names, key=_natural):
        raise UserError(
            f"{where}: the head has no names, and those of the folders have two orders "
            f"({names[0]}, {names[1]}...): give data.classes"
        )
    return names


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts 2 before 10, as timm's reader of folders does."""
    parts = re.split(r"(\d+)", name)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
