"""Nodes and drivers whose versions differ: refused by name, and the others go on, on real Ray.

python -m pytest tests/infra/test_cluster_versions.py
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayNodes

from infra.cluster import connect
from infra.environment import CHECKOUT
from infra.errors import UserError
from infra.provenance import compared_versions
from infra.records import TrialSpec
from infra.specs import ClusterSpec
from tests.infra.trials import act, trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
SMALL = {"object_store_memory": 80 * 2**20}


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head that takes no trials."""
    head = {"num_cpus": 0, "include_dashboard": False, **SMALL}
    nodes = RayNodes(initialize_head=True, head_node_args=head)
    yield nodes
    nodes.shutdown()


def add_skewed(nodes: Any, folder: Path, num_cpus: int) -> str:
    """A node whose Python finds another torch first; its id."""
    installed = folder / "torch-1.0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.1\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    added = nodes.add_node(num_cpus=num_cpus, env_vars={"PYTHONPATH": path}, **SMALL)
    return str(added.node_id)


def test_a_node_with_another_torch_is_named_and_the_others_go_on(
    nodes: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    skewed = add_skewed(nodes, tmp_path, num_cpus=4)  # the first that trials would go to
    good = nodes.add_node(num_cpus=1, **SMALL).node_id
    with connect(ClusterSpec(address=nodes.address, cpus_per_trial=1)) as cluster:
        assert cluster.parallel == 5

        def specs() -> Iterator[TrialSpec]:
            numbers = itertools.count()
            while skewed in [node["node"] for node in cluster.describe()["nodes"]]:
                yield trial(next(numbers), "sleep:1")

        results = list(cluster.run(act, specs()))
        assert {(result.state, result.attempts) for result in results} == {("complete", 1)}
        assert {result.node for result in results} == {good}
        assert cluster.parallel == 1
    ours = compared_versions()["torch"]
    lines = [line for line in capfd.readouterr().err.splitlines() if "torch" in line]
    assert len(lines) == 1  # of several workers there
    assert f"has torch 1.0.1 where the driver has torch {ours}: no trial runs there" in lines[0]


def test_a_cluster_of_nothing_else_is_refused(nodes: Any, tmp_path: Path) -> None:
    add_skewed(nodes, tmp_path, num_cpus=1)
    ours = compared_versions()["torch"]
    with (
        connect(ClusterSpec(address=nodes.address, cpus_per_trial=1)) as cluster,
        pytest.raises(UserError, match=f"torch 1.0.1 where the driver has torch {ours}$"),
    ):
        list(cluster.run(act, [trial(0, "ok")]))


def test_a_driver_with_another_ray_is_refused_in_one_line(nodes: Any) -> None:
    """As Ray itself compares; here its own idea of its version is another."""
    code = (
        "from infra import environment; environment.prepare()\n"
        "import ray; ray.__version__ = '2.1.0'\n"
        "from flows.cli import main; main(['doctor', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env=os.environ | {"RAY_ADDRESS": nodes.address},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"Ray: {compared_versions()['ray']}" in done.stderr and "Ray: 2.1.0" in done.stderr
