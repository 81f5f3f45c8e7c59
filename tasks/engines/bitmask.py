"""The bitmask engine for CPUs: a bit for every weight and the values of those that are not zero.

    layer = ENGINES["bitmask"].encode(linear.weight, linear.bias)  # fp32 or bf16
    outputs = layer(inputs)

Few tokens are bound by memory, and read 0.36 of the dense bytes at 70 % in bf16; many tokens are
bound by arithmetic, and skip the zeros. Both use the one layout of native/matrix.h. Sums are in
fp32. SPARSERAMP_ISA=portable, avx2 or avx512 chooses other kernels than the best that the processor
has. As many threads as torch.get_num_threads() says.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from tasks.engines.base import EncodedLinear, Engine, Use
from tasks.engines.build import BuildError, native_library
from tasks.engines.dense import OneDNN

ISAS = ("portable", "avx2", "avx512")  # as numbered in native/bitmask.cpp
DECODE_TOKENS = 8  # up to here weights are spread along the columns; above, zeros are skipped
_ROWS = 512  # expanded at a time for a dense kernel: 4096 columns of them stay in the cache
_SMALL = 1 << 16  # weights below which waking a thread costs more than it brings


class BitmaskLinear(EncodedLinear):
    """A linear layer whose weight is a bitmask stream."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.dtype = weight.dtype
        weight = weight.detach().contiguous()
        offsets = torch.empty((self.out_features + 3) // 4 + 1, dtype=torch.int64)
        shape = (self.out_features, self.in_features, weight.element_size())
        size = _kernels().sparseramp_measure(weight.data_ptr(), *shape, offsets.data_ptr())
        stream = torch.empty(size, dtype=torch.uint8)
        _kernels().sparseramp_encode(
            weight.data_ptr(), *shape, offsets.data_ptr(), stream.data_ptr()
        )
        self._sparsity = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        self.register_buffer("stream", stream)
        self.register_buffer("offsets", offsets)

    @property
    def weight(self) -> Tensor:
        """The dense weight, out x in, made anew at every call."""
        return self._rows(0, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in, of the weight's type; returns ... x out. Raises as `rows_of` does."""
        rows = self.rows_of(x, self.get_buffer("stream"), self.dtype)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_tokens = rows.shape[0]
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)
        if num_tokens > DECODE_TOKENS and self._sparsity < _skips_from(self.dtype, num_tokens):
            whole = out.view(num_tokens, self.out_features)
            for first in range(0, self.out_features, _ROWS):
                last = min(first + _ROWS, self.out_features)
                bias = None if self.bias is None else self.bias[first:last]
                whole[:, first:last] = F.linear(rows, self._rows(first, last), bias)
            return out
        failed = _kernels().sparseramp_linear(
            _isa(),
            DECODE_TOKENS,
            self._num_threads(num_tokens),
            *self._addresses,
            self.out_features,
            self.in_features,
            x.element_size(),
            rows.data_ptr(),
            rows.stride(0),
            num_tokens,
            None if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for the inputs of {tuple(x.shape)} to a sparse layer")
        return out

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows first (a multiple of 4) to last of the dense weight."""
        dense = torch.empty(last - first, self.in_features, dtype=self.dtype)
        _kernels().sparseramp_expand(
            _isa(),
            self._num_threads(1),
            *self._addresses,
            self.out_features,
            self.in_features,
            dense.element_size(),
            first // 4,
            (last + 3) // 4,
            dense.data_ptr(),
        )
        return dense

    @property
    def _addresses(self) -> tuple[int, int]:
        return self.get_buffer("stream").data_ptr(), self.get_buffer("offsets").data_ptr()

    def _num_threads(self, num_tokens: int) -> int:
        work = self.out_features * self.in_features * num_tokens
        return torch.get_num_threads() if work >= _SMALL else 1


def _skips_from(dtype: torch.dtype, num_tokens: int) -> float:
    """The sparsity from which skipping zeros beats a dense kernel on the expanded matrix."""
    if dtype == torch.float32 or OneDNN().lacks(torch.device("cpu"), dtype):
        return 0.0
    if torch.cpu._is_amx_tile_supported():
        return 1.0  # tiles multiply 16 times as fast as vectors
    return 0.85 if num_tokens <= 64 else 0.70  # estimated: AVX-512 with bf16 but without tiles


class Bitmask(Engine):
    """Our engine for CPUs, any sparsity pattern, fp32 and bf16."""

    name = "bitmask"
    device, dtypes = "cpu", (torch.float32, torch.bfloat16)

    def lacks(self, device: torch.device, dtype: torch.dtype) -> str:
        """A C++ compiler."""
        try:
            _kernels()
        except BuildError as error:
            return str(error)
        return ""

    def break_even(self, dtype: torch.dtype, use: Use) -> float:
        """By tests/bench/engines.py on Zen 3 (AVX2) and, from 0.5 on, Sapphire Rapids (AVX-512)."""
        if use == "prefill":
            return 0.50 if dtype == torch.float32 else max(0.40, _skips_from(dtype, 256))
        return 0.50 if dtype == torch.float32 and ISAS[_isa()] != "avx512" else 0.40

    def encode(self, weight: Tensor, bias: Tensor | None) -> EncodedLinear:
        """A layer with the stream of the weight."""
        return BitmaskLinear(weight, bias)


@cache
def _kernels() -> ctypes.CDLL:
    library = native_library()
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    matrix = (size, size, number)
    library.sparseramp_measure.argtypes = [pointer, *matrix, pointer]
    library.sparseramp_measure.restype = size
    library.sparseramp_encode.argtypes = [pointer, *matrix, pointer, pointer]
    library.sparseramp_encode.restype = None
    held = (number, number, pointer, pointer, *matrix)
    library.sparseramp_expand.argtypes = [*held, size, size, pointer]
    library.sparseramp_expand.restype = None
    inputs = (pointer, size, size)
    library.sparseramp_linear.argtypes = [number, *held, *inputs, pointer, pointer]
    return library


@cache
def _isa() -> int:
    best: int = _kernels().sparseramp_best_isa()
    wanted = os.environ.get("SPARSERAMP_ISA")
    if wanted is None:
        return best
    if wanted not in ISAS[: best + 1]:
        raise UserError(
            f"SPARSERAMP_ISA={wanted}: this processor has {', '.join(ISAS[: best + 1])}; "
            "choose one of them, or unset it"
        )
    return ISAS.index(wanted)
