"""A packed checkpoint takes what theory says, and is the same model when it is loaded.

python -m pytest tests/tasks/test_packed.py
"""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.packed
from infra.errors import UserError
from infra.packed import MANIFEST, WEIGHTS
from infra.specs import ModelSpec
from modalities.language import LanguageModality
from tasks.packed import load_packed, pack
from tests.models import write_checkpoint
from tests.timm_models import write_timm

IDS = torch.arange(24).remainder(200)[None]


def prune(folder: Path, rate: float = 0.7) -> Path:
    """Zeros in exactly this share of every matrix that is no embedding or head."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim > 1 and not any(word in name for word in ("embed", "head", "wte")):
                flat = tensor.view(-1)
                flat[torch.randperm(len(flat))[: round(rate * len(flat))]] = 0
        save_file(tensors, file, {"format": "pt"})
    return folder


def same(first: Any, second: Any) -> None:
    """Bit for bit, buffers and dtypes included."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama", torch.float32),
        ("llama", torch.float16),
        ("llama-tied", torch.bfloat16),
        ("mixtral", torch.bfloat16),
        ("gpt2", torch.float32),
    ],
)
def test_one_call_loads_the_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = prune(write_checkpoint(family, tmp_path / "dense", dtype=dtype))
    pack(folder, tmp_path / "packed")
    model = load_packed(str(tmp_path / "packed"))
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(reference)
    assert not model.training
    same(model, reference)
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ("llama-tied", "gpt2"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
        greedy = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        expected = reference.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "packed")("abc").input_ids
    model.save_pretrained(tmp_path / "again")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), reference)


def test_a_model_of_images(tmp_path: Path) -> None:
    folder = prune(write_timm("vit", tmp_path / "dense"))
    pack(folder, tmp_path / "packed")
    model = load_packed(tmp_path / "packed")
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True)
    same(model, reference)
    assert not model.training
    assert model.pretrained_cfg["label_names"] == reference.pretrained_cfg["label_names"]
    assert not model.pretrained_cfg["state_dict"]


def test_shards_become_one_file(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "dense")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="40KB")
    prune(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    sizes = pack(folder, tmp_path / "packed")
    assert sizes.file_dense_bytes == sum(shard.stat().st_size for shard in shards)
    same(load_packed(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(folder))
    assert not list((tmp_path / "packed").glob("model*"))
    lost = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, place in lost.items() if place == shards[0].name)
    tensors = load_file(shards[0])
    del tensors[name]
    save_file(tensors, shards[0])
    with pytest.raises(UserError, match=f"{shards[0].name} lacks '{name}'"):
        pack(folder, tmp_path / "other")
    save_file(tensors | load_file(shards[1]), shards[0])
    with pytest.raises(UserError, match="is in another file as well"):
        pack(folder, tmp_path / "other")


@pytest.mark.parametrize(
    "dtype, sparsity, most",
    [
        (torch.bfloat16, 0.7, 0.37),  # 1/16 + 0.3
        (torch.float32, 0.7, 0.34),
        (torch.bfloat16, 0.5, 0.57),
        (torch.bfloat16, 0.1, 0.97),
    ],
)
def test_sizes(tmp_path: Path, dtype: torch.dtype, sparsity: float, most: float) -> None:
    folder = prune(write_checkpoint("llama", tmp_path / "dense", dtype=dtype), sparsity)
    sizes = pack(folder, tmp_path / "packed")
    item = dtype.itemsize
    assert sizes.num_packed == 21
    assert sizes.ratio == pytest.approx(1 / 8 / item + 1 - sparsity, abs=1e-3)
    assert sizes.ratio <= most
    assert sizes.sparsity == pytest.approx(sparsity, abs=1e-3)
    dense = load_file(folder / "model.safetensors")
    kept = [t for n, t in dense.items() if t.ndim == 1 or "embed" in n or "head" in n]
    assert sizes.num_kept == len(kept)
    assert sizes.kept_bytes == sum(t.nbytes for t in kept)
    assert sizes.kept_bytes + sizes.dense_bytes == sum(t.nbytes for t in dense.values())
    stored = load_file(tmp_path / "packed" / WEIGHTS)
    assert sizes.packed_bytes + sizes.kept_bytes == sum(t.nbytes for t in stored.values())
    assert sizes.file_bytes == (tmp_path / "packed" / WEIGHTS).stat().st_size
    assert sizes.file_bound < sizes.file_ratio  # headers count in tiny models


def test_a_dense_model_is_not_packed(tmp_path: Path) -> None:
    folder = prune(write_checkpoint("llama", tmp_path / "dense", dtype=torch.bfloat16), 0.05)
    with pytest.raises(UserError, match="no matrix with enough zeros to be smaller"):
        pack(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_what_is_not_packed(tmp_path: Path) -> None:
    folder = prune(write_checkpoint("llama", tmp_path / "dense"))
    with pytest.raises(UserError, match="dense exists: remove it, or name another folder"):
        pack(folder, folder)
    pack(folder, tmp_path / "packed")
    with pytest.raises(UserError, match="is packed already"):
        pack(tmp_path / "packed", tmp_path / "twice")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        pack(folder, tmp_path / "twice")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has pickled weights only"):
        pack(folder, tmp_path / "twice")
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="has no weights"):
        pack(folder, tmp_path / "twice")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "packed"]


def test_other_files_go_along_but_for_weights_and_what_is_hidden(tmp_path: Path) -> None:
    folder = prune(write_checkpoint("llama", tmp_path / "dense"))
    for name in ("README.md", "templates/a.jinja", ".secret", ".git/config", "x.bin", "y.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    pack(folder, tmp_path / "packed")
    assert (tmp_path / "packed" / "templates" / "a.jinja").read_text() == "templates/a.jinja"
    names = {f.name for f in (tmp_path / "packed").rglob("*")}
    assert {"README.md", "tokenizer.json", MANIFEST, WEIGHTS} <= names
    assert not names & {".secret", ".git", "x.bin", "y.pt", "model.safetensors"}
    (tmp_path / "packed" / "README.md").write_text("edited before it is published")
    load_packed(tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not what was packed"):
        load_packed(tmp_path / "packed")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    folder = prune(write_checkpoint("llama", tmp_path / "dense"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*packed: File too large"):
            pack(folder, tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in tmp_path.iterdir()] == ["dense"]


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that arrives as another one."""
    folder = prune(write_checkpoint("llama", tmp_path / "dense"))
    write = tasks.packed.write_safetensors

    def wrong(file: Path, header: Any, parts: Any) -> None:
        def changed() -> Any:
            for name, data in parts:
                yield name, data + 1 if name.endswith("up_proj.weight.values") else data

        write(file, header, changed())

    monkeypatch.setattr(tasks.packed, "write_safetensors", wrong)
    with pytest.raises(RuntimeError, match=r"up_proj\.weight was packed with other values"):
        pack(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["pipeline"]}, "names 'pipeline': no model of transformers"),
        ({"architectures": None}, "names 'no architecture': no model of transformers"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}, "cannot load"),
        ({"architecture": "no_such_net"}, "cannot load .*no_such_net"),
        ({"intermediate_size": 48}, "cannot load .*[Ss]ize mismatch|mismatch"),
        ({"num_hidden_layers": 4}, "lacks 9 weights of its model, model.layers.3"),
        ({"vocab_size": 1 << 40}, "cannot load"),
    ],
)
def test_a_configuration_of_another_model(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Nothing that it names is run: not even what comes with the checkpoint."""
    folder = prune(write_checkpoint("llama", tmp_path / "dense"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    (folder / "mine.py").write_text("raise SystemExit('this was run')")
    pack(folder, tmp_path / "packed")
    with pytest.raises(UserError, match=message) as refused:
        load_packed(tmp_path / "packed")
    assert len(str(refused.value).splitlines()) == 1


def test_a_modality_loads_it_as_any_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    folder = prune(write_checkpoint("llama-tied", tmp_path / "dense"))
    pack(folder, tmp_path / "packed")
    load = [
        LanguageModality.load(ModelSpec(source=str(f), dtype="float32"), torch.device("cpu"))
        for f in (folder, tmp_path / "packed")
    ]
    assert load[0].weights.sha256 == load[1].weights.sha256
