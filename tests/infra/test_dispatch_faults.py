"""Trials that hang, those that the host has no memory for, and lost nodes, on simulated machines.

python -m pytest tests/infra/test_dispatch_faults.py
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from flows.budget import Budget
from flows.dispatch_loop import FAIR, Entry, drive
from infra.cluster import Outcome, Pool
from infra.cluster.dispatch import Job
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec
from tests.flows.test_dispatch_loop import Many
from tests.infra.trials import act, trial
from tests.infra.virtual import VirtualCluster, VirtualMachines, node


class Faulty(VirtualMachines):
    """A trial of `never` needs more memory than its node has, one of `alone` all of it."""

    def outcome(self, reference: int) -> Outcome:
        spec = self._results[reference].spec
        what, place = spec.model.source, self._sent_to[reference].place
        beside = sum(worker.place == place for worker in self._workers) - 1
        if what == "never" or (what == "alone" and beside):
            super().outcome(reference)
            return Outcome("host-out-of-memory", cause="OutOfMemoryError: killed")
        return super().outcome(reference)


def results_of(*what: str, **options: Any) -> tuple[list[TrialResult], VirtualMachines]:
    """The results of trials on two workers, in their order."""
    cluster = VirtualCluster([node("a", cpus=2)], ClusterSpec(cpus_per_trial=1))
    cluster.machines = cluster.pool.machines = Faulty([node("a", cpus=2)], **options)
    specs = [trial(number, each) for number, each in enumerate(what)]
    source = iter(specs)

    def jobs(pool: Any) -> Job | None:
        spec = next(source, None) if pool.fits(cluster.share) else None
        return Job(spec, cluster.share) if spec else None

    results = sorted(cluster.dispatch(act, jobs), key=lambda result: result.spec.number)
    return results, cluster.machines


def test_out_of_host_memory_is_run_once_more_with_nothing_beside_it() -> None:
    results, _ = results_of("ok", "alone", "ok", "never", "ok")
    states = [result.state for result in results]
    assert states == ["complete", "complete", "complete", "failed", "complete"]
    assert results[3].cause == "OutOfMemoryError: killed"
    assert [result.attempts for result in results] == [1, 2, 1, 2, 1]


class Alike(Many):
    """A run whose trials differ in their candidates only."""

    def trials(self) -> Iterator[TrialSpec | None]:
        for spec in super().trials():
            beta = spec and spec.prune.model_copy(update={"beta": 1e-6 * spec.number})
            yield spec and spec.model_copy(update={"windows": 2, "prune": beta})


@pytest.mark.parametrize(("what", "busy"), [("never", 0.97), ("alone", 0.85)])
def test_the_other_nodes_stay_busy_while_a_cell_runs_out_of_host_memory(
    what: str, busy: float
) -> None:
    """One cell of 32, on 8 nodes of 8 GPUs: its trials have a node to themselves, one at a time;
    where even that does not help, the next ones of the cell fail as they run out."""
    nodes = [node(f"n{index}", cpus=8, gpus=8) for index in range(8)]
    cluster = VirtualCluster(nodes)
    cluster.machines = cluster.pool.machines = Faulty(nodes, start_s=10.0)
    runs: list[Many] = [Many(f"cell{index}", 10**6, wave=32, model="ok") for index in range(31)]
    runs.append(Alike("large", 10**6, wave=32, model=what))
    entries = [Entry(partial(lambda run: run, run), cluster.share) for run in runs]
    drive(cluster, entries, order=FAIR, budget=Budget(until=3600.0))
    busy_s = sum(entry.used_at(cluster.now()) for entry in entries)
    assert busy_s / (64 * cluster.now()) > busy
    assert min(len(run.taken) for run in runs[:-1]) > 60 * 2 * 0.8
    assert runs[-1].taken


def test_a_trial_that_hangs_is_begun_again_by_the_median_of_the_others() -> None:
    dispatched: list[int] = []

    def seconds(spec: TrialSpec) -> float:
        dispatched.append(spec.number)
        hangs = spec.number == 5 and dispatched.count(5) == 1
        return 1e6 if hangs or spec.number == 6 else 30.0

    results, machines = results_of(*["ok"] * 8, seconds=seconds)
    assert [result.state for result in results] == ["complete"] * 6 + ["failed", "complete"]
    assert [result.attempts for result in results] == [1] * 5 + [2, 3, 1]
    assert results[6].cause == "lost 3 times: hung for 300 s"
    assert machines.now() < 3600


def test_a_node_that_dies_while_its_workers_start_ends_nothing() -> None:
    """Its eight workers are one fault of a node, and none of our dependencies."""
    nodes = [node("a", cpus=8, gpus=8), node("b", cpus=8, gpus=8)]
    cluster = VirtualCluster(nodes, start_s=20.0, changes=[(10.0, "a")])
    specs = iter([trial(number, "ok") for number in range(16)])

    def jobs(pool: Pool) -> Job | None:
        spec = next(specs, None) if pool.fits(cluster.share) else None
        return Job(spec, cluster.share) if spec else None

    results = list(cluster.dispatch(act, jobs))
    assert [result.state for result in results] == ["complete"] * 16
    assert {where for _, where, _ in cluster.machines.log} == {"b"}


def test_a_node_on_which_no_worker_starts_is_said() -> None:
    class Bare(VirtualMachines):
        def started(self, reference: int) -> tuple[str, str]:
            super().started(reference)
            return "", "No module named 'torch'"

    cluster = VirtualCluster([node("a", cpus=2)])
    cluster.machines = cluster.pool.machines = Bare([node("a", cpus=2)])
    job = Job(trial(0, "ok"), cluster.share)
    with pytest.raises(UserError, match="no worker starts on the cluster: No module named"):
        list(cluster.dispatch(act, lambda pool: job if pool.fits(cluster.share) else None))
