"""The search: find the common difference of one model, prove it, save it, report it.

    report = search(load_spec("flows/specs/quickstart.toml"))

Start and resume are the same call. Files are the truth: a wave is written down before its first
trial starts, a result the moment it returns; Optuna and MLflow get copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.live import View, live, trial_event
from flows.plan import (
    Results,
    final_wave,
    kinds_of_trial,
    next_wave,
    planned_passes,
    token_passes,
)
from flows.report import Report, write_report
from infra import tracking
from infra.checkpoints import inspect_checkpoint
from infra.cluster import Cluster, LostCheckpointError, connect
from infra.documents import corpus_sha256, documents
from infra.errors import UserError
from infra.records import ModelRecord, TrialResult, TrialSpec
from infra.samplers import StudyMirror
from infra.sources import fetch, pinned
from infra.specs import MISSING_SOURCE, Spec
from infra.store import RunStore, write_atomic
from tasks.allocation import bounds_of, check_rates
from tasks.model_card import model_card
from tasks.trial import describe_model, measure_profile, run_trial

Planner = Callable[[Spec, ModelRecord, Results], list[TrialSpec]]


def search(spec: Spec, *, as_json: bool = False) -> Report:
    """Search beta, compare the best with uniform on the report split, save it and report.

    Raises UserError for everything the user can put right; what was finished stays finished.
    """
    return _run("search", spec, next_wave, as_json)


def prune(spec: Spec, *, as_json: bool = False) -> Report:
    """Prune as the spec says, compare with uniform on the report split, save and report."""

    def plan(spec: Spec, model: ModelRecord, results: Results) -> list[TrialSpec]:
        return final_wave(spec, spec.prune, results, model.profile)

    return _run("prune", spec, plan, as_json)


def _run(command: str, spec: Spec, plan: Planner, as_json: bool) -> Report:
    pinned_spec = pin(spec)  # what cannot be read is refused before a run directory is there
    with (
        RunStore.open(spec, command) as store,
        live(spec, planned_passes(spec, None, store.results()), as_json=as_json) as view,
        connect(spec.cluster) as cluster,
    ):
        tracking.start(store.dir, spec.tracking)
        run = _Run(store, pinned_spec, cluster, view)
        try:
            report = run.go(plan)
        except BaseException as error:
            run.tell("stopped", cause=type(error).__name__)
            raise
        finally:
            if run.studies is not None:
                run.studies.close()
                run.tell_storage(last=True)
        run.tell("finished", report=str(store.path("report.html")))
    return report


class _Run:
    """One driver's view of a run: its files, its cluster, and who is told."""

    def __init__(self, store: RunStore, spec: Spec, cluster: Cluster, view: View) -> None:
        self.store, self.spec, self.cluster, self.view = store, spec, cluster, view
        self.results = store.results()
        self.studies: StudyMirror | None = None
        self.storage_problem = ""

    def go(self, plan: Planner) -> Report:
        """Wave after wave until the plan is empty, then the checkpoint and the report.

        Raises UserError where there is no checkpoint in the end; the report is written before.
        """
        done = sum(token_passes(result.spec) for result in self.results.values())
        self.tell("started", done=done, cluster=self.cluster.describe())
        if waves := self.store.waves():  # the revisions that its first trial read
            first = {"model": waves[0][0].model, "data": waves[0][0].data}
            self.spec = self.spec.model_copy(update=first)
        model = self.store.model() or self._describe()
        for split in ("calibration", "selection", "report"):
            if corpus_sha256(documents(self.spec.data, split)) != model.data_sha256[split]:
                raise UserError(
                    f"the text of data.{split} has changed since {self.store.dir} was started: "
                    "restore it or choose another run.dir"
                )
        check_rates(self.spec.prune, model.matrices)  # an infeasible beta is refused here
        bounds = bounds_of(self.spec.prune, model.matrices)
        self.studies = StudyMirror(self.store.dir, self.store.id, self.spec.search.storage, bounds)
        self.studies.rebuild(self.results.values())
        # The dtype that `auto` meant on the first worker holds for all of them.
        model_spec = self.spec.model.model_copy(update={"dtype": model.dtype})
        self.spec = self.spec.model_copy(update={"model": model_spec})
        for wave in self.store.waves():
            self._finish(wave, model)
        while wave := plan(self.spec, model, self.results):
            self.store.write_wave(len(self.store.waves()), wave)
            self._finish(wave, model)
        problem = self._publish(model)
        self.tell("report")
        try:
            report = write_report(self.store.dir)
        except UserError as error:  # the failed trial was the only one of its kind
            raise UserError(problem or str(error)) from error
        if problem:
            raise UserError(problem)
        write_atomic(self.store.path("best/README.md"), model_card(report).encode())
        return report

    def tell(self, kind: str, **fields: Any) -> None:
        """Into events.jsonl and to whoever watches."""
        self.store.event(kind, **fields)
        self.view.event({"kind": kind, **fields})

    def tell_storage(self, last: bool = False) -> None:
        """That Optuna's storage cannot be written, which stops nothing; at the end once more."""
        assert self.studies is not None
        problem = self.studies.problem
        if problem != self.storage_problem or (problem and last):
            self.tell("storage", problem=problem, untold=self.studies.untold)
        self.storage_problem = problem

    def _describe(self) -> ModelRecord:
        trials = kinds_of_trial(self.spec)
        model = self.cluster.call(describe_model, trials)
        profile = self.cluster.call(measure_profile, trials[-1])
        model = model.model_copy(update={"profile": profile})
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

    def _finish(self, wave: list[TrialSpec], model: ModelRecord) -> None:
        # The final comparison needs all of its trials, so one that failed is tried once more.
        failed = {n for n, r in self.results.items() if r.state == "failed"}
        missing = [
            trial
            for trial in wave
            if trial.number not in self.results
            or (trial.stage == "final" and trial.number in failed)
        ]
        if not missing:
            return
        kind = "final" if wave[0].stage == "final" else "climb" if wave[0].rung else "wave"
        planned = planned_passes(self.spec, model, self.results)
        candidates = [trial.prune.label for trial in wave]
        self.tell(kind, rung=wave[0].rung, candidates=candidates, planned=planned)
        for result in self.cluster.run(run_trial, missing):
            self._take(result, model)
        self.results = dict(sorted(self.results.items()))

    def _take(self, result: TrialResult, model: ModelRecord) -> None:
        if result.state == "complete" and result.weights_sha256 != model.sha256:
            raise UserError(
                f"{self.spec.model.source} on {result.host} holds other weights than this run "
                "began with: restore them or choose another run.dir"
            )
        self.store.write_result(result)
        self.results[result.spec.number] = result
        if self.studies is not None:
            self.studies.record(result)
            self.tell_storage()
        event = trial_event(result)
        self.tell(event.pop("kind"), **event)

    def _publish(self, model: ModelRecord) -> str:
        """Bring the best checkpoint into the run directory, once; why there is none in the end."""
        best = self.store.path("best")
        saved = next(r for r in self.results.values() if r.spec.checkpoint)
        if best.exists():
            return ""
        cause = ""
        for attempt in (1, 2):
            if saved.state == "failed":
                cause = f"trial {saved.spec.number} failed, {saved.cause}"
                break
            try:
                self.cluster.fetch(saved, best)
                return ""
            except OSError as error:
                cause = error.strerror or str(error)
                if attempt == 2 or not isinstance(error, LostCheckpointError):
                    break
            self.tell("checkpoint", problem=cause)
            (saved,) = self.cluster.run(run_trial, [saved.spec])
            if saved.state == "complete":
                self._take(saved, model)
        return f"no checkpoint in {best}: {cause}; results are kept, the same command tries again"


def pin(spec: Spec) -> Spec:
    """The spec with the exact revision of every source, so that all nodes read the same.

    Raises UserError where a source is missing, or a checkpoint is cut off or unsafe.
    """
    model, data = spec.model, spec.data
    if not data.source and not (data.calibration and data.selection and data.report):
        raise UserError(MISSING_SOURCE)
    if spec.prune.sparsity == 0:
        raise UserError("prune.sparsity=0 prunes nothing: give the share of zeros, such as 0.6")
    if data.cut == "whole" and spec.search.protocol != "paper":
        raise UserError("data.cut='whole' does not keep splits apart: use search.protocol='paper'")
    inspect_checkpoint(
        fetch(model.source, allow_pickle=model.allow_pickle),
        allow_pickle=model.allow_pickle,
        trust_remote_code=model.trust_remote_code,
    )
    model = model.model_copy(
        update={
            "source": pinned(model.source, allow_pickle=model.allow_pickle),
            "tokenizer": model.tokenizer and pinned(model.tokenizer, "tokenizer"),
        }
    )
    sources = {
        "source": "",
        "calibration": pinned(data.source_of("calibration"), "dataset"),
        "selection": pinned(data.source_of("selection"), "dataset"),
        "report": pinned(data.source_of("report"), "dataset"),
    }
    data = data.model_copy(update=sources)
    return spec.model_copy(update={"model": model, "data": data})
