"""Reconstruction error: how far each block's output is from the dense model's.

curve = ErrorCurve(block=3); curve.dense(key, out); curve.pruned(key, out); curve.result()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from infra.records import BlockError


class ErrorCurve:
    """The error of one block, summed over batches; `key` pairs a batch with its dense copy."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._dense: dict[int, Tensor] = {}
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._tokens = 0

    def dense(self, key: int, output: Any) -> None:
        """Remember the dense output of a batch."""
        self._dense[key] = hidden_state(output).clone()  # a model may write to it later

    def pruned(self, key: int, output: Any) -> None:
        """Compare with the pruned output of the same batch, and forget both."""
        dense, pruned = self._dense.pop(key).float(), hidden_state(output).float()
        parts = ((dense - pruned).square(), dense.square(), pruned.square(), dense * pruned)
        self._sums += torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()
        self._tokens += dense.numel() // dense.shape[-1]

    def result(self) -> BlockError:
        """Absolute error per token, relative error and cosine (all tokens as one vector)."""
        error, dense, pruned, product = self._sums.tolist()
        return BlockError(
            block=self.block,
            absolute=error / self._tokens,
            relative=(error / dense) ** 0.5 if dense else 0.0,
            cosine=product / (dense * pruned) ** 0.5 if dense * pruned else 0.0,
        )


def hidden_state(output: Any) -> Tensor:
    """The first floating tensor of at least three dimensions that a block gives."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim >= 3:
            return leaf
    raise ValueError("the block's output has no hidden state")
