"""What a study means before anything of it starts: every cell, what it needs, whether it can run.

    sparseramp check flows/specs/study_smollm2.toml

Names are looked up before Ray is started; then every distinct model with its data is opened and
timed once, where a trial would do so, and every cell's rates are tried. Nothing is pruned and
nothing is written. A cell that would be refused is named with its reason and its file.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.cell_runs import Connect
from flows.cells import Cell, study_cells
from flows.check import Found, look_at, memory_bytes, try_rates
from flows.descriptions import description_of
from flows.live import duration
from flows.pins import refuse
from flows.plan import kinds_of_trial, measuring_passes, planned_passes
from infra.cluster import Cluster, Share, connect
from infra.errors import UserError
from infra.specs import ClusterSpec
from infra.study_files import StudySpec

Line = dict[str, Any]  # of the table


def check_study(
    spec: StudySpec, *, as_json: bool = False, connect: Connect = connect
) -> dict[str, Any]:
    """Print the table of a study's cells and return it.

    Raises UserError for a name that is misspelt, before a cluster is asked; cells that could not
    run are in `refused`.
    """
    cells = study_cells(spec)
    of_all = ClusterSpec(
        address=cells[0].spec.cluster.address,
        parallel=spec.parallel,
        grows=any(cell.spec.cluster.grows for cell in cells),
    )
    with connect(of_all) as cluster:
        where, looks = cluster.describe(), _Looks(cluster)
        lines = [looks.line_of(cell) for cell in cells]
    answer = {
        "cells": lines,
        "models": len(looks.seconds_per_token),
        "refused": {line["cell"]: line["cause"] for line in lines if line["cause"]},
        "seconds": sum(line["seconds"] for line in lines),
        "budget": spec.budget.model_dump(),
        "cluster": where,
        "run": spec.dir,
    }
    if as_json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return answer


class _Looks:
    """Models as workers found them, each once for all cells that read it alike."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.found: dict[str, Found | UserError] = {}
        self.seconds_per_token: dict[str, float] = {}  # by the model's source

    def line_of(self, cell: Cell) -> Line:
        """A cell's line of the table; `cause` is why it would be refused."""
        spec, prune = cell.spec, cell.spec.prune
        line: Line = {"cell": cell.name, "model": cell.model, "method": prune.method}
        line |= {"allocation": prune.allocation, "goal": prune.goal, "needs": ""}
        line |= {"token_passes": 0, "seconds": 0.0, "memory_bytes": 0, "cause": ""}
        try:
            refuse(spec)
            share = self.cluster.share_of(spec.cluster)
            line["needs"] = str(share)
            if not self.cluster.holds(share):  # an autoscaler is to add one
                return line | {"needs": f"{share}, for which no node is there yet"}
            look = self._look(cell, share)
            try_rates(spec, look, self.cluster, share)
        except UserError as error:
            return line | {"cause": f"{error} ({cell.where})"}
        passes = measuring_passes(spec, look.model) + planned_passes(spec, look.model, {})
        return line | {
            "token_passes": passes,
            "seconds": passes * look.seconds_per_token,
            "memory_bytes": max(memory_bytes(look.model, t) for t in kinds_of_trial(spec)),
        }

    def _look(self, cell: Cell, share: Share) -> Found:
        """Raises UserError where the model or its data cannot be read."""
        key, source = description_of(cell.spec), cell.spec.model.source
        if key not in self.found:
            timed = self.seconds_per_token.get(source)
            self.found[key] = look_at(
                cell.spec, self.cluster, alone=False, share=share, seconds_per_token=timed
            )
        look = self.found[key]
        if isinstance(look, UserError):
            raise look
        self.seconds_per_token[source] = look.seconds_per_token
        return look


def _print(answer: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    lines, cluster = answer["cells"], answer["cluster"]
    table = Table(title=f"{len(lines)} cells, models: {answer['models']}", title_justify="left")
    for column in ("cell", "model", "method", "goal", "needs", "work", "memory"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(
            line["cell"],
            line["model"],
            line["method"],
            line["goal"],
            line["needs"],
            "refused" if line["cause"] else duration(line["seconds"]),
            f"{line['memory_bytes'] / 2**20:,.0f} MiB" if line["memory_bytes"] else "",
        )
    console.print(table, markup=False)
    for name, cause in answer["refused"].items():
        console.print(f"refused  {name}: {cause}", markup=False, soft_wrap=True)
    at_once = cluster["parallel"]
    console.print(
        f"time     about {duration(answer['seconds'])} of work on one worker; {at_once} at once, "
        f"about {duration(answer['seconds'] / at_once)} at the least",
        soft_wrap=True,
    )
    limits = {name: value for name, value in answer["budget"].items() if value}
    if limits.keys() - {"grace_s"}:
        said = ", ".join(f"{name} = {value:g}" for name, value in limits.items())
        console.print(f"budget   {said}", soft_wrap=True)
    console.print(f"run directory  {answer['run']}", markup=False, soft_wrap=True)
