"""Trials that are not repeated when a benchmark is started again.

kept = Kept(Path("runs/bench.jsonl"))
result = kept.run(trial)
"""

from __future__ import annotations

from pathlib import Path

from infra.records import TrialResult, TrialSpec
from tasks.trial import run_trial


class Kept:
    """Results by what was asked, but for a trial's number and rung; a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        done = map(TrialResult.model_validate_json, lines)
        self.done = {_key(result.spec): result for result in done}

    def run(self, spec: TrialSpec) -> TrialResult:
        """The kept result, or that of running it now."""
        key = _key(spec)
        if key not in self.done:
            self.done[key] = run_trial(spec)
            with self.path.open("a") as file:
                file.write(self.done[key].model_dump_json() + "\n")
        return self.done[key].model_copy(update={"spec": spec})


def _key(spec: TrialSpec) -> str:
    return spec.model_copy(update={"number": 0, "rung": 0}).model_dump_json()
