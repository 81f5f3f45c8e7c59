"""Every family of vision-language models: towers, questions, scores, and the sweep over them.

python -m pytest tests/modalities/test_multimodal.py
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from infra.errors import UserError
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from modalities.multimodal import MultimodalModality, QuestionBatch
from modalities.prompts import Question, Spot, noise
from tasks.sweep import Outcome, sweep
from tests.vlm import FAMILIES, write_checkpoint

CPU = torch.device("cpu")
NEEDS_IMAGES = ("blip-2", "clip", "encoder-decoder")
TOWERS = {
    **dict.fromkeys(FAMILIES, ["vision"] * 2 + ["language"] * 2),
    "qwen2-vl": ["vision"] * 3 + ["language"] * 2,
    "qwen3-vl": ["vision"] * 3 + ["language"] * 2,
    "blip-2": ["vision"] * 2 + ["qformer"] * 2 + ["language"] * 2,
    "clip": ["vision"] * 2 + ["text"] * 2,
}
WORDS = ["cat", "a dog", "airplane"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`load(family, towers)`: a model as a trial loads it."""
    folder = tmp_path_factory.mktemp("models")

    def load(family: str, *towers: str) -> Any:
        if not (folder / family).exists():
            write_checkpoint(family, folder / family)
        spec = ModelSpec(
            source=str(folder / family), modality="multimodal", dtype="float32", towers=towers
        )
        return MultimodalModality.load(spec, CPU)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSERAMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load


def write_rows(folder: Path, texts: bool, **columns: Any) -> DataSpec:
    """Sixty rows, every third without an image where `texts` says so."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(60):
        size = ((40, 32), (24, 24))[number % 2]
        noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
        name = f"{number}.png"
        PIL.Image.fromarray(noise).save(folder / name)
        image = None if texts and number % 3 == 2 else name
        given = {key: value(number) for key, value in columns.items()}
        rows.append(json.dumps({"image": image} | given))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    choices = "choices" if "choices" in columns else ""
    return DataSpec(source=str(folder / "rows.jsonl"), choices=choices)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DataSpec]:
    """Questions with choices; captions for what asks no questions."""
    torch.manual_seed(1)
    answer = {"answer": lambda i: WORDS[i % 3], "choices": lambda i: WORDS}
    asked = {"question": lambda i: f"What is it, no. {i}?", **answer}
    root = tmp_path_factory.mktemp("data")
    made = {
        "all": write_rows(root / "all", True, **asked),
        "images": write_rows(root / "images", False, **asked),
        "captions": write_rows(
            root / "captions", False, answer=lambda i: f"no. {i} " * (i % 3 + 1)
        ),
        "classes": write_rows(root / "classes", False, **answer),
    }

    def of(family: str) -> DataSpec:
        kinds = {"clip": "classes", "encoder-decoder": "captions", "blip-2": "images"}
        return made[kinds.get(family, family if family in made else "all")]

    return of


def batches(modality: Any, data: DataSpec) -> tuple[list[Any], list[Any]]:
    calibration = modality.calibration_batches(data, CalibrationSpec(samples=6, length=16))
    return calibration, modality.evaluation_batches(data, "selection", 6, 16)


def swept(modality: Any, data: DataSpec, pause: Any, rates: list[float], **more: Any) -> Outcome:
    calibration, evaluation = batches(modality, data)
    return sweep(
        modality,
        [rates[m.block] for m in modality.matrices()],
        method="wanda",
        pause_at=pause,
        calibration=calibration,
        evaluation=evaluation,
        **more,
    )


def plain(modality: Any, evaluation: list[Any]) -> list[Any]:
    with torch.no_grad():
        return [modality.measure(batch) for batch in evaluation]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_prunes_both_towers_and_measures_what_a_plain_forward_does(
    family: str, checkpoints: Callable[..., Any], data: Callable[[str], DataSpec]
) -> None:
    modality = checkpoints(family)
    assert [block.tower for block in modality.blocks] == TOWERS[family]
    assert [m.tower for m in modality.matrices()] == [
        TOWERS[family][m.block] for m in modality.matrices()
    ]
    calibration, evaluation = batches(modality, data(family))
    assert sum(b.windows for b in calibration) == sum(b.windows for b in evaluation) == 6
    if family not in NEEDS_IMAGES:  # text alone is among them
        pixels = ["pixel_values" in b.questions[0].inputs for b in [*calibration, *evaluation]]
        assert set(pixels) == {True, False}
    dense = plain(modality, evaluation)
    rates = [0.3 + 0.4 * i / len(modality.blocks) for i in range(len(modality.blocks))]
    for pause in ("block", "linear"):
        outcome = swept(modality, data(family), pause, rates, keep=True, dense=True)
        assert outcome.dense.losses == [loss for m in dense for loss in m.losses]
        after = plain(modality, evaluation)
        assert outcome.measured.losses == [loss for m in after for loss in m.losses]
        assert outcome.measured.losses != outcome.dense.losses
        for name in dense[0].scores:
            assert outcome.measured.scores[name] == [x for m in after for x in m.scores[name]]
        assert outcome.measured.answers == [words for m in after for words in m.answers]
        assert len(outcome.errors) == len(modality.blocks)
        for matrix in outcome.matrices:
            weight = modality.blocks[matrix.block].module.get_parameter(matrix.matrix)
            assert matrix.zeros == int((weight == 0).sum())
        for index in range(len(modality.blocks)):
            modality.release_block(index)
        assert plain(modality, evaluation) == dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_alone(
    family: str, checkpoints: Callable[..., Any], data: Callable[[str], DataSpec]
) -> None:
    tower = "text" if family == "clip" else "language"
    modality = checkpoints(family, tower)
    assert [block.tower for block in modality.blocks] == [tower] * 2
    before = {n: p.detach().clone() for n, p in modality.model.named_parameters()}
    outcome = swept(modality, data(family), "linear", [0.5, 0.6], keep=True)
    after = plain(modality, batches(modality, data(family))[1])
    assert outcome.measured.losses == [loss for m in after for loss in m.losses]
    changed = {n for n, p in modality.model.named_parameters() if not p.equal(before[n])}
    prunable = {f"{b.name}.{m.parameter}" for b in modality.blocks for m in b.matrices}
    assert changed == prunable


@pytest.mark.parametrize("family", FAMILIES)
def test_results_do_not_depend_on_batching_nor_on_what_follows(
    family: str, checkpoints: Callable[..., Any], data: Callable[[str], DataSpec]
) -> None:
    modality = checkpoints(family)
    whole = modality.evaluation_batches(data(family), "report", 6, 16)
    single = modality.evaluation_batches(data(family), "report", 6, 16, divisor=1 << 20)
    assert all(batch.windows == 1 for batch in single)
    one, many = plain(modality, single), plain(modality, whole)
    losses = [loss for m in many for loss in m.losses]
    assert losses == pytest.approx([loss for m in one for loss in m.losses], rel=1e-4)
    assert [a for m in many for a in m.answers] == [a for m in one for a in m.answers]
    parts = [batch.rows(i, i + 1) for batch in whole for i in range(batch.windows)]
    assert losses == pytest.approx([x for m in plain(modality, parts) for x in m.losses], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_opened_again(
    family: str,
    checkpoints: Callable[..., Any],
    data: Callable[[str], DataSpec],
    tmp_path: Path,
) -> None:
    modality = checkpoints(family)
    evaluation = modality.evaluation_batches(data(family), "report", 3, 16)
    modality.save(tmp_path)
    saved = modality.reopen(tmp_path)
    assert plain(saved, evaluation) == plain(modality, evaluation)
    assert [b.tower for b in saved.blocks] == TOWERS[family]
    record = modality.record("x")
    assert (record.modality, record.unit) == (
        "multimodal",
        "image" if family == "clip" else "answer",
    )
    assert record.width in (24, 32)


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2-vl", "blip-2"])
def test_choices_are_compared_as_one_by_one(
    family: str, checkpoints: Callable[..., Any], data: Callable[[str], DataSpec]
) -> None:
    """Rows that are shared by choices, and padded, give what each choice alone would."""
    modality = checkpoints(family)
    (batch, *_) = modality.evaluation_batches(data("images"), "report", 2, 16)
    with torch.no_grad():
        together = modality._likelihoods(batch, [range(3)] * batch.windows)
    question = batch.questions[0]
    for choice, answer in enumerate(question.answers):
        length = question.spots[0].start + 1
        ids = question.ids[:1, :length]
        spot = question.spots[choice]
        inputs = {
            name: tensor[:1, :length] if tensor.shape == question.ids.shape else tensor[:1]
            for name, tensor in question.inputs.items()
            if tensor.shape[0] == question.ids.shape[0]
        }
        if family == "qwen2-vl":
            patches = question.inputs["pixel_values"].shape[0] // question.ids.shape[0]
            inputs["pixel_values"] = question.inputs["pixel_values"][:patches]
        tail = torch.tensor([spot.ids[:-1]], dtype=torch.long)
        kind = {"input_ids": tail, "attention_mask": tail * 0 + 1}
        one = int(family == "paligemma")
        inputs = {
            name: torch.cat([tensor, kind.get(name, tail * 0 + one)], 1)
            if tensor.shape == ids.shape
            else tensor
            for name, tensor in inputs.items()
        }
        with torch.no_grad():
            logits = modality.model(**inputs, use_cache=False).logits[0].log_softmax(-1)
        alone = sum(float(logits[spot.start + j, token]) for j, token in enumerate(spot.ids))
        assert float(together[0][0][choice]) == pytest.approx(alone, rel=1e-4), answer


def test_exact_is_what_greedy_decoding_begins_with(checkpoints: Callable[..., Any]) -> None:
    modality = checkpoints("llava")
    prompt = modality.prompts.question("What?", noise(), [])
    made = modality.model.generate(**prompt.inputs, do_sample=False, max_new_tokens=3)
    length = prompt.ids.shape[1]
    tokens = made[0, length:].tolist()
    other = modality.processor.tokenizer.convert_tokens_to_ids("Q")
    for last, exact in ((tokens[2], 1.0), (other, 0.0)):
        ids = (*tokens[:2], last)
        after = torch.tensor([ids[:2]])
        inputs = prompt.inputs | {
            "input_ids": torch.cat([prompt.ids, after], 1),
            "attention_mask": torch.ones(1, length + 2, dtype=torch.long),
        }
        words = modality.processor.tokenizer.decode(ids).strip()
        spot = Spot(0, length - 1, ids)
        question = Question(inputs, "input_ids", (spot,), (words,), 0)
        batch = QuestionBatch(question.ids, (0,), (question,), "exact")
        (measured,) = plain(modality, [batch])
        assert measured.scores == {"exact": [exact]}
        assert measured.expected == [words]
        assert (measured.answers == [words]) is bool(exact)


def test_the_first_windows_keep_their_order(
    checkpoints: Callable[..., Any], data: Callable[[str], DataSpec]
) -> None:
    from infra.images import evaluated

    modality = checkpoints("llava")
    found = evaluated(data("all"), "report")[:10]
    evaluation = modality.evaluation_batches(data("all"), "report", 10, 16)
    expected = [words for m in plain(modality, evaluation) for words in m.expected]
    assert expected == [example.answer for example in found]


@pytest.mark.parametrize(
    "family, kind, towers, message",
    [
        ("llava", "all", ("visoin",), r"has no 'visoin', it has vision, language"),
        ("blip-2", "all", (), r"has no image: Blip2ForConditionalGeneration takes none without"),
        ("clip", "all", (), r"has no image: CLIPModel takes none without"),
    ],
)
def test_what_cannot_be_is_refused(
    family: str,
    kind: str,
    towers: tuple[str, ...],
    message: str,
    checkpoints: Callable[..., Any],
    data: Callable[[str], DataSpec],
) -> None:
    with pytest.raises(UserError, match=message):
        checkpoints(family, *towers).evaluation_batches(data(kind), "report", 6, 16)


def test_a_processor_without_an_image_token_is_refused(
    checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_checkpoint("llava", tmp_path / "bare")
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = config["image_token_id"] = 299
    (folder / "config.json").write_text(json.dumps(config))
    spec = ModelSpec(source=str(folder), modality="multimodal", dtype="float32")
    with pytest.raises(UserError, match=r"LlavaProcessor has no image token: the model looks for"):
        MultimodalModality.load(spec, CPU)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answer": "cow", "choices": WORDS}, r"the answer 'cow' of .* is none of its choices"),
        ({"answer": ""}, r"has no answer: set data.answer"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    row: dict[str, Any], message: str, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    answer = {"answer": lambda i: row["answer"]}
    if "choices" in row:
        answer["choices"] = lambda i: row["choices"]
    rows = write_rows(tmp_path, False, question=lambda i: f"{i}?", **answer)
    with pytest.raises(UserError, match=message):
        checkpoints("llava").evaluation_batches(rows, "report", 3, 16)
