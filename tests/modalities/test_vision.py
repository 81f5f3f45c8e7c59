"""Classifiers of timm: which matrices, which transforms, which classes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infra.errors import UserError
from infra.images import evaluated
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from modalities import load
from modalities.vision import ImageBatch, VisionModality
from tests.timm_models import CLASSES, TIMM, build_timm, load_vision, png, write_images, write_timm

SAMPLES = CalibrationSpec(samples=6)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("vit")`: a sound one; do not write to it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = write_timm(family, tmp_path_factory.mktemp("timm") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("family", TIMM)
def test_every_linear_and_pointwise_convolution_of_a_block_is_prunable(
    family: str, checkpoints: Callable[[str], Path], cache: Path
) -> None:
    """And nothing else: no depthwise convolution, no norm, no table, no gate with one output."""
    modality = load_vision(checkpoints(family))
    assert len(modality.blocks) >= 3
    for block in modality.blocks:
        expected = {
            f"{name}.weight"
            for name, module in block.module.named_modules()
            if (isinstance(module, nn.Linear) and module.out_features > 1)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        }
        assert {matrix.name for matrix in block.matrices} == expected
        assert set(block.unseen) <= {"attn.relative_position_bias_table"}


@pytest.mark.parametrize("family", ["vit-hybrid", "swin", "convnext"])
def test_measures_what_a_plain_timm_loop_does(
    family: str, checkpoints: Callable[[str], Path], images: DataSpec, cache: Path
) -> None:
    """The model's own transforms on the same images; top-1, top-5 and the loss."""
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    modality = load_vision(checkpoints(family))
    batches = modality.evaluation_batches(images, "report", 8, 0)
    model = build_timm(family)
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    found = {}
    for file in Path(images.source).glob("*/*.png"):
        with torch.no_grad():
            logits = model(transform(Image.open(file).convert("RGB"))[None])[0]
        label = CLASSES.index(file.parent.name)
        ranks = logits.argsort(descending=True).tolist()
        loss = float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])))
        found[round(loss, 4)] = (label, ranks[0], float(label in ranks[:5]))
    with torch.no_grad():
        measured = [modality.measure(batch) for batch in batches]
        losses = [loss for batch in batches for loss in modality.losses(batch)]
    assert losses == [loss for each in measured for loss in each.losses]
    assert len(losses) == 8
    for each in measured:
        rows = (each.losses, each.scores["top1"], each.scores["top5"], each.answers, each.expected)
        for loss, top1, top5, answer, expected in zip(*rows, strict=True):
            label, first, among = next(v for k, v in found.items() if abs(k - loss) < 2e-4)
            assert (top1, top5) == (float(label == first), among)
            assert (answer, expected) == (CLASSES[first], CLASSES[label])


def test_batches_are_cut_by_positions_and_the_same_every_time(
    checkpoints: Callable[[str], Path], images: DataSpec, cache: Path
) -> None:
    modality = load_vision(checkpoints("vit"))
    first = modality.calibration_batches(images, SAMPLES)
    again = load_vision(checkpoints("vit")).calibration_batches(images, SAMPLES)
    other = modality.calibration_batches(images, SAMPLES.model_copy(update={"seed": 1}))
    assert torch.equal(first[0].ids, again[0].ids)
    assert not torch.equal(first[0].ids, other[0].ids)
    assert first[0].tokens == 6  # a plan counts images
    halves = modality.calibration_batches(images, SAMPLES, divisor=120)
    assert [batch.windows for batch in halves] == [2, 2, 2]
    assert torch.equal(torch.cat([batch.ids for batch in halves]), first[0].ids)
    few = modality.evaluation_batches(images, "selection", 3, 0)[0]
    more = modality.evaluation_batches(images, "selection", 9, 0)[0]
    assert isinstance(few, ImageBatch)
    assert few.labels == more.rows(0, 3).labels  # type: ignore[attr-defined]
    assert torch.equal(few.ids, more.rows(0, 3).ids)
    assert modality.scored_tokens(more) == [1] * 9


def test_calibrates_on_images_without_classes(
    checkpoints: Callable[[str], Path], tmp_path: Path, cache: Path
) -> None:
    """A flat folder calibrates; it cannot measure, and that is said. Gradients take the class
    that the model itself gives."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.png").write_bytes(png(number))
    modality = load_vision(checkpoints("vit"))
    data = DataSpec(source=str(folder))
    batch = modality.calibration_batches(data, SAMPLES)[0]
    losses = modality.window_losses(batch)
    logits = modality.run(batch)
    wanted = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="none")
    assert torch.equal(torch.stack(losses), wanted)
    with pytest.raises(UserError, match=r"^data\.report .* has no class: give a folder per class"):
        modality.evaluation_batches(data, "report", 4, 0)


def test_classes_by_number_by_name_and_by_folder(tmp_path: Path, cache: Path) -> None:
    """A head without names takes the folders in their order, and only when there are as many."""
    from timm.models import save_for_hf

    model = build_timm("vit", classes=5)
    model.pretrained_cfg.pop("label_names")
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    modality = load_vision(tmp_path / "model")
    data = write_images(tmp_path / "five", classes=CLASSES[:5])
    batch = modality.evaluation_batches(data, "report", 9, 0)[0]
    with torch.no_grad():
        measured = modality.measure(batch)
    assert set(measured.scores) == {"top1"}  # of five classes, all are among the first five
    numbers = {str(sorted(CLASSES[:5]).index(name)) for name in CLASSES[:5]}
    assert set(measured.expected) <= numbers
    seven = write_images(tmp_path / "seven")
    with pytest.raises(UserError, match="has 7 classes, the head 5 and no names for them"):
        modality.evaluation_batches(seven, "report", 4, 0)


def test_without_names_the_order_is_the_data_sets_own(tmp_path: Path, cache: Path) -> None:
    from datasets import ClassLabel, Dataset
    from timm.models import save_for_hf

    model = build_timm("vit", classes=3)
    model.pretrained_cfg.pop("label_names")
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    modality = load_vision(tmp_path / "model")
    rows = {"image": [png(i) for i in range(30)], "label": [i % 3 for i in range(30)]}
    table = Dataset.from_dict(rows).cast_column(
        "label", ClassLabel(names=["shirt", "ankle", "boot"])
    )
    table.to_parquet(tmp_path / "rows.parquet")
    data = DataSpec(source=str(tmp_path / "rows.parquet"))
    (batch,) = modality.evaluation_batches(data, "report", 6, 0)
    places = {"shirt": 0, "ankle": 1, "boot": 2}
    wanted = [places[str(example.label)] for example in evaluated(data, "report")[:6]]
    assert list(batch.labels) == wanted  # type: ignore[attr-defined]
    folders = write_images(tmp_path / "numbers", classes=("2", "10", "1"))
    with pytest.raises(UserError, match=r"have two orders \(1, 10\.\.\.\): give data\.classes"):
        modality.evaluation_batches(folders, "report", 6, 0)
    named = folders.model_copy(update={"classes": ("1", "2", "10")})
    (batch,) = modality.evaluation_batches(named, "report", 6, 0)
    wanted = [("1", "2", "10").index(str(e.label)) for e in evaluated(named, "report")[:6]]
    assert list(batch.labels) == wanted  # type: ignore[attr-defined]


def test_classes_that_the_head_does_not_have(
    checkpoints: Callable[[str], Path], tmp_path: Path, cache: Path
) -> None:
    modality = load_vision(checkpoints("vit"))
    named = write_images(tmp_path / "named", classes=("gren", "red"))
    with pytest.raises(UserError, match="of class 'gren', which the head does not know: did you"):
        modality.evaluation_batches(named, "report", 12, 0)
    (tmp_path / "numbered").mkdir()
    rows = []
    for number in range(40):
        (tmp_path / "numbered" / f"{number}.png").write_bytes(png(number))
        rows.append(json.dumps({"image": f"{number}.png", "label": number % 9}))
    (tmp_path / "numbered" / "rows.jsonl").write_text("\n".join(rows))
    numbered = DataSpec(source=str(tmp_path / "numbered" / "rows.jsonl"))
    with pytest.raises(UserError, match=r"of class [78], the head has 7 \(0 to 6\)"):
        modality.evaluation_batches(numbered, "report", 8, 0)


@pytest.mark.parametrize("family", ["deit", "swin", "maxvit"])
def test_a_saved_model_is_a_folder_of_timm(
    family: str,
    checkpoints: Callable[[str], Path],
    images: DataSpec,
    tmp_path: Path,
    cache: Path,
) -> None:
    import timm

    modality = load_vision(checkpoints(family), "bfloat16")
    weight = modality.blocks[1].matrices[0].weight()
    weight[:, ::2] = 0
    batch = modality.evaluation_batches(images, "report", 4, 0)[0]
    modality.save(tmp_path)
    saved = modality.reopen(tmp_path)
    with torch.no_grad():
        assert saved.losses(batch) == modality.losses(batch)
        plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.allclose(plain(batch.ids.float()), modality.run(batch).float(), atol=0.2)
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(saved.model.get_parameter(name), parameter), name


def test_facts(checkpoints: Callable[[str], Path], cache: Path) -> None:
    spec = ModelSpec(source=str(checkpoints("vit")), modality="vision", dtype="float32")
    modality = load(spec, torch.device("cpu"))
    assert isinstance(modality, VisionModality)
    record = modality.record("here")
    assert (record.modality, record.unit, record.context) == ("vision", "image", 0)
    assert (record.width, record.inner, record.outputs) == (32, 128, len(CLASSES))
    assert record.window_tokens == 17  # a class token and 16 patches
    assert (record.licence, record.architecture) == ("apache-2.0", "VisionTransformer")
    assert record.blocks == [f"blocks.{i}" for i in range(3)]


def test_a_second_load_maps_what_the_first_converted(
    checkpoints: Callable[[str], Path], cache: Path
) -> None:
    load_vision(checkpoints("vit"))
    (folder,) = [path for path in (cache / "copies").iterdir() if path.is_dir()]
    before = (folder / "weights.safetensors").stat().st_mtime_ns
    load_vision(checkpoints("vit"))
    assert (folder / "weights.safetensors").stat().st_mtime_ns == before


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_vision(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints_that_cannot_be_used(tmp_path: Path, cache: Path) -> None:
    """Another library's, another shape, another head, nothing to prune, a damaged file."""
    folder = write_timm("vit", tmp_path / "vit")
    weights, config = folder / "model.safetensors", folder / "config.json"
    stated = json.loads(config.read_text())

    config.write_text(json.dumps({"model_type": "vit"}))
    assert "is no model of timm: its config.json states no architecture" in refused(folder)
    config.write_text(json.dumps(stated | {"architecture": "vit_tiny_patch61_224"}))
    assert "Unknown model (vit_tiny_patch61_224)" in refused(folder)
    config.write_text(json.dumps(stated | {"num_classes": 9}))
    assert "config.json states 9 classes, its model_args 7: correct it" in refused(folder)
    for classes, reason in ((9, "size mismatch for head.weight"), (0, "Unexpected key(s)")):
        arguments = stated["model_args"] | {"num_classes": classes}
        changed = {"num_classes": classes, "model_args": arguments}
        config.write_text(json.dumps(stated | changed))
        assert reason in refused(folder)
    config.write_text(json.dumps(stated))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated" in refused(folder)
    weights.unlink()
    assert "has no weights" in refused(folder)

    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("test_resnet"), tmp_path / "resnet", safe_serialization=True)
    assert "no blocks found" in refused(tmp_path / "resnet")
