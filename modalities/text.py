"""Windows of text: what calibrates and measures a language model.

    windows = cut_windows(tokenizer, documents, length=512, count=32, what="data.selection")

Documents are joined by a blank line and cut into windows of equal length. Every window begins
with the BOS token where the tokenizer adds one: a Gemma model's perplexity doubles without it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from infra.errors import UserError

SEPARATOR = "\n\n"
T = TypeVar("T")


@dataclass(frozen=True)
class Windows:
    """`ids`: count x length. `bytes`: UTF-8 bytes of the scored text of each window."""

    ids: Tensor
    bytes: tuple[int, ...]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its BOS token."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def shuffled(documents: list[T], seed: int) -> list[T]:
    """Documents in an order that depends on the seed alone."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order


def cut_windows(
    tokenizer: Any,
    documents: list[str],
    *,
    length: int,
    count: int,
    what: str,
    bos_once: bool = False,
    fewer: bool = False,
) -> Windows:
    """The first `count` windows of `length` tokens; fewer windows are the first of more.

    `bos_once` puts the BOS token before the first window only, as the published WikiText-2
    protocol does. Raises UserError, naming `what`, where the text is too short; with `fewer`, where
    it is too short for one window.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    text_length = length - (0 if bos_once else len(bos))
    wanted = count * text_length - (len(bos) if bos_once else 0)
    ids, ends = list(bos) if bos_once else [], [0] * (len(bos) if bos_once else 0)
    offset = 0
    for document in documents:
        text = document + SEPARATOR
        piece, piece_ends = _encode(tokenizer, text)
        ids += piece
        ends += [offset + end for end in piece_ends]
        offset += len(text.encode())
        if len(ids) >= wanted + text_length:
            break
    available = len(ids) // text_length
    count = min(count, max(available, 1)) if fewer else count
    if available < count:
        raise UserError(
            f"{what} has {available} windows of {length} tokens, {count} are asked for: give "
            "more text, or ask for fewer or shorter windows"
        )
    rows, sizes = [], []
    for start in range(0, count * text_length, text_length):
        stop = start + text_length
        rows.append(([] if bos_once else bos) + ids[start:stop])
        # The first token is scored only where a BOS token stands before it.
        first = start - 1 if bos and not bos_once else start
        sizes.append(ends[stop - 1] - (ends[first] if first >= 0 else 0))
    return Windows(torch.tensor(rows, dtype=torch.long), tuple(sizes))


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and for each token the bytes of text up to its end."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        if text.isascii():
            return ids, [end for _, end in spans]
        bytes_before = [0]
        for character in text:
            bytes_before.append(bytes_before[-1] + len(character.encode()))
        return ids, [bytes_before[end] for _, end in spans]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total = len(text.encode())
    return ids, [total * (i + 1) // len(ids) for i in range(len(ids))]
