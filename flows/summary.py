"""What a finished run prints: dense, uniform and best side by side, and the conclusion.

print_summary(report, "runs/quickstart")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.statistics import plus_minus


def print_summary(report: dict[str, Any], run: str) -> None:
    """A table, the conclusion, and where to look next."""
    console = Console(highlight=False)
    table = Table(title=f"{report['spec']['model']['source']}, report split", title_justify="left")
    metrics = list(report["uniform"]["metrics"])
    for column in ("", "beta", "tilt", "sparsity", *metrics):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name in ("dense", "uniform", "best"):
        side = report[name]
        if side is None:
            continue
        facts = [f"{side[key]:.4g}" if key in side else "" for key in ("beta", "tilt", "sparsity")]
        values = [side["metrics"][m] for m in metrics]
        table.add_row(name, *facts, *(plus_minus(v["mean"], v["stderr"]) for v in values))
    console.print(table)
    console.print(report["gain"]["conclusion"])
    folder = Path(run)
    console.print(f"report      {folder / 'report.html'}")
    if (folder / "best").is_dir():
        console.print(f"checkpoint  {folder / 'best'}")
