"""Reconstruction error: how far each block's output is from the dense model's, and why.

    curve = ErrorCurve(block=3)
    curve.dense(key, out)    # f(X): the dense block, in the dense stream
    curve.carried(key, out)  # f(X~): the dense block, on the input that the pruned stream has
    curve.pruned(key, out)   # f~(X~): the pruned block, in the pruned stream
    curve.result()

f~(X~) - f(X) is what the block makes, f~(X~) - f(X~), plus what it carries, f(X~) - f(X).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from infra.records import BlockError
from modalities.blocks import hidden_state


class ErrorCurve:
    """The error of one block, summed over batches; `key` pairs a batch with its dense copy.

    Outputs that wait for their comparison stay where they are up to `limit_bytes` in all; the rest
    wait in host memory.
    """

    def __init__(self, block: int, *, limit_bytes: float = math.inf) -> None:
        self.block, self.limit_bytes = block, limit_bytes
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._held_bytes = 0
        self._sums = torch.zeros(7, dtype=torch.float64)
        self._tokens = 0

    def dense(self, key: int, output: Any) -> None:
        """Remember the dense output of a batch."""
        state = _state(output)
        self._held[key] = (self._hold(state, copy=True),)  # a model may write to it later

    def carried(self, key: int, output: Any) -> None:
        """Remember what the dense block gives for the pruned stream; nothing may write to it."""
        self._held[key] += (self._hold(_state(output), copy=False),)

    def pruned(self, key: int, output: Any) -> None:
        """Compare with the pruned output of the same batch, and forget all.

        Without `carried` nothing was pruned: the block makes no error.
        """
        pruned = _state(output)
        dense, *rest = (held.to(pruned.device).float() for held in self._held.pop(key))
        pruned = pruned.float()
        between = rest[0] if rest else pruned
        made, carried = pruned - between, between - dense
        pairs = [(x, x) for x in (pruned - dense, dense, pruned, made, carried)]
        pairs += [(dense, pruned), (made, carried)]
        self._sums += torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]).cpu()
        self._tokens += dense.numel() // dense.shape[-1]

    def result(self, before: float = 0.0) -> BlockError:
        """Errors per token, relative error and cosine (all tokens as one vector).

        `before` is the absolute error of the block before this one; 0 for the first.
        """
        error, dense, pruned, made, carried, product, cross = self._sums.tolist()
        return BlockError(
            block=self.block,
            absolute=error / self._tokens,
            relative=(error / dense) ** 0.5 if dense else 0.0,
            cosine=product / (dense * pruned) ** 0.5 if dense * pruned else 0.0,
            made=made / self._tokens,
            carried=carried / self._tokens,
            cross=2 * cross / self._tokens,
            gain=(carried / self._tokens / before) ** 0.5 if before else 0.0,
            damage=made / dense if dense else 0.0,
        )

    def _hold(self, state: Tensor, *, copy: bool) -> Tensor:
        if self._held_bytes + state.nbytes > self.limit_bytes:
            return state.to("cpu", copy=copy)
        self._held_bytes += state.nbytes
        return state.clone() if copy else state


def _state(output: Any) -> Tensor:
    state = hidden_state(output)
    assert state is not None, "blocks are found by their hidden states"
    return state
