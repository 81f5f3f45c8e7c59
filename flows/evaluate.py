"""Measuring a saved checkpoint again, on what it was reported on or on anything else.

sparseramp evaluate runs/quickstart/best data.report=other.txt evaluation.report_windows=64
sparseramp evaluate runs/quickstart/best evaluation.tasks='["boolq"]' evaluation.task_rows=200
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flows.measures import WINDOWS, metrics_of
from infra.errors import UserError
from infra.records import TrialSpec
from infra.spec_files import apply_overrides, parse_spec
from infra.specs import Spec
from tasks.checkpoint import SPARSITY_FILE
from tasks.statistics import plus_minus
from tasks.zero_shot import SEVEN

NOTHING_PRUNED = {"samples": 1, "length": 8}  # whatever text there is will do
Metrics = dict[str, dict[str, Any]]


def evaluate(checkpoint: Path, overrides: list[str], *, as_json: bool = False) -> dict[str, Any]:
    """Every metric of a checkpoint on its report split, and its tasks; also printed.

    A checkpoint that this project did not save needs `data.source=...`, and `model.modality=...`
    where it is no language model.
    """
    from tasks.trial import loaded, run_trial

    spec = spec_of(checkpoint, overrides)
    trial = report_trial(
        spec,
        tasks=spec.evaluation.tasks,
        task_rows=spec.evaluation.task_rows,
        task_data=spec.evaluation.task_data,
    )
    try:
        result = run_trial(trial)
        unit = loaded(spec.model).record(spec.model.source).unit
    except RuntimeError as error:
        from infra.cluster.worker import describe_error  # with Ray, which takes a second

        raise UserError(f"{checkpoint} cannot be measured: {describe_error(error)}") from error
    metrics = _with_average(metrics_of([result], unit), spec.evaluation.tasks)
    split = "validation" if spec.evaluation.task_data else ""  # lm-eval's own, where it is empty
    ours = (checkpoint / SPARSITY_FILE).is_file()
    answer = {
        "checkpoint": str(checkpoint),
        "modality": spec.model.modality,
        "windows": WINDOWS[unit],
        "context": spec.evaluation.context if unit == "token" else 0,
        "metrics": metrics,
        "task_split": split,
        "calibration_seed": spec.calibration.seed if ours else None,
    }
    if as_json:
        print(json.dumps(answer, allow_nan=False))
    else:
        print(f"{checkpoint} on {spec.data.source_of('report')}")
        _print(answer)
    return answer


def report_trial(spec: Spec, **more: Any) -> TrialSpec:
    """The model of a spec as it stands, on the report split."""
    return TrialSpec(
        number=0,
        stage="final",
        model=spec.model,
        data=spec.data,
        calibration=spec.calibration,
        prune=spec.prune,
        split="report",
        windows=spec.evaluation.report_windows,
        context=spec.evaluation.context,
        **more,
    )


def _print(answer: dict[str, Any]) -> None:
    """What the checkpoint's own windows gave, then what lm-eval's tasks did."""
    metrics: Metrics = answer["metrics"]
    own = {name: metric for name, metric in metrics.items() if "/" not in name}
    windows = answer["windows"] + (f" of {answer['context']} tokens" if answer["context"] else "")
    if (seed := answer["calibration_seed"]) is not None:
        print(f"  pruned with calibration seed {seed}; a report has the mean over all such seeds")
    for name, metric in own.items():
        print(f"  {name:<14} {_value(metric)}  (n = {metric['n']} {windows})")
    if len(own) < len(metrics):
        print(", ".join(filter(None, ["lm-eval", answer["task_split"]])))
    for name, metric in metrics.items():
        if name not in own:
            print(f"  {name:<24} {_value(metric)}  (n = {metric['n']} rows)")


def _value(metric: dict[str, Any]) -> str:
    unit = "" if metric["unit"].startswith("perplexity") else f" {metric['unit']}"
    return plus_minus(metric["mean"], metric["stderr"]) + unit


def _with_average(metrics: Metrics, tasks: list[str]) -> Metrics:
    """The average of `acc` as well, where the tasks are the published seven."""
    if sorted(tasks) != sorted(SEVEN):
        return metrics
    parts = [metrics[f"{task}/acc"] for task in tasks]
    average = {
        "mean": sum(part["mean"] for part in parts) / len(parts),
        "stderr": math.hypot(*(part["stderr"] for part in parts)) / len(parts),
        "n": sum(part["n"] for part in parts),
    }
    return metrics | {"average of 7/acc": parts[0] | average}


def checkpoint_folder(checkpoint: Path) -> None:
    """Raise UserError where a path is no folder, or is a run and not its checkpoint."""
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no checkpoint folder: give the best/ of a run")
    if (checkpoint / "best").is_dir():
        raise UserError(f"{checkpoint} is a run: give {checkpoint / 'best'}")
    if (checkpoint / "run.json").is_file():
        raise UserError(f"{checkpoint} is a run that has no best/ yet: let it end first")


def spec_of(
    checkpoint: Path, overrides: list[str], *, needs_data: bool = True, recovers: bool = False
) -> Spec:
    """A spec whose model is a checkpoint, with what that remembers of the run that saved it.

    Raises UserError for what is no checkpoint, for overrides of how one is made, and where data is
    needed and none is known.
    """
    checkpoint_folder(checkpoint)
    made_by = {"prune", "search", "compare"} | (set() if recovers else {"recovery"})
    if wrong := [o for o in overrides if o.partition("=")[0].partition(".")[0].strip() in made_by]:
        raise UserError(f"{wrong[0]}: {checkpoint} is taken as it is; leave this out")
    raw: dict[str, Any] = {"calibration": NOTHING_PRUNED}
    if _is_timm(checkpoint / "config.json"):
        raw["model"] = {"modality": "vision"}
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
    if "data" not in raw and not needs_data:
        raw["data"] = {"source": "none"}
    if "data" not in raw:
        raise UserError(f"{checkpoint} has no {SPARSITY_FILE}: add data.source=... to the command")
    return parse_spec(raw, str(checkpoint))


def saved_facts(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of how it was made; {} where it says nothing."""
    facts = checkpoint / SPARSITY_FILE
    found: dict[str, Any] = json.loads(facts.read_text("utf-8")) if facts.is_file() else {}
    return found


def _is_timm(config: Path) -> bool:
    try:
        return "architecture" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return False


def _saved(facts: Path) -> dict[str, Any]:
    """The part of a spec that a checkpoint remembers."""
    try:
        saved = json.loads(facts.read_text(encoding="utf-8"))
        sections = {name: dict(saved[name]) for name in ("data", "evaluation")}
        model = {"dtype": saved["dtype"], "modality": saved.get("modality", "language")}
        sections["calibration"] = NOTHING_PRUNED | {"seed": saved["calibration"]["seed"]}
        return sections | {"model": model | {"towers": saved.get("towers", [])}}
    except OSError as error:
        raise UserError(f"{facts} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{facts} is damaged ({type(error).__name__}: {error}): restore it, or remove it and "
            "add data.source=... to the command"
        ) from None
