"""What an MLflow server that is down costs a search: the whole command, side by side.

    python -m tests.bench.outage --json

A search of 12 trials on a tiny model, its trials in plain processes, so that seconds would show:
without tracking, with MLflow's own file, with an address that refuses, and with a server that takes
connections and never answers. The mirror is a process of its own, and shares the processors.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from tests.faults.launcher import Launcher, write_tiny_project


def main() -> None:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="the line of JSON only")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ramp-outage-"))
    os.environ["SPARSERAMP_CACHE"] = str(folder / "cache")
    write_tiny_project(folder)
    with socket.socket() as silent, socket.socket() as refusing:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        refusing.bind(("127.0.0.1", 0))  # and does not listen
        cases = {
            "no tracking": (),
            "its own file": ("tracking.enabled=true", f"tracking.uri=sqlite:///{folder}/mlflow.db"),
            "refuses": ("tracking.enabled=true", f"tracking.uri={_url(refusing)}"),
            "never answers": ("tracking.enabled=true", f"tracking.uri={_url(silent)}"),
        }
        launcher = Launcher(folder, "processes")
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(options.rounds + 1):
            for name, overrides in cases.items():
                run = folder / f"{name.replace(' ', '-')}{number}"
                started = time.perf_counter()
                ended = launcher.wait(launcher.start(run, *overrides))
                took = time.perf_counter() - started
                assert ended.code == 0, ended.errors
                if number:  # the first fills caches
                    seconds[name].append(took)
                _end_mirrors(run)
    shutil.rmtree(folder)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    base = medians["its own file"]
    if not options.json:
        for name, median in medians.items():
            low, high = min(seconds[name]), max(seconds[name])
            print(f"{name:14} {median:6.2f} s ({low:.2f} to {high:.2f})  {median / base:5.2f}")
    load = round(os.getloadavg()[0], 1)
    rounded = {name: round(median, 2) for name, median in medians.items()}
    print(json.dumps({"rounds": options.rounds, "seconds": rounded, "load_average": load}))


def _url(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def _end_mirrors(run: Path) -> None:
    """They go on for a minute, and would share the processors with the next search."""
    for process in psutil.process_iter(["cmdline"]):
        if str(run) in (process.info["cmdline"] or []):
            process.kill()


if __name__ == "__main__":
    main()
