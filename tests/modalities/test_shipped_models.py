"""The trained models that ship: what they are made of, and that they see.

python -m pytest tests/modalities/test_shipped_models.py --slow
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

from infra.errors import UserError
from infra.spec_files import load_spec
from infra.specs import DataSpec
from modalities.base import LoadedModality
from modalities.multimodal import MultimodalModality
from modalities.vision import VisionModality
from modalities.vision_language import processor_of

ROOT = Path(__file__).resolve().parents[2]
VIT = ROOT / "tests" / "data" / "vit_cifar10"
LLAVA = ROOT / "tests" / "data" / "llava_cifar10"


def score_of(modality: LoadedModality, data: DataSpec, name: str, count: int) -> float:
    """On the first images of the report split, in per cent."""
    try:
        batches = modality.evaluation_batches(data, "report", count, 0)
    except UserError as error:
        pytest.skip(f"the images cannot be fetched: {error}")
    with torch.no_grad():
        measured = [modality.measure(batch) for batch in batches]
    return 100 * sum(sum(each.scores[name]) for each in measured) / count


def stated(folder: Path, pattern: str) -> float:
    (found,) = re.findall(pattern, (folder / "README.md").read_text())
    return float(found)


def test_the_vit_is_small_and_rebuilt_by_timm_alone() -> None:
    from safetensors.torch import load_file

    config = json.loads((VIT / "config.json").read_text())
    assert (VIT / "model.safetensors").stat().st_size <= 12e6
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    model.load_state_dict(load_file(VIT / "model.safetensors"))
    assert len(model.blocks) == 12
    assert len(config["label_names"]) == config["num_classes"] == 10


@pytest.mark.slow
def test_the_vit_is_as_accurate_as_its_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 2,000 of the test images: within three standard errors."""
    monkeypatch.chdir(ROOT)
    spec = load_spec("flows/specs/vision_cifar10.toml", ["model.dtype=float32"])
    modality = VisionModality.load(spec.model, torch.device("cpu"))
    assert modality.record("").block_params() == [12 * modality.facts()["width"] ** 2] * 12
    found = score_of(modality, spec.data, "top1", 2000)
    card = stated(VIT, r"\*\*([0-9.]+)% top-1 on the 10,000 test images")
    assert card >= 72
    assert found == pytest.approx(card, abs=3 * 100 * (0.25 / 2000) ** 0.5)


def test_the_llava_is_small_and_one_of_transformers() -> None:
    config = AutoConfig.from_pretrained(LLAVA)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    assert len(model.model.vision_tower.encoder.layers) == 12
    (file,) = LLAVA.glob("*.safetensors")
    assert file.stat().st_size <= 12e6
    with safe_open(file, "pt") as weights:
        held = set(weights.keys())
    parts = json.loads((LLAVA / "parts.json").read_text())
    absent = {name for name in model.state_dict() if name not in held}
    assert absent and all(n.startswith((*parts, "lm_head.")) for n in absent)
    assert isinstance(processor_of(LLAVA), LlavaProcessor)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_llava_answers_as_its_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 200 of its 1,000 questions: within three standard errors."""
    monkeypatch.chdir(ROOT)
    spec = load_spec("flows/specs/multimodal_cifar10.toml", ["model.towers=[]"])
    try:
        modality = MultimodalModality.load(spec.model, torch.device("cpu"))
    except UserError as error:
        pytest.skip(f"the language model cannot be fetched: {error}")
    towers = [block.tower for block in modality.blocks]
    assert towers == ["vision"] * 12 + ["language"] * 30
    card = stated(LLAVA, r"answers ([0-9.]+)% of 1,000 questions")
    assert card >= 50
    found = score_of(modality, spec.data, "accuracy", 200)
    assert found == pytest.approx(card, abs=3 * 100 * (0.25 / 200) ** 0.5)
