"""Channels and heads are found by watching a block run, and refused where its code needs all.

python -m pytest tests/modalities/test_units.py
"""

from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from infra.structure import shrink
from modalities.base import Modality
from modalities.blocks import find_blocks
from modalities.units import Units, find_units
from tests.models import build, load, write_checkpoint
from tests.timm_models import load_vision, write_timm

Shape = tuple[str, int, dict[str, int]]


def shape(units: Units) -> Shape:
    """The consumer, how many units, and the segments of each producer, less `.weight`."""
    producers = {p.matrix.name.removesuffix(".weight"): p.segments for p in units.producers}
    return units.consumer.name.removesuffix(".weight"), units.count, producers


def opened(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Modality:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(folder / "cache"))
    if family in ("vit", "deit", "convnext"):
        return load_vision(write_timm(family, folder / family))
    found: Modality = load(write_checkpoint(family, folder / family))
    return found


def heads(prefix: str, out: str, count: int) -> Shape:
    return f"{prefix}.{out}", count, {f"{prefix}.{x}_proj": 1 for x in "qkv"}


GATED: Shape = ("mlp.down_proj", 64, {"mlp.gate_proj": 1, "mlp.up_proj": 1})
# Two groups of two heads, four heads, or two of a ViT; and the channels between two products.
FOUND: dict[str, list[Shape]] = {
    "llama": [heads("self_attn", "o_proj", 2), GATED],
    "qwen3": [heads("self_attn", "o_proj", 2), GATED],
    "gemma3": [heads("self_attn", "o_proj", 2), GATED],
    "opt": [heads("self_attn", "out_proj", 4), ("fc2", 64, {"fc1": 1})],
    "gpt-neox": [
        ("attention.dense", 4, {"attention.query_key_value": 1}),
        ("mlp.dense_4h_to_h", 64, {"mlp.dense_h_to_4h": 1}),
    ],
    "gpt2": [("attn.c_proj", 4, {"attn.c_attn": 3}), ("mlp.c_proj", 128, {"mlp.c_fc": 1})],
    "vit": [("attn.proj", 2, {"attn.qkv": 3}), ("mlp.fc2", 128, {"mlp.fc1": 1})],
    "deit": [("attn.proj", 2, {"attn.qkv": 3}), ("mlp.fc2", 128, {"mlp.fc1": 1})],
    "convnext": [("mlp.fc2", 32, {"mlp.fc1": 1})],
}
REFUSED = {
    "phi3": "qkv_proj.weight do not fall into 2 units",
    "bloom": "does not work without half of the 4 units",
    "mixtral": "mixture of experts",
    "olmo2": "does not work without half of the 2 units",
}


@pytest.mark.parametrize("family", FOUND)
def test_units_of(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = opened(family, tmp_path, monkeypatch)
    before = {name: p.clone() for name, p in modality.model.named_parameters()}
    units = modality.units()
    assert [shape(each) for each in units[0]] == FOUND[family]
    assert len(units) == len(modality.blocks)
    for block, kinds in zip(modality.blocks, units, strict=True):
        covered = sum(kind.params * kind.count for kind in kinds)
        assert covered == sum(matrix.params for matrix in block.matrices)
        assert all(kind.consumer in block.matrices for kind in kinds)
    assert all(
        torch.equal(p, before[name]) for name, p in modality.model.named_parameters()
    )  # looking changes nothing
    assert all("forward" not in block.module.__dict__ for block in modality.blocks)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = opened(family, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"structured: .*{REFUSED[family]}.*unstructured"):
        modality.units()
    assert all("forward" not in block.module.__dict__ for block in modality.blocks)


def test_masks_of_rows_and_columns_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rows of a head group only its columns change, whichever producer loses them."""
    modality = opened("llama", tmp_path, monkeypatch)
    group, channels = modality.units()[1]
    gone = torch.tensor([False, True])
    assert group.columns(gone).nonzero().flatten().tolist() == list(range(16, 32))
    rows = {p.matrix.name: p.rows(gone).nonzero().flatten().tolist() for p in group.producers}
    assert rows == {
        "self_attn.q_proj.weight": list(range(16, 32)),  # two heads of eight
        "self_attn.k_proj.weight": list(range(8, 16)),
        "self_attn.v_proj.weight": list(range(8, 16)),
    }
    assert group.params == 32 * (16 + 16 + 8 + 8)
    assert channels.params == 3 * 32


def test_a_fused_weight_loses_the_same_part_of_each_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modality = opened("vit", tmp_path, monkeypatch)
    (qkv,) = modality.units()[0][0].producers
    rows = qkv.rows(torch.tensor([True, False])).nonzero().flatten().tolist()
    assert rows == [*range(16), *range(32, 48), *range(64, 80)]


def test_the_last_heads_of_a_block_stay_and_its_channels_may_go() -> None:
    """A group of two heads, then one head, and then no head can go; nor where no block has two."""
    model = build("llama").eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    seen = torch.ones_like(ids)
    seen[:, -1] = 0

    def forward() -> None:
        model(input_ids=ids, attention_mask=seen, use_cache=False)

    blocks = find_blocks(model, forward)
    for number, block in enumerate(blocks):
        for producers in (3, 1):  # queries, keys and values; then one key and value for all
            heads, _ = find_units(blocks, forward)[number]
            assert (heads.count, len(heads.producers)) == (2, producers)
            shrink(block.module, [heads.removed(torch.tensor([False, True]))])
        if block is not blocks[-1]:
            counts = [[kind.count for kind in kinds] for kinds in find_units(blocks, forward)]
            assert counts == [[64]] * (number + 1) + [[2, 64]] * (len(blocks) - number - 1)
    with pytest.raises(UserError, match=r"does not work without half .* self_attn\.o_proj"):
        find_units(blocks, forward)


def test_a_product_between_two_others_is_refused() -> None:
    """Its rows would be chosen by one and its columns by the other."""

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (wide, high) in {"a": (8, 12), "b": (12, 16), "c": (16, 8)}.items():
                self.add_module(name, torch.nn.Linear(wide, high))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(Chain(), Chain()).requires_grad_(False), torch.randn(9, 8)
    blocks = find_blocks(model, lambda: model(inputs))
    with pytest.raises(UserError, match=r"0\.b\.weight gives the units of one product and takes"):
        find_units(blocks, lambda: model(inputs))


def test_blocks_of_one_kind_are_tried_once() -> None:
    model = build("llama").eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    calls = 0

    def forward() -> None:
        nonlocal calls
        calls += 1
        model(input_ids=ids, use_cache=False)

    blocks = find_blocks(model, forward)
    calls = 0
    find_units(blocks, forward)
    assert calls == 1
