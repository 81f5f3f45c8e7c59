"""A cache of its own for every test, and one small checkpoint to copy from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.specs import DataSpec
from tests.models import write_checkpoint, write_text
from tests.tasks.conftest import one_thread

__all__ = ["one_thread"]  # tiny products here as well


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converted checkpoints go."""
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint; do not write to it."""
    return write_checkpoint("llama", tmp_path_factory.mktemp("original") / "llama")


@pytest.fixture
def copy(original: Path, tmp_path: Path, cache: Path) -> Callable[[], Path]:
    """`copy()`: the checkpoint in a folder that a test may spoil."""

    def make() -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(original, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Text for all three splits."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
