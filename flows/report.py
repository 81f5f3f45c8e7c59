"""The report of a run: report.json for programs, report.html for people, from its files alone.

    write_report(Path("runs/quickstart"))    # or: sparseramp report runs/quickstart

`build_report` turns results into numbers and is pure; `render` turns those into one page that
needs no network.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from flows.explanation import Verdict, damage_rates, explain
from flows.figures import COLOURS, figures, rates_shown, relative_part
from flows.live import duration
from flows.measures import (
    WINDOWS,
    dense_metrics_of,
    gain_in,
    gains_of,
    headline,
    in_words,
    metrics_of,
    perplexity_ratio,
    sampled,
)
from flows.pictures import pictures
from flows.recovered import recovery_of
from flows.sizes import size_in_words
from flows.speed import kept_speed
from infra.errors import UserError
from infra.records import ModelRecord, TrialResult
from infra.specs import Spec
from infra.store import RunStore, write_atomic
from tasks.allocation import bounds_of
from tasks.model_card import calibrated_on, settings, short
from tasks.statistics import Difference, label, mean_loss, plus_minus, three_digits

Report = dict[str, Any]

GO_ON = "give the command that started it once more to go on"


def write_report(store_dir: Path) -> Report:
    """Make report.json and report.html of a run from its other files, and return the former."""
    store = RunStore.read(store_dir)
    results, model = list(store.results().values()), store.model()
    if model is None:
        raise UserError(f"{store_dir} holds no model.json yet: {GO_ON}")
    seconds = working_time(store.events())
    report = build_report(store.spec, model, results, seconds, store.provenance)
    uniform, best = _finals(results)
    report["pictures"] = pictures(store.spec, uniform[0], best[0])
    report["speed"] = kept_speed(store_dir)
    data = json.dumps(report, indent=1, allow_nan=False)
    write_atomic(store.path("report.json"), data.encode())
    write_atomic(store.path("report.html"), render(report).encode())
    return report


def working_time(events: Sequence[dict[str, Any]]) -> float:
    """Seconds during which a driver was at work: the pauses between start and resume left out."""
    seconds, last = 0.0, None
    for event in events:
        now = datetime.fromisoformat(event["time"])
        if last is not None and event["event"] != "resumed":
            seconds += (now - last).total_seconds()
        last = now
    return seconds


def build_report(
    spec: Spec,
    model: ModelRecord,
    results: Sequence[TrialResult],
    seconds: float,
    provenance: dict[str, str] | None = None,
) -> Report:
    """Everything that report.json holds. Raises UserError where the final stage is missing."""
    done = [result for result in results if result.state == "complete"]
    uniform, best = _finals(results)
    objective = spec.search.objective
    gain, unit, scores = gains_of(uniform, best, objective, model.unit)
    searched = any(result.spec.stage == "search" for result in results)
    sides = {"uniform": _side(uniform, model.unit), "best": _side(best, model.unit)}
    dense = dense_metrics_of([r for r in done if r.spec.stage == "final"], model.unit)
    report: Report = {
        "command": "search" if searched else "prune",
        "goal": spec.prune.goal,
        "protocol": spec.search.protocol,
        "number": next(iter(bounds_of(spec.prune, model.matrices)), "beta"),
        "headline": headline(list(sides["best"]["metrics"]), objective),
        "windows": WINDOWS[model.unit],
        "dense": {"metrics": dense} if dense else None,
        **sides,
        "gain": {
            "mean": gain.mean,
            "stderr": gain.stderr,
            "n": gain.n_windows,
            "of": sampled(objective, model.unit),
            "unit": unit,
            "low": gain.low,
            "high": gain.high,
            "level": 0.95,
            "df": gain.df,
            "n_seeds": gain.n_seeds,
            "seeds": [result.spec.calibration.seed for result in best],
            "scores": scores,
            **(perplexity_ratio(gain, sides) if objective == "loss" else {}),
            "verdict": "gain" if gain.low > 0 else "no gain",
        },
        "pictures": [],
        "speed": None,
        "size": size_in_words(best[0], model),
        "recovery": recovery_of(uniform, best, objective=objective, unit=model.unit),
        "trials": _trials(results, done, objective),
        **_errors(uniform, best, gain, model),
        "spec": spec.model_dump(mode="json"),
        "model": {
            **model.model_dump(exclude={"matrices"}),
            "prunable_params": sum(model.block_params()),
            "towers": model.towers(),
        },
        "cost": {
            "seconds": seconds,
            "trials": len(results),
            "failed": len(results) - len(done),
            "token_passes": sum(result.cost.token_passes for result in results),
            "peak_memory_bytes": max(result.cost.peak_memory_bytes for result in results),
            "device": ", ".join(sorted({result.device for result in done if result.device})),
        },
        "provenance": provenance or {},
        "version": (provenance or {}).get("sparseramp", "checkout"),
    }
    report["gain"]["conclusion"] = _conclusion(report)
    return report


def _finals(results: Sequence[TrialResult]) -> tuple[list[TrialResult], list[TrialResult]]:
    """The uniform and the best sweep of every calibration seed that has both.

    Raises UserError where either failed for all seeds: uniform never stands for what failed.
    """
    done = [result for result in results if result.state == "complete"]
    finals = [result for result in done if result.spec.stage == "final"]
    uniform = {result.spec.calibration.seed: result for result in finals if _is_uniform(result)}
    best = {result.spec.calibration.seed: result for result in finals if not _is_uniform(result)}
    failed = [r for r in results if r.spec.stage == "final" and r.state == "failed"]
    if not best and not any(not _is_uniform(result) for result in failed):
        best = uniform
    seeds = sorted(uniform.keys() & best.keys())
    if not seeds and failed:
        lost = failed[-1]
        raise UserError(f"the final of {lost.spec.prune.label} failed: {lost.cause}")
    if not seeds:
        raise UserError(
            f"the run has no final comparison yet ({len(done)} trials finished): {GO_ON}"
        )
    return [uniform[seed] for seed in seeds], [best[seed] for seed in seeds]


def _side(side: Sequence[TrialResult], unit: str) -> dict[str, Any]:
    """Metrics over all seeds; rates and zeros of the first, which is the one that is saved."""
    first = side[0]
    params = sum(m.params for m in first.matrices)
    return {
        "beta": first.beta,
        "tilt": first.tilt,
        "allocation": first.spec.prune.allocation,
        "numbers": first.numbers,
        "label": first.spec.prune.label,
        "uniform": _is_uniform(first),
        "sparsity": sum(m.zeros for m in first.matrices) / params,
        "bits": sum(m.bits * m.params for m in first.matrices) / params,
        "metrics": metrics_of(side, unit),
        "block_rates": first.block_rates,
        "rates": [
            m.model_dump(include={"block", "matrix", "params", "rate"}) for m in first.matrices
        ],
        **first.model_dump(include={"fallbacks", "notes", "clamped"}),
    }


def _errors(
    uniform: Sequence[TrialResult],
    best: Sequence[TrialResult],
    gain: Difference,
    model: ModelRecord,
) -> dict[str, Any]:
    """The error curves of the seed that has them, and what they say: of a model of one tower, as
    gains do not follow an error from one into another."""
    equal, other = (next((r for r in side if r.errors), side[0]) for side in (uniform, best))
    curves = {"uniform": equal.errors, "best": other.errors}
    both = (equal.errors, other.errors, equal.block_rates, other.block_rates)
    verdict: Verdict = "gain" if gain.low > 0 else "loss" if gain.high < 0 else "no gain"
    said = explain(*both, verdict=verdict, same=_is_uniform(other))
    return {
        "errors": {
            **{side: [error.model_dump() for error in curve] for side, curve in curves.items()},
            "damage_rates": damage_rates(*both),
        },
        "explanation": said if len(set(model.towers())) == 1 else "",
    }


def _trials(
    results: Sequence[TrialResult], done: Sequence[TrialResult], objective: str
) -> list[dict[str, Any]]:
    """One row per trial; `gain` is that in the objective over uniform under equal conditions."""
    uniform = {_conditions(result): result for result in done if _is_uniform(result)}
    rows = []
    for result in sorted(results, key=lambda result: result.spec.number):
        loss = gain = None
        if len(result.losses) > 1:
            loss = mean_loss(result.losses, result.tokens)
            same = uniform.get(_conditions(result))
            if same and len(same.objective(objective)) == len(result.objective(objective)):
                gain = gain_in(objective, [same], [result])
        rows.append(
            {
                **result.spec.model_dump(include={"number", "stage", "rung", "split"}),
                "seed": result.spec.calibration.seed,
                "beta": result.beta,
                "tilt": result.tilt,
                "numbers": result.numbers,
                "label": result.spec.prune.label,
                "uniform": result.spec.prune.is_uniform,
                "loss": result.loss if result.losses else None,
                "scores": {n: 100 * sum(s) / len(s) for n, s in result.scores.items()},
                "stderr": loss and loss.stderr,
                "n": len(result.losses),
                "n_objective": len(result.scores.get(objective, result.losses)),
                "gain": gain and {"mean": gain.mean, "stderr": gain.stderr},
                **result.model_dump(include={"state", "cause", "attempts", "device"}),
                "seconds": result.cost.total_s,
            }
        )
    return rows


def _is_uniform(result: TrialResult) -> bool:
    return result.spec.prune.is_uniform


def _conditions(result: TrialResult) -> tuple[str, int, int]:
    return result.spec.stage, result.spec.rung, result.spec.calibration.seed


def _conclusion(report: Report) -> str:
    """What was found, in two or three sentences that hold for these numbers and no others."""
    gain, best, metric = report["gain"], report["best"], report["headline"]
    what = metric if metric == "perplexity" else label(metric, best["metrics"][metric])
    what = what.removesuffix(", %")
    before, after = (in_words(report[side]["metrics"][metric]) for side in ("uniform", "best"))
    dense = "dense not measured"
    if report["dense"] and metric in report["dense"]["metrics"]:
        dense = f"dense {in_words(report['dense']['metrics'][metric])}"
    at, beta = report["goal"], best["label"]
    if best["allocation"] in ("uniform", "arithmetic"):
        beta = f"beta = {best['beta']:.3g}"
    if best["tilt"]:
        beta += f" (tilt {best['tilt']:.2f})"
    over = f"{gain['n']} {gain['of']} and {gain['n_seeds']} calibration seed"
    over += "" if gain["n_seeds"] == 1 else "s"
    interval = f"95 % interval {gain['low']:.3f} to {gain['high']:.3f}, {over}"
    if best["uniform"] and report["command"] == "search":
        text = f"No gain at {at}: no candidate beat equal rates; {what} {after} ({dense})."
    elif best["uniform"]:
        text = f"At {at}, equal rates give {what} {after} ({dense}); nothing else was tried."
    elif gain["low"] > 0:
        text = (
            f"At {at}, {beta} brings {what} from {before} (uniform) to {after}; {dense}. "
            f"The gain is {gain['mean']:.3f} {gain['unit']} ({interval})."
        )
    elif gain["high"] < 0:
        text = (
            f"No gain at {at}: {beta} is worse than uniform, {what} {after} against {before} "
            f"({dense}). It loses {-gain['mean']:.3f} {gain['unit']} (gain: {interval})."
        )
    else:
        text = (
            f"No gain at {at}: {beta} gives {what} {after}, uniform {before}; {dense}. "
            f"The difference of {gain['mean']:.3f} {gain['unit']} may be chance ({interval})."
        )
    if gain["n_seeds"] == 1 and not best["uniform"]:
        text += " With one calibration seed, the interval says nothing about other seeds."
    if report["protocol"] == "paper":
        what = "text" if report["windows"] == "windows" else report["windows"]
        text += f" Paper protocol: beta was selected on the {what} it is reported on."
    return text


def render(report: Report) -> str:
    """The page of a report."""
    return page(
        "report.html",
        report=report,
        figures=figures(report),
        shown=rates_shown(report),
        settings=settings(report["spec"]),
        calibrated=calibrated_on(report["spec"], report["windows"]),
        colours=COLOURS,
        part=relative_part,
    )


def page(template: str, **values: Any) -> str:
    """One HTML page that stands alone: styles, data and the plotting library are in it."""
    return _environment().get_template(template).render(plotly=_plotly(), **values)


_plotly = cache(get_plotlyjs)


@cache
def _environment() -> Environment:
    """A driver makes hundreds of pages, and a template takes half a second to compile."""
    environment = Environment(
        loader=PackageLoader("flows"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"metric_label": label}
    environment.filters |= {
        "estimate": _estimate,
        "short": short,
        "three_digits": three_digits,
        "percent": _percent,
        "duration": duration,
    }
    return environment


def _estimate(value: dict[str, Any]) -> str:
    return plus_minus(value["mean"], value["stderr"])


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"
