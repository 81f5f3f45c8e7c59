"""Images from folders, tables and CIFAR-10's files; dealt out, broken ones counted.

python -m pytest tests/infra/test_images.py
"""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from infra.errors import UserError
from infra.images import Example, evaluated, examples, examples_sha256, usable
from infra.specs import DataSpec


def png(value: int, size: int = 4) -> bytes:
    """An image that is its own, by its colour."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, value // 256, 7)).save(file, "PNG")
    return file.getvalue()


def folder_of(path: Path, count: int = 40) -> Path:
    for number in range(count):
        file = path / ("cat" if number % 2 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return path


def test_a_folder_has_a_class_per_folder_and_is_dealt_out(tmp_path: Path) -> None:
    data = DataSpec(source=str(folder_of(tmp_path / "photos")))
    splits = {s: examples(data, s) for s in ("calibration", "selection", "report")}  # type: ignore[arg-type]
    assert sum(map(len, splits.values())) == 40
    names = [{example.name for example in found} for found in splits.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    assert {e.label for found in splits.values() for e in found} == {"cat", "dog"}
    assert {e.name for e in evaluated(data, "report")} == names[2]
    assert examples_sha256(data, "report") != examples_sha256(data, "selection")


def test_a_stray_json_beside_images_is_no_table(tmp_path: Path) -> None:
    (folder_of(tmp_path / "photos") / "licence.json").write_text('{"licence": "none"}')
    data = DataSpec(source=str(tmp_path / "photos"))
    assert {example.label for example in examples(data, "calibration")} == {"cat", "dog"}


def test_images_without_classes(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    found = examples(DataSpec(calibration=str(tmp_path), report="x"), "calibration")
    assert [(example.name, example.label) for example in found] == [("1.png", None)]


@pytest.mark.parametrize("kind", ["parquet", "disk", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    rows = {"picture": [png(i) for i in range(30)], "answer": [f"a{i}" for i in range(30)]}
    rows["options"] = [["a", "b"]] * 30
    where = tmp_path / "data"
    where.mkdir()
    if kind == "jsonl":
        lines = []
        for number, content in enumerate(rows["picture"]):
            (where / f"{number}.png").write_bytes(content)
            line = {"picture": f"{number}.png", "answer": f"a{number}", "options": ["a", "b"]}
            lines.append(json.dumps(line))
        (where / "rows.jsonl").write_text("\n".join(lines))
        source = where / "rows.jsonl"
    else:
        table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
        source = where / "rows.parquet" if kind == "parquet" else where / "saved"
        table.to_parquet(source) if kind == "parquet" else table.save_to_disk(source)
    data = DataSpec(source=str(source), image="picture", choices="options")
    found = examples(data, "calibration")
    assert found and all(e.answer.startswith("a") and e.choices == ("a", "b") for e in found)
    assert all(image for _, image in usable(found, len(found), data, "data.calibration"))
    with pytest.raises(UserError, match=r"no column 'image', it has picture, .*: set data\.image"):
        examples(DataSpec(source=str(source)), "calibration")


def test_cifar_in_both_of_its_forms(tmp_path: Path) -> None:
    pixels = bytes(range(256)) * 12 * 20
    strip = Image.frombytes("RGB", (1024, 20), pixels)
    strip.save(tmp_path / "data_batch_2.png")
    labels = [number % 10 for number in range(100)]
    (tmp_path / "train_lables.json").write_text(json.dumps(labels))
    size = 3 * 1024
    records = b""
    for number in range(20):
        image = pixels[number * size :][:size]
        records += bytes([labels[20 + number]]) + b"".join(image[c::3] for c in range(3))
    (tmp_path / "data_batch_2.bin").write_bytes(records)
    found = {
        suffix: examples(
            DataSpec(calibration=str(tmp_path / f"data_batch_2.{suffix}"), report="x"),
            "calibration",
        )
        for suffix in ("png", "bin")
    }
    assert [e.read() for e in found["png"]] == [e.read() for e in found["bin"]]
    assert [e.label for e in found["png"]] == [e.label for e in found["bin"]]
    assert found["png"][0].label == labels[20]
    ((_, image),) = usable(found["bin"], 1, DataSpec(source="x"), "it")
    assert image is not None and image.size == (32, 32)
    (tmp_path / "data_batch_2.bin").write_bytes(records[:-1])
    with pytest.raises(UserError, match=r"cut off: \d+ bytes"):
        examples(
            DataSpec(calibration=str(tmp_path / "data_batch_2.bin"), report="x"), "calibration"
        )


def test_broken_images_are_named_counted_and_refused_above_a_limit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 20)
    (folder / "cat" / "1.png").write_bytes(b"no image")
    (folder / "dog" / "0.png").write_bytes(png(0, size=1))
    data = DataSpec(calibration=str(folder), report="x")
    found = examples(data, "calibration")
    with pytest.raises(
        UserError, match=r"2 of 20 images .* the first is cat/1\.png .*data\.broken=0\.1$"
    ):
        usable(found, 18, data, "data.calibration")
    allowed = data.model_copy(update={"broken": 0.2})
    assert len(usable(found, 18, allowed, "data.calibration")) == 18
    with pytest.raises(UserError, match="has 18 images, 19 are asked for"):
        usable(found, 19, allowed, "data.calibration")
    shared = DataSpec(source=str(folder), broken=0.2)
    with pytest.raises(
        UserError, match=r"data\.report has \d images, its part of data\.source, 30"
    ):
        usable(examples(shared, "report"), 30, shared, "data.report")


def test_reporting_on_images_that_were_selected_on_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 6)
    folder_of(tmp_path / "b", 8)
    data = DataSpec(
        calibration=str(tmp_path / "a"),
        selection=str(tmp_path / "a"),
        report=str(tmp_path / "b"),
    )
    with pytest.raises(UserError, match=r"on the report split: .* images are in both"):
        examples(data, "report")


def test_classes_by_name_are_what_is_chosen_from_when_asked(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [png(i) for i in range(30)], "label": [0, 1] * 15})
    table.to_parquet(tmp_path / "rows.parquet")
    names = ("cat", "dog")
    data = DataSpec(source=str(tmp_path / "rows.parquet"), ask="What is it?", classes=names)
    found = examples(data, "report")
    assert {(e.question, e.choices) for e in found} == {("What is it?", ("cat", "dog"))}
    assert {e.label for e in found} == {"cat", "dog"}
    assert examples_sha256(data, "report") != examples_sha256(
        data.model_copy(update={"ask": "What?"}), "report"
    )
    with pytest.raises(UserError, match=r"is of class 1, data\.classes names 1 \(0 to 0\)"):
        examples(data.model_copy(update={"classes": ("cat",)}), "report")


def test_a_question_and_choices_of_its_own_stay(tmp_path: Path) -> None:
    rows = {"image": [png(i) for i in range(30)], "question": ["Why?"] * 30, "c": [["x"]] * 30}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    source = str(tmp_path / "rows.parquet")
    data = DataSpec(source=source, choices="c", ask="What?", classes=("cat", "dog"))
    assert {(e.question, e.choices) for e in examples(data, "report")} == {("Why?", ("x",))}


def write_table(path: Path, count: int = 30, **columns: list[Any]) -> DataSpec:
    rows = columns if "image" in columns else {"image": [png(i) for i in range(count)], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return DataSpec(source=str(path))


def test_a_share_of_broken_images_holds_for_few_as_well(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 200)
    data = DataSpec(calibration=str(folder), report="x", broken=0.01)
    found = examples(data, "calibration")
    assert isinstance(found[0].image, Path)
    found[0].image.write_bytes(b"no image")
    assert len(usable(found, 4, data, "data.calibration")) == 4
    found[1].image.write_bytes(b"no image")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="2 of 6 images cannot be read"):
        usable(found, 4, data, "data.calibration")


def test_a_path_that_leads_nowhere_and_a_bomb_are_broken_images(tmp_path: Path) -> None:
    write_table(tmp_path / "rows.parquet", image=[f"{i}.png" for i in range(12)])
    data = DataSpec(calibration=str(tmp_path / "rows.parquet"), report="x")
    found = examples(data, "calibration")
    with pytest.raises(UserError, match=r"12 of 12 images cannot be read, .*rows\.parquet\[0\]"):
        usable(found, 2, data, "data.calibration")
    bomb = b"P6 60000 60000 255\n" + b"0" * 100
    with pytest.raises(UserError, match="decompression bomb"):
        usable([Example(bomb, "bomb")], 1, data, "data.calibration")


def test_rows_that_differ_in_choices_or_caption_are_all_there(tmp_path: Path) -> None:
    rows = {"question": ["Which?"] * 30, "options": [[f"a{i}", "b"] for i in range(30)]}
    path = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    data = DataSpec(calibration=str(path), report="x", choices="options")
    assert len(examples(data, "calibration")) == 30
    captions = write_table(tmp_path / "c.parquet", image=[png(1)] * 4, answer=["a", "b", "a", "c"])
    captions = DataSpec(calibration=captions.source, report="x")
    assert [e.answer for e in examples(captions, "calibration")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "columns, more, message",
    [
        ({"label": [[1]] * 30}, {}, r"has a list for a class: set data\.label"),
        ({"image": [[png(i)] for i in range(30)]}, {}, r"has a list for an image: set data\.image"),
        ({}, {"choices": "choicez"}, r"no column 'choicez', it has image: set data\.choices"),
        ({}, {"question": "questin"}, r"no column 'questin', it has image: set data\.question"),
        ({}, {"files": "data/*"}, None),
    ],
)
def test_columns_that_do_not_fit(
    tmp_path: Path, columns: dict[str, Any], more: dict[str, str], message: str | None
) -> None:
    data = write_table(tmp_path / "rows.parquet", **columns).model_copy(update=more)
    if message is None:  # a file is read whatever the pattern of files in a folder
        assert examples(data, "report")
        return
    with pytest.raises(UserError, match=message):
        examples(data, "report")


def test_one_split_of_a_repository_is_chosen(tmp_path: Path) -> None:
    write_table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", label=["a"] * 30)
    write_table(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", label=["b"] * 30)
    data = DataSpec(source=str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"holds the splits train, validation: choose one"):
        examples(data, "report")
    chosen = data.model_copy(update={"files": "data/validation-*.parquet"})
    assert {e.label for e in examples(chosen, "report")} == {"b"}
    with pytest.raises(UserError, match=r"has no files 'data/test-\*', it has data/train-00000"):
        examples(data.model_copy(update={"files": "data/test-*"}), "report")


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"is no folder of images, no table .* not CIFAR-10's"):
        examples(DataSpec(source=str(tmp_path / "photos.zip")), "report")
