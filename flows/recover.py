"""Fine-tuning a saved checkpoint without touching its zeros, into a run of its own.

    sparseramp recover runs/quickstart/best
    sparseramp recover runs/quickstart/best recovery.method=full run.dir=runs/full

Start and resume are the same command. The run holds the checkpoint, best/, and recovery.json, which
compares it with what it was made from, on the report split. stderr says how far it is.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flows.evaluate import report_trial, saved_facts, spec_of
from flows.following import shown
from flows.pins import pin_recovery
from flows.recovered import FILE, conclusion, print_recovery, side_of
from flows.stop import cause_of, stoppable
from infra import tracking
from infra.cluster import Cluster, LostCheckpointError, connect, damaged
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.sources import pinned
from infra.specs import Spec
from infra.store import RunStore, write_atomic
from tasks.model_card import recovered_card
from tasks.trial import refuse_unrecoverable, run_trial

STEPS = 200  # where the command does not say
_AGAIN = "the same command goes on"


def recover(checkpoint: Path, overrides: list[str], *, as_json: bool = False) -> dict[str, Any]:
    """Fine-tune, measure before and after, save the checkpoint and the numbers; also printed.

    Raises UserError for what is no checkpoint, what cannot be trained, and text that measures.
    """
    spec = _spec(checkpoint, overrides)
    with ExitStack() as stack:
        store = stack.enter_context(RunStore.open(spec, "recover"))
        if not store.numbers():
            print(_beginning(checkpoint, spec, overrides), file=sys.stderr)
        stack.enter_context(stoppable(store.dir))
        cluster = stack.enter_context(connect(spec.cluster))
        tracking.start(store.dir, spec.tracking)
        trial = _trial(store)
        unit = cluster.call(refuse_unrecoverable, trial)
        if not store.waves():
            store.write_wave(0, [trial])
        result = store.results().get(0)
        if result is None or result.state == "failed" or not _fetched(cluster, store, result):
            result = _run(cluster, store, trial)
            store.write_result(result)
            if result.state == "failed":
                store.event("stopped", cause="UserError", reason=result.cause)
                raise UserError(result.cause)
            if not _fetched(cluster, store, result):
                raise UserError(f"the checkpoint was lost on {result.host}: {_AGAIN}")
        answer: dict[str, Any] = {
            "kind": "recovery",
            "checkpoint": str(checkpoint),
            "run": str(store.dir),
            "sparsity": _sparsity(result),
            **side_of(result, "loss", unit),
            "spec": spec.recovery.model_dump(),
            "provenance": store.provenance,
        }
        answer["conclusion"] = conclusion(answer)
        data = json.dumps(answer, indent=1, allow_nan=False).encode()
        write_atomic(store.path(FILE), data)
        smaller = store.path("best/structure.json").is_file()
        card = recovered_card(_card_of(checkpoint), spec.model_dump(), answer, smaller=smaller)
        write_atomic(store.path("best/README.md"), card.encode())
        store.event("finished")
    if as_json:
        print(json.dumps(answer, allow_nan=False))
    else:
        print_recovery(answer)
    return answer


def _spec(checkpoint: Path, overrides: list[str]) -> Spec:
    """The spec of the run, its sources pinned; by default the run lies beside that of the
    checkpoint."""
    spec = spec_of(checkpoint, overrides, recovers=True)
    if saved_facts(checkpoint).get("bits"):
        raise UserError(f"{checkpoint} is rounded: training takes its weights off their grid")
    recovery = spec.recovery
    if "steps" not in recovery.model_fields_set:
        recovery = recovery.model_copy(update={"steps": STEPS})
    if not recovery.steps:
        raise UserError("recovery.steps=0 recovers nothing: give the steps, such as 200")
    beside = checkpoint.resolve().parent
    is_run = (beside / "run.json").is_file()
    default = beside.with_name(f"{beside.name if is_run else checkpoint.name}-recovered")
    update = {
        "model": spec.model.model_copy(update={"source": pinned(spec.model.source)}),
        "recovery": pin_recovery(recovery),
        "run": spec.run if spec.run.dir else spec.run.model_copy(update={"dir": str(default)}),
    }
    return spec.model_copy(update=update)


def _trial(store: RunStore) -> TrialSpec:
    """The trial that the run began with, or is to begin with."""
    if waves := store.waves():
        return waves[0][0]
    return report_trial(store.spec, checkpoint=True, recovery=store.spec.recovery)


def _run(cluster: Cluster, store: RunStore, trial: TrialSpec) -> TrialResult:
    """The trial on one worker, or on several that share every batch."""
    workers = store.spec.recovery.workers
    try:
        with shown(store, cluster.told):
            if workers > 1:
                return cluster.together(run_trial, trial, workers)
            return next(iter(cluster.run(run_trial, [trial])))
    except KeyboardInterrupt as error:
        store.event("stopped", **cause_of(error))
        raise


def _beginning(checkpoint: Path, spec: Spec, overrides: list[str]) -> str:
    """What is about to be done, and for how long where nobody said so."""
    asked = "recovery.steps" in {override.partition("=")[0].strip() for override in overrides}
    hint = "" if asked else " (set recovery.steps for more or fewer)"
    return f"fine-tuning {checkpoint} into {spec.run.dir}: {spec.recovery.steps} steps{hint}"


def _card_of(checkpoint: Path) -> str:
    """The README.md of a checkpoint of ours; others' may say anything."""
    card = checkpoint / "README.md"
    ours = saved_facts(checkpoint) and card.is_file()
    return card.read_text(encoding="utf-8") if ours else ""


def _fetched(cluster: Cluster, store: RunStore, result: TrialResult) -> bool:
    """Whether the checkpoint is in the run as it was saved, or could be brought there.

    Raises UserError where it cannot be written.
    """
    best = store.path("best")
    if best.is_dir() and not damaged(result, best):
        return True
    try:
        cluster.fetch(result, best)
    except LostCheckpointError:
        return False
    except OSError as error:
        raise UserError(f"cannot write {best}: {error.strerror}: {_AGAIN}") from error
    return True


def _sparsity(result: TrialResult) -> float:
    assert result.recovery is not None
    return result.recovery.zeros_after / sum(matrix.params for matrix in result.matrices)
