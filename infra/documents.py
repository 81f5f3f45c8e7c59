"""Documents: the text that calibrates, selects and reports, dealt out by a hash of each.

    documents(DataSpec(source="corpus.jsonl"), "selection")

A row of a table is a document; a text file holds articles, where it has headings in the style of
WikiText (` = Title = `), or else paragraphs separated by blank lines. In a folder, the files of
the first kind present count: parquet, jsonl, csv, json, txt and raw, md.
"""

import functools
import glob
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from infra.cache import cache_dir
from infra.errors import UserError
from infra.sources import fetch
from infra.specs import DataSpec, Modality

T = TypeVar("T")
Split = Literal["calibration", "selection", "report"]

# Of a source that serves several splits, each gets this share, relative to the others there.
_WEIGHTS: dict[Split, int] = {"calibration": 2, "selection": 1, "report": 1}
TABLES = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv", ".json": "json"}
TABLES |= {f"{suffix}.gz": kind for suffix, kind in TABLES.items() if suffix != ".parquet"}
_KINDS = [(".parquet",), (".jsonl", ".jsonl.gz"), (".csv", ".csv.gz"), (".json", ".json.gz")]
_KINDS += [(".txt", ".raw"), (".md",)]
# What a split must not share with another, and what that would be.
_EXCLUDED: dict[Split, list[tuple[str, Split]]] = {
    "selection": [("selecting", "report")],
    "report": [("selecting", "selection"), ("calibrating", "calibration")],
}
_TITLE = re.compile(r" = [^=]+ = ?")


def documents(data: DataSpec, split: Split) -> list[str]:
    """The distinct, non-empty documents of a split, in the order of their source.

    Raises UserError when there are none, and when report shares a document with another.
    """

    def read(source: str) -> tuple[str, ...]:
        files = files_of(source, data.files)
        stamps = tuple(file.stat().st_mtime_ns for file in files)
        return _read(files, stamps, data.column, source)

    return deal(data, split, read, str.encode, lambda text: repr(text[:60]), "document")


def deal(
    data: DataSpec,
    split: Split,
    read: Callable[[str], Sequence[T]],
    key: Callable[[T], bytes],
    name: Callable[[T], str],
    noun: str,
) -> list[T]:
    """The part of a source that falls to a split; `key` is what makes two of it the same.

    Raises UserError when there is none, and when report shares any with another split.
    """
    found = _dealt(data, split, read, key)
    source = data.source_of(split)
    if not found:
        raise UserError(
            f"{source} has no {noun} for data.{split}: give more, or a source of its own"
        )
    for use, other in _EXCLUDED.get(split, ()):
        if data.source_of(other) in ("", source):
            continue
        others = {key(each) for each in _dealt(data, other, read, key)}
        if shared := [each for each in found if key(each) in others]:
            raise UserError(
                f"{use} on the report split: {len(shared)} {noun}s are in both data.{other} "
                f"({data.source_of(other)}) and data.{split} ({source}), "
                f"e.g. {min(map(name, shared))}"
            )
    return found


def whole_text(source: str, column: str = "text", pattern: str = "") -> str:
    """All text of a source as the published WikiText-2 protocol reads it: rows joined by "\\n\\n".

    The rows of a WikiText file are its lines, as in the hub's tables of it; any other text file
    is returned as it stands.
    """
    files = files_of(source, pattern)
    if suffix_of(files[0]) in TABLES or files[0].is_dir():
        return "\n\n".join(_rows(files, column, source))
    text = "".join(_text(file) for file in files)
    if not _titles(text.split("\n")):
        return text
    return "\n\n".join(line if line.strip() else "" for line in text.splitlines(keepends=True))


def data_sha256(modality: Modality, data: DataSpec, split: Split) -> str:
    """A fingerprint of what a split holds: documents, or images with what is known of each.

    It is made once in a process, of files that keep their sizes and times: a study asks for it
    three times per cell. Raises UserError as `deal` does.
    """
    return _data_sha256(modality, data, split, tuple(_stamps(data)))


@functools.lru_cache(maxsize=256)
def _data_sha256(
    modality: Modality, data: DataSpec, split: Split, stamps: tuple[tuple[Path, int, int], ...]
) -> str:
    if modality == "language":
        return corpus_sha256(documents(data, split))
    from infra.images import examples_sha256

    return examples_sha256(data, split)


def _stamps(data: DataSpec) -> Iterator[tuple[Path, int, int]]:
    """Path, size in bytes and time of all files of all sources."""
    for source in dict.fromkeys(filter(None, map(data.source_of, _WEIGHTS))):
        path = fetch(source, "dataset")
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            about = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere
            yield file, about.st_size, about.st_mtime_ns


def corpus_sha256(corpus: list[str]) -> str:
    """A fingerprint of documents and their order."""
    digest = hashlib.sha256()
    for document in corpus:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def _dealt(
    data: DataSpec, split: Split, read: Callable[[str], Sequence[T]], key: Callable[[T], bytes]
) -> list[T]:
    source = data.source_of(split)
    sharing = [each for each in _WEIGHTS if data.source_of(each) == source]
    total = sum(_WEIGHTS[each] for each in sharing)
    before = sum(_WEIGHTS[each] for each in sharing[: sharing.index(split)])
    low, high = before / total, (before + _WEIGHTS[split]) / total
    return [each for each in read(source) if low <= _position(key(each)) < high]


def _position(key: bytes) -> float:
    """Where something falls in [0, 1): a hash of itself alone, so that others never move it."""
    return int.from_bytes(hashlib.sha256(key).digest()[:6]) / 2**48


@functools.lru_cache(maxsize=4)  # every trial of a worker asks for the same few
def _read(
    files: tuple[Path, ...], stamps: tuple[int, ...], column: str, source: str
) -> tuple[str, ...]:
    if suffix_of(files[0]) in TABLES or files[0].is_dir():
        rows = _rows(files, column, source)
        # Tables of WikiText hold a line per row: taken as documents they would put one article
        # into two splits.
        lines = [row.removesuffix("\n") for row in rows]
        wiki = any(_TITLE.fullmatch(line) for line in lines[:100])
        found = _articles("\n".join(lines)) if wiki else rows
    else:
        found = [document for file in files for document in _articles(_text(file))]
    return tuple(dict.fromkeys(text for document in found if (text := document.strip())))


def _articles(text: str) -> list[str]:
    """A WikiText's articles, or else the paragraphs."""
    lines = text.split("\n")
    starts = _titles(lines)
    if not starts:
        return re.split(r"\n\s*\n", text)
    bounds = [0, *starts, len(lines)]
    return ["\n".join(lines[a:b]) for a, b in pairwise(bounds)]


def _titles(lines: list[str]) -> list[int]:
    # Definitions look like titles (` = Wins ; L = `), but no blank line precedes them; there are
    # copies of WikiText without any blank line.
    blank = any(not line.strip() for line in lines[:-1])
    return [
        number
        for number, line in enumerate(lines)
        if _TITLE.fullmatch(line)
        and " ; " not in line
        and (number == 0 or not blank or not lines[number - 1].strip())
    ]


def files_of(source: str, pattern: str) -> tuple[Path, ...]:
    """The files that a source consists of; a folder of `save_to_disk` stands for itself."""
    path = fetch(source, "dataset")
    if path.is_file():
        if suffix_of(path) not in {suffix for kind in _KINDS for suffix in kind}:
            raise UserError(
                f"{source}: cannot read {suffix_of(path) or 'this kind of'} files as text"
            )
        return (path,)
    if (path / "state.json").exists():
        return (path,)
    if (path / "dataset_dict.json").exists():
        inside = ", ".join(sorted(each.parent.name for each in path.glob("*/state.json")))
        raise UserError(f"{source} holds several data sets: name one of its folders ({inside})")
    visible = files_inside(path, pattern, source)
    for kind in _KINDS:
        if files := tuple(file for file in visible if suffix_of(file) in kind):
            return files
    known = ", ".join(suffix for kind in _KINDS for suffix in kind)
    raise UserError(f"{source} holds no file of text ({known})")


def files_inside(folder: Path, pattern: str, source: str) -> list[Path]:
    """The visible files of a folder, those that match a pattern of paths where one is given.

    Raises UserError where none does.
    """
    visible = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    }
    found = [file for name, file in visible.items() if not pattern or fnmatch(name, pattern)]
    if pattern and not found:
        has = ", ".join(list(visible)[:5]) or "no files"
        raise UserError(f"{source} has no files {pattern!r}, it has {has}: set data.files")
    return found


def suffix_of(path: Path) -> str:
    """The kind of a file; of a packed one, that of what is inside as well: .json.gz."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else "") + path.suffix


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at {error.start}") from error


def load_table(files: Sequence[Path], source: str) -> Any:
    """The table of some files of one kind, or of a folder of `save_to_disk`.

    Raises UserError where they cannot be read as one.
    """
    if not files[0].is_dir() and suffix_of(files[0]) not in TABLES:
        raise UserError(f"{source} is no table: name one of {', '.join(TABLES)}")
    import datasets  # a second that only tables cost

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it cannot read is told below
    try:
        if files[0].is_dir():
            return datasets.load_from_disk(str(files[0]))
        return datasets.load_dataset(
            TABLES[suffix_of(files[0])],
            data_files=[glob.escape(str(file.absolute())) for file in files],
            split="train",
            cache_dir=str(cache_dir() / "datasets"),
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(f"{source} cannot be read as a table: {cause}") from error


def _rows(files: tuple[Path, ...], column: str, source: str) -> list[str]:
    """One column of a table; rows without a value are left out."""
    table = load_table(files, source)
    if column not in table.column_names:
        names = ", ".join(table.column_names)
        raise UserError(f"{source} has no column {column!r}, it has {names}: set data.column")
    rows = [row for row in table[column] if row is not None]
    if any(not isinstance(row, str) for row in rows):
        raise UserError(f"column {column!r} of {source} does not hold text: set data.column")
    return rows
