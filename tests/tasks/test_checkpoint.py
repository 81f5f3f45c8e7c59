"""A sparse checkpoint is an ordinary one: reopened by transformers, it is the pruned model.

python -m pytest tests/tasks/test_checkpoint.py
"""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.errors import UserError
from infra.records import TrialSpec
from infra.sources import sha256_of
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from modalities.language import LanguageModality
from tasks import trial
from tests.models import load, write_checkpoint

Made = Callable[..., TrialSpec]


@pytest.fixture
def make(tmp_path: Path, cache: Path, text: DataSpec) -> Iterator[Made]:
    """The final trial of a family, its checkpoint asked for."""

    def spec(family: str, **prune: Any) -> TrialSpec:
        folder = tmp_path / family
        if not folder.exists():
            write_checkpoint(family, folder)
        return TrialSpec(
            number=0,
            stage="final",
            model=ModelSpec(source=str(folder), dtype="float32"),
            data=text,
            calibration=CalibrationSpec(samples=4, length=16, seed=3),
            prune=PruneSpec(**{"sparsity": 0.6, "beta": 0.1} | prune),
            split="report",
            windows=3,
            context=16,
            checkpoint=True,
        )

    yield spec
    trial._loaded.clear()


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "gpt-oss", "jamba"])
@pytest.mark.parametrize("pause", ["linear", "block"])
def test_transformers_reopens_the_pruned_model(make: Made, family: str, pause: str) -> None:
    spec = make(family, pause=pause)
    result = trial.run_trial(spec)
    folder = Path(result.checkpoint)
    saved = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    modality = trial.loaded(spec.model)
    blocks = [block.name for block in modality.blocks]
    for matrix in result.matrices:
        name, _, expert = matrix.matrix.partition("[")
        weight = saved.get_parameter(f"{blocks[matrix.block]}.{name}")
        weight = weight[int(expert.rstrip("]"))] if expert else weight
        assert int((weight == 0).sum()) == matrix.zeros
    total = sum(matrix.zeros for matrix in result.matrices)
    assert total == round(0.6 * sum(matrix.params for matrix in result.matrices))
    if hasattr(saved, "set_experts_implementation"):
        saved.set_experts_implementation("eager")
    batches = modality.evaluation_batches(spec.data, "report", 3, 16)
    assert tokenizer("abc").input_ids == modality.tokenizer("abc").input_ids
    with torch.no_grad():
        logits = [saved(input_ids=batch.ids, use_cache=False).logits for batch in batches]
    losses = [
        float(torch.nn.functional.cross_entropy(row[:-1], ids[1:]))
        for part, batch in zip(logits, batches, strict=True)
        for row, ids in zip(part, batch.ids, strict=True)
    ]
    assert result.losses == pytest.approx(losses, rel=1e-6)


def test_sparsity_json_tells_how_it_was_made(make: Made) -> None:
    spec = make("llama", pause="block")
    result = trial.run_trial(spec)
    folder = Path(result.checkpoint)
    facts = json.loads((folder / "sparsity.json").read_text())
    assert facts["model"] == spec.model.source
    assert facts["method"] == "wanda"
    assert facts["allocation"] == "arithmetic"
    assert facts["pause"] == "block"
    assert (facts["sparsity"], facts["beta"]) == (0.6, 0.1)
    assert facts["block_rates"] == result.block_rates == pytest.approx([0.5, 0.6, 0.7])
    assert facts["calibration"]["seed"] == 3
    assert facts["matrices"] == [matrix.model_dump() for matrix in result.matrices]
    assert facts["dense_sha256"] == trial.loaded(spec.model).weights.sha256
    files = {file.name for file in folder.iterdir()}
    assert set(facts["sha256"]) == files - {"sparsity.json"}
    assert set(result.checkpoint_sha256) == files
    for name, digest in result.checkpoint_sha256.items():
        assert sha256_of(folder / name) == digest
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


def test_the_model_is_dense_again_for_the_next_trial(make: Made) -> None:
    spec = make("llama")
    modality = trial.loaded(spec.model)
    dense = {name: p.clone() for name, p in modality.model.named_parameters()}
    first = trial.run_trial(spec)
    assert trial.loaded(spec.model) is modality
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(parameter, dense[name]), name
    second = trial.run_trial(spec)
    assert second.losses == first.losses
    weights = [Path(result.checkpoint) / "model.safetensors" for result in (first, second)]
    assert sha256_of(weights[0]) == sha256_of(weights[1])
    assert first.checkpoint != second.checkpoint


def test_a_checkpoint_can_be_pruned_or_measured_again(make: Made) -> None:
    """It loads like any model, with its zeros counted first."""
    spec = make("llama")
    result = trial.run_trial(spec)
    again = load(Path(result.checkpoint))
    batches = again.evaluation_batches(spec.data, "report", 3, 16)
    with torch.no_grad():
        losses = [loss for batch in batches for loss in again.losses(batch)]
    assert losses == result.losses
    more = spec.model_copy(
        update={"model": ModelSpec(source=result.checkpoint, dtype="float32"), "checkpoint": False}
    )
    assert trial.run_trial(more).losses == result.losses  # nothing more to remove


def outbox(cache: Path) -> list[Path]:
    folder = cache / "outbox"
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight was saved with"),
        ("model.norm.weight", "model.norm.weight was saved with other values"),
    ],
)
def test_a_checkpoint_that_is_not_the_pruned_model_is_refused_and_removed(
    make: Made, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """A library that saves something else than what is in memory."""
    before = outbox(cache)

    def save(self: LanguageModality, folder: Path) -> None:
        with torch.no_grad():
            parameter = self.model.get_parameter(name)
            kept = parameter.clone()
            parameter.view(-1)[0] += 1
            self.model.save_pretrained(folder)  # type: ignore[operator]
            parameter.copy_(kept)
        self.tokenizer.save_pretrained(folder)

    monkeypatch.setattr(LanguageModality, "save", save)
    with pytest.raises(RuntimeError, match=message):
        trial.run_trial(make("llama"))
    assert outbox(cache) == before


def test_a_full_disk_is_a_user_error_and_nothing_is_left(make: Made, cache: Path) -> None:
    spec = make("llama")
    trial.loaded(spec.model)
    before = outbox(cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError) as refused:
            trial.run_trial(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(refused.value).startswith(f"cannot write a checkpoint to {cache / 'outbox'}: ")
    assert "\n" not in str(refused.value)
    assert outbox(cache) == before
    assert trial.run_trial(spec).state == "complete"


def test_an_outbox_that_cannot_be_made_is_a_user_error(
    make: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make("llama")
    trial.loaded(spec.model)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "outbox").touch()
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*outbox: Not a directory"):
        trial.run_trial(spec)


def test_checkpoints_that_nobody_fetched_go_after_a_day(make: Made, cache: Path) -> None:
    forgotten, recent = cache / "outbox" / "forgotten", cache / "outbox" / "recent"
    for folder, age_h in ((forgotten, 25), (recent, 23)):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        os.utime(folder, (time.time() - 3600 * age_h,) * 2)
    made = Path(trial.run_trial(make("llama")).checkpoint)
    assert not forgotten.exists()
    assert {recent, made} <= set(outbox(cache))


def test_the_model_is_described_and_measured_with_smaller_batches(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once CUDA was out of memory."""
    spec = make("llama")
    divisors = []
    made = LanguageModality._batches

    def batches(self: LanguageModality, *args: Any, **more: Any) -> Any:
        divisors.append(args[4])
        return made(self, *args, **more)

    monkeypatch.setattr(LanguageModality, "_batches", batches)
    trial.describe_model([spec], batch_divisor=2)
    assert divisors[-1] == 2  # of the batch that is run
    owl = spec.prune.model_copy(update={"allocation": "owl", "beta": 0.0})
    trial.measure_profile(spec.model_copy(update={"prune": owl}), batch_divisor=2)
    assert divisors[-1] == 2
    trial.time_dense(spec, batch_divisor=2)
    assert divisors[-1] == 2


def test_the_dense_loss_is_checked_against_a_plain_loop(make: Made) -> None:
    spec = make("gpt2")
    record = trial.describe_model([spec])
    modality = trial.loaded(spec.model)
    (batch,) = modality.evaluation_batches(spec.data, "report", 3, 16)
    with torch.no_grad():
        plain = modality.losses(batch)
    assert record.dense_loss == pytest.approx(sum(plain) / len(plain))
    assert record.blocks == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert not any(block.module._forward_hooks for block in modality.blocks)
