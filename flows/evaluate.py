"""Measuring a saved checkpoint again, on the text it was reported on or on any other.

sparseramp evaluate runs/quickstart/best data.report=other.txt evaluation.report_windows=64
sparseramp evaluate runs/quickstart/best evaluation.tasks='["boolq"]' evaluation.task_rows=200
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.records import TrialSpec
from infra.spec_files import apply_overrides, parse_spec
from infra.specs import Spec
from tasks.checkpoint import SPARSITY_FILE
from tasks.statistics import Estimate, bits_per_byte, percentage, perplexity, plus_minus
from tasks.zero_shot import SEVEN


def evaluate(checkpoint: Path, overrides: list[str], *, as_json: bool = False) -> dict[str, Any]:
    """Perplexity, bits per byte and tasks of a checkpoint on its report split, also printed.

    A checkpoint that this project did not save needs `data.source=...`.
    """
    from tasks.trial import run_trial

    spec = _spec(checkpoint, overrides)
    trial = TrialSpec(
        number=0,
        stage="final",
        model=spec.model,
        data=spec.data,
        calibration=spec.calibration,
        prune=spec.prune,
        split="report",
        windows=spec.evaluation.report_windows,
        context=spec.evaluation.context,
        tasks=spec.evaluation.tasks,
        task_rows=spec.evaluation.task_rows,
        task_data=spec.evaluation.task_data,
    )
    try:
        result = run_trial(trial)
    except RuntimeError as error:
        from infra.cluster.worker import describe_error  # with Ray, which takes a second

        raise UserError(f"{checkpoint} cannot be measured: {describe_error(error)}") from error
    metrics = {
        "perplexity": perplexity([result.losses], result.tokens),
        "bits_per_byte": bits_per_byte([result.losses], result.tokens, result.bytes),
    }
    scores = _task_scores(result.scores, spec.evaluation.tasks)
    split = "validation" if spec.evaluation.task_data else ""  # lm-eval's own, where it is empty
    answer = {
        "checkpoint": str(checkpoint),
        "context": spec.evaluation.context,
        "metrics": {name: vars(estimate) for name, estimate in (metrics | scores).items()},
        "task_split": split,
    }
    if as_json:
        print(json.dumps(answer))
        return answer
    print(f"{checkpoint} on {spec.data.source_of('report')}")
    for name, estimate in metrics.items():
        value = plus_minus(estimate.mean, estimate.stderr)
        print(f"  {name:<14} {value}  (n = {estimate.n} windows of {answer['context']} tokens)")
    if scores:
        print(f"lm-eval{', ' + split if split else ''}")
    for name, estimate in scores.items():
        print(
            f"  {name:<24} {plus_minus(estimate.mean, estimate.stderr)} %  (n = {estimate.n} rows)"
        )
    return answer


def _task_scores(scores: dict[str, list[float]], tasks: list[str]) -> dict[str, Estimate]:
    """Every metric of every task; the average of `acc` where the tasks are the published seven."""
    found = {name: percentage(values) for name, values in scores.items()}
    if sorted(tasks) == sorted(SEVEN):
        parts = [found[f"{task}/acc"] for task in tasks]
        mean = sum(part.mean or 0.0 for part in parts) / len(parts)
        stderr = math.hypot(*(part.stderr or 0.0 for part in parts)) / len(parts)
        found["average of 7/acc"] = Estimate(mean, stderr, sum(part.n for part in parts), "%")
    return found


def _spec(checkpoint: Path, overrides: list[str]) -> Spec:
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no checkpoint folder: give the best/ of a run")
    if (checkpoint / "best").is_dir():
        raise UserError(f"{checkpoint} is a run: give {checkpoint / 'best'}")
    raw: dict[str, Any] = {}
    facts = checkpoint / SPARSITY_FILE
    if facts.is_file():
        raw = _saved(facts)
        if any(override.startswith(("data.source=", "data.report=")) for override in overrides):
            raw["data"] |= {"source": "", "calibration": "", "selection": "", "report": ""}
    apply_overrides(raw, overrides)
    for section in ("model", "prune"):
        if not isinstance(raw.setdefault(section, {}), dict):
            raise UserError(f"{section}={raw[section]!r} is no section: write {section}.key=value")
    raw["model"]["source"] = str(checkpoint)
    raw["prune"]["sparsity"] = 0.0
    raw["calibration"] = {"samples": 1, "length": 8}  # nothing is pruned: whatever there is will do
    if "data" not in raw:
        raise UserError(f"{checkpoint} has no {SPARSITY_FILE}: add data.source=... to the command")
    return parse_spec(raw, str(checkpoint))


def _saved(facts: Path) -> dict[str, Any]:
    """The part of a spec that a checkpoint remembers."""
    try:
        saved = json.loads(facts.read_text(encoding="utf-8"))
        sections = {name: dict(saved[name]) for name in ("data", "evaluation")}
        return sections | {"model": {"dtype": saved["dtype"]}}
    except OSError as error:
        raise UserError(f"{facts} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{facts} is damaged ({type(error).__name__}: {error}): restore it, or remove it and "
            "add data.source=... to the command"
        ) from None
