"""torch's 2:4 tensors: hardware sparsity of NVIDIA GPUs, for reading many tokens at once.

layer = ENGINES["2:4"].encode(weight, bias)  # at most 2 nonzeros in every 4 of a row

It pays where the product is bound by arithmetic, which decoding a few sequences is not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from infra.errors import UserError
from tasks.engines.base import EncodedLinear, Engine, OpaqueLinear, Use, lacks_ampere


class SemiStructuredLinear(OpaqueLinear):
    """F.linear on a 2:4 tensor of cuSPARSELt."""

    def set_extra_state(self, state: Tensor) -> None:
        """Make the 2:4 tensor."""
        self.opaque: SparseSemiStructuredTensor = to_sparse_semi_structured(state.contiguous())

    @property
    def encoded_bytes(self) -> int:
        """Values and positions: 0.5625 of the dense bytes."""
        packed = self.opaque.packed
        assert packed is not None
        return packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in; returns ... x out."""
        return F.linear(x.contiguous(), self.opaque, self.bias)


class SemiStructured(Engine):
    """2:4 sparsity on the tensor cores, by torch and cuSPARSELt."""

    name = "2:4"
    device, dtypes = "cuda", (torch.bfloat16, torch.float16)

    def lacks(self, device: torch.device, dtype: torch.dtype) -> str:
        """A GPU from Ampere, with cuSPARSELt."""
        if reason := lacks_ampere(self.name, device):
            return reason
        if not torch.backends.cusparselt.is_available():
            return "this torch was built without cuSPARSELt"
        return ""

    def misfit(self, weight: Tensor) -> str:
        """Sides divisible by 16, and at most 2 nonzeros in every 4 of a row."""
        if any(side % 16 for side in weight.shape):
            return f"{weight.shape[0]} x {weight.shape[1]} is not divisible by 16"
        crowded = int((weight.reshape(-1, 4).count_nonzero(1) > 2).sum())
        if crowded:
            return f"{crowded} groups of 4 have more than 2 nonzeros; 2:4 needs prune.pattern='2:4'"
        return ""

    def break_even(self, dtype: torch.dtype, use: Use) -> float:
        """Half of the weights in prefill; a few tokens at a time it does not gain."""
        return 0.5 if use == "prefill" else 1.0

    def encode(self, weight: Tensor, bias: Tensor | None) -> EncodedLinear:
        """A 2:4 layer. Raises UserError for a weight that is a misfit."""
        if reason := self.misfit(weight):
            raise UserError(f"a weight cannot be 2:4: {reason}")
        return SemiStructuredLinear(weight, bias)
