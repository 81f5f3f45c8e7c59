"""What makes a block and a prunable matrix, what is left alone and what is refused.

python -m pytest tests/modalities/test_block_rules.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError
from modalities.blocks import Block, find_blocks


def found(model: nn.Module, x: Tensor) -> list[Block]:
    with torch.no_grad():
        return find_blocks(model, lambda: model(x))


def named(block: Block) -> list[str]:
    return [matrix.name for matrix in block.matrices]


class Expert(nn.Module):
    """One expert as a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu())


class Mixture(nn.Module):
    """Four experts in a list, one per token; more scores than experts where `spare` says so."""

    def __init__(self, width: int, only: tuple[int, ...], spare: int = 0) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Linear(width, 4 + spare, bias=False))
        self.experts = nn.ModuleList(Expert(width) for _ in range(4))
        self.only = only

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)[..., list(self.only)]
        chosen = torch.tensor(self.only)[scores.argmax(-1)]
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            out[chosen == number] = self.experts[number](x[chosen == number])
        return out


class MixtureBlock(nn.Module):
    """A block whose value projection has as many outputs as there are experts."""

    def __init__(self, only: tuple[int, ...], spare: int = 0) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(8, 4), nn.Linear(4, 8)
        self.mlp = Mixture(8, only, spare)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.v(x))
        return x + self.mlp(x)


class Stack(nn.Module):
    """A model of the given blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("only", [(1, 3), (0, 2), (2,)])
def test_experts_in_a_list_that_saw_no_token_are_included(only: tuple[int, ...]) -> None:
    """In the place of their number: another batch calls them before those that come after."""
    torch.manual_seed(0)
    model = Stack(MixtureBlock(only), MixtureBlock(only))
    for block in found(model, torch.randn(1, 64, 8)):
        experts = [f"mlp.experts.{e}.{x}.weight" for e in range(4) for x in ("gate", "down")]
        assert named(block) == ["v.weight", "o.weight", *experts]
        assert block.unseen == ()


def test_a_router_is_known_by_its_place_not_by_its_size_alone() -> None:
    """As many outputs as experts beside the experts; elsewhere it is a matrix like others."""
    torch.manual_seed(0)
    for spare in (0, 1):  # some models route to experts that do nothing as well
        model = Stack(*(MixtureBlock((0, 1, 2, 3), spare) for _ in range(2)))
        for block in found(model, torch.randn(1, 64, 8)):
            assert "mlp.router.0.weight" not in named(block)
            assert "v.weight" in named(block)
            assert "mlp.experts.0.gate.weight" in named(block)


def test_a_block_that_is_visited_twice_is_refused() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = Twice(Expert(8), Expert(8))
    with pytest.raises(UserError, match=r"^layers\.0 is visited 2 times in one forward"):
        found(model, torch.randn(1, 3, 8))


def test_blocks_that_share_a_matrix_are_refused() -> None:
    first, second = Expert(8), Expert(8)
    second.down = first.down
    with pytest.raises(UserError, match=r"^layers\.1\.down\.weight is shared with layers\.0"):
        found(Stack(first, second), torch.randn(1, 3, 8))


class Casting(Expert):
    """Multiplies a copy of some of its rows, which no watcher can know for the parameter."""

    def __init__(self, hidden: int) -> None:
        super().__init__(64)
        self.extra = nn.Parameter(torch.randn(hidden, 64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.extra.double().float()).sum(-1, keepdim=True)


def test_unseen_weights_are_listed_up_to_one_percent_and_refused_above() -> None:
    small = Stack(Expert(64), nn.Sequential(Casting(hidden=1)))  # 64 of 2112 weights: 3 %
    with pytest.raises(UserError) as refused:
        found(small, torch.randn(1, 3, 64))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("layers.1 (Sequential): 3% of its matrix weights")
    assert "0.extra first" in message

    class Wide(Casting):
        def __init__(self) -> None:
            super().__init__(hidden=1)
            self.gate, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    (first, second) = found(Stack(Wide(), Wide()), torch.randn(1, 3, 64))  # 64 of 8256: 0.8 %
    assert first.unseen == second.unseen == ("extra",)
    assert named(first) == ["gate.weight", "down.weight"]


def test_opaque_attention_is_refused() -> None:
    """nn.MultiheadAttention is one call: its projections are in no product that is seen."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    with pytest.raises(UserError, match=r"in_proj_weight first: this block cannot be pruned"):
        found(model, torch.randn(1, 3, 32))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no blocks found in Linear"):
        found(nn.Linear(8, 8), torch.randn(1, 3, 8))
    with pytest.raises(UserError, match="no blocks found in Stack"):
        found(Stack(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(1, 3, 8))


def test_lists_called_out_of_order_are_dropped() -> None:
    """Adapters that the blocks call in between are no blocks themselves."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Expert(8) for _ in range(3))
            self.mergers = nn.ModuleList(Expert(8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            extra = self.mergers[0](x) if False else self.mergers[1](x)
            for layer in self.layers:
                x = layer(x) + extra
            return x + self.mergers[0](x)

    blocks = found(Adapted(), torch.randn(1, 3, 8))
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
