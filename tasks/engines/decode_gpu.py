"""Our engine for decoding on NVIDIA GPUs: unstructured sparse 16-bit weights, few tokens.

layer = ENGINES["deltas"].encode(weight, bias)  # out x in, bf16 or fp16; called like nn.Linear
layer.encoded_bytes / weight.nbytes  # 0.40 at 70 % zeros and 4096 columns

Format. The nonzeros of a row, in the order of their columns, are cut into `parts` runs of one
length. A run belongs to a lane, which is a thread: its first column (16 bits, 32 in matrices of
more than 32768 columns), then for each nonzero the 4-bit step from the column before and the 16-bit
value: 2.5 bytes. A step of more than 15 goes by way of fillers, zeros 15 columns on. Rows are
sorted by their number of nonzeros; `rows` of them form a group, whose lanes are as long as its
longest row needs, rounded up to a pair.
Lanes are interleaved so that a warp reads 128 bytes at once: for each 8 entries a word of steps,
then four words of two values; words past the end of the lanes are left out.

Bytes per weight with random zeros; dense is 2:

    in          50 %   60 %   70 %   80 %
    4096        1.30   1.05   0.79   0.57
    11008       1.27   1.02   0.77   0.53

More than 64 tokens: the weight is expanded to a dense one for the time of the call and multiplied
by cuBLAS, so that no dense copy stays in memory. That never gains: unstructured zeros do not help
tensor cores.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engines.base import EncodedLinear, Engine, Use, lacks_ampere

# Chosen by `python tests/bench/engines_gpu.py --tune 1` and 4, never at run time.
ROWS = 32  # of a group: lanes of a warp that are at nearby columns
FEW_ROWS = 8192  # up to here in groups of half of that, so that every multiprocessor has some
COLUMNS_PER_PART = 128
MAX_PARTS = 32
MAX_TOKENS = 64  # in passes of 8; above, cuBLAS on the expanded weight takes less time
BREAK_EVEN = 0.5  # there 1.3 to 1.5 times cuBLAS with a token, 0.9 to 1.2 with four; H200


class DeltaLinear(EncodedLinear):
    """A linear layer in the format above; the kernels are in decode_kernels.py."""

    stream: Tensor  # int32: group by group, 8 entries of every lane after another
    starts: Tensor  # int16 or int32 [groups * parts * rows]: first columns
    offsets: Tensor  # int64 [groups], into stream
    lengths: Tensor  # int32 [groups], entries of a lane
    order: Tensor  # int32 [groups * rows]: the row at each place, -1 where there is none

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, rows: int = 0, parts: int = 0
    ) -> None:
        """weight: out x in, bf16 or fp16; rows and parts: powers of 2, 0: as tuned."""
        super().__init__(weight.shape, bias)
        rows = rows or (ROWS if self.out_features > FEW_ROWS else ROWS // 2)
        if not parts:
            wanted = max(self.in_features // COLUMNS_PER_PART, 32 // rows)
            parts = min(1 << (wanted.bit_length() - 1), MAX_PARTS)
        self.rows, self.parts, self.dtype = rows, parts, weight.dtype
        for name, buffer in encode(weight.detach(), rows=rows, parts=parts).items():
            self.register_buffer(name, buffer)

    @property
    def weight(self) -> Tensor:
        """The dense weight, out x in, made anew at every call."""
        from tasks.engines.decode_kernels import expand

        return expand(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in, of the weight's dtype; returns ... x out. Raises as `rows_of` does."""
        inputs = self.rows_of(x, self.stream, self.dtype).contiguous()
        if not 0 < len(inputs) <= MAX_TOKENS:
            return F.linear(x, self.weight, self.bias)
        from tasks.engines.decode_kernels import multiply

        return multiply(self, inputs).view(*x.shape[:-1], self.out_features)


class Deltas(Engine):
    """4-bit steps between nonzeros."""

    name = "deltas"
    device, dtypes = "cuda", (torch.bfloat16, torch.float16)

    def lacks(self, device: torch.device, dtype: torch.dtype) -> str:
        """A GPU from Ampere."""
        if reason := lacks_ampere(self.name, device):
            return reason
        if find_spec("cuda") is None:
            return "deltas needs the package cuda-bindings, which comes with torch's CUDA builds"
        return ""

    def misfit(self, weight: Tensor) -> str:
        """The inputs of one token must fit the memory that a block of threads shares."""
        from tasks.engines.decode_kernels import shared_bytes

        most = shared_bytes(weight.device.index) // 2
        if weight.shape[1] > most:
            return f"{weight.shape[1]} inputs; this GPU holds {most} at once"
        return ""

    def break_even(self, dtype: torch.dtype, use: Use) -> float:
        """See BREAK_EVEN; many tokens at once never gain."""
        return BREAK_EVEN if use == "decode" else 1.0

    def encode(self, weight: Tensor, bias: Tensor | None) -> EncodedLinear:
        """A layer of 4-bit steps, on the weight's device."""
        return DeltaLinear(weight, bias)


def encode(weight: Tensor, *, rows: int, parts: int) -> dict[str, Tensor]:
    """The buffers of DeltaLinear for a weight, out x in, on its device.

    rows of a group and parts of a row are powers of 2, at least 32 together.
    """
    num_rows, num_columns = weight.shape
    device, lanes = weight.device, rows * parts
    num_groups = -(-num_rows // rows)

    # Entries are the nonzeros and the fillers on the way to them, row by row.
    row, column = weight.nonzero(as_tuple=True)
    before = column.roll(1)
    opens = row != row.roll(1)
    opens[:1] = True
    copies = 1 + torch.where(opens, 0, (column - before - 1) // 15)
    source = torch.repeat_interleave(copies)
    left = copies.cumsum(0)[source] - 1 - torch.arange(len(source), device=device)
    steps_done = copies[source] - left
    at = torch.where(left == 0, column[source], before[source] + 15 * steps_done)
    value = torch.where(left == 0, weight[row, column][source], 0)
    row = row[source]

    counts = torch.bincount(row, minlength=num_rows)
    order = counts.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(num_rows, device=device)
    missing = num_groups * rows - num_rows
    longest = F.pad(counts[order], (0, missing)).view(num_groups, rows).amax(1)
    lengths = (-(-longest // (2 * parts)) * 2).clamp(min=2)  # pairs of values share a word
    sizes = lanes * (lengths // 8 * 5 + (lengths % 8 + 2) // 2 * (lengths % 8 > 0))
    offsets = sizes.cumsum(0) - sizes

    entry = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
    group, lane = place[row] // rows, place[row] % rows
    length = lengths[group]
    lane += entry // length * rows
    entry %= length
    word = offsets[group] + entry // 8 * 5 * lanes + lane
    eighth = entry % 8
    first = entry == 0
    step = torch.where(first, 0, at - at.roll(1))
    stream = torch.zeros(int(sizes.sum()), dtype=torch.int32, device=device)
    values = stream.view(weight.dtype)
    values[2 * (word + (1 + eighth // 2) * lanes) + eighth % 2] = value
    nibbles = stream.view(torch.uint8)
    for side in (0, 1):
        chosen = eighth % 2 == side
        index = 4 * word[chosen] + eighth[chosen] // 2
        nibbles[index] |= (step[chosen] << (4 * side)).to(torch.uint8)

    dtype = torch.int16 if num_columns <= 1 << 15 else torch.int32
    starts = torch.zeros(num_groups * lanes, dtype=dtype, device=device)
    starts[(group * lanes + lane)[first]] = at[first].to(dtype)
    return {
        "stream": stream,
        "starts": starts,
        "offsets": offsets,
        "lengths": lengths.int(),
        "order": F.pad(order, (0, missing), value=-1).int(),
    }
