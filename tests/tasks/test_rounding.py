"""Rounding in the sweep, in checkpoints, in packed files, and as compressed-tensors reads it.

python -m pytest tests/tasks/test_rounding.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.bits import bits_of
from infra.errors import UserError
from infra.packed import WEIGHTS, PackedCheckpoint
from infra.records import TrialResult, TrialSpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from modalities.language import LanguageModality
from tasks import trial
from tasks.allocation import spread
from tasks.checkpoint import GRIDS_FILE
from tasks.export import export
from tasks.packed import load_packed, pack
from tasks.sweep import sweep
from tests.models import write_checkpoint, write_text, write_wide
from tests.tasks.sweeps import kept, plain

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rounding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSERAMP_CACHE", str(folder / "cache"))
        yield folder
    trial._loaded.clear()


@pytest.fixture(scope="module")
def data(places: Path) -> DataSpec:
    return write_text(places / "text.txt")


@pytest.fixture(scope="module")
def wide(places: Path) -> Path:
    return write_wide(places / "wide", torch.bfloat16)


def run(model: Path, data: DataSpec, dtype: Any = "bfloat16", **prune: Any) -> TrialResult:
    return trial.run_trial(
        TrialSpec(
            number=0,
            stage="final",
            model=ModelSpec(source=str(model), dtype=dtype),
            data=data,
            calibration=CalibrationSpec(samples=4, length=16),
            prune=PruneSpec(**prune),
            split="report",
            windows=3,
            context=16,
            checkpoint=True,
        )
    )


def realised(result: Any) -> float:
    total = sum(m.params for m in result.matrices)
    return float(sum(m.bits * m.params for m in result.matrices) / total)


@pytest.mark.parametrize("pause", ["block", "linear"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_line_of_bits_takes_as_many_as_equal_bits(
    wide: Path, data: DataSpec, method: str, pause: Any
) -> None:
    modality = LanguageModality.load(ModelSpec(source=str(wide)), torch.device("cpu"))
    calibration = modality.calibration_batches(data, CalibrationSpec(samples=4, length=20))
    batches = modality.evaluation_batches(data, "selection", 3, 24)
    for rates in ([0.7, 0.7, 0.7], [0.5, 0.7, 0.9]):
        with kept(modality):
            outcome = sweep(
                modality,
                spread(modality.matrices(), rates),
                method=method,
                bits=bits_of(0.7),
                pause_at=pause,
                calibration=calibration,
                evaluation=batches,
                keep=True,
            )
            assert outcome.losses == plain(modality, batches)
            total = sum(m.params for m in outcome.matrices)
            assert abs(realised(outcome) - bits_of(0.7)) * total <= 4 * 256
            for index, block in enumerate(modality.blocks):
                mine = [m for m in outcome.matrices if m.block == index]
                params = sum(m.params for m in mine)
                found = sum(m.bits * m.params for m in mine) / params
                assert found == pytest.approx(bits_of(rates[index]), abs=0.03)
                for matrix in block.matrices:
                    grid, weight = outcome.grids[matrix], matrix.weight()
                    for row in weight:  # no row has more values than its width allows
                        assert len(row[:128].unique()) <= 256
                    low = weight[grid.widths == 2][:, :128]
                    assert all(len(row.unique()) <= 4 for row in low)


@pytest.mark.parametrize(
    "family, dtype, prune",
    [
        ("wide", "bfloat16", {"method": "gptq", "bits": 3.3, "beta": 0.05}),
        ("wide", "float16", {"method": "rtn", "bits": 2.3}),
        ("wide", "float32", {"method": "sparsegpt", "bits": 4, "sparsity": 0.5, "beta": 0.1}),
        ("wide", "bfloat16", {"method": "wanda", "bits": 6, "sparsity": 0.7}),
        ("gpt2", "float32", {"method": "gptq", "bits": 4.5}),  # stored in x out
        ("granite-moe", "float32", {"method": "sparsegpt", "bits": 4.5, "sparsity": 0.6}),
    ],
)
def test_a_packed_checkpoint_is_the_same_model(
    tmp_path: Path, data: DataSpec, family: str, dtype: Any, prune: dict[str, Any]
) -> None:
    if family == "wide":
        model = write_wide(tmp_path / "model", getattr(torch, dtype))
    else:
        model = write_checkpoint(family, tmp_path / "model", dtype=getattr(torch, dtype))
    result = run(model, data, dtype, **prune)
    best = Path(result.checkpoint)
    assert GRIDS_FILE in result.checkpoint_sha256
    sizes = pack(best, tmp_path / "packed")
    ours = load_packed(tmp_path / "packed").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(best, dtype="auto").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    again = load_file(best / "model.safetensors")
    for name, facts, stored in PackedCheckpoint(tmp_path / "packed").tensors():
        raw = again[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(torch.from_numpy(stored.copy()), raw)
        assert facts.packed_bytes <= facts.dense_bytes
    if prune["method"] in ("gptq", "rtn"):  # a row's width is a byte, and no row is shorter than 32
        assert realised(result) < sizes.bits <= realised(result) + 8 / 32 + 0.01


def test_codes_that_are_not_those_of_the_weights(
    tmp_path: Path, wide: Path, data: DataSpec
) -> None:
    best = Path(run(wide, data, method="rtn", bits=4.125).checkpoint)
    pack(best, tmp_path / "packed")
    file = best / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight' is not what .*grids\.safetensors tells"):
        pack(best, tmp_path / "again")
    manifest = tmp_path / "packed" / "packed.json"
    facts = json.loads(manifest.read_text())
    assert facts["version"] == 2  # an earlier version says that it cannot read it
    name = "model.layers.0.mlp.up_proj.weight"
    assert facts["tensors"][name]["codes"]["counts"] == {"4": 256 * 128}
    facts["tensors"][name]["codes"]["counts"] = {"2": 256 * 128, "4": 0}
    manifest.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="is damaged"):
        PackedCheckpoint(tmp_path / "packed")
    assert (tmp_path / "packed" / WEIGHTS).is_file()


def _grids() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """Files that contradict themselves or the weights, 256 x 128 codes of 4 bits."""
    name = "model.layers.0.mlp.up_proj.weight"

    def parts(widths: Any, scales: Any) -> dict[str, torch.Tensor]:
        return {f"{name}.widths": widths, f"{name}.scales": scales}

    widths, scales = torch.full((256,), 4).byte(), torch.ones(256, 1).half()
    good = parts(widths, scales)
    return {
        "no widths": ({f"{name}.scales": scales}, {}),
        "no scales": ({f"{name}.widths": widths}, {}),
        "fewer rows": (parts(widths[:7], scales[:7]), {}),
        "more groups": (parts(widths, torch.ones(256, 2).half()), {}),
        "a row more": (parts(widths, torch.ones(257, 1).half()), {}),
        "another dtype": (parts(widths, scales.bfloat16()), {}),
        "no width": (parts(widths * 0 + 5, scales), {}),
        "too narrow": (parts(widths * 0 + 2, scales), {}),
        "no scale at all": (parts(widths, scales * torch.nan), {}),
        "a number": (good, {"transposed": "5"}),
        "no JSON": (good, {"transposed": "{"}),
        "lists of lists": (good, {"transposed": "[[1]]"}),
    }


@pytest.mark.parametrize("damage", _grids())
def test_damaged_grids_are_one_line(tmp_path: Path, damage: str) -> None:
    folder = write_wide(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    codes = torch.arange(256 * 128).remainder(16).sub(8).reshape(256, 128)
    tensors["model.layers.0.mlp.up_proj.weight"] = codes.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    parts, metadata = _grids()[damage]
    save_file(parts, folder / GRIDS_FILE, metadata)
    with pytest.raises(UserError, match=r"grids\.safetensors") as error:
        pack(folder, tmp_path / "packed")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "prune",
    [
        {"method": "gptq", "bits": 4.125},
        {"method": "wanda", "bits": 8.125, "sparsity": 0.5},
    ],
)
def test_compressed_tensors_reads_the_same_weights(
    tmp_path: Path, data: DataSpec, dtype: Any, prune: dict[str, Any]
) -> None:
    """Loaded as a user does it, by transformers with that library: the logits are the same."""
    pytest.importorskip("compressed_tensors")
    model = write_wide(tmp_path / "model", getattr(torch, dtype))
    best = Path(run(model, data, dtype, **prune).checkpoint)
    sizes = export(best, tmp_path / "exported")
    assert sizes["file_bytes"] < sizes["file_dense_bytes"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert loaded.config.quantization_config.quantization_config.format == "pack-quantized"
    reference = AutoModelForCausalLM.from_pretrained(best, dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)
    stored = load_file(tmp_path / "exported" / "model.safetensors")
    packed = stored["model.layers.0.mlp.up_proj.weight_packed"]
    width = round(prune["bits"])
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (256, 128 * width // 32))


@pytest.mark.parametrize(
    "prune, message",
    [
        ({"method": "gptq", "bits": 4}, "has rows of 3 and 4 bits, engines read matrices of 4 or"),
        ({"method": "rtn", "bits": 3.125}, "has rows of 3 bits, engines read .* prune.bits=4.125"),
        ({"method": "wanda", "sparsity": 0.5}, "has no rounded weights: set prune.bits"),
    ],
)
def test_what_compressed_tensors_cannot_hold(
    tmp_path: Path, wide: Path, data: DataSpec, prune: dict[str, Any], message: str
) -> None:
    best = Path(run(wide, data, **prune).checkpoint)
    with pytest.raises(UserError, match=message):
        export(best, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_rows_that_are_no_whole_groups_are_not_exported(tmp_path: Path, data: DataSpec) -> None:
    model = write_checkpoint("llama", tmp_path / "model")
    best = Path(run(model, data, "float32", method="gptq", bits=4.5).checkpoint)
    with pytest.raises(UserError, match="which groups of 128 do not divide: compressed-tensors"):
        export(best, tmp_path / "exported")


@pytest.mark.parametrize(
    "prune, message",
    [
        ({"method": "gptq"}, "needs prune.bits from 2.25 to 8, not 0"),
        ({"method": "rtn", "bits": 9}, "needs prune.bits from 2.25 to 8, not 9"),
        ({"method": "gptq", "bits": 4, "sparsity": 0.5}, "leave prune.sparsity out or set it to 0"),
        ({"method": "gptq", "bits": 4, "pattern": "2:4"}, "removes nothing: leave prune.pattern"),
        ({"method": "rtn", "pattern": "structured"}, "removes nothing: leave prune.pattern"),
    ],
)
def test_sections_that_contradict_themselves(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneSpec(**prune)


def test_a_section_is_read_back_as_it_was_written() -> None:
    for prune, goal in (
        (PruneSpec(method="gptq", bits=3), "3 bits"),
        (PruneSpec(sparsity=0.5, bits=4.125), "50 % sparsity, 4.125 bits"),
        (PruneSpec(), "60 % sparsity"),
    ):
        assert PruneSpec.model_validate_json(prune.model_dump_json()) == prune
        assert prune.goal == goal
    assert bits_of(PruneSpec(method="gptq", bits=3).sparsity) == pytest.approx(3, abs=1e-12)
