"""What it costs to find the number of each one-number allocation.

    python -m tests.bench.families [--json] [--sparsity 0.7] [--samples 8] [--windows 16]

For arithmetic, OWL, AlphaPruning and DLP: tenths of the number's bound, all at full fidelity, are
the fine grid; the search then runs as it always does, and after each of its waves the candidate
that it would choose is measured at full fidelity. The cost is in full trials, up to the first wave
whose choice has a perplexity within 1 % of the grid's best. Trials are kept in --out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from flows.plan import next_wave, search_trial, token_passes
from infra.environment import reuse_freed_memory
from infra.records import TrialResult
from infra.samplers import GRID_STEPS
from infra.spec_files import load_spec
from infra.specs import Spec
from tasks.allocation import bounds_of, with_values
from tasks.trial import describe_model, measure_profile
from tests.bench.kept import Kept

FAMILIES = ("arithmetic", "owl", "alphapruning", "dlp")


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-families.jsonl"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    kept, rows = Kept(options.out), []
    print(f"{'allocation':<14}{'number':>9}{'grid':>8}{'found':>8}{'perplexity':>12}{'cost':>7}")
    for family in FAMILIES:
        overrides = [
            f"prune.allocation={family}",
            f"prune.sparsity={options.sparsity}",
            f"calibration.samples={options.samples}",
            f"evaluation.selection_windows={options.windows}",
        ]
        row = study(kept, load_spec("flows/specs/quickstart.toml", overrides))
        rows.append({"allocation": family, **row})
        cost = "never" if row["cost"] is None else f"{row['cost']:.2f}"
        print(f"{family:<14}{row['number']:>9}{row['grid_best']:>8.4f}{row['found']:>8.4f}", end="")
        print(f"{math.exp(row['loss']):>12.2f}{cost:>7}")
    if options.json:
        print(json.dumps({"sparsity": options.sparsity, "rows": rows}))


def study(kept: Kept, spec: Spec) -> dict[str, Any]:
    """The fine grid, the search, and when the search was near the grid's best."""
    trial = search_trial(spec, spec.prune, -1)
    model = describe_model([trial])
    model = model.model_copy(update={"profile": measure_profile(trial)})
    (name, (_, high)), *_ = bounds_of(spec.prune, model.matrices).items()

    def full_loss(value: float) -> float:
        candidate = with_values(spec.prune, {name: value})
        return kept.run(search_trial(spec, candidate, -1, model.profile)).loss

    grid = {high * step / GRID_STEPS: 0.0 for step in range(GRID_STEPS)}
    grid = {value: full_loss(value) for value in grid}
    results: dict[int, TrialResult] = {}
    spent, cost = 0, None
    while (wave := next_wave(spec, model, results))[0].stage == "search":
        results |= {each.number: kept.run(each) for each in wave}
        spent += sum(map(token_passes, wave))
        rung = max(result.spec.rung for result in results.values())
        chosen = min((r for r in results.values() if r.spec.rung == rung), key=lambda r: r.loss)
        near = full_loss(chosen.numbers.get(name, 0.0)) - min(grid.values()) <= math.log(1.01)
        cost = spent / token_passes(trial) if near and cost is None else cost
    found = wave[-1].prune
    value = {"beta": found.beta, **found.parameters}.get(name, 0.0)
    return {
        "number": name,
        "grid_best": min(grid, key=grid.__getitem__),
        "grid": grid,
        "found": value,
        "loss": full_loss(value),
        "cost": cost,
        "spent": spent / token_passes(trial),
    }


if __name__ == "__main__":
    main()
