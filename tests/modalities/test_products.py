"""Every known product is seen, with exactly the inputs that it multiplies.

python -m pytest tests/modalities/test_products.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modalities.products import Matrix, ProductRecorder, ProductWatcher
from tasks.lockstep import Lockstep, Pass, pause

IN, OUT = 6, 5


class Holder(nn.Module):
    """A block of one parameter and one product."""

    def __init__(self, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


def watched(block: nn.Module, matrices: list[Matrix], *args: Tensor) -> list[tuple[str, Tensor]]:
    """What a watcher sees in one call."""
    seen: list[tuple[str, Tensor]] = []
    with ProductWatcher(matrices, lambda matrix, inputs: seen.append((matrix.name, inputs))):
        block(*args)
    return seen


# Name, stored in x out?, the product; x is 2 x 3 x IN.
DENSE: list[tuple[str, bool, Callable[[Tensor, Tensor], Tensor]]] = [
    ("linear", False, lambda x, w: F.linear(x, w)),
    ("linear by keyword", False, lambda x, w: F.linear(input=x, weight=w)),
    ("matmul of a transposed view", False, lambda x, w: torch.matmul(x, w.t())),
    ("matmul, transpose()", False, lambda x, w: x.matmul(w.transpose(0, 1))),
    ("@ with a stored transpose", True, lambda x, w: x @ w),
    ("matmul of one more dimension", True, lambda x, w: torch.matmul(x, w[None])),
    ("weight on the left", False, lambda x, w: torch.matmul(w, x.mT)),
    ("weight on the left, transposed", True, lambda x, w: w.T @ x.mT),
    ("mm", True, lambda x, w: torch.mm(x.view(-1, IN), w)),
    ("mm by keyword", True, lambda x, w: torch.mm(x.view(-1, IN), mat2=w)),
    ("Tensor.mm", False, lambda x, w: x.view(-1, IN).mm(w.t())),
    ("addmm", True, lambda x, w: torch.addmm(torch.ones(OUT), x.view(-1, IN), w)),
    (
        "addmm by keyword",
        True,
        lambda x, w: torch.addmm(input=torch.ones(OUT), mat1=x.view(-1, IN), mat2=w, alpha=2),
    ),
    ("Tensor.addmm", False, lambda x, w: torch.ones(OUT).addmm(x.view(-1, IN), w.t())),
    ("einsum", False, lambda x, w: torch.einsum("bsi,oi->bso", x, w)),
    ("einsum, weight first", True, lambda x, w: torch.einsum("io, bsi -> sbo", w, x)),
    ("einsum of a transposed view", True, lambda x, w: torch.einsum("bsi,oi->bso", x, w.t())),
    ("einsum without an arrow", True, lambda x, w: torch.einsum("abc,cd", x, w)),
    ("einsum of a list", False, lambda x, w: torch.einsum("bsi,oi->bso", [x, w])),
    ("conv1d", False, lambda x, w: F.conv1d(x.mT, w[:, :, None])),
    ("conv1d without a batch", False, lambda x, w: F.conv1d(x.view(-1, IN).t(), w[:, :, None])),
    ("conv2d, same", False, lambda x, w: F.conv2d(x.mT[..., None], w[..., None, None], None, 1)),
    ("padding=same", False, lambda x, w: F.conv1d(x.mT, w[..., None], padding="same")),
]


@pytest.mark.parametrize("name, transposed, product", DENSE, ids=[case[0] for case in DENSE])
def test_sees_the_inputs_of_a_product(
    name: str, transposed: bool, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, IN)
    block = Holder(torch.randn((IN, OUT) if transposed else (OUT, IN)), product)
    recorder = ProductRecorder(block)
    with recorder:
        block(x)
    assert [(f.parameter, f.fused, f.transposed) for f in recorder.found.values()] == [
        ("weight", False, transposed)
    ]
    matrix = Matrix(block, "weight", None, transposed)
    ((seen, inputs),) = watched(block, [matrix], x)
    assert seen == "weight"
    assert inputs.shape == (6, IN)
    assert sorted(inputs.tolist()) == sorted(x.view(-1, IN).tolist())
    assert matrix.weight().shape == (OUT, IN)
    assert matrix.weight().data_ptr() == block.weight.data_ptr()


# Name, stored in x out?, shape of x; the weight is 4 experts x matrix.
FUSED: list[tuple[str, bool, tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = [
    ("bmm", True, (4, 3, IN), lambda x, w: torch.bmm(x, w)),
    ("bmm by keyword", True, (4, 3, IN), lambda x, w: torch.bmm(x, mat2=w)),
    ("bmm of a transposed view", False, (4, 3, IN), lambda x, w: x.bmm(w.mT)),
    ("matmul", False, (4, 3, IN), lambda x, w: torch.matmul(x, w.transpose(1, 2))),
    ("matmul, weight on the left", False, (4, 3, IN), lambda x, w: torch.matmul(w, x.mT)),
    ("matmul with batches", True, (2, 4, 3, IN), lambda x, w: x @ w),
    ("matmul of one set of tokens", True, (1, 3, IN), lambda x, w: x @ w),
    ("matmul of a plain matrix", True, (3, IN), lambda x, w: x @ w),
    (
        "baddbmm",
        True,
        (4, 3, IN),
        lambda x, w: torch.baddbmm(torch.zeros(1), x, w),
    ),
    (
        "baddbmm by keyword",
        False,
        (4, 3, IN),
        lambda x, w: torch.zeros(4, 3, OUT).baddbmm(batch1=x, batch2=w.mT, beta=0),
    ),
    ("einsum", False, (4, 3, IN), lambda x, w: torch.einsum("eti,eoi->eto", x, w)),
    ("einsum with batches", True, (2, 4, 3, IN), lambda x, w: torch.einsum("beti,eio->beto", x, w)),
    ("einsum of one token each", False, (4, IN), lambda x, w: torch.einsum("ei,eoi->eo", x, w)),
    (
        "one linear per expert",
        False,
        (4, 3, IN),
        lambda x, w: torch.stack([F.linear(x[e], w[e]) for e in range(4)]),
    ),
    (
        "one product per expert",
        True,
        (4, 3, IN),
        lambda x, w: torch.stack([a @ b for a, b in zip(x, w.unbind(), strict=True)]),
    ),
]


@pytest.mark.parametrize("name, transposed, shape, product", FUSED, ids=[case[0] for case in FUSED])
def test_sees_every_expert_of_a_fused_product(
    name: str,
    transposed: bool,
    shape: tuple[int, ...],
    product: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    block = Holder(torch.randn((4, IN, OUT) if transposed else (4, OUT, IN)), product)
    recorder = ProductRecorder(block)
    with recorder:
        block(x)
    assert [(f.parameter, f.fused, f.transposed) for f in recorder.found.values()] == [
        ("weight", True, transposed)
    ]
    matrices = [Matrix(block, "weight", e, transposed) for e in range(4)]
    seen = watched(block, matrices, x)
    assert [name for name, _ in seen] == [f"weight[{e}]" for e in range(4)]
    if name in ("matmul of one set of tokens", "matmul of a plain matrix"):
        truth = [x.reshape(-1, IN)] * 4
    elif name == "einsum of one token each":
        truth = [x[e][None] for e in range(4)]
    else:
        truth = [x.movedim(-3, 0)[e].reshape(-1, IN) for e in range(4)]
    for (_, inputs), true in zip(seen, truth, strict=True):
        assert torch.equal(inputs, true)


# What looks like a product with the weight and is none that would be pruned rightly.
UNKNOWN: list[tuple[str, tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = [
    ("cast first", (OUT, IN), lambda x, w: F.linear(x.double(), w.double())),
    ("grouped convolution", (IN, 1, 1), lambda x, w: F.conv1d(x.mT, w, groups=IN)),
    ("kernel of 3", (OUT, IN, 3), lambda x, w: F.conv1d(x.mT, w)),
    ("padded", (OUT, IN, 1), lambda x, w: F.conv1d(x.mT, w, padding=1)),
    ("einsum over two labels", (3, IN), lambda x, w: torch.einsum("bsi,si->b", x, w)),
    ("einsum that sums tokens", (OUT, IN), lambda x, w: torch.einsum("bsi,oi->bo", x, w)),
    ("einsum of heads", (2, OUT, IN), lambda x, w: torch.einsum("bsi,hoi->bsho", x, w)),
    ("three dimensions as one matrix", (5, 2, 3), lambda x, w: F.linear(x, w.view(5, 6))),
    ("heads as one matrix", (2, 3, 6), lambda x, w: F.linear(x, w.view(6, 6))),
    ("elementwise", (3, IN), lambda x, w: x * w),
    ("embedding", (OUT, IN), lambda x, w: F.embedding(torch.tensor([0]), w)),
    ("half of a matrix", (2 * OUT, IN), lambda x, w: F.linear(x, w[:OUT])),
]


@pytest.mark.parametrize("name, shape, product", UNKNOWN, ids=[case[0] for case in UNKNOWN])
def test_unknown_products_are_not_seen(
    name: str, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    block = Holder(torch.randn(shape), product)
    recorder = ProductRecorder(block)
    with recorder:
        block(torch.randn(2, 3, IN))
    expected = ["weight"] if name == "three dimensions as one matrix" else []
    assert list(recorder.found) == expected
    if expected:  # flattened as a product of columns is: the matrix has the inputs' width
        assert Matrix(block, "weight").weight().shape == (5, 6)


def test_opaque_attention_is_not_seen() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    recorder = ProductRecorder(attention)
    x = torch.randn(2, 3, 8)
    with recorder:
        attention(x, x, x)
    assert "in_proj_weight" not in recorder.found


@settings(deadline=None, max_examples=40)
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    stride=st.integers(1, 3),
)
def test_inputs_reproduce_the_product(batch: list[int], size: tuple[int, int], stride: int) -> None:
    """inputs @ weight.T is what the product gave, whatever the shape of x."""
    rows, columns = size
    torch.manual_seed(rows)
    x = torch.randn(*batch, 4, columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    outputs = [
        (Holder(weight, lambda x, w: F.linear(x, w)), x),
        (Holder(weight, lambda x, w: x @ w.t()), x),
        (Holder(weight, lambda x, w: (w @ x.mT).mT), x),
        (
            Holder(
                weight[:, :, None],
                lambda x, w: F.conv1d(x.reshape(-1, 4, columns).mT, w, stride=stride).mT,
            ),
            x,
        ),
        (
            Holder(
                weight[:, :, None, None],
                lambda x, w: F.conv2d(
                    x.reshape(-1, 2, 2, columns).movedim(-1, 1), w, stride=(1, stride)
                ).movedim(1, -1),
            ),
            x,
        ),
    ]
    for block, given_x in outputs:
        matrix = Matrix(block, "weight")
        ((_, inputs),) = watched(block, [matrix], given_x)
        expected = block(given_x).reshape(-1, rows)
        torch.testing.assert_close(inputs @ matrix.weight().t(), expected)


def test_a_watcher_ignores_other_weights() -> None:
    first, second = nn.Linear(IN, IN), nn.Linear(IN, IN)
    block = nn.Sequential(first, second)
    seen = watched(block, [Matrix(block, "1.weight")], torch.randn(3, IN))
    assert [name for name, _ in seen] == ["1.weight"]


class Three(nn.Module):
    """A block of three products."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(IN, IN, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = x + step(x)
        return x


def test_one_watcher_per_run_sees_every_product_between_pauses() -> None:
    """Three runs that wait at each of three products: nine are seen, each by its own run."""
    block = Three()
    matrices = [Matrix(block, f"steps.{i}.weight") for i in range(3)]
    seen: list[tuple[int, str]] = []

    def watch(run: int, matrix: Matrix, inputs: Tensor) -> None:
        seen.append((run, matrix.name))
        pause(matrix.name)

    results: list[Any] = []
    with torch.no_grad(), Lockstep([("block", block)]) as lockstep:
        inputs = [torch.randn(2, 3, IN) for _ in range(3)]
        runs = [lockstep.start(lambda x=x: block(x)) for x in inputs]
        for number, run in enumerate(runs):
            run.resume(Pass(ProductWatcher(matrices, partial(watch, number))))
        for _ in range(3):
            for run in runs:
                run.resume(None)
        results = [run.result for run in runs]
    assert seen == [(run, f"steps.{i}.weight") for i in range(3) for run in range(3)]
    with torch.no_grad():
        assert all(torch.equal(block(x), y) for x, y in zip(inputs, results, strict=True))
