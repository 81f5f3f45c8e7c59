"""Loss of a node, and a network that is cut for 10 s, on Ray.

python -m pytest tests/faults/test_nodes.py -m slow
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as RayNodes

from infra.cluster import connect
from infra.specs import ClusterSpec
from tests.faults.launcher import ROOT
from tests.infra.trials import act, trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SMALL = {"object_store_memory": 80 * 2**20}
CUT_S = 10.0


def test_trial_of_a_lost_node_is_run_on_another_within_10_s(tmp_path: Path) -> None:
    nodes = RayNodes(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL}
    )
    try:
        doomed = nodes.add_node(num_cpus=1, **SMALL)
        ids = []
        with connect(ClusterSpec(address=nodes.address, parallel=2)) as cluster:
            list(cluster.run(act, [trial(n, f"meet:{tmp_path}") for n in range(2)]))  # both warm
            killed: list[float] = []

            def kill() -> None:
                time.sleep(1)
                killed.append(time.monotonic())
                nodes.remove_node(doomed, allow_graceful=False)

            killer = threading.Thread(target=kill)
            killer.start()
            results = {}
            for result in cluster.run(act, [trial(n, "sleep:3") for n in range(2)]):
                results[result.spec.number] = (result, time.monotonic())
                ids.append(result.node)
            killer.join()
        assert [results[n][0].state for n in range(2)] == ["complete"] * 2
        (lost,) = [each for each in results.values() if each[0].attempts == 2]
        print(f"done {lost[1] - killed[0]:.1f} s after the node was lost")
        assert lost[1] - killed[0] < 10 + 3 + 3  # both trials of 3 s, one after the other
        assert len(set(ids)) == 1
    finally:
        nodes.shutdown()


class Network:
    """Two namespaces with one cable; a Ray head in one, the driver's own node in the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, f"ramp{secrets.token_hex(2)}"
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.started: list[subprocess.Popen[bytes]] = []
        for side in "ab":
            self.ip("netns", "add", self.name + side)
        self.ip(
            "link", "add", "name", "up0", "netns", f"{self.name}a", "type", "veth",
            "peer", "name", "up0", "netns", f"{self.name}b",
        )  # fmt: skip
        for side, address in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
            self.ip("-n", self.name + side, "addr", "add", f"{address}/24", "dev", "up0")
            self.ip("-n", self.name + side, "link", "set", "lo", "up")
            self.ip("-n", self.name + side, "link", "set", "up0", "up")

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def command(self, side: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "PYTHONPATH": str(ROOT),
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name + side, sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=(self.folder / f"{len(self.started)}.txt").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def ray(self, side: str, *arguments: str) -> None:
        """Start a node and wait for it."""
        scratch = f"--temp-dir={self.folder}/{side}"
        if side == "b":
            scratch = f"--object-spilling-directory={self.folder}"
        process = self.command(
            side, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block", scratch,
            "--object-store-memory=100000000", *arguments,
        )  # fmt: skip
        log = self.folder / f"{len(self.started) - 1}.txt"
        while "--block" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)

    def close(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for side in "ab":
            subprocess.run(["ip", "netns", "del", self.name + side], check=False)


@pytest.fixture
def network() -> Iterator[Network]:
    folder = Path(tempfile.mkdtemp(prefix="net-", dir="/tmp"))
    try:
        made = Network(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder)
        pytest.skip(f"no network namespaces can be made here: {error}")
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


DRIVER = """
import json, sys
from infra import environment; environment.prepare()
from infra.cluster import connect
from infra.specs import ClusterSpec
from tests.infra.trials import act, trial
with connect(ClusterSpec(address="192.0.2.1:6379", parallel=1)) as cluster:
    for result in cluster.run(act, [trial(0, "ok"), trial(1, "sleep:15"), trial(2, "ok")]):
        print(json.dumps([result.state, result.attempts, result.cause]), flush=True)
"""


def test_network_that_is_cut_between_driver_and_head(network: Network) -> None:
    network.ray(
        "a", "--head", "--port=6379", "--node-ip-address=192.0.2.1", "--include-dashboard=false",
        "--num-cpus=1",
    )  # fmt: skip
    network.ray("b", "--address=192.0.2.1:6379", "--node-ip-address=192.0.2.2", "--num-cpus=0")
    driver = network.command("b", "-c", DRIVER)
    output = network.folder / f"{len(network.started) - 1}.txt"
    while not output.read_text().startswith("["):
        assert driver.poll() is None, output.read_text()
        time.sleep(0.1)
    time.sleep(2)  # the second trial has begun
    network.ip("-n", f"{network.name}a", "link", "set", "up0", "down")
    time.sleep(CUT_S)
    network.ip("-n", f"{network.name}a", "link", "set", "up0", "up")
    assert driver.wait(120) == 0, output.read_text()
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [state for state, _, _ in results] == ["complete"] * 3, results
    print([attempts for _, attempts, _ in results])
