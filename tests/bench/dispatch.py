"""What the driver costs, and how a study fills a cluster: the real loop, the real stores.

    python tests/bench/dispatch.py --json

(a) Searches of trials of no work: a worker that answers at once stands for the cluster; everything
else, plans, files, Optuna, MLflow's spool, is what `sparseramp study` does. (b) The dispatch loop
and its shares on a virtual clock over 64 nodes x 8 GPUs (simulated).
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import psutil
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for what the tests share

from flows.budget import Budget
from flows.dispatch_loop import FAIR, Entry, drive
from flows.study import study
from infra.cluster import Share
from infra.environment import prepare
from infra.records import (
    Cost,
    MatrixRecord,
    ModelAnswer,
    ModelQuestion,
    ModelRecord,
    TrialResult,
    TrialSpec,
)
from infra.specs import ClusterSpec
from infra.study_files import load_study
from tests.flows.test_dispatch_loop import Many
from tests.infra.virtual import VirtualCluster, node

SPEC = """
[model]
source = "{folder}/model"
[data]
source = "{folder}/text.txt"
[calibration]
samples = 4
length = 16
[evaluation]
context = 16
selection_windows = 8
report_windows = 8
calibration_seeds = 2
[search]
scouts = {scouts}
wave = 4
"""
BLOCKS, PER_BLOCK = 30, 7


def model_of(spec: TrialSpec) -> ModelRecord:
    """As many matrices as SmolLM2-135M has."""
    from infra.documents import data_sha256

    return ModelRecord(
        source=spec.model.source,
        architecture="Llama",
        dtype="float32",
        sha256="ab",
        blocks=[f"model.layers.{block}" for block in range(BLOCKS)],
        matrices=matrices(0.0),
        total_params=10**8,
        context=2048,
        data_sha256={
            split: data_sha256("language", spec.data, split)
            for split in ("calibration", "selection", "report")
        },
    )


def matrices(rate: float) -> list[MatrixRecord]:
    """Of one size."""
    return [
        MatrixRecord(
            block=block,
            matrix=f"layer{index}.weight",
            params=10**6,
            rate=rate,
            zeros=int(rate * 10**6),
        )
        for block in range(BLOCKS)
        for index in range(PER_BLOCK)
    ]


def answer(spec: TrialSpec) -> TrialResult:
    """What a worker would say: of one and the same model, and of trials whose loss is least at a
    beta of 0.005, with noise of its own."""
    if isinstance(spec, ModelQuestion):
        return ModelAnswer(spec=spec, state="complete", model=model_of(spec))
    noise = random.Random(spec.model_dump_json())
    loss = 3 + 100 * abs(spec.prune.beta - 0.005) + spec.prune.sparsity
    return TrialResult(
        spec=spec,
        state="complete",
        losses=[loss + noise.gauss(0, 0.01) for _ in range(spec.windows)],
        tokens=[spec.context] * spec.windows,
        bytes=[4 * spec.context] * spec.windows,
        block_rates=[spec.prune.sparsity] * BLOCKS,
        matrices=matrices(spec.prune.sparsity),
        weights_sha256="ab",
        cost=Cost(peak_memory_bytes=10**9, token_passes=1000),
    )


class AtOnce(VirtualCluster):
    """A cluster whose calls and trials take no time."""

    def __init__(self, spec: ClusterSpec, watch: Callable[[], None]) -> None:
        super().__init__([node("here", cpus=4)], spec, answer=answer, seconds=lambda spec: 0.01)
        self.watch = watch

    def call(self, function: Callable[..., Any], *args: Any, share: Share | None = None) -> Any:
        """All names are known."""

    def describe(self) -> dict[str, Any]:
        """For the events."""
        return {"nodes": 1}

    def holds(self, share: Share) -> bool:
        """It does."""
        return True

    def dispatch(self, function: Any, source: Any) -> Iterator[TrialResult]:
        for result in super().dispatch(function, source):
            yield result
            if not isinstance(result, ModelAnswer):
                self.watch()


def driver(folder: Path, searches: int, trials: int) -> dict[str, Any]:
    """(a): milliseconds and memory of the driver per trial, and how soon a finished study ends."""
    (folder / "model").mkdir()  # without torch, whose memory would hide the driver's
    (folder / "model/config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": numpy.zeros(1, numpy.float32)}, folder / "model/model.safetensors")
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {i}." * 9 for i in range(160)))
    (folder / "one.toml").write_text(SPEC.format(folder=folder, scouts=trials - 8))
    sparsities = [round(0.3 + 0.4 * index / searches, 6) for index in range(searches)]
    (folder / "study.toml").write_text(
        f'[study]\ndir = "{folder}/study"\n[[cells]]\nspec = "one.toml"\n'
        f"sparsities = {json.dumps(sparsities)}\n"
    )
    process, seen = psutil.Process(), list[int]()

    @contextmanager
    def connect(spec: ClusterSpec) -> Iterator[Any]:
        yield AtOnce(spec, lambda: seen.append(process.memory_info().rss))

    spec = load_study(folder / "study.toml")
    found: dict[str, Any] = {"searches": searches}
    sys.stdout = Path(os.devnull).open("w")  # the lines of the events  # noqa: SIM115
    try:
        begun, cpu = time.perf_counter(), time.process_time()
        board = study(spec, as_json=True, connect=connect)
        took_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
        begun = time.perf_counter()
        study(spec, as_json=True, connect=connect)
        resume_s = time.perf_counter() - begun
    finally:
        sys.stdout = sys.__stdout__
    num = len(seen)
    assert all(row["state"] == "complete" for row in board["rows"]), board["rows"][0]
    megabytes = [round(seen[i] / 2**20) for i in (0, num // 2, num - 1)]
    return found | {
        "trials": num,
        "driver_ms_per_trial": 1000 * took_s / num,
        "driver_cpu_ms_per_trial": 1000 * cpu_s / num,
        "load_average": os.getloadavg()[0],  # of a machine that others use, too
        "resume_s": resume_s,
        "rss_mb": dict(zip(("start", "middle", "end"), megabytes, strict=True)),
    }


def simulated(hours: float) -> dict[str, Any]:
    """(b): trials of minutes, lognormal, of cells that need 1/2 to 8 GPUs, over 512 GPUs."""
    chance = random.Random(0)
    kinds = [(0.5, 12), (1.0, 30), (2.0, 12), (4.0, 6), (8.0, 4)]
    entries, means = [], dict[str, float]()
    for gpus, count in kinds:
        for index in range(count):
            name = f"{gpus:g}-{index}"
            means[name] = chance.uniform(2, 12) * 60
            run = Many(name, 10**6, wave=128)
            share = Share(cpus=2 * gpus, gpus=gpus)
            entries.append(Entry(lambda run=run: run, share, priority=1 + index % 3))
    lengths = random.Random(1)

    def seconds(spec: TrialSpec) -> float:
        return means[spec.data.source] * lengths.lognormvariate(-0.18, 0.6)

    nodes = [node(f"n{i:02}", cpus=64, gpus=8) for i in range(64)]
    cluster = VirtualCluster(nodes, seconds=seconds, start_s=20.0, load_s=15.0)
    begun = time.process_time()
    drive(cluster, entries, order=FAIR, budget=Budget(until=3600 * hours))
    took_s = time.process_time() - begun
    end = cluster.now()
    used = [entry.used_at(end) for entry in entries]  # until the end, what then runs included
    shares = [s / entry.priority for s, entry in zip(used, entries, strict=True)]
    mean = sum(shares) / len(shares)
    by_gpus = {
        f"{gpus:g}": [
            round(s / mean, 3) for s, e in zip(shares, entries, strict=True) if e.share.gpus == gpus
        ]
        for gpus, _ in kinds
    }
    num = len(cluster.machines.log)
    return {
        "simulated": True,
        "nodes": 64,
        "gpus": 512,
        "cells": len(entries),
        "hours": hours,
        "trials": num,
        "slots_busy": sum(used) / (512 * end),
        "share_min": min(shares) / mean,
        "share_max": max(shares) / mean,
        "shares_by_gpus": {gpus: [min(each), max(each)] for gpus, each in by_gpus.items()},
        "loads_per_trial": cluster.machines.loads / num,
        "loop_cpu_ms_per_trial": 1000 * took_s / num,
    }


def main() -> None:
    """Measure, and print a table or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--searches", type=int, default=500)
    parser.add_argument("--trials", type=int, default=20, help="of each search")
    parser.add_argument("--hours", type=float, default=12, help="of simulated time")
    parser.add_argument("--only", choices=["driver", "simulated"])
    options = parser.parse_args()
    prepare()
    found: dict[str, Any] = {}
    if options.only != "simulated":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found |= driver(Path(folder), options.searches, options.trials)
    if options.only != "driver":
        found["simulation"] = simulated(options.hours)
    if options.json:
        print(json.dumps(found))
        return
    for key, value in (found | found.pop("simulation", {})).items():
        print(f"{key:>20}  {value:.4g}" if isinstance(value, float) else f"{key:>20}  {value}")


if __name__ == "__main__":
    main()
