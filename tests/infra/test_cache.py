"""Copies are made once, stay while a process uses them, and go when they take too much room."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.cache import made_once
from infra.errors import UserError

# Makes the copies that it is told, then holds them until its input ends.
HOLDER = """
import sys
from infra.cache import made_once
def make(folder):
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(400_000))
    print("made", folder.stem, flush=True)
for key in sys.argv[1:]:
    made_once("a model", key, make)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSERAMP_CACHE_GB", "0.001")  # two copies
    return tmp_path / "copies"


def start(*keys: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, *keys]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def holding(*keys: str) -> Iterator[list[str]]:
    """What another process made, which holds its copies meanwhile."""
    with start(*keys) as process:
        assert process.stdout is not None
        yield list(iter(process.stdout.readline, "ready\n"))
        process.communicate()
    assert process.returncode == 0


def used(*keys: str) -> list[str]:
    """What a process that has ended made."""
    with holding(*keys) as made:
        return made


def kept(copies: Path) -> set[str]:
    return {path.name for path in copies.iterdir() if path.is_dir()}


def test_what_was_not_used_for_longest_goes(copies: Path) -> None:
    assert used("a") == ["made a\n"]
    assert used("b") == ["made b\n"]
    assert used("a") == []
    used("c")
    assert kept(copies) == {"a", "c"}
    assert used("b") == ["made b\n"]


def test_what_a_process_holds_stays(copies: Path) -> None:
    with holding("a"), holding("b", "c"):
        used("d")
        assert kept(copies) == {"a", "b", "c", "d"}
    used("e")
    assert kept(copies) == {"d", "e"}


def test_a_copy_larger_than_the_bound_is_used(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE_GB", "0")
    with holding("a"):
        assert kept(copies) == {"a"}
    used("b")
    assert kept(copies) == {"b"}


def test_what_was_half_made_is_made_again(copies: Path) -> None:
    half = copies / "a.making"
    half.mkdir(parents=True)
    (half / "left").touch()
    assert used("a") == ["made a\n"]
    assert kept(copies) == {"a"}
    assert [path.name for path in (copies / "a").iterdir()] == ["weights"]


def test_what_was_half_made_counts_and_goes(copies: Path) -> None:
    used("a")
    (copies / "a").rename(copies / "a.making")
    used("b", "c")
    assert kept(copies) == {"b", "c"}


def test_many_at_once_make_it_once() -> None:
    many = [start("a") for _ in range(4)]
    said = [process.communicate()[0] for process in many]
    assert "".join(said).count("made a") == 1
    assert [process.returncode for process in many] == [0] * 4


def test_a_process_holds_what_it_asks_for_again(copies: Path) -> None:
    folder = made_once("a model", "a", lambda folder: folder.mkdir())
    opened = len(list(Path("/proc/self/fd").iterdir()))
    assert made_once("a model", "a", lambda folder: folder.mkdir()) == folder == copies / "a"
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_bound_that_is_no_number(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE_GB", "20 GB")
    with pytest.raises(UserError, match=r"^SPARSERAMP_CACHE_GB=20 GB: give a number of gigabytes$"):
        made_once("a model", "a", lambda folder: folder.mkdir())
    assert kept(copies) == set()
