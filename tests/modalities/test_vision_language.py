"""Checkpoints of vision-language models, and a trial on one.

python -m pytest tests/modalities/test_vision_language.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import UserError
from infra.records import TrialSpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from modalities.multimodal import MultimodalModality
from tasks import trial
from tests.models import tokenizer, write_checkpoint
from tests.vlm import build
from tests.vlm import write_checkpoint as write_pair

CPU = torch.device("cpu")


def load(folder: Path) -> Any:
    spec = ModelSpec(source=str(folder), modality="multimodal", dtype="float32")
    return MultimodalModality.load(spec, CPU)


def test_a_part_may_be_the_weights_of_another_model(cache: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model, _ = build("llava")
    text = LlamaForCausalLM(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    folder = write_pair("llava", tmp_path / "llava")
    weights = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in weights.items() if "language_model" not in name}
    assert len(own) < len(weights)
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ weights of its model, lm_head.weight first"):
        load(folder)
    parts = {"model.language_model": str(tmp_path / "text")}
    (folder / "parts.json").write_text(json.dumps(parts))
    whole = load(folder).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole[name], tensor)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda folder: write_checkpoint("llama", folder), r"\(llama\) is no model of images"),
        (lambda folder: write_pair("llava", folder).joinpath("model.safetensors").unlink(), "no w"),
    ],
)
def test_what_is_no_such_model_is_refused(
    write: Any, message: str, cache: Path, tmp_path: Path
) -> None:
    write(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model")


def test_a_trial_with_a_line_for_each_tower(cache: Path, tmp_path: Path) -> None:
    """Described, pruned, measured, saved and verified as any other model."""
    import PIL.Image

    lines = []
    for number in range(40):
        PIL.Image.effect_noise((32, 32), 50 + number).save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": "What?", "kind": number % 2}
        lines.append(json.dumps(row | {"choices": ["cat", "dog"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    prune = PruneSpec(
        sparsity=0.5, allocation="towers", parameters={"beta_vision": 0.1, "beta_language": -0.2}
    )
    source = str(write_pair("llava", tmp_path / "llava"))
    spec = TrialSpec(
        number=0,
        stage="final",
        model=ModelSpec(source=source, modality="multimodal", dtype="float32"),
        data=DataSpec(source=str(tmp_path / "rows.jsonl"), choices="choices", label="kind"),
        calibration=CalibrationSpec(samples=4, length=16),
        prune=prune,
        split="report",
        windows=4,
        context=16,
        error_curves=True,
        checkpoint=True,
    )
    try:
        model = trial.describe_model([spec])
        assert {m.tower for m in model.matrices} == {"vision", "language"}
        result = trial.run_trial(spec)
        assert result.block_rates == pytest.approx([0.45, 0.55, 0.6, 0.4])
        assert set(result.scores["accuracy"]) <= {0.0, 1.0}
        assert result.tokens == [1] * 4
        assert result.bytes == [0] * 4  # an answer has a loss, and no perplexity
        assert set(result.expected) <= {"cat", "dog"}
        assert "processor_config.json" in result.checkpoint_sha256
        method = prune.model_copy(update={"method": "pruner-zero"})
        other = spec.model_copy(update={"prune": method, "checkpoint": False})
        assert trial.run_trial(other).dense_losses == result.dense_losses
    finally:
        trial._loaded.clear()
