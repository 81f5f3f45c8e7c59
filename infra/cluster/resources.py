"""How a cluster is divided among trials, and whether an address leads to one; Ray is not needed.

share = decide_share(ClusterSpec(), nodes)
capacity(share, nodes)  # trials at once
"""

import math
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from infra.errors import UserError
from infra.frozen import Frozen
from infra.specs import ClusterSpec

# An estimate: with more threads than this, two trials side by side get more done than one.
MAX_THREADS = 8
CONNECT_TIMEOUT_S = 5.0


class Node(Frozen):
    """A machine of the cluster, with what Ray may give away of it."""

    node: str
    host: str
    cpus: float
    gpus: float
    memory_bytes: int
    labels: dict[str, str] = {}


@dataclass(frozen=True)
class Share:
    """What one trial gets; a fraction of a GPU is shared with other trials."""

    cpus: float
    gpus: float
    memory_bytes: int = 0
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def weight(self) -> float:
        """What a second of it counts: its GPUs, its CPUs where it has none."""
        return self.gpus or self.cpus or 1.0

    @property
    def needs(self) -> tuple[float, float, float]:
        """CPUs, GPUs and memory that a worker takes: a CPU if nothing else."""
        cpus = self.cpus if self.cpus or self.gpus or self.memory_bytes else 1.0
        return cpus, self.gpus, self.memory_bytes

    def __str__(self) -> str:
        text = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"
        text += f" with {self.memory_bytes / 1e9:g} GB" if self.memory_bytes else ""
        return text + (f" and cluster.labels={dict(self.labels)}" if self.labels else "")

    @property
    def no_node(self) -> str:
        """What is said while no node that is there holds it, and one may come."""
        return f"no node that is there holds a trial of {self}: it waits for one to be added"

    def given_up(self, waited_s: float) -> str:
        """What is said when none has come in that time."""
        return (
            f"no node has held a trial of {self} for {waited_s / 60:g} min: bring one back, and "
            "the same command goes on"
        )

    def admits(self, node: Node) -> bool:
        """Whether the node has the labels that are asked for."""
        return all(_label_fits(node.labels.get(key, ""), wanted) for key, wanted in self.labels)


def decide_share(spec: ClusterSpec, nodes: Sequence[Node], *, grows: bool = False) -> Share:
    """Fill in what the spec leaves open; raises UserError where no node could hold one trial,
    unless the cluster `grows`: an autoscaler may add one that does.

    A trial gets one GPU where there are any, and the processor cores that go with it; without
    GPUs, a node's cores are divided among its part of `parallel`.
    """
    gpus, memory = spec.gpus_per_trial, int(spec.memory_gb_per_trial * 1e9)
    labels = tuple(sorted(spec.labels.items()))
    asked = Share(cpus=0, gpus=0, memory_bytes=memory, labels=labels)
    nodes = [node for node in nodes if asked.admits(node)]
    if gpus < 0:
        gpus = float(any(node.gpus >= 1 for node in nodes))
    if gpus > 1 and gpus % 1:
        raise UserError(
            f"cluster.gpus_per_trial={gpus:g} is neither a whole number nor a fraction of one"
        )
    hosts = [node for node in nodes if node.cpus >= 1 and node.gpus >= gpus]
    cpus = spec.cpus_per_trial
    if cpus < 0 and hosts:
        if gpus:
            fitting = min(node.cpus * gpus / node.gpus for node in hosts)
        else:
            cores = min(node.cpus for node in hosts)
            beside = math.ceil(spec.parallel / len(hosts)) or math.ceil(cores / MAX_THREADS)
            fitting = cores / beside
        cpus = float(max(1, int(fitting)))
    elif cpus < 0:  # none would let a trial run on a head that is to take none
        cpus = 1.0
    share = replace(asked, cpus=cpus, gpus=gpus)
    if not capacity(share, nodes) and not grows:
        if spec.labels and not nodes:
            raise UserError(f"no node has cluster.labels={spec.labels}: `ray status -v` shows them")
        most = [max((size for size in sizes), default=0) for sizes in _columns(nodes)]
        memory_too = f" with {memory / 1e9:g} GB" if memory else ""
        raise UserError(
            f"no node holds a trial of {share.cpus:g} CPUs and {share.gpus:g} GPUs{memory_too} "
            f"(the largest have {most[0]:g} and {most[1]:g}"
            + (f" with {most[2] / 1e9:.3g} GB" if memory else "")
            + "): set cluster.cpus_per_trial and gpus_per_trial"
            + (" and memory_gb_per_trial" if memory else "")
        )
    return share


def capacity(share: Share, nodes: Sequence[Node]) -> int:
    """How many trials the nodes hold at once."""
    total = 0
    for node in nodes:
        wanted = [
            (node.cpus, share.cpus),
            (node.gpus, share.gpus),
            (node.memory_bytes, share.memory_bytes),
        ]
        fits = [int(have / want + 1e-6) for have, want in wanted if want]
        total += min(fits, default=int(node.cpus)) if share.admits(node) else 0
    return total


def check_address(address: str) -> None:
    """Raise UserError unless a gRPC server answers at `host:port`.

    Ray Client (ray://) is refused: its driver is no node, and could not fetch a checkpoint.

    Ray itself tries for two minutes and then ends the process.
    """
    if address == "auto":
        return
    match = re.fullmatch(r"\[?([^/\s]+?)\]?:(\d{1,5})", address)
    if not match:
        raise UserError(
            f"{address!r} is no Ray address: write cluster.address=HOST:PORT or auto (or set "
            "RAY_ADDRESS so)"
        )
    try:
        with socket.create_connection((match[1], int(match[2])), CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                # HTTP/2 (RFC 9113, 3.4): both sides open with a SETTINGS frame, which has type 4.
                connection.sendall(
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4] + [0] * 5)
                )
                if connection.recv(4)[3:] != b"\x04":
                    raise UserError(f"what answers at {address} is not Ray: check the port")
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, "
            "or leave cluster.address and RAY_ADDRESS empty to use this machine"
        ) from None


def _columns(nodes: Sequence[Node]) -> tuple[list[float], list[float], list[int]]:
    return (
        [node.cpus for node in nodes],
        [node.gpus for node in nodes],
        [node.memory_bytes for node in nodes],
    )


def _label_fits(value: str, wanted: str) -> bool:
    """As Ray reads a label selector: H100, !H100, in(H100,H200) or !in(H100,H200)."""
    listed = re.fullmatch(r"!?in\((.*)\)", wanted)
    names = listed[1].split(",") if listed else [wanted.removeprefix("!")]
    return (value in [name.strip() for name in names]) != wanted.startswith("!")
