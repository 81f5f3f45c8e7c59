"""How much of what free block rates could gain does the line reach?

    python -m tests.bench.near_optimal [--json] [--sparsity 0.6] [--times 20]

Uniform, the searched line, and a free search over all block rates (CMA-ES at scout fidelity, with
--times the token passes of the line's search), all measured on the report split with the same
calibration; a line with a bend, the family of two numbers, searched as usual; and the line's rates
reversed and in five random orders, which have the same rates at other depths. Trials are kept in
--out, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

from flows.plan import final_wave, next_wave, search_trial, token_passes
from infra.environment import reuse_freed_memory
from infra.records import ModelRecord, TrialResult
from infra.spec_files import load_spec
from infra.specs import PruneSpec, Spec
from tasks.allocation import rates_of
from tasks.statistics import paired_difference
from tasks.trial import describe_model
from tests.bench.kept import Kept


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--times", type=float, default=20, help="budget of the free search")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-near-optimal.jsonl"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    sizes = [
        f"prune.sparsity={options.sparsity}",
        f"calibration.samples={options.samples}",
        f"evaluation.selection_windows={options.windows}",
        f"evaluation.report_windows={options.windows}",
        "evaluation.calibration_seeds=1",
    ]
    line_spec = load_spec("flows/specs/quickstart.toml", sizes)
    scout = search_trial(line_spec, line_spec.prune, 0)
    model = describe_model([scout])
    kept = Kept(options.out)
    line, line_passes = search(kept, line_spec, model)
    scouts = math.ceil(options.times * line_passes / token_passes(scout))
    free_spec = load_spec(
        "flows/specs/quickstart.toml",
        [*sizes, "prune.allocation=free", f"search.scouts={scouts}", "search.wave=10"],
    )
    free, free_passes = search(kept, free_spec, model)
    bent_spec = load_spec("flows/specs/quickstart.toml", [*sizes, "prune.allocation=bent"])
    bent, bent_passes = search(kept, bent_spec, model)
    rates = block_rates_of(line, model)
    orders = {"line reversed": rates[::-1]}
    for seed in range(5):
        orders[f"random order {seed}"] = random.Random(seed).sample(rates, len(rates))
    candidates = {
        "line": line,
        "bent": bent,
        "free": free,
        **{name: as_free(line, order) for name, order in orders.items()},
    }
    measured: dict[str, TrialResult] = {}
    for name, prune in candidates.items():
        sides = [
            kept.run(trial.model_copy(update={"error_curves": False, "checkpoint": False}))
            for trial in final_wave(line_spec, prune, {})
        ]
        measured |= {"uniform": sides[0], name: sides[-1]}
    gains = {
        name: paired_difference([measured["uniform"].losses], [result.losses], result.tokens)
        for name, result in measured.items()
    }
    print(f"{'block rates':<16}{'loss':>8}{'gain':>9}{'stderr':>8}{'share of free':>15}")
    for name, gain in gains.items():
        share = gain.mean / gains["free"].mean
        loss = measured[name].loss
        print(f"{name:<16}{loss:>8.4f}{gain.mean:>+9.4f}{gain.stderr:>8.4f}{share:>15.2f}")
    passes = {"line": line_passes, "bent": bent_passes, "free": free_passes}
    print("search, in token passes:", ", ".join(f"{n} {p:,}" for n, p in passes.items()))
    if options.json:
        answer = {name: {"gain": g.mean, "stderr": g.stderr} for name, g in gains.items()}
        sizes_of = {"sparsity": options.sparsity, "passes": passes, "scouts": scouts}
        print(json.dumps(sizes_of | {"gains": answer, "line_rates": rates}))


def search(kept: Kept, spec: Spec, model: ModelRecord) -> tuple[PruneSpec, int]:
    """The best candidate, and the token passes that were spent on it."""
    results: dict[int, TrialResult] = {}
    while (wave := next_wave(spec, model, results))[0].stage == "search":
        results |= {trial.number: kept.run(trial) for trial in wave}
    return wave[-1].prune, sum(token_passes(result.spec) for result in results.values())


def block_rates_of(prune: PruneSpec, model: ModelRecord) -> list[float]:
    """One rate per block, of an allocation that measures nothing."""
    rates = rates_of(prune, model.matrices, ())
    return [
        next(r for r, m in zip(rates, model.matrices, strict=True) if m.block == block)
        for block in range(len(model.blocks))
    ]


def as_free(prune: PruneSpec, rates: list[float]) -> PruneSpec:
    """Given block rates, as numbers of the free allocation."""
    numbers = {f"block_{i}": rate - prune.sparsity for i, rate in enumerate(rates)}
    return prune.model_copy(update={"allocation": "free", "beta": 0.0, "parameters": numbers})


if __name__ == "__main__":
    main()
