"""Specs and trial results as a driver would have them, without a model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.records import BlockError, Cost, MatrixRecord, TrialResult, TrialSpec
from infra.spec_files import parse_spec
from infra.specs import Spec

BOUND = 0.0276


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., Spec]:
    """A spec whose run directory is `<tmp_path>/runs/tiny`; sections may be given."""

    def make(**sections: object) -> Spec:
        raw = {
            "model": {"source": "org/model"},
            "data": {"source": "text.txt"},
            "run": {"dir": str(tmp_path / "runs" / "tiny")},
        }
        return parse_spec(raw | sections, "test")

    return make


@pytest.fixture
def make_result(make_spec: Callable[..., Spec]) -> Callable[..., TrialResult]:
    """The result of a search trial with the given number and beta."""

    def make(
        number: int,
        beta: float = 0.0,
        loss: float = 4.5,
        state: str = "complete",
        rung: int = 0,
        **more: Any,
    ) -> TrialResult:
        spec = make_spec()
        trial = TrialSpec(
            number=number,
            stage="search",
            rung=rung,
            model=spec.model,
            data=spec.data,
            calibration=spec.calibration,
            prune=spec.prune.model_copy(update={"beta": beta}),
            split="selection",
            windows=2,
            context=512,
        )
        if state == "failed":
            return TrialResult(spec=trial, state="failed", cause="loss is NaN")
        complete = TrialResult(
            spec=trial,
            state="complete",
            tilt=beta / BOUND,
            losses=[loss - 0.1, loss + 0.1],
            tokens=[511, 511],
            bytes=[2000, 2000],
            block_rates=[0.55, 0.65],
            matrices=[MatrixRecord(block=0, matrix="q_proj", params=100, rate=0.55, zeros=55)],
            errors=[
                BlockError(block=b, absolute=1.0, relative=0.1 * b, cosine=0.9) for b in (0, 1)
            ],
            cost=Cost(sweep_s=12.5, total_s=13.0, token_passes=1000),
            host="node1",
            device="cpu",
        )
        return complete.model_copy(update=more)

    return make


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder beside its dense one; do not write to it."""
    from tests.infra.packed_folders import write_packed

    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(packed_once, tmp_path / "packed"))
