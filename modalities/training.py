"""Windows of text or conversations for training: what is multiplied, and what the loss is taken on.

    windows = text_windows(tokenizer, documents, length=512, count=800)
    windows.ids, windows.labels        # windows x tokens; UNSCORED where a token is no target

Conversations are written by the tokenizer's own chat template and padded on the right, where
nothing that a causal model scores can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from infra.errors import UserError
from infra.training_text import Conversation
from modalities.base import Batch
from modalities.text import cut_windows

UNSCORED = -100  # what torch's cross_entropy leaves out


@dataclass(frozen=True)
class TrainingText(Batch):
    """`labels`: windows x tokens, the token itself where the loss is taken on it."""

    labels: Tensor

    def pick(self, numbers: Sequence[int]) -> Self:
        """Some of the windows, by number."""
        return replace(super().pick(numbers), labels=self.labels[list(numbers)])

    def trimmed(self) -> Self:
        """Without the columns after the last token that is scored."""
        width = int((self.labels != UNSCORED).any(0).nonzero().max()) + 1
        return replace(self, ids=self.ids[:, :width], labels=self.labels[:, :width])


def text_windows(
    tokenizer: Any, documents: list[str], *, length: int, count: int, what: str
) -> TrainingText:
    """Up to `count` windows of `length` tokens; every token after the first is scored."""
    cut = cut_windows(tokenizer, documents, length=length, count=count, what=what, fewer=True)
    labels = cut.ids.clone()
    labels[:, 0] = UNSCORED
    return TrainingText(cut.ids, cut.bytes, labels)


def chat_windows(
    tokenizer: Any, conversations: Sequence[Conversation], *, length: int, count: int, what: str
) -> TrainingText:
    """Up to `count` conversations, cut after `length` tokens; what the assistant says is scored.

    Raises UserError where the tokenizer has no chat template, and where no answer is left.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{what}: the tokenizer has no chat template: set model.tokenizer to one that has, or "
            "train on text (recovery.column)"
        )
    rows: list[tuple[list[int], list[int]]] = []
    for conversation in conversations:
        ids, labels = _turns(tokenizer, conversation)
        if any(label != UNSCORED for label in labels[1:length]):
            rows.append((ids[:length], labels[:length]))
        if len(rows) == count:
            break
    if not rows:
        raise UserError(f"{what}: no answer begins within {length} tokens: set recovery.length")
    width = max(len(ids) for ids, _ in rows)
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), UNSCORED)
    for number, (ids, labels) in enumerate(rows):
        padded[number, : len(ids)] = torch.tensor(ids)
        targets[number, : len(ids)] = torch.tensor(labels)
    return TrainingText(padded, (0,) * len(rows), targets)


def _turns(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids and labels; an answer is what the template adds to the question before it."""
    ids: list[int] = []
    labels: list[int] = []
    for end in range(1, len(conversation) + 1):
        answers = conversation[end - 1]["role"] == "assistant"
        if answers:
            asked = _written(tokenizer, conversation[: end - 1], prompt=True)
            ids, labels = asked, labels + [UNSCORED] * (len(asked) - len(labels))
        elif end < len(conversation):
            continue
        whole = _written(tokenizer, conversation[:end], prompt=False)
        if whole[: len(ids)] != ids:
            raise UserError(
                "the tokenizer's chat template changes earlier turns when one is added: give "
                "conversations of one question and one answer"
            )
        added = whole[len(ids) :]
        labels = labels[: len(ids)] + (added if answers else [UNSCORED] * len(added))
        ids = whole
    return ids, labels


def _written(tokenizer: Any, turns: Conversation, *, prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found
