"""SparseGPT and ALPS on one layer, against each of them written down plainly.

    python tests/bench/layer.py [--json] [--size 4096] [--runs 3] [--threads 1] [--methods alps]

Both begin with the same X^T X. Interleaved; medians of `--runs`; the error is that of the layer's
output, relative to the output. The plain ones follow the published programs: SparseGPT inverts the
Hessian and updates a panel of 128 columns at every column; ALPS decomposes the Hessian into
eigenvectors and sorts all weights at every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tasks.pruning import METHODS, prune_in_place
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="outputs and inputs of the layer")
    parser.add_argument("--rate", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=sorted(PLAIN), default=sorted(PLAIN))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight, inputs = layer(options.size, options.device)
    answer = {}
    for method in options.methods:
        ours: list[float] = []
        plain: list[float] = []
        for _ in range(options.runs):
            made, seconds = timed(partial(pruned, method, weight, inputs, options.rate))
            ours.append(seconds)
            told, seconds = timed(partial(PLAIN[method], weight, inputs, options.rate))
            plain.append(seconds)
        answer[method] = {
            "seconds": statistics.median(ours),
            "plain_seconds": statistics.median(plain),
            "ratio": statistics.median(plain) / statistics.median(ours),
            "error": error(weight, made, inputs.gram),
            "plain_error": error(weight, told, inputs.gram),
            "zeros": int((made == 0).sum()),
            "plain_zeros": int((told == 0).sum()),
        }
        row = answer[method]
        print(
            f"{method:9}  {row['seconds']:8.2f} s   plain {row['plain_seconds']:8.2f} s   "
            f"{row['ratio']:.2f} times as fast   error {row['error']:.4f}, {row['plain_error']:.4f}"
        )
    if options.json:
        place = {"size": options.size, "runs": options.runs, "threads": torch.get_num_threads()}
        print(json.dumps(answer | place | {"device": options.device, "rate": options.rate}))


def layer(size: int, device: str) -> tuple[Tensor, InputStatistics]:
    """A weight, and correlated inputs of different sizes: twice as many as there are columns."""
    torch.manual_seed(0)
    weight = torch.randn(size, size, device=device) * 0.02
    mix = torch.randn(size, size, device=device) / size**0.5
    inputs = InputStatistics({"gram"})
    for _ in range(4):
        tokens = torch.randn(size // 2, size, device=device)
        tokens = (tokens + tokens @ mix) * torch.linspace(0.2, 3, size, device=device)
        inputs.add(tokens)
    return weight, inputs


def pruned(method: str, weight: Tensor, inputs: InputStatistics, rate: float) -> Tensor:
    """By the project's method, from statistics that nothing was derived from yet."""
    fresh, new = InputStatistics({"gram"}), weight.clone()
    fresh.merge(inputs)
    zeros = METHODS[method].published_zeros(*weight.shape, rate)
    prune_in_place(new, fresh, method=method, budget=Budget(zeros))
    return new


def plain_sparsegpt(weight: Tensor, inputs: InputStatistics, rate: float) -> Tensor:
    """As published: inverse by Cholesky, panels of 128, every column updates its whole panel."""
    W, H = weight.clone(), inputs.gram * (2 / inputs.tokens)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], 128):
        stop = min(start + 128, W.shape[1])
        panel, factor = W[:, start:stop].clone(), U[start:stop, start:stop]
        errors = torch.zeros_like(panel)
        scores = panel.square() / factor.diagonal().square()
        threshold = scores.flatten().sort().values[int(scores.numel() * rate)]
        mask = scores <= threshold
        for j in range(stop - start):
            column = panel[:, j]
            left = column.clone()
            left[mask[:, j]] = 0
            errors[:, j] = (column - left) / factor[j, j]
            panel[:, j:] -= errors[:, j : j + 1] @ factor[j : j + 1, j:]
            panel[:, j] = left
        W[:, start:stop] = panel
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


def plain_alps(weight: Tensor, inputs: InputStatistics, rate: float) -> Tensor:
    """As published: eigenvectors once, then the largest of all weights by sorting, in x out."""
    H = inputs.gram.clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    scale = H.diagonal().sqrt()
    H = H / scale / scale[:, None]
    start = weight.t() * scale[:, None]
    target = H @ start
    values, vectors = torch.linalg.eigh(H)
    zeros = int(weight.numel() * rate)

    def largest(x: Tensor) -> Tensor:
        kept = x.clone().reshape(-1)
        kept[(x**2).reshape(-1).argsort()[:zeros]] = 0
        return kept.reshape(x.shape)

    rho, dual, D = 0.1, torch.zeros_like(start), largest(start)
    support = D != 0
    inverse = (vectors / (values + rho)) @ vectors.t()
    for step in range(1, 301):
        B = inverse @ (target - dual + rho * D)
        D = largest(B + dual / rho)
        dual = dual + rho * (B - D)
        if step % 3 == 0:
            changed = int(((D != 0) & ~support).sum()) / (weight.numel() - zeros)
            if not changed:
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            support = D != 0
            inverse = (vectors / (values + rho)) @ vectors.t()
    support = D != 0
    residual = (target - H @ D) * support
    direction, size = residual, (residual**2).sum(0)
    for _ in range(10):
        image = (H @ direction) * support
        length = size / (direction * image).sum(0).clamp(min=1e-30)
        D = D + length * direction
        residual = residual - length * image
        before, size = size, (residual**2).sum(0)
        direction = residual + size / before.clamp(min=1e-30) * direction
    return (D / scale[:, None]).t()


PLAIN = {"sparsegpt": plain_sparsegpt, "alps": plain_alps}


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it gives and its seconds, the device's included."""
    started = time.perf_counter()
    result = work()
    if result.device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """||X (W - W~)|| / ||X W||."""

    def size(x: Tensor) -> float:
        return float(((x @ gram) * x).sum(dtype=torch.float64)) ** 0.5

    return size(weight - new) / size(weight)


if __name__ == "__main__":
    with torch.no_grad():
        main()
