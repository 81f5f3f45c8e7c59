"""The table of a comparison, from its files: compare.json, compare.html, and on a terminal.

    write_comparison(Path("runs/compare_smollm2"))    # or: sparseramp report runs/compare_smollm2

Every cell is a row, whatever became of it: `refused` before its first trial, `failed` with trials
but no result, `damaged` where a file of it cannot be read. So is what an earlier start with other
lists has finished. Across models, losses are shown relative to the dense model's or in bits per
byte, since tokens differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.cells import Cell, cells_of, earlier_cells
from flows.figures import RUNG_COLOURS, Figure
from flows.plan import ladder, measuring_passes, search_trial, token_passes
from flows.report import page
from infra.errors import UserError
from infra.records import ModelRecord, TrialResult
from infra.store import RunStore, write_atomic
from tasks.allocation import NOT_REPRODUCED
from tasks.model_card import calibrated_on, settings
from tasks.statistics import label, mean_loss, plus_minus

Comparison = dict[str, Any]
Row = dict[str, Any]

WHAT = ["model", "sparsity", "method", "allocation", "rates"]
REST = ["loss / dense", "gain", "95 % interval", "search cost", "outcome"]
NOT_BEGUN = "not begun"  # of a cell that has no files
UNFINISHED = "unfinished"  # begun, and its driver was stopped or killed
STOPPED = "stopped"  # by the budget, and by nothing else
EARLIER = " (earlier)"  # marks a cell that the present lists do not ask for
WIDE = {"bits per byte", "loss / dense", "95 % interval", "search cost"}


def write_comparison(folder: Path) -> Comparison:
    """Make compare.json and compare.html from the files of the cells, and return the former."""
    store = RunStore.read(folder)
    asked = cells_of(store.spec, folder)
    rows = [row_of(cell) for cell in asked]
    rows += [row_of(cell) | {"asked": False} for cell in earlier_cells(store.spec, asked, folder)]
    plots = _plots(rows)
    columns, table = _table(rows)
    finished = {path.parent.name for path in folder.glob("*/report.json")}
    comparison: Comparison = {
        "command": "compare",
        "protocol": store.spec.search.protocol,
        "rows": rows,
        "other_settings": sorted(finished - {row["cell"] for row in rows}),
        "not_reproduced": NOT_REPRODUCED,
        "spec": store.spec.model_dump(mode="json"),
        "provenance": store.provenance,
        "version": store.provenance.get("sparseramp", "checkout"),
    }
    windows = next((row["windows"] for row in rows if "windows" in row), "windows")
    data = json.dumps(comparison, indent=1, allow_nan=False)
    write_atomic(store.path("compare.json"), data.encode())
    html = page(
        "compare.html",
        page=comparison,
        columns=columns,
        table=table,
        windows=windows,
        calibrated=calibrated_on(comparison["spec"], windows),
        plots=plots,
        figures={name: figure for name, (_, figure) in plots.items()},
        settings=settings(comparison["spec"]),
    )
    write_atomic(store.path("compare.html"), html.encode())
    return comparison


def print_comparison(comparison: Comparison, run: str) -> None:
    """The table, why cells have no gain or no result, and where to look next."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # in a file, nothing has to fit a screen
    rows = comparison["rows"]
    columns, words = _table(rows)
    for model, goal in dict.fromkeys((row["model"], row["goal"]) for row in rows):
        table = Table(title=f"{model} at {goal}", title_justify="left")
        shown = [c for c in columns[2:] if c not in WIDE or console.width >= 150]
        for column in shown:
            left = column in WHAT or column == REST[-1]
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for row, cells in zip(rows, words, strict=True):
            if (row["model"], row["goal"]) == (model, goal):
                outcome = row.get("verdict", row["state"]) + ("" if row["asked"] else EARLIER)
                named = dict(zip(columns, cells, strict=True)) | {"outcome": outcome}
                table.add_row(*(named[column] for column in shown))
        console.print(table)
    if console.width >= 150:
        console.print("search cost: token passes of all candidates and of what the allocation")
        console.print("             measures, over those of one candidate at full fidelity")
    if not all(row["asked"] for row in rows):
        console.print("(earlier): finished by a start with other lists, under the same settings")
    if comparison["other_settings"]:
        others = ", ".join(comparison["other_settings"])
        console.print(f"not in the table, of other settings: {others}", soft_wrap=True)
    for row in rows:
        if row["cause"]:
            console.print(f"{row['cell']}: {row['cause']}", markup=False, soft_wrap=True)
    folder = Path(run)
    console.print(f"report  {folder / 'compare.html'}", soft_wrap=True)
    console.print(f"cells   {folder}/*/report.html", soft_wrap=True)


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and every row as words, one for each of them."""
    metrics = {
        name: row["metrics"][name]
        for row in rows
        for name in row.get("metrics", {})
        if name != "loss"
    }
    units = {row["gain"]["unit"]: None for row in rows if "gain" in row}
    rest = [f"gain, {' or '.join(units)}" if c == "gain" and units else c for c in REST]
    headings = [*WHAT, *(label(name, metric) for name, metric in metrics.items()), *rest]
    return headings, [_words(row, list(metrics)) for row in rows]


def _words(row: Row, metrics: Sequence[str]) -> list[str]:
    goal = row["goal"].removesuffix(" sparsity")
    words = [row["model"], goal, row["method"], row["allocation"]]
    if row["state"] != "complete":
        empty = len(WHAT) + len(metrics) + len(REST) - len(words) - 1
        return [*words, *[""] * empty, f"{row['state']}: {row['cause']}"]
    gain, baseline = row["gain"], row["verdict"] == "baseline"
    values = [*(row["metrics"].get(name) for name in metrics), row["relative_loss"]]
    return [
        *words,
        row["label"].removeprefix(row["allocation"]).strip(" ,")
        or "{:.3f} to {:.3f}".format(*row["rates"]),
        *(plus_minus(v["mean"], v["stderr"]) if v else "" for v in values),
        "" if baseline else plus_minus(gain["mean"], gain["stderr"]),
        "" if baseline else f"{gain['low']:.3f} to {gain['high']:.3f}",
        f"{row['search_cost']:.1f}",
        (row["cause"] or row["verdict"]) + ("" if row["asked"] else EARLIER),
    ]


def row_of(cell: Cell) -> Row:
    """What became of a cell: its state, and its numbers or the cause why there are none."""
    prune = cell.spec.prune
    row: Row = {
        "cell": cell.name,
        "model": cell.model,
        "modality": cell.spec.model.modality,
        "source": cell.spec.model.source,
        "sparsity": prune.sparsity,
        "bits": prune.bits,
        "goal": prune.goal,
        "method": prune.method,
        "allocation": prune.allocation,
        "asked": True,
    }
    if not (cell.folder / "run.json").exists():
        return row | {"state": NOT_BEGUN, "cause": "the same command goes on"}
    try:
        store = RunStore.read(cell.folder)
        report = store.report()
        return row | (_unfinished(store) if report is None else _finished(cell, store, report))
    except UserError as error:
        return row | {"state": "damaged", "cause": str(error)}


def _finished(cell: Cell, store: RunStore, report: dict[str, Any]) -> Row:
    best, gain, results = report["best"], report["gain"], list(store.results().values())
    rates = [matrix["rate"] for matrix in best["rates"]]
    return {
        "state": "complete",
        "label": best["label"],
        **{key: best[key] for key in ("beta", "tilt")},
        "realised": best["sparsity"],
        "realised_bits": best.get("bits", 0.0),  # none in reports of earlier versions
        "blocks": len(report["model"]["blocks"]),
        "family": report["model"]["architecture"],
        "peak_memory_bytes": report["cost"]["peak_memory_bytes"],
        "rates": [min(rates), max(rates)],
        "metrics": best["metrics"] | _recovered(report),
        "headline": report["headline"],
        "windows": report["windows"],
        "relative_loss": _relative_loss(results, report),
        "dense": report["dense"] and report["dense"]["metrics"],
        "uniform": report["uniform"]["metrics"],
        "gain": {key: gain[key] for key in ("mean", "stderr", "low", "high", "level", "n", "unit")},
        "n_seeds": gain["n_seeds"],
        "search_cost": _search_cost(cell, store.model(), results),
        "used_s": sum(result.cost.used_s for result in results),
        **_verdict(cell, report),
    }


def _recovered(report: dict[str, Any]) -> dict[str, Any]:
    """The headline metric of the best model after its fine-tune, where there was one."""
    recovery, name = report.get("recovery"), report["headline"]
    return {f"recovered {name}": recovery["best"]["after"][name]} if recovery else {}


def _verdict(cell: Cell, report: dict[str, Any]) -> dict[str, str]:
    """gain, no gain with its cause, or baseline: what the others are compared with."""
    gain, failed = report["gain"], report["cost"]["failed"]
    cause = f"{failed} of {report['cost']['trials']} trials failed" if failed else ""
    if cell.spec.prune.is_uniform and cell.spec.prune.allocation == "uniform":
        return {"verdict": "baseline", "cause": cause}
    if gain["verdict"] == "gain":
        return {"verdict": "gain", "cause": f"gain; {cause}" if cause else ""}
    why = "the interval holds zero"
    if report["best"]["uniform"]:
        why = "no candidate beat equal rates"
    elif gain["high"] < 0:
        why = "worse than uniform"
    return {"verdict": "no gain", "cause": "; ".join(filter(None, [f"no gain: {why}", cause]))}


def _unfinished(store: RunStore) -> Row:
    """Why a cell has no report: what its last driver said, and what became of its last trials."""
    failed = [r for r in store.results().values() if r.state == "failed"]
    finals = [r for r in failed if r.spec.stage == "final"]
    last = (store.events() or [{"event": ""}])[-1]
    if last["event"] == "stopped" and last["cause"] == "BudgetSpent":
        return {"state": STOPPED, "cause": last["reason"]}
    if last["event"] != "stopped" or last["cause"] != "UserError":
        return {"state": UNFINISHED, "cause": "the same command goes on"}
    if finals:
        return {"state": "failed", "cause": f"{finals[-1].spec.prune.label}: {finals[-1].cause}"}
    refused = not store.numbers()
    return {"state": "refused" if refused else "failed", "cause": last["reason"]}


def _relative_loss(results: Sequence[TrialResult], report: dict[str, Any]) -> dict[str, Any] | None:
    """Loss of best over loss of dense: the windows' own ratios, weighted by their dense loss."""
    finals = [r for r in results if r.spec.stage == "final" and r.state == "complete"]
    dense = next((result for result in finals if result.dense_losses), None)
    best = [r for r in finals if r.spec.prune.is_uniform == report["best"]["uniform"]]
    if dense is None:
        return None
    weights = [n * loss for n, loss in zip(dense.tokens, dense.dense_losses, strict=True)]
    ratios = [_ratios(result, dense.dense_losses) for result in best]
    found = mean_loss(ratios, weights)  # type: ignore[arg-type]  # weights need not be whole
    return {"mean": found.mean, "stderr": found.stderr, "n": found.n, "unit": "of dense"}


def _ratios(result: TrialResult, dense: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(result.losses, dense, strict=True)]


def _search_cost(cell: Cell, model: ModelRecord | None, results: Sequence[TrialResult]) -> float:
    """Token passes of the search and of what the allocation measures, the final comparison left
    out, over those of one full trial.

    Trials that another cell had done count as well, so that allocations can be compared.
    """
    full = token_passes(search_trial(cell.spec, cell.spec.prune, len(ladder(cell.spec)) - 1))
    passes = (r.cost.token_passes for r in results if r.spec.stage == "search")
    measuring = measuring_passes(cell.spec, model) if model else 0
    return (measuring + sum(passes)) / full


def _plots(rows: Sequence[Row]) -> dict[str, tuple[str, Figure]]:
    """Title and figure by the id of its element."""
    plots: dict[str, tuple[str, Figure]] = {}
    for model, goal in dict.fromkeys((row["model"], row["goal"]) for row in rows):
        inside = [r for r in rows if (r["model"], r["goal"]) == (model, goal)]
        title = f"{model} at {goal.removesuffix(' sparsity')}: gain over uniform"
        if any(row.get("verdict", "baseline") != "baseline" for row in inside):
            plots[f"plot{len(plots)}"] = title, _gains(inside)
    if len({row["model"] for row in rows}) > 1:
        for goal in dict.fromkeys(row["goal"] for row in rows):
            inside = [r for r in rows if r["goal"] == goal and r["state"] == "complete"]
            title = f"Models at {goal.removesuffix(' sparsity')}: loss relative to dense"
            plots[f"plot{len(plots)}"] = title, _across(inside)
    return plots


def _gains(rows: Sequence[Row]) -> Figure:
    """Bars by allocation, one colour per method, with 95 % intervals; a failed cell has none."""
    shown = [r for r in rows if r["state"] == "complete" and r["verdict"] != "baseline"]
    names = [n for n in dict.fromkeys(r["allocation"] for r in rows) if n != "uniform"]
    unit = next((row["gain"]["unit"] for row in shown), "")
    data = []
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        bars = [row for row in shown if row["method"] == method]
        data.append(
            {
                "type": "bar",
                "name": method,
                "x": [row["allocation"] for row in bars],
                "y": [row["gain"]["mean"] for row in bars],
                "text": [f"{row['label']}<br>{row['cause'] or row['verdict']}" for row in bars],
                "textposition": "none",
                "hovertemplate": f"{method}, %{{text}}<br>%{{y:.4f}} {unit}<extra></extra>",
                "marker": {"color": RUNG_COLOURS[index % len(RUNG_COLOURS)]},
                "error_y": {
                    "type": "data",
                    "array": [row["gain"]["high"] - row["gain"]["mean"] for row in bars],
                    "arrayminus": [row["gain"]["mean"] - row["gain"]["low"] for row in bars],
                    "thickness": 1.2,
                    "width": 3,
                },
            }
        )
    xaxis = {"type": "category", "categoryorder": "array", "categoryarray": names}
    yaxis = {"title": {"text": f"gain, {unit}"}}
    return {"data": data, "layout": {"barmode": "group", "xaxis": xaxis, "yaxis": yaxis}}


def _across(rows: Sequence[Row]) -> Figure:
    """Loss over dense loss by method and allocation, one colour per model."""
    data = []
    for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        points = [row for row in rows if row["model"] == model and row["relative_loss"]]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": model,
                "x": [f"{row['method']}, {row['allocation']}" for row in points],
                "y": [row["relative_loss"]["mean"] for row in points],
                "error_y": {
                    "type": "data",
                    "array": [1.96 * row["relative_loss"]["stderr"] for row in points],
                },
                "marker": {"size": 9, "color": RUNG_COLOURS[index % len(RUNG_COLOURS)]},
            }
        )
    layout = {"xaxis": {"type": "category"}, "yaxis": {"title": {"text": "loss over dense loss"}}}
    return {"data": data, "layout": layout}
