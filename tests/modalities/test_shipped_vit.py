"""The trained vision transformer that ships: what it is made of, and that it sees."""

import json
from pathlib import Path

import pytest
import timm
import torch

from infra.errors import UserError
from infra.spec_files import load_spec
from modalities.vision import VisionModality

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "data" / "vit_cifar10"
STATED = r"\*\*([0-9.]+)% top-1 on the 10,000 test images"


def test_is_small_and_rebuilt_by_timm_alone() -> None:
    from safetensors.torch import load_file

    config = json.loads((FOLDER / "config.json").read_text())
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    assert len(model.blocks) == 12
    assert len(config["label_names"]) == config["num_classes"] == 10


@pytest.mark.slow
def test_is_as_accurate_as_its_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 2,000 of the test images: within three standard errors."""
    import re

    monkeypatch.chdir(ROOT)
    spec = load_spec("flows/specs/vision_cifar10.toml", ["model.dtype=float32"])
    modality = VisionModality.load(spec.model, torch.device("cpu"))
    assert modality.record("").block_params() == [12 * modality.facts()["width"] ** 2] * 12
    try:
        batches = modality.evaluation_batches(spec.data, "report", 2000, 0)
    except UserError as error:
        pytest.skip(f"the images cannot be fetched: {error}")
    with torch.no_grad():
        measured = [modality.measure(batch) for batch in batches]
    found = sum(sum(each.scores["top1"]) for each in measured) / 2000
    (stated,) = re.findall(STATED, (FOLDER / "README.md").read_text())
    assert found == pytest.approx(float(stated) / 100, abs=3 * (0.25 / 2000) ** 0.5)
