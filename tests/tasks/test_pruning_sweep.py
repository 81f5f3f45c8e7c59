"""Every method inside a sweep: what it is given there, its patterns, and what is reported.

python -m pytest tests/tasks/test_pruning_sweep.py
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from modalities.base import Batch
from tasks.allocation import zeros_per_matrix
from tasks.gradients import matrix_gradients
from tasks.pruning import METHODS, prune_in_place
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget
from tasks.sweep import Outcome
from tests.tasks.sweeps import (
    PAUSES,
    TILTED,
    Batches,
    Loaded,
    kept,
    plain,
    rates_of,
    sweep,
    weights,
)


def swept(
    modality: Any, calibration: list[Batch], method: str, pause: Any, **options: Any
) -> Outcome:
    given: dict[str, Any] = {"rates": TILTED, "evaluation": (), "keep": True} | options
    return sweep(modality, method=method, pause_at=pause, calibration=calibration, **given)


def naive(modality: Any, batches: list[Batch], method: str, pause: str) -> None:
    """Prune a model whose matrices are all modules, with hooks and whole forwards."""
    records = modality.matrices()
    zeros = iter(zeros_per_matrix([TILTED[r.block] for r in records], [r.params for r in records]))
    gradients = matrix_gradients(modality, batches)

    def captured(modules: list[nn.Module]) -> dict[nn.Module, InputStatistics]:
        found = {module: InputStatistics({"norms", "moments", "gram"}) for module in modules}

        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            found[module].add(args[0].reshape(-1, args[0].shape[-1]))

        handles = [module.register_forward_pre_hook(hook) for module in modules]
        with torch.no_grad():
            for batch in batches:
                modality.run(batch)
        for handle in handles:
            handle.remove()
        return found

    for block in modality.blocks:
        modules = {
            matrix: block.module.get_submodule(matrix.parameter.removesuffix(".weight"))
            for matrix in block.matrices
        }
        found = captured(list(modules.values())) if pause == "block" else {}
        for matrix, module in modules.items():
            statistics = found.get(module) or captured([module])[module]
            statistics.gradient = gradients[matrix]
            prune_in_place(matrix.weight(), statistics, method=method, budget=Budget(next(zeros)))


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_equals_a_naive_loop(
    loaded: Loaded, batches: Batches, method: str, pause: Any
) -> None:
    modality = loaded("llama")
    calibration, evaluation = batches(modality)
    with kept(modality):
        naive(modality, calibration, method, pause)
        expected, losses = weights(modality), plain(modality, evaluation)
    with kept(modality):
        outcome = swept(modality, calibration, method, pause, evaluation=evaluation)
        # Sums in another order choose another weight now and then where two are nearly equal.
        same = [(p == 0) == (expected[n] == 0) for n, p in weights(modality).items()]
    assert sum(int(s.sum()) for s in same) >= 0.999 * sum(s.numel() for s in same)
    assert outcome.losses == pytest.approx(losses, rel=5e-3)
    assert outcome.fallbacks == outcome.notes == []


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "N:8", "N:4"])
@pytest.mark.parametrize("family, method", [("llama", m) for m in METHODS] + [("mixtral", "wanda")])
def test_patterns(loaded: Loaded, batches: Batches, family: str, method: str, pattern: str) -> None:
    """Every group of every matrix, and the average of a mixed pattern over unequal rates."""
    modality = loaded(family)
    calibration, _ = batches(modality)
    rates = rates_of(modality, 0.13 if pattern[0] == "N" else 0.0, 0.5)
    size = int(pattern[-1])
    for pause in PAUSES:
        with kept(modality):
            outcome = swept(modality, calibration, method, pause, rates=rates, pattern=pattern)
            total = 0
            for index, block in enumerate(modality.blocks):
                counts = {
                    int(count)
                    for matrix in block.matrices
                    for count in (matrix.weight() == 0).reshape(-1, size).sum(1)
                }
                assert len(counts) == 1
                total += counts.pop()
                if pattern[0] == "N":
                    assert abs(total - size * sum(rates[: index + 1])) < 1
        assert total == 0.5 * size * len(rates)
        assert sum(m.zeros for m in outcome.matrices) == sum(m.params for m in outcome.matrices) / 2


def test_patterns_that_do_not_fit_are_refused(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, _ = batches(modality)
    with pytest.raises(UserError, match=r"2:4 makes 0\.5 of every matrix zero, not 0\.4"):
        swept(modality, calibration, "wanda", "block", pattern="2:4")
    with pytest.raises(UserError, match=r"q_proj\.weight of block 0 has 32 inputs, which groups"):
        swept(modality, calibration, "wanda", "block", pattern="N:7")
    with pytest.raises(UserError, match=r"unknown prune\.method='sparsegtp': did you mean"):
        swept(modality, calibration, "sparsegtp", "block")


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("pause", PAUSES)
def test_a_hessian_that_had_to_be_damped_is_reported(
    loaded: Loaded, batches: Batches, monkeypatch: pytest.MonkeyPatch, method: str, pause: Any
) -> None:
    """One window has fewer tokens than there are inputs: singular, were it not for damping."""
    modality = loaded("llama")
    calibration, _ = batches(modality)
    monkeypatch.setattr("tasks.pruning.inputs.DAMPING", 1e-12)
    with kept(modality):
        outcome = swept(modality, [Batch(calibration[0].ids[:1], (0,))], method, pause)
        assert all(bool(torch.isfinite(p).all()) for p in weights(modality).values())
    assert outcome.notes
    assert all(": Hessian not positive definite: damped by " in note for note in outcome.notes)
    assert outcome.notes[0].startswith("model.layers.0.self_attn.q_proj.weight: ")


@pytest.mark.parametrize("method", ["sparsegpt", "dsnot", "alps", "pruner-zero"])
@pytest.mark.parametrize("pause", PAUSES)
def test_experts_without_tokens_fall_back_and_are_named(
    loaded: Loaded, method: str, pause: Any
) -> None:
    modality = loaded("mixtral")
    two = Batch(torch.tensor([[5, 5]]), (0,))  # both tokens reach the same two of four experts
    with kept(modality):
        outcome = swept(modality, [two], method, pause)
        gone = weights(modality)
    with kept(modality):
        swept(modality, [two], "magnitude", pause)
        magnitude = weights(modality)
    # Two equal tokens give queries and keys no gradient either, but for rounding.
    experts = [name for name in outcome.fallbacks if name.endswith("]")]
    assert len(experts) >= 6
    for name in experts:
        parameter, _, expert = name.partition("[")
        index = int(expert.rstrip("]"))
        assert torch.equal(gone[parameter][index], magnitude[parameter][index]), name


@pytest.mark.parametrize("pause", PAUSES)
def test_hessians_of_a_block_are_freed_before_the_next(
    loaded: Loaded, batches: Batches, monkeypatch: pytest.MonkeyPatch, pause: Any
) -> None:
    modality = loaded("llama")
    calibration, _ = batches(modality)
    alive: list[int] = []
    check = modality.check_untouched

    def count(index: int | None) -> None:
        """Called when all batches have passed a block, and at the end."""
        known = (x for x in gc.get_objects() if type(x) is InputStatistics)
        alive.append(sum(x._gram is not None for x in known))
        check(index)

    monkeypatch.setattr(modality, "check_untouched", count)
    gc.collect()  # what other tests left
    swept(modality, calibration, "sparsegpt", pause, keep=False)
    assert alive == [0] * 4


def test_routers_stay(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("mixtral")
    calibration, _ = batches(modality)
    before = weights(modality)
    with kept(modality):
        swept(modality, calibration, "sparsegpt", "linear")
        after = weights(modality)
    routers = [name for name in before if "gate.weight" in name]
    assert len(routers) == 3
    assert all(torch.equal(before[name], after[name]) for name in routers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_gradients_equal_those_of_plain_autograd(loaded: Loaded, family: str) -> None:
    """Squared window by window, of what is stored transposed or fused too; all is put back."""
    modality = loaded(family)
    ids = torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(0))
    before, flags = weights(modality), [p.requires_grad for p in modality.model.parameters()]
    found = matrix_gradients(modality, [Batch(ids[:2], (0, 0)), Batch(ids[2:], (0,))])
    assert [p.requires_grad for p in modality.model.parameters()] == flags
    assert all(torch.equal(p, before[n]) for n, p in modality.model.named_parameters())
    assert all(p.grad is None for p in modality.model.parameters())
    names = [(b, m, f"{b.name}.{m.parameter}") for b in modality.blocks for m in b.matrices]
    squares = {name: torch.zeros_like(before[name]) for _, _, name in names}
    for row in ids:
        modality.model.requires_grad_(True)
        modality.model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for name in squares:
            grad = modality.model.get_parameter(name).grad
            squares[name] += grad.square() if grad is not None else 0
        modality.model.zero_grad()
        modality.model.requires_grad_(False)
    assert len(found) == len(names)
    for _, matrix, name in names:
        expected = matrix.of(squares[name].sqrt())
        assert found[matrix].shape == matrix.weight().shape
        torch.testing.assert_close(found[matrix], expected, rtol=1e-3, atol=1e-7)


def test_no_gradients_where_a_modality_gives_none(loaded: Loaded, batches: Batches) -> None:
    modality = loaded("llama")
    calibration, _ = batches(modality)

    class Silent(type(modality)):  # type: ignore[misc]
        """A modality that only measures."""

        window_losses: Callable[..., Any] = type(modality).__mro__[1].window_losses

    silent = Silent.__new__(Silent)
    silent.__dict__.update(modality.__dict__)
    with pytest.raises(UserError, match=r"Silent gives no gradients: use another prune\.method"):
        swept(silent, calibration, "pruner-zero", "block")
    assert all(p.grad is None and not p.requires_grad for p in modality.model.parameters())


@pytest.mark.parametrize("pause, passes", [("block", 6), ("linear", 5)])
def test_a_gradient_costs_four_passes(
    loaded: Loaded, batches: Batches, pause: Any, passes: int
) -> None:
    modality = loaded("llama")
    calibration, _ = batches(modality)
    outcome = swept(modality, calibration, "pruner-zero", pause, keep=False)
    assert outcome.token_passes == passes * sum(batch.tokens for batch in calibration)
