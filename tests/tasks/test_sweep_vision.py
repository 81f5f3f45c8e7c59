"""Sweeps over image classifiers: what is evaluated is the pruned model, bit by bit."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from infra.specs import CalibrationSpec, DataSpec
from tests.tasks.sweeps import PAUSES, check_untouched, check_zeros, kept, rates_of, sweep, weights
from tests.timm_models import load_vision, write_images, write_timm

FAMILIES = ("vit", "vit-hybrid", "deit", "beit", "eva", "swin", "convnext", "convnextv2", "maxvit")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    return write_images(tmp_path_factory.mktemp("images"))


def prepared(family: str, folder: Path, images: DataSpec) -> tuple[Any, dict[str, Any]]:
    """A model with batches of several sizes."""
    modality = load_vision(write_timm(family, folder / family))
    calibration = modality.calibration_batches(images, CalibrationSpec(samples=5))
    evaluation = modality.evaluation_batches(images, "selection", 6, 0)
    return modality, {
        "calibration": [calibration[0].rows(0, 3), calibration[0].rows(3, 5)],
        "evaluation": [evaluation[0].rows(0, 4), evaluation[0].rows(4, 6)],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluates_the_pruned_model(
    family: str, tmp_path: Path, images: DataSpec, cache: Any
) -> None:
    """At one rate and along a line, with the mean kept where blocks differ in size."""
    modality, batches = prepared(family, tmp_path, images)
    before = weights(modality)
    with torch.no_grad():
        dense = [modality.measure(batch) for batch in batches["evaluation"]]
    sizes = modality.record("").block_params()
    for beta, pause in ((0.0, "linear"), (0.01, "block")):
        rates = rates_of(modality, beta)
        mean = sum(r * n for r, n in zip(rates, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(0.5)
        with kept(modality):
            outcome = sweep(
                modality, rates, method="wanda", pause_at=pause, keep=True, dense=True, **batches
            )
            check_zeros(modality, outcome, rates)
            check_untouched(modality, before)
            with torch.no_grad():
                plain = [modality.measure(batch) for batch in batches["evaluation"]]
        assert outcome.losses == [loss for each in plain for loss in each.losses]
        for name, values in outcome.measured.scores.items():
            assert values == [value for each in plain for value in each.scores[name]]
        assert outcome.measured.answers == [word for each in plain for word in each.answers]
        assert outcome.dense_losses == [loss for each in dense for loss in each.losses]
        assert outcome.losses != outcome.dense_losses
        assert len(outcome.errors) == len(modality.blocks)


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("method", ["sparsegpt", "pruner-zero"])
def test_other_methods(
    method: str, pause: Literal["block", "linear"], tmp_path: Path, images: DataSpec, cache: Any
) -> None:
    """One with the products of inputs, one with gradients of unlabelled images."""
    modality, batches = prepared("convnext", tmp_path, images)
    rates = rates_of(modality)
    with kept(modality):
        outcome = sweep(modality, rates, method=method, pause_at=pause, keep=True, **batches)
        check_zeros(modality, outcome, rates)
        with torch.no_grad():
            plain = [x for batch in batches["evaluation"] for x in modality.losses(batch)]
    assert outcome.losses == plain
    assert not outcome.fallbacks
