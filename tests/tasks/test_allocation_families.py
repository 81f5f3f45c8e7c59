"""Every allocation, whatever was measured: exact mean, legal rates, clamps counted.

python -m pytest tests/tasks/test_allocation_families.py
"""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.records import MatrixRecord
from infra.specs import PruneSpec
from tasks.allocation import (
    ALLOCATIONS,
    NOT_REPRODUCED,
    allocation_named,
    block_rates,
    bounds_of,
    check_rates,
    plan_of,
    rates_of,
    values_of,
    with_values,
)
from tasks.allocation.budget import MOST, fit, weighted_mean
from tasks.allocation.line import arithmetic_rates, bend_shape, beta_bounds

Matrices = list[MatrixRecord]


def records(*blocks: tuple[int, ...]) -> Matrices:
    return [
        MatrixRecord(block=b, matrix=f"m{i}", params=size)
        for b, sizes in enumerate(blocks)
        for i, size in enumerate(sizes)
    ]


def mean_of(matrices: Matrices, rates: list[float]) -> float:
    return weighted_mean(rates, [m.params for m in matrices])


models = st.lists(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=4).map(tuple), min_size=2, max_size=8
).map(lambda blocks: records(*blocks))
sparsities = st.just(0.0) | st.floats(0.001, 0.999)
RATES = ("global", "lamp", "neuronal")  # what these measure are rates already


def profile_of(data: st.DataObject, name: str, matrices: Matrices) -> list[float]:
    if ALLOCATIONS[name].measure is None:
        return []
    numbers = st.floats(0, 1)
    if name not in RATES:  # these measure on a scale of their own
        numbers = st.one_of(st.just(0.0), numbers, st.floats(1e-9, 1e9))
    return data.draw(st.lists(numbers, min_size=len(matrices), max_size=len(matrices)))


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), matrices=models, sparsity=sparsities)
def test_any_value_of_any_number_keeps_the_mean(
    name: str, data: st.DataObject, matrices: Matrices, sparsity: float
) -> None:
    profile = profile_of(data, name, matrices)
    prune = PruneSpec(sparsity=sparsity, allocation=name)
    bounds = bounds_of(prune, matrices)
    shares = {number: data.draw(st.floats(0.001, 0.999)) for number in bounds}
    values = {n: low + shares[n] * (high - low) for n, (low, high) in bounds.items()}
    plan = plan_of(with_values(prune, values), matrices, profile)
    assert len(plan.rates) == len(matrices)
    assert mean_of(matrices, plan.rates) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= rate < 1 for rate in plan.rates)
    if name not in ("arithmetic", "towers", *RATES):
        assert max(plan.rates) <= max(MOST, sparsity) + 1e-12
    assert 0 <= plan.clamped <= len(matrices)
    if plan.clamped:
        ends = (0.0, MOST, sparsity, min(MOST, sparsity + 0.1))
        assert any(abs(rate - end) < 1e-9 for rate in plan.rates for end in ends)


@pytest.mark.parametrize("name", ALLOCATIONS)
@given(matrices=models, sparsity=sparsities, level=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_blocks_that_do_not_differ_get_equal_rates(
    name: str, matrices: Matrices, sparsity: float, level: float
) -> None:
    """Also at the defaults of numbers that are not 0: nothing tells the blocks apart."""
    profile = [] if ALLOCATIONS[name].measure is None else [level] * len(matrices)
    if name == "ecoflap":  # a share of the gradient: larger matrices have more of it
        profile = [level * m.params for m in matrices]
    plan = plan_of(PruneSpec(sparsity=sparsity, allocation=name), matrices, profile)
    assert plan.rates == pytest.approx([sparsity] * len(matrices), abs=1e-9)


@given(
    st.lists(
        st.tuples(st.floats(-2, 3), st.floats(0, 5), st.integers(1, 9999)), min_size=1, max_size=30
    ),
    st.floats(0, MOST),
)
@settings(max_examples=60, deadline=None)
def test_fit(rows: list[tuple[float, float, int]], mean: float) -> None:
    start, slope, params = map(list, zip(*rows, strict=True))
    plan = fit(start, slope, params, mean)
    assert weighted_mean(plan.rates, params) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= rate <= MOST for rate in plan.rates)
    again = fit(plan.rates, [1.0] * len(params), params, mean)
    assert again.rates == pytest.approx(plan.rates, abs=1e-9)
    assert again.clamped == 0


def test_clamped_rates_are_counted_and_the_rest_shares_the_budget() -> None:
    plan = fit([-0.5, 0.5, 0.5], [1.0] * 3, [10, 10, 10], 0.5)
    assert plan.rates == pytest.approx([0, 0.75, 0.75])
    assert plan.clamped == 1
    plan = fit([0.0, 0.0, 0.0], [1.0, 1.0, 9.0], [10, 10, 20], 0.6)  # scaled
    assert plan.rates == pytest.approx([0.21, 0.21, 0.99])
    assert plan.clamped == 1
    # What does not move by itself takes up what the other cannot.
    assert fit([0.0, 0.0], [0.0, 1.0], [1, 1], 0.6).rates == pytest.approx([0.21, 0.99])


def test_published_formulas() -> None:
    matrices = records((50, 50), (100,), (60, 40))

    def rates(name: str, profile: list[float], **numbers: float) -> Any:
        prune = PruneSpec(sparsity=0.6, allocation=name, parameters=numbers)
        return block_rates(matrices, rates_of(prune, matrices, profile), 3)

    # keep: 0.2 * (1, 0, 0.5), mean 0.1, re-centred to 0.4
    assert rates("owl", [4, 4, 2, 3, 3], **{"lambda": 0.1}) == pytest.approx([0.5, 0.7, 0.6])
    # M = 1, 3, 2; importance 1, 0, 0.5; d = 0.2 * that
    assert rates("dlp", [1, 1, 3, 2, 2], alpha=0.1) == pytest.approx([0.5, 0.7, 0.6])
    # 0.8 + 0.4 * (0, 1, 0.5) = 0.8, 1.2, 1
    expected = [0.48, 0.72, 0.6]
    assert rates("alphapruning", [1, 3, 4, 3, 3], epsilon=0.2) == pytest.approx(expected)
    matrices = records((20,), (40,), (40,))
    # keep 40 in all, 30 of them by floor 0.3; 10 left by score 0, 1, 3
    assert rates("ecoflap", [0, 1, 3]) == pytest.approx([0.7, 0.7 - 0.0625, 0.7 - 0.1875])


def test_er_keeps_all_of_what_it_would_overfill() -> None:
    matrices = records((100, 10_000))
    prune = PruneSpec(sparsity=0.3, allocation="er")
    plan = plan_of(prune, matrices, [20 / 100, 200 / 10_000])
    assert plan.rates[0] == 0
    assert plan.clamped == 1
    prune = PruneSpec(sparsity=0.95, allocation="er")
    keep = [1 - rate for rate in rates_of(prune, matrices, [20 / 100, 200 / 10_000])]
    assert keep[0] / keep[1] == pytest.approx(10)


def test_bent_without_a_bend_is_a_line_and_bends_up_at_the_end() -> None:
    matrices = records(*[(100,)] * 10)
    line = rates_of(PruneSpec(sparsity=0.6, beta=0.03), matrices, ())
    bent = PruneSpec(sparsity=0.6, beta=0.03, allocation="bent")
    assert rates_of(bent, matrices, ()) == pytest.approx(line, abs=1e-12)
    rates = rates_of(with_values(bent, {"beta": 0.0, "bend": 0.2}), matrices, ())
    steps = [b - a for a, b in pairwise(rates)]
    assert steps == sorted(steps)
    assert steps[-1] > 3 * steps[1] > 0
    low, high = bounds_of(bent, matrices)["bend"]
    for edge in (low, high):
        rates = [0.6 + edge * q for q in bend_shape([100] * 10)]
        assert min(abs(min(rates)), abs(1 - max(rates))) < 1e-9
        assert all(-1e-9 <= rate <= 1 + 1e-9 for rate in rates)


def test_towers_have_a_line_each() -> None:
    pair = records((40,), (10, 10), (20,), (30,), (50,))
    matrices = [
        m.model_copy(update={"tower": "vision" if m.block < 3 else "language"}) for m in pair
    ]
    prune = PruneSpec(sparsity=0.5, allocation="towers")
    bounds = bounds_of(prune, matrices)
    assert bounds == {
        "beta_vision": beta_bounds([40, 20, 20], 0.5),
        "beta_language": beta_bounds([30, 50], 0.5),
    }
    for vision, language in ((0.2, -0.3), (-0.1, 0.0)):
        values = {"beta_vision": vision, "beta_language": language}
        rates = rates_of(with_values(prune, values), matrices, ())
        lines = block_rates(matrices, rates, 5)
        assert lines[:3] == pytest.approx(arithmetic_rates([40, 20, 20], 0.5, vision))
        assert lines[3:] == pytest.approx(arithmetic_rates([30, 50], 0.5, language))
    assert set(rates_of(prune, matrices, ())) == {0.5}
    with pytest.raises(UserError, match=r"beta_language=0.9 is too large for 2 blocks"):
        rates_of(with_values(prune, {"beta_language": 0.9}), matrices, ())
    # A model that is one tower has one number, and it is a line.
    line = prune.model_copy(update={"beta": 0.1})
    assert list(bounds_of(prune, pair)) == ["beta"]
    arithmetic = PruneSpec(sparsity=0.5, beta=0.1)
    assert rates_of(line, pair, ()) == rates_of(arithmetic, pair, ())


def test_free_has_a_number_for_every_block() -> None:
    matrices = records((10, 10), (20,), (20,))
    prune = PruneSpec(sparsity=0.5, allocation="free")
    assert bounds_of(prune, matrices) == {f"block_{i}": (-0.5, 0.5) for i in range(3)}
    moved = with_values(prune, {"block_0": -0.3, "block_1": 0.0, "block_2": 0.3})
    assert rates_of(moved, matrices, ()) == pytest.approx([0.2, 0.2, 0.5, 0.8])
    moved = with_values(prune, {"block_2": 0.3})
    assert rates_of(moved, matrices, ()) == pytest.approx([0.4, 0.4, 0.4, 0.7])


def test_numbers_of_a_spec() -> None:
    matrices = records((10,), (10,))
    assert bounds_of(PruneSpec(allocation="uniform"), matrices) == {}
    assert set(bounds_of(PruneSpec(), matrices)) == {"beta"}
    owl = PruneSpec(allocation="owl", sparsity=0.7, parameters={"M": 7.0})
    assert bounds_of(owl, matrices) == {"lambda": (0.0, pytest.approx(0.3))}
    assert values_of(owl, matrices) == {"lambda": 0.08, "M": 7.0}
    assert with_values(owl, {"lambda": 0.1}).parameters == {"M": 7.0, "lambda": 0.1}
    assert with_values(PruneSpec(allocation="bent"), {"beta": 0.1, "bend": 0.2}) == PruneSpec(
        allocation="bent", beta=0.1, parameters={"bend": 0.2}
    )


@pytest.mark.parametrize(
    "prune, message",
    [
        (
            PruneSpec(allocation="arithmetik"),
            "unknown prune.allocation='arithmetik': did you mean 'arithmetic'?",
        ),
        (
            PruneSpec(allocation="owl", parameters={"lamda": 0.1}),
            "prune.parameters.lamda: not a number of owl: did you mean 'lambda'?",
        ),
        (
            PruneSpec(allocation="uniform", parameters={"lambda": 0.1}),
            "prune.parameters.lambda: not a number of uniform: it has no numbers",
        ),
        (
            PruneSpec(parameters={"beta": 0.1}),
            "prune.parameters.beta: beta is a key of its own, set prune.beta",
        ),
        (
            PruneSpec(allocation="uniform", beta=0.01),
            "prune.beta=0.01: uniform has no beta; leave it out",
        ),
        (
            PruneSpec(beta=0.5),
            "beta=0.5 is too large for 3 blocks at sparsity 0.6: at most 0.39999",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    prune: PruneSpec, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_rates(prune, records((10,), (10,), (10,)))
    assert str(refused.value) == message


@pytest.mark.parametrize("name", NOT_REPRODUCED)
def test_what_is_not_reproduced_says_why(name: str) -> None:
    assert name not in ALLOCATIONS
    with pytest.raises(UserError, match=f"'{name}' is not reproduced: .*formula"):
        allocation_named(name)


def test_an_allocation_without_its_profile_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="owl measured 0 numbers for 2 matrices"):
        rates_of(PruneSpec(allocation="owl"), records((10,), (10,)), ())


def test_rates_of_blocks_are_weighted() -> None:
    matrices = records((30, 10), (5,))
    assert block_rates(matrices, [0.4, 0.8, 0.1], 3) == [pytest.approx(0.5), 0.1, 0.0]
