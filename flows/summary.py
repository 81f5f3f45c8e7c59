"""What a finished run prints: dense, uniform and best side by side, and the conclusion.

print_summary(report, "runs/quickstart")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.recovered import print_sides
from tasks.statistics import label, plus_minus


def print_summary(report: dict[str, Any], run: str) -> None:
    """A table, the conclusion, and where to look next."""
    console = Console(highlight=False)
    console.print(f"{report['spec']['model']['source']}, measured on the report split")
    published = report["spec"].get("published", {})
    table = Table()
    metrics = report["best"]["metrics"]
    shown = [name for name in metrics if name != "loss"] or ["loss"]
    headings = [label(name, metrics[name]) for name in shown]
    sizes = ("sparsity", "bits") if report["best"]["bits"] else ("sparsity",)
    for column in ("", "beta", "tilt", *sizes, *headings):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    if published:
        table.add_column("published", justify="right")
    for name in ("dense", "uniform", "best"):
        side = report[name]
        if side is None:
            continue
        facts = [f"{side[key]:.3g}" if key in side else "" for key in ("beta", "tilt", *sizes)]
        values = [side["metrics"].get(name) for name in shown]
        cells = [plus_minus(v["mean"], v["stderr"]) if v else "" for v in values]
        table.add_row(name, *facts, *cells, *([f"{published.get(name, '')}"] if published else []))
    console.print(table)
    console.print(report["gain"]["conclusion"])
    if size := report.get("size"):  # no report of earlier versions has it
        console.print(size)
    if report["explanation"]:
        console.print(report["explanation"])
    if recovery := report.get("recovery"):
        sides = ("uniform",) if report["best"]["uniform"] else ("uniform", "best")
        print_sides({side: recovery[side] for side in sides})
        console.print(recovery["conclusion"])
    folder = Path(run)
    console.print(f"report      {folder / 'report.html'}")
    if (folder / "best").is_dir():
        console.print(f"checkpoint  {folder / 'best'}")
