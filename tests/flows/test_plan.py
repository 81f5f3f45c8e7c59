"""What a run does next, asked of synthetic results.

python -m pytest tests/flows/test_plan.py
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flows.plan import (
    Rung,
    final_wave,
    kinds_of_trial,
    ladder,
    next_wave,
    planned_passes,
    refuse_objective,
    search_trial,
    token_passes,
)
from infra.errors import UserError
from infra.records import MatrixRecord, ModelRecord, TrialResult, TrialSpec
from infra.spec_files import parse_spec
from infra.specs import PruneSpec, Spec
from tasks.allocation import beta_bounds

BEST = 0.006
Answer = Callable[[TrialSpec], TrialResult]
Results = dict[int, TrialResult]


def make_spec(**sections: Any) -> Spec:
    raw = {"model": {"source": "m"}, "data": {"source": "t"}, **sections}
    return parse_spec(raw, "test.toml")


def make_model(num_blocks: int = 30) -> ModelRecord:
    return ModelRecord(
        source="m",
        architecture="LlamaForCausalLM",
        dtype="float32",
        sha256="5f" * 32,
        blocks=[f"layers.{i}" for i in range(num_blocks)],
        matrices=[MatrixRecord(block=i, matrix="q_proj", params=100) for i in range(num_blocks)],
        total_params=100 * num_blocks,
        context=512,
        adds_bos=True,
    )


def at(spec: Spec, beta: float) -> PruneSpec:
    return spec.prune.model_copy(update={"beta": beta})


def answer(trial: TrialSpec, *, noise: float = 0.0) -> TrialResult:
    """A parabola around BEST; windows differ much, candidates on one window by `noise`.

    The noise cancels over the windows, an even number: it changes what is certain, not the means.
    """
    windows = np.random.default_rng(0).normal(0, 0.3, trial.windows)
    own = noise * (1 + trial.number) * (-1.0) ** np.arange(trial.windows)
    loss = 4 + 1000 * (trial.prune.beta - BEST) ** 2
    return TrialResult(
        spec=trial,
        state="complete",
        losses=(loss + windows + own).tolist(),
        tokens=[511] * trial.windows,
    )


def fail(trial: TrialSpec) -> TrialResult:
    return TrialResult(spec=trial, state="failed", cause="the loss is NaN")


def drive(
    spec: Spec, respond: Answer = answer, model: ModelRecord | None = None
) -> tuple[list[list[TrialSpec]], Results]:
    """A whole run: its waves and its results."""
    waves: list[list[TrialSpec]] = []
    results: Results = {}
    while wave := next_wave(spec, model or make_model(), results):
        waves.append(wave)
        results |= {trial.number: respond(trial) for trial in wave}
        assert len(waves) < 50
    return waves, results


def stages(waves: list[list[TrialSpec]]) -> list[tuple[str, int]]:
    return [(wave[0].stage, wave[0].rung) for wave in waves]


def noisy(trial: TrialSpec) -> TrialResult:
    """So much noise that a paired test rules nothing out."""
    return answer(trial, noise=50.0)


def test_uniform_is_trial_zero_whatever_the_sampler() -> None:
    for sampler in ("bracket", "tpe", "random", "grid"):
        wave = next_wave(make_spec(search={"sampler": sampler}), make_model(), {})
        assert (wave[0].number, wave[0].prune.beta) == (0, 0.0)
        assert [trial.number for trial in wave] == [0, 1, 2, 3]


def test_scouts_come_in_waves_at_the_lowest_fidelity() -> None:
    spec = make_spec(search={"scouts": 6, "wave": 4})
    waves, _ = drive(spec)
    assert [len(wave) for wave in waves[:2]] == [4, 2]
    scouts = waves[0] + waves[1]
    low, high = beta_bounds(make_model().block_params(), spec.prune.sparsity)
    assert len({trial.prune.beta for trial in scouts}) == 6
    for trial in scouts:
        assert (trial.stage, trial.rung, trial.split) == ("search", 0, "selection")
        assert (trial.calibration.samples, trial.windows) == (2, 4)
        assert low < trial.prune.beta < high
        assert not trial.error_curves and not trial.checkpoint
    assert [t.number for wave in waves for t in wave] == list(range(sum(map(len, waves))))


def test_rungs_have_shares_of_the_windows_and_none_twice() -> None:
    assert ladder(make_spec()) == [Rung(2, 4), Rung(8, 8), Rung(32, 32)]
    small = make_spec(calibration={"samples": 4}, evaluation={"selection_windows": 4})
    assert ladder(small) == [Rung(2, 2), Rung(4, 4)]
    smallest = make_spec(calibration={"samples": 1}, evaluation={"selection_windows": 2})
    assert ladder(smallest) == [Rung(1, 2)]


def test_what_a_paired_test_rules_out_does_not_climb() -> None:
    """Windows differ by 0.3, candidates by less: only pairing tells them apart."""
    waves, results = drive(make_spec())
    assert stages(waves) == [("search", 0), ("search", 0), ("final", 0)]
    best = min(waves[0] + waves[1], key=lambda trial: results[trial.number].loss)
    assert {trial.prune.beta for trial in waves[-1]} == {0.0, best.prune.beta}


def test_at_most_so_many_climb_and_the_best_ones() -> None:
    spec = make_spec(search={"climbers": 3})
    waves, results = drive(spec, noisy)
    assert stages(waves) == [("search", 0)] * 2 + [("search", 1), ("search", 2), ("final", 0)]
    ranked = sorted((results[t.number] for t in waves[0] + waves[1]), key=lambda r: r.loss)
    assert [trial.prune.beta for trial in waves[2]] == [r.beta for r in ranked[:3]]
    assert {(t.calibration.samples, t.windows) for t in waves[2]} == {(8, 8)}
    assert {(t.calibration.samples, t.windows) for t in waves[3]} == {(32, 32)}
    assert {t.prune.beta for t in waves[3]} <= {t.prune.beta for t in waves[2]}


def test_the_top_rung_decides() -> None:
    """Its losses count, not those of the rungs below."""

    def respond(trial: TrialSpec) -> TrialResult:
        result = noisy(trial)
        if trial.rung < 2 or trial.stage == "final":
            return result
        last = trial.prune.beta == climbed[-1]
        return result.model_copy(update={"losses": [1.0 if last else 9.0] * trial.windows})

    climbed: list[float] = []
    spec = make_spec()
    results: Results = {}
    while wave := next_wave(spec, make_model(), results):
        if wave[0].rung == 2:
            climbed = [trial.prune.beta for trial in wave]
        results |= {trial.number: respond(trial) for trial in wave}
    assert len(climbed) == 2
    finals = {r.beta for r in results.values() if r.spec.stage == "final"}
    assert finals == {0.0, climbed[-1]}


def test_the_final_wave() -> None:
    spec = make_spec(calibration={"seed": 5}, evaluation={"report_windows": 7})
    wave = final_wave(spec, at(spec, 0.01), {})
    assert [(t.calibration.seed, t.prune.beta) for t in wave] == [
        (seed, beta) for seed in (5, 6, 7) for beta in (0.0, 0.01)
    ]
    for trial in wave:
        assert (trial.stage, trial.split, trial.windows) == ("final", "report", 7)
        assert trial.calibration.samples == spec.calibration.samples
    assert [t.error_curves for t in wave] == [True, True, False, False, False, False]
    assert [t.checkpoint for t in wave] == [False, True, False, False, False, False]
    done = {t.number: answer(t) for t in wave}
    assert final_wave(spec, at(spec, 0.01), done) == []


def test_where_uniform_wins_it_is_measured_once_and_saved() -> None:
    wave = final_wave(make_spec(), at(make_spec(), 0.0), {})
    assert [(t.prune.beta, t.calibration.seed) for t in wave] == [(0.0, 0), (0.0, 1), (0.0, 2)]
    assert [t.checkpoint for t in wave] == [True, False, False]


def test_a_failed_candidate_is_passed_over() -> None:
    def respond(trial: TrialSpec) -> TrialResult:
        return fail(trial) if trial.number == worst else answer(trial)

    worst = -1
    _, undisturbed = drive(make_spec())
    searched = [r for r in undisturbed.values() if r.spec.stage == "search"]
    first = [r for r in searched if r.spec.number < 4]
    worst = min(first, key=lambda r: r.loss).spec.number  # the best of the first wave
    waves, results = drive(make_spec(), respond)
    assert sum(len(w) for w in waves if w[0].stage == "search" and w[0].rung == 0) == 8
    finals = {t.prune.beta for t in waves[-1]}
    assert waves[-1][0].stage == "final"
    assert results[worst].beta not in finals - {0.0}


def test_a_rung_that_failed_leaves_what_the_one_below_says() -> None:
    waves, results = drive(make_spec(), lambda t: fail(t) if t.rung == 1 else noisy(t))
    assert stages(waves)[-2:] == [("search", 1), ("final", 0)]
    scouts = [r for r in results.values() if r.spec.stage == "search" and r.spec.rung == 0]
    assert waves[-1][1].prune.beta == min(scouts, key=lambda r: r.loss).beta


def test_when_all_fail_the_first_cause_is_told() -> None:
    with pytest.raises(UserError) as refused:
        drive(make_spec(), fail)
    assert str(refused.value) == "all 8 candidates failed, the first with: the loss is NaN"


@pytest.mark.parametrize("sampler", ["bracket", "tpe", "random"])
def test_the_same_results_give_the_same_wave(sampler: str) -> None:
    """Asked again after any wave, and with results in the order in which they returned."""
    spec = make_spec(search={"sampler": sampler, "seed": 3})
    waves, results = drive(spec, noisy)
    done: Results = {}
    for wave in waves:
        assert next_wave(spec, make_model(), dict(reversed(done.items()))) == wave
        done |= {trial.number: results[trial.number] for trial in wave}
    assert next_wave(spec, make_model(), done) == []


def test_one_block_has_only_uniform() -> None:
    waves, _ = drive(make_spec(), model=make_model(1))
    assert [len(wave) for wave in waves] == [1, 3]
    assert {trial.prune.beta for wave in waves for trial in wave} == {0.0}


def test_the_paper_protocol_is_the_grid_at_full_fidelity_on_the_report_split() -> None:
    spec = make_spec(
        prune={"pause": "block"}, search={"protocol": "paper", "sampler": "grid", "scouts": 2}
    )
    waves, _ = drive(spec)
    grid = [trial for wave in waves for trial in wave if trial.stage == "search"]
    high = beta_bounds(make_model().block_params(), spec.prune.sparsity)[1]
    steps = [round(0.002 * i, 6) for i in range(100) if 0.002 * i < high]
    assert [trial.prune.beta for trial in grid] == steps
    for trial in grid:
        assert (trial.rung, trial.split, trial.prune.pause) == (0, "report", "block")
        assert (trial.calibration.samples, trial.windows) == (32, 32)
    assert {trial.prune.beta for trial in waves[-1]} == {0.0, BEST}


@pytest.mark.parametrize("respond", [answer, noisy])
def test_planned_passes_are_the_most_that_can_come_and_in_the_end_what_came(
    respond: Answer,
) -> None:
    spec = make_spec()
    waves, results = drive(spec, respond)
    total = sum(token_passes(trial) for wave in waves for trial in wave)
    done: Results = {}
    planned = []
    for wave in waves:
        planned.append(planned_passes(spec, make_model(), done))
        done |= {trial.number: results[trial.number] for trial in wave}
    assert all(each >= total for each in planned)
    assert planned == sorted(planned, reverse=True)  # it may come to less, never to more
    assert planned_passes(spec, make_model(), results) == total


def test_a_grid_is_planned_in_its_full_length() -> None:
    """30 blocks at 60 %: uniform and 13 multiples of 0.002 below 0.02759."""
    short = make_spec(search={"sampler": "grid", "scouts": 1})
    one, all_of_them = (planned_passes(short, model, {}) for model in (None, make_model()))
    assert all_of_them - one == 13 * token_passes(search_trial(short, short.prune, 0))


def test_tokens_of_a_trial() -> None:
    """32 windows of 512 calibrate and 32 are measured; curves have a dense copy ride along, and
    the measured ones pass the dense block too."""
    uniform, *_, last = final_wave(make_spec(), at(make_spec(), 0.01), {})
    assert token_passes(last) == 2 * 32 * 512
    assert token_passes(uniform) == 4 * 32 * 512
    twice = make_spec(prune={"pause": "block"})
    block = final_wave(twice, at(twice, 0.01), {})
    assert token_passes(block[-1]) == 3 * 32 * 512
    for method in ("taylor", "pruner-zero"):  # gradients, with every block run twice
        needy = last.model_copy(update={"prune": last.prune.model_copy(update={"method": method})})
        seen = last.calibration.samples * last.calibration.length
        assert token_passes(needy) == token_passes(last) + 4 * seen


def test_every_size_of_trial_is_tried_out_first() -> None:
    waves, _ = drive(make_spec(), noisy)

    def size(trial: TrialSpec) -> tuple[Any, ...]:
        return trial.split, trial.calibration.samples, trial.windows, trial.error_curves

    kinds = {size(trial) for trial in kinds_of_trial(make_spec())}
    assert {size(trial) for wave in waves for trial in wave} <= kinds


def test_a_task_that_is_searched_is_reported_too() -> None:
    search = {"objective": "boolq/acc"}
    with pytest.raises(UserError, match=r"needs evaluation.task_rows=N"):
        make_spec(search=search, evaluation={"tasks": ["boolq"]})
    with pytest.raises(UserError, match=r"needs 'boolq' in evaluation.tasks"):
        make_spec(search=search, evaluation={"tasks": ["piqa"], "task_rows": 5})
    spec = make_spec(search=search, evaluation={"tasks": ["piqa", "boolq"], "task_rows": 5})
    assert search_trial(spec, spec.prune, 0).tasks == ["boolq"]
    assert final_wave(spec, spec.prune, {})[0].tasks == ["piqa", "boolq"]


def test_the_published_number_is_among_the_first_candidates() -> None:
    model = make_model()
    model = model.model_copy(update={"profile": [float(i) for i in range(len(model.matrices))]})
    for allocation, name, default in (("owl", "lambda", 0.08), ("alphapruning", "epsilon", 0.3)):
        spec = make_spec(prune={"allocation": allocation})
        tried = [t.prune.parameters.get(name) for t in next_wave(spec, model, {})]
        assert tried[0] is None and default in tried


def test_what_a_model_is_not_measured_by_is_not_searched() -> None:
    model = make_model().model_copy(update={"scores": ["top1", "top5"]})
    for objective in ("loss", "top5"):
        refuse_objective(make_spec(search={"objective": objective}), model)
    with pytest.raises(UserError, match=r"search\.objective='top3' is not measured .* 'top5'\?"):
        refuse_objective(make_spec(search={"objective": "top3"}), model)
