"""Tiny models on their mapped weights, loaded once for all tests of a process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from infra.specs import CalibrationSpec, DataSpec
from tests.models import load, write_checkpoint, write_text


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost tiny products more than they save: tenfold where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converted checkpoints go into a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SPARSERAMP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Text for all three splits."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def loaded(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`loaded("llama")`: the family's model, the same object every time."""
    models: dict[tuple[str, str], Any] = {}

    def get(family: str, dtype: Any = "float32") -> Any:
        if (family, dtype) not in models:
            folder = write_checkpoint(family, tmp_path_factory.mktemp("models") / family)
            models[family, dtype] = load(folder, dtype)
        return models[family, dtype]

    return get


@pytest.fixture(scope="session")
def batches(text: DataSpec) -> Callable[..., Any]:
    """Calibration and evaluation batches of several shapes."""

    def get(modality: Any) -> tuple[list[Any], list[Any]]:
        calibration = [
            batch
            for samples, length in ((3, 20), (1, 33))
            for batch in modality.calibration_batches(
                text, CalibrationSpec(samples=samples, length=length)
            )
        ]
        evaluation = [
            batch
            for windows, context in ((2, 24), (1, 17))
            for batch in modality.evaluation_batches(text, "selection", windows, context)
        ]
        return calibration, evaluation

    return get
