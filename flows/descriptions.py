"""What runs ask of a model before their first trial, of many runs each thing once.

    model = yield from descriptions.of(spec)   # in Run.trials(); Run.take() hands on the answers

A question goes to a worker as a trial does, since it may take an hour to download a model; until it
is answered the dispatch loop goes on with other runs.
"""

from __future__ import annotations

import json
from collections.abc import Generator

from flows.plan import kinds_of_trial, refuse_objective, search_trial
from infra.errors import UserError
from infra.records import ModelAnswer, ModelQuestion, ModelRecord, TrialResult
from infra.specs import Spec
from tasks.allocation import ALLOCATIONS, allocation_named

Asking = Generator[ModelQuestion, None, ModelRecord]


class Descriptions:
    """What is known of models with their texts, and of what allocations measure of them."""

    def __init__(self) -> None:
        self._models: dict[str, ModelRecord] = {}
        self._measured: dict[str, list[float]] = {}

    def note(self, spec: Spec, model: ModelRecord) -> None:
        """What an earlier start of a run has found out."""
        self._models.setdefault(description_of(spec), model)
        self._measured.setdefault(_measurement(spec), model.profile)

    def of(self, spec: Spec) -> Asking:
        """The model as one run found it, with this one's own measurement; yields what to ask, again
        and again until it is answered, whoever has asked.

        Raises UserError where the model has not what is searched.
        """
        trials, described = kinds_of_trial(spec), description_of(spec)
        question = ModelQuestion(**dict(trials[0]), key=described, sizes=trials)
        while described not in self._models:
            yield question
        model = self._models[described]
        refuse_objective(spec, model)
        key = _measurement(spec)
        if allocation_named(spec.prune.allocation).measure is None:
            return model.model_copy(update={"profile": []})
        question = ModelQuestion(**dict(search_trial(spec, spec.prune, -1)), key=key, sizes=[])
        while key not in self._measured:
            yield question
        return model.model_copy(update={"profile": self._measured[key]})

    def take(self, question: ModelQuestion, result: TrialResult) -> None:
        """The answer; raises UserError where there is none, and whoever asks next asks anew."""
        if not isinstance(result, ModelAnswer):
            what = "describe_model" if question.sizes else "measure_profile"
            raise UserError(f"{what} failed: {result.cause}")
        if result.state == "failed":
            raise UserError(result.cause)
        if result.model is not None:
            self._models[question.key] = result.model
        else:
            self._measured[question.key] = result.measured


def description_of(spec: Spec) -> str:
    """What decides the description of a model: all that its trials read, whatever they prune."""
    search = {"objective", "protocol"}
    fields = {"model": True, "data": True, "calibration": True, "evaluation": True}
    fields |= {"recovery": True}
    return spec.model_dump_json(include={**fields, "search": search})


def _measurement(spec: Spec) -> str:
    """What decides the measurement of an allocation: the method only where it prunes for it."""
    allocation = ALLOCATIONS.get(spec.prune.allocation)
    method = spec.prune.method if allocation is None or allocation.prunes else ""
    prune = spec.prune.model_copy(update={"method": method})
    read = spec.model_dump(include={"model", "data", "calibration"})
    return json.dumps([read, prune.model_dump()])
