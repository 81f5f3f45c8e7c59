"""Our CPU engine beside DeepSparse 1.8.0 on one MLP, fp32: a reference, never a dependency.

    python3.11 -m venv deepsparse
    deepsparse/bin/pip install deepsparse==1.8.0 "numpy<2" onnx==1.14.1
    python tests/bench/deepsparse_reference.py --python deepsparse/bin/python --json

DeepSparse is closed, at its end of life, and under Neural Magic's community licence, which allows
evaluation: read the LICENSE that pip installs with it. It runs in that other environment, one
process per case, and in turn with ours: a timing of each engine, then the next. The MLP is one of
LLaMA-7B's without its gate: 11008 x 4096, ReLU, 4096 x 11008.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.engines import ENGINES

HIDDEN, INNER = 4096, 11008
ENVIRONMENT = {"NM_DISABLE_ANALYTICS": "True", "PATH": os.environ["PATH"]}
# In the other environment: make the graph of two matrices, then time a call for every line read.
THEIRS = """
import sys, time
from pathlib import Path
import numpy, onnx
from onnx import TensorProto, helper, numpy_helper
folder, tokens, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
up, down = numpy.load(folder / "up.npy"), numpy.load(folder / "down.npy")
value = lambda name, width: helper.make_tensor_value_info(name, TensorProto.FLOAT, [tokens, width])
graph = helper.make_graph(
    [
        helper.make_node("MatMul", ["x", "up"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "down"], ["y"]),
    ],
    "mlp", [value("x", up.shape[1])], [value("y", down.shape[0])],
    [numpy_helper.from_array(numpy.ascontiguousarray(w.T), n)
     for n, w in (("up", up), ("down", down))],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
model.ir_version = 8
onnx.save(model, str(folder / "mlp.onnx"))
import deepsparse
engine = deepsparse.Engine(str(folder / "mlp.onnx"), batch_size=tokens, num_cores=threads)
x = [numpy.load(folder / "x.npy")]
numpy.save(folder / "y.npy", engine.run(x)[0])
print("ready", deepsparse.__version__, flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    engine.run(x)
    print(time.perf_counter() - start, flush=True)
"""


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of the environment with DeepSparse")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7, 0.8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("DeepSparse: Neural Magic DeepSparse Community License, for evaluation; closed source")
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        for sparsity in options.sparsity:
            draw = torch.Generator().manual_seed(0)
            up, down = (
                torch.randn(shape, generator=draw).mul_(0.02)
                * (torch.rand(shape, generator=draw) >= sparsity)
                for shape in ((INNER, HIDDEN), (HIDDEN, INNER))
            )
            for tokens in options.tokens:
                x = torch.randn(tokens, HIDDEN, generator=draw)
                row = compared(up, down, x, Path(scratch), options)
                rows.append({"sparsity": sparsity, "tokens": tokens, **row})
                times = "  ".join(f"{name} {s * 1e3:.2f}" for name, s in row["median_s"].items())
                ratio, low, high = row["over_deepsparse"]
                print(
                    f"{sparsity:4.0%} {tokens:5} tokens  bitmask {ratio:.2f}x [{low:.2f}, "
                    f"{high:.2f}] DeepSparse {row['version']}  ms: {times}",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"threads": options.threads, "runs": options.runs, "rows": rows}))


def compared(
    up: Tensor, down: Tensor, x: Tensor, folder: Path, options: argparse.Namespace
) -> dict[str, object]:
    """Medians in seconds by engine, and the quartiles of DeepSparse's times over ours."""

    for name, tensor in (("up", up), ("down", down), ("x", x)):
        np.save(folder / f"{name}.npy", tensor.numpy())
    ours: dict[str, Callable[[Tensor], Tensor]] = {
        name: nn.Sequential(
            ENGINES[name].encode(up, None), nn.ReLU(), ENGINES[name].encode(down, None)
        )
        for name in ("dense", "onednn", "bitmask")
    }
    command = [options.python, "-c", THEIRS, str(folder), str(len(x)), str(options.threads)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT) as theirs:
        assert theirs.stdin
        assert theirs.stdout
        answer = ""
        while not answer.startswith("ready"):
            answer = theirs.stdout.readline()
            if not answer:
                raise SystemExit("DeepSparse did not start: see what it wrote above")

        def once() -> float:
            print(file=theirs.stdin, flush=True)
            return float(theirs.stdout.readline())

        exact = torch.from_numpy(np.load(folder / "y.npy"))
        if not torch.allclose(ours["bitmask"](x), exact, rtol=1e-3, atol=1e-3):
            raise SystemExit("the engines disagree")
        seconds: dict[str, list[float]] = {name: [] for name in [*ours, "deepsparse"]}
        for _ in range(2 + options.runs):
            for name, mlp in ours.items():
                began = time.perf_counter()
                mlp(x)
                seconds[name].append(time.perf_counter() - began)
            seconds["deepsparse"].append(once())
        theirs.stdin.close()
    seconds = {name: each[2:] for name, each in seconds.items()}
    ratios = [d / b for d, b in zip(seconds["deepsparse"], seconds["bitmask"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "version": answer.split()[1],
        "median_s": {name: statistics.median(each) for name, each in seconds.items()},
        "over_deepsparse": (middle, low, high),
    }


if __name__ == "__main__":
    main()
