"""Checkpoints are looked at before anything is loaded: complete, safe, of a known kind.

python -m pytest tests/infra/test_checkpoints.py
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from infra.checkpoints import CheckpointLayout, check_safetensors, inspect_checkpoint
from infra.errors import UserError


def write_safetensors(path: Path, values: int = 4) -> Path:
    header = {"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * values))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(tmp_path / "model.safetensors")
    return tmp_path


def refused(path: Path, **options: bool) -> str:
    with pytest.raises(UserError) as error:
        inspect_checkpoint(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_and_a_file_in_it_are_the_same_checkpoint(folder: Path) -> None:
    expected = CheckpointLayout(folder)
    assert inspect_checkpoint(folder) == expected
    assert inspect_checkpoint(folder / "model.safetensors") == expected


def test_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert inspect_checkpoint(tmp_path / "a.gguf") == CheckpointLayout(tmp_path, gguf="a.gguf")
    assert inspect_checkpoint(tmp_path) == CheckpointLayout(tmp_path, gguf="a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path) == (
        f"{tmp_path} has no config.json: name a transformers checkpoint or a .gguf"
    )


def test_the_stamp_changes_with_the_files(folder: Path) -> None:
    layout = inspect_checkpoint(folder)
    before = layout.stamp()
    assert inspect_checkpoint(folder).stamp() == before
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert layout.stamp() != before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{x}",
        struct.pack("<Q", 9) + b'{"a": 12}',
        struct.pack("<Q", 15) + b'{"a":{"b": []}}',
        struct.pack("<Q", 23) + b'{"a":{"data_offsets":1}}'[:23],
        struct.pack("<Q", 2) + b"\xff\xfe",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        check_safetensors(file)
    assert str(error.value).startswith(f"{file} is truncated")
    assert str(error.value).endswith("fetch it again")


@pytest.mark.parametrize("change", [-1, 1])
def test_safetensors_of_another_length(folder: Path, change: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + b"x")
    promised = len(content)
    assert refused(folder) == (
        f"{file} is truncated: {promised + change} bytes, its header promises {promised}: "
        "fetch it again"
    )


def test_safetensors_without_tensors_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert check_safetensors(file) == {}


def test_an_index_names_what_must_be_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(folder / names[0])
    assert refused(folder) == f"weights are missing: {folder / names[1]}"
    write_safetensors(folder / names[1])
    assert inspect_checkpoint(folder) == CheckpointLayout(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged (no 'weight_map'): fetch it again" in refused(folder)


def test_pickles_need_consent(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"{folder} has pickled weights only (pytorch_model.bin), which can execute code: convert "
        "them to safetensors or set model.allow_pickle=true"
    )
    assert inspect_checkpoint(folder, allow_pickle=True).pickle
    write_safetensors(folder / "model.safetensors")
    assert not inspect_checkpoint(folder, allow_pickle=True).pickle  # the safe ones come first


def test_code_needs_consent(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text('{"model_type": "nobody-knows", "auto_map": {"AutoConfig": "x.X"}}')
    assert refused(folder) == (
        f"{folder} brings its own code (auto_map in config.json): set "
        "model.trust_remote_code=true to run it"
    )
    assert inspect_checkpoint(folder, trust_remote_code=True) == CheckpointLayout(folder)
    config.write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "x.X"}}')
    assert inspect_checkpoint(folder) == CheckpointLayout(folder)  # its code is not needed


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refused(folder).startswith(f"{folder / 'config.json'} is not ")


def test_nothing_there(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path) == f"{tmp_path} has no weights: expected *.safetensors or *.gguf"


def test_torch_is_not_imported(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from infra.checkpoints import inspect_checkpoint\n"
        "inspect_checkpoint(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, check=True)
