"""The engines for GPUs: the format against a plain loop, the kernels against float64.

python -m pytest tests/tasks/test_gpu_engines.py  # without a GPU: the format; do kernels compile?
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from tasks.engines.decode_gpu import DeltaLinear, Deltas
from tasks.engines.decode_kernels import compiled
from tasks.engines.semi_structured import SemiStructured

ROOT = Path(__file__).resolve().parents[2]
HALVES = [torch.bfloat16, torch.float16]


def sparse(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    return weight * (torch.rand(rows, columns, generator=draw) >= sparsity)


def decoded(layer: DeltaLinear) -> Tensor:
    """The format as decode_gpu.py words it, read one entry at a time."""
    dense = torch.zeros(layer.out_features, layer.in_features, dtype=layer.dtype)
    stream, halves = layer.stream.tolist(), layer.stream.view(layer.dtype).tolist()
    starts, order = layer.starts.tolist(), layer.order.tolist()
    lanes = layer.rows * layer.parts
    for group, offset in enumerate(layer.offsets.tolist()):
        for lane in range(lanes):
            row = order[group * layer.rows + lane % layer.rows]
            column = starts[group * lanes + lane]
            for entry in range(int(layer.lengths[group])):
                word = offset + entry // 8 * 5 * lanes + lane
                column += (stream[word] >> entry % 8 * 4) & 15
                value = halves[2 * (word + (1 + entry % 8 // 2) * lanes) + entry % 2]
                if value != 0:
                    assert dense[row, column] == 0
                    dense[row, column] = value
    return dense


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "columns", "sparsity", "group", "parts"),
    [
        (33, 200, 0.7, 16, 4),
        (20, 300, 0.97, 16, 2),  # steps of more than 15, and of more than 30
        (5, 7, 0.2, 4, 8),
        (1, 1, 0.0, 32, 1),
        (3, 64, 1.0, 8, 4),
    ],
)
def test_format(
    rows: int, columns: int, sparsity: float, group: int, parts: int, dtype: torch.dtype
) -> None:
    weight = sparse(rows, columns, sparsity, dtype)
    assert torch.equal(decoded(DeltaLinear(weight, None, rows=group, parts=parts)), weight)


def test_rows_of_unlike_density_and_far_columns() -> None:
    weight = torch.zeros(40, 70_000, dtype=torch.bfloat16)  # first columns of over 16 bits
    weight[7, ::25] = 1  # 2800, each with a filler before it
    weight[9, 69_999] = 2
    weight[39, :100] = 3
    layer = DeltaLinear(weight, None, parts=8)
    assert torch.equal(decoded(layer), weight)
    # The one full row pays for its group of 32; the other group is next to nothing.
    assert layer.encoded_bytes < 1.1 * 32 * 5_600 * 2.5


@pytest.mark.parametrize(
    ("sparsity", "bound"), [(0.5, 1.34), (0.6, 1.08), (0.7, 0.83), (0.8, 0.60)]
)
def test_bytes_per_weight(sparsity: float, bound: float) -> None:
    weight = sparse(1024, 4096, sparsity)
    least = (1 - sparsity) * 2.5
    assert least < DeltaLinear(weight, None).encoded_bytes / weight.numel() < bound


def test_state_is_saved_and_loaded() -> None:
    weight, bias = sparse(16, 128, 0.7), torch.randn(16).bfloat16()
    layer = DeltaLinear(weight, bias)
    other = DeltaLinear(weight.flip(0).contiguous(), torch.zeros_like(bias))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(decoded(other), weight)
    assert other.bias is not None
    assert torch.equal(other.bias, bias)


def test_refusals() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "not on cpu" in Deltas().refusal(cpu, torch.bfloat16)
    assert "not torch.float32" in Deltas().refusal(gpu, torch.float32)
    semi = SemiStructured()
    assert "not on cpu" in semi.refusal(cpu, torch.bfloat16)
    assert "not torch.float32" in semi.refusal(gpu, torch.float32)
    weight = torch.zeros(16, 16)
    weight[1, 4:7] = 1
    with pytest.raises(UserError, match="1 groups of 4 have more than 2"):
        semi.encode(weight, None)
    assert semi.misfit(weight[:10]) == "10 x 16 is not divisible by 16"
    weight[1, 4] = 0
    assert semi.misfit(weight) == ""


def test_inputs_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float16.*bfloat16"):
        DeltaLinear(sparse(16, 64, 0.5), None)(torch.zeros(1, 64, dtype=torch.float16))


def check(device: str, dtype: torch.dtype, rows: int, columns: int, sparsity: float) -> None:
    """1 to 16 tokens with bias and more of them without, strided inputs included."""
    weight = sparse(rows, columns, sparsity, dtype, seed=rows).to(device)
    bias = torch.randn(rows, device=device).to(dtype)
    layer = DeltaLinear(weight, bias)
    assert torch.equal(layer.weight, weight)
    for tokens in (1, 2, 3, 6, 16) if device == "cuda" else (1, 2, 3):
        x = torch.randn(tokens, 2, columns, device=device).to(dtype)[:, -1]
        exact = F.linear(x.double(), weight.double(), bias.double())
        near = (layer(x).double() - exact).norm() / exact.norm()
        assert near < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    x = torch.randn(2, 17, columns, device=device).to(dtype)
    assert torch.equal(layer(x), F.linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"),
    [(4096, 4096, 0.7), (1000, 11_008, 0.5), (77, 130, 0.8), (1, 1, 0.0), (64, 70_000, 0.9)],
)
def test_kernels(dtype: torch.dtype, rows: int, columns: int, sparsity: float) -> None:
    check("cuda", dtype, rows, columns, sparsity)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "parts"), [(8, 32), (32, 16), (64, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16])
def test_every_layout_computes_the_same(rows: int, parts: int, tokens: int) -> None:
    weight = sparse(300, 2048, 0.6).cuda()
    layer = DeltaLinear(weight, None, rows=rows, parts=parts)
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    exact = x.double() @ weight.double().t()
    assert (layer(x).double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("tokens", [1, 8])
def test_the_kernels_compile(capability: tuple[int, int], tokens: int) -> None:
    """NVIDIA's compiler needs no GPU."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="no CUDA build of torch")
    for bf16, start, wide in [(0, "int", 0), (1, "short", 1)]:
        options = [f"-DTOKENS={tokens}", "-DROWS=32", "-DPARTS=32"]
        options += [f"-DBF16={bf16}", f"-DStart={start}", f"-DWIDE={wide}"]
        cubin = compiled(tuple(options), capability)
        assert b"multiply" in cubin
        assert b"expand" in cubin


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    weight = sparse(512, 1024, 0.7).cuda()
    layer = DeltaLinear(weight, None)
    x = torch.zeros(1, 1024, device="cuda", dtype=torch.bfloat16)
    layer(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(1, 1024))
    graph.replay()
    assert torch.equal(y, layer(x))
    assert float(y.abs().max()) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_two_of_four(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 512, device="cuda").to(dtype)
    weight.view(-1, 4)[:, ::2] = 0
    bias = torch.randn(256, device="cuda").to(dtype)
    engine = SemiStructured()
    if reason := engine.refusal(weight.device, dtype):
        pytest.skip(reason)
    layer = engine.encode(weight, bias)
    assert torch.equal(layer.weight, weight)
    assert layer.encoded_bytes == weight.nbytes * 9 // 16
    for tokens in (1, 3, 100):
        x = torch.randn(2, tokens, 512, device="cuda").to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert (layer(x).double() - exact).norm() < 4e-3 * exact.norm()
