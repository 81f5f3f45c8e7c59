"""CPU engines on single layers, over the best dense kernel of the same type.

    python tests/bench/engines.py --shape 4096x4096 --sparsity 0.7 --dtype bf16 --threads 1 \\
        --tokens 1 256 --json

Random weights and zeros, in as many copies as exceed the caches, used in turn. Kernels are run one
after another, again and again; a figure is the median over `--runs`, the spread the distance of the
quartiles over it. A dense candidate besides the engines is `upcast`: bf16 weights made fp32 for an
fp32 product. `--clock cpu` counts the processor's time and is for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engines import ENGINES, bitmask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def main() -> None:
    """Print a table, and one JSON line per case with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="outputs x inputs")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.7])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--cache", type=int, default=96, help="MiB that the weights must exceed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    clock = CLOCKS[options.clock]
    for shape, dtype, sparsity in itertools.product(options.shape, options.dtype, options.sparsity):
        rows, columns = (int(side) for side in shape.split("x"))
        kernels = Kernels(rows, columns, sparsity, DTYPES[dtype], options.cache << 20)
        for tokens in options.tokens:
            x = torch.randn(tokens, columns).to(DTYPES[dtype])
            seconds = measured(kernels.of(x), options.runs, clock)
            middle = {name: statistics.median(each) for name, each in seconds.items()}
            best = min((name for name in middle if name != "bitmask"), key=middle.__getitem__)
            quartiles = statistics.quantiles(seconds["bitmask"], n=4)
            row = {
                "shape": shape,
                "dtype": dtype,
                "sparsity": sparsity,
                "tokens": tokens,
                "speedup": middle[best] / middle["bitmask"],
                "speedup_of_minima": min(seconds[best]) / min(seconds["bitmask"]),
                "spread": (quartiles[2] - quartiles[0]) / middle["bitmask"],
                "dense_kernel": best,
                "gb_per_s": kernels.encoded_bytes / middle["bitmask"] / 1e9,
                "dense_gb_per_s": rows * columns * x.element_size() / middle[best] / 1e9,
                "bytes_share": kernels.encoded_bytes / (rows * columns * x.element_size()),
                "seconds": middle,
                "threads": options.threads,
                "clock": options.clock,
                "isa": bitmask.ISAS[bitmask._isa()],
            }
            times = "  ".join(f"{name} {each * 1e3:.2f}" for name, each in middle.items())
            print(
                f"{shape:>12} {dtype} {sparsity:4.0%} {tokens:5} tokens  {row['speedup']:5.2f}x "
                f"[{row['speedup_of_minima']:.2f}] over {best:7} spread {row['spread']:4.0%}  "
                f"{row['gb_per_s']:5.1f} GB/s  ms: {times}",
                flush=True,
            )
            if options.json:
                print(json.dumps(row), flush=True)


class Kernels:
    """One layer in every engine, in enough copies that none is still cached when used again."""

    def __init__(
        self, rows: int, columns: int, sparsity: float, dtype: torch.dtype, beyond_bytes: int
    ) -> None:
        weight = torch.randn(rows, columns) * (torch.rand(rows, columns) >= sparsity)
        weight = weight.to(dtype)
        names = [
            name
            for name in ("dense", "onednn", "bitmask")
            if not ENGINES[name].refusal(weight.device, dtype)
        ]
        if "bitmask" not in names:
            raise SystemExit(ENGINES["bitmask"].refusal(weight.device, dtype))
        self.layers = {}
        for name in names:
            layer = ENGINES[name].encode(weight, None)
            self.encoded_bytes = layer.encoded_bytes  # of the last one, bitmask
            copies = 1 + beyond_bytes // layer.encoded_bytes
            self.layers[name] = [layer] + [
                ENGINES[name].encode(weight.clone(), None) for _ in range(copies - 1)
            ]

    def of(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What runs each kernel once, on the next copy."""
        turns: dict[str, Iterator[torch.nn.Module]] = {
            name: itertools.cycle(layers) for name, layers in self.layers.items()
        }
        run = {name: (lambda turn=turn: next(turn)(x)) for name, turn in turns.items()}
        if x.dtype == torch.bfloat16 and x.shape[0] > 16:
            dense = itertools.cycle(self.layers["dense"])
            run["upcast"] = lambda: F.linear(x.float(), next(dense).weight.float()).to(x.dtype)
        return run


def measured(
    run: dict[str, Callable[[], Tensor]], runs: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every run of each kernel, interleaved, after three warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(3 + runs):
        for name, kernel in run.items():
            start = clock()
            kernel()
            seconds[name].append(clock() - start)
    return {name: each[3:] for name, each in seconds.items()}


if __name__ == "__main__":
    main()
