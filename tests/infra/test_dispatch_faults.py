"""Trials that hang, and those that the host has no memory for, on simulated machines.

python -m pytest tests/infra/test_dispatch_faults.py
"""

from typing import Any

from infra.cluster import Outcome
from infra.cluster.dispatch import Job
from infra.records import TrialResult, TrialSpec
from infra.specs import ClusterSpec
from tests.infra.trials import act, trial
from tests.infra.virtual import VirtualCluster, VirtualMachines, node


class Faulty(VirtualMachines):
    """A trial of `never` needs more memory than there is, one of `alone` all of it."""

    def outcome(self, reference: int) -> Outcome:
        spec = self._results[reference].spec
        what = spec.model.source
        if what == "never" or (what == "alone" and len(self._workers) > 1):
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
