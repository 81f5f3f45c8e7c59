"""The kernels of the decode engine for GPUs, in Triton: a sparse weight times tokens, and back.

    outputs = multiply(layer, inputs)  # a DeltaLinear; inputs [tokens, columns]
    weight = expand(layer)  # [rows, columns]

The format is explained in decode_gpu.py. A thread walks a lane: it adds 4-bit steps to its column,
gathers the inputs there from L1 (its neighbours in the warp are at nearby columns, so a gather
touches few cache lines) and accumulates in float32. What is streamed goes past L1.
TRITON_INTERPRET=1 runs them on the CPU.
"""

# mypy: disable-error-code="no-untyped-def", allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

# How memory's latency is hidden; chosen by `python tests/bench/engines_gpu.py --tune`.
EIGHTS = 2  # times 8 entries of a lane are asked for at once: 1, 2 or 4
STAGES = 1  # above 1, that many are on their way to shared memory while others are used

if TYPE_CHECKING:
    from tasks.engines.decode_gpu import DeltaLinear


@triton.jit
def _halves(words, BF16: tl.constexpr):
    """The two 16-bit floats of each 32-bit word as float32, lower half first."""
    if BF16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _load(words, entry, length, LANES: tl.constexpr):
    """Eight entries of every lane: steps, and four words of two values; zeros past the end."""
    steps = tl.load(words, mask=entry < length, other=0, cache_modifier=".cg")
    words += LANES
    a = tl.load(words, mask=entry < length, other=0, cache_modifier=".cg")
    b = tl.load(words + LANES, mask=entry + 2 < length, other=0, cache_modifier=".cg")
    c = tl.load(words + 2 * LANES, mask=entry + 4 < length, other=0, cache_modifier=".cg")
    d = tl.load(words + 3 * LANES, mask=entry + 6 < length, other=0, cache_modifier=".cg")
    return steps, a, b, c, d


@triton.jit
def _add(value, inputs, columns, sums, TOKENS: tl.constexpr, BF16: tl.constexpr):
    """A value times the inputs of every token at its column, added to a sum per token."""
    first, second, third, fourth = sums
    found = tl.load(inputs + columns)
    if TOKENS == 1:
        first += value * found.to(tl.float32)
    else:
        low, high = _halves(found.to(tl.int32), BF16)
        first += value * low
        second += value * high
        if TOKENS == 4:
            low, high = _halves((found >> 32).to(tl.int32), BF16)
            third += value * low
            fourth += value * high
    return first, second, third, fourth


@triton.jit
def _add_eight(words, inputs, columns, sums, TOKENS: tl.constexpr, BF16: tl.constexpr):
    """What _load gave, times the inputs; the columns and sums after it."""
    steps, a, b, c, d = words
    for pair in tl.static_range(4):
        values = a if pair == 0 else (b if pair == 1 else (c if pair == 2 else d))
        low, high = _halves(values, BF16)
        columns += (steps >> (8 * pair)) & 15
        sums = _add(low, inputs, columns, sums, TOKENS, BF16)
        columns += (steps >> (8 * pair + 4)) & 15
        sums = _add(high, inputs, columns, sums, TOKENS, BF16)
    return columns, sums


@triton.jit
def _multiply(
    stream, starts, offsets, lengths, order, inputs, bias, outputs,
    num_rows, num_columns, num_tokens,
    ROWS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, EIGHTS: tl.constexpr,
    STAGES: tl.constexpr, BF16: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One group of rows by one block of tokens."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    LANES: tl.constexpr = ROWS * PARTS
    lanes = tl.arange(0, PARTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    length = tl.load(lengths + group)
    tl.assume(length > 0)  # else the other loads would wait for a branch on it
    columns = tl.load(starts + group * LANES + lanes).to(tl.int32)
    words = stream + tl.load(offsets + group) + lanes
    inputs += block.to(tl.int64) * num_columns
    zero = tl.zeros([PARTS, ROWS], tl.float32)
    first, second, third, fourth = zero, zero, zero, zero
    for entry in tl.range(0, length, 8 * EIGHTS, num_stages=STAGES):
        one = _load(words, entry, length, LANES)
        if EIGHTS >= 2:
            two = _load(words + 5 * LANES, entry + 8, length, LANES)
        if EIGHTS == 4:
            three = _load(words + 10 * LANES, entry + 16, length, LANES)
            four = _load(words + 15 * LANES, entry + 24, length, LANES)
        if STAGES == 1:
            tl.debug_barrier()  # else the compiler moves the loads to where they are used
        sums = (first, second, third, fourth)
        columns, sums = _add_eight(one, inputs, columns, sums, TOKENS, BF16)
        if EIGHTS >= 2:
            columns, sums = _add_eight(two, inputs, columns, sums, TOKENS, BF16)
        if EIGHTS == 4:
            columns, sums = _add_eight(three, inputs, columns, sums, TOKENS, BF16)
            columns, sums = _add_eight(four, inputs, columns, sums, TOKENS, BF16)
        first, second, third, fourth = sums
        words += 5 * EIGHTS * LANES
    rows = tl.load(order + group * ROWS + tl.arange(0, ROWS))
    for token in tl.static_range(TOKENS):
        summed = (
            first if token == 0 else (second if token == 1 else (third if token == 2 else fourth))
        )
        total = tl.sum(summed, axis=0)
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=rows >= 0, other=0).to(tl.float32)
        number = block * TOKENS + token
        pointers = outputs + number.to(tl.int64) * num_rows + rows
        kept = (rows >= 0) & (number < num_tokens)
        tl.store(pointers, total.to(outputs.dtype.element_ty), mask=kept)


@triton.jit
def _expand(
    stream, starts, offsets, lengths, order, weight, num_columns,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The nonzeros of one group of rows, as 16-bit integers, into a weight of zeros."""
    group = tl.program_id(0)
    LANES: tl.constexpr = ROWS * PARTS
    lanes = tl.arange(0, PARTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    length = tl.load(lengths + group)
    columns = tl.load(starts + group * LANES + lanes).to(tl.int32)
    words = stream + tl.load(offsets + group) + lanes
    rows = tl.load(order + group * ROWS + tl.arange(0, ROWS))[None, :]
    targets = weight + rows.to(tl.int64) * num_columns
    for entry in range(0, length, 8):
        steps, a, b, c, d = _load(words, entry, length, LANES)
        for pair in tl.static_range(4):
            values = a if pair == 0 else (b if pair == 1 else (c if pair == 2 else d))
            for side in tl.static_range(2):
                value = (values >> (16 * side)).to(tl.int16)
                columns += (steps >> (8 * pair + 4 * side)) & 15
                # A zero is a filler, or padding at the column of the entry before it.
                tl.store(targets + columns, value, mask=value != 0)
        words += 5 * LANES


def multiply(
    layer: DeltaLinear, inputs: Tensor, *, eights: int = EIGHTS, stages: int = STAGES
) -> Tensor:
    """inputs W^T + bias. A CUDA graph can capture it: nothing waits for the device.

    Args:
        layer: W [rows, columns] and its bias
        inputs: [tokens, columns], contiguous, on the layer's device and of its dtype

    Returns:
        [tokens, rows], accumulated in float32
    """
    num_tokens, num_columns = inputs.shape
    block = min(triton.next_power_of_2(num_tokens), 4)
    num_blocks = triton.cdiv(num_tokens, block)
    if block > 1:  # the inputs of a block of tokens at a column become one word
        if num_tokens % block:
            missing = num_blocks * block - num_tokens
            inputs = torch.nn.functional.pad(inputs, (0, 0, 0, missing))
        inputs = inputs.view(num_blocks, block, num_columns).transpose(1, 2).contiguous()
        inputs = inputs.view(torch.int32 if block == 2 else torch.int64)
    outputs = torch.empty(
        num_tokens, layer.out_features, dtype=layer.dtype, device=layer.stream.device
    )
    with torch.cuda.device_of(outputs):
        _multiply[(num_blocks, len(layer.lengths))](
            layer.stream, layer.starts, layer.offsets, layer.lengths, layer.order,
            inputs, layer.bias, outputs, layer.out_features, num_columns, num_tokens,
            ROWS=layer.rows, PARTS=layer.parts, TOKENS=block, EIGHTS=eights, STAGES=stages,
            BF16=layer.dtype == torch.bfloat16, HAS_BIAS=layer.bias is not None,
            num_warps=layer.rows * layer.parts // 32,
        )  # fmt: skip
    return outputs


def expand(layer: DeltaLinear) -> Tensor:
    """The dense weight [rows, columns]; a zero of either sign becomes +0."""
    shape = (layer.out_features, layer.in_features)
    weight = torch.zeros(shape, dtype=layer.dtype, device=layer.stream.device)
    with torch.cuda.device_of(weight):
        _expand[(len(layer.lengths),)](
            layer.stream, layer.starts, layer.offsets, layer.lengths, layer.order,
            weight.view(torch.int16), layer.in_features,
            ROWS=layer.rows, PARTS=layer.parts, num_warps=layer.rows * layer.parts // 32,
        )  # fmt: skip
    return weight
