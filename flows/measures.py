"""What is said of a candidate: its metrics, its gain over uniform, and how they are called.

    metrics_of([result], "image")["top1"]    # {"mean": 74.1, "stderr": 0.4, "n": 9000, "unit": "%"}

A language model has a perplexity; images and questions have scores; everything has a loss. Scores
are in per cent, and their differences in points.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from infra.records import TrialResult, finite_exp
from tasks.statistics import (
    Difference,
    bits_per_byte,
    mean_loss,
    paired_difference,
    percentage,
    perplexity,
    three_digits,
)

WINDOWS = {"token": "windows", "image": "images", "answer": "questions"}


def metrics_of(side: Sequence[TrialResult], unit: str) -> dict[str, Any]:
    """Metrics of one candidate over its calibration seeds."""
    first = side[0]
    rows = [result.losses for result in side]
    names = [n for n in first.scores if all(n in result.scores for result in side)]
    scores = {name: [result.scores[name] for result in side] for name in names}
    return _metrics(rows, scores, first, unit)


def dense_metrics_of(results: Sequence[TrialResult], unit: str) -> dict[str, Any] | None:
    """Metrics of the dense model, which rode along with some final trials; None without any."""
    dense = next((result for result in results if result.dense_losses), None)
    if dense is None:
        return None
    scores: dict[str, list[list[float]]] = {}
    for result in results:
        scores |= {name: [values] for name, values in result.dense_scores.items()}
    return _metrics([dense.dense_losses], scores, dense, unit)


def _metrics(
    losses: list[list[float]], scores: dict[str, list[list[float]]], like: TrialResult, unit: str
) -> dict[str, Any]:
    found = {}
    if any(like.bytes):
        found["perplexity"] = perplexity(losses, like.tokens)
        found["bits_per_byte"] = bits_per_byte(losses, like.tokens, like.bytes)
    found |= {name: percentage(rows) for name, rows in scores.items()}
    found["loss"] = mean_loss(losses, like.tokens, unit)
    # Tasks on a folder of data sets have the rows of a validation split, which the name then says.
    split = {"split": "validation"} if like.spec.task_data else {}
    return {name: asdict(each) | (split if "/" in name else {}) for name, each in found.items()}


def gains_of(
    uniform: Sequence[TrialResult], best: Sequence[TrialResult], objective: str, unit: str
) -> tuple[Difference, str, dict[str, Any]]:
    """The gain in what was searched, its unit, and the gain in every score; positive is better."""
    scores: dict[str, Any] = {}
    for name in best[0].scores:
        if all(name in result.scores for result in (*uniform, *best)):
            gain = _points(uniform, best, name)
            scores[name] = {"mean": gain.mean, "stderr": gain.stderr, "n": gain.n_windows}
            scores[name] |= {"low": gain.low, "high": gain.high, "unit": "points"}
    in_what = f"nats/{unit}" if objective == "loss" else f"points of {objective}"
    return gain_in(objective, uniform, best), in_what, scores


def gain_in(
    objective: str, uniform: Sequence[TrialResult], best: Sequence[TrialResult]
) -> Difference:
    """The paired difference in nats, or in points of a score; positive is better."""
    if objective != "loss":
        return _points(uniform, best, objective)
    rows = ([r.losses for r in uniform], [r.losses for r in best])
    return paired_difference(*rows, uniform[0].tokens)


def sampled(objective: str, unit: str) -> str:
    """What a mean of the objective is taken over: a task of lm-eval has rows."""
    return "rows" if "/" in objective else WINDOWS[unit]


def _points(uniform: Sequence[TrialResult], best: Sequence[TrialResult], name: str) -> Difference:
    gain = paired_difference(
        [r.objective(name) for r in uniform], [r.objective(name) for r in best]
    )
    parts = ("mean", "stderr", "low", "high")
    return replace(gain, **{part: 100 * getattr(gain, part) for part in parts})


def headline(metrics: Sequence[str], objective: str) -> str:
    """The metric that a conclusion speaks of."""
    if objective != "loss":
        return objective
    return next(
        (name for name in ("perplexity", "top1", "accuracy", "exact") if name in metrics), "loss"
    )


def in_words(metric: dict[str, Any]) -> str:
    """19.9 or 74.1 %."""
    digits = three_digits(metric["mean"])
    return f"{digits} %" if metric["unit"] == "%" else digits


def perplexity_ratio(gain: Difference, sides: dict[str, Any]) -> dict[str, Any]:
    """What a gain in nats does to the perplexity; {} where there is none."""
    if "perplexity" not in sides["best"]["metrics"]:
        return {}
    return {
        "perplexity": {
            **{side: sides[side]["metrics"]["perplexity"]["mean"] for side in ("uniform", "best")},
            "ratio": finite_exp(-gain.mean),
            "ratio_low": finite_exp(-gain.high),
            "ratio_high": finite_exp(-gain.low),
        }
    }
