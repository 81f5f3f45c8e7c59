"""The share of the matrix-product rate that a sweep reaches, and what a trial costs beside it.

    python tests/bench/sweep.py [--json] [--samples 8] [--windows 16] [--runs 3]

The products are timed alone, at the model's own shapes and token counts, head included; the share
is the time they would take over the time the sweep took. The second share counts the attention of
torch as well, timed alone: the model's forward cannot do without it, and what is left is norms,
activations, the loss, and pruning. Interleaved; medians of `--runs`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from flows.plan import search_trial
from infra.environment import reuse_freed_memory
from infra.records import TrialSpec
from infra.spec_files import load_spec
from modalities.base import Modality
from tasks.trial import loaded, run_trial


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--spec", default="flows/specs/quickstart.toml")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    sizes = [
        f"calibration.samples={options.samples}",
        f"evaluation.selection_windows={options.windows}",
    ]
    spec = load_spec(options.spec, [*sizes, "prune.beta=0.004"])
    trial = search_trial(spec, spec.prune, -1)
    dense = trial.model_copy(update={"prune": trial.prune.model_copy(update={"sparsity": 0.0})})
    dense = dense.model_copy(update={"prune": dense.prune.model_copy(update={"beta": 0.0})})
    run_trial(trial)  # warm
    names = ("dense", "pruning", "dense_attention", "pruning_attention", "outside_s")
    rows: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.runs):
        products = _product_seconds(loaded(trial.model), trial)
        attention = _attention_seconds(loaded(trial.model), trial)
        for name, spec, blocks_only in (
            ("dense", dense, 0),
            ("pruning", trial, trial.calibration.samples * trial.calibration.length),
        ):
            result = run_trial(spec)
            tokens = spec.windows * spec.context
            ideal = products[1] * tokens + products[0] * blocks_only
            rows[name].append(ideal / result.cost.sweep_s)
            ideal += attention * (tokens + blocks_only)
            rows[f"{name}_attention"].append(ideal / result.cost.sweep_s)
        rows["outside_s"].append(result.cost.total_s - result.cost.sweep_s)
    answer = {name: statistics.median(values) for name, values in rows.items()}
    print(f"{'share of the rate of':<28}{'products':>10}{'and attention':>15}")
    for name, what in (("dense", "dense evaluation"), ("pruning", "prune and evaluate")):
        print(f"{what:<28}{answer[name]:>10.0%}{answer[f'{name}_attention']:>15.0%}")
    print(f"seconds outside the sweep, warm trial: {answer['outside_s']:.3f}")
    if options.json:
        print(json.dumps(answer | {"threads": torch.get_num_threads(), "runs": options.runs}))


def _product_seconds(modality: Modality, trial: TrialSpec) -> tuple[float, float]:
    """Seconds per token of all products of the blocks, and of those and the head."""
    rows = max(1, 2048 // trial.context) * trial.context

    def seconds(weights: Iterator[torch.Tensor]) -> float:
        total = 0.0
        for weight in weights:
            inputs = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
            F.linear(inputs, weight)
            started = time.perf_counter()
            F.linear(inputs, weight)
            total += time.perf_counter() - started
        return total / rows

    blocks = seconds(m.weight() for block in modality.blocks for m in block.matrices)
    head = modality.model.get_output_embeddings().weight  # type: ignore[operator]
    return blocks, blocks + seconds(iter([head]))


def _attention_seconds(modality: Modality, trial: TrialSpec) -> float:
    """Seconds per token of causal attention in all blocks."""
    config: Any = modality.model.config
    windows = max(1, 2048 // trial.context)
    size = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    dtype = next(modality.model.parameters()).dtype
    q, k, v = (torch.randn(windows, n, trial.context, size, dtype=dtype) for n in heads)
    total = 0.0
    for _ in range(1 + len(modality.blocks)):
        started = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        total += time.perf_counter() - started
    return total * len(modality.blocks) / (1 + len(modality.blocks)) / (windows * trial.context)


if __name__ == "__main__":
    main()
