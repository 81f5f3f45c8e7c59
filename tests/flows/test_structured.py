"""Fewer channels and heads through the commands: pruned, reported, told of, and measured again.

python -m pytest tests/flows/test_structured.py
"""

import json
from pathlib import Path

import pytest

from tests.flows.commands import run, write_project

STRUCTURED = ("prune.pattern=structured", "prune.beta=0.05", "evaluation.calibration_seeds=1")


def test_a_smaller_model_is_reported_and_opened_again(tmp_path: Path) -> None:
    spec, cache = write_project(tmp_path), tmp_path / "cache"
    done = run("prune", spec, *STRUCTURED, "prune.sparsity=0.3", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["goal"] == "30 % structured sparsity"
    assert "at 30 % structured sparsity" in report["gain"]["conclusion"].lower()
    assert result["best"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert "of 6 heads or groups (self_attn.o_proj)" in report["size"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert report["size"] in page and report["size"] in done.stdout + page
    assert "<th>removed</th>" in page and "Weights are masked" not in page
    best = tmp_path / "run" / "best"
    assert "load_smaller" in (best / "README.md").read_text(encoding="utf-8")
    again = run("evaluate", best, "--json", cache=cache)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)["metrics"]["loss"]["mean"]
    assert found == pytest.approx(result["best"]["metrics"]["loss"]["mean"], rel=1e-6)
    packed = run("pack", best, cache=cache)
    assert packed.returncode == 2
    assert "what its blocks lost is gone already" in packed.stderr
