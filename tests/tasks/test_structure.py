"""A model that lost channels and heads: the masked one, the smaller one and the saved one agree.

python -m pytest tests/tasks/test_structure.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.errors import UserError
from infra.records import TrialSpec
from infra.recovery_spec import RecoverySpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec, SpeedSpec
from infra.structure import STRUCTURE, expanded, read_structure
from modalities.smaller import load_smaller
from tasks import trial
from tasks.packed import load_packed, pack
from tasks.speed import measure_speed
from tests.models import write_checkpoint
from tests.timm_models import write_images, write_timm

METHODS = ("magnitude", "wanda", "taylor", "sparsegpt")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    trial._loaded.clear()


def asked(folder: Path, data: DataSpec, **prune: Any) -> TrialSpec:
    given: dict[str, Any] = {"pattern": "structured", "sparsity": 0.3, "beta": 0.03}
    dtype = prune.pop("dtype", "float32")
    modality = prune.pop("modality", "language")
    return TrialSpec(
        number=0,
        stage="final",
        model=ModelSpec(source=str(folder), dtype=dtype, modality=modality),
        data=data,
        calibration=CalibrationSpec(samples=4, length=32),
        prune=PruneSpec(**given | prune),
        split="report",
        windows=6,
        context=0 if modality == "vision" else 24,
        error_curves=True,
        checkpoint=True,
    )


@pytest.mark.parametrize("pause", ["block", "linear"])
@pytest.mark.parametrize(
    "family, method",
    [
        *(("llama-tied", method) for method in METHODS),
        ("opt", "wanda"),
        ("gpt2", "sparsegpt"),
        ("gpt-neox", "wanda"),  # its files have other names than its modules
    ],
)
def test_the_saved_model_is_smaller_and_the_same(
    tmp_path: Path, cache: Path, text: DataSpec, family: str, method: str, pause: Any
) -> None:
    spec = asked(write_checkpoint(family, tmp_path / family), text, method=method, pause=pause)
    result = trial.run_trial(spec)
    model = load_smaller(result.checkpoint)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    params = sum(m.params for m in result.matrices)
    removed = sum(m.zeros for m in result.matrices)
    channel = 3 * 32
    assert abs(removed - 0.3 * params) <= channel
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    whole = sum(p.numel() for n, p in dense.named_parameters() if n.endswith("bias"))
    lost = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    assert lost == removed + whole - biases
    # With zeros in the place of what went, transformers loads it, and gives the same to rounding.
    masked = AutoModelForCausalLM.from_pretrained(expanded(Path(result.checkpoint)))
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-4)
    new = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(new, masked.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    # What is opened again is the model that was measured, but for the order of sums.
    again = ModelSpec(source=result.checkpoint, dtype="float32")
    nothing = {"model": again, "prune": PruneSpec(sparsity=0.0), "checkpoint": False}
    opened = trial.run_trial(spec.model_copy(update=nothing))
    assert opened.losses == pytest.approx(result.losses, rel=1e-5)
    wide = [r.kept for r in read_structure(Path(result.checkpoint)).blocks.values() for r in r]
    assert len({len(kept) for kept in wide}) > 2  # blocks differ in width
    assert result.block_rates == sorted(result.block_rates)


def test_all_methods_remove_as_much(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    folder = write_checkpoint("llama", tmp_path / "llama")
    found = {}
    for method in METHODS:
        for beta in (0.0, 0.05):
            spec = asked(folder, text, method=method, beta=beta)
            result = trial.run_trial(spec.model_copy(update={"checkpoint": False}))
            found[method, beta] = sum(m.zeros for m in result.matrices)
    assert max(found.values()) - min(found.values()) <= 3 * 32


def test_buffers_have_the_precision_that_is_asked_for(
    tmp_path: Path, cache: Path, text: DataSpec
) -> None:
    """Gemma's scale of embeddings is no weight; what is saved would not be what was swept."""
    folder = write_checkpoint("gemma3", tmp_path / "gemma3", dtype=torch.bfloat16)
    first = trial.run_trial(asked(folder, text, dtype="bfloat16"))
    trial._loaded.clear()
    further = {"pattern": "unstructured", "sparsity": 0.5, "beta": 0.0}
    result = trial.run_trial(asked(Path(first.checkpoint), text, **further))
    assert read_structure(Path(result.checkpoint)) == read_structure(Path(first.checkpoint))


def test_bfloat16(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    folder = write_checkpoint("llama", tmp_path / "llama")
    result = trial.run_trial(asked(folder, text, dtype="bfloat16"))
    assert {p.dtype for p in load_smaller(result.checkpoint).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_image_classifiers(tmp_path: Path, cache: Path, family: str) -> None:
    data = write_images(tmp_path / "images")
    spec = asked(write_timm(family, tmp_path / family), data, modality="vision", method="taylor")
    result = trial.run_trial(spec)
    model = load_smaller(result.checkpoint)
    import timm

    masked = timm.create_model(f"local-dir:{expanded(Path(result.checkpoint))}", pretrained=True)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(pixels), masked.eval()(pixels), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())


def test_its_speed_is_measured_without_an_engine(
    tmp_path: Path, cache: Path, text: DataSpec
) -> None:
    result = trial.run_trial(asked(write_checkpoint("llama", tmp_path / "llama"), text))
    model = ModelSpec(source=result.checkpoint, dtype="float32")
    speed = SpeedSpec(prompts=[16], batches=[1], new_tokens=2, runs=3)
    record = measure_speed(model, speed)
    dense, smaller = record.engines
    assert (dense.name, smaller.name) == ("with zeros", "smaller")
    assert smaller.resident_bytes < dense.resident_bytes
    assert abs(smaller.kl) < 1e-5
    assert all(set(case.seconds) == {"with zeros", "smaller"} for case in record.cases)
    stored = (Path(result.checkpoint) / "model.safetensors").stat().st_size
    assert record.stored_bytes == stored


@pytest.mark.parametrize("method", ["dsnot", "alps", "pruner-zero"])
def test_methods_that_choose_single_weights_are_refused(
    tmp_path: Path, cache: Path, text: DataSpec, method: str
) -> None:
    spec = asked(write_checkpoint("llama", tmp_path / "llama"), text, method=method)
    with pytest.raises(UserError, match=f"method={method} removes no whole channels: .* wanda"):
        trial.run_trial(spec)


def test_code_beside_the_weights_is_not_run(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    result = trial.run_trial(asked(write_checkpoint("llama", tmp_path / "llama"), text))
    folder, canary = Path(result.checkpoint), tmp_path / "canary"
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(UserError, match="brings its own code") as error:
        load_smaller(folder)
    assert "\n" not in str(error.value) and not canary.exists()


def test_a_packed_copy_is_loaded_too(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    first = trial.run_trial(asked(write_checkpoint("llama", tmp_path / "llama"), text))
    trial._loaded.clear()
    sparse = {"method": "wanda", "pattern": "unstructured", "sparsity": 0.8, "beta": 0.0}
    result = trial.run_trial(asked(Path(first.checkpoint), text, **sparse))
    pack(Path(result.checkpoint), tmp_path / "packed")
    ours, theirs = load_packed(tmp_path / "packed"), load_smaller(result.checkpoint)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_missing_tensor_is_no_random_one(tmp_path: Path, cache: Path) -> None:
    data = write_images(tmp_path / "images")
    spec = asked(write_timm("vit", tmp_path / "vit"), data, modality="vision", method="wanda")
    folder = Path(trial.run_trial(spec).checkpoint)
    tensors = load_file(folder / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its config.json: head.weight"):
        load_smaller(folder)


def test_a_smaller_model_is_pruned_and_rounded(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    first = trial.run_trial(asked(write_checkpoint("llama", tmp_path / "llama"), text))
    smaller = Path(first.checkpoint)
    left = sum(m.params - m.zeros for m in first.matrices)
    further = {"method": "sparsegpt", "beta": 0.0, "pattern": "unstructured", "sparsity": 0.5}
    for bits in (0.0, 4.5):
        trial._loaded.clear()
        result = trial.run_trial(asked(smaller, text, bits=bits, **further))
        assert read_structure(Path(result.checkpoint)) == read_structure(smaller)
        assert sum(m.params for m in result.matrices) == left
        zeros = sum(m.zeros for m in result.matrices)
        assert zeros == left // 2 if not bits else left // 2 <= zeros < 0.55 * left
    pack(Path(result.checkpoint), tmp_path / "packed")
    ours, theirs = load_packed(tmp_path / "packed"), load_smaller(result.checkpoint)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    few = SpeedSpec(prompts=[16], batches=[1], new_tokens=2, runs=3)
    record = measure_speed(ModelSpec(source=str(tmp_path / "packed"), dtype="float32"), few)
    whole, smaller = record.engines
    assert smaller.resident_bytes < whole.resident_bytes


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "vit"])
def test_a_smaller_model_becomes_smaller_again(
    tmp_path: Path, cache: Path, text: DataSpec, family: str
) -> None:
    images = family == "vit"
    data = write_images(tmp_path / "images") if images else text
    more = {"modality": "vision" if images else "language", "method": "wanda"}
    folder = (write_timm if images else write_checkpoint)(family, tmp_path / family)
    first = trial.run_trial(asked(folder, data, **more))
    trial._loaded.clear()
    second = trial.run_trial(asked(Path(first.checkpoint), data, sparsity=0.2, **more))
    left = sum(m.params - m.zeros for m in first.matrices)
    assert sum(m.params for m in second.matrices) == left
    assert sum(m.zeros for m in second.matrices) == pytest.approx(0.2 * left, abs=3 * 32)
    trial._loaded.clear()
    whole = ModelSpec(
        source=str(expanded(Path(second.checkpoint))), dtype="float32", modality=more["modality"]
    )
    update = {"model": whole, "prune": PruneSpec(sparsity=0.0), "checkpoint": False}
    found = trial.run_trial(asked(folder, data, **more).model_copy(update=update))
    assert found.losses == pytest.approx(second.losses, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_smaller_model_is_fine_tuned(
    tmp_path: Path, cache: Path, text: DataSpec, method: Any
) -> None:
    first = trial.run_trial(asked(write_checkpoint("llama", tmp_path / "llama"), text))
    trial._loaded.clear()
    how = RecoverySpec(
        method=method, steps=10, batch=3, length=24, learning_rate=3e-3, rank=4, seed=0
    )
    spec = asked(Path(first.checkpoint), text, sparsity=0.0, pattern="unstructured", beta=0.0)
    result = trial.run_trial(spec.model_copy(update={"recovery": how, "error_curves": False}))
    assert sum(result.recovered_losses) < sum(result.losses)
    assert read_structure(Path(result.checkpoint)) == read_structure(Path(first.checkpoint))
    old, new = load_smaller(first.checkpoint), load_smaller(result.checkpoint)
    changed = {
        name
        for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert len(changed) == len(first.matrices)


def test_damaged_structures_are_one_line(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    result = trial.run_trial(asked(write_checkpoint("llama", tmp_path / "llama"), text))
    folder = Path(result.checkpoint)
    path = folder / STRUCTURE
    whole = json.loads(path.read_text())
    first = next(iter(whole["blocks"]))

    def refused(change: Any, message: str) -> None:
        facts = json.loads(json.dumps(whole))
        change(facts)
        path.write_text(json.dumps(facts))
        for use in (load_smaller, lambda f: expanded(Path(f))):
            with pytest.raises(UserError, match=message) as error:
                use(folder)
            assert "\n" not in str(error.value)

    refused(lambda f: f.update(version=2), "structure.json cannot be read")
    refused(lambda f: f["blocks"][first][1]["kept"].pop(), "structure.json")
    refused(lambda f: f["blocks"][first][1].update(kept=[5000]), "structure.json")
    refused(lambda f: f["blocks"][first][1]["kept"].reverse(), "structure.json cannot be read")
    refused(lambda f: f["blocks"][first][1]["cuts"][0].update(segments=7), "structure.json")
    refused(lambda f: f["blocks"][first][1].update(count=1 << 20), "structure.json cannot be read")
    for attribute in ("forward", "__class__"):
        changed = {"attributes": {attribute: 1}}
        refused(lambda f, c=changed: f["blocks"][first][0].update(c), "structure.json cannot be")
    for value in (0, 1 << 40):
        changed = {"attributes": {"num_key_value_groups": value}}
        whole["blocks"][first][0] |= changed
        path.write_text(json.dumps(whole))
        with pytest.raises(UserError, match=r"num_key_value_groups cannot become"):
            load_smaller(folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"structure\.json cannot be read"):
        load_smaller(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"has no structure\.json"):
        load_smaller(folder)
