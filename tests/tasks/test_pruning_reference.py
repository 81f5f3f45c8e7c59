"""The same zeros and weights as published code: a part of its arrays here, all of them nearby.

python -m pytest tests/tasks/test_pruning_reference.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.pruning import METHODS, prune_in_place, prune_weight
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget

PART = Path(__file__).parents[1] / "reference" / "pruning.npz"
FULL = Path(__file__).resolve().parents[3] / "shared" / "golden" / "reference.npz"
PATTERNS = ("0.3", "0.5", "0.7", "2of4", "4of8")
SCORED = [("wanda", p) for p in PATTERNS] + [("magnitude", p) for p in PATTERNS[:3]]


@pytest.fixture(scope="module")
def full() -> Any:
    if not FULL.is_file():
        pytest.skip(f"all arrays of published code would be at {FULL}")
    return np.load(FULL)


@pytest.fixture(scope="module")
def part() -> Any:
    return np.load(PART)


def asked(pattern: str) -> dict[str, Any]:
    return {"pattern": pattern.replace("of", ":")} if "of" in pattern else {"rate": float(pattern)}


def of_layer(full: Any, shape: str) -> tuple[Tensor, Tensor]:
    weight = torch.from_numpy(full[f"{shape}_weight"])
    return weight, torch.from_numpy(full[f"{shape}_inputs"]).reshape(-1, weight.shape[1])


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("method, pattern", SCORED)
def test_masks(full: Any, method: str, pattern: str, shape: str) -> None:
    weight, inputs = of_layer(full, shape)
    pruned = prune_weight(weight, inputs, method=method, **asked(pattern))
    expected = torch.from_numpy(full[f"{shape}_{method}_pruned_mask_{pattern}"])
    assert torch.equal(pruned == 0, expected)
    assert torch.equal(pruned[~expected], weight[~expected])


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt(full: Any, pattern: str, shape: str) -> None:
    weight, inputs = of_layer(full, shape)
    pruned = prune_weight(weight, inputs, method="sparsegpt", **asked(pattern))
    expected = torch.from_numpy(full[f"{shape}_sparsegpt_weight_{pattern}"])
    same = (pruned == 0) == (expected == 0)
    assert same.float().mean() >= 0.999
    rows = same.all(1)
    difference = torch.linalg.vector_norm(pruned[rows] - expected[rows])
    assert difference <= 1e-4 * torch.linalg.vector_norm(expected[rows])


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_norms(full: Any, shape: str) -> None:
    """Published: mean over batches of the squared norms; here: their sum over tokens."""
    _, inputs = of_layer(full, shape)
    norms = InputStatistics()
    for batch in inputs.split(128):
        norms.add(batch)
    assert norms.tokens == 512
    expected = torch.from_numpy(full[f"{shape}_wanda_scaler_row"]) * 4
    torch.testing.assert_close(norms.squares, expected, rtol=1e-5, atol=0)


def pruned_part(part: Any, method: str, pattern: str) -> tuple[Tensor, Tensor]:
    """The weight that a checkout carries after pruning, and the zeros of published code."""
    weight = torch.from_numpy(part["weight"])
    mask = np.unpackbits(part[f"{method}_mask_{pattern}"]).reshape(weight.shape).astype(bool)
    statistics = InputStatistics(METHODS[method].needs)
    statistics.tokens = int(part["tokens"])
    statistics._squares = torch.from_numpy(part["scaler_row"])
    if "gram" in statistics.needs:
        upper = torch.zeros(weight.shape[1], weight.shape[1])
        upper[tuple(torch.triu_indices(*upper.shape))] = torch.from_numpy(part["hessian_upper"])
        statistics._gram = (upper + upper.triu(1).T) * statistics.tokens / 2
    if "of" in pattern:
        kept, size = map(int, pattern.split("of"))
        budget = Budget.in_groups((kept, size), weight.shape)
    else:
        budget = Budget(METHODS[method].published_zeros(*weight.shape, float(pattern)))
    new = weight.clone()
    assert prune_in_place(new, statistics, method=method, budget=budget)
    return new, torch.from_numpy(mask)


@pytest.mark.parametrize("method, pattern", SCORED)
def test_masks_of_the_part(part: Any, method: str, pattern: str) -> None:
    new, mask = pruned_part(part, method, pattern)
    assert torch.equal(new == 0, mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_of_the_part(part: Any, pattern: str) -> None:
    new, mask = pruned_part(part, "sparsegpt", pattern)
    assert ((new == 0) == mask).float().mean() >= 0.999
    expected = torch.from_numpy(part[f"sparsegpt_rows_{pattern}"])
    rows = torch.zeros(8, new.shape[1]).masked_scatter_(~mask[:8], expected)
    same = ((new[:8] == 0) == mask[:8]).all(1)
    assert int(same.sum()) >= 7
    difference = torch.linalg.vector_norm(new[:8][same] - rows[same])
    assert difference <= 1e-4 * torch.linalg.vector_norm(rows[same])


def test_the_part_is_small() -> None:
    assert PART.stat().st_size <= 300_000
