"""Documents: what counts as one, how they are dealt, and that no split sees another's.

python -m pytest tests/infra/test_documents.py
"""

import csv
import gzip
import json
from pathlib import Path
from typing import get_args

import pytest

from infra.documents import Split, corpus_sha256, data_sha256, documents, whole_text
from infra.errors import UserError
from infra.specs import DataSpec

SPLITS: tuple[Split, ...] = get_args(Split)
WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2" / "test.raw"
WIKI_LINES = ["", " = One = ", "", " Text . ", "", " = = Part = = ", "", " = Wins ; L = ", ""]
WIKI_LINES += [" = Two = ", "", " More . ", " = no title since no blank line = ", ""]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[str]) -> str:
    """A table with the columns `id` and `text`, in the format that the name ends with."""
    import datasets

    table = [{"id": number, "text": row} for number, row in enumerate(rows)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(table)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(table).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(table).save_to_disk(str(path))
    return str(path)


def everything(source: str, column: str = "text") -> list[str]:
    """All documents of a source, by letting one split have it alone."""
    data = DataSpec(calibration=source, selection="unread", report="unread", column=column)
    return documents(data, "calibration")


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "saved"])
def test_a_row_of_any_table_is_a_document(tmp_path: Path, name: str) -> None:
    rows = [
        "first, with a comma",
        "second\nof two lines",
        "  ",
        "third",
        "",
        "second\nof two lines",
    ]
    source = write_rows(tmp_path / name, rows)
    assert everything(source) == ["first, with a comma", "second\nof two lines", "third"]
    assert whole_text(source).startswith("first, with a comma\n\nsecond\nof two lines\n\n  \n\n")
    with pytest.raises(UserError, match=r"no column 'words', it has id, text: set data.column"):
        everything(source, "words")
    with pytest.raises(UserError, match=r"'id' of .* does not hold text"):
        everything(source, "id")


def test_a_packed_table_is_read_as_it_is(tmp_path: Path) -> None:
    """As C4 is kept on the hub: lines of JSON, called .json, packed."""
    packed = tmp_path / "c4-train.00000-of-01024.json.gz"
    lines = Path(write_rows(tmp_path / "t.jsonl", ["one", "two"])).read_bytes()
    packed.write_bytes(gzip.compress(lines))
    assert everything(str(packed)) == ["one", "two"]


def test_a_text_file_holds_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_bytes("One\r\nstill one\r\n \r\n\r\nTwo\r\n\r\nOne\nstill one\n\nDréi".encode())
    assert everything(str(path)) == ["One\nstill one", "Two", "Dréi"]
    assert whole_text(str(path)).startswith("One\nstill one\n \n\nTwo\n\n")
    path.write_bytes(b"ok \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        everything(str(path))


def test_a_wikitext_holds_articles_as_a_file_and_as_a_table(tmp_path: Path) -> None:
    file, table = tmp_path / "wiki.raw", tmp_path / "wiki.jsonl"
    file.write_text("\n".join(WIKI_LINES))
    write_rows(table, [line + "\n" if line else "" for line in WIKI_LINES])
    one, two = everything(str(file))
    assert one.startswith("= One =") and one.endswith("= Wins ; L =")
    assert two.startswith("= Two =") and two.endswith("no blank line =")
    assert everything(str(table)) == [one, two]
    assert whole_text(str(file)) == whole_text(str(table)).removesuffix("\n\n")
    assert "\n\n = One = \n\n\n\n\n Text . \n\n" in whole_text(str(file))


@pytest.mark.skipif(not WIKITEXT.exists(), reason="the shared WikiText-2 sample is not here")
def test_the_articles_of_wikitext_2() -> None:
    found = everything(str(WIKITEXT))
    assert len(found) == 60
    assert found[0].startswith("= Robert Boulter =") and found[-1].startswith("= The Hustler")
    text = WIKITEXT.read_text()
    # Joining 4358 rows adds two line ends between each pair, less the blank lines' own " \n".
    blank = sum(1 for line in text.splitlines() if not line.strip())
    assert len(whole_text(str(WIKITEXT))) == len(text) + 2 * 4357 - 2 * blank


def test_one_source_is_dealt_out_and_additions_move_nothing(tmp_path: Path) -> None:
    rows = [f"document {number}" for number in range(2000)]
    data = DataSpec(source=write_rows(tmp_path / "a.jsonl", rows))
    dealt = {split: documents(data, split) for split in SPLITS}
    assert sorted([*dealt["calibration"], *dealt["selection"], *dealt["report"]]) == sorted(rows)
    assert [len(dealt[split]) for split in SPLITS] == pytest.approx([1000, 500, 500], abs=60)
    assert dealt["report"] == sorted(dealt["report"], key=rows.index)

    longer = write_rows(tmp_path / "b.jsonl", ["new", *rows[::-1], "other"])
    for split in SPLITS:
        again = documents(DataSpec(source=longer), split)
        assert set(again) - {"new", "other"} == set(dealt[split])


def test_shares_are_of_the_splits_that_share(tmp_path: Path) -> None:
    rows = [f"document {number}" for number in range(2000)]
    shared = write_rows(tmp_path / "shared.jsonl", rows)
    own = write_rows(tmp_path / "own.jsonl", ["only this", "document 7"])
    data = DataSpec(source=shared, calibration=own)
    assert documents(data, "calibration") == ["only this", "document 7"]
    selection, report = documents(data, "selection"), documents(data, "report")
    assert 900 < len(selection) < 1100
    assert not set(selection) & set(report)
    assert set(selection) | set(report) == set(rows)


def test_selecting_on_the_report_split_is_refused(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", ["a", "b", "c"])
    b = write_rows(tmp_path / "b.jsonl", ["x", "c "])
    same = str(tmp_path / ".." / tmp_path.name / "a.jsonl")
    for report, shared in [(b, 1), (same, 3)]:
        data = DataSpec(calibration="unread", selection=a, report=report)
        for split in SPLITS[1:]:
            with pytest.raises(
                UserError, match=rf"on the report split: {shared} documents are in both"
            ):
                documents(data, split)


def test_a_document_that_was_dealt_to_another_split_is_not_reported(tmp_path: Path) -> None:
    rows = [f"document {number}" for number in range(60)]
    a, b = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "b.txt"
    calibration = documents(DataSpec(source=a, report="unread"), "calibration")
    b.write_text(calibration[0])
    with pytest.raises(UserError, match="calibrating on the report split"):
        documents(DataSpec(source=a, report=str(b)), "report")
    b.write_text(next(row for row in rows if row not in calibration))
    with pytest.raises(UserError, match="selecting on the report split"):
        documents(DataSpec(source=a, report=str(b)), "report")


def test_what_holds_no_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A single paragraph.")
    data = DataSpec(source=str(tmp_path / "one.txt"))
    refused = []
    for split in SPLITS:
        try:
            documents(data, split)
        except UserError as error:
            assert f"no document for data.{split}" in str(error)
            refused.append(split)
    assert len(refused) == 2
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="cannot be read as a table"):
        everything(str(tmp_path / "broken.parquet"))
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read \.png files"):
        everything(str(tmp_path / "image.png"))


def test_a_folder_is_read_by_its_first_kind(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no file of text"):
        everything(str(folder))
    (folder / "README.md").write_text("About it")
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "b.txt").write_text("two")
    (folder / "a.raw").write_text("one")
    assert everything(str(folder)) == ["one", "two"]
    write_rows(folder / "2.jsonl", ["row b"])
    write_rows(folder / "1.jsonl", ["row a"])
    assert everything(str(folder)) == ["row a", "row b"]


def test_a_folder_of_several_saved_splits_is_told_apart(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"name one of its folders \(test, train\)"):
        everything(str(tmp_path / "both"))
    assert everything(str(tmp_path / "both" / "test")) == ["a"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    assert everything(str(path)) == ["old"]
    path.write_text("new")
    assert everything(str(path)) == ["new"]


def test_the_fingerprint_knows_borders_and_order() -> None:
    assert corpus_sha256(["ab", "c"]) != corpus_sha256(["a", "bc"])
    assert corpus_sha256(["a", "b"]) != corpus_sha256(["b", "a"])
    assert corpus_sha256(["a", "b"]) == corpus_sha256(["a", "b"])


def test_a_split_is_hashed_once_for_all_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a file of its source changes, or another is there; another column is other text."""
    hashed: list[int] = []

    def counting(corpus: list[str]) -> str:
        hashed.append(len(corpus))
        return corpus_sha256(corpus)

    monkeypatch.setattr("infra.documents.corpus_sha256", counting)
    (tmp_path / "corpus").mkdir()
    file = tmp_path / "corpus" / "a.jsonl"
    rows = [{"text": f"text {i}", "other": f"other {i}"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(source=str(tmp_path / "corpus"))

    def digests(data: DataSpec) -> list[str]:
        return [data_sha256("language", data.model_copy(), split) for split in SPLITS]

    first = digests(data)
    assert first == [corpus_sha256(documents(data, split)) for split in SPLITS]
    assert digests(data) == first and len(hashed) == 3
    other = digests(data.model_copy(update={"column": "other"}))
    assert not set(other) & set(first) and len(hashed) == 6
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    shorter = digests(data)
    assert not set(shorter) & set(first) and len(hashed) == 9
    (tmp_path / "corpus" / "b.jsonl").write_text(json.dumps({"text": "t", "other": "o"}) + "\n")
    assert digests(data) != shorter
