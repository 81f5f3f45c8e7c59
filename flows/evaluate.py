"""Measuring a saved checkpoint again, on the text it was reported on or on any other.

sparseramp evaluate runs/quickstart/best data.report=other.txt evaluation.report_windows=64
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.records import TrialSpec
from infra.specs import Spec, apply_overrides, parse_spec
from tasks.checkpoint import SPARSITY_FILE
from tasks.statistics import bits_per_byte, perplexity, plus_minus


def evaluate(checkpoint: Path, overrides: list[str], *, as_json: bool = False) -> dict[str, Any]:
    """Perplexity and bits per byte of a checkpoint on its report split, printed and returned.

    A checkpoint that this project did not save needs `data.source=...`.
    """
    from tasks.trial import run_trial

    spec = _spec(checkpoint, overrides)
    result = run_trial(
        TrialSpec(
            number=0,
            stage="final",
            model=spec.model,
            data=spec.data,
            calibration=spec.calibration,
            prune=spec.prune,
            split="report",
            windows=spec.evaluation.report_windows,
            context=spec.evaluation.context,
        )
    )
    metrics = {
        "perplexity": perplexity([result.losses], result.tokens),
        "bits_per_byte": bits_per_byte([result.losses], result.tokens, result.bytes),
    }
    answer = {
        "checkpoint": str(checkpoint),
        "context": spec.evaluation.context,
        "metrics": {name: vars(estimate) for name, estimate in metrics.items()},
    }
    if as_json:
        print(json.dumps(answer))
        return answer
    print(f"{checkpoint} on {spec.data.source_of('report')}")
    for name, estimate in metrics.items():
        value = plus_minus(estimate.mean, estimate.stderr)
        print(f"  {name:<14} {value}  (n = {estimate.n} windows of {answer['context']} tokens)")
    return answer


def _spec(checkpoint: Path, overrides: list[str]) -> Spec:
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no checkpoint folder: give the best/ of a run")
    raw: dict[str, Any] = {}
    facts = checkpoint / SPARSITY_FILE
    if facts.is_file():
        saved = json.loads(facts.read_text(encoding="utf-8"))
        raw = {"data": saved["data"], "evaluation": saved["evaluation"]}
        raw["model"] = {"dtype": saved["dtype"]}
        if any(override.startswith(("data.source=", "data.report=")) for override in overrides):
            raw["data"] |= {"source": "", "calibration": "", "selection": "", "report": ""}
    apply_overrides(raw, overrides)
    raw.setdefault("model", {})["source"] = str(checkpoint)
    raw.setdefault("prune", {})["sparsity"] = 0.0
    raw["calibration"] = {"samples": 1, "length": 8}  # nothing is pruned: whatever there is will do
    if "data" not in raw:
        raise UserError(f"{checkpoint} has no {SPARSITY_FILE}: add data.source=... to the command")
    return parse_spec(raw, str(checkpoint))
