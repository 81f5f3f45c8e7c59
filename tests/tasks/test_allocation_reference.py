"""OWL and AlphaPruning against arrays of published code (tests/reference/allocation.md).

python -m pytest tests/tasks/test_allocation_reference.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.records import MatrixRecord
from infra.specs import PruneSpec
from tasks.allocation import rates_of
from tasks.allocation.activations import outlier_percent
from tasks.allocation.weights import alpha_mid, alpha_peak, spectrum

HERE = Path(__file__).resolve()
SUBSET = HERE.parents[1] / "reference" / "allocation.npz"
WHOLE = HERE.parents[3] / "shared" / "golden" / "reference.npz"
FITS = {"mid": alpha_mid, "peak": alpha_peak}
MATRICES = [
    MatrixRecord(block=block, matrix=name, params=64 * 96)
    for block in range(6)
    for name in ("up", "down")
]


@pytest.fixture(scope="module")
def subset() -> Any:
    return np.load(SUBSET)


@pytest.fixture(scope="module")
def whole() -> Any:
    if not WHOLE.is_file():
        pytest.skip(f"the whole set of arrays is not at {WHOLE}")
    return np.load(WHOLE)


def check_alpha(published: Any, weight: Any, fit: str, block: int, place: int) -> float:
    alpha = FITS[fit](spectrum(torch.from_numpy(weight)))
    expected = published[f"alphapruning_alpha_{fit}"][block, place]
    assert alpha == pytest.approx(expected, rel=1.3e-5)
    return alpha


def check_rates(published: Any, fit: str, alphas: list[float]) -> None:
    prune = PruneSpec(sparsity=0.7, allocation="alphapruning")
    expected = published[f"alphapruning_sparsity_{fit}_eps0.3_S0.7"]
    rates = rates_of(prune, MATRICES, alphas)
    assert rates[::2] == rates[1::2] == pytest.approx(expected.tolist(), abs=1.3e-5)


def check_owl(published: Any, percent: list[float]) -> None:
    prune = PruneSpec(sparsity=0.7, allocation="owl")
    expected = published["owl_sparsity_M5_lambda0.08_S0.7"]
    rates = rates_of(prune, MATRICES, [p for p in percent for _ in range(2)])
    assert rates[::2] == rates[1::2] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("fit", FITS)
def test_alphapruning(subset: Any, fit: str) -> None:
    check_alpha(subset, subset["up"], fit, 2, 0)
    check_rates(subset, fit, subset[f"alphapruning_alpha_{fit}"].flatten().tolist())


def test_owl(subset: Any) -> None:
    check_owl(subset, subset["owl_outlier_percent_M5"].tolist())


@pytest.mark.parametrize("fit", FITS)
def test_alphapruning_on_all_arrays(whole: Any, fit: str) -> None:
    alphas = [
        check_alpha(whole, whole[f"alloc_{block}_{name}"], fit, block, place)
        for block in range(6)
        for place, name in enumerate(("up", "down"))
    ]
    check_rates(whole, fit, alphas)


def test_owl_on_all_arrays(whole: Any) -> None:
    percent = []
    for block in range(6):
        scores = []
        for name in ("up", "down"):
            inputs = torch.from_numpy(whole[f"alloc_{block}_{name}_inputs"])
            scores.append(
                torch.from_numpy(whole[f"alloc_{block}_{name}"]).abs() * inputs.norm(dim=0)
            )
        percent.append(outlier_percent(scores, times=5.0))
    assert percent == pytest.approx(whole["owl_outlier_percent_M5"].tolist(), abs=1e-6)
    check_owl(whole, percent)
