"""How long a trial waits for its next attempt after its worker or its node is lost, on Ray.

    python -m tests.bench.losses --json

A head, on which the driver is, and two nodes with two processors each, all on this machine:
(a) kill -9 of the only worker: Ray notices, another process starts, and the trial in it;
(b) SIGKILL of all that Ray runs on a node, where a warm worker is free on the other one;
(c) the same, but the node falls silent: its processes are stopped and keep their connections, as
    when power or network is lost. That is for Ray's health checks to notice, so it is done once.

The attempt has started when the trial function is called. It imports nothing; a real trial goes on
to import torch and open its model, unless its worker is warm.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from infra import environment

environment.prepare()  # before Ray is imported, to be quiet

import ray  # noqa: E402
from ray.cluster_utils import Cluster as RayNodes  # noqa: E402

from infra.cluster import connect  # noqa: E402
from infra.records import TrialResult, TrialSpec  # noqa: E402
from infra.specs import ClusterSpec  # noqa: E402
from tests.infra.trials import act, trial  # noqa: E402

SMALL = {"object_store_memory": 80 * 2**20}


def attempt(spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult:
    """Write down when, in which process and on which node; the first one waits to be killed."""
    file = Path(spec.model.source)
    first = not file.exists()
    with file.open("a") as lines:
        node = ray.get_runtime_context().get_node_id()
        lines.write(f"{time.time()} {os.getpid()} {node}\n")
    if first:
        time.sleep(300)
    return TrialResult(spec=spec, state="complete", losses=[1.0], tokens=[1])


def seconds(cluster: Any, file: Path, lose: Callable[[int, str], None]) -> float:
    """From the loss of the trial's first attempt to the start of its second."""
    lost: list[float] = []

    def wait_and_lose() -> None:
        while not (file.exists() and file.read_text().endswith("\n")):
            time.sleep(0.02)
        time.sleep(1)
        _, pid, node = file.read_text().split()
        lost.append(time.time())
        lose(int(pid), node)

    killer = threading.Thread(target=wait_and_lose)
    killer.start()
    (result,) = cluster.run(attempt, [trial(0, str(file))])
    killer.join()
    first, second = file.read_text().splitlines()
    assert (result.state, result.attempts) == ("complete", 2), result.cause
    assert first.split()[1] != second.split()[1]
    took_s = float(second.split()[0]) - lost[0]
    print(f"{file.name}: {took_s:.2f} s", file=sys.stderr, flush=True)
    return took_s


def of_workers(address: str, folder: Path, times: int) -> list[float]:
    """(a)"""
    with connect(ClusterSpec(address=address, parallel=1)) as cluster:
        return [
            seconds(cluster, folder / f"worker{n}", lambda pid, _: os.kill(pid, signal.SIGKILL))
            for n in range(times)
        ]


def of_nodes(nodes: Any, folder: Path, times: int, *, silent: bool) -> list[float]:
    """(b) and (c)"""
    found = []
    for number in range(times):
        two = {each.node_id: each for each in (add(nodes), add(nodes))}
        with connect(ClusterSpec(address=nodes.address, parallel=2)) as cluster:
            meet = folder / f"meet{silent}{number}"
            meet.mkdir()
            warm = list(cluster.run(act, [trial(n, f"meet:{meet}") for n in range(2)]))
            assert {result.node for result in warm} == two.keys()

            def lose(pid: int, node: str) -> None:
                gone = two.pop(node)  # noqa: B023
                if silent:
                    stop(gone)
                else:
                    nodes.remove_node(gone, allow_graceful=False)

            found.append(seconds(cluster, folder / f"node{silent}{number}", lose))
        for node in two.values():
            nodes.remove_node(node)
    return found


def add(nodes: Any) -> Any:
    """A node that takes trials."""
    return nodes.add_node(num_cpus=2, **SMALL)


def stop(node: Any) -> None:
    """Let a node fall silent."""
    for each in node.all_processes["raylet"]:
        raylet = psutil.Process(each.process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            process.suspend()


def main() -> None:
    """Measure, and print a table or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--silent", type=int, default=1, help="how often a node falls silent")
    options = parser.parse_args()
    head = {"num_cpus": 0, "include_dashboard": False, **SMALL}
    nodes = RayNodes(initialize_head=True, head_node_args=head)
    found: dict[str, Any] = {"unit": "s from the loss to the start of the next attempt"}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            only = add(nodes)
            found["worker"] = of_workers(nodes.address, folder, options.times)
            nodes.remove_node(only)
            found["node"] = of_nodes(nodes, folder, options.times, silent=False)
            found["silent_node"] = of_nodes(nodes, folder, options.silent, silent=True)
    finally:
        nodes.shutdown()
    found["load_average"] = os.getloadavg()[0]
    if options.json:
        rounded = {
            k: [round(s, 2) for s in v] if isinstance(v, list) else v for k, v in found.items()
        }
        print(json.dumps(rounded))
        return
    for name in ("worker", "node", "silent_node"):
        if times := found[name]:
            print(f"{name:>12}  median {statistics.median(times):5.2f}  most {max(times):5.2f} s")
    print(f"load average {found['load_average']:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
