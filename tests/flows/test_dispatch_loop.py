"""Shares, budget and warmth: the real loop and the real pool on simulated machines.

python -m pytest tests/flows/test_dispatch_loop.py
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from flows.budget import Budget
from flows.dispatch_loop import FAIR, IN_TURN, Entry, Order, drive
from infra.cluster import Node, Share
from infra.errors import UserError
from infra.records import Cost, TrialResult, TrialSpec
from infra.specs import ClusterSpec, DataSpec
from tests.infra.trials import trial
from tests.infra.virtual import VirtualCluster, node

GPU = Share(cpus=1, gpus=1)


class Many:
    """A run of waves of equal length; its trials are told apart from other runs' by their text."""

    def __init__(self, name: str, num_trials: int, wave: int = 4, model: str = "") -> None:
        self.name, self.num_trials, self.wave, self.model = name, num_trials, wave, model or name
        self.out = 0
        self.taken: list[int] = []
        self.waited: list[str] = []
        self.end = ""

    def trials(self) -> Iterator[TrialSpec | None]:
        for number in range(self.num_trials):
            spec = trial(number, self.model)
            self.out += 1
            other = {"data": DataSpec(source=self.name), "windows": 2 + number}
            yield spec.model_copy(update=other)
            while self.out and (number + 1) % self.wave == 0:
                yield None
        while self.out:
            yield None

    def take(self, result: TrialResult) -> None:
        self.out -= 1
        self.taken.append(result.spec.number)

    def reader(self, number: int) -> Callable[[], TrialResult]:
        return lambda: TrialResult(spec=trial(number, self.model), state="complete")

    def wait(self, problem: str) -> None:
        self.waited.append(problem)

    def finish(self) -> None:
        self.end = "finished"

    def stop(self, error: BaseException) -> None:
        self.end = f"stopped: {error}"


def entry(run: Many, share: Share = GPU, **fields: Any) -> Entry:
    return Entry(lambda: run, share, **fields)


def begun(cluster: VirtualCluster, until: float) -> Counter[str]:
    """Trials of each run that began before a moment."""
    return Counter(spec.data.source for when, _, spec in cluster.machines.log if when < until)


@pytest.mark.parametrize("lengths", [(60, 60, 60), (60, 120, 360)])
def test_a_cell_of_priority_p_gets_p_times_as_much(lengths: tuple[int, ...]) -> None:
    """Whatever its trials take."""
    seconds = dict(zip("abc", lengths, strict=True))
    cluster = VirtualCluster(
        [node("n", cpus=12, gpus=12)], seconds=lambda spec: seconds[spec.data.source]
    )
    runs = [Many(name, 4000, wave=100, model="m") for name in "abc"]
    entries = [entry(run, priority=p) for run, p in zip(runs, (1, 2, 3), strict=True)]
    drive(cluster, entries, order=FAIR, budget=Budget(until=9_000.0, grace_s=1e6))
    used = {run.name: seconds[run.name] * len(run.taken) for run in runs}
    assert sum(used.values()) > 0.99 * 12 * 9_000
    assert used["b"] / used["a"] == pytest.approx(2, rel=0.05)
    assert used["c"] / used["a"] == pytest.approx(3, rel=0.05)


def test_what_one_cell_cannot_use_goes_to_the_others() -> None:
    """Max-min: a cell with one trial at a time does not hold the rest back."""
    cluster = VirtualCluster([node("n", cpus=8, gpus=8)])
    runs = [Many("a", 100, wave=1, model="m"), Many("b", 700, wave=100, model="m")]
    drive(cluster, [entry(run) for run in runs], order=FAIR)
    assert [run.end for run in runs] == ["finished"] * 2
    assert cluster.machines.busy_s / (8 * cluster.now()) > 0.95


def test_what_earlier_starts_used_counts() -> None:
    cluster = VirtualCluster([node("n", cpus=1, gpus=1)])
    runs = [Many("a", 20), Many("b", 20)]
    drive(cluster, [entry(runs[0], used_s=601.0), entry(runs[1])], order=FAIR)
    assert begun(cluster, 9 * 60) == {"b": 9}


def test_in_turn_a_worker_keeps_its_model() -> None:
    """Which fair shares cost: each round but for the cell that ended the one before."""
    for order, loads in ((IN_TURN, 3), (FAIR, 3 + 9 * 2)):
        cluster = VirtualCluster([node("n", cpus=1, gpus=1)], seconds=lambda spec: 90.0)
        drive(cluster, [entry(Many(name, 10)) for name in "abc"], order=order)
        assert cluster.machines.loads == loads


def test_a_loaded_model_is_worth_a_minute_of_unfairness() -> None:
    """With short trials, several of one model follow each other; the cells stay that near."""
    cluster = VirtualCluster([node("n", cpus=1, gpus=1)], seconds=lambda spec: 10.0)
    runs = [Many(name, 60) for name in "ab"]
    drive(cluster, [entry(run) for run in runs], order=FAIR)
    assert cluster.machines.loads <= 120 / 6
    for until in range(10, 1200, 10):
        counts = begun(cluster, until)
        assert abs(counts["a"] - counts["b"]) * 10 <= FAIR.warm_s + 10


@pytest.mark.parametrize("order", [IN_TURN, FAIR])
def test_needs_are_met_side_by_side(order: Order) -> None:
    """Whole nodes, parts of a GPU, memory and labels; VirtualMachines sees that nothing is given
    twice. The large trials are not kept waiting by small ones for ever."""
    nodes = [node(f"n{i}", cpus=16, gpus=4, kind="A100" if i else "H100") for i in range(3)]
    lengths = {"large": 300.0, "small": 100.0, "part": 70.0, "h100": 50.0, "cpu": 20.0}
    cluster = VirtualCluster(nodes, seconds=lambda spec: lengths[spec.data.source])
    shares = {
        "large": Share(cpus=4, gpus=4),
        "small": GPU,
        "part": Share(cpus=1, gpus=0.25),
        "h100": Share(cpus=1, gpus=1, labels=(("kind", "H100"),)),
        "cpu": Share(cpus=1, gpus=0, memory_bytes=30 * 10**9),
    }
    runs = {name: Many(name, 40, wave=10) for name in shares}
    drive(cluster, [entry(runs[name], share) for name, share in shares.items()], order=order)
    assert {run.end for run in runs.values()} == {"finished"}
    assert {where for _, where, spec in cluster.machines.log if spec.data.source == "h100"} == {
        "n0"
    }


def test_large_trials_are_not_kept_waiting_by_small_ones() -> None:
    """Small trials end one after the other: without a node that is held, four GPUs are never free
    at one moment."""
    lengths = {"large": 200.0, "b": 70.0, "c": 110.0, "d": 130.0}
    cluster = VirtualCluster(
        [node(f"n{i}", cpus=4, gpus=4) for i in range(4)],
        seconds=lambda spec: lengths[spec.data.source],
    )
    runs = [Many(name, 4000, wave=50, model="m") for name in lengths]
    entries = [entry(runs[0], Share(cpus=4, gpus=4)), *map(entry, runs[1:])]
    drive(cluster, entries, order=FAIR, budget=Budget(until=9_000.0, grace_s=1e6))
    used = [each.used_s for each in entries]
    assert min(used) > 0.9 * max(used)
    assert sum(used) > 0.9 * 16 * 9_000


def test_no_trial_begins_once_the_trials_are_begun() -> None:
    cluster = VirtualCluster([node("n", cpus=2, gpus=2)])
    runs = [Many("a", 10), Many("b", 10)]
    budget = Budget(trials=7, num_begun=2)
    said = drive(cluster, [entry(run) for run in runs], order=FAIR, budget=budget)
    assert said == "budget: all 7 trials are begun"
    assert len(cluster.machines.log) == sum(len(run.taken) for run in runs) == 5
    assert [run.end for run in runs] == [f"stopped: {said}"] * 2


def test_the_gpu_hours_are_kept_to_within_what_runs() -> None:
    cluster = VirtualCluster([node("n", cpus=4, gpus=4)], seconds=lambda spec: 600.0)
    run = Many("a", 100, wave=50)
    said = drive(cluster, [entry(run)], order=FAIR, budget=Budget(used_s=2 * 3600))
    assert said == "budget: 2 GPU-hours are used"
    assert len(run.taken) * 600 == 2 * 3600


def test_a_run_that_needs_no_more_trials_ends_well_within_the_budget() -> None:
    cluster = VirtualCluster([node("n", cpus=2, gpus=2)])
    runs = [Many("b", 0), Many("a", 4)]
    assert drive(cluster, [entry(run) for run in runs], budget=Budget(trials=4)) == ""
    assert [run.end for run in runs] == ["finished", "finished"]


def test_at_the_deadline_what_runs_has_its_grace() -> None:
    cluster = VirtualCluster(
        [node("n", cpus=2, gpus=2)],
        seconds=lambda spec: 70.0 if spec.data.source == "short" else 5000.0,
    )
    short, long = Many("short", 100), Many("long", 100)
    budget = Budget(until=1000.0, grace_s=120.0)
    said = drive(cluster, [entry(short), entry(long, at_once=1)], order=FAIR, budget=budget)
    assert said == "budget: its hours are over"
    assert 1120 <= cluster.now() < 1130
    assert (len(short.taken), len(long.taken)) == (15, 0)
    assert not any(slot.busy for slot in cluster.pool.slots)


def test_cells_that_fit_go_on_while_a_node_is_on_its_way() -> None:
    """On a cluster that grows, a worker that waits for a node is what makes it grow."""
    added = iter([node("g1", cpus=8, gpus=8)])

    def grows(share: Share) -> Node | None:
        return next(added, None) if share.gpus else None

    cluster = VirtualCluster([node("n", cpus=2)], grows=grows, start_s=5.0)
    cpu = cluster.share_of(ClusterSpec(cpus_per_trial=1))
    large = cluster.share_of(ClusterSpec(cpus_per_trial=1, gpus_per_trial=8))
    runs = [Many("large", 3), Many("cpu", 8)]
    drive(cluster, [entry(runs[0], large), entry(runs[1], cpu)], order=FAIR)
    assert [run.end for run in runs] == ["finished"] * 2
    assert begun(cluster, 250) == {"cpu": 8}
    assert {where for _, where, spec in cluster.machines.log if spec.data.source == "large"} == {
        "g1"
    }


def test_without_an_autoscaler_what_no_node_holds_is_refused() -> None:
    cluster = VirtualCluster([node("n", cpus=2)])
    with pytest.raises(UserError, match="no node holds a trial of 1 CPUs and 8 GPUs"):
        cluster.share_of(ClusterSpec(cpus_per_trial=1, gpus_per_trial=8))
    with pytest.raises(UserError, match=r"no node has cluster\.labels=.*H100"):
        cluster.share_of(ClusterSpec(labels={"kind": "H100"}))
    with pytest.raises(UserError, match=r"with 900 GB .*memory_gb_per_trial"):
        cluster.share_of(ClusterSpec(memory_gb_per_trial=900))


def test_a_cell_keeps_to_its_own_limit() -> None:
    cluster = VirtualCluster([node("n", cpus=8, gpus=8)])
    drive(cluster, [entry(Many("a", 20, wave=20), at_once=2)], order=FAIR)
    assert cluster.now() == 10 * 60


def test_the_time_of_a_trial_is_charged_to_who_began_it() -> None:
    """Equal trials of two runs are run, and paid for, once."""
    cluster = VirtualCluster([node("n", cpus=1, gpus=1)])
    first, second = Many("same", 5), Many("same", 5)
    entries = [entry(first), entry(second)]
    drive(cluster, entries, order=FAIR)
    assert len(cluster.machines.log) == 5
    assert first.taken == second.taken == list(range(5))
    assert sum(each.used_s for each in entries) == 5 * 60


def test_a_trial_is_billed_to_one_of_the_cells_that_share_it() -> None:
    """Whether it was out or finished when another asked for it: what they have sums up."""
    costs: list[Cost] = []

    class Costed(Many):
        def take(self, result: TrialResult) -> None:
            costs.append(result.cost)
            super().take(result)

        def reader(self, number: int) -> Callable[[], TrialResult]:
            cost = Cost(held_s=60.0, gpus=1.0)
            return lambda: TrialResult(spec=trial(number, "same"), state="complete", cost=cost)

    cluster = VirtualCluster([node("n", cpus=1, gpus=1)])
    early, late = Costed("same", 5), Costed("same", 5)
    drive(cluster, [entry(Costed("same", 5)), entry(early), entry(Many("b", 9)), entry(late)])
    assert len(costs) == 15
    assert sum(cost.used_s for cost in costs) == 5 * 60
    assert {cost.gpus for cost in costs} == {1.0}


def test_a_result_says_what_its_worker_held() -> None:
    cluster = VirtualCluster([node("n", cpus=4, gpus=1)])
    costs: list[Cost] = []

    class Costed(Many):
        def take(self, result: TrialResult) -> None:
            costs.append(result.cost)
            super().take(result)

    drive(cluster, [entry(Costed("a", 1), Share(cpus=2, gpus=0.5))])
    assert [(cost.held_s, cost.gpus, cost.cpus, cost.used_s) for cost in costs] == [
        (60.0, 0.5, 2, 30.0)
    ]


def test_a_cell_that_cannot_be_opened_does_not_stop_the_others() -> None:
    cluster = VirtualCluster([node("n", cpus=1, gpus=1)])
    run = Many("a", 3)
    entries = [Entry(partial(lambda: None), GPU), entry(run)]
    assert drive(cluster, entries, keep_going=True) == ""
    assert run.end == "finished"


class Broken(Many):
    """A run whose folder is gone: nothing of it can be written, not even that it ends."""

    def take(self, result: TrialResult) -> None:
        raise UserError(f"cannot write {self.name}")

    def stop(self, error: BaseException) -> None:
        super().stop(error)
        raise UserError(f"cannot write {self.name}")


@pytest.mark.parametrize("keep_going", [True, False])
def test_a_run_that_cannot_say_that_it_ends_does_not_keep_the_others(keep_going: bool) -> None:
    cluster = VirtualCluster([node("n", cpus=2, gpus=2)])
    runs = [Broken("a", 3, model="m"), Many("b", 3, model="m")]
    entries = [entry(run) for run in runs]
    if keep_going:
        assert drive(cluster, entries, order=FAIR, keep_going=True) == ""
    else:
        with pytest.raises(UserError, match="cannot write a"):
            drive(cluster, entries, order=FAIR)
    ended = "finished" if keep_going else "stopped: cannot write a"
    assert [run.end for run in runs] == ["stopped: cannot write a", ended]


def test_of_hundreds_of_cells_few_are_open_and_no_worker_waits() -> None:
    """What a run holds in memory is held for 64 of them, unless those leave room."""
    for wave, most in ((4, FAIR.num_open), (1, 70)):
        cluster = VirtualCluster([node("n", cpus=70, gpus=70 if wave == 1 else 8)])
        runs = [Many(str(index), 8, wave=wave) for index in range(200)]
        entries = [entry(run) for run in runs]
        open_at_once = []

        class Watched(Many):
            def take(self, result: TrialResult) -> None:
                open_at_once.append(sum(each.coming is not None for each in entries))  # noqa: B023
                super().take(result)

        entries += [entry(Watched(f"w{index}", 8, wave=wave)) for index in range(20)]
        drive(cluster, entries, order=FAIR)
        assert {run.end for run in runs} == {"finished"}
        assert max(open_at_once) <= most


def test_what_a_cell_has_used_may_be_asked_while_its_trials_change() -> None:
    """By the thread that draws the overview."""
    drawn = entry(Many("a", 1))

    class Begun(float):
        def __rsub__(self, now: float) -> float:
            drawn.out["next"] = now
            return now - float(self)

    drawn.out["first"] = Begun(10.0)
    assert drawn.used_at(15.0) == 5.0
