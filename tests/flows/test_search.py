"""The main job on a tiny model, with Ray, from the command line; and what stops it on the way.

python -m pytest tests/flows/test_search.py -m "slow or not slow"
"""

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.sources import sha256_of
from tests.flows.commands import OFFLINE, run, start, write_project

WHERE_AND_WHEN = {"cost", "host", "node", "device", "checkpoint", "checkpoint_sha256", "attempts"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def searched(spec: Path, cache: Path) -> tuple[Path, list[dict[str, Any]]]:
    """An undisturbed run, and what it printed."""
    done = run("search", spec, "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    return spec.parent / "run", [json.loads(line) for line in done.stdout.splitlines()]


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def trial_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "trials").glob("*.json"))}


def answers(folder: Path) -> list[dict[str, Any]]:
    """What the trials of a run say, but for where and when they ran."""
    trials = [json.loads(data) for data in trial_files(folder).values()]
    return [{k: v for k, v in trial.items() if k not in WHERE_AND_WHEN} for trial in trials]


def test_the_report_of_a_search(searched: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = searched
    report = report_of(folder)
    for name in ("dense", "uniform", "best"):
        metrics = report[name]["metrics"]
        assert next(iter(metrics)) == "perplexity"
        assert metrics["bits_per_byte"]["unit"] == "bits/byte"
        for metric in metrics.values():
            assert metric["mean"] > 0
            assert metric["stderr"] >= 0
            assert metric["n"] == 4
    assert report["uniform"]["beta"] == 0
    assert report["uniform"]["block_rates"] == pytest.approx([0.5] * 3)
    for name in ("uniform", "best"):
        side = report[name]
        assert side["sparsity"] == pytest.approx(0.5, abs=1e-4)
        assert len(side["rates"]) == 3 * 7
        for row in side["rates"]:
            assert set(row) == {"block", "matrix", "params", "rate"}
            assert row["rate"] == pytest.approx(side["block_rates"][row["block"]])
    steps = torch.tensor(report["best"]["block_rates"]).diff()
    assert torch.allclose(steps, torch.full((2,), report["best"]["beta"]), atol=1e-6)
    gain = report["gain"]
    assert (gain["n"], gain["n_seeds"], gain["level"]) == (4, 3, 0.95)
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert ("no gain" in gain["conclusion"].lower()) == (gain["low"] <= 0)
    assert len(report["errors"]["uniform"]) == len(report["errors"]["best"]) == 3


def test_the_trials_of_a_search(searched: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, printed = searched
    trials = report_of(folder)["trials"]
    assert [trial["number"] for trial in trials] == list(range(len(trials)))
    assert (trials[0]["beta"], trials[0]["stage"], trials[0]["rung"]) == (0, "search", 0)
    assert all(trial["state"] == "complete" and trial["attempts"] == 1 for trial in trials)
    for trial in trials:
        assert trial["split"] == ("report" if trial["stage"] == "final" else "selection")
    assert {trial["seed"] for trial in trials if trial["stage"] == "final"} == {0, 1, 2}
    assert printed[-1]["kind"] == "result"
    told = [event["number"] for event in printed if event["kind"] == "trial"]
    assert sorted(told) == [trial["number"] for trial in trials]


def test_the_page_says_what_the_report_says(
    searched: tuple[Path, list[dict[str, Any]]],
) -> None:
    page = (searched[0] / "report.html").read_text(encoding="utf-8")
    assert report_of(searched[0])["gain"]["conclusion"].split(";")[0].split("(")[0] in page


def test_the_checkpoint_is_an_ordinary_one(
    searched: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = searched
    report = report_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "best")
    blocks = report["model"]["blocks"]
    zeros = params = 0
    for row in report["best"]["rates"]:
        weight = model.get_parameter(f"{blocks[row['block']]}.{row['matrix']}")
        share = (weight == 0).double().mean().item()
        assert share == pytest.approx(row["rate"], abs=1 / 32), row
        zeros += int((weight == 0).sum())
        params += weight.numel()
    assert zeros / params == pytest.approx(report["best"]["sparsity"])
    assert AutoTokenizer.from_pretrained(folder / "best")("a")["input_ids"]
    card = (folder / "best" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "- wanda\n" in card
    facts = json.loads((folder / "best" / "sparsity.json").read_text())
    for name, digest in facts["sha256"].items():
        assert sha256_of(folder / "best" / name) == digest


def test_the_checkpoint_is_measured_again_as_it_was(
    searched: tuple[Path, list[dict[str, Any]]], cache: Path
) -> None:
    """By the first calibration seed's best trial, whose model it is."""
    folder, _ = searched
    done = run("evaluate", folder / "best", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    (saved,) = [t for t in answers(folder) if t["spec"]["checkpoint"]]
    tokens, losses = saved["tokens"], saved["losses"]
    mean = sum(n * x for n, x in zip(tokens, losses, strict=True)) / sum(tokens)
    answer = json.loads(done.stdout)
    assert answer["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(mean))
    assert answer["metrics"]["perplexity"]["n"] == 4


def test_a_second_call_repeats_nothing(
    searched: tuple[Path, list[dict[str, Any]]], spec: Path, cache: Path
) -> None:
    folder, _ = searched
    before = trial_files(folder)
    stamps = [file.stat().st_mtime_ns for file in sorted((folder / "trials").iterdir())]
    report = report_of(folder)
    done = run("search", spec, "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert '"kind": "trial"' not in done.stdout
    assert trial_files(folder) == before
    assert [f.stat().st_mtime_ns for f in sorted((folder / "trials").iterdir())] == stamps
    again = report_of(folder)
    for key in ("dense", "uniform", "best", "gain", "trials"):
        assert again[key] == report[key]


def test_a_run_does_not_go_on_with_other_weights(tmp_path: Path, cache: Path) -> None:
    spec = write_project(tmp_path)
    assert run("search", spec, "search.scouts=1", cache=cache).returncode == 0
    trials = sorted((tmp_path / "run" / "trials").iterdir())
    trials[-1].unlink()
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    done = run("search", spec, "search.scouts=1", cache=cache)
    assert done.returncode == 2
    assert "holds other weights than this run began with" in done.stderr
    assert not trials[-1].exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopped_and_killed_a_run_ends_like_an_undisturbed_one(
    searched: tuple[Path, list[dict[str, Any]]],
    spec: Path,
    cache: Path,
    tmp_path: Path,
    driver: list[subprocess.Popen[str]],
) -> None:
    """Ctrl-C among the scouts, kill -9 half way, SIGTERM in the final stage, then to the end."""
    undisturbed, _ = searched
    folder = tmp_path / "run"
    kept: dict[str, bytes] = {}
    for number, finished in ((signal.SIGINT, 1), (signal.SIGKILL, 4), (signal.SIGTERM, 7)):
        process = start("search", spec, f"run.dir={folder}", "--json", cache=cache)
        driver.append(process)
        wait_for_trials(process, folder, finished)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 130
            assert errors == ("sparseramp: stopped; the same command goes on where it left off\n")
            assert json.loads(output.splitlines()[-1])["kind"] == "stopped"
        now = trial_files(folder)
        assert kept.items() <= now.items()  # nothing lost, nothing repeated
        kept = now
    assert len(kept) < len(trial_files(undisturbed))
    done = run("search", spec, f"run.dir={folder}", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert kept.items() <= trial_files(folder).items()
    assert answers(folder) == answers(undisturbed)
    for name in ("waves", "best"):
        assert sorted(f.name for f in (folder / name).iterdir()) == sorted(
            f.name for f in (undisturbed / name).iterdir()
        )
    weights = "best/model.safetensors"
    assert sha256_of(folder / weights) == sha256_of(undisturbed / weights)
    report, expected = report_of(folder), report_of(undisturbed)
    for key in ("dense", "uniform", "best", "gain"):
        assert report[key] == expected[key]


def wait_for_trials(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(trial_files(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_search_needs_no_network(spec: Path, cache: Path) -> None:
    """Ray, Optuna and the MLflow mirror included, once model and text are there."""
    try:
        subprocess.run([*OFFLINE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespace can be made here")
    folder = spec.parent / "offline"
    overrides = (f"run.dir={folder}", "search.scouts=1", "tracking.enabled=true")
    done = run("search", spec, *overrides, "--json", cache=cache, prefix=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert report_of(folder)["gain"]["verdict"] == "no gain"  # uniform was the only candidate
    log = (folder / "tracking.log").read_text()
    assert "Traceback" not in log and "Error" not in log
