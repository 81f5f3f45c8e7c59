"""What a second trial at once adds to the memory of a node, and what dropping pruned blocks saves.

    python tests/bench/memory.py [--json] [--samples 8] [--windows 8]

Each trial is a process of its own, as under Ray. Memory is the proportional set size (PSS): a page
that two processes share counts half in each, so the sum is what the node really holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

from flows.plan import search_trial
from infra.environment import reuse_freed_memory
from infra.records import TrialSpec
from infra.spec_files import load_spec
from tasks.trial import loaded, run_trial

MIB = 2**20


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--spec", default="flows/specs/quickstart.toml")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = [
        f"calibration.samples={options.samples}",
        f"evaluation.selection_windows={options.windows}",
    ]
    spec = load_spec(options.spec, [*sizes, "prune.beta=0.004"])
    trial = search_trial(spec, spec.prune, -1)
    keeping = trial.model_copy(update={"checkpoint": True})
    modality = loaded(trial.model)
    size = modality.model.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    record = modality.record("")
    answer: dict[str, float] = {
        "weights_mib": record.total_params * size / MIB,
        "prunable_mib": sum(record.block_params()) * size / MIB,
    }
    print(f"weights {answer['weights_mib']:.0f} MiB, {answer['prunable_mib']:.0f} of them prunable")
    print(f"{'trials at once':<36}{'loaded':>9}{'peak':>9}  MiB in all")
    for name, specs in (
        ("one", [trial]),
        ("two", [trial, trial]),
        ("one that keeps its pruned blocks", [keeping]),
    ):
        idle, peak = _measure(specs)
        print(f"{name:<36}{idle:>9.0f}{peak:>9.0f}")
        key = name.partition(" ")[0] if specs != [keeping] else "keeping"
        answer |= {f"{key}_loaded_mib": idle, f"{key}_peak_mib": peak}
    if options.json:
        print(json.dumps(answer))


def _measure(specs: list[TrialSpec]) -> tuple[float, float]:
    """MiB of all processes: with the model loaded and each page of it read, and at the peak."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(specs) + 1)
    processes = [context.Process(target=_trial, args=(spec, barrier)) for spec in specs]
    for process in processes:
        process.start()
    barrier.wait()
    idle = _pss(processes)
    barrier.wait()
    peak = idle
    while any(process.is_alive() for process in processes):
        peak = max(peak, _pss(processes))
        time.sleep(0.05)
    assert all(process.exitcode == 0 for process in processes)
    return idle, peak


def _trial(spec: TrialSpec, barrier: Barrier) -> None:
    reuse_freed_memory()
    modality = loaded(spec.model)
    sum(float(parameter.sum()) for parameter in modality.model.parameters())
    barrier.wait()
    barrier.wait()
    if kept := run_trial(spec).checkpoint:
        shutil.rmtree(kept)


def _pss(processes: list[BaseProcess]) -> float:
    total = 0
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return total / 1024


if __name__ == "__main__":
    main()
