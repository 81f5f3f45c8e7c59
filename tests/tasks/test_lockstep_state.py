"""Contexts that torch keeps per thread do not pass from one waiting forward to another.

python -m pytest tests/tasks/test_lockstep_state.py
"""

import pytest
import torch

from tasks.lockstep import Lockstep, Pass
from tests.tasks.forwards import CONTEXTS, WIDTH, Model, drive, state


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("where", ["outer", "inner"])
def test_contexts_of_a_model_do_not_reach_other_runs(name: str, where: str) -> None:
    model = Model()
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        plain = [model(x), model(x, **{where: name}), model(x)]
        states = [block.states for block in model.blocks]
        expected = [list(seen) for seen in states]
        for seen in states:
            seen.clear()
        before = state()
        with Lockstep(model.named()) as lockstep:
            runs = []
            for keywords in ({}, {where: name}, {}):
                runs.append(lockstep.start(lambda k=keywords: model(x, **k)))
                assert state() == before
            while (index := lockstep.lowest(runs)) is not None:
                for run in lockstep.standing(runs, index):
                    run.resume(Pass())
                    assert state() == before
            results = [run.result for run in runs]
        assert state() == before
    assert states == expected
    for result, true in zip(results, plain, strict=True):
        assert result.dtype == true.dtype
        assert torch.equal(result, true)


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_of_the_scheduler_survive_and_reach_no_run(name: str) -> None:
    model = Model()
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        plain = model(x, outer="autocast")
    with CONTEXTS[name]():
        before = state()
        with Lockstep(model.named()) as lockstep:
            runs = [lockstep.start(lambda: model(x, outer="autocast")) for _ in range(2)]
            assert state() == before
            drive(lockstep, runs)
            assert state() == before
        assert state() == before
    assert all(torch.equal(run.result, plain) for run in runs)


@pytest.mark.parametrize("name", CONTEXTS)
def test_closed_runs_restore_the_state(name: str) -> None:
    model = Model()
    before = state()
    with Lockstep(model.named()) as lockstep:
        runs = [
            lockstep.start(lambda k=k: model(torch.ones(1, WIDTH), **k))
            for k in ({}, {"outer": name}, {"inner": name})
        ]
        for run in runs:
            run.resume(Pass())
        runs[1].close()
        assert state() == before
    assert state() == before
    assert [run.place for run in runs] == [None] * 3
