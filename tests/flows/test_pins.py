"""What a driver fetches of models on the hub before any trial: everything but the weights.

python -m pytest tests/flows/test_pins.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.pins import pin
from infra.errors import UserError
from infra.sources import fetch
from infra.specs import Spec
from tests.flows.test_plan import make_spec
from tests.infra.served import COMMIT, Server, names
from tests.infra.test_hub_sources import forget, hub, put_repository

__all__ = ["hub"]  # the fixture

CONFIG = json.dumps({"model_type": "llama"}).encode()
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}"}
WHOLE = SMALL | {"model.safetensors": b"weights", "original/model.safetensors": b"again"}


def spec_of(source: str, tmp_path: Path, **model: Any) -> Spec:
    (tmp_path / "text.txt").write_text("words")
    return make_spec(model={"source": source, **model}, data={"source": str(tmp_path / "text.txt")})


def downloaded(hub: Server) -> list[str]:
    """Names of the files that the hub has sent."""
    return sorted({path.rpartition("/")[2] for path, _ in hub.sent if "/resolve/" in path})


def test_weights_come_where_they_are_loaded(hub: Server, tmp_path: Path) -> None:
    put_repository(hub, "models", "org/tiny", WHOLE)
    source = pin(spec_of("org/tiny@v2", tmp_path)).model.source
    assert source == f"org/tiny@{COMMIT}"
    assert downloaded(hub) == sorted(SMALL)
    assert names(fetch(source)) == {*SMALL, "model.safetensors"}
    assert "model.safetensors" in downloaded(hub)


def test_one_file_of_the_hub_is_looked_up_only(hub: Server, tmp_path: Path) -> None:
    put_repository(hub, "models", "org/tiny", SMALL | {"a.gguf": b"GGUF", "in/config.json": CONFIG})
    assert pin(spec_of("org/tiny:a.gguf", tmp_path)).model.source == f"org/tiny@{COMMIT}:a.gguf"
    assert "a.gguf" not in downloaded(hub)
    with pytest.raises(UserError, match=r"org/tiny holds no b\.gguf of a kind that may be loaded"):
        pin(spec_of("org/tiny:b.gguf", tmp_path))
    with pytest.raises(UserError, match=r"in has no weights: expected"):
        pin(spec_of("org/tiny:in", tmp_path))


def test_what_must_not_be_loaded_is_refused_without_its_weights(
    hub: Server, tmp_path: Path
) -> None:
    pickled = SMALL | {"pytorch_model.bin": b"pickle"}
    put_repository(hub, "models", "org/pickled", pickled)
    with pytest.raises(UserError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        pin(spec_of("org/pickled", tmp_path))
    assert pin(spec_of("org/pickled", tmp_path, allow_pickle=True))
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
    shards = SMALL | {"model.safetensors.index.json": index, "1.safetensors": b"weights"}
    put_repository(hub, "models", "org/sharded", shards)
    with pytest.raises(UserError, match=r"weights are missing: .*2\.safetensors"):
        pin(spec_of("org/sharded", tmp_path))
    own = json.dumps({"model_type": "mine", "auto_map": {}}).encode()
    put_repository(hub, "models", "org/own", WHOLE | {"config.json": own})
    with pytest.raises(UserError, match="brings its own code"):
        pin(spec_of("org/own", tmp_path))
    assert not {"pytorch_model.bin", "1.safetensors", "model.safetensors"} & {*downloaded(hub)}


def test_a_model_in_the_cache_needs_no_hub(hub: Server, tmp_path: Path) -> None:
    put_repository(hub, "models", "org/tiny", WHOLE)
    fetch("org/tiny")
    hub.shutdown()
    hub.server_close()
    for lists in (True, False):  # earlier versions of the hub's library kept none
        forget()
        assert pin(spec_of("org/tiny", tmp_path)).model.source == f"org/tiny@{COMMIT}"
        if lists:
            for file in (tmp_path / "hub").rglob(f"{COMMIT}.json"):
                file.unlink()
