"""Machines of a network on one machine: namespaces with a Ray node in each, on one bridge.

    with made_network(2) as network:
        network.start_head(num_cpus=1)
        network.start_node(1, num_cpus=1)
        driver = network.command(1, "-m", "flows.cli", "search", "mine.toml")
        network.link(0, "down")

Ray takes tokens, as in every recipe. Raises OSError or CalledProcessError where no namespaces can
be made.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.launcher import ROOT

SMALL_STORE = "--object-store-memory=100000000"


class Network:
    """Machines 0, 1 and so on at 192.0.2.1 and after; `log_of` is what a process has said."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.name = f"ramp{secrets.token_hex(2)}"
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.started: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        """The machines and their cables."""
        self._ip("netns", "add", self.name)
        self._ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.name, "link", "set", "bridge", "up")
        for machine in range(self.size):
            space, port = self.space(machine), f"port{machine}"
            self._ip("netns", "add", space)
            self._ip(
                "link", "add", "name", port, "netns", self.name, "type", "veth",
                "peer", "name", "up0", "netns", space,
            )  # fmt: skip
            self._ip("-n", self.name, "link", "set", port, "master", "bridge", "up")
            self._ip("-n", space, "addr", "add", f"{self.address(machine)}/24", "dev", "up0")
            self._ip("-n", space, "link", "set", "lo", "up")
            self._ip("-n", space, "link", "set", "up0", "up")

    def address(self, machine: int) -> str:
        return f"192.0.2.{machine + 1}"

    def space(self, machine: int) -> str:
        return f"{self.name}-{machine}"

    @property
    def ray_address(self) -> str:
        return f"{self.address(0)}:6379"

    def command(self, machine: int, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Python with some arguments, on a machine."""
        given = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "PYTHONPATH": str(ROOT),
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space(machine), sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | given | environment,
            stdout=(self.folder / f"{len(self.started)}.txt").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        return (self.folder / f"{self.started.index(process)}.txt").read_text()

    def start_head(self, num_cpus: int, **environment: str) -> None:
        """Ray's head on machine 0."""
        self._ray(
            0, "--head", "--port=6379", f"--num-cpus={num_cpus}", "--include-dashboard=false",
            f"--temp-dir={self.folder}/ray", **environment,
        )  # fmt: skip

    def start_node(self, machine: int, num_cpus: int, **environment: str) -> None:
        """Another node of it."""
        spill = f"--object-spilling-directory={self.folder}"
        joined = f"--address={self.ray_address}"
        self._ray(machine, joined, f"--num-cpus={num_cpus}", spill, **environment)

    def _ray(self, machine: int, *arguments: str, **environment: str) -> None:
        node = self.command(
            machine, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block",
            SMALL_STORE, f"--node-ip-address={self.address(machine)}", *arguments, **environment,
        )  # fmt: skip
        while "--block" not in self.log_of(node):
            assert node.poll() is None, self.log_of(node)
            time.sleep(0.2)

    def link(self, machine: int, state: str) -> None:
        """Pull the cable of a machine ("down"), or put it back ("up")."""
        self._ip("-n", self.space(machine), "link", "set", "up0", state)

    def lose(self, machine: int) -> None:
        """Everything on a machine is killed at once."""
        listing = ["ip", "netns", "pids", self.space(machine)]
        while pids := subprocess.run(listing, capture_output=True, text=True).stdout.split():
            subprocess.run(["kill", "-9", *pids], stderr=subprocess.DEVNULL)
            time.sleep(0.1)

    def close(self) -> None:
        """End what runs, and the network."""
        for machine in range(self.size):
            self.lose(machine)
        for process in self.started:
            process.wait()
        for space in [*map(self.space, range(self.size)), self.name]:
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def made_network(size: int) -> Iterator[Network]:
    """A network of so many machines, which goes afterwards with all that runs on them."""
    folder = Path(tempfile.mkdtemp(prefix="net-", dir="/tmp"))  # sockets need short paths
    try:
        network = Network(folder, size)
        try:
            network.make()
            yield network
        finally:
            network.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
