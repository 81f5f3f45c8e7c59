"""What a block makes of its error and what it carries, against blocks called one by one.

python -m pytest tests/tasks/test_errors.py
"""

import math
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modalities.blocks import hidden_state
from tasks.errors import ErrorCurve
from tests.tasks.sweeps import PAUSES, TILTED, Batches, Loaded, kept, plain, sweep
from tests.tasks.test_sweep_toys import CALIBRATION, EVALUATION, Block, toy


def inputs_of_blocks(modality: Any, batches: Any) -> list[list[Any]]:
    """Per block, the arguments of every batch in the model as it stands."""
    found: list[list[Any]] = [[] for _ in modality.blocks]
    handles = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        for block, calls in zip(modality.blocks, found, strict=True)
    ]
    plain(modality, batches)
    for handle in handles:
        handle.remove()
    return found


def rows(modality: Any, index: int, calls: list[Any]) -> Tensor:
    """The block's outputs for some arguments, tokens x width."""
    with torch.no_grad():
        outputs = [hidden_state(modality.blocks[index].module(*a, **k)) for a, k in calls]
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in outputs]).double()


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_made_and_carried_equal_a_naive_computation(
    loaded: Loaded, batches: Batches, family: str, pause: Any
) -> None:
    modality = loaded(family)
    calibration, evaluation = batches(modality)
    dense_inputs = inputs_of_blocks(modality, evaluation)
    dense = [rows(modality, i, calls) for i, calls in enumerate(dense_inputs)]
    with kept(modality):
        errors = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at=pause,
            calibration=calibration,
            evaluation=evaluation,
            dense=True,
            keep=True,
        ).errors
        pruned_inputs = inputs_of_blocks(modality, evaluation)
        pruned = [rows(modality, i, calls) for i, calls in enumerate(pruned_inputs)]
    between = [rows(modality, i, calls) for i, calls in enumerate(pruned_inputs)]
    for error, true, mixed, now in zip(errors, dense, between, pruned, strict=True):
        made, carried = now - mixed, mixed - true
        assert error.made == pytest.approx(float(made.square().sum(1).mean()), rel=1e-5)
        expected = pytest.approx(float(carried.square().sum(1).mean()), rel=1e-5, abs=1e-12)
        assert error.carried == expected
        both = float(2 * (made * carried).sum(1).mean())
        assert error.cross == pytest.approx(both, rel=1e-4, abs=1e-9)
        whole = error.made + error.carried + error.cross
        assert error.absolute == pytest.approx(whole, rel=1e-6)
        assert error.damage == pytest.approx(float(made.square().sum() / true.square().sum()))
        assert error.made > 0
    assert (errors[0].carried, errors[0].cross, errors[0].gain) == (0.0, 0.0, 0.0)
    for before, error in pairwise(errors):
        assert error.gain == pytest.approx(math.sqrt(error.carried / before.absolute))
        assert error.gain > 0


def test_a_block_that_is_left_dense_makes_nothing(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    errors = sweep(
        modality,
        [0.0, 0.6, 0.0],
        method="wanda",
        pause_at="linear",
        calibration=calibration,
        evaluation=evaluation,
        dense=True,
    ).errors
    assert [error.made > 0 for error in errors] == [False, True, False]
    assert [error.carried > 0 for error in errors] == [False, False, True]
    assert errors[2].absolute == pytest.approx(errors[2].carried)
    assert errors[1].gain == 0 < errors[2].gain


class Writing(Block):
    """Writes to its argument: it may pass `linear` only, and must not see its own traces."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_a_block_that_writes_to_its_input_goes_through_with_a_copy(tmp_path: Path) -> None:
    modality = toy(tmp_path, Writing)
    options: Any = {
        "method": "wanda",
        "pause_at": "linear",
        "calibration": CALIBRATION,
        "evaluation": EVALUATION,
        "dense": True,
    }
    dense = plain(modality, EVALUATION)
    with kept(modality):
        outcome = sweep(modality, TILTED, keep=True, **options)
        assert outcome.losses == plain(modality, EVALUATION)
    assert outcome.dense_losses == dense
    for error in outcome.errors:
        assert error.absolute == pytest.approx(error.made + error.carried + error.cross, rel=1e-5)
    assert outcome.errors[0].carried == 0 < outcome.errors[1].carried


@pytest.mark.parametrize("limit", [math.inf, 0])
def test_what_was_compared_is_not_held(limit: float) -> None:
    curve = ErrorCurve(0, limit_bytes=limit)
    states = [torch.randn(1, 5, 4) for _ in range(3)]
    alive = [weakref.ref(state) for state in states]
    curve.dense(7, states[0])
    curve.carried(7, states[1])
    curve.pruned(7, states[2])
    states.clear()
    assert [ref() for ref in alive] == [None] * 3
    assert not curve._held
    error = curve.result(before=1.0)
    assert error.absolute == pytest.approx(error.made + error.carried + error.cross, rel=1e-6)
    assert error.gain == pytest.approx(math.sqrt(error.carried))
