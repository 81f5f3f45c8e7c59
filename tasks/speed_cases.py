"""What is timed of a model: reading a prompt, continuing a text, or classifying images.

for case in cases_of(modality, SpeedSpec()):
    call = next(case.calls(model))
    call()  # this is what is timed
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from infra.errors import UserError
from infra.specs import SpeedSpec
from modalities.base import LoadedModality
from modalities.prompts import noise


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time: `calls` makes of a model what is called, one after another."""

    kind: Literal["prefill", "first token", "first token after an image", "decode", "images"]
    batch: int
    length: int = 0  # tokens of the prompt
    unit: Literal["ms", "tokens/s", "images/s"] = "ms"
    work: int = 0  # units done by one call; 0: its time is what counts
    calls: Callable[[Any], Iterator[Callable[[], object]]]


def cases_of(modality: LoadedModality, speed: SpeedSpec) -> list[Case]:
    """The cases of a model, on random inputs, which take as long as others.

    Raises UserError for a model that neither continues a text nor classifies images, and for
    prompts that its context does not hold.
    """
    if modality.writer is None:
        return [_images(image_batch(modality, batch)) for batch in speed.images]
    longest, context = max(speed.prompts) + speed.new_tokens, modality.facts()["context"]
    if longest > context:
        raise UserError(
            f"speed.prompts and speed.new_tokens make {longest} tokens, the model's context is "
            f"{context}: ask for fewer"
        )
    vocabulary = modality.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    chance = torch.Generator().manual_seed(0)

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (batch, length), generator=chance).to(modality.device)

    shortest = speed.prompts[0]
    return [
        *(prefill(ids(1, length)) for length in speed.prompts),
        *_first_tokens(modality, ids(1, shortest)),
        *(decode(ids(batch, shortest), speed.new_tokens) for batch in speed.batches),
    ]


def image_batch(modality: LoadedModality, count: int) -> Tensor:
    """Random pixels as the model takes them, count x channels x height x width."""
    size = getattr(modality.model, "pretrained_cfg", {}).get("input_size")
    if not size:
        raise UserError(
            f"{type(modality.model).__name__} neither continues a text nor classifies images: "
            "there is no speed to measure"
        )
    pixels = torch.randn((count, *size), generator=torch.Generator().manual_seed(0))
    return pixels.to(modality.device, next(modality.model.parameters()).dtype)


def prefill(prompt: Tensor) -> Case:
    """Reading a prompt, 1 x length, up to the logits of its last token."""
    read = {"input_ids": prompt, "use_cache": True, "logits_to_keep": 1}
    return Case(
        kind="prefill",
        batch=1,
        length=prompt.shape[1],
        calls=lambda model: repeat(partial(model, **read)),
    )


def decode(prompt: Tensor, count: int) -> Case:
    """Tokens one after another; the prompt, batch x length, is read before the time begins."""

    def calls(model: Any) -> Iterator[Callable[[], object]]:
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        while True:
            yield partial(_steps, model, copy.deepcopy(out), count)  # its cache grows

    return Case(
        kind="decode",
        batch=len(prompt),
        length=prompt.shape[1],
        unit="tokens/s",
        work=len(prompt) * count,
        calls=calls,
    )


def _steps(model: Any, out: Any, count: int) -> None:
    for _ in range(count):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values)


def _first_tokens(modality: LoadedModality, prompt: Tensor) -> Iterator[Case]:
    """After a prompt; and, of a model that sees, after an image and a question."""

    def case(kind: Any, given: dict[str, Tensor]) -> Case:
        generate = {**given, "max_new_tokens": 1, "do_sample": False}
        return Case(
            kind=kind,
            batch=1,
            length=given["input_ids"].shape[1],
            calls=lambda model: repeat(partial(model.generate, **generate)),
        )

    yield case("first token", {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
    if prompts := getattr(modality, "prompts", None):
        inputs = prompts.question("What is it?", noise(), []).inputs
        on_device = {name: tensor.to(modality.device) for name, tensor in inputs.items()}
        yield case("first token after an image", on_device)


def _images(pixels: Tensor) -> Case:
    count = len(pixels)
    return Case(
        kind="images",
        batch=count,
        unit="images/s",
        work=count,
        calls=lambda model: repeat(partial(model, pixels)),
    )
