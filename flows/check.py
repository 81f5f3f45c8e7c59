"""What a spec means, before any work starts: blocks, matrices, data, budget, memory, time, place.

    sparseramp check flows/specs/quickstart.toml

Every source is resolved and read, the model is loaded where a trial would load it, and its dense
loss is compared with a plain loop's. Nothing is pruned. Of a comparison, the first model is shown,
and the time of all cells; a cell that would be refused is named with the reason. Of a study, see
flows/check_study.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.cells import Cell, cells_of
from flows.live import duration
from flows.measures import WINDOWS
from flows.pins import pin, refuse
from flows.plan import (
    final_wave,
    kinds_of_trial,
    ladder,
    measuring_passes,
    planned_passes,
    refuse_objective,
    search_trial,
    token_passes,
    waves_left,
)
from flows.recovered import NAMES
from infra.cluster import Cluster, Share, connect
from infra.errors import UserError
from infra.records import ModelRecord, TrialSpec
from infra.specs import PruneSpec, Spec
from tasks.allocation import allocation_named, bounds_of, check_rates
from tasks.trial import describe_model, measure_profile, time_dense


def check(spec: Spec, *, prune_dir: str = "", as_json: bool = False) -> dict[str, Any]:
    """Print the plan of a search and return it; raises UserError where it could not run.

    `prune_dir` is where `prune` would write, if elsewhere than `search`.
    """
    cells = cells_of(spec) if spec.compare.varies else [Cell("", "", spec)]
    if len(cells) == 1:
        refuse(spec)
        pin(spec)  # what cannot be read is refused before Ray is started
    found: dict[str, Found | UserError] = {}  # by the model's source
    refused: dict[str, str] = {}
    passes, seconds, memory = 0, 0.0, 0
    with connect(spec.cluster) as cluster:
        where = cluster.describe()
        for cell in cells:
            if cell.spec.model.source not in found:
                found[cell.spec.model.source] = look_at(cell.spec, cluster, alone=len(cells) == 1)
            look = found[cell.spec.model.source]
            try:
                if isinstance(look, UserError):
                    raise look
                refuse(cell.spec)
                try_rates(cell.spec, look, cluster)
            except UserError as error:
                refused[cell.name] = str(error)
                continue
            measuring = measuring_passes(cell.spec, look.model)
            passes += measuring + planned_passes(cell.spec, look.model, {})
            in_turn = measuring + _passes_in_turn(cell.spec, look.model, where["parallel"])
            seconds += in_turn * look.seconds_per_token
            memory = max(memory, *(memory_bytes(look.model, t) for t in kinds_of_trial(cell.spec)))
    shown = next((look for look in found.values() if isinstance(look, Found)), None)
    if shown is None or len(refused) == len(cells):
        raise UserError(next(iter(refused.values())))
    model, data = shown.model, shown.spec.data
    answer = {
        "model": model.model_dump(exclude={"matrices"}),
        "blocks": [_block(model, index) for index in range(len(model.blocks))],
        "sources": {
            "model": shown.spec.model.source,
            **{s: data.source_of(s) for s in ("calibration", "selection", "report")},
        },
        "numbers": bounds_of(spec.prune, model.matrices) if len(cells) == 1 else {},
        "rungs": [vars(rung) for rung in ladder(spec)],
        "cells": len(cells),
        "refused": refused,
        "token_passes": passes,
        "seconds": seconds,
        "not_in_seconds": spec.evaluation.tasks,
        "memory_bytes": memory,
        "cluster": where,
        "run": spec.run.dir,
        "prune_run": prune_dir or spec.run.dir,
    }
    if as_json:
        print(json.dumps(answer))
    else:
        _print(spec, model, answer)
    return answer


@dataclass(frozen=True)
class Found:
    """A model as a worker found it; `spec` is pinned to its revision."""

    spec: Spec
    model: ModelRecord
    seconds_per_token: float


def look_at(
    spec: Spec,
    cluster: Cluster,
    *,
    alone: bool,
    share: Share | None = None,
    seconds_per_token: float | None = None,
) -> Found | UserError:
    """What there is to see of a model; of one of many cells, without what it would prune.

    It is timed where `seconds_per_token` is not known.
    """
    try:
        pinned = pin(spec)
        kept = pinned.prune if alone else PruneSpec(sparsity=pinned.prune.sparsity)
        trials = kinds_of_trial(pinned.model_copy(update={"prune": kept}))
        model = cluster.call(describe_model, trials, share=share)
        refuse_objective(pinned, model)
        if seconds_per_token is None:
            tokens, seconds = cluster.call(time_dense, trials[0], share=share)
            seconds_per_token = seconds / tokens
    except UserError as error:
        return error
    return Found(pinned, model, seconds_per_token)


def try_rates(spec: Spec, look: Found, cluster: Cluster, share: Share | None = None) -> None:
    """Raise UserError where an allocation has no rates; those that cost a pass are not measured."""
    check_rates(spec.prune, look.model.matrices)
    allocation = allocation_named(spec.prune.allocation)
    if allocation.measure is not None and allocation.cost == "none":  # a file
        pinned = look.spec.model_copy(update={"prune": spec.prune})
        cluster.call(measure_profile, search_trial(pinned, spec.prune, -1), share=share)


def _block(model: ModelRecord, index: int) -> dict[str, Any]:
    inside = [matrix for matrix in model.matrices if matrix.block == index]
    return {
        "name": model.blocks[index],
        "params": sum(matrix.params for matrix in inside),
        "matrices": [[matrix.matrix, matrix.params] for matrix in inside],
    }


def _passes_in_turn(spec: Spec, model: ModelRecord, parallel: int) -> int:
    """Token passes that wait for one another: a wave's trials run side by side, waves do not."""
    waves = (sorted(map(token_passes, wave)) for wave in waves_left(spec, model, {}))
    return sum(sum(wave[::-1][::parallel]) for wave in waves)


def memory_bytes(model: ModelRecord, trial: TrialSpec) -> int:
    """Private bytes of a trial: what all batches hold at a pause, one block, the head's logits.

    A batch that pauses inside a block also holds what it has computed there: measured, about its
    normed input and two results of the widest matrix. The mapped weights come on top; all trials
    of a node share them.
    """
    size = 4 if model.dtype == "float32" else 2
    held = 2 * model.width + (2 * model.inner if trial.prune.pause == "linear" else 0)
    length, context = trial.calibration.length, trial.context
    if model.window_tokens:
        length = context = model.window_tokens
    calibrating = trial.calibration.samples * length * held
    states = trial.windows * context * (4 if trial.error_curves else 1)
    kept = sum(model.block_params()) if trial.checkpoint else max(model.block_params())
    logits = 2 * max(model.batch_tokens, context) * model.outputs
    trained = 0
    if trial.recovery:  # a copy of each weight, its gradient and two moments, in float32
        kept, logits = sum(model.block_params()), 3 * logits
        trained = 16 * kept if trial.recovery.method == "full" else 0
    return size * (calibrating + states * model.width + kept + logits) + trained


def _print(spec: Spec, model: ModelRecord, answer: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(title=f"{model.architecture}, {model.dtype}", title_justify="left")
    for column in ("blocks", "matrix", "weights each"):
        table.add_column(column, justify="right" if column == "weights each" else "left")
    for matrices, group in groupby(answer["blocks"], key=lambda block: block["matrices"]):
        names = [block["name"] for block in group]
        label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
        for position, (matrix, params) in enumerate(_folded(matrices)):
            table.add_row("" if position else label, matrix, params)
        table.add_section()
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(spec, model, answer).items():
        facts.add_row(name, value)
    console.print(facts)


def _facts(spec: Spec, model: ModelRecord, answer: dict[str, Any]) -> dict[str, str]:
    """The lines below the table of blocks."""
    prunable = sum(model.block_params())
    rungs = ", ".join(f"{r['samples']} + {r['windows']}" for r in answer["rungs"])
    cluster, tasks = answer["cluster"], ", ".join(answer["not_in_seconds"])
    hosts = ", ".join(node["host"] for node in cluster["nodes"])
    passes = f"{model.unit} passes" if model.unit == "token" else f"passes of {WINDOWS[model.unit]}"
    return {
        "prunable": f"{prunable:,} of {model.total_params:,} parameters"
        + (f"; never pruned, in no product: {', '.join(model.unseen)}" if model.unseen else ""),
        **answer["sources"],
        "dense loss": f"{model.dense_loss:.4f} nats/{model.unit}, equal to a plain loop's",
        **_what(spec, answer),
        **{name: _inside(*bounds) for name, bounds in answer["numbers"].items()},
        "rungs": f"{rungs} (calibration + selection {WINDOWS[model.unit]})",
        "time": f"about {duration(answer['seconds'])} for {answer['token_passes']:,} {passes}",
        **({"lm-eval": f"{tasks}: not in this time"} if tasks else {}),
        **({"recovery": _recovery(spec, answer)} if spec.recovery.steps else {}),
        "memory": f"about {answer['memory_bytes'] / 2**20:,.0f} MiB per trial beside the mapped "
        "weights",
        "runs on": f"{hosts}: {cluster['parallel']} at once, each trial with "
        f"{cluster['cpus_per_trial']:g} CPUs and {cluster['gpus_per_trial']:g} GPUs",
        "run directory": answer["run"]
        + ("" if answer["prune_run"] == answer["run"] else f"; of prune: {answer['prune_run']}"),
    }


def _recovery(spec: Spec, answer: dict[str, Any]) -> str:
    """What is fine-tuned for how long, and its share of all that is planned."""
    tuned = final_wave(spec, spec.prune, {})[0]
    plain = tuned.model_copy(update={"recovery": None})
    passes = 2 * answer["cells"] * (token_passes(tuned) - token_passes(plain))
    how = spec.recovery
    what = f" of {how.batch} x {how.length} tokens" if spec.model.modality == "language" else ""
    return (
        f"{how.steps} steps{what} by {NAMES[how.method]}, of uniform and of best: "
        f"{passes / answer['token_passes']:.0%} of this time"
    )


def _what(spec: Spec, answer: dict[str, Any]) -> dict[str, str]:
    """What is pruned how: one allocation, or the cells of a comparison and those refused."""
    if answer["cells"] == 1:
        return {"allocation": f"{spec.prune.allocation} at {spec.prune.goal}"}
    causes: dict[str, list[str]] = {}
    for name, cause in answer["refused"].items():
        causes.setdefault(cause, []).append(name)
    refused = {f"refused {', '.join(names)}": cause for cause, names in causes.items()}
    return {"cells": str(answer["cells"]), **refused}


def _inside(low: float, high: float) -> str:
    """An open interval, rounded inwards."""
    low, high = (math.copysign(math.ceil(abs(x) * 1e5 - 1e-6) - 1, x) / 1e5 for x in (low, high))
    return f"{low:.5f} to {high:.5f}"


def _folded(matrices: list[list[Any]]) -> list[tuple[str, str]]:
    """Experts of one parameter on one line."""
    rows: dict[str, list[int]] = {}
    for name, params in matrices:
        rows.setdefault(name.partition("[")[0], []).append(params)
    return [
        (name if len(sizes) == 1 else f"{name} x {len(sizes)} experts", f"{sizes[0]:,}")
        for name, sizes in rows.items()
    ]
