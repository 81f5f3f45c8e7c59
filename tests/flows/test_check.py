"""The lines that `check` prints below the table of blocks.

python -m pytest tests/flows/test_check.py
"""

from typing import Any

import pytest

from flows.check import _facts
from flows.cli import _parser
from tests.flows.test_plan import make_model, make_spec


def facts(tasks: list[str], prune_run: str = "runs/tiny", **sections: Any) -> dict[str, str]:
    spec = make_spec(run={"dir": "runs/tiny"}, evaluation={"tasks": tasks}, **sections)
    answer: dict[str, Any] = {
        "sources": {"model": "m"},
        "numbers": {},
        "rungs": [],
        "cells": 1,
        "refused": {},
        "token_passes": 1000,
        "seconds": 60.0,
        "not_in_seconds": tasks,
        "memory_bytes": 1 << 20,
        "cluster": {"nodes": [], "parallel": 1, "cpus_per_trial": 2, "gpus_per_trial": 0},
        "run": spec.run.dir,
        "prune_run": prune_run,
    }
    return _facts(spec, make_model(), answer)


@pytest.mark.parametrize("tasks", [[], ["boolq", "piqa"]])
def test_the_time_says_what_it_leaves_out_and_results_have_a_place(tasks: list[str]) -> None:
    lines = facts(tasks)
    assert lines["time"] == "about 1 min 00 s for 1,000 token passes"
    assert lines.get("lm-eval") == ("boolq, piqa: not in this time" if tasks else None)
    assert lines["run directory"] == "runs/tiny"


def test_a_fine_tune_and_its_share_are_named() -> None:
    lines = facts([], recovery={"steps": 2, "batch": 3, "length": 8, "method": "full"})
    # Forward, recomputation and backward are four passes; uniform and best; 40 that measure each.
    assert lines["recovery"].startswith("2 steps of 3 x 8 tokens by full fine-tuning, of uniform")
    assert "recovery" not in facts([])


def test_a_directory_of_its_own_for_prune_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = facts([], "runs/tiny-prune")["run directory"]
    assert place == "runs/tiny; of prune: runs/tiny-prune"
    seen: dict[str, Any] = {}
    monkeypatch.setattr("flows.check.check", lambda spec, **rest: seen.update(rest, spec=spec))
    for override, expected in (([], "runs/vision_cifar10-prune"), (["run.dir=here"], "here")):
        options = _parser().parse_args(["check", "flows/specs/vision_cifar10.toml", *override])
        options.command(options)
        assert seen["prune_dir"] == expected
    assert seen["spec"].run.dir == "here"
