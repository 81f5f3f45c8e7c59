"""How fast a checkpoint runs: every engine beside both dense ones, as a table and as JSON.

    sparseramp speed runs/quickstart/best
    sparseramp speed runs/quickstart/best speed.threads=1 speed.prompts='[128,2048]' --json

The measurement is one Ray task that has this node's processors, or a GPU, to itself.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.evaluate import spec_of
from infra.cluster import Cluster, connect
from infra.errors import UserError
from infra.records import SpeedCase, SpeedEngine, SpeedRecord
from infra.specs import Spec
from infra.store import write_atomic

FILE = "speed.json"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One engine in one case."""

    engine: str
    median: float  # in the case's unit
    low: float  # quartiles
    high: float
    ratio: float  # how many times as fast as the best dense engine, median of paired timings
    ratio_low: float
    ratio_high: float
    gain: bool  # three of four timings beat the dense one beside them


def speed(checkpoint: Path, overrides: list[str], *, as_json: bool = False) -> SpeedRecord:
    """Measure and print; the record of a run's checkpoint is kept in the run, for its report.

    Raises UserError for what is no checkpoint, and for an engine that does not run here.
    """
    spec = spec_of(checkpoint, overrides, needs_data=False)
    if sys.stderr.isatty():
        print(f"timing {checkpoint} with nothing beside it: this takes minutes", file=sys.stderr)
    with connect(spec.cluster) as cluster:
        record = measure(cluster, spec, checkpoint)
    if as_json:
        print(json.dumps({"kind": "speed", **summary(record)}, allow_nan=False))
    else:
        print_speed(record)
    return record


def measure(cluster: Cluster, spec: Spec, checkpoint: Path) -> SpeedRecord:
    """Measure a checkpoint on this node, with nothing beside."""
    from tasks.speed import measure_speed  # with torch, which takes seconds

    model = spec.model.model_copy(update={"source": str(checkpoint.resolve())})
    record = cluster.alone(measure_speed, model, spec.speed)
    if (checkpoint.parent / "run.json").is_file():
        write_atomic(checkpoint.parent / FILE, record.model_dump_json().encode())
    return record


def kept_speed(run: Path) -> dict[str, Any] | None:
    """The summary of what was measured of a run's checkpoint; None where nothing was."""
    path = run / FILE
    if not path.exists():
        return None
    try:
        return summary(SpeedRecord.model_validate_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: remove it, and measure again with sparseramp speed {run}/best"
        ) from error


def timings(case: SpeedCase, engines: Sequence[SpeedEngine]) -> list[Timing]:
    """Every engine beside the dense one that is fastest in this case."""
    baselines = [e.name for e in engines if e.baseline and e.name in case.seconds]
    fastest = min(baselines, key=lambda name: statistics.median(case.seconds[name]))
    found = []
    for name, seconds in case.seconds.items():
        shown = [case.work / s if case.work else 1000 * s for s in seconds]
        ratios = [d / s for d, s in zip(case.seconds[fastest], seconds, strict=True)]
        low, median, high = statistics.quantiles(shown, n=4)
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4)
        found.append(
            Timing(
                engine=name,
                median=median,
                low=low,
                high=high,
                ratio=ratio,
                ratio_low=ratio_low,
                ratio_high=ratio_high,
                gain=name not in baselines and ratio_low > 1,
            )
        )
    return found


def summary(record: SpeedRecord) -> dict[str, Any]:
    """What programs and the report read: no single timings, each engine's layers counted."""
    engines = []
    for engine in record.engines:
        encoded = [layer for layer in engine.layers if not layer.reason]
        engines.append(
            engine.model_dump(exclude={"layers"})
            | {
                "num_layers": len(engine.layers),
                "num_encoded": len(encoded),
                "dense_bytes": sum(layer.dense_bytes for layer in encoded),
                "encoded_bytes": sum(layer.encoded_bytes for layer in encoded),
                "kept_dense": {layer.name: layer.reason for layer in engine.layers if layer.reason},
            }
        )
    cases = [
        case.model_dump(exclude={"seconds"})
        | {
            "title": title(case),
            "num_timings": len(next(iter(case.seconds.values()))),
            "timings": [asdict(timing) for timing in timings(case, record.engines)],
        }
        for case in record.cases
    ]
    return record.model_dump(exclude={"engines", "cases"}) | {
        "engines": engines,
        "cases": cases,
        "conclusion": conclusion(record),
    }


def conclusion(record: SpeedRecord) -> str:
    """Where an engine is faster than the best dense one, and where none is."""
    gains, without = [], []
    for case in record.cases:
        best = max(
            (timing for timing in timings(case, record.engines) if timing.gain),
            key=lambda timing: timing.ratio,
            default=None,
        )
        if best is None:
            without.append(title(case))
        else:
            gains.append(f"{title(case)} {best.ratio:.2f}x ({best.engine})")
    beside = next(engine.name for engine in record.engines if engine.baseline)
    parts = [f"faster than {beside}: {', '.join(gains)}"] if gains else []
    parts += [f"no gain: {', '.join(without)}"] if without else []
    return "; ".join(parts)


def title(case: SpeedCase) -> str:
    """A case in words."""
    if case.kind == "images":
        return f"{case.batch} image{'s' * (case.batch > 1)}"
    if case.kind == "decode":
        return f"decode, batch {case.batch}"
    return f"{case.kind}, {case.length} tokens"


def print_speed(record: SpeedRecord) -> None:
    """A table of times, one of memory, and the conclusion."""
    console = Console(highlight=False)
    ran = [engine for engine in record.engines if not engine.refusal]
    gone = "zeros in blocks" if ran[0].name == "dense" else "of its blocks removed"
    console.print(
        f"{record.checkpoint}: {record.architecture}, {record.sparsity:.0%} {gone}, "
        f"{record.dtype} on {record.device}, {record.host}"
    )
    table = Table()
    for column in ("", "unit", "n", *(engine.name for engine in ran)):
        table.add_column(column, justify="right" if column else "left")
    for case in record.cases:
        cells = []
        for timing in timings(case, record.engines):
            versus = f" {timing.ratio:.2f}x" if timing.gain else ""
            cells.append(f"{timing.median:.4g} ({timing.low:.4g} to {timing.high:.4g}){versus}")
        table.add_row(title(case), case.unit, str(len(next(iter(case.seconds.values())))), *cells)
    for name, sizes in (
        ("weights in memory", [engine.resident_bytes for engine in ran]),
        ("memory at its peak", [engine.peak_bytes for engine in ran]),
    ):
        table.add_row(name, "MB", "", *(f"{size / 1e6:.1f}" for size in sizes))
    encoded = [
        f"{sum(not layer.reason for layer in engine.layers)} of {len(engine.layers)}"
        if engine.layers and not engine.baseline
        else ""
        for engine in ran
    ]
    if any(encoded):
        table.add_row("layers encoded", "", "", *encoded)
    divergences = (f"{engine.kl:.2g}" for engine in ran)
    table.add_row(f"KL to {ran[0].name}", f"nats/{_unit(record)}", "", *divergences)
    console.print(table)
    console.print(
        "Median and quartiles of n interleaved timings; a factor is over the faster dense engine, "
        "timing by timing, and stands only where three of four beat it."
    )
    for engine in record.engines:
        if engine.refusal:
            console.print(engine.refusal)
        layers = [] if engine.baseline else engine.layers
        for reason in dict.fromkeys(layer.reason for layer in layers if layer.reason):
            names = [layer.name for layer in layers if layer.reason == reason]
            which = names[0] if len(names) == 1 else f"{len(names)} layers"
            console.print(f"{engine.name} leaves {which} dense: {reason}")
    console.print(f"stored on disk: {record.stored_bytes / 1e6:.1f} MB")
    console.print(conclusion(record))


def _unit(record: SpeedRecord) -> str:
    return "image" if record.modality == "vision" else "token"
