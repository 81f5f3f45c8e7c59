"""Where trials run on nodes that differ: labels, memory, whole GPUs and halves, on real Ray.

python -m pytest tests/infra/test_cluster_places.py -m slow

The GPUs are declared, as `ray start --num-gpus` allows: Ray counts them and sets the variable that
hides the others.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as RayNodes

from infra.cluster import Cluster, Job, Pool, connect
from infra.records import TrialResult, TrialSpec
from infra.specs import CalibrationSpec, ClusterSpec, ModelSpec
from tests.infra.trials import act, trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = {"object_store_memory": 80 * 2**20}
GB = 10**9


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[str, dict[str, str]]]:
    """A head without trials, a node with memory and no GPU, one with two GPUs, one with one."""
    head = {"num_cpus": 0, "include_dashboard": False, **SMALL}
    nodes = RayNodes(initialize_head=True, head_node_args=head)
    ids = {
        name: nodes.add_node(**options, **SMALL).node_id
        for name, options in {
            "large": {"num_cpus": 2, "memory": 50 * GB, "labels": {"kind": "cpu"}},
            "two": {"num_cpus": 4, "num_gpus": 2, "memory": 5 * GB, "labels": {"kind": "H100"}},
            "one": {"num_cpus": 2, "num_gpus": 1, "memory": 5 * GB, "labels": {"kind": "L4"}},
        }.items()
    }
    yield nodes.address, ids
    nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(places: tuple[str, dict[str, str]]) -> Iterator[Cluster]:
    with connect(ClusterSpec(address=places[0])) as cluster:
        yield cluster


def visible(spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult:
    """As `act`, and on which GPUs."""
    result = act(spec, batch_divisor=batch_divisor)
    return result.model_copy(update={"device": os.environ.get("CUDA_VISIBLE_DEVICES", "")})


def run(cluster: Cluster, spec: ClusterSpec, *what: str) -> list[TrialResult]:
    """Trials that need what the spec says."""
    share = cluster.share_of(spec)
    jobs = iter([Job(trial(number, each), share) for number, each in enumerate(what)])

    def source(pool: Pool) -> Job | None:
        return next(jobs, None) if pool.fits(share) else None

    results = list(cluster.dispatch(visible, source))
    assert {result.state for result in results} == {"complete"}, results[0].cause
    return results


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (ClusterSpec(labels={"kind": "L4"}), {"one"}),
        (ClusterSpec(labels={"kind": "!in(H100,L4)"}, gpus_per_trial=0), {"large"}),
        (ClusterSpec(gpus_per_trial=0, cpus_per_trial=1, memory_gb_per_trial=20), {"large"}),
        (ClusterSpec(gpus_per_trial=2, cpus_per_trial=1), {"two"}),
    ],
    ids=["label", "labels that are not", "memory", "two GPUs"],
)
def test_trials_go_where_what_they_need_is(
    cluster: Cluster, places: tuple[str, dict[str, str]], spec: ClusterSpec, names: set[str]
) -> None:
    results = run(cluster, spec, "ok", "ok", "ok")
    assert {result.node for result in results} == {places[1][name] for name in names}


def test_a_trial_of_two_gpus_sees_both_of_one_node(cluster: Cluster) -> None:
    (result,) = run(cluster, ClusterSpec(gpus_per_trial=2, cpus_per_trial=1), "ok")
    assert set(result.device.split(",")) == {"0", "1"}


def test_two_halves_share_one_gpu_at_once(cluster: Cluster, tmp_path: Path) -> None:
    spec = ClusterSpec(gpus_per_trial=0.5, cpus_per_trial=1, labels={"kind": "L4"})
    results = run(cluster, spec, f"meet:{tmp_path}", f"meet:{tmp_path}")
    assert [result.device for result in results] == ["0", "0"]
    assert len({result.node for result in results}) == 1


def test_idle_workers_make_room_for_another_share(
    cluster: Cluster, places: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """Both GPUs of the node are held by idle workers, and by Ray's account, when two are wanted."""
    h100 = {"kind": "H100"}
    halves = ClusterSpec(gpus_per_trial=1, cpus_per_trial=1, labels=h100)
    results = run(cluster, halves, f"meet:{tmp_path}", f"meet:{tmp_path}")
    assert {result.device for result in results} == {"0", "1"}
    whole = ClusterSpec(gpus_per_trial=2, cpus_per_trial=1, labels=h100)
    (result,) = run(cluster, whole, "ok")
    assert result.node == places[1]["two"]
    (tmp_path / "again").mkdir()
    meet = f"meet:{tmp_path / 'again'}"
    assert len(run(cluster, halves, meet, meet)) == 2


def test_a_trial_whose_gpu_is_not_there_runs_on_the_cpu_and_says_so(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Ray counts what it was told; torch finds no device."""
    from tasks.trial import run_trial  # torch is for this test alone
    from tests.models import write_checkpoint, write_text

    spec = trial(0, "").model_copy(
        update={
            "model": ModelSpec(source=str(write_checkpoint("llama", tmp_path))),
            "data": write_text(tmp_path / "text.txt"),
            "calibration": CalibrationSpec(samples=2, length=16),
            "context": 16,
        }
    )
    share = cluster.share_of(ClusterSpec(gpus_per_trial=1, cpus_per_trial=1))
    jobs = iter([Job(spec, share)])

    def source(pool: Pool) -> Job | None:
        return next(jobs, None) if pool.fits(share) else None

    (result,) = cluster.dispatch(run_trial, source)
    assert result.state == "complete", result.cause
    assert result.cost.gpus == 1
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert "cuda" not in result.device.lower()
