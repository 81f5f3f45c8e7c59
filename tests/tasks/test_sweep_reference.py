"""A sweep prunes what a naive loop prunes: hooks on modules, one block after another, sorted rows.

python -m pytest tests/tasks/test_sweep_reference.py
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modalities.base import Batch
from tasks.allocation import zeros_per_matrix
from tests.tasks.sweeps import TILTED, Batches, Loaded, kept, plain, sweep

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Squares = dict[str, Tensor]


def planned(modality: Any) -> dict[str, int]:
    matrices = modality.matrices()
    counts = zeros_per_matrix([TILTED[m.block] for m in matrices], [m.params for m in matrices])
    names = [f"{modality.blocks[m.block].name}.{m.matrix}" for m in matrices]
    return dict(zip(names, counts, strict=True))


def captured(modality: Any, block: int, batches: list[Batch], only: str = "") -> Squares:
    """Squared norms of the inputs of a block's linear layers, while the whole model runs."""
    squares: Squares = defaultdict(lambda: torch.zeros(()))
    name = modality.blocks[block].name
    handles = []
    for path, module in modality.blocks[block].module.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and (not only or path.endswith(only)):

            def hook(_: nn.Module, args: Any, key: str = f"{name}.{path}.weight") -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).double()
                squares[key] = squares[key] + rows.square().sum(0)

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            modality.model(input_ids=batch.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return squares


def wanda(weight: Tensor, squares: Tensor, zeros: int) -> Tensor:
    """Row by row: the smallest abs(W) * norm; what is left over goes to the cheapest rows."""
    scores = (weight.double().abs() * squares.sqrt()).tolist()
    each, rest = divmod(zeros, len(scores))
    order = [sorted(range(len(row)), key=row.__getitem__) for row in scores]
    cheapest = sorted(range(len(scores)), key=lambda r: scores[r][order[r][each]] if rest else 0)
    pruned = weight.clone()
    for row, columns in enumerate(order):
        pruned[row, columns[: each + (row in cheapest[:rest])]] = 0
    return pruned


def naive(modality: Any, batches: list[Batch], pause: str) -> None:
    """Prune the model as it stands, in place, with nothing of the code under test but the plan."""
    zeros = planned(modality)
    for index, block in enumerate(modality.blocks):
        if pause == "block":
            squares = captured(modality, index, batches)
        for matrix in block.matrices:
            path = matrix.parameter.removesuffix(".weight")
            if pause == "linear":  # the linears before it are pruned already
                squares = captured(modality, index, batches, only=path)
            module = block.module.get_submodule(path)
            key = f"{block.name}.{matrix.name}"
            transposed = type(module).__name__ == "Conv1D"
            weight = module.weight.data.t() if transposed else module.weight.data
            weight.copy_(wanda(weight, squares[key], zeros[key]))


@pytest.mark.parametrize("pause", ["block", "linear"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "phi3"])
def test_wanda_equals_a_naive_loop(
    loaded: Loaded, batches: Batches, family: str, pause: Any
) -> None:
    modality = loaded(family)
    calibration, evaluation = batches(modality)
    with kept(modality):
        naive(modality, calibration, pause)
        expected = {name: p.detach().clone() for name, p in modality.model.named_parameters()}
        loss = plain(modality, evaluation)
    with kept(modality):
        outcome = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at=pause,
            calibration=calibration,
            evaluation=evaluation,
            keep=True,
        )
        for name, parameter in modality.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    assert outcome.losses == loss


def expert_squares(
    modality: Any, block: int, batches: list[Batch], product: Callable[..., Tensor]
) -> tuple[Squares, Squares]:
    """Squared norms of what each expert of a mixture multiplies, from the routing alone."""
    up: Squares = defaultdict(lambda: torch.zeros(()))
    down: Squares = defaultdict(lambda: torch.zeros(()))

    def hook(module: Any, args: Any) -> None:
        hidden, chosen, _ = args
        for expert in range(4):
            x = hidden[(chosen == expert).any(-1)]
            key = str(expert)
            up[key] = up[key] + x.double().square().sum(0)
            down[key] = down[key] + product(module, x, expert).double().square().sum(0)

    experts = modality.blocks[block].module.mlp.experts
    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            modality.model(input_ids=batch.ids, use_cache=False)
    handle.remove()
    return up, down


def mixtral_product(module: Any, x: Tensor, expert: int) -> Tensor:
    gate, up = (x @ module.gate_up_proj[expert].t()).chunk(2, -1)
    return nn.functional.silu(gate) * up


def gpt_oss_product(module: Any, x: Tensor, expert: int) -> Tensor:
    mixed = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate, up = mixed[..., ::2].clamp(max=7), mixed[..., 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


@pytest.mark.parametrize(
    "family, product, transposed",
    [
        ("mixtral", mixtral_product, False),
        ("qwen3-moe", mixtral_product, False),
        ("gpt-oss", gpt_oss_product, True),
    ],
)
def test_experts_are_pruned_by_what_was_routed_to_them(
    loaded: Loaded, batches: Batches, family: str, product: Any, transposed: bool
) -> None:
    """The first block, whose inputs are dense: every expert by its own tokens."""
    modality = loaded(family)
    calibration, _ = batches(modality)
    zeros = planned(modality)
    block = modality.blocks[0]
    up, down = expert_squares(modality, 0, calibration, product)
    expected = {}
    for name, squares in (("gate_up_proj", up), ("down_proj", down)):
        for expert in range(4):
            weight = block.module.get_parameter(f"mlp.experts.{name}")[expert].detach()
            weight = weight.t() if transposed else weight
            key = f"mlp.experts.{name}[{expert}]"
            expected[key] = wanda(weight, squares[str(expert)], zeros[f"{block.name}.{key}"])
    with kept(modality):
        outcome = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at="block",
            calibration=calibration,
            evaluation=(),
            keep=True,
        )
        assert not any(name.startswith(f"{block.name}.") for name in outcome.fallbacks)
        for matrix in block.matrices:
            if matrix.expert is not None:
                assert torch.equal(matrix.weight(), expected[matrix.name]), matrix.name


def outputs(modality: Any, batches: list[Batch]) -> list[list[Tensor]]:
    """The output of every block for every batch, of the model as it stands."""
    found: list[list[Tensor]] = [[] for _ in modality.blocks]
    handles = [
        block.module.register_forward_hook(
            lambda *args, index=index: found[index].append(
                args[2][0] if isinstance(args[2], tuple) else args[2]
            )
        )
        for index, block in enumerate(modality.blocks)
    ]
    with torch.no_grad():
        for batch in batches:
            modality.model(input_ids=batch.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_error_curves_equal_a_naive_computation(
    loaded: Loaded, batches: Batches, family: str
) -> None:
    modality = loaded(family)
    calibration, evaluation = batches(modality)
    dense = outputs(modality, evaluation)
    with kept(modality):
        outcome = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at="linear",
            calibration=calibration,
            evaluation=evaluation,
            dense=True,
            keep=True,
        )
        pruned = outputs(modality, evaluation)
    assert [error.block for error in outcome.errors] == [0, 1, 2]
    for error, true, now in zip(outcome.errors, dense, pruned, strict=True):
        a = torch.cat([x.reshape(-1, x.shape[-1]) for x in true]).double()
        b = torch.cat([x.reshape(-1, x.shape[-1]) for x in now]).double()
        assert error.absolute == pytest.approx(float((a - b).square().sum(1).mean()), rel=1e-5)
        assert error.relative == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)
        assert error.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-5)
        assert error.relative > 0


def test_error_curves_begin_where_pruning_begins(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    outcome = sweep(
        modality,
        [0.0, 0.0, 0.5],
        method="wanda",
        pause_at="linear",
        calibration=calibration,
        evaluation=evaluation,
        dense=True,
    )
    first, second, third = outcome.errors
    assert (first.relative, second.relative) == (0.0, 0.0)
    assert (first.cosine, second.cosine) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert third.relative > 0.01
