"""What is timed is what was asked for, and every engine answers as the dense model does.

python -m pytest tests/tasks/test_speed.py
"""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from infra.errors import UserError
from infra.specs import Engine as EngineName
from infra.specs import ModelSpec, SpeedSpec
from tasks.engines import ENGINES
from tasks.speed import LEAST, LONG_S, WARM_UPS, measure_speed, timed
from tasks.speed_cases import Case, decode
from tests import vlm
from tests.models import write_checkpoint
from tests.timm_models import write_timm

FEW = SpeedSpec(prompts=[16, 32], new_tokens=4, runs=3, images=[1, 3])


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose head is its embedding, with four of five block weights zero."""
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint("llama-tied", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter[torch.rand_like(parameter) < 0.8] = 0
    model.save_pretrained(folder)
    return folder


def test_every_engine_answers_as_the_dense_one(sparse: Path) -> None:
    record = measure_speed(ModelSpec(source=str(sparse), dtype="float32"), FEW)
    model = AutoModelForCausalLM.from_pretrained(sparse)
    engines = {engine.name: engine for engine in record.engines}
    assert list(engines) == list(ENGINES)
    dense = engines["dense"]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert dense.resident_bytes == held  # the head once
    assert dense.peak_bytes >= dense.resident_bytes
    assert (dense.kl, dense.logit_difference, dense.same_tokens) == (0, 0, 64)
    assert record.sparsity == pytest.approx(0.8, abs=0.02)
    assert record.stored_bytes == (sparse / "model.safetensors").stat().st_size
    for engine in record.engines:
        if not engine.refusal:
            assert engine.same_tokens == 64
            assert abs(engine.kl) < 1e-6
    cases = [(case.kind, case.batch, case.length, case.work) for case in record.cases]
    assert cases == [
        ("prefill", 1, 16, 0),
        ("prefill", 1, 32, 0),
        ("first token", 1, 16, 0),
        ("decode", 1, 16, 4),
        ("decode", 4, 16, 16),
    ]
    ran = {engine.name for engine in record.engines if not engine.refusal}
    for case in record.cases:
        assert set(case.seconds) == ran
        assert all(len(times) == 3 and min(times) > 0 for times in case.seconds.values())


def test_our_engine_holds_fewer_bytes(sparse: Path) -> None:
    if reason := ENGINES["bitmask"].refusal(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    spec = FEW.model_copy(update={"engines": ["bitmask"]})
    dense, bitmask = measure_speed(ModelSpec(source=str(sparse), dtype="float32"), spec).engines
    assert all(not layer.reason for layer in bitmask.layers if "layers." in layer.name)
    saved = sum(layer.dense_bytes - layer.encoded_bytes for layer in bitmask.layers)
    assert bitmask.resident_bytes == dense.resident_bytes - saved
    assert saved > 0


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    model = write_timm("vit", tmp_path / "model")
    record = measure_speed(ModelSpec(source=str(model), modality="vision", dtype="float32"), FEW)
    assert [(case.kind, case.batch, case.work) for case in record.cases] == [
        ("images", 1, 1),
        ("images", 3, 3),
    ]
    assert all(abs(e.kl) < 1e-6 and e.same_tokens is None for e in record.engines if not e.refusal)


@torch.inference_mode()
def test_every_decode_follows_the_prompt_alone(sparse: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sparse)
    lengths: list[int] = []

    def note(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        lengths.append(-1 if cache is None else cache.get_seq_length())

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    for call in itertools.islice(decode(torch.arange(10).view(2, 5), 3).calls(model), 2):
        call()
    assert lengths == [-1, 5, 6, 7, 5, 6, 7]


@pytest.mark.parametrize(
    ("took_s", "limit_s", "turns"),
    [(0.0, 60.0, WARM_UPS + 5), (LONG_S + 0.1, 60.0, 1 + 5), (LONG_S + 0.1, 1.5, 1 + LEAST)],
)
def test_what_takes_long_is_repeated_less_but_in_turn(
    took_s: float, limit_s: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    called: list[str] = []

    def calls(model: Any) -> Iterator[Callable[[], object]]:
        def call() -> None:
            nonlocal now
            now += took_s
            called.append(model.name)

        return itertools.repeat(call)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    models: dict[str, nn.Module] = {name: nn.Identity() for name in "ab"}
    for name, model in models.items():
        model.name = name  # type: ignore[assignment]
    case = Case(kind="prefill", batch=1, calls=calls)
    record, _ = timed(case, models, 5, torch.device("cpu"), limit_s)
    assert "".join(called) == ("abba" * turns)[: 2 * turns]
    assert {len(seconds) for seconds in record.seconds.values()} == {LEAST if limit_s < 60 else 5}


def test_a_model_that_sees_is_timed_with_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    model = vlm.write_checkpoint("llava", tmp_path / "model")
    spec = FEW.model_copy(update={"engines": ["dense"], "batches": [1]})
    asked = ModelSpec(source=str(model), modality="multimodal", dtype="float32")
    *_, seen, decoded = measure_speed(asked, spec).cases
    assert (seen.kind, decoded.kind) == ("first token after an image", "decode")
    assert seen.length > 16  # its patches are among them


def test_threads_are_as_asked_and_as_before(sparse: Path) -> None:
    before = torch.get_num_threads()
    spec = FEW.model_copy(update={"threads": 1, "engines": ["dense"]})
    assert measure_speed(ModelSpec(source=str(sparse)), spec).threads == 1
    assert torch.get_num_threads() == before


def test_every_engine_has_a_name_in_specs() -> None:
    assert get_args(EngineName) == tuple(ENGINES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": ["dens"]}, "unknown engine dens"),
        ({"prompts": [125]}, "the model's context is 128"),
    ],
)
def test_refusals(sparse: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure_speed(ModelSpec(source=str(sparse)), FEW.model_copy(update=change))
