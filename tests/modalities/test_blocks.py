"""The table of blocks and matrices, frozen for many families, and what is left alone in them.

python -m pytest tests/modalities/test_blocks.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modalities.blocks import Block, find_blocks
from tests.models import FAMILIES, LAYERS, build

QKVO = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
MLP = [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
LLAMA = QKVO + MLP


def shared(name: str) -> list[str]:
    return [f"mlp.{name}.{x}_proj.weight" for x in ("gate", "up", "down")]


def fused(place: str = "mlp") -> list[str]:
    return [f"{place}.experts.{x}[{e}]" for e in range(4) for x in ("gate_up_proj", "down_proj")]


MIXTURE = QKVO + fused()
MLA = [
    f"self_attn.{x}.weight"
    for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
]
LINEAR_ATTENTION = [f"linear_attn.{x}.weight" for x in ("in_proj_qkvz", "in_proj_ba", "out_proj")]
MAMBA = [f"mamba.{x}.weight" for x in ("in_proj", "x_proj", "dt_proj", "out_proj")]
FEED_FORWARD = [f"feed_forward.{x}_proj.weight" for x in ("gate", "up", "down")]
GPT2 = [f"{x}.weight^T" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
NEOX = [
    f"{x}.weight" for x in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h")
] + ["mlp.dense_4h_to_h.weight"]
BLOOM = [name.replace("attention.", "self_attention.") for name in NEOX]
PHI3 = [
    f"{x}.weight"
    for x in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]
OPT = [f"self_attn.{x}_proj.weight" for x in ("q", "k", "v", "out")] + ["fc1.weight", "fc2.weight"]

# Path of the blocks, matrices of each block, other matrices left alone (any block), unseen.
TABLE: dict[str, tuple[str, list[list[str]], set[str], set[str]]] = {
    "llama": ("model.layers", [LLAMA] * 3, set(), set()),
    "llama-tied": ("model.layers", [LLAMA] * 3, set(), set()),
    "mistral": ("model.layers", [LLAMA] * 3, set(), set()),
    "qwen2": ("model.layers", [LLAMA] * 3, set(), set()),
    "qwen3": ("model.layers", [LLAMA] * 3, set(), set()),
    "gemma3": ("model.layers", [LLAMA] * 3, set(), set()),
    "olmo2": ("model.layers", [LLAMA] * 3, set(), set()),
    "opt": ("model.decoder.layers", [OPT] * 3, set(), set()),
    "gpt-neox": ("gpt_neox.layers", [NEOX] * 3, set(), set()),
    "gpt2": ("transformer.h", [GPT2] * 3, set(), set()),
    "bloom": ("transformer.h", [BLOOM] * 3, set(), set()),
    "phi3": ("model.layers", [PHI3] * 3, set(), set()),
    "mixtral": ("model.layers", [MIXTURE] * 3, {"mlp.gate.weight"}, set()),
    "qwen2-moe": (
        "model.layers",
        [QKVO + shared("shared_expert") + fused()] * 3,
        {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
        set(),
    ),
    "qwen3-moe": ("model.layers", [MIXTURE] * 3, {"mlp.gate.weight"}, set()),
    "granite-moe": (
        "model.layers",
        [QKVO + fused("block_sparse_moe")] * 3,
        {"block_sparse_moe.router.weight"},
        set(),
    ),
    "deepseek-v3": (
        "model.layers",
        [MLA + MLP] + [MLA + fused() + shared("shared_experts")] * 2,
        {"mlp.gate.weight"},
        set(),
    ),
    "gpt-oss": (
        "model.layers",
        [QKVO + [f"{name}^T" for name in fused()]] * 3,
        {"mlp.router.weight", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"},
        set(),
    ),
    "jamba": (
        "model.layers",
        [MAMBA + FEED_FORWARD, QKVO + fused("feed_forward"), MAMBA + FEED_FORWARD],
        {"feed_forward.router.weight", "mamba.conv1d.weight"},
        {"mamba.A_log"},
    ),
    "qwen3-next": (
        "model.layers",
        [
            LINEAR_ATTENTION + shared("shared_expert") + fused(),
            QKVO + shared("shared_expert") + fused(),
            LINEAR_ATTENTION + shared("shared_expert") + fused(),
        ],
        {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "linear_attn.conv1d.weight"},
        set(),
    ),
}


def found(model: Any, *inputs: Any, **keywords: Any) -> list[Block]:
    with torch.no_grad():
        return find_blocks(model, lambda: model(*inputs, **keywords))


def named(block: Block) -> list[str]:
    return [f"{matrix.name}{'^T' if matrix.transposed else ''}" for matrix in block.matrices]


def left_alone(blocks: list[Block]) -> set[str]:
    """Matrices, filters and expert biases of blocks that are neither prunable nor unseen."""
    return {
        name
        for block in blocks
        for name, parameter in block.module.named_parameters()
        if parameter.ndim >= 2
        and name not in {matrix.parameter for matrix in block.matrices} | set(block.unseen)
    }


def test_the_table_covers_all_families() -> None:
    assert set(TABLE) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_matrices_of_a_family(family: str) -> None:
    model = build(family)
    path, matrices, others, unseen = TABLE[family]
    ids = torch.arange(64)[None]
    blocks = found(model, input_ids=ids, use_cache=False)
    assert [block.name for block in blocks] == [f"{path}.{i}" for i in range(LAYERS)]
    assert [named(block) for block in blocks] == matrices
    assert left_alone(blocks) == others
    assert {name for block in blocks for name in block.unseen} == unseen
    for block in blocks:
        for matrix in block.matrices:
            weight = matrix.weight()
            assert weight.ndim == 2
            assert weight.untyped_storage().data_ptr() == (
                block.module.get_parameter(matrix.parameter).untyped_storage().data_ptr()
            )
        assert "forward" not in block.module.__dict__
        assert not block.module._forward_hooks


def test_the_experts_of_a_mixture_are_all_of_its_parameters() -> None:
    """Module by module, a mixture would show a third of its weights only."""
    for block in found(build("mixtral"), input_ids=torch.arange(8)[None], use_cache=False):
        prunable = sum(matrix.params for matrix in block.matrices)
        router = block.module.get_parameter("mlp.gate.weight").numel()
        norms = sum(p.numel() for p in block.module.parameters() if p.ndim == 1)
        assert prunable + router + norms == sum(p.numel() for p in block.module.parameters())
        modules = [m for m in block.module.modules() if isinstance(m, nn.Linear)]
        assert sum(m.weight.numel() for m in modules) < 0.35 * prunable


VIT = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
CONVNEXT = ["mlp.fc1.weight", "mlp.fc2.weight"]


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)


def _convnext(**options: Any) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 2, 1, 2), dims=(16, 32, 32, 64), **options)


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    size = {"img_size": 32, "patch_size": 2, "window_size": 4}
    return SwinTransformer(embed_dim=32, depths=(2, 1), num_heads=(1, 2), **size)


STAGES = [(stage, block) for stage, depth in enumerate((1, 2, 1, 2)) for block in range(depth)]
VISION: dict[str, tuple[Callable[[], nn.Module], list[str], list[str], set[str], set[str]]] = {
    "vit": (_vit, [f"blocks.{i}" for i in range(3)], VIT, set(), set()),
    "convnext": (
        _convnext,
        [f"stages.{i}.blocks.{j}" for i, j in STAGES],
        CONVNEXT,
        {"conv_dw.weight"},
        set(),
    ),
    "convnext, convolutions of 1x1": (
        lambda: _convnext(conv_mlp=True),
        [f"stages.{i}.blocks.{j}" for i, j in STAGES],
        CONVNEXT,
        {"conv_dw.weight"},
        set(),
    ),
    "swin": (
        _swin,
        ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"],
        VIT,
        set(),
        {"attn.relative_position_bias_table"},
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_blocks_of_vision_models(name: str) -> None:
    """Stages are opened, a stage of one block too; downsampling between them is no block."""
    make, names, matrices, others, unseen = VISION[name]
    torch.manual_seed(0)
    blocks = found(make().eval(), torch.randn(1, 3, 32, 32))
    assert [block.name for block in blocks] == names
    assert [named(block) for block in blocks] == [matrices] * len(names)
    assert left_alone(blocks) == others
    assert {name for block in blocks for name in block.unseen} == unseen
