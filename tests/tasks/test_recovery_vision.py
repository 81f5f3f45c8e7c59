"""Image classifiers are fine-tuned on the classes of their calibration images.

python -m pytest tests/tasks/test_recovery_vision.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import UserError
from infra.records import TrialSpec
from infra.recovery_spec import RecoverySpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from tasks import trial
from tasks.recovery import counted, recover
from tests.tasks.sweeps import kept, rates_of, sweep
from tests.timm_models import write_images, write_timm


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    yield
    trial._loaded.clear()


def final(folder: Path, family: str, images: DataSpec, **how: Any) -> TrialSpec:
    return TrialSpec(
        number=0,
        stage="final",
        model=ModelSpec(source=str(write_timm(family, folder)), modality="vision", dtype="float32"),
        data=images,
        calibration=CalibrationSpec(samples=4),
        prune=PruneSpec(sparsity=0.5),
        split="report",
        windows=4,
        context=0,
        recovery=RecoverySpec(**{"steps": 12, "batch": 8, "learning_rate": 3e-3} | how),
    )


@pytest.mark.parametrize(("family", "method"), [("vit", "lora"), ("convnext-conv", "full")])
def test_training_loss_falls_and_every_zero_stays(
    family: str, method: str, tmp_path: Path, images: DataSpec, cache: Path
) -> None:
    spec = final(tmp_path, family, images, method=method)
    assert spec.recovery
    modality = trial.loaded(spec.model)
    windows = modality.training_windows(images, spec.recovery)
    calibration = modality.calibration_batches(images, spec.calibration)
    with kept(modality):
        rates = rates_of(modality)
        sweep(
            modality,
            rates,
            method="wanda",
            pause_at="linear",
            calibration=calibration,
            evaluation=(),
            keep=True,
        )
        matrices = [matrix for block in modality.blocks for matrix in block.matrices]
        masks = [matrix.weight() == 0 for matrix in matrices]
        before = counted(modality)
        with torch.no_grad():
            first = float(modality.training_loss(windows))
        record = recover(modality, spec)
        with torch.no_grad():
            assert float(modality.training_loss(windows)) < first
        assert counted(modality) == before
        for matrix, mask in zip(matrices, masks, strict=True):
            assert torch.equal(matrix.weight() == 0, mask)
    assert record.tokens == 12 * 8  # images


def test_a_trial_measures_scores_again(tmp_path: Path, images: DataSpec, cache: Path) -> None:
    result = trial.run_trial(final(tmp_path, "vit", images))
    assert set(result.recovered_scores) == set(result.scores) == {"top1", "top5"}
    assert len(result.recovered_losses) == 4
    assert "recovered_top1" in result.metrics()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "does not reach blocks.0.attn.qkv"),
        ({"source": "other.txt"}, "is trained on the images of"),
    ],
)
def test_what_cannot_be_trained_is_said(
    how: dict[str, Any], said: str, tmp_path: Path, images: DataSpec, cache: Path
) -> None:
    """BEiT multiplies the weight of its qkv layer by itself."""
    with pytest.raises(UserError, match=said):
        trial.run_trial(final(tmp_path, "beit", images, **how))
