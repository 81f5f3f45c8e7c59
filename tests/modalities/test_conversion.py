"""What is wrong with a checkpoint is said on one line; GGUF and a model's own code are converted.

python -m pytest tests/modalities/test_conversion.py
"""

import json
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from infra.errors import UserError
from infra.specs import DataSpec, ModelSpec
from modalities.language import LanguageModality
from tests.models import BOS, CONTEXT, VOCAB, build, load, tokenizer

Copy = Callable[[], Path]


def refused(source: Path, **options: Any) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(UserError) as error:
        LanguageModality.load(
            ModelSpec(source=str(source), dtype="float32", **options), torch.device("cpu")
        )
    message = str(error.value)
    assert "\n" not in message
    return message


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_truncated_weights(copy: Copy) -> None:
    folder = copy()
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(folder) == (
        f"{weights} is truncated: {size - 100} bytes, its header promises {size}: fetch it again"
    )


def test_a_missing_shard(copy: Copy) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    build("llama").save_pretrained(folder, max_shard_size="40KB")
    assert load(folder).record("").architecture == "LlamaForCausalLM"
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refused(folder) == f"weights are missing: {shard}"


def test_no_weights(copy: Copy) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert refused(folder) == f"{folder} has no weights: expected *.safetensors or *.gguf"


def test_pickled_weights_need_consent(copy: Copy) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    torch.save(build("llama").state_dict(), folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"{folder} has pickled weights only (pytorch_model.bin), which can execute code: convert "
        "them to safetensors or set model.allow_pickle=true"
    )
    spec = ModelSpec(source=str(folder), dtype="float32", allow_pickle=True)
    modality = LanguageModality.load(spec, torch.device("cpu"))
    head = modality.model.get_parameter("lm_head.weight")
    assert torch.equal(head, build("llama").lm_head.weight)


def test_weights_of_another_shape(copy: Copy) -> None:
    folder = copy()
    configure(folder, intermediate_size=48)
    assert refused(folder) == (
        f"{folder}: model.layers.0.mlp.down_proj.weight has shape [32, 64], its config.json asks "
        "for [32, 48]: fetch both again"
    )


def test_missing_weights(copy: Copy) -> None:
    folder = copy()
    configure(folder, num_hidden_layers=4)
    assert refused(folder) == (
        f"{folder} lacks 9 weights of its model, model.layers.3.input_layernorm.weight first"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "nosuch"}, "model type `nosuch`"),
        ({"model_type": "t5"}, "Unrecognized configuration class"),
    ],
)
def test_models_that_transformers_does_not_know(copy: Copy, changes: Any, message: str) -> None:
    folder = copy()
    configure(folder, **changes)
    text = refused(folder)
    assert text.startswith(f"cannot load {folder}: ")
    assert message in text


def test_a_model_whose_matrices_are_not_seen(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is called with half of each weight: its products are not those of its matrices."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        halves = [self.up_proj.weight[:32], self.up_proj.weight[32:]]
        up = torch.cat([x @ half.t() for half in halves], -1)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert refused(copy()) == (
        "model.layers.0 (LlamaDecoderLayer): 22% of its matrix weights are in no product that is "
        "known, mlp.up_proj.weight first: this block cannot be pruned"
    )


def test_no_tokenizer(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    (tmp_path / "empty").mkdir()
    text = refused(folder, tokenizer=str(tmp_path / "empty"))
    assert text.startswith(
        f"cannot load the tokenizer of {tmp_path / 'empty'}: set model.tokenizer"
    )
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refused(folder).startswith(f"cannot load the tokenizer of {folder}: set model.tokenizer")
    assert refused(folder, tokenizer=str(tmp_path / "nosuch")) == (
        f"{tmp_path / 'nosuch'}: no such file or folder"
    )


CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}


def test_code_of_a_model_needs_consent_and_then_travels_with_it(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = copy()
    for name, code in CODE.items():
        (folder / name).write_text(code)
    configure(
        folder,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    assert refused(folder) == (
        f"{folder} brings its own code (auto_map in config.json): set "
        "model.trust_remote_code=true to run it"
    )
    spec = ModelSpec(source=str(folder), dtype="float32", trust_remote_code=True)
    modality = LanguageModality.load(spec, torch.device("cpu"))
    assert modality.record("").architecture == "OwnForCausalLM"
    modality.save(tmp_path / "saved")
    assert type(modality.reopen(tmp_path / "saved").model).__name__ == "OwnForCausalLM"


def test_code_beside_a_model_that_transformers_knows_is_not_run(copy: Copy) -> None:
    folder = copy()
    (folder / "modeling_own.py").write_text("raise SystemExit('this ran')\n")
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert load(folder).record("").architecture == "LlamaForCausalLM"


def test_a_cache_that_cannot_be_written(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy()
    cache = folder / "config.json" / "cache"  # below a file
    monkeypatch.setenv("SPARSERAMP_CACHE", str(cache))
    assert refused(folder).startswith(f"cannot keep {folder} in {cache}: Not a directory: make ")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_made(copy: Copy, cache: Path) -> None:
    folder = copy()
    with largest_file(50_000):
        text = refused(folder)
    assert text.startswith(f"cannot keep {folder} in {cache}: ")
    assert [path for path in (cache / "copies").iterdir() if path.is_dir()] == []
    assert load(folder).record("").architecture == "LlamaForCausalLM"


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}
Q8 = gguf.GGMLQuantizationType.Q8_0


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that GGUF keeps them in."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The tiny Llama in 8 bits; returns its weights as they come out of that."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCAB)
    names = {number: token for token, number in tokenizer().get_vocab().items()}
    names[257] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([names.get(i, f"<unused{i}>") for i in range(VOCAB)])
    writer.add_token_types([1 if i < BOS else 3 for i in range(VOCAB)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(BOS)
    expected = {}
    for name, parameter in build("llama").named_parameters():
        weight = parameter.detach().numpy()
        if weight.ndim == 2:
            whole = gguf.quants.dequantize(gguf.quants.quantize(weight, Q8), Q8)
            expected[name] = torch.from_numpy(whole)
        else:
            expected[name] = parameter.detach()
        short = name
        for long, brief in GGUF_NAMES.items():
            short = short.replace(long, brief)
        if "attn_q" in short or "attn_k" in short:
            weight = turned(weight, 4 if "attn_q" in short else 2)
        if weight.ndim == 2:
            writer.add_tensor(short, gguf.quants.quantize(weight, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(short, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_gguf_is_dequantised_to_ordinary_matrices(
    tmp_path: Path, cache: Path, text: DataSpec
) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    modality = load(tmp_path / "tiny.gguf")
    assert modality.model.config.to_dict().get("quantization_config") is None
    for name, parameter in modality.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name]), name
    assert [len(block.matrices) for block in modality.blocks] == [7, 7, 7]
    assert modality.tokenizer("ab").input_ids[-1] == 257
    (batch,) = modality.evaluation_batches(text, "selection", 2, 16)
    modality.save(tmp_path / "saved")
    with torch.no_grad():
        assert modality.reopen(tmp_path / "saved").losses(batch) == modality.losses(batch)


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.02])
def test_a_gguf_that_is_cut_off(tmp_path: Path, cache: Path, kept: float) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(kept * len(whole))])
    text = refused(tmp_path / "cut.gguf")
    assert text.startswith(f"cannot load {tmp_path / 'cut.gguf'}: ")
    assert text.endswith(": fetch it again, it may be cut off")


@pytest.mark.parametrize(
    "content", [b"", b"GGML" + bytes(60), struct.pack("<Q", 2) + b"{}", b"<html>"]
)
def test_what_is_only_named_gguf(tmp_path: Path, cache: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert refused(file) == f"{file} is not a GGUF file: its first four bytes are not GGUF"
