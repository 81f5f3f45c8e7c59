"""Our search against the published procedure: wall-clock, token passes, and the loss found.

    python tests/bench/search.py [--json] [--samples 32] [--windows 32] [--sparsity 0.6]

The published procedure (ATP, arXiv 2502.14770), in an own version: every multiple of 0.002 below
the bound, the model loaded anew for each, two passes of all calibration text, all selection text.
Ours: scouts and the ladder of flows/plan.py, model load counted. Both in this process, on the same
model, calibration and selection text; the clock runs from the start to the chosen beta. The beta
that either chose is then measured at full fidelity with two passes, so that the losses compare.
"""

from __future__ import annotations

import argparse
import json
import math
import time

from flows.plan import next_wave, search_trial, token_passes
from infra.environment import reuse_freed_memory
from infra.records import ModelRecord, TrialResult, TrialSpec
from infra.samplers import grid
from infra.spec_files import load_spec
from infra.specs import Spec
from tasks import trial
from tasks.allocation import beta_bounds

Found = tuple[float, float, int, int]


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--spec", default="flows/specs/quickstart.toml")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    spec = load_spec(
        options.spec,
        [
            f"prune.sparsity={options.sparsity}",
            f"calibration.samples={options.samples}",
            f"evaluation.selection_windows={options.windows}",
        ],
    )
    model = trial.describe_model(
        [search_trial(spec, spec.prune, 0)]
    )  # converts where needed, unclocked
    grid_losses: dict[float, float] = {}
    ours = ladder_search(spec, model)
    published = grid_search(spec, model, grid_losses)
    ours_loss = full_loss(spec, ours[0])
    published_loss = min(grid_losses.values())
    rows = [("published grid", published, published_loss), ("ours", ours, ours_loss)]
    print(f"{'':<16}{'beta':>9}{'seconds':>10}{'tokens':>11}{'trials':>8}{'perplexity':>12}")
    for name, (beta, seconds, tokens, trials), loss in rows:
        print(f"{name:<16}{beta:>9.4f}{seconds:>10.1f}{tokens:>11,}{trials:>8}", end="")
        print(f"{math.exp(loss):>12.3f}")
    answer = {
        "speedup": published[1] / ours[1],
        "token_ratio": published[2] / ours[2],
        "loss": {"published": published_loss, "ours": ours_loss},
        "beta": {"published": published[0], "ours": ours[0]},
        "sparsity": options.sparsity,
        "samples": options.samples,
        "windows": options.windows,
        "dtype": model.dtype,
        "grid": grid_losses,
    }
    if options.json:
        print(json.dumps(answer))


def ladder_search(spec: Spec, model: ModelRecord) -> Found:
    """Wave after wave until the plan asks for the final comparison."""
    trial._loaded.clear()
    started = time.perf_counter()
    results: dict[int, TrialResult] = {}
    while (wave := next_wave(spec, model, results))[0].stage == "search":
        for candidate in wave:
            results[candidate.number] = trial.run_trial(candidate)
    seconds = time.perf_counter() - started
    return (
        wave[-1].prune.beta,
        seconds,
        sum(token_passes(r.spec) for r in results.values()),
        len(results),
    )


def grid_search(spec: Spec, model: ModelRecord, losses: dict[float, float]) -> Found:
    """The published candidates: uniform is never tried, and each trial loads everything anew."""
    _, high = beta_bounds(model.block_params(), spec.prune.sparsity)
    started, tokens = time.perf_counter(), 0
    for beta in grid("beta", high)[1:]:
        trial._loaded.clear()
        losses[beta] = full_loss(spec, beta)
        tokens += token_passes(_published(spec, beta))
    seconds = time.perf_counter() - started
    return min(losses, key=losses.__getitem__), seconds, tokens, len(losses)


def full_loss(spec: Spec, beta: float) -> float:
    """Loss of one beta on all selection text after two passes of all calibration text."""
    return trial.run_trial(_published(spec, beta)).loss


def _published(spec: Spec, beta: float) -> TrialSpec:
    return search_trial(spec, spec.prune.model_copy(update={"beta": beta, "pause": "block"}), -1)


if __name__ == "__main__":
    main()
