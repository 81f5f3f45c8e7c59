"""A sweep that goes wrong says why on one line, and the next one finds the dense model.

python -m pytest tests/tasks/test_sweep_failures.py
"""

from typing import Any

import pytest
import torch

from tasks.pruning import METHODS
from tests.tasks.sweeps import PAUSES, TILTED, Batches, Loaded, plain, sweep


def poison(modality: Any, name: str, value: float) -> None:
    with torch.no_grad():
        modality.model.get_parameter(name).view(-1)[3] = value


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, value, cause",
    [
        ("mlp.up_proj.weight", float("nan"), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"),
        ("mlp.up_proj.weight", float("inf"), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"),
        ("input_layernorm.weight", float("nan"), "NaN|changed although it is not prunable"),
    ],
)
def test_a_failed_sweep_says_why_and_leaves_the_dense_model(
    loaded: Loaded, batches: Batches, method: str, pause: Any, name: str, value: float, cause: str
) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    dense = plain(modality, evaluation)
    poison(modality, f"model.layers.1.{name}", value)
    with pytest.raises(RuntimeError, match=cause) as failed:
        sweep(
            modality,
            TILTED,
            method=method,
            pause_at=pause,
            calibration=calibration,
            evaluation=evaluation,
        )
    assert "\n" not in str(failed.value)
    assert plain(modality, evaluation) == dense
    assert all("forward" not in block.module.__dict__ for block in modality.blocks)


def test_inputs_that_overflow_are_named(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    dense = plain(modality, evaluation)
    poison(modality, "model.layers.0.post_attention_layernorm.weight", float("inf"))
    with pytest.raises(RuntimeError, match=r"the inputs of model\.layers\.0\.mlp\.gate_proj"):
        sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at="linear",
            calibration=calibration,
            evaluation=evaluation,
        )
    assert plain(modality, evaluation) == dense


def test_a_loss_that_is_not_finite_fails_with_its_cause(loaded: Loaded, batches: Batches) -> None:
    """float16 overflows in the head: the logits of a model with a huge final norm."""

    modality = loaded("llama")
    _, evaluation = batches(modality)
    head = modality.model.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head.mul_(float("inf"))
    try:
        with pytest.raises(
            RuntimeError, match=r"the loss is nan: the dense model overflows|lm_head"
        ):
            sweep(
                modality,
                [0.0] * 3,
                method="magnitude",
                pause_at="linear",
                calibration=(),
                evaluation=evaluation,
            )
    finally:
        with torch.no_grad():
            head.copy_(before)


def test_something_changed_that_is_not_prunable_fails(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    _, evaluation = batches(modality)
    embedding = modality.model.get_input_embeddings().weight
    before = embedding.detach().clone()
    with torch.no_grad():
        embedding[7, 7] += 1
    try:
        with pytest.raises(RuntimeError, match=r"embed_tokens\.weight was changed although"):
            sweep(
                modality,
                TILTED,
                method="magnitude",
                pause_at="linear",
                calibration=(),
                evaluation=evaluation,
            )
    finally:
        with torch.no_grad():
            embedding.copy_(before)
