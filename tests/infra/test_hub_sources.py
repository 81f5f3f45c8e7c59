"""Sources on the hub, which is served on 127.0.0.1.

python -m pytest tests/infra/test_hub_sources.py
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from infra.errors import UserError
from infra.hub import from_hub, listing_of
from infra.sources import fetch, pinned
from tests.infra.served import COMMIT, Server, names, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub without repositories and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget()
    with serving(tmp_path, monkeypatch) as server:
        yield server


def forget() -> None:
    """As a process that has just begun."""
    from_hub.cache_clear()
    listing_of.cache_clear()


def put_repository(server: Server, api: str, name: str, files: dict[str, bytes]) -> None:
    """Serve a repository; `api` is `models` or `datasets`."""
    about = {"id": name, "_id": "0", "sha": COMMIT, "siblings": [], "tags": []}
    tree = [
        {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        for path, body in files.items()
    ]
    for revision in ("main", "v2", COMMIT):
        server.files[f"/api/{api}/{name}/revision/{revision}"] = json.dumps(about).encode()
        server.files[f"/api/{api}/{name}/tree/{revision}"] = json.dumps(tree).encode()
    prefix = "/datasets" if api == "datasets" else ""
    for path, body in files.items():
        server.files[f"{prefix}/{name}/resolve/{COMMIT}/{path}"] = body


MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"safe",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
    "model.Q4.gguf": b"GGUF",
}


def test_a_model_of_the_hub_comes_without_pickles_and_copies(hub: Server, tmp_path: Path) -> None:
    put_repository(hub, "models", "org/tiny", MODEL)
    config = {"config.json", "tokenizer.json"}
    assert names(fetch("org/tiny", "tokenizer")) == config
    assert names(fetch("org/tiny")) == config | {"model.safetensors"}
    assert fetch("org/tiny:model.Q4.gguf").read_bytes() == b"GGUF"
    assert names(fetch("org/tiny:original")) == {"model.safetensors"}
    with pytest.raises(UserError, match=r"holds no pytorch_model\.bin of a kind that may be"):
        fetch("org/tiny:pytorch_model.bin")
    with_pickles = fetch("org/tiny", allow_pickle=True)
    assert names(with_pickles) >= {"model.safetensors", "pytorch_model.bin"}


def test_a_model_of_the_hub_is_cached_and_pinned(hub: Server) -> None:
    put_repository(hub, "models", "org/tiny", MODEL)
    folder = fetch("org/tiny@v2")
    source = pinned("org/tiny@v2")
    assert source == f"org/tiny@{COMMIT}"
    assert pinned("org/tiny:model.Q4.gguf") == f"org/tiny@{COMMIT}:model.Q4.gguf"
    hub.asked.clear()
    assert fetch(source) == folder
    assert hub.asked == []
    hub.shutdown()
    hub.server_close()
    forget()
    assert fetch("org/tiny@v2") == folder == fetch(source)


def test_a_data_set_of_the_hub(hub: Server) -> None:
    files = {"README.md": b"About", "a/train.jsonl": b'{"text": "x"}\n', "script.py": b"evil"}
    put_repository(hub, "datasets", "org/corpus", files)
    assert names(fetch("org/corpus", "dataset")) == {"a/train.jsonl"}
    assert names(fetch("org/corpus:a", "dataset")) == {"train.jsonl"}


def test_what_the_hub_refuses_is_said_on_one_line(hub: Server) -> None:
    put_repository(hub, "models", "org/gated", MODEL)
    for path in MODEL:
        hub.status[f"/org/gated/resolve/{COMMIT}/{path}"] = 403
    with pytest.raises(UserError, match="org/gated is gated: ask for access"):
        fetch("org/gated")
    with pytest.raises(UserError, match="org/nosuch: neither a file or folder here nor a model"):
        fetch("org/nosuch")
    put_repository(hub, "models", "org/tiny", {"notes.pdf": b""})
    with pytest.raises(UserError, match="org/tiny holds no file of a kind that may be loaded"):
        fetch("org/tiny")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=r"org/other: .* the hub cannot be reached"):
        fetch("org/other")
