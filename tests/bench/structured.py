"""Fewer channels and heads: uniform against the best line, and how fast the smaller models are.

    python -m tests.bench.structured [--json] [--sparsities 0.2 0.3] [--tilts 0.2 0.4] [--samples 8]

A smaller model is timed beside itself with zeros, by one thread; its speed depends on how many
units are left, so a scout's is timed. What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from flows.speed import timings, title
from infra.environment import reuse_freed_memory
from infra.specs import ModelSpec, PruneSpec, SpeedSpec
from tasks.speed import SMALLER, WITH_ZEROS, measure_speed
from tasks.trial import run_trial
from tests.bench.kept import Kept
from tests.bench.lines import Lines, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--spec", default="flows/specs/structured_smollm2.toml")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--tilts", type=float, nargs="+", default=[-0.2, -0.1, 0.1, 0.2, 0.4])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--kept", type=Path, default=Path("runs/bench-structured.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    reuse_freed_memory()  # as a worker does
    lines = Lines(
        Kept(options.kept),
        options.spec,
        samples=options.samples,
        windows=options.windows,
        seeds=options.seeds,
    )
    rows = []
    for sparsity in options.sparsities:
        uniform = PruneSpec(method=options.method, pattern="structured", sparsity=sparsity)
        pair = lines.compare(uniform, options.tilts)
        print(f"{sparsity:.0%} to remove; scouts by tilt, nats/token:")
        print("  ", "  ".join(f"{r.tilt:.2f} {r.loss:.4f}" for r in pair.scouts))
        speeds: dict[float, dict[str, Any]] = {}
        for side, results in (("uniform", pair.uniform), ("best", pair.best)):
            row = {"asked": sparsity, "side": side, **facts(results)}
            if row["beta"] not in speeds:
                scout = run_trial(lines.trial(results[0].spec.prune, checkpoint=True))
                speeds[row["beta"]] = speed_of(scout.checkpoint, lines.spec.model, options.runs)
                shutil.rmtree(scout.checkpoint)
            speed = speeds[row["beta"]]
            rows.append(row | speed)
            print(
                f"{side:<8} beta {row['beta']:.5f}  perplexity {row['perplexity']:.2f}  "
                f"{row['zeros']:.3%} removed  {speed['bytes']:.3f} of the bytes"
            )
            print("  ", "  ".join(f"{name} {x[1]:.2f}x" for name, x in speed["times"].items()))
        gain = pair.gain
        rows[-1]["gain"] = [gain.mean, gain.low, gain.high]
        rows[-1]["scouts"] = [[result.tilt, result.loss] for result in pair.scouts]
        print(f"gain {gain.mean:.3f} nats/token ({gain.low:.3f} to {gain.high:.3f})", flush=True)
    if options.json:
        sizes = {"samples": options.samples, "windows": options.windows}
        sizes |= {"seeds": options.seeds, "runs": options.runs}
        print(json.dumps({"bench": "structured", "rows": rows, **sizes}))


def speed_of(checkpoint: str, model: ModelSpec, runs: int) -> dict[str, Any]:
    """How many times as fast without its zeros (quartiles, by case), and its share of the bytes."""
    source = model.model_copy(update={"source": checkpoint})
    record = measure_speed(source, SpeedSpec(threads=1, runs=runs, case_s=60))
    held = {engine.name: engine.resident_bytes for engine in record.engines}
    times = {}
    for case in record.cases:
        found = next(t for t in timings(case, record.engines) if t.engine == SMALLER)
        times[title(case)] = [found.ratio_low, found.ratio, found.ratio_high]
    return {"times": times, "bytes": held[SMALLER] / held[WITH_ZEROS]}


if __name__ == "__main__":
    main()
