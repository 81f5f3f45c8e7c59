"""What a bounded fine-tune gives back at 70 %: uniform rates and the best line, LoRA and full.

    python -m tests.bench.recovery [--json] [--steps 16] [--batch 4] [--length 256]

SmolLM2-135M (dequantised from 4 bits), Wanda, trained on the passages that calibrate, measured on
16 report windows of 512 tokens. Gains are paired, window by window. Trials are kept in --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flows.measures import gain_in
from flows.plan import final_wave
from flows.recovered import side_of
from infra.environment import reuse_freed_memory
from infra.records import TrialResult
from infra.spec_files import load_spec
from tasks.statistics import plus_minus
from tests.bench.kept import Kept

BETA = 0.012  # the best line at 70 %, by earlier searches
RATES = {"lora": 2e-3, "full": 5e-4}  # high, for so few steps


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-recovery.jsonl"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    kept, rows = Kept(options.out), []
    print(f"{'rates':<9}{'method':<8}{'before':>16}{'after':>16}{'gained, nats':>18}", end="")
    print(f"{'zeros':>24}{'trained':>12}{'s':>6}")
    after: dict[tuple[str, str], TrialResult] = {}
    for method, rate in RATES.items():
        overrides = [
            "prune.sparsity=0.7",
            f"recovery.method={method}",
            f"recovery.learning_rate={rate}",
            *(f"recovery.{key}={getattr(options, key)}" for key in ("steps", "batch", "length")),
        ]
        spec = load_spec("flows/specs/quickstart.toml", overrides)
        best = spec.prune.model_copy(update={"beta": BETA})
        pair = [trial for trial in final_wave(spec, best, {}) if trial.recovery]
        for name, trial in zip(("uniform", "best"), pair, strict=True):
            update = {"checkpoint": False, "error_curves": False}
            result = kept.run(trial.model_copy(update=update))
            after[method, name] = result.recovered()
            side = side_of(result, "loss", "token")
            rows.append({"rates": name, "beta": result.beta, "learning_rate": rate, **side})
            ppl = [side[when]["perplexity"] for when in ("before", "after")]
            print(f"{name:<9}{method:<8}", end="")
            print("".join(f"{plus_minus(p['mean'], p['stderr']):>16}" for p in ppl), end="")
            print(f"{plus_minus(side['gained']['mean'], side['gained']['stderr']):>18}", end="")
            print(f"{side['zeros_before']:>12}{side['zeros_after']:>12}", end="")
            print(f"{side['trained_params']:>12}{side['seconds']:>6.0f}", flush=True)
    left = {}
    for method in RATES:
        gain = gain_in("loss", [after[method, "uniform"]], [after[method, "best"]])
        left[method] = {key: getattr(gain, key) for key in ("mean", "stderr", "low", "high")}
        print(f"best over uniform after {method}: {plus_minus(gain.mean, gain.stderr)} nats/token")
    if options.json:
        print(json.dumps({"beta": BETA, "rows": rows, "best_over_uniform": left}))


if __name__ == "__main__":
    main()
