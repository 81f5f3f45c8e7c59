"""How trials are laid over nodes, and which addresses are refused.

python -m pytest tests/infra/test_resources.py
"""

import socket
import threading
import time

import pytest

from infra.cluster.resources import Node, Share, capacity, check_address, decide_share
from infra.errors import UserError
from infra.specs import ClusterSpec


def node(cpus: float, gpus: float = 0) -> Node:
    return Node(node="", host="", cpus=cpus, gpus=gpus, memory_bytes=0)


@pytest.mark.parametrize(
    ("asked", "nodes", "share", "at_once"),
    [
        ({}, [node(2)], (2, 0), 1),
        ({"parallel": 2}, [node(2)], (1, 0), 2),
        ({"parallel": 4}, [node(2)], (1, 0), 2),
        ({"parallel": 2}, [node(4), node(4)], (4, 0), 2),
        ({"parallel": 3}, [node(4), node(4)], (2, 0), 4),
        ({}, [node(12)], (6, 0), 2),
        ({}, [node(64)], (8, 0), 8),
        ({"cpus_per_trial": 3}, [node(8)], (3, 0), 2),
        ({}, [node(16, 8)], (2, 1), 8),
        ({}, [node(0), node(16, 1), node(64)], (16, 1), 1),  # heads often give no CPUs away
        ({"gpus_per_trial": 4}, [node(32, 8), node(32, 8)], (16, 4), 4),
        ({"gpus_per_trial": 0.25}, [node(16, 1)], (4, 0.25), 4),
        ({"gpus_per_trial": 0}, [node(8, 1)], (8, 0), 1),
        ({"cpus_per_trial": 0}, [node(4, 2)], (0, 1), 2),
    ],
)
def test_share(
    asked: dict[str, float], nodes: list[Node], share: tuple[float, float], at_once: int
) -> None:
    decided = decide_share(ClusterSpec.model_validate(asked), nodes)
    assert decided == Share(cpus=share[0], gpus=share[1])
    assert capacity(decided, nodes) == at_once


def test_a_trial_is_not_put_on_a_head_that_is_to_take_none() -> None:
    """With a share of nothing Ray would do so at once, before the autoscaler adds a node."""
    share = decide_share(ClusterSpec(), [node(0)], grows=True)
    assert share == Share(cpus=1, gpus=0)
    assert capacity(share, [node(0)]) == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus_per_trial": 2}, "no node holds a trial of .* 2 GPUs .* 4 and 1"),
        ({"cpus_per_trial": 5}, "no node holds a trial of 5 CPUs"),
        ({"gpus_per_trial": 1.5}, "neither a whole number"),
    ],
)
def test_what_fits_nowhere_is_refused(asked: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decide_share(ClusterSpec.model_validate(asked), [node(4, 1)])


@pytest.mark.parametrize("address", ["localhost", "http://host:1", "host:port", "ray://host:10001"])
def test_malformed_address(address: str) -> None:
    with pytest.raises(UserError, match="is no Ray address"):
        check_address(address)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_a_port_of_something_else(answer: bytes) -> None:
    """Ray itself would try for two minutes, then end the process."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)
                connection.recv(100)

        thread = threading.Thread(target=serve)
        thread.start()
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            check_address(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_a_closed_port() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"no Ray cluster answers at .* \(Connection refused\)"):
            check_address(f"127.0.0.1:{unused.getsockname()[1]}")


def test_an_unknown_host() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at no\.such\.host\.invalid:6379"):
        check_address("no.such.host.invalid:6379")
