"""The engines for GPUs beside cuBLAS: decoding, 2:4 for prefill, and a whole model of 7B's shape.

    python tests/bench/engines_gpu.py [--json] [--parts decode prefill model] [--layers 32]
    python tests/bench/engines_gpu.py --tune 1  # the constants of decode_gpu.py

All of it with the tests, on a machine with one GPU of 40 GB or more, is meant to take 5 minutes:

    python -m pytest -q --noconftest -m gpu tests/tasks/test_gpu_engines.py &&
    python tests/bench/engines_gpu.py --tune 1 && python tests/bench/engines_gpu.py --json

Random bf16 weights with random zeros. Each product is a CUDA graph over as many different weights
as leave no trace of one in the L2 until it comes again; graphs are replayed in turn, medians of
`--runs` replays with interquartile range and minimum. The dense time is that of the faster of
F.linear and, for one token, torch.mv.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.engines.decode_gpu import DeltaLinear, Deltas
from tasks.engines.semi_structured import SemiStructured

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # out x in, of LLaMA2-7B
ROTATION_BYTES = 256_000_000  # of weights per graph; an L2 holds 50 to 126 MB


def main() -> None:
    """Print tables, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"decode": decode, "prefill": prefill, "model": whole_model}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32, help="of the whole model")
    parser.add_argument("--tune", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    place = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(place)
    rows = tune(options) if options.tune else []
    for part in [] if options.tune else options.parts:
        rows += parts[part](options)
    if options.json:
        print(json.dumps({**place, "rows": rows}))


def sparse(shape: tuple[int, int], sparsity: float) -> Tensor:
    """A random bf16 weight with random zeros."""
    return (torch.randn(shape) * 0.02 * (torch.rand(shape) >= sparsity)).bfloat16()


def rotated(shape: tuple[int, int], sparsity: float, least: float = 2) -> list[Tensor]:
    """Weights that together are beyond the L2 even where they take `least` bytes a weight."""
    count = math.ceil(ROTATION_BYTES / (shape[0] * shape[1] * least))
    return [sparse(shape, sparsity) for _ in range(max(count, 2))]


class Captured:
    """A graph of works, one after another; it keeps them, and so what they read."""

    def __init__(self, works: Sequence[Callable[[], Tensor]]) -> None:
        self.works = works
        for _ in range(2):
            for work in works:
                work()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for work in works:
                work()


def timed(graphs: dict[str, Captured], runs: int) -> dict[str, dict[str, float]]:
    """Microseconds of each of a graph's works: graphs in turn, after three rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(runs + 3):
        for name, captured in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            captured.graph.replay()
            end.record()
            end.synchronize()
            if number >= 3:
                times[name].append(begin.elapsed_time(end) * 1e3 / len(captured.works))
    return summarised(times)


def summarised(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, interquartile range and minimum."""
    summary = {}
    for name, all_us in times.items():
        low, median, high = statistics.quantiles(all_us, n=4)
        summary[name] = {"median_us": median, "iqr_us": high - low, "min_us": min(all_us)}
    return summary


def row(
    case: str, summary: dict[str, dict[str, float]], name: str, **more: float
) -> dict[str, object]:
    """An engine's speed over the fastest dense kernel, printed."""
    dense = min((each for each in summary if each.startswith("dense")), key=_median(summary))
    speedup = summary[dense]["median_us"] / summary[name]["median_us"]
    for each in (dense, name):
        numbers = summary[each]
        print(
            f"{case:40} {each:12} {numbers['median_us']:9.2f} us  IQR {numbers['iqr_us']:6.2f}"
            f"  min {numbers['min_us']:9.2f}"
        )
    verdict = f"{speedup:.2f} times as fast" if speedup > 1.02 else f"no gain ({speedup:.2f})"
    print(f"{case:40} {verdict}", *(f"{key} {value:.3g}" for key, value in more.items()), sep="  ")
    return {
        "case": case,
        "engine": name,
        "speedup": speedup,
        "dense_kernel": dense,
        **more,
        "times": summary,
    }


def _median(summary: dict[str, dict[str, float]]) -> Callable[[str], float]:
    return lambda name: summary[name]["median_us"]


def decode(options: argparse.Namespace) -> list[dict[str, object]]:
    """1, 4 and 16 tokens by shape and sparsity."""
    rows = []
    for shape, sparsity in itertools.product(SHAPES, (0.5, 0.6, 0.7)):
        weights = rotated(shape, sparsity, least=2.5 * (1 - sparsity))
        layers = [DeltaLinear(weight, None) for weight in weights]
        per_weight = layers[0].encoded_bytes / weights[0].numel()
        for tokens in (1, 4, 16):
            x = torch.randn(tokens, shape[1]).bfloat16()
            works = {
                "dense linear": [partial(F.linear, x, weight) for weight in weights],
                "deltas": [partial(layer, x) for layer in layers],
            }
            if tokens == 1:
                works["dense mv"] = [partial(torch.mv, weight, x[0]) for weight in weights]
            graphs = {name: Captured(each) for name, each in works.items()}
            summary = timed(graphs, options.runs)
            case = f"decode {shape[0]}x{shape[1]} {sparsity:.0%} {tokens} tokens"
            speed = layers[0].encoded_bytes / summary["deltas"]["median_us"] / 1e6
            more = {"bytes_per_weight": per_weight, "terabytes_per_s": speed}
            rows.append(row(case, summary, "deltas", **more))
    return rows


def prefill(options: argparse.Namespace) -> list[dict[str, object]]:
    """2:4 for many tokens, and what expanding unstructured weights costs there."""
    rows = []
    for shape, tokens in itertools.product(SHAPES, (128, 512, 2048)):
        weights = rotated(shape, 0)
        for weight in weights:
            weight.view(-1, 4)[:, ::2] = 0
        x = torch.randn(tokens, shape[1]).bfloat16()
        engines = {engine.name: engine for engine in (SemiStructured(), Deltas())}
        works = {"dense linear": [partial(F.linear, x, weight) for weight in weights]}
        for name, engine in engines.items():
            if reason := engine.refusal(x.device, x.dtype) or engine.misfit(weights[0]):
                print(f"{name}: {reason}")
                continue
            layers = [engine.encode(weight, None) for weight in weights]
            works[name] = [partial(layer, x) for layer in layers]
        graphs = {name: Captured(each) for name, each in works.items()}
        summary = timed(graphs, options.runs)
        case = f"prefill {shape[0]}x{shape[1]} 50% {tokens} tokens"
        rows += [row(case, summary, name) for name in engines if name in works]
    return rows


def whole_model(options: argparse.Namespace) -> list[dict[str, object]]:
    """Tokens/s of a random Llama of 7B's shape at 70 %, batch 1, static cache, CUDA graphs."""
    from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

    steps, config = 32, LlamaConfig(num_hidden_layers=options.layers)  # 7B's is the default
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    linears = [each for each in dense.model.modules() if isinstance(each, nn.Linear)]
    for linear in linears:
        linear.weight.copy_(sparse(tuple(linear.weight.shape), 0.7))
    encoded = copy.deepcopy(dense)
    for name, module in list(encoded.model.named_modules()):
        if isinstance(module, nn.Linear):
            encoded.model.set_submodule(name, DeltaLinear(module.weight, module.bias))
    graphs, caches, logits = {}, {}, {}
    for name, model in (("dense linear", dense), ("deltas", encoded)):
        cache = caches[name] = StaticCache(config=config, max_cache_len=4 * steps)
        token = torch.full((1, 1), 7)
        place = torch.zeros(1, 1, dtype=torch.long)

        def step(model=model, cache=cache, token=token, place=place) -> Tensor:
            out = model(token, position_ids=place, past_key_values=cache, use_cache=True).logits
            place.add_(1).remainder_(2 * steps)
            return out

        logits[name] = step().float()
        graphs[name] = Captured([step])

    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number, name in itertools.product(range(options.runs + 3), graphs):
        caches[name].reset()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            graphs[name].graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times[name].append(begin.elapsed_time(end) * 1e3 / steps)
    summary = summarised(times)
    p, q = (logits[name].log_softmax(-1) for name in ("dense linear", "deltas"))
    more = {
        "tokens_per_s": 1e6 / summary["deltas"]["median_us"],
        "dense_tokens_per_s": 1e6 / summary["dense linear"]["median_us"],
        "kl_nats": float((p.exp() * (p - q)).sum()),
    }
    return [row(f"model of {options.layers} layers, 70%", summary, "deltas", **more)]


def tune(options: argparse.Namespace) -> list[dict[str, object]]:
    """Every layout, by shape and sparsity; the best, and the best for all."""
    rows: list[dict[str, object]] = []
    factors: dict[str, list[float]] = {}
    for shape, sparsity in itertools.product(SHAPES, (0.5, 0.7)):
        weights = rotated(shape, sparsity, least=2.5 * (1 - sparsity))
        x = torch.randn(options.tune, shape[1]).bfloat16()
        graphs = {"dense linear": Captured([partial(F.linear, x, weight) for weight in weights])}
        for group, parts in [(8, 32), (16, 16), (16, 32), (32, 8), (32, 16), (32, 32)]:
            layers = [DeltaLinear(weight, None, rows=group, parts=parts) for weight in weights]
            graphs[f"{group}x{parts}"] = Captured([partial(layer, x) for layer in layers])
        summary = timed(graphs, options.runs)
        dense = summary["dense linear"]["median_us"]
        layouts = [name for name in graphs if name != "dense linear"]
        for name in layouts:
            factors.setdefault(name, []).append(dense / summary[name]["median_us"])
        best = min(layouts, key=_median(summary))
        rows.append(row(f"{shape[0]}x{shape[1]} {sparsity:.0%} {best}", summary, best))
    for name, each in sorted(factors.items(), key=lambda each: -statistics.geometric_mean(each[1])):
        print(f"{name:8}", *(f"{factor:.2f}" for factor in each))
    return rows


if __name__ == "__main__":
    with torch.no_grad():
        main()
