"""Rows of questions and answers: what is scored, and what is refused by name.

python -m pytest tests/modalities/test_questions.py
"""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from infra.errors import UserError
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from modalities.multimodal import MultimodalModality, _normalised
from tests.modalities.test_multimodal import WORDS, write_rows
from tests.vlm import write_checkpoint


def opened(family: str, folder: Path) -> Any:
    source = str(write_checkpoint(family, folder / family))
    spec = ModelSpec(source=source, modality="multimodal", dtype="float32")
    return MultimodalModality.load(spec, torch.device("cpu"))


def test_a_letter_is_an_answer_like_others() -> None:
    pairs = {("A", "a."): True, ("A", "."): False, ("the cat", "Cat"): True, ("?", "!"): False}
    assert {pair: _normalised(pair[0]) == _normalised(pair[1]) for pair in pairs} == pairs


def test_what_is_scored_does_not_depend_on_how_many_are_measured(
    cache: Path, tmp_path: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows",
        False,
        question=lambda i: f"{i}?",
        answer=lambda i: WORDS[i % 3],
        choices=lambda i: WORDS if i % 5 else None,
    )
    model = opened("llava", tmp_path)
    for count in (1, 2, 8):
        assert {b.score for b in model.evaluation_batches(rows, "report", count, 16)} == {"exact"}


def test_gradients_need_an_answer_and_something_to_tell_it_from(
    cache: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows", False, question=lambda i: f"{i}?", answer=lambda i: "")
    llava = opened("llava", tmp_path)
    batch = llava.calibration_batches(rows, CalibrationSpec(samples=3))[0]
    with pytest.raises(UserError, match=r"a row has no answer, so no loss: set data\.answer"):
        llava.window_losses(batch)
    clip = opened("clip", tmp_path)
    rows = write_rows(tmp_path / "classes", False, answer=lambda i: WORDS[i % 3])
    batch = clip.calibration_batches(rows, CalibrationSpec(samples=3))[0]
    with pytest.raises(UserError, match="has no loss of single pairs: choose a method and an"):
        clip.window_losses(batch)


def test_an_image_that_the_processor_refuses_is_named(cache: Path, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (900, 2)).save(tmp_path / "long.png")
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "long.png", "answer": "a line"}))
    rows = DataSpec(calibration=str(tmp_path / "r.jsonl"), report="x")
    with pytest.raises(UserError, match=r"r\.jsonl\[0\]: .*Processor refuses it: .*aspect ratio"):
        opened("qwen2-vl", tmp_path).calibration_batches(rows, CalibrationSpec(samples=1))
