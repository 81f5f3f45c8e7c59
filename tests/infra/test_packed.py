"""Packed folders hold what was packed, and are refused where they are damaged.

python -m pytest tests/infra/test_packed.py
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from infra.checkpoints import inspect_checkpoint
from infra.errors import UserError
from infra.packed import MANIFEST, WEIGHTS, unpack
from tests.infra.packed_folders import (
    contents,
    joined,
    manifest_of,
    refused,
    rewrite,
    split,
    write_weights,
)


def test_the_format(packed_once: Path) -> None:
    """Against torch and the library, as another reader would."""
    dense = load_file(packed_once.parent / "dense" / "model.safetensors")
    stored = load_file(packed_once / WEIGHTS)
    facts = manifest_of(packed_once)["tensors"]
    assert set(stored) == {"a.bits", "a.values", "b.bits", "b.values", "norm", "table"}
    assert list(facts) == list(dense)
    for name in "ab":
        flat = dense[name].reshape(-1)
        kept = flat.view(torch.int32 if name == "a" else torch.int16) != 0
        bits = stored[f"{name}.bits"]
        assert len(bits) == -(-len(flat) // 8)
        assert [bool(bits[i // 8] >> i % 8 & 1) for i in range(len(flat))] == kept.tolist()
        view = torch.int32 if name == "a" else torch.int16
        assert torch.equal(stored[f"{name}.values"].view(view), flat[kept].view(view))
        assert facts[name]["num_nonzeros"] == int(kept.sum())
    for name, (shape, _, data) in contents(packed_once).items():
        assert shape == list(dense[name].shape)
        assert data == dense[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_unpacked_is_what_was_packed(packed_once: Path, tmp_path: Path) -> None:
    unpack(packed_once, tmp_path / "again")
    dense = packed_once.parent / "dense"
    first, second = (load_file(f / "model.safetensors") for f in (dense, tmp_path / "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        same = tensor.view(torch.uint8), second[name].view(torch.uint8)
        assert torch.equal(*same), name
    assert {f.name for f in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}


def test_a_packed_checkpoint_is_unpacked_once(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    layout = inspect_checkpoint(packed)
    assert layout.folder.is_relative_to(tmp_path / "cache")
    assert (layout.folder / "model.safetensors").is_file()
    stamp = layout.stamp()
    weights = (packed / WEIGHTS).rename(tmp_path / "weights")
    assert inspect_checkpoint(packed).stamp() == stamp
    (tmp_path / "cache").rename(tmp_path / "gone")
    weights.rename(packed / WEIGHTS)
    assert inspect_checkpoint(packed).stamp() == stamp  # what was made from it is found again
    (packed / WEIGHTS).unlink()
    (tmp_path / "cache").rename(tmp_path / "gone too")
    with pytest.raises(UserError, match="is missing"):
        inspect_checkpoint(packed)
    assert not any((tmp_path / "cache" / "copies").glob("*/"))


def test_a_flipped_bit_anywhere(packed: Path) -> None:
    """A damaged disk: the hash tells, whichever tensor it is in."""
    content = (packed / WEIGHTS).read_bytes()
    for place in range(0, len(content), 7):
        spoiled = bytearray(content)
        spoiled[place] ^= 16
        (packed / WEIGHTS).write_bytes(spoiled)
        assert WEIGHTS in refused(packed)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "config.json"])
def test_truncated_at_every_offset(packed: Path, name: str) -> None:
    content = (packed / name).read_bytes()
    for length in [*range(0, len(content), 5), len(content) - 1]:
        if name == WEIGHTS:
            write_weights(packed, content[:length])
        else:
            (packed / name).write_bytes(content[:length])
        assert name in refused(packed)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "config.json"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "dangling"])
def test_what_is_no_file(packed: Path, name: str, kind: str) -> None:
    (packed / name).unlink()
    if kind == "folder":
        (packed / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(packed / name)
    elif kind == "dangling":
        (packed / name).symlink_to(packed / "nowhere")
    assert name in refused(packed)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.integers(-2, 70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["F32", "BF16", "F16", "U8", "a.bits", "../x", "/x", "__metadata__"]),
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3)
)


def mutated(draw: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with one node replaced, removed, added or given another name."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["deeper"] * 4 + ["remove", "add", "rename"]))
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    if kind == "deeper":
        changed[key] = mutated(draw, tree[key])
    elif kind == "remove":
        del changed[key]
    elif isinstance(changed, list):
        changed.append(draw(VALUES))
    else:
        changed[draw(st.text(max_size=8))] = changed.pop(key) if kind == "rename" else draw(VALUES)
    return changed


FEW = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(data=st.data(), of_header=st.booleans())
def test_any_change_of_manifest_or_header_is_refused_or_harmless(
    packed_once: Path, tmp_path: Path, data: st.DataObject, of_header: bool
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(packed_once, folder, dirs_exist_ok=True)
    header, values = split(folder)
    if of_header:
        write_weights(folder, joined(mutated(data.draw, header), values))
    else:
        rewrite(folder, mutated(data.draw, manifest_of(folder)))
    try:
        found = contents(folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
        return
    # Another shape of as many elements is no contradiction of a bitmask: the model refuses it.
    assert [(n, t, d) for n, (_, t, d) in found.items()] == [
        (n, t, d) for n, (_, t, d) in contents(packed_once).items() if n in found
    ]
