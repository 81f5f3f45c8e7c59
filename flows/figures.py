"""The plots of a report, as plain plotly figures; the page that shows them adds its own colours.

figures(report)["loss"]["data"]
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from infra.bits import ROUNDING, bits_of
from tasks.statistics import label, plus_minus

Figure = dict[str, Any]

COLOURS = {"dense": "#c2a53a", "uniform": "#8b93a1", "best": "#0e9f7e"}
RUNG_COLOURS = ["#4f93dd", "#e2872f", "#b06ad0", "#d9567a"]


def rates_shown(report: dict[str, Any]) -> dict[str, list[float]]:
    """Of uniform and best, by block: the share that went, or the bits that weights were left."""
    rates = {side: report[side]["block_rates"] for side in ("uniform", "best")}
    if report["spec"]["prune"]["method"] in ROUNDING:
        return {side: [bits_of(rate) for rate in each] for side, each in rates.items()}
    return rates


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """Plotly figures by the id of the element that shows them; the page adds its own colours."""
    sides = ["uniform"] if report["best"]["uniform"] else ["uniform", "best"]
    metric = report["spec"]["search"]["objective"]
    model = report["model"]
    prune = report["spec"]["prune"]
    rounds = prune["method"] in ROUNDING
    gone = "removed" if prune["pattern"] == "structured" else "zeros"
    hover = "%{y:.3f} bits in %{text}" if rounds else f"%{{y:.2%}} {gone} in %{{text}}"
    shown = rates_shown(report)
    rates = [_line(side, model, shown[side], hover) for side in sides]
    errors = [
        _line(side, model, [e["relative"] for e in curve], "relative error %{y:.3g} after %{text}")
        for side, curve in ((side, report["errors"][side]) for side in sides)
        if curve
    ]
    split = [
        _line(side, model, sizes, f"{what} %{{y:.3g}} in %{{text}}")
        | {"name": f"{side}, {what}", "line": {"color": COLOURS[side], "width": 2, "dash": dash}}
        for side in sides
        for what, dash in (("made", "solid"), ("carried", "dot"))
        # Nothing is carried into the first block, and a logarithmic axis has no zero.
        if any(sizes := [relative_part(e, what) or None for e in report["errors"][side]])
    ]
    what = "share removed" if gone == "removed" else "share of zeros"
    shares = {"title": {"text": what}, "tickformat": ".0%", "range": _room(rates)}
    if rounds:
        shares = {"title": {"text": "bits per weight"}}
    ratio = {"title": {"text": "‖H − H̃‖ / ‖H‖"}, "type": "log", "tickformat": ".2~g"}
    return {
        "loss": _figure(
            _search_traces(report, metric),
            "beta, the step of the rate from block to block"
            if report["number"] == "beta"
            else f"{report['number']} of {report['spec']['prune']['allocation']}",
            {"title": {"text": label(metric, report["best"]["metrics"][metric])}},
        ),
        "rates": _by_block(rates, model, shares),
        "errors": _by_block(errors, model, ratio | _ticks(errors)),
        "split": _by_block(split, model, ratio | {"title": {"text": "part / ‖H‖"}} | _ticks(split)),
        "speed": _speed(report["speed"]),
        "recovery": _recovery(report.get("recovery"), sides),
    }


def relative_part(error: dict[str, Any], part: str) -> float:
    """The norm of what a block makes or carries, over that of its dense output."""
    share = error[part] / error["absolute"] if error["absolute"] else 0.0
    return float(error["relative"] * share**0.5)


def _recovery(recovery: dict[str, Any] | None, sides: list[str]) -> Figure:
    """The loss of every training batch, by step; batches differ in difficulty."""
    curves = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": side,
            "x": list(range(1, len(recovery[side]["losses"]) + 1)),
            "y": recovery[side]["losses"],
            "line": {"color": COLOURS[side], "width": 1.5},
        }
        for side in (sides if recovery else [])
        if recovery
    ]
    return _figure(curves, "step", {"title": {"text": "training loss, nats"}})


def _speed(speed: dict[str, Any] | None) -> Figure:
    """Bars of every engine's ratio over the fastest dense engine, by case, with quartiles."""
    if speed is None:
        return {"data": [], "layout": {}}
    names = [engine["name"] for engine in speed["engines"] if not engine["refusal"]]
    bars = []
    for name in names:
        timings = [t for case in speed["cases"] for t in case["timings"] if t["engine"] == name]
        ratios = [timing["ratio"] for timing in timings]
        bars.append(
            {
                "type": "bar",
                "name": name,
                "x": [case["title"] for case in speed["cases"]],
                "y": ratios,
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [t["ratio_high"] - t["ratio"] for t in timings],
                    "arrayminus": [t["ratio"] - t["ratio_low"] for t in timings],
                },
                "hovertemplate": f"{name}: %{{y:.2f}} times as fast<extra></extra>",
            }
        )
    figure = _figure(bars, "", {"title": {"text": "times as fast as dense"}, "rangemode": "tozero"})
    figure["layout"]["barmode"] = "group"
    return figure


def _figure(data: list[Figure], xtitle: str, yaxis: Figure) -> Figure:
    return {"data": data, "layout": {"xaxis": {"title": {"text": xtitle}}, "yaxis": yaxis}}


def _by_block(data: list[Figure], model: dict[str, Any], yaxis: Figure) -> Figure:
    """Towers, where there are several, with a line between them and their names at the top."""
    figure, parts = _figure(data, "block", yaxis), _parts(model)
    if len(parts) > 1:
        figure["layout"]["shapes"] = [
            {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x}
            | {"line": {"color": COLOURS["uniform"], "width": 1, "dash": "dot"}}
            for x in (start - 0.5 for _, start, _ in parts[1:])
        ]
        figure["layout"]["annotations"] = [
            {"text": tower, "x": (start + stop - 1) / 2, "y": 1, "yref": "paper"}
            | {"yanchor": "top", "showarrow": False}
            for tower, start, stop in parts
        ]
    return figure


def _parts(model: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Each tower with its first block and the one after its last."""
    found, start = list[tuple[str, int, int]](), 0
    for tower, blocks in groupby(model["towers"]):
        stop = start + len(list(blocks))
        found.append((tower, start, stop))
        start = stop
    return found


def _room(traces: list[Figure]) -> list[float]:
    """Bounds of an axis of shares: five points around the data, nothing outside of 0 to 1."""
    values = [value for trace in traces for value in trace["y"] if value is not None]
    return [max(min(values) - 0.05, 0), min(max(values) + 0.05, 1)]


def _ticks(traces: list[Figure]) -> dict[str, str]:
    """1, 2, 5 on a logarithmic axis of few decades; all nine where one may hold no two of them."""
    values = [value for trace in traces for value in trace["y"] if value]
    span = max(values) / min(values) if values else math.inf
    return {"dtick": "D1"} if span < 5 else {"dtick": "D2"} if span < 300 else {}


def _line(side: str, model: dict[str, Any], values: Sequence[float | None], hover: str) -> Figure:
    """Values by block, a line for each tower: where one ends there is a point without a value."""
    points = list[tuple[int, float | None, str]]()
    for _, start, stop in _parts(model):
        points += [(start, None, "")] * bool(start)
        points += zip(range(start, stop), values[start:stop], model["blocks"][start:], strict=False)
    x, y, text = zip(*points, strict=True)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": side,
        "x": list(x),
        "y": list(y),
        "text": list(text),
        "hovertemplate": f"{side}: {hover}<extra></extra>",
        "line": {"color": COLOURS[side], "width": 2},
        "marker": {"size": 5},
    }


def _search_traces(report: dict[str, Any], metric: str) -> list[Figure]:
    """What is searched against the first number, one series per rung; bars are of its paired
    difference from uniform."""
    rows = [
        {
            **row,
            "x": row["numbers"].get(report["number"], 0.0),
            "y": row["loss"] if metric == "loss" else row["scores"].get(metric),
        }
        for row in report["trials"]
        if row["stage"] == "search" and row["loss"] is not None
    ]
    traces = []
    for rung in sorted({row["rung"] for row in rows}):
        series = sorted((r for r in rows if r["rung"] == rung), key=lambda row: row["x"])
        colour = RUNG_COLOURS[rung % len(RUNG_COLOURS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"rung {rung}, {series[0]['n_objective']} {report['gain']['of']}",
                "x": [row["x"] for row in series],
                "y": [row["y"] for row in series],
                "text": [_hover(row, metric) for row in series],
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
        points = [row for row in rows if row["label"] == report[side]["label"]]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": side,
                "x": [row["x"] for row in points],
                "y": [row["y"] for row in points],
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


def _hover(row: dict[str, Any], metric: str) -> str:
    text = f"trial {row['number']}: {row['label']}, tilt {row['tilt']:.2f}<br>"
    text += f"loss {plus_minus(row['loss'], row['stderr'])}"
    text += "".join(f"<br>{name} {score:.2f} %" for name, score in row["scores"].items())
    if row["gain"] and not row["uniform"]:
        text += "<br>below uniform by " if metric == "loss" else "<br>above uniform, points: "
        text += plus_minus(**row["gain"])
    return text
