"""Images per second: a sweep that evaluates the dense model against a plain loop over timm's.

    python tests/bench/images.py [--json] [--images 2048] [--samples 256] [--runs 5]

Both run in one process on the same transformed images, batch size and precision, in turn; medians
of `--runs`. The plain loop is the model as timm makes it, a forward and top-1 and top-5. The third
row prunes as well, on `--samples` images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from infra.environment import reuse_freed_memory
from infra.spec_files import load_spec
from modalities.base import Batch
from tasks.sweep import sweep
from tasks.trial import loaded


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--spec", default="flows/specs/vision_cifar10.toml")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    spec = load_spec(options.spec, [f"calibration.samples={options.samples}"])
    modality = loaded(spec.model)
    evaluation = modality.evaluation_batches(spec.data, "report", options.images, 0)
    calibration = modality.calibration_batches(spec.data, spec.calibration)
    with tempfile.TemporaryDirectory() as folder:
        modality.save(Path(folder))
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    model = model.to(modality.device, next(modality.model.parameters()).dtype).eval()

    def swept(rate: float, seen: list[Batch]) -> Callable[[], dict[str, list[float]]]:
        rates = [rate] * len(modality.matrices())
        return lambda: (
            sweep(
                modality,
                rates,
                method="wanda",
                pause_at="linear",
                calibration=seen,
                evaluation=evaluation,
            ).measured.scores
        )

    ways = {
        "plain timm loop": lambda: _plain(model, evaluation),
        "sweep, dense": swept(0.0, []),
        "sweep, pruned at 60 %": swept(0.6, calibration),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, dict[str, list[float]]] = {}
    for run in range(options.runs + 1):  # the first one warms up
        for name, way in ways.items():
            started = time.perf_counter()
            scores[name] = way()
            if run:
                seconds[name].append(time.perf_counter() - started)
    if scores["plain timm loop"] != scores["sweep, dense"]:
        raise SystemExit("the sweep and the plain loop score the same model differently")
    speed = {name: options.images / statistics.median(taken) for name, taken in seconds.items()}
    for name, rate in speed.items():
        top1 = statistics.mean(scores[name]["top1"])
        print(f"{name:<24}{rate:>10.0f} images/s{top1:>10.2%} top-1")
    if options.json:
        machine = {"device": str(modality.device), "threads": torch.get_num_threads()}
        sizes = {"images": options.images, "batch": evaluation[0].windows, "runs": options.runs}
        print(json.dumps({"images_per_s": speed} | machine | sizes))


@torch.no_grad()
def _plain(model: Any, batches: list[Batch]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"top1": [], "top5": []}
    for batch in batches:
        labels = torch.tensor(batch.labels)  # type: ignore[attr-defined]
        hits = model(batch.ids).float().topk(5).indices.cpu() == labels[:, None]
        found["top1"] += hits[:, 0].float().tolist()
        found["top5"] += hits.any(1).float().tolist()
    return found


if __name__ == "__main__":
    main()
