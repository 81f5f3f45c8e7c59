"""Watching matrix products: which weights a block multiplies, and with what.

    with ProductWatcher(matrices, lambda matrix, inputs: print(matrix.name, inputs.shape)):
        block(hidden_states)

A weight is recognised by its address, not by the module that holds it, so the fused experts of a
mixture (one three-dimensional parameter), GPT-2's transposed Conv1D and plain `x @ w` are seen as
well as `nn.Linear`. Known products: linear, addmm, mm, matmul, bmm, baddbmm, einsum of two
operands, and convolutions of kernel 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix of a block.

    `parameter` is its name inside the block; `expert` selects a slice of a fused parameter;
    `transposed` says that it is stored in x out.
    """

    block: nn.Module
    parameter: str
    expert: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """Its name inside the block; `[e]` marks expert e."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    def stored(self) -> Tensor:
        """The slice of the parameter, as it is stored."""
        parameter = self.block.get_parameter(self.parameter)
        return parameter.data if self.expert is None else parameter.data[self.expert]

    def weight(self) -> Tensor:
        """A view of the weights, out x in; writing to it changes the model."""
        return self.of(self.block.get_parameter(self.parameter).data)

    def of(self, whole: Tensor) -> Tensor:
        """Its part, out x in, of a tensor that is shaped as its parameter."""
        part = (whole if self.expert is None else whole[self.expert]).flatten(1)
        return part.t() if self.transposed else part

    @property
    def params(self) -> int:
        """Number of weights."""
        return self.stored().numel()


Watch = Callable[[Matrix, Tensor], None]


class ProductWatcher(TorchFunctionMode):
    """Calls `watch(matrix, inputs)` before every product with one of `matrices`.

    `inputs` is tokens x in. Enter one per run and block call: a pause inside `watch` is safe,
    because the mode lives on the pausing run's own stack.
    """

    def __init__(self, matrices: Iterable[Matrix], watch: Watch) -> None:
        super().__init__()
        self._at = {matrix.stored().data_ptr(): matrix for matrix in matrices}
        self._fused = {
            m.block.get_parameter(m.parameter).data_ptr(): m.parameter
            for m in self._at.values()
            if m.expert is not None
        }
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for weight, inputs, _ in _products(func, args, kwargs):
            for piece, piece_inputs in self._slices(weight, inputs):
                matrix = self._at.get(piece.data_ptr())
                if matrix is not None and matrix.stored().numel() == piece.numel():
                    self._watch(matrix, _rows(piece_inputs()))
        return func(*args, **kwargs)

    def _slices(
        self, weight: Tensor, inputs: Inputs
    ) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
        if weight.ndim == 3 and weight.data_ptr() in self._fused:
            for expert in range(weight.shape[0]):
                yield weight[expert], partial(lambda e: inputs()[e], expert)
        else:
            yield weight, inputs


@dataclass(frozen=True)
class Found:
    """A parameter seen in a product, by its name inside the block."""

    parameter: str
    fused: bool
    transposed: bool


class ProductRecorder(TorchFunctionMode):
    """Records which matrix parameters of a block take part in known products, in order."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, Found] = {}
        self._whole = {p.data_ptr(): (n, p) for n, p in block.named_parameters() if p.ndim >= 2}
        self._slices = {
            p.data_ptr() + e * p.stride(0) * p.element_size(): (n, p)
            for n, p in block.named_parameters()
            if p.ndim == 3
            for e in range(p.shape[0])
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for weight, _, transposed in _products(func, args, kwargs):
            address, size = weight.data_ptr(), weight.numel()
            for table, fused in ((self._slices, True), (self._whole, False)):
                name, parameter = table.get(address, ("", weight))
                matrix = parameter.shape[1:] if fused else parameter.flatten(1).shape
                fits = sorted(weight.shape[-2:]) == sorted(matrix)
                batched = fused and weight.ndim == 3 and size == parameter.numel()
                if name and fits and (size == matrix.numel() or batched):
                    self.found.setdefault(name, Found(name, fused, transposed))
                    break
        return func(*args, **kwargs)


Inputs = Callable[[], Tensor]
Product = tuple[Tensor, Inputs, bool]


def _products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Product]:
    """Both operands of a known product in turn, as (weight, its inputs, stored in x out?)."""
    reader = _READERS.get(func)
    if reader is not None:
        yield from reader(*args, **kwargs)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Any = None) -> Iterator[Product]:
    yield weight, lambda: _rows(input), False


def _tokens(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs of a product with `weight`: tokens x in; of a batched one experts x tokens x in."""
    if weight.ndim != 3:
        return _rows(x)
    x = x[None] if x.ndim == 2 else x
    if x.shape[-3] == 1:  # every expert multiplies the same tokens
        x = x.expand(*x.shape[:-3], weight.shape[0], *x.shape[-2:])
    return x.movedim(-3, 0).flatten(1, -2)


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Iterator[Product]:
    """`input @ other`: either may be the weight, and either may be a transposed view."""
    if input.ndim >= 2 and other.ndim >= 2:
        yield other, lambda: _tokens(input, other), not _is_transposed_view(other)
        yield input, lambda: _tokens(other.mT, input), _is_transposed_view(input)


def _mm(input: Tensor, mat2: Tensor, **_: Any) -> Iterator[Product]:
    yield from _matmul(input, mat2)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> Iterator[Product]:
    yield from _matmul(mat1, mat2)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, **_: Any) -> Iterator[Product]:
    yield from _matmul(batch1, batch2)


def _einsum(equation: Any, *operands: Any) -> Iterator[Product]:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list) else operands
    if not isinstance(equation, str) or len(tensors) != 2 or "." in equation:
        return
    left, arrow, out = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    if not arrow:  # implied: every label that occurs once
        out = "".join(c for c in left if left.count(c) == 1)
    for (w, x), (lw, lx) in (
        ((tensors[1], tensors[0]), (labels[1], labels[0])),
        ((tensors[0], tensors[1]), (labels[0], labels[1])),
    ):
        contracted = [c for c in lw if c in lx and c not in out]
        shared = [c for c in lw if c in lx and c in out]
        rest = [c for c in lx if c not in shared + contracted]
        batch = len(lw) - 2  # leading labels of the weight: none, or its expert
        known = batch in (0, 1) and shared == list(lw[:batch]) and len(contracted) == 1
        if not known or any(c not in out for c in [*rest, *lw] if c not in contracted):
            continue
        order = [lx.index(c) for c in shared + rest + contracted]
        inputs = partial(_permuted, x, order, batch if rest else None)
        yield w, inputs, (lw[-1] not in contracted) != _is_transposed_view(w)


def _permuted(x: Tensor, order: list[int], start: int | None) -> Tensor:
    moved = x.permute(order)
    return moved.unsqueeze(-2) if start is None else moved.flatten(start, -2)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Product]:
    """A convolution of kernel 1 is a linear over channels (stride only drops positions)."""
    positions = weight.ndim - 2
    padded = not isinstance(padding, str) and padding != 0 and any(_each(padding, positions))
    if groups != 1 or padded or any(size != 1 for size in weight.shape[2:]):
        return
    keep: tuple[Any, ...] = (..., *(slice(None, None, step) for step in _each(stride, positions)))
    yield weight.flatten(1), lambda: _rows(input[keep].movedim(-positions - 1, -1)), False


def _each(value: Any, count: int) -> list[int]:
    """One number per position of a convolution."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _is_transposed_view(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.stride(-2) == 1


_READERS: dict[Any, Callable[..., Iterator[Product]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _mm,
    Tensor.bmm: _mm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.einsum: _einsum,
    torch.functional.einsum: _einsum,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
}
