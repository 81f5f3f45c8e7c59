"""One sweep prunes and evaluates: bit for bit what a plain forward of the pruned model gives.

python -m pytest tests/tasks/test_sweep.py
"""

from typing import Any

import pytest
import torch

from infra.sources import sha256_of
from modalities.base import Batch
from tasks.pruning import METHODS
from tests.models import FAMILIES
from tests.tasks.layers import only_masks
from tests.tasks.sweeps import (
    PAUSES,
    TILTED,
    Batches,
    Loaded,
    check_untouched,
    check_zeros,
    kept,
    plain,
    rates_of,
    sweep,
    weights,
)

CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if method == "wanda" or family in ("llama", "mixtral", "gpt2")
]


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("family, method", CASES)
def test_a_sweep_gives_what_a_plain_forward_of_the_pruned_model_gives(
    loaded: Loaded, batches: Batches, family: str, method: str, pause: Any
) -> None:
    modality = loaded(family)
    calibration, evaluation = batches(modality)
    before, dense = weights(modality), plain(modality, evaluation)
    rates = rates_of(modality, 0.04)
    options: Any = {
        "method": method,
        "pause_at": pause,
        "calibration": calibration,
        "evaluation": evaluation,
    }
    with kept(modality):
        outcome = sweep(modality, rates, keep=True, **options)
        assert outcome.losses == plain(modality, evaluation)  # bit for bit
        check_zeros(modality, outcome, rates)
        check_untouched(modality, before, updated=not only_masks(method))
    assert plain(modality, evaluation) == dense
    assert outcome.losses != dense
    again = sweep(modality, rates, dense=True, **options)
    assert again.losses == outcome.losses
    assert again.dense_losses == dense
    assert again.matrices == outcome.matrices
    assert plain(modality, evaluation) == dense


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "deepseek-v3", "gpt-oss", "jamba"])
def test_bit_for_bit_in_bfloat16_too(loaded: Loaded, batches: Batches, family: str) -> None:
    modality = loaded(family, "bfloat16")
    calibration, evaluation = batches(modality)
    for pause in PAUSES:
        with kept(modality):
            outcome = sweep(
                modality,
                rates_of(modality),
                method="wanda",
                pause_at=pause,
                calibration=calibration,
                evaluation=evaluation,
                keep=True,
            )
            assert outcome.losses == plain(modality, evaluation)
            check_zeros(modality, outcome, rates_of(modality))


def test_rates_of_zero_prune_nothing(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    outcome = sweep(
        modality,
        [0.0] * 3,
        method="wanda",
        pause_at="linear",
        calibration=calibration,
        evaluation=evaluation,
        dense=True,
    )
    assert outcome.losses == outcome.dense_losses == plain(modality, evaluation)
    assert outcome.matrices == []
    assert [error.absolute for error in outcome.errors] == [0.0] * 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek-v3", "jamba"])
def test_uniform_and_tilted_have_equally_many_zeros(
    loaded: Loaded, batches: Batches, family: str
) -> None:
    """Blocks of different sizes too: one dense block, then mixtures."""
    modality = loaded(family)
    calibration, _ = batches(modality)
    totals = []
    for beta in (0.0, 0.11, -0.07):
        outcome = sweep(
            modality,
            rates_of(modality, beta, 0.63),
            method="wanda",
            pause_at="linear",
            calibration=calibration,
            evaluation=(),
        )
        totals.append(sum(matrix.zeros for matrix in outcome.matrices))
    params = sum(modality.record("").block_params())
    assert totals == [round(0.63 * params)] * 3


def test_block_and_linear_differ(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    masks = []
    for pause in PAUSES:
        with kept(modality):
            sweep(
                modality,
                TILTED,
                method="wanda",
                pause_at=pause,
                calibration=calibration,
                evaluation=evaluation,
                keep=True,
            )
            masks.append({n: p == 0 for n, p in weights(modality).items()})
    first, later = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    assert torch.equal(masks[0][first], masks[1][first])  # the same inputs
    assert not torch.equal(masks[0][later], masks[1][later])


def test_more_passes_cost_more_tokens(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    seen, measured = (sum(b.tokens for b in group) for group in (calibration, evaluation))
    for pause, passes in (("block", 2), ("linear", 1)):
        outcome = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at=pause,  # type: ignore[arg-type]
            calibration=calibration,
            evaluation=evaluation,
        )
        assert outcome.token_passes == passes * seen + measured
    riding = sweep(
        modality,
        TILTED,
        method="wanda",
        pause_at="linear",
        calibration=calibration,
        evaluation=evaluation,
        dense=True,
    )
    assert riding.token_passes == seen + 3 * measured  # dense, dense on the pruned input, pruned


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("pause", PAUSES)
def test_an_expert_that_saw_no_token_falls_back_to_magnitude_and_is_named(
    loaded: Loaded, text: Any, family: str, pause: Any
) -> None:
    modality = loaded(family)
    one = Batch(torch.tensor([[5]]), (0,))  # one token reaches two of the four experts
    options: Any = {"pause_at": pause, "calibration": [one], "evaluation": (), "keep": True}
    with kept(modality):
        outcome = sweep(modality, TILTED, method="wanda", **options)
        wanda = weights(modality)
    experts = [
        f"{block.name}.{matrix.name}"
        for block in modality.blocks
        for matrix in block.matrices
        if matrix.expert is not None
    ]
    assert len(outcome.fallbacks) == len(experts) / 2 == 12
    assert set(outcome.fallbacks) < set(experts)
    with kept(modality):
        without = sweep(modality, TILTED, method="magnitude", **options)
        magnitude = weights(modality)
    assert without.fallbacks == []
    for name in experts:
        parameter, _, expert = name.partition("[")
        index = int(expert.rstrip("]"))
        same = torch.equal(wanda[parameter][index], magnitude[parameter][index])
        assert same == (name in outcome.fallbacks), name


def test_the_file_stays_as_it_was(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    before = sha256_of(modality.weights.path)
    with kept(modality):
        sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at="block",
            calibration=calibration,
            evaluation=evaluation,
            keep=True,
        )
        assert sha256_of(modality.weights.path) == before


@pytest.mark.parametrize("pause", PAUSES)
def test_one_block_at_a_time_has_weights_of_its_own(
    loaded: Loaded, batches: Batches, monkeypatch: pytest.MonkeyPatch, pause: Any
) -> None:
    """A search trial drops each pruned block once every batch has passed it."""
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    dense = {f"{b.name}.{m.name}": m.weight().clone() for b in modality.blocks for m in b.matrices}
    seen: list[list[int]] = []
    check = modality.check_untouched

    def pruned_blocks(index: int | None) -> None:
        """Called when all batches have passed block `index`, and at the end."""
        seen.append(
            [
                number
                for number, block in enumerate(modality.blocks)
                if any(
                    not torch.equal(m.weight(), dense[f"{block.name}.{m.name}"])
                    for m in block.matrices
                )
            ]
        )
        check(index)

    monkeypatch.setattr(modality, "check_untouched", pruned_blocks)
    sweep(
        modality,
        TILTED,
        method="wanda",
        pause_at=pause,
        calibration=calibration,
        evaluation=evaluation,
    )
    assert seen == [[0], [1], [2], []]
