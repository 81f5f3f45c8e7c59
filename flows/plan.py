"""What a run does next, as a pure function of what it has finished.

    wave = next_wave(spec, model, results)     # [] when nothing is left

Scouts look for the numbers of an allocation (beta, or another's) on little data; candidates that a
paired test has not ruled out climb to rungs with more; the best is then compared with uniform on
the report split. Because the answer depends on finished results alone, a resumed run proposes what
the undisturbed one would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.errors import UserError, nearest
from infra.records import PASSES, ModelRecord, TrialResult, TrialSpec
from infra.samplers import grid, propose
from infra.specs import ModelSpec, PruneSpec, Spec
from tasks.allocation import bounds_of, measuring_windows, values_of, with_values
from tasks.methods import method_named
from tasks.statistics import ruled_out

Results = Mapping[int, TrialResult]


@dataclass(frozen=True)
class Rung:
    """A fidelity: how many windows calibrate, and how many select."""

    samples: int
    windows: int


# Shares of the calibration and the selection windows. The published protocol has the last only.
LADDER = ((1 / 16, 1 / 8), (1 / 4, 1 / 4), (1.0, 1.0))


def ladder(spec: Spec) -> list[Rung]:
    """The rungs of a spec, cheapest first."""
    shares = LADDER if spec.search.protocol == "ladder" else LADDER[-1:]
    samples, windows = spec.calibration.samples, spec.evaluation.selection_windows
    rungs = [
        Rung(max(min(samples, 2), round(samples * c)), max(2, round(windows * e)))
        for c, e in shares
    ]
    return sorted(set(rungs), key=lambda rung: (rung.samples, rung.windows))


def next_wave(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
    """The next trials of a search; results of all earlier waves must be there.

    An allocation without numbers goes straight to the final comparison. Raises UserError where
    every candidate of the first rung failed.
    """
    if not bounds_of(spec.prune, model.matrices) and not spec.prune.is_uniform:
        return final_wave(spec, spec.prune, results, model.profile)
    scouts = _scouts(spec, model, results)
    if scouts:
        return _numbered(scouts, results)
    chosen, climbers = _climb(spec, results)
    if climbers:
        return _numbered(climbers, results)
    return final_wave(spec, chosen, results, model.profile)


def final_wave(
    spec: Spec, best: PruneSpec, results: Results, profile: Sequence[float] = ()
) -> list[TrialSpec]:
    """The comparison of one candidate with uniform on the report split; [] when it is done."""
    if any(result.spec.stage == "final" for result in results.values()):
        return []
    uniform = _uniform(spec.prune)
    sides = [uniform] if best.is_uniform else [uniform, best]
    wave = [
        TrialSpec(
            number=0,
            stage="final",
            model=spec.model,
            data=spec.data,
            calibration=spec.calibration.model_copy(
                update={"seed": spec.calibration.seed + repeat}
            ),
            prune=candidate,
            profile=[] if candidate.is_uniform else list(profile),
            split="report",
            windows=spec.evaluation.report_windows,
            context=spec.evaluation.context,
            **_tasks(spec, spec.evaluation.tasks),
            error_curves=repeat == 0,
            checkpoint=repeat == 0 and candidate is sides[-1],
            recovery=spec.recovery if spec.recovery.steps and repeat == 0 else None,
        )
        for repeat in range(spec.evaluation.calibration_seeds)
        for candidate in sides
    ]
    return _numbered(wave, results)


def search_trial(
    spec: Spec, candidate: PruneSpec, rung: int, profile: Sequence[float] = ()
) -> TrialSpec:
    """One candidate at one fidelity."""
    fidelity = ladder(spec)[rung]
    return TrialSpec(
        number=0,
        stage="search",
        rung=rung,
        model=spec.model,
        data=spec.data,
        calibration=spec.calibration.model_copy(update={"samples": fidelity.samples}),
        prune=candidate,
        profile=[] if candidate.is_uniform else list(profile),
        split="report" if spec.search.protocol == "paper" else "selection",
        windows=fidelity.windows,
        context=spec.evaluation.context,
        **_tasks(spec, [task] if (task := spec.search.objective.rpartition("/")[0]) else []),
    )


def refuse_objective(spec: Spec, model: ModelRecord) -> None:
    """Raise UserError where what is searched is not measured of this model."""
    objective = spec.search.objective
    if objective not in ("loss", *model.scores):
        known = ["loss", *model.scores]
        raise UserError(
            f"search.objective={objective!r} is not measured of {model.source}: "
            f"{nearest(objective, known)}"
        )


def kinds_of_trial(spec: Spec) -> list[TrialSpec]:
    """One trial of every size that a run can hold, the cheapest first."""
    searched = [search_trial(spec, spec.prune, rung) for rung in range(len(ladder(spec)))]
    return [*searched, *final_wave(spec, spec.prune, {})]


def token_passes(trial: TrialSpec) -> int:
    """Tokens times passes over the blocks that a trial will take."""
    calibration = _tokens(trial.calibration.samples, trial.calibration.length, trial.model)
    evaluation = _tokens(trial.windows, trial.context, trial.model)
    passes = 2 if trial.prune.pause == "block" else 1
    if "gradient" in method_named(trial.prune.method).needs:
        passes += PASSES
    passes_in_all = calibration * passes + evaluation * (3 if trial.error_curves else 1)
    if trial.recovery:
        windows = trial.recovery.steps * trial.recovery.batch
        passes_in_all += PASSES * _tokens(windows, trial.recovery.length, trial.model)
        passes_in_all += evaluation
    return passes_in_all


def measuring_passes(spec: Spec, model: ModelRecord) -> int:
    """Token passes until the allocation has measured what it needs; no trial counts them."""
    windows = measuring_windows(spec.prune, spec.calibration.samples, model.matrices)
    return _tokens(round(windows), spec.calibration.length, spec.model)


def _tokens(windows: int, length: int, model: ModelSpec) -> int:
    """Of so many windows of text; of images and questions, each counts as one."""
    return windows * (length if model.modality == "language" else 1)


def planned_passes(spec: Spec, model: ModelRecord | None, results: Results) -> int:
    """Token passes of the whole run: what is done, and the most that can still come."""
    done = sum(token_passes(result.spec) for result in results.values())
    return done + sum(token_passes(t) for wave in waves_left(spec, model, results) for t in wave)


def planned_trials(spec: Spec, model: ModelRecord | None, results: Results) -> int:
    """Trials of the whole run: those that are done, and the most that can still come."""
    return len(results) + sum(map(len, waves_left(spec, model, results)))


def best_so_far(spec: Spec, results: Results) -> TrialResult | None:
    """The best candidate on the highest rung that has one, by what is searched."""
    searched = [r for r in results.values() if r.spec.stage == "search" and r.state == "complete"]
    top = max((result.spec.rung for result in searched), default=0)
    name = spec.search.objective
    return min(
        (result for result in searched if result.spec.rung == top),
        key=lambda result: (result.objective_mean(name), result.spec.number),
        default=None,
    )


def waves_left(
    spec: Spec, model: ModelRecord | None, results: Results
) -> Iterator[list[TrialSpec]]:
    """As many waves, and as large, as can still come.

    How long a grid is depends on the model; without one, `search.scouts` stands for it.
    """
    if any(result.spec.stage == "final" for result in results.values()):
        return
    tried = [sum(_is(r, rung) for r in results.values()) for rung in range(len(ladder(spec)))]
    reached = max((rung for rung, count in enumerate(tried) if count), default=0)
    scouts = spec.search.scouts
    if model is not None:
        bounds = bounds_of(spec.prune, model.matrices)
        if not bounds:
            scouts = 0
        elif spec.search.sampler == "grid":
            (name, (_, high)), *_ = bounds.items()
            scouts = len(grid(name, high))
    for rung in range(reached, len(tried) if scouts else 0):
        left = (spec.search.climbers if rung else scouts) - tried[rung]
        while left > 0:
            yield [search_trial(spec, spec.prune, rung)] * min(left, spec.search.wave)
            left -= spec.search.wave
    other = spec.prune.model_copy(update={"beta": 1e-9})
    yield final_wave(spec, other, {})


def _scouts(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
    tried = [result for _, result in sorted(results.items()) if _is(result, 0)]
    if any(result.spec.rung > 0 or result.spec.stage == "final" for result in results.values()):
        return []
    count = spec.search.wave
    if spec.search.sampler != "grid":
        count = min(count, spec.search.scouts - len(tried))
    if count <= 0:
        return []
    bounds = {n: b for n, b in bounds_of(spec.prune, model.matrices).items() if b[0] < b[1]}
    if not bounds:  # a single block, or nothing to prune: there is only uniform
        return [] if tried else [search_trial(spec, _uniform(spec.prune), 0)]
    proposed = propose(
        sampler=spec.search.sampler,
        seed=spec.search.seed,
        wave=spec.search.wave,
        count=count,
        bounds=bounds,
        history=[
            (
                {name: r.numbers.get(name, 0.0) for name in bounds},
                r.objective_mean(spec.search.objective) if r.state == "complete" else None,
            )
            for r in tried
        ],
    )
    if not tried:
        _try_defaults(proposed, values_of(spec.prune, model.matrices))
    return [search_trial(spec, _at(spec.prune, values), 0, model.profile) for values in proposed]


def _try_defaults(proposed: list[dict[str, float]], defaults: Mapping[str, float]) -> None:
    """The published number is among the first candidates, instead of the one nearest to it."""
    if len(proposed) > 1 and len(proposed[0]) == 1:
        ((name, _),) = proposed[0].items()
        if defaults[name]:
            near = min(proposed[1:], key=lambda values: abs(values[name] - defaults[name]))
            near[name] = defaults[name]


def _climb(spec: Spec, results: Results) -> tuple[PruneSpec, list[TrialSpec]]:
    """The best candidate so far, and the trials of the next rung where it has rivals."""
    reached = max(result.spec.rung for result in results.values())
    complete = [r for r in results.values() if _is(r, reached) and r.state == "complete"]
    if not complete:
        if reached > 0:  # the whole rung failed: what the one below it says still stands
            below = {n: r for n, r in results.items() if r.spec.rung < reached}
            return _climb(spec, below)[0], []
        first = min(results)
        raise UserError(
            f"all {len(results)} candidates failed, the first with: {results[first].cause}"
        )
    name = spec.search.objective
    ranked = sorted(complete, key=lambda r: (r.objective_mean(name), r.spec.number))
    best = ranked[0]
    rivals = [
        r for r in ranked if r is best or not ruled_out(r.objective(name), best.objective(name))
    ]
    finals = any(result.spec.stage == "final" for result in results.values())
    if finals or len(rivals) < 2 or reached + 1 >= len(ladder(spec)):
        return best.spec.prune, []
    climbers = [r.spec for r in rivals[: spec.search.climbers]]
    return best.spec.prune, [search_trial(spec, c.prune, reached + 1, c.profile) for c in climbers]


def _is(result: TrialResult, rung: int) -> bool:
    return result.spec.stage == "search" and result.spec.rung == rung


def _at(prune: PruneSpec, values: Mapping[str, float]) -> PruneSpec:
    return with_values(prune, values) if any(values.values()) else _uniform(prune)


def _tasks(spec: Spec, tasks: list[str]) -> dict[str, Any]:
    """The fields of a trial that name tasks, empty where there are none."""
    if not tasks:
        return {}
    evaluation = spec.evaluation
    return {
        "tasks": tasks,
        "task_rows": evaluation.task_rows,
        "task_data": evaluation.task_data,
    }


def _uniform(prune: PruneSpec) -> PruneSpec:
    return prune.model_copy(update={"allocation": "uniform", "beta": 0.0, "parameters": {}})


def _numbered(wave: list[TrialSpec], results: Results) -> list[TrialSpec]:
    fields: list[dict[str, Any]] = [{"number": len(results) + i} for i in range(len(wave))]
    return [t.model_copy(update=f) for t, f in zip(wave, fields, strict=True)]
