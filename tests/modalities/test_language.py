"""A language model is loaded as transformers would, converted once, and measured in windows.

python -m pytest tests/modalities/test_language.py
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from infra.errors import UserError
from infra.sources import sha256_of
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from modalities import load as load_modality
from tests.models import BOS, FAMILIES, VOCAB, load, tokenizer, write_checkpoint

Copy = Callable[[], Path]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_transformers_loads(
    family: str, dtype: Any, tmp_path: Path, cache: Path
) -> None:
    """Bit for bit, buffers included: embeddings are scaled and positions turned by them."""
    folder = write_checkpoint(family, tmp_path / family, dtype=torch.bfloat16)
    modality = load(folder, dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    expected.requires_grad_(False)  # torch picks other kernels where a weight wants a gradient
    if hasattr(expected, "set_experts_implementation"):
        expected.set_experts_implementation("eager")
    ids = torch.arange(2 * 40).reshape(2, 40)
    with torch.no_grad():
        logits = modality.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits, expected(input_ids=ids, use_cache=False).logits)
    assert not modality.model.training
    assert not any(p.requires_grad for p in modality.model.parameters())
    record = modality.record(str(folder))
    assert record.dtype == dtype
    assert record.architecture == type(expected).__name__
    assert record.total_params == sum(p.numel() for p in expected.parameters())
    assert record.adds_bos
    assert len(record.sha256) == 64
    assert sum(record.block_params()) == sum(m.params for m in record.matrices)


def test_tied_embeddings_are_one_tensor_on_file_and_in_memory(tmp_path: Path, cache: Path) -> None:
    tied = load(write_checkpoint("llama-tied", tmp_path / "tied"))
    embedding, head = tied.model.get_input_embeddings().weight, tied.model.lm_head.weight
    assert embedding.data_ptr() == head.data_ptr()
    assert "lm_head.weight" not in tied.weights.names
    own = load(write_checkpoint("llama", tmp_path / "own"))
    embedding, head = own.model.get_input_embeddings().weight, own.model.lm_head.weight
    assert embedding.data_ptr() != head.data_ptr()
    assert "lm_head.weight" in own.weights.names


def test_conversion_happens_once_per_checkpoint_and_dtype(copy: Copy, cache: Path) -> None:
    folder = copy()
    first = load(folder).weights.path
    written = first.stat().st_mtime_ns
    assert load(folder).weights.path == first
    assert first.stat().st_mtime_ns == written
    assert load(folder, "bfloat16").weights.path != first
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained(folder)  # the same names and sizes
    changed = load(folder)
    assert changed.weights.path != first
    assert torch.equal(changed.model.lm_head.weight, other.lm_head.weight)
    left = {path.name for path in (cache / "copies").iterdir() if path.is_dir()}
    assert len(left) == 3
    assert not any("." in name for name in left)  # nothing half made


def test_a_conversion_that_was_killed_is_made_again(copy: Copy, cache: Path) -> None:
    folder = copy()
    path = load(folder).weights.path
    (path.parent / "source.json").unlink()  # written last
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    half = path.parent.with_suffix(".12345")
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    assert load(folder).weights.path == path


def test_windows_become_batches(copy: Copy, text: DataSpec) -> None:
    modality = load(copy())
    batches = modality.evaluation_batches(text, "selection", 3, 16)
    assert [batch.ids.shape for batch in batches] == [(3, 16)]
    assert [modality.scored_tokens(batch) for batch in batches] == [[15, 15, 15]]
    assert all(batch.ids[:, 0].eq(BOS).all() for batch in batches)
    assert [batch.tokens for batch in batches] == [48]
    # `divisor` makes smaller batches of the same windows: 2048 tokens at once, over 80
    smaller = modality.evaluation_batches(text, "selection", 3, 16, divisor=80)
    assert [batch.ids.shape for batch in smaller] == [(1, 16)] * 3
    assert torch.equal(torch.cat([b.ids for b in smaller]), batches[0].ids)
    assert tuple(n for b in smaller for n in b.bytes) == batches[0].bytes


def test_calibration_begins_with_bos_and_follows_the_seed(copy: Copy, text: DataSpec) -> None:
    modality = load(copy())

    def ids(seed: int, samples: int = 4) -> torch.Tensor:
        spec = CalibrationSpec(samples=samples, length=16, seed=seed)
        return torch.cat([batch.ids for batch in modality.calibration_batches(text, spec)])

    assert torch.equal(ids(0), ids(0))
    assert not torch.equal(ids(0), ids(1))
    assert torch.equal(ids(0)[:2], ids(0, samples=2))
    assert ids(0)[:, 0].tolist() == [BOS] * 4
    selection = modality.evaluation_batches(text, "selection", 4, 16)[0].ids
    assert not torch.equal(ids(0), selection)


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path, cache: Path, text: DataSpec) -> None:
    modality = load(write_checkpoint("llama", tmp_path / "plain", bos=False))
    (batch,) = modality.evaluation_batches(text, "report", 2, 16)
    assert not (batch.ids == BOS).any()
    assert modality.facts()["adds_bos"] is False


def test_losses_are_the_mean_over_scored_tokens(copy: Copy, text: DataSpec) -> None:
    modality = load(copy())
    (batch,) = modality.evaluation_batches(text, "selection", 3, 24)
    with torch.no_grad():
        logits = modality.model(input_ids=batch.ids, use_cache=False).logits.double()
        losses = modality.losses(batch)
    for loss, row, ids in zip(losses, logits, batch.ids, strict=True):
        picked = [row[i].log_softmax(-1)[ids[i + 1]] for i in range(23)]
        assert loss == pytest.approx(-float(torch.stack(picked).mean()), rel=1e-6)
    assert all(abs(loss - math.log(VOCAB)) < 1 for loss in losses)  # random weights know nothing


def test_licence_and_context_are_recorded(copy: Copy) -> None:
    folder = copy()
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    facts = load(folder).facts()
    assert (facts["context"], facts["adds_bos"], facts["licence"]) == (128, True, "apache-2.0")
    assert (facts["width"], facts["outputs"]) == tuple(load(folder).model.lm_head.weight.shape)[
        ::-1
    ]


def test_a_context_shorter_than_the_probe_loads(tmp_path: Path, cache: Path) -> None:
    """OPT looks its positions up: one too many is an index out of range."""
    from transformers import AutoConfig

    kind, options = FAMILIES["opt"]
    config = AutoConfig.for_model(kind, **options | {"max_position_embeddings": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "short")
    tokenizer().save_pretrained(tmp_path / "short")
    modality = load(tmp_path / "short")
    assert modality.facts()["context"] == 16


def test_a_window_longer_than_the_context_is_refused(copy: Copy, text: DataSpec) -> None:
    modality = load(copy())
    with pytest.raises(UserError) as refused:
        modality.evaluation_batches(text, "selection", 2, 129)
    assert str(refused.value) == (
        "data.selection: windows of 129 tokens, the model's context is 128"
    )
    assert modality.calibration_batches(text, CalibrationSpec(samples=1, length=128))


def test_a_tokenizer_that_does_not_match_is_refused(
    copy: Copy, tmp_path: Path, text: DataSpec
) -> None:
    other = tokenizer()
    other.add_tokens(["model"] + [f"<{i}>" for i in range(5)])
    other.save_pretrained(tmp_path / "tokenizer")
    source = ModelSpec(source=str(copy()), tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
    config = json.loads((Path(source.source) / "config.json").read_text())
    assert config["vocab_size"] == VOCAB
    modality = load_modality(source, torch.device("cpu"))
    modality.tokenizer.add_tokens(["weight", "layer", "pruned", "and", "of"])
    with pytest.raises(UserError, match=r"^the tokenizer does not match the model: it made token"):
        modality.evaluation_batches(text, "selection", 2, 64)


def test_another_tokenizer_may_be_named(copy: Copy, tmp_path: Path, text: DataSpec) -> None:
    tokenizer(bos=False).save_pretrained(tmp_path / "tokenizer")
    folder = copy()
    own = ModelSpec(source=str(folder), dtype="float32")
    named = ModelSpec(source=str(folder), tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
    cpu = torch.device("cpu")
    assert load_modality(own, cpu).facts()["adds_bos"]
    assert not load_modality(named, cpu).facts()["adds_bos"]


def test_pruning_in_memory_leaves_the_file_and_the_next_load_alone(copy: Copy) -> None:
    folder = copy()
    modality = load(folder)
    before = sha256_of(modality.weights.path)
    dense = modality.model.get_parameter("model.layers.0.mlp.up_proj.weight").clone()
    for block in modality.blocks:
        for matrix in block.matrices:
            matrix.weight().zero_()
    assert sha256_of(modality.weights.path) == before
    again = load(folder)
    assert torch.equal(again.model.get_parameter("model.layers.0.mlp.up_proj.weight"), dense)
    modality.release_block(0)
    assert torch.equal(modality.model.get_parameter("model.layers.0.mlp.up_proj.weight"), dense)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss", "jamba"])
def test_saved_and_reopened_it_is_the_same_model(
    family: str, tmp_path: Path, cache: Path, text: DataSpec
) -> None:
    modality = load(write_checkpoint(family, tmp_path / family))
    for block in modality.blocks:
        block.matrices[0].weight()[0].zero_()
    modality.save(tmp_path / "saved")
    saved = modality.reopen(tmp_path / "saved")
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(saved.model.get_parameter(name), parameter), name
    (batch,) = modality.evaluation_batches(text, "selection", 2, 16)
    with torch.no_grad():
        assert saved.losses(batch) == modality.losses(batch)
