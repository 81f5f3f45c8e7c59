"""Images from folders, tables and CIFAR-10's files; dealt out, broken ones counted.

python -m pytest tests/infra/test_images.py
"""

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from infra.errors import UserError
from infra.images import evaluated, examples, examples_sha256, usable
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
    with pytest.raises(UserError, match=r"2 of 20 images cannot be read, the first is cat/1\.png"):
        usable(found, 18, data, "data.calibration")
    allowed = data.model_copy(update={"broken": 0.2})
    assert len(usable(found, 18, allowed, "data.calibration")) == 18
    with pytest.raises(UserError, match="has 18 images, 19 are asked for"):
        usable(found, 19, allowed, "data.calibration")


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
