"""What runs ask of a model while the loop goes on with others, and what becomes of it in faults.

python -m pytest tests/flows/test_descriptions.py
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.budget import Budget
from flows.descriptions import Descriptions
from flows.dispatch_loop import FAIR, Entry, drive
from infra.records import ModelAnswer, ModelQuestion, ModelRecord, TrialResult, TrialSpec
from infra.spec_files import parse_spec
from infra.specs import ClusterSpec
from tests.faults import processes
from tests.flows.test_dispatch_loop import Many
from tests.infra.virtual import VirtualCluster, answered, node

ONE_CPU = ClusterSpec(cpus_per_trial=1)


class Asks(Many):
    """A run of trials that asks what its model is made of before the first."""

    def __init__(
        self,
        name: str,
        model: str,
        descriptions: Descriptions,
        allocation: str,
        sections: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name, 6, model=model)
        raw = {"model": {"source": model}, "data": {"source": "text.txt"}}
        self.spec = parse_spec(
            raw | {"prune": {"allocation": allocation}} | (sections or {}), "test"
        )
        self.descriptions = descriptions
        self.found: ModelRecord | None = None

    def trials(self) -> Iterator[TrialSpec | None]:
        self.found = yield from self.descriptions.of(self.spec)
        yield from super().trials()

    def take(self, result: TrialResult) -> None:
        if isinstance(result.spec, ModelQuestion):
            self.descriptions.take(result.spec, result)
        else:
            super().take(result)


def runs_of(*models: str, allocation: str = "arithmetic") -> list[Asks]:
    descriptions = Descriptions()
    return [Asks(f"cell{i}", m, descriptions, allocation) for i, m in enumerate(models)]


def entries_of(runs: list[Asks], cluster: Any, **fields: Any) -> list[Entry]:
    return [Entry(lambda run=run: run, cluster.share, **fields) for run in runs]  # type: ignore[misc]


def record(source: str) -> ModelRecord:
    return ModelRecord(
        source=source, architecture="Llama", dtype="float32", sha256="ab", blocks=["0"],
        matrices=[], total_params=1, context=8,
    )  # fmt: skip


def answer(spec: TrialSpec) -> TrialResult:
    if not isinstance(spec, ModelQuestion):
        return answered(spec)
    model = record(spec.model.source)
    found: dict[str, Any] = {"model": model} if spec.sizes else {"measured": [0.5]}
    return ModelAnswer(spec=spec, state="complete", **found)


def seconds(spec: TrialSpec) -> float:
    return 10.0 if not isinstance(spec, ModelQuestion) else 100.0 if spec.sizes else 50.0


def test_trials_of_other_cells_run_while_a_model_is_described() -> None:
    """Two cells of a model that takes 100 s ask once; one whose model is known does not wait."""
    runs = runs_of("slow", "slow", "known")
    runs[2].descriptions.note(runs[2].spec, record("known"))
    cluster = VirtualCluster([node("n", cpus=2)], ONE_CPU, seconds=seconds, answer=answer)
    entries = entries_of(runs, cluster, timeout_s=60.0)  # which is for trials
    budget = Budget(trials=18)
    assert drive(cluster, entries, order=FAIR, budget=budget) == ""
    assert [run.end for run in runs] == ["finished"] * 3
    assert [run.found and run.found.source for run in runs] == ["slow", "slow", "known"]
    log = cluster.machines.log
    asked = [(when, spec.model.source) for when, _, spec in log if isinstance(spec, ModelQuestion)]
    assert asked == [(0.0, "slow")]
    trials = [(when, spec) for when, _, spec in log if not isinstance(spec, ModelQuestion)]
    early = [spec.model.source for when, spec in trials if when < 100]
    assert early == ["known"] * 6
    assert cluster.now() == 100 + 60  # the other twelve on both workers


def test_what_an_allocation_measures_is_asked_next_and_once() -> None:
    runs = runs_of("m", "m", allocation="owl")
    cluster = VirtualCluster([node("n", cpus=2)], ONE_CPU, seconds=seconds, answer=answer)
    drive(cluster, entries_of(runs, cluster), order=FAIR)
    assert [run.found and run.found.profile for run in runs] == [[0.5]] * 2
    log = cluster.machines.log
    assert [w for w, _, spec in log if isinstance(spec, ModelQuestion)] == [0.0, 100.0]


@pytest.mark.parametrize(
    "other",
    [
        {"data": {"source": "other.txt"}},
        {"model": {"source": "m", "dtype": "float16"}},
        {"calibration": {"samples": 4}},
    ],
)
def test_of_one_model_each_asks_about_what_it_reads(other: dict[str, Any]) -> None:
    """What is measured with one text, dtype or size says nothing of another."""

    def told(spec: TrialSpec) -> TrialResult:
        found = answer(spec)
        if isinstance(found, ModelAnswer) and found.measured:
            return found.model_copy(update={"measured": [float(spec.calibration.samples)]})
        return found

    descriptions = Descriptions()
    runs = [Asks(f"cell{i}", "m", descriptions, "owl", s) for i, s in enumerate([{}, other])]
    cluster = VirtualCluster([node("n", cpus=2)], ONE_CPU, seconds=seconds, answer=told)
    drive(cluster, entries_of(runs, cluster), order=FAIR)
    asked = [s for _, _, s in cluster.machines.log if isinstance(s, ModelQuestion)]
    assert [len(q.sizes) > 0 for q in asked] == [True, True, False, False]
    for run in runs:
        assert run.found and run.found.profile == [float(run.spec.calibration.samples)]
        read = [q for q in asked if (q.model, q.data) == (run.spec.model, run.spec.data)]
        assert any(q.calibration == run.spec.calibration for q in read if not q.sizes)


def test_scores_that_one_group_measures_are_not_refused_to_it() -> None:
    """Though another of the same model has been described without them."""
    descriptions = Descriptions()
    scored = {"search": {"objective": "t/acc"}, "evaluation": {"tasks": ["t"], "task_rows": 8}}
    runs = [Asks(f"c{i}", "m", descriptions, "uniform", s) for i, s in enumerate([{}, scored])]

    def told(spec: TrialSpec) -> TrialResult:
        found = answer(spec)
        if isinstance(spec, ModelQuestion) and isinstance(found, ModelAnswer) and found.model:
            scores = [f"{task}/acc" for trial in spec.sizes for task in trial.tasks]
            model = found.model.model_copy(update={"scores": scores})
            return found.model_copy(update={"model": model})
        return found

    cluster = VirtualCluster([node("n", cpus=2)], ONE_CPU, seconds=seconds, answer=told)
    assert drive(cluster, entries_of(runs, cluster), keep_going=True) == ""
    assert [run.end for run in runs] == ["finished"] * 2


def test_an_error_is_that_of_the_cell_that_asked() -> None:
    """The next one asks again, also when nothing else is left to do."""
    failed: list[TrialSpec] = []

    def fails_once(spec: TrialSpec) -> TrialResult:
        if isinstance(spec, ModelQuestion) and not failed:
            failed.append(spec)
            return ModelAnswer(spec=spec, state="failed", cause="data.source is too short")
        return answer(spec)

    runs = runs_of("m", "m", "m")
    cluster = VirtualCluster([node("n", cpus=2)], ONE_CPU, seconds=seconds, answer=fails_once)
    assert drive(cluster, entries_of(runs, cluster), keep_going=True) == ""
    assert [run.end for run in runs] == ["stopped: data.source is too short", *["finished"] * 2]


def dies(spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult:
    """A worker that is killed while it describes: `once:FOLDER`, or every time."""
    word, _, folder = spec.model.source.partition(":")
    if isinstance(spec, ModelQuestion):
        if word == "raises":
            raise RuntimeError("the dense model overflows")
        if word == "always" or (word == "once" and not list(Path(folder).iterdir())):
            if folder:
                Path(folder, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return answer(spec)


def test_a_worker_that_is_killed_is_replaced_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a trial: three times at most; then the cell ends, and it alone."""
    monkeypatch.setattr("flows.dispatch_loop.run_trial", dies)
    runs = runs_of(f"once:{tmp_path}", "always", "raises", "well")
    with processes.connect(ClusterSpec()) as cluster:
        assert drive(cluster, entries_of(runs, cluster), order=FAIR, keep_going=True) == ""
    assert (tmp_path / "died").exists()
    once, always, raises, well = (run.end for run in runs)
    assert once == well == "finished"
    assert always == "stopped: describe_model failed: lost 3 times: EOFError"
    assert raises.startswith("stopped: describe_model failed: RuntimeError: the dense model over")
    assert [len(run.taken) for run in runs] == [6, 0, 0, 6]
