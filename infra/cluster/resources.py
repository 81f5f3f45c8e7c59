"""How a cluster is divided among trials, and whether an address leads to one; Ray is not needed.

share = decide_share(ClusterSpec(), nodes)
capacity(share, nodes)  # trials at once
"""

import math
import os
import re
import socket
from collections.abc import Sequence

from infra.errors import UserError
from infra.specs import ClusterSpec, Frozen

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


class Share(Frozen):
    """What one trial gets; a fraction of a GPU is shared with other trials."""

    cpus: float
    gpus: float


def decide_share(spec: ClusterSpec, nodes: Sequence[Node]) -> Share:
    """Fill in what the spec leaves open; raises UserError where no node could hold one trial.

    A trial gets one GPU where there are any, and the processor cores that go with it; without
    GPUs, a node's cores are divided among its part of `parallel`.
    """
    gpus = spec.gpus_per_trial
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
    share = Share(cpus=max(cpus, 0.0), gpus=gpus)
    if not capacity(share, nodes):
        most = [max((size for size in sizes), default=0) for sizes in _columns(nodes)]
        raise UserError(
            f"no node holds a trial of {share.cpus:g} CPUs and {share.gpus:g} GPUs (the largest "
            f"have {most[0]:g} and {most[1]:g}): set cluster.cpus_per_trial and gpus_per_trial"
        )
    return share


def capacity(share: Share, nodes: Sequence[Node]) -> int:
    """How many trials the nodes hold at once."""
    total = 0
    for node in nodes:
        wanted = [(node.cpus, share.cpus), (node.gpus, share.gpus)]
        fits = [int(have / want + 1e-6) for have, want in wanted if want]
        total += min(fits, default=int(node.cpus))
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


def _columns(nodes: Sequence[Node]) -> tuple[list[float], list[float]]:
    return [node.cpus for node in nodes], [node.gpus for node in nodes]
