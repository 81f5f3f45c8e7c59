"""What must hold of a run directory, whatever was done to its driver.

kept = read_trials(run)  # when the driver was killed
wrong = within(kept, read_trials(run)) + ended_as(undisturbed, run)  # at the end
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from infra.sources import sha256_of
from infra.store import TEMP_PREFIX

WHERE_AND_WHEN = {"cost", "host", "node", "device", "checkpoint", "checkpoint_sha256"}

Trials = dict[str, tuple[int, str]]


def read_trials(run: Path, spoiled: Path | None = None) -> Trials:
    """Finished trials, of cells as well: when each file was written, and its SHA-256."""
    files = [path for path in run.rglob("trials/[0-9]*.json") if path != spoiled]
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, sha256_of(path)) for path in files
    }


def within(kept: Trials, now: Trials) -> list[str]:
    """What was finished before and is lost, or was done again."""
    lost = [f"{trial} is lost" for trial in sorted(kept.keys() - now.keys())]
    both = sorted(kept.keys() & now.keys())
    return lost + [f"{trial} was done again" for trial in both if kept[trial] != now[trial]]


def ended_as(undisturbed: Path, run: Path) -> list[str]:
    """Where a finished run differs from the undisturbed one, or keeps remains of its faults."""
    if not (run / "report.json").exists():
        return ["there is no report"]
    wrong = [f"{left.name} is left" for left in run.rglob(f"{TEMP_PREFIX}*")]
    ours, theirs = (answers(each) for each in (run, undisturbed))
    wrong += [
        f"trial {number} is {'another' if number in ours and number in theirs else 'one sided'}"
        for number in sorted(ours.keys() | theirs.keys())
        if ours.get(number) != theirs.get(number)
    ]
    report, expected = (
        json.loads((each / "report.json").read_text()) for each in (run, undisturbed)
    )
    wrong += [
        f"{key} of the report is another"
        for key in ("dense", "uniform", "best", "gain")
        if report[key] != expected[key]
    ]
    for name in ("waves", "best"):
        files = [
            sorted(path.name for path in (each / name).glob("*")) for each in (run, undisturbed)
        ]
        if files[0] != files[1]:
            wrong.append(f"{name} holds {files[0]} in place of {files[1]}")
    weights = [each / "best" / "model.safetensors" for each in (run, undisturbed)]
    if not weights[0].exists() or sha256_of(weights[0]) != sha256_of(weights[1]):
        wrong.append("the checkpoint is another")
    return wrong


def told_twice(run: Path) -> list[str]:
    """Trials whose end is more than once among the events."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    told = Counter(event["number"] for event in events if event["event"] == "trial")
    return [f"trial {number} ended {count} times" for number, count in told.items() if count > 1]


def answers(run: Path) -> dict[int, dict[str, Any]]:
    """What the trials of a run say, but for where and when they ran."""
    found = {}
    for path in (run / "trials").glob("[0-9]*.json"):
        trial = json.loads(path.read_text())
        found[int(path.stem)] = {k: v for k, v in trial.items() if k not in WHERE_AND_WHEN}
    return found
