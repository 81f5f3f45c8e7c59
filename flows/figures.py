"""The plots of a report, as plain plotly figures; the page that shows them adds its own colours.

figures(report)["loss"]["data"]
"""

import math
from typing import Any

Figure = dict[str, Any]

COLOURS = {"dense": "#c2a53a", "uniform": "#8b93a1", "best": "#0e9f7e"}
RUNG_COLOURS = ["#4f93dd", "#e2872f", "#b06ad0", "#d9567a"]


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """Plotly figures by the id of the element that shows them; the page adds its own colours."""
    sides = ["uniform", "best"] if report["best"]["beta"] != 0 else ["uniform"]
    blocks = report["model"]["blocks"]
    rates = [
        _line(side, blocks, report[side]["block_rates"], "%{y:.2%} zeros in %{text}")
        for side in sides
    ]
    errors = [
        _line(side, blocks, [e["relative"] for e in curve], "relative error %{y:.3g} after %{text}")
        for side, curve in ((side, report["errors"][side]) for side in sides)
        if curve
    ]
    return {
        "loss": {
            "data": _loss_traces(report),
            "layout": {
                "xaxis": {"title": {"text": "beta, the step of the rate from block to block"}},
                "yaxis": {"title": {"text": "loss, nats/token"}},
            },
        },
        "rates": {
            "data": rates,
            "layout": {
                "xaxis": {"title": {"text": "block"}},
                "yaxis": {"title": {"text": "share of zeros"}, "tickformat": ".0%"},
            },
        },
        "errors": {
            "data": errors,
            "layout": {
                "xaxis": {"title": {"text": "block"}},
                "yaxis": {"title": {"text": "‖H − H̃‖ / ‖H‖"}, "type": "log", "tickformat": ".2~g"},
            },
        },
    }


def _line(side: str, blocks: list[str], values: list[float], hover: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": side,
        "x": list(range(len(values))),
        "y": values,
        "text": blocks,
        "hovertemplate": f"{side}: {hover}<extra></extra>",
        "line": {"color": COLOURS[side], "width": 2},
        "marker": {"size": 5},
    }


def _loss_traces(report: dict[str, Any]) -> list[Figure]:
    """Loss against beta, one series per rung; bars are of the paired difference from uniform."""
    rows = [t for t in report["trials"] if t["stage"] == "search" and t["loss"] is not None]
    traces = []
    for rung in sorted({row["rung"] for row in rows}):
        series = sorted((r for r in rows if r["rung"] == rung), key=lambda row: row["beta"])
        colour = RUNG_COLOURS[rung % len(RUNG_COLOURS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"rung {rung}, {series[0]['n']} windows",
                "x": [row["beta"] for row in series],
                "y": [row["loss"] for row in series],
                "text": [_hover(row) for row in series],
                "hovertemplate": "%{text}<extra></extra>",
                "error_y": {
                    "type": "data",
                    "array": [row["gain"]["stderr"] if row["gain"] else 0 for row in series],
                    "thickness": 1.2,
                    "width": 3,
                },
                "line": {"color": colour, "width": 1.5, "dash": "dot"},
                "marker": {"size": 7},
            }
        )
    for side, symbol in (("uniform", "square-open"), ("best", "circle-open")):
        points = [row for row in rows if row["beta"] == report[side]["beta"]]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": side,
                "x": [row["beta"] for row in points],
                "y": [row["loss"] for row in points],
                "hoverinfo": "skip",
                "marker": {
                    "symbol": symbol,
                    "size": 16,
                    "color": COLOURS[side],
                    "line": {"width": 2, "color": COLOURS[side]},
                },
            }
        )
    return traces


def _hover(row: dict[str, Any]) -> str:
    text = f"trial {row['number']}: beta {row['beta']:.4g}, tilt {row['tilt']:.2f}<br>"
    text += f"loss {estimate({'mean': row['loss'], 'stderr': row['stderr']})}"
    if row["gain"] and row["beta"] != 0:
        text += f"<br>below uniform by {estimate(row['gain'])}"
    return text


def estimate(value: dict[str, Any]) -> str:
    """84.0 ± 5.1: the standard error to two digits, the mean to as many decimals."""
    mean, stderr = value["mean"], value["stderr"]
    digits = 1 - math.floor(math.log10(stderr)) if stderr > 0 else 4
    digits = min(max(digits, 0), 6)
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"
