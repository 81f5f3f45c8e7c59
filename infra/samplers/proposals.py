"""Which numbers to try next, by Optuna.

    bounds = {"beta": (-0.0276, 0.0276)}
    propose(sampler="auto", seed=0, wave=4, tried=4, count=4, bounds=bounds, history=history)

Proposals depend on the arguments alone, so that a resumed search proposes what the undisturbed one
would have. Optuna is imported only when it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from infra.errors import UserError, nearest

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler

# The first candidates, as tilts (beta over the bound on its side): uniform, two on the side where
# the best nearly always is, one on the other. tests/bench/samplers.py compares spreads.
FIRST_TILTS = (0.0, 0.25, 0.55, -0.25)
FIRST_SHARES = (0.0, 0.25, 0.55, 0.85)  # the same where uniform is the lowest value there is
PAPER_STEP = 0.002
GRID_STEPS = 10
_INSIDE = 0.999  # of the bounds, which gp likes to propose; 0 is uniform, and legal

Values = Mapping[str, float]
Bounds = Mapping[str, tuple[float, float]]
History = Sequence[tuple[Values, float | None]]


def propose(
    *, sampler: str, seed: int, wave: int, count: int, bounds: Bounds, history: History
) -> list[dict[str, float]]:
    """Values to try next, `count` of them (fewer once a grid is used up); uniform is all zeros.

    `history` holds values and loss (None: failed) of every earlier candidate, in number order;
    bounds are never proposed. `wave` is how many candidates every wave after the first has.
    `auto` is `bracket` for one number, `gp` for a few, `cmaes` for many.
    """
    if sampler == "auto":
        sampler = "bracket" if len(bounds) == 1 else "gp" if len(bounds) < 8 else "cmaes"
    if sampler not in (known := [*SAMPLERS, "cmaes", "grid"]):
        raise UserError(f"search.sampler={sampler!r} is unknown: {nearest(sampler, known)}")
    if len(bounds) > 1 and sampler in ("bracket", "grid"):
        raise UserError(
            f"search.sampler={sampler!r} searches one number, not {', '.join(bounds)}: use auto"
        )
    name, (low, high) = next(iter(bounds.items()))
    if sampler == "grid":
        tried = [values[name] for values, _ in history]
        return [{name: value} for value in grid(name, high) if value not in tried][:count]
    first = [dict.fromkeys(bounds, 0.0)]
    if len(bounds) == 1:
        tilts = FIRST_TILTS if low < 0 else FIRST_SHARES
        first = [{name: tilt * high if tilt >= 0 else -tilt * low} for tilt in tilts]
    first = first[len(history) : len(history) + count]
    if len(first) == count or (first and len(bounds) > 1):
        return first

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    bounds = {name: (_INSIDE * low, _INSIDE * high) for name, (low, high) in bounds.items()}
    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(*each) for name, each in bounds.items()
    }
    if sampler == "cmaes":
        return _replayed(bounds, space, seed, wave, count, history)
    study = optuna.create_study(sampler=SAMPLERS[sampler](_seed(seed, len(history))))
    for values, loss in history:
        study.add_trial(frozen(values, loss, bounds, {}))
    for values in first:  # running trials, which the sampler keeps away from
        study.enqueue_trial(values)
        study.ask(space)
    chance = optuna.create_study(sampler=SAMPLERS["random"](_seed(seed, len(history))))
    while len(first) < count:
        values = dict(study.ask(space).params)
        if values in first or any(values == earlier for earlier, _ in history):
            values = dict(chance.ask(space).params)  # gp keeps to a bound that it believes in
        first.append(values)
    return first


def _seed(seed: int, tried: int) -> int:
    return (seed * 1_000_003 + tried) % 2**32


def _replayed(
    bounds: Bounds,
    space: dict[str, optuna.distributions.BaseDistribution],
    seed: int,
    wave: int,
    count: int,
    history: History,
) -> list[dict[str, float]]:
    """CMA-ES has a state, which follows from the seed and the losses in the order they were told.

    It begins in the middle, and each wave after uniform is a generation.
    """
    import optuna

    study = optuna.create_study(
        sampler=optuna.samplers.CmaEsSampler(seed=seed, popsize=max(2, wave))
    )
    study.add_trial(  # of the same distributions, or none of what follows is taken for its kind
        optuna.trial.create_trial(params=dict(history[0][0]), distributions=space, value=0.0)
    )
    for start in range(1, len(history), wave):
        generation = history[start : start + wave]
        asked = [study.ask(space) for _ in generation]
        for trial, (_, loss) in zip(asked, generation, strict=True):
            failed = optuna.trial.TrialState.FAIL if loss is None else None
            study.tell(trial, loss, state=failed)
    return [dict(study.ask(space).params) for _ in range(count)]


def grid(name: str, high: float) -> list[float]:
    """Uniform, and for beta the published multiples of 0.002, else tenths of the bound."""
    if name != "beta":
        return [high * step / GRID_STEPS for step in range(GRID_STEPS)]
    betas = [0.0]
    while (beta := round(len(betas) * PAPER_STEP, 6)) < high * (1 - 1e-9):
        betas.append(beta)
    return betas


def _bracket(seed: int) -> BaseSampler:
    """A sampler for one parameter and a loss with one minimum; it needs no seed.

    The minimum lies between the neighbours of the best candidate so far. Of the gaps between
    candidates there, halve the one that is wide and near the vertex of the parabola through the
    best and its neighbours. Running and failed candidates divide gaps too, so that the candidates
    of a wave differ and nothing is tried twice.
    """
    import optuna
    from optuna.trial import TrialState

    class Bracket(optuna.samplers.BaseSampler):
        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, optuna.distributions.BaseDistribution]:
            return {}

        def sample_relative(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            search_space: dict[str, optuna.distributions.BaseDistribution],
        ) -> dict[str, float]:
            return {}

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: optuna.distributions.BaseDistribution,
        ) -> float:
            assert isinstance(param_distribution, optuna.distributions.FloatDistribution)
            low, high = param_distribution.low, param_distribution.high
            others = [t for t in study.get_trials(deepcopy=False) if param_name in t.params]
            complete = [t for t in others if t.state == TrialState.COMPLETE]
            points = sorted((t.params[param_name], t.values[0]) for t in complete)
            left, right, centre = low, high, high / 3
            if points:
                i = min(range(len(points)), key=lambda k: points[k][1])
                centre = points[i][0]
                left = points[i - 1][0] if i > 0 else low
                right = points[i + 1][0] if i + 1 < len(points) else high
                if 0 < i < len(points) - 1:
                    centre = _vertex(*points[i - 1], *points[i], *points[i + 1])
            inside = {t.params[param_name] for t in others if left < t.params[param_name] < right}
            edges = sorted({left, right} | inside)
            nearness = 0.1 * (right - left)
            a, b = max(
                itertools.pairwise(edges),
                key=lambda gap: (gap[1] - gap[0]) / (abs(sum(gap) / 2 - centre) + nearness),
            )
            return float(a + b) / 2

    return Bracket()


def _vertex(x0: float, y0: float, x1: float, y1: float, x2: float, y2: float) -> float:
    """Where the parabola through three points, the middle one lowest, has its minimum."""
    a, b = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if a == b:
        return x1
    return x1 - 0.5 * ((x1 - x0) * a - (x1 - x2) * b) / (a - b)


def _tpe(seed: int) -> BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, constant_liar=True)


def _gp(seed: int) -> BaseSampler:
    """Imports torch, which adds 1.5 s and 530 MB to the driver."""
    import optuna

    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=3)


def _random(seed: int) -> BaseSampler:
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "bracket": _bracket,
    "tpe": _tpe,
    "gp": _gp,
    "random": _random,
}


def frozen(
    values: Values, loss: float | None, bounds: Bounds, attrs: dict[str, float]
) -> optuna.trial.FrozenTrial:
    """A candidate that has ended, as Optuna takes it; without a loss, one that failed."""
    import optuna

    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.FAIL if loss is None else optuna.trial.TrialState.COMPLETE,
        value=loss,
        params=dict(values),
        distributions={
            name: optuna.distributions.FloatDistribution(min(low, value), max(high, value))
            for name, value in values.items()
            for low, high in (bounds[name],)
        },
        user_attrs=attrs,
    )
