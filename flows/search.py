"""The search: find the numbers of one allocation on one model, prove it, save it, report it.

    report = search(load_spec("flows/specs/quickstart.toml"))

Start and resume are the same call. Files are the truth: a wave is written down before its first
trial starts, a result the moment it returns; Optuna and MLflow get copies. One loop, in
flows/dispatch_loop.py, drives any number of runs; a single search is a study of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

from flows import speed
from flows.descriptions import Asking, Descriptions
from flows.dispatch_loop import Entry, Step, drive
from flows.fetching import Fetching
from flows.following import following
from flows.live import View, live, trial_event
from flows.pins import pin, refuse
from flows.plan import (
    Results,
    final_wave,
    next_wave,
    planned_passes,
    planned_trials,
    token_passes,
)
from flows.report import Report, write_report
from flows.stop import cause_of, stoppable
from infra import tracking
from infra.cluster import Cluster, LostCheckpointError, connect, damaged
from infra.documents import data_sha256
from infra.errors import UserError
from infra.provenance import provenance
from infra.records import ModelQuestion, ModelRecord, TrialResult, TrialSpec
from infra.samplers import StudyMirror
from infra.specs import Spec
from infra.store import RunStore, write_atomic
from tasks.allocation import bounds_of, check_rates
from tasks.model_card import model_card

Planner = Callable[[Spec, ModelRecord, Results], list[TrialSpec]]


def search(spec: Spec, *, as_json: bool = False) -> Report:
    """Search beta, compare the best with uniform on the report split, save it and report.

    Raises UserError for everything the user can put right; what was finished stays finished.
    """
    return _alone("search", spec, next_wave, as_json)


def prune(spec: Spec, *, as_json: bool = False) -> Report:
    """Prune as the spec says, compare with uniform on the report split, save and report."""
    if spec.prune.allocation == "arithmetic" and "beta" not in spec.prune.model_fields_set:
        raise UserError(
            "prune.beta is missing: give the common difference, such as prune.beta=0.008 (0 is "
            "uniform)"
        )

    def plan(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
        return final_wave(spec, spec.prune, results, model.profile)

    return _alone("prune", spec, plan, as_json)


def _alone(command: str, spec: Spec, plan: Planner, as_json: bool) -> Report:
    refuse(spec)
    provenance()  # of the code as it is now: a model may take long to arrive
    pinned_spec = pin(spec)  # what cannot be read is refused before a run directory is there
    with (
        RunStore.open(spec, command) as store,
        stoppable(store.dir),
        live(spec, planned_passes(spec, None, store.results()), as_json=as_json) as view,
        connect(spec.cluster) as cluster,
        following(cluster.told, lambda facts: view.event({"kind": "recovery", **facts}))
        if spec.recovery.steps
        else nullcontext(),
    ):
        tracking.start(store.dir, spec.tracking)
        run = Run(store, pinned_spec, cluster, view, plan, Descriptions())
        if not cluster.holds(cluster.share):
            run.tell("waiting", problem=cluster.share.no_node)
        timeout_s = spec.cluster.trial_timeout_s
        drive(cluster, [Entry(lambda: run, cluster.share, timeout_s=timeout_s)])
        best = store.path("best")
        if spec.speed.measure and best.is_dir() and not store.path(speed.FILE).exists():
            run.tell("speed")
            speed.measure(cluster, spec, best)
            run.report = write_report(store.dir)
    return run.report


class Run:
    """One run: its files, what it still needs, and who is told; flows/dispatch_loop.py drives."""

    def __init__(
        self,
        store: RunStore,
        spec: Spec,
        cluster: Cluster,
        view: View,
        plan: Planner,
        descriptions: Descriptions,
    ) -> None:
        self.store, self.spec, self.cluster, self.view = store, spec, cluster, view
        self.plan, self.descriptions = plan, descriptions
        self.results = {number: _light(result) for number, result in store.results().items()}
        self.report: Report = {}
        self._model: ModelRecord | None = None
        self._studies: StudyMirror | None = None
        self._out: set[int] = set()  # numbers of trials that were offered and have not ended
        self._again: TrialResult | None = None  # of a trial whose checkpoint was lost
        self._problem = ""  # why there is no checkpoint in the end
        self._storage_problem = ""
        self._fetching: Fetching | None = None

    def trials(self) -> Iterator[Step]:
        """What is to be asked of the model, and the trials that are still to be run, in order;
        None while others must end first.

        What `take` was told in between decides what comes next.
        """
        done = sum(token_passes(result.spec) for result in self.results.values())
        self.tell("started", done=done, cluster=self.cluster.describe())
        for result in self.results.values():
            self.view.event({**trial_event(result), "earlier": True})
        model = yield from self._begin()
        for wave in self._waves(model):
            # The final comparison needs all of its trials, so one that failed is tried once more.
            missing = [trial for trial in wave if self._lacks(trial)]
            if missing:
                self._tell_wave(wave, model)
            for trial in missing:
                self._out.add(trial.number)
                yield trial
            while self._out:
                yield None
            self.results = dict(sorted(self.results.items()))
        yield from self._publish()

    def take(self, result: TrialResult) -> None:
        """The result of a trial that was offered: into the files first, then to who is told."""
        if isinstance(result.spec, ModelQuestion):
            self.descriptions.take(result.spec, result)
            return
        number = result.spec.number
        self._out.discard(number)
        complete = result.state == "complete"
        if complete and self._model and result.weights_sha256 != self._model.sha256:
            raise UserError(
                f"{self.spec.model.source} on {result.host} holds other weights than this run "
                "began with: restore them or choose another run.dir"
            )
        if number in self.results and self.results[number].state == "complete":
            self._again = result
            if not complete:  # what was measured still stands
                return
        self.store.write_result(result)
        self.results[number] = _light(result)
        if self._studies is not None:
            self._studies.record(result)
            self._tell_storage(self._studies)
        event = trial_event(result)
        self.tell(event.pop("kind"), **event)

    def reader(self, number: int) -> Callable[[], TrialResult]:
        """What reads a result that was taken from the files."""
        return partial(self.store.result, number)

    def wait(self, problem: str) -> None:
        """Its trials, which ran before, wait for a node."""
        self.tell("waiting", problem=problem)

    def finish(self) -> None:
        """The report and the model card, when no trial is left.

        Raises UserError where there is no checkpoint in the end; the report is written before.
        """
        self.tell("report")
        try:
            self.report = write_report(self.store.dir)
        except UserError as error:  # the failed trial was the only one of its kind
            raise UserError(self._problem or str(error)) from error
        if self._problem:
            raise UserError(self._problem)
        if self.store.path("best").is_dir():  # unless none was asked for
            smaller = self.store.path("best/structure.json").is_file()
            card = model_card(self.report, smaller=smaller).encode()
            write_atomic(self.store.path("best/README.md"), card)
        self.close()
        self.tell("finished", report=str(self.store.path("report.html")))

    def stop(self, error: BaseException) -> None:
        """End before the end; what was finished stays finished.

        Raises UserError where that cannot be written down; who watches is told all the same.
        """
        fields = cause_of(error)
        try:
            self.store.event("stopped", **fields)
        finally:
            self.view.event({"kind": "stopped", **fields})
            self.close()

    def close(self) -> None:
        """Let the threads of Optuna and of the checkpoint end."""
        if self._fetching is not None:
            self._fetching.stop()
        if self._studies is not None:
            self._studies.close()
            self._tell_storage(self._studies, last=True)
            self._studies = None

    def tell(self, kind: str, **fields: Any) -> None:
        """Into events.jsonl and to whoever watches."""
        self.store.event(kind, **fields)
        self.view.event({"kind": kind, **fields})

    def _tell_storage(self, studies: StudyMirror, last: bool = False) -> None:
        """That Optuna's storage cannot be written, which stops nothing; at the end once more."""
        problem = studies.problem
        if problem != self._storage_problem or (problem and last):
            self.tell("storage", problem=problem, untold=studies.untold)
        self._storage_problem = problem

    def _begin(self) -> Asking:
        """Check that model and text are those that the run began with."""
        if waves := self.store.waves():  # the revisions that its first trial read
            first = {"model": waves[0][0].model, "data": waves[0][0].data}
            self.spec = self.spec.model_copy(update=first)
        model = self._model = self.store.model() or (yield from self._describe())
        for split in ("calibration", "selection", "report"):
            if (
                data_sha256(self.spec.model.modality, self.spec.data, split)
                != model.data_sha256[split]
            ):
                raise UserError(
                    f"what data.{split} holds has changed since {self.store.dir} was started: "
                    "restore it or choose another run.dir"
                )
        check_rates(self.spec.prune, model.matrices)  # an infeasible beta is refused here
        bounds = bounds_of(self.spec.prune, model.matrices)
        storage = self.spec.search.storage
        objective = self.spec.search.objective
        self._studies = StudyMirror(self.store.dir, self.store.id, storage, bounds, objective)
        self._studies.rebuild(self.results.values())
        # The dtype that `auto` meant on the first worker holds for all of them.
        model_spec = self.spec.model.model_copy(update={"dtype": model.dtype})
        self.spec = self.spec.model_copy(update={"model": model_spec})
        return model

    def _describe(self) -> Asking:
        model = yield from self.descriptions.of(self.spec)
        self.store.write_model(model)
        self.store.event("data", **model.data_sha256)
        self.tell(
            "model",
            architecture=model.architecture,
            blocks=len(model.blocks),
            matrices=len(model.matrices),
            dense_loss=model.dense_loss,
        )
        return model

    def _waves(self, model: ModelRecord) -> Iterator[list[TrialSpec]]:
        """Those written down, then those planned from their results."""
        yield from self.store.waves()
        while wave := self.plan(self.spec, model, self.results):
            self.store.write_wave(len(self.store.waves()), wave)
            yield wave

    def _lacks(self, trial: TrialSpec) -> bool:
        result = self.results.get(trial.number)
        return result is None or (trial.stage == "final" and result.state == "failed")

    def _tell_wave(self, wave: list[TrialSpec], model: ModelRecord) -> None:
        kind = "final" if wave[0].stage == "final" else "climb" if wave[0].rung else "wave"
        planned = planned_passes(self.spec, model, self.results)
        trials = planned_trials(self.spec, model, self.results)
        if kind == "final":  # rungs that nobody had to climb to are not to come
            earlier = [
                result.spec
                for number, result in self.results.items()
                if number not in {trial.number for trial in wave}
            ]
            planned = sum(map(token_passes, [*earlier, *wave]))
            trials = len(earlier) + len(wave)
        candidates = [trial.prune.label for trial in wave]
        fields = {"candidates": candidates, "planned": planned, "planned_trials": trials}
        self.tell(kind, rung=wave[0].rung, **fields)

    def _publish(self) -> Iterator[Step]:
        """Bring the best checkpoint into the run directory, once; a lost one is made again."""
        best = self.store.path("best")
        saved = next((r for r in self.results.values() if r.spec.checkpoint), None)
        if saved is None:
            return
        if best.exists():
            if name := damaged(saved, best):
                self._problem = (
                    f"{best / name} is not the file that was saved: move {best} away, and the "
                    "same command makes it again"
                )
            return
        cause = ""
        for attempt in (1, 2):
            if saved.state == "failed":
                cause = f"trial {saved.spec.number} failed, {saved.cause}"
                break
            self._fetching = Fetching(self.cluster.fetch, saved, best, self.store.check_owner)
            yield self._fetching.ended
            try:
                self._fetching.ended.result()
                return
            except OSError as error:
                cause = error.strerror or str(error)
                if attempt == 2 or not isinstance(error, LostCheckpointError):
                    break
            self.tell("checkpoint", problem=cause)
            self._out.add(saved.spec.number)
            yield saved.spec
            while self._out:
                yield None
            saved = self._again or saved
        self._problem = (
            f"no checkpoint in {best}: {cause}; results are kept, the same command tries again"
        )


def _light(result: TrialResult) -> TrialResult:
    """Without what is said of each matrix, which no plan reads: of hundreds of runs it is much."""
    return result.model_copy(update={"matrices": [], "errors": []})
