"""Copies are made once, stay while a process uses them, and go when they take too much room."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread
from typing import ClassVar

import pytest

from infra import cache
from infra.cache import let_go, made_once
from infra.errors import UserError

# Makes the copies that it is told, a line on its input before each, and holds them until that ends.
HOLDER = """
import sys
from pathlib import Path
from infra.cache import made_once
from infra.errors import UserError
def make(folder):
    print("makes", folder.stem, flush=True)
    sys.stdin.readline()
    folder.mkdir()
    if (Path(sys.argv[1]) / "fails").exists():
        raise OSError("it fails")
    (folder / "weights").write_bytes(bytes(400_000))
for key in sys.argv[2:]:
    try:
        made_once("a model", key, make)
    except UserError as error:
        print(error, flush=True)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSERAMP_CACHE_GB", "0.001")  # two copies
    yield tmp_path / "copies"
    let_go()
    for process in Holder.processes:  # of a test that failed
        process.kill()
    Holder.processes.clear()


class Holder:
    """Another process."""

    processes: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, *keys: str) -> None:
        command = [sys.executable, "-c", HOLDER, os.environ["SPARSERAMP_CACHE"], *keys]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.processes.append(self.process)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "it has crashed"
        return line

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def made(self) -> list[str]:
        """What it makes until it has all that it was told."""
        made = []
        while (line := self.line()) != "ready":
            made.append(line.removeprefix("makes "))
            self.go_on()
        return made

    def end(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


@contextmanager
def holding(*keys: str) -> Iterator[list[str]]:
    """What another process made, which holds its copies meanwhile."""
    holder = Holder(*keys)
    yield holder.made()
    holder.end()


def used(*keys: str) -> list[str]:
    """What a process made that has ended."""
    with holding(*keys) as made:
        return made


def make(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(400_000))


def kept(copies: Path) -> set[str]:
    return {path.name for path in copies.iterdir() if path.is_dir()}


def test_what_was_not_used_for_longest_goes(copies: Path) -> None:
    assert used("a") == ["a"]
    assert used("b") == ["b"]
    assert used("a") == []
    used("c")
    assert kept(copies) == {"a", "c"}
    assert used("b") == ["b"]


def test_what_a_process_holds_stays(copies: Path) -> None:
    with holding("a"), holding("b", "c"):
        used("d")
        assert kept(copies) == {"a", "b", "c", "d"}
    used("e")
    assert kept(copies) == {"d", "e"}


def test_what_a_process_has_let_go_of_goes(copies: Path) -> None:
    for key in "abcd":
        made_once("a model", key, make)
    assert kept(copies) == set("abcd")
    let_go()
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


def test_many_at_once_make_it_once(copies: Path) -> None:
    holders = [Holder("a") for _ in range(3)]
    (said, *_), _, _ = select.select([holder.process.stdout for holder in holders], [], [])
    maker = next(holder for holder in holders if holder.process.stdout is said)
    assert maker.line() == "makes a"
    for other in (holder for holder in holders if holder is not maker):
        with pytest.raises(subprocess.TimeoutExpired):  # it waits
            other.process.wait(0.5)
    maker.go_on()
    assert [holder.line() for holder in holders] == ["ready"] * 3
    for holder in holders:
        holder.end()
    assert kept(copies) == {"a"}


def test_threads_at_once_make_it_once() -> None:
    made, both = [], Barrier(2)

    def slowly(folder: Path) -> None:
        made.append(folder)
        make(folder)

    def ask() -> None:
        both.wait()
        made_once("a model", "a", slowly)

    threads = [Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_who_waits_makes_it_where_another_failed(copies: Path, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    first = Holder("a")
    assert first.line() == "makes a"
    second = Holder("a")
    first.go_on()
    assert first.line().startswith(f"cannot keep a model in {tmp_path}: it fails: make room")
    (tmp_path / "fails").unlink()
    assert second.made() == ["a"]  # while the first lives
    assert kept(copies) == {"a"}
    first.end()
    second.end()


def test_what_a_killed_process_left_is_made_again(copies: Path) -> None:
    holder = Holder("a", "b")
    assert holder.line() == "makes a"
    holder.go_on()
    assert holder.line() == "makes b"
    (copies / "b.making").mkdir()
    (copies / "b.making" / "left").touch()
    holder.process.send_signal(signal.SIGKILL)
    holder.process.communicate()
    assert used("a", "b") == ["b"]
    assert kept(copies) == {"a", "b"}
    assert [path.name for path in (copies / "b").iterdir()] == ["weights"]


def test_what_was_half_made_counts_and_goes(copies: Path) -> None:
    used("a")
    (copies / "a").rename(copies / "a.making")
    used("b", "c")
    assert kept(copies) == {"b", "c"}


def test_half_a_removed_copy_is_none(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def killed(folder: Path, **_: object) -> None:
        if folder.exists():
            raise KilledError

    used("a")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shutil, "rmtree", killed)
        cache._remove(copies / "a")
    assert used("a") == ["a"]


def test_a_full_disk_is_emptied_of_copies_first(copies: Path) -> None:
    used("a")

    def full(folder: Path) -> None:
        make(folder)
        if (copies / "a").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    made_once("a model", "b", full)
    assert kept(copies) == {"b"}
    with pytest.raises(UserError, match=f"cannot keep a model in {copies.parent}: no luck"):
        made_once("a model", "c", lambda folder: (_ for _ in ()).throw(OSError("no luck")))
    assert kept(copies) == {"b"}


def test_a_copy_that_was_removed_by_hand_is_made_again(copies: Path) -> None:
    folder = made_once("a model", "a", make)
    shutil.rmtree(copies)
    assert made_once("a model", "a", make) == folder
    assert kept(copies) == {"a"}


def test_asking_again_opens_nothing_more() -> None:
    made_once("a model", "a", make)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    made_once("a model", "a", make)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


@pytest.mark.parametrize("stated", ["20 GB", "-1", "nan"])
def test_a_bound_that_is_no_number(
    stated: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE_GB", stated)
    with pytest.raises(UserError, match=f"^SPARSERAMP_CACHE_GB={stated}: give a number of gig"):
        made_once("a model", "a", make)
    assert kept(copies) == set()
