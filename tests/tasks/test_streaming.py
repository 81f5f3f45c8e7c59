"""On a GPU that holds no more than a part of the model, a sweep and a checkpoint still work.

python -m pytest -m gpu tests/tasks/test_streaming.py
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from infra.records import TrialSpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from tasks import trial
from tests.models import FAMILIES, tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

LAYERS, WIDTH = 12, 1024
MIB = 1 << 20


@pytest.fixture
def spec(tmp_path: Path, cache: Path, text: DataSpec) -> Iterator[TrialSpec]:
    """A model of 12 blocks of 48 MiB each."""
    kind, options = FAMILIES["llama"]
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options | sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    yield TrialSpec(
        number=0,
        stage="final",
        model=ModelSpec(source=str(tmp_path / "model"), dtype="float32"),
        data=text,
        calibration=CalibrationSpec(samples=4, length=32),
        prune=PruneSpec(sparsity=0.5, beta=0.02),
        split="report",
        windows=4,
        context=32,
        error_curves=True,
        checkpoint=True,
    )
    trial._loaded.clear()


def test_a_model_larger_than_the_device(spec: TrialSpec) -> None:
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    trial.loaded(spec.model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(256 * MIB / total)
    try:
        record = trial.describe_model([spec])
        result = trial.run_trial(spec)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 4 * record.total_params > 512 * MIB
    assert torch.cuda.max_memory_allocated() < 256 * MIB
    zeros, params = (sum(getattr(m, key) for m in result.matrices) for key in ("zeros", "params"))
    assert zeros == round(0.5 * params)
    assert [error.block for error in result.errors] == list(range(LAYERS))
    assert result.losses != result.dense_losses
    modality = trial.loaded(spec.model)
    assert all(p.device.type == "cpu" for b in modality.blocks for p in b.module.parameters())
