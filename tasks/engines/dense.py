"""The dense baselines: torch's own kernel, and oneDNN's with the weight packed once.

    layer = ENGINES["onednn"].encode(linear.weight, linear.bias)

What is faster than both of them is faster than dense.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engines.base import EncodedLinear, Engine, OpaqueLinear, Use


class DenseLinear(EncodedLinear):
    """F.linear on a dense weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.register_buffer("matrix", weight.detach())

    @property
    def weight(self) -> Tensor:
        """The dense weight itself, out x in."""
        return self.get_buffer("matrix")

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in; returns ... x out."""
        return F.linear(x, self.weight, self.bias)


class Dense(Engine):
    """torch's F.linear: runs everything everywhere."""

    name = "dense"
    baseline = True

    def break_even(self, dtype: torch.dtype, use: Use) -> float:
        """Any sparsity."""
        return 0.0

    def encode(self, weight: Tensor, bias: Tensor | None) -> EncodedLinear:
        """A layer that shares the weight."""
        return DenseLinear(weight, bias)


class OneDNNLinear(OpaqueLinear):
    """oneDNN's product with a weight that was packed for it; the packed weight stays in memory."""

    def set_extra_state(self, state: Tensor) -> None:
        """Pack a weight."""
        self.opaque = torch.ops.mkldnn._reorder_linear_weight(state.contiguous(), 1)
        self._bytes = state.nbytes

    @property
    def encoded_bytes(self) -> int:
        """oneDNN pads to its tiles; the padding is not counted."""
        return self._bytes

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in; returns ... x out."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.opaque, self.bias, "none", [], "")
        return out


class OneDNN(Engine):
    """The dense product of the oneDNN library, which torch carries, with packed weights."""

    name = "onednn"
    baseline = True
    device, dtypes = "cpu", (torch.float32, torch.bfloat16)

    def lacks(self, device: torch.device, dtype: torch.dtype) -> str:
        """bf16 needs AVX-512 or AVX-NE-CONVERT."""
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN"
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bf16 for this processor"
        return ""

    def break_even(self, dtype: torch.dtype, use: Use) -> float:
        """Any sparsity."""
        return 0.0

    def encode(self, weight: Tensor, bias: Tensor | None) -> EncodedLinear:
        """A layer with its own packed copy."""
        return OneDNNLinear(weight, bias)
