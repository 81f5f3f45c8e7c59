"""lm-eval's tasks about images on models of images and text that are in memory.

python -m pytest tests/tasks/test_zero_shot_images.py
"""

from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset, Image
from PIL.Image import Image as Picture

from infra.errors import UserError
from infra.specs import ModelSpec
from modalities import load
from modalities.prompts import noise
from tasks import zero_shot
from tests.tasks.zero_shot_rows import write_data_sets
from tests.vlm import write_checkpoint

TASK = """
task: looks
dataset_path: looks
validation_split: validation
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image> What?"
doc_to_target: answer
generation_kwargs: {until: ["@"], max_gen_toks: 6, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def opened(family: str, folder: Path) -> Any:
    write_checkpoint(family, folder)
    spec = ModelSpec(source=str(folder), modality="multimodal", dtype="float32")
    return load(spec, torch.device("cpu"))


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "looks.yaml").write_text(TASK)
    shown = TASK.replace("task: looks", "task: shown") + "fewshot_split: validation\nnum_fewshot: 1"
    (tmp_path / "task" / "shown.yaml").write_text(shown)
    published = Path(lm_eval.tasks.__file__).parent
    places = [tmp_path / "task", published / "mmmu", published / "piqa"]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=places)
    monkeypatch.setattr(zero_shot, "_manager", lambda: manager)
    zero_shot._load.cache_clear()


def pictures(count: int) -> list[Picture]:
    return [noise().rotate(40 * number) for number in range(count)]


def said(modality: Any, picture: Picture) -> str:
    """What the model says of a picture, by transformers alone."""
    processor = modality.processor
    if processor.chat_template:
        parts = [{"type": "image"}, {"type": "text", "text": " What?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
    else:
        text = f"{processor.image_token} What?"
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    ids = modality.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True)).split("@")[0]


@pytest.mark.usefixtures("own_task")
@pytest.mark.parametrize("family", ["llava", "llava-next", "idefics3", "qwen2-vl", "paligemma"])
def test_a_model_answers_about_images_what_it_says_by_itself(family: str, tmp_path: Path) -> None:
    modality = opened(family, tmp_path / "model")
    some = pictures(4)
    answers = [said(modality, picture) for picture in some]
    wanted = [*answers[:2], "zebra", answers[3]]
    rows = Dataset.from_dict({"image": some, "answer": wanted}).cast_column("image", Image())
    rows.save_to_disk(tmp_path / "data" / "looks" / "none" / "validation")
    asked = {"tasks": ["looks"], "data": str(tmp_path / "data")}
    assert zero_shot.check_tasks(modality, **asked) == ["looks/exact_match"]
    scores = zero_shot.zero_shot(modality, **asked)
    assert scores == {"looks/exact_match": [1.0, 1.0, 0.0, 1.0]}


@pytest.mark.usefixtures("own_task")
def test_rows_that_are_measured_are_no_examples(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"image": pictures(3), "answer": ["a"] * 3})
    rows.save_to_disk(tmp_path / "data" / "looks" / "none" / "validation")
    asked = {"data": str(tmp_path / "data")}
    modality = opened("llava", tmp_path / "model")
    with pytest.raises(UserError, match="shown has no other split to take examples from: leave"):
        zero_shot.check_tasks(modality, ["shown"], **asked)
    assert zero_shot.check_tasks(modality, ["shown@0"], **asked) == ["shown@0/exact_match"]


@pytest.mark.usefixtures("own_task")
def test_published_tasks_of_images_and_of_text_by_name(tmp_path: Path) -> None:
    modality = opened("llava", tmp_path / "model")
    rows = {
        "question": ["<image 1> Which?"] * 3,
        "options": ["['cat', 'dog']"] * 3,
        "answer": ["A", "B", "A"],
        "question_type": ["multiple-choice"] * 3,
        "image_1": pictures(3),
    }
    data = write_data_sets(tmp_path / "data")
    Dataset.from_dict(rows).cast_column("image_1", Image()).save_to_disk(
        data / "MMMU" / "Art" / "validation"
    )
    scores = zero_shot.zero_shot(modality, ["mmmu_val_art", "piqa"], rows=3, data=str(data))
    assert {name: len(values) for name, values in scores.items()} == {
        "mmmu_val_art/acc": 3,
        "piqa/acc": 3,
        "piqa/acc_norm": 3,
    }


@pytest.mark.usefixtures("own_task")
@pytest.mark.parametrize("family", ["clip", "encoder-decoder"])
def test_models_that_continue_no_text_are_given_no_task(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only models that continue a text are given tasks"):
        zero_shot.check_tasks(opened(family, tmp_path / "model"), ["looks"])
