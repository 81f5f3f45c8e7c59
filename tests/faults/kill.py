"""Kill, stop, hang or spoil a real search at every point or at random moments; run it again.

    python -m tests.faults.kill --points events --cluster processes
    python -m tests.faults.kill --points chain --cluster ray
    python -m tests.faults.kill --points random --count 50 --cluster ray --seed 1
    python -m tests.faults.kill --points events --fault corrupt --count 40
    python -m tests.faults.kill --command study --points chain

Each disturbed run is a search of 12 trials on a tiny model, or a study of 2 cells. With `events` a
run of its own is killed at each point; a `chain` is one run, whose drivers are killed at each point
in turn. What must hold whatever happened: no finished trial is lost or repeated, exit codes are
right, a study can be looked at, and the end is that of the undisturbed run.
Results are kept by seed in a file of JSON lines: a second call does what is left of it. The last
line printed is JSON: how many points, how many violations. Exit code 1 where there are any.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.leaderboard import write_leaderboard
from flows.status import status
from infra.provenance import provenance
from tests.faults.invariants import Trials, ended_as, read_trials, told_twice, within
from tests.faults.launcher import Launcher, write_tiny_project

STOPPED = "sparseramp: stopped; the same command goes on where it left off"


class Harness:
    """One kind of disturbance of one search; `undisturbed` is what it is compared with."""

    def __init__(self, launcher: Launcher, fault: str, seed: int) -> None:
        self.launcher, self.fault, self.seed = launcher, fault, seed
        self.until = math.inf  # a chain ends then
        self.done: list[str] = []  # points of earlier chains
        self.undisturbed = launcher.folder / "undisturbed"
        points = launcher.folder / "points.txt"
        ended = launcher.run(self.undisturbed, FAULT_POINTS=str(points))
        assert ended.code == 0, ended.errors
        self.points = points.read_text().splitlines()
        started = time.monotonic()  # once more, with all that is shared in its place
        ended = launcher.run(launcher.folder / "again")
        self.seconds = time.monotonic() - started
        chance = self._differs(launcher.folder / "again")
        assert ended.code == 0 and not chance, (ended, chance)

    def at_point(self, index: int) -> dict[str, Any]:
        """The fault at one point of a run, and what was wrong afterwards."""
        run = self.launcher.folder / f"point{index}"
        fault = "kill" if self.fault == "corrupt" else self.fault
        pid = self.launcher.start(run, FAULT=f"{fault}:{index + 1}")
        ended = self.launcher.wait(pid)
        kept = read_trials(run)
        wrong: list[str] = []
        if fault == "hang":
            if ended.code is not None:
                wrong.append(f"the point was not reached: {ended}")
            else:
                wrong += self._hung(run, pid, index)
        elif fault == "term":
            if ended.code != 130 or ended.errors.splitlines()[-1:] != [STOPPED]:
                wrong.append(f"it did not stop: {ended}")
        elif ended.code != -signal.SIGKILL:
            wrong.append(f"the point was not reached: {ended}")
        what = ""
        if self.fault == "corrupt":
            what, found = self._spoiled(run, kept, random.Random(f"{self.seed}/{index}"))
            wrong += found
        wrong += self._ends(run, kept)
        label = self.points[index] if index < len(self.points) else ""
        label = label.replace(f"{self.undisturbed}", "run")
        return {"points": 1, "at": label, "did": what, "violations": wrong}

    def at_random(self, index: int) -> dict[str, Any]:
        """Kill a run and its successors at random moments, until one of them comes to the end."""
        chance = random.Random(f"{self.seed}/{index}")
        run = self.launcher.folder / f"random{index}"
        kept: Trials = {}
        wrong: list[str] = []
        moments: list[float] = []
        while True:
            pid = self.launcher.start(run)
            moment = chance.uniform(0, self.seconds)
            deadline = time.monotonic() + moment
            while time.monotonic() < deadline and not os.waitid(
                os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            ended = self.launcher.wait(pid)
            if ended.code == 0:
                break
            if ended.code != -signal.SIGKILL:
                wrong.append(f"after kills at {moments}: {ended}")
                break
            moments.append(round(moment, 3))
            now = read_trials(run)
            wrong += within(kept, now)
            kept = now
        wrong += self._ends(run, kept)
        return {"points": len(moments), "at": moments, "violations": wrong}

    def in_turn(self, index: int) -> dict[str, Any]:
        """Kill a run at its first point, its successor at the next, and so on to the end."""
        run = self.launcher.folder / f"chain{index}"
        points = self.launcher.folder / f"chain{index}.txt"
        points.write_text("".join(f"{label}\n".replace(" run/", f" {run}/") for label in self.done))
        kept: Trials = {}
        wrong: list[str] = []
        while time.monotonic() < self.until:
            ended = self.launcher.run(run, FAULT="kill:new", FAULT_POINTS=str(points))
            if ended.code != -signal.SIGKILL:
                if ended.code != 0:
                    wrong.append(f"it ended so: {ended}")
                break
            now = read_trials(run)
            found = within(kept, now) + _unreadable(run)
            wrong += [f"{points.read_text().splitlines()[-1]}: {one}" for one in found]
            kept = now
        wrong += self._ends(run, kept)
        labels = [line.replace(f"{run}", "run") for line in points.read_text().splitlines()]
        labels = labels[len(self.done) :]
        self.done += labels
        return {"points": len(labels), "at": labels, "violations": wrong}

    def _hung(self, run: Path, pid: int, index: int) -> list[str]:
        """A second driver beside one that stands still, which then dies or goes on."""
        locked = (run / "lock").exists() and (run / "lock").stat().st_size > 0
        wrong = []
        if locked:
            second = self.launcher.run(run)
            if second.code != 2 or "is in use by pid" not in second.errors:
                wrong.append(f"a second driver was not refused: {second}")
        os.kill(pid, signal.SIGCONT if index % 2 else signal.SIGKILL)
        ended = self.launcher.wait(pid)
        if ended.code != (0 if index % 2 else -signal.SIGKILL):
            wrong.append(f"having stood still it ended so: {ended}")
        return wrong

    def _spoiled(self, run: Path, kept: Trials, chance: random.Random) -> tuple[str, list[str]]:
        """Spoil one file of a killed run; it is refused by name, or does not matter."""
        files = sorted(path for path in run.rglob("*") if path.is_file())
        if not files:
            return "", []
        path = chance.choice(files)
        before = path.read_bytes()
        how = chance.choice(["cut", "emptied", "noise", "deleted", "a folder"])
        if how == "cut":
            path.write_bytes(before[: len(before) // 2])
        elif how == "emptied":
            path.write_bytes(b"")
        elif how == "noise":
            path.write_bytes(chance.randbytes(len(before)))
        else:
            path.unlink()
            if how == "a folder":
                path.mkdir()
        kept.pop(str(path.relative_to(run)), None)  # it may be made again
        what = f"{path.relative_to(run)} {how}"
        ended = self.launcher.run(run)
        wrong = within(kept, read_trials(run, spoiled=path))
        if ended.code == 2 and ended.errors.count("\n") == 1 and str(run) in ended.errors:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(before)
        elif ended.code != 0:
            wrong.append(f"with {what}: {ended}")
        return what, wrong

    def _ends(self, run: Path, kept: Trials) -> list[str]:
        """The same command again, to the end, and what is different there."""
        ended = self.launcher.run(run)
        wrong = [] if ended.code == 0 else [f"the same command again: {ended}"]
        wrong += within(kept, read_trials(run)) + self._differs(run)
        if self.fault != "corrupt":  # one whose file was deleted ends a second time
            wrong += [each for cell in self._cells() for each in told_twice(run / cell)]
        if not wrong:
            shutil.rmtree(run)
        return wrong

    def _cells(self) -> list[str]:
        """Folders of a study that are runs; of a search, itself."""
        return sorted(path.parent.name for path in self.undisturbed.glob("*/report.json")) or [""]

    def _differs(self, run: Path) -> list[str]:
        """Where the end of any cell is another."""
        wrong = [
            f"{cell} {each}".lstrip()
            for cell in self._cells()
            for each in ended_as(self.undisturbed / cell, run / cell)
        ]
        boards = [folder / "leaderboard.json" for folder in (self.undisturbed, run)]
        if boards[0].exists() and not wrong:
            keys = ("cell", "state", "verdict", "gain", "trials")
            expected, found = (
                [{key: row[key] for key in keys} for row in json.loads(board.read_text())["rows"]]
                for board in boards
            )
            wrong += [] if found == expected else [f"the leaderboard is another: {found}"]
        return wrong


def _unreadable(run: Path) -> list[str]:
    """What a status or a report of a study says after a kill, but for what it refuses by name."""
    if not (run / "study.json").exists():
        return []
    wrong = []
    for look in (status, write_leaderboard):
        try:
            look(run)
        except Exception as error:  # noqa: BLE001  a violation, whatever it is
            wrong.append(f"{look.__name__}: {type(error).__name__}: {error}")
    return wrong


@contextmanager
def standing(cluster: str) -> Iterator[None]:
    """A Ray head that outlives every driver, at RAY_ADDRESS."""
    if cluster != "ray":
        yield
        return
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    head = Cluster(initialize_head=True, head_node_args=small)
    os.environ["RAY_ADDRESS"] = head.address
    try:
        yield
    finally:
        head.shutdown()


def main() -> int:
    """Do what is left, print both counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", choices=["events", "chain", "random"], default="events")
    parser.add_argument("--fault", choices=["kill", "term", "hang", "corrupt"], default="kill")
    parser.add_argument("--command", choices=["search", "study"], default="search")
    parser.add_argument("--cluster", choices=["ray", "processes"], default="processes")
    parser.add_argument("--count", type=int, default=0, help="points in all; 0: every event")
    parser.add_argument("--step", type=int, default=1, help="every so many points of an event")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no point after these")
    parser.add_argument("--results", type=Path, default=Path("runs/faults.jsonl"))
    options = parser.parse_args()
    key = {
        "command": options.command,
        "fault": options.fault,
        "moments": options.points,
        "cluster": options.cluster,
        "seed": options.seed,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="ramp-faults-"))
    os.environ["SPARSERAMP_CACHE"] = str(folder / "cache")
    with standing(options.cluster):
        write_tiny_project(folder)
        launcher = Launcher(folder, options.cluster, options.command)
        harness = Harness(launcher, options.fault, options.seed)
        measure = {
            "events": harness.at_point, "chain": harness.in_turn, "random": harness.at_random
        }[options.points]  # fmt: skip
        harness.until = started + options.seconds
        earlier = _known(options.results, key).values()
        if options.points == "chain":
            harness.done = [label for line in earlier for label in line["at"]]
        index = -options.step
        while time.monotonic() - started < options.seconds:
            index += options.step
            done = _known(options.results, key)
            if options.count and sum(line["points"] for line in done.values()) >= options.count:
                break
            if options.points == "events" and index >= len(harness.points):
                break
            if index in done:
                continue
            record = key | {"index": index} | measure(index)
            if options.points == "chain" and not record["points"]:  # all were in earlier ones
                break
            record |= {"commit": provenance()["commit"]}
            with options.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for each in record["violations"]:
                where = record["at"] if options.points == "events" else ""
                print(f"{options.points} {index} {where}: {each}", flush=True)
    num_trials = len(read_trials(harness.undisturbed))
    done = _known(options.results, key)
    violations = sum(len(line["violations"]) for line in done.values())
    if not violations:
        shutil.rmtree(folder, ignore_errors=True)
    counts = {
        "points": sum(line["points"] for line in done.values()),
        "violations": violations,
        "trials": num_trials,
        "undisturbed_s": round(harness.seconds, 2),
        "total_s": round(time.monotonic() - started, 1),
    }
    print(json.dumps(key | counts))
    return 1 if violations else 0


def _known(results: Path, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What the file holds of this kind, by index."""
    if not results.exists():
        return {}
    lines = map(json.loads, results.read_text().splitlines())
    return {line["index"]: line for line in lines if key.items() <= line.items()}


if __name__ == "__main__":
    sys.exit(main())
