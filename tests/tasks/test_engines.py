"""The CPU engines: against float64, under sanitizers, and in models of transformers and timm.

    python -m pytest tests/tasks/test_engines.py

Every kernel that the processor has instructions for is tried.
"""

import copy
import subprocess
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from infra.errors import UserError
from tasks.engines import ENGINES, EncodedLinear, bitmask, build, convert
from tests.models import write_checkpoint

CPU = torch.device("cpu")
REFUSED = ENGINES["bitmask"].refusal(CPU, torch.float32)
NUM_ISAS = 0 if REFUSED else bitmask._isa() + 1
pytestmark = pytest.mark.skipif(bool(REFUSED), reason=REFUSED)


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    return weight * (torch.rand(rows, columns, generator=draw) >= sparsity)


def allowed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """How far sums in fp32, rounded to the type, may be from the exact ones."""
    sizes = F.linear(x.double().abs(), weight.double().abs(), None)
    sizes = sizes if bias is None else sizes + bias.double().abs()
    return sizes * (1e-5 if x.dtype == torch.float32 else 2**-7) + 1e-30


@contextmanager
def forced(isa: int, decode_tokens: int, skips_from: float) -> Iterator[None]:
    """One set of kernels, one way to multiply."""
    with (
        mock.patch.object(bitmask, "_isa", lambda: isa),
        mock.patch.object(bitmask, "DECODE_TOKENS", decode_tokens),
        mock.patch.object(bitmask, "_skips_from", lambda *_: skips_from),
    ):
        yield


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_layer_is_the_dense_one_in_float64(data: st.DataObject) -> None:
    rows, columns, tokens = (data.draw(st.integers(1, most)) for most in (300, 300, 300))
    dtype = data.draw(st.sampled_from(ENGINES["bitmask"].dtypes))
    weight = sparse(rows, columns, data.draw(st.sampled_from([0, 0.3, 0.5, 0.7, 0.95, 1])), dtype)
    weight[:: data.draw(st.integers(1, 5))] *= data.draw(st.booleans())  # rows without nonzeros
    bias = torch.randn(rows).to(dtype) if data.draw(st.booleans()) else None
    x = torch.randn(tokens, 2 * columns).to(dtype)
    x = data.draw(st.sampled_from([x[:, :columns], x[:, ::2], x.T[:columns].T, x.T[::2].T]))
    # Few tokens spread, zeros skipped, or a dense kernel on the expanded weight.
    way = data.draw(st.sampled_from([(1000, 0.0), (0, 0.0), (0, 2.0)]))
    layer = ENGINES["bitmask"].encode(weight, bias)
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    try:
        with forced(data.draw(st.integers(0, NUM_ISAS - 1)), *way):
            out, whole = layer(x), layer.weight
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, weight)
    assert out.dtype == dtype
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ((out.double() - exact).abs() <= allowed(x, weight, bias)).all()


@pytest.mark.parametrize("isa", range(NUM_ISAS))
@pytest.mark.parametrize("dtype", ENGINES["bitmask"].dtypes)
def test_what_is_no_number_stays_none(isa: int, dtype: torch.dtype) -> None:
    weight = sparse(50, 130, 0.7, dtype)
    weight[3, 5], weight[7, 100] = float("nan"), float("inf")
    layer = ENGINES["bitmask"].encode(weight, None)
    for tokens in (1, 3, 20, 70):
        x = torch.randn(tokens, 130).abs().to(dtype)
        x[0, 64] = float("inf")
        dense, touched = F.linear(x, weight), weight[:, 64] != 0
        with forced(isa, 8, 0.0):
            out = layer(x)
        assert not out[0, touched].isfinite().any()
        assert out[:, 3].isnan().all()
        assert torch.equal(out[1:].isfinite(), dense[1:].isfinite())


def test_threads_do_not_disturb_each_other() -> None:
    weight = sparse(1000, 700, 0.6, torch.float32)
    layer = ENGINES["bitmask"].encode(weight, None)
    inputs = [torch.randn(1 + i % 40, 700) for i in range(40)]
    with ThreadPoolExecutor(2) as pool:
        for x, out in zip(inputs, pool.map(layer, inputs), strict=True):
            assert torch.allclose(out, F.linear(x, weight), atol=1e-3)


def test_bytes_and_state() -> None:
    weight = sparse(512, 1024, 0.7, torch.bfloat16)
    layer = ENGINES["bitmask"].encode(weight, torch.zeros(512, dtype=torch.bfloat16))
    share = int(weight.count_nonzero()) / weight.numel()
    assert layer.encoded_bytes < weight.nbytes * (share + 1 / 16) + 2048
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, weight)
    assert layer(torch.zeros(0, 1024, dtype=torch.bfloat16)).shape == (0, 512)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 1024), TypeError, r"float32 on cpu for a weight of torch\.bfloat16"),
        (torch.zeros(1, 1024, dtype=torch.bfloat16, device="meta"), TypeError, "inputs .* on meta"),
        (torch.zeros(2, 2048, dtype=torch.bfloat16), ValueError, r"\(2, 2048\) for 1024 columns"),
        (torch.zeros((), dtype=torch.bfloat16), ValueError, r"\(\) for 1024 columns"),
    ],
)
def test_kernels_are_given_what_they_take(x: Tensor, error: type[Exception], message: str) -> None:
    layer = ENGINES["bitmask"].encode(torch.zeros(16, 1024, dtype=torch.bfloat16), None)
    with pytest.raises(error, match=message):
        layer(x)


def test_a_bias_of_another_type_is_refused() -> None:
    layer = ENGINES["bitmask"].encode(torch.eye(8), torch.ones(8)).bfloat16()  # not the stream
    with pytest.raises(TypeError, match=r"a bias of torch\.bfloat16"):
        layer(torch.zeros(1, 8))
    layer = ENGINES["bitmask"].encode(torch.eye(8), torch.ones(1).expand(8))
    assert torch.equal(layer(torch.eye(8)), torch.eye(8) + 1)


def test_a_bias_does_not_keep_the_file_it_was_mapped_from() -> None:
    bias = torch.ones(1000)[:8]
    layer = ENGINES["bitmask"].encode(torch.eye(8), bias)
    assert layer.bias is not None
    assert layer.bias.untyped_storage().nbytes() == bias.nbytes


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).requires_grad_(False)
    for linear in model:
        linear.weight *= torch.eye(8)
    dense = [weakref.ref(linear) for linear in model]
    alive = []
    encode = bitmask.Bitmask.encode

    def note(*given: Any) -> EncodedLinear:
        alive.append(sum(each() is not None for each in dense))
        return encode(*given)

    monkeypatch.setattr(bitmask.Bitmask, "encode", note)
    del linear
    convert(model, "bitmask")
    assert alive == [5, 4, 3, 2, 1]


def test_what_torch_cannot_hold_is_copied_and_saved_by_its_dense_weight() -> None:
    weight = sparse(48, 80, 0.7, torch.float32)
    layer = ENGINES["onednn"].encode(weight, torch.ones(48))
    other = ENGINES["onednn"].encode(torch.zeros(48, 80), torch.zeros(48))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 80)
    for each in (other, copy.deepcopy(layer)):
        assert torch.equal(each.weight, weight)
        assert torch.equal(each(x), layer(x))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files")
@torch.no_grad()
def test_a_converted_model_lets_go_of_its_file(tmp_path: Path) -> None:
    write_checkpoint("llama-tied", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prune(model, 0.9)
    tokens = torch.arange(8)[None]
    wanted = model(tokens).logits
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    convert(model, "bitmask")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(model(tokens).logits, wanted, atol=1e-5)


def prune(model: nn.Module, sparsity: float) -> None:
    """Random zeros in every linear layer but the last."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for seed, linear in enumerate(linears[:-1]):
            linear.weight *= sparse(*linear.weight.shape, sparsity, torch.float32, seed) != 0


@pytest.mark.parametrize("engine", ["bitmask", "onednn"])
def test_a_llama_generates_the_same_tokens(engine: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1)).eval()
    prune(model, 0.7)
    encoded = copy.deepcopy(model)
    records = convert(encoded, engine)
    assert [record.engine for record in records] == [engine] * 14 + ["dense"]
    assert records[-1].reason == "a head"
    prompt = torch.randint(0, 260, (1, 17))
    wanted, made = (
        each.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)
        for each in (model, encoded)
    )
    assert wanted.shape == (1, 81)
    assert torch.equal(made, wanted)


def test_dense_layers_and_tied_weights_stay() -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # Conv1D holds the transpose
        model.transformer.h[0].mlp.c_fc.weight *= torch.rand(64, 256) > 0.7
    ids = torch.randint(0, 100, (1, 9))
    wanted = model(ids).logits
    records = {record.name: record for record in convert(model, "bitmask", use="prefill")}
    encoded = [name for name, record in records.items() if record.engine == "bitmask"]
    assert encoded == ["transformer.h.0.mlp.c_fc"]
    assert records[encoded[0]].shape == (256, 64)
    assert records[encoded[0]].encoded_bytes < records[encoded[0]].dense_bytes / 2
    assert "zeros, from which" in records["transformer.h.1.mlp.c_fc"].reason
    assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_a_vit_of_timm() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    prune(model, 0.7)
    images = torch.randn(2, 3, 32, 32)
    wanted = model(images)
    records = convert(model, "bitmask", use="prefill")
    assert sum(record.engine == "bitmask" for record in records) == 8
    assert torch.allclose(model(images), wanted, atol=1e-4)


def test_without_a_compiler_all_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(bitmask, "_kernels", build.native_library.__wrapped__)
    reason = ENGINES["bitmask"].refusal(CPU, torch.float32)
    assert reason == "no C++ compiler on the PATH (no-such-compiler)"
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tried = mock.Mock(side_effect=build.native_library.__wrapped__)
    monkeypatch.setattr(bitmask, "_kernels", tried)
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        convert(model, "bitmask")
    assert tried.call_count == 1  # a build that fails takes seconds
    assert type(model[0]) is nn.Linear


def test_refusals() -> None:
    engine = ENGINES["bitmask"]
    assert "not on cuda" in engine.refusal(torch.device("cuda"), torch.float32)
    assert "float16" in engine.refusal(CPU, torch.float16)
    with pytest.raises(UserError, match="choose one of dense, onednn, bitmask"):
        convert(nn.Linear(2, 2), "none")
    assert isinstance(ENGINES["dense"].encode(torch.eye(2), None), EncodedLinear)


def test_the_instruction_set_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(bitmask.ISAS[:NUM_ISAS]):
        monkeypatch.setenv("SPARSERAMP_ISA", name)
        assert bitmask._isa.__wrapped__() == number
    monkeypatch.setenv("SPARSERAMP_ISA", "none")
    with pytest.raises(UserError, match="SPARSERAMP_ISA=none: this processor has portable"):
        bitmask._isa.__wrapped__()


@pytest.mark.slow
def test_the_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    flags = ["-g", "-O1", "-std=c++17", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", "-fopenmp", f"-I{build.SOURCES}"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    if subprocess.run([compiler, *flags, str(empty), "-o", str(tmp_path / "empty")]).returncode:
        pytest.skip(f"{compiler} has no sanitizers or no OpenMP")
    objects = []
    for source in [*build.SOURCES.glob("*.cpp"), Path(__file__).parent / "bitmask_driver.cpp"]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        own = build.FLAGS_OF.get(source.name, [])
        subprocess.run([compiler, *flags, *own, "-c", source, "-o", objects[-1]], check=True)
    driver = tmp_path / "driver"
    subprocess.run([compiler, *flags, *objects, "-o", driver], check=True)
    done = subprocess.run([driver], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"instruction sets tried: {NUM_ISAS}\n"
