"""Forwards that wait for each other give what they give alone, and leave nothing behind.

python -m pytest tests/tasks/test_lockstep.py
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from tasks.lockstep import AtBlock, Lockstep, Pass, Run, pause
from tests.tasks.forwards import WIDTH, Model, drive, state


@pytest.mark.parametrize("again", [False, True])
def test_results_equal_a_plain_forward(again: bool) -> None:
    model = Model()
    inputs = [torch.randn(rows, 5, WIDTH) for rows in (1, 3, 2)]
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        runs = [lockstep.start(lambda x=x: model(x)) for x in inputs]
        results = drive(lockstep, runs, again)
    with torch.no_grad():
        assert all(torch.equal(y, model(x)) for x, y in zip(inputs, results, strict=True))


def test_states_above_the_limit_wait_in_host_memory() -> None:
    model = Model()
    inputs = [torch.randn(2, 5, WIDTH) for _ in range(3)]
    before = [x.data_ptr() for x in inputs]
    with torch.no_grad(), Lockstep(model.named(), limit_bytes=2 * inputs[0].nbytes) as lockstep:
        runs = [lockstep.start(lambda x=x: model(x)) for x in inputs]
        assert [x.data_ptr() == old for x, old in zip(inputs, before, strict=True)] == [1, 1, 0]
        results = drive(lockstep, runs, again=True)
    with torch.no_grad():
        assert all(torch.equal(y, model(x)) for x, y in zip(inputs, results, strict=True))


def test_a_used_pass_is_forgotten_while_the_run_waits() -> None:
    """It holds the last inputs that it watched, of every batch."""

    class Watch(nullcontext[None]):
        pass

    model = Model()
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        run = lockstep.start(lambda: model(torch.randn(2, WIDTH)))
        watch = Watch()
        alive = weakref.ref(watch)
        run.resume(Pass(watch, again=True))
        del watch
        assert alive() is None


class Skipping(Model):
    """Passes some blocks by, as text passes by a vision tower."""

    def forward(self, x: Tensor, skip: tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
        for index, block in enumerate(self.blocks):
            if index not in skip:
                x = block(x)
        return x


def test_the_lowest_block_is_next_where_runs_skip_blocks() -> None:
    model = Skipping(4)
    x = torch.randn(2, WIDTH)
    skips = [(0, 1), (), (1,), (0, 3)]
    order = []
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        runs = [lockstep.start(lambda s=s: model(x, skip=s)) for s in skips]
        while (index := lockstep.lowest(runs)) is not None:
            standing = lockstep.standing(runs, index)
            order.append((index, [runs.index(run) for run in standing]))
            for run in standing:
                run.resume(Pass())
    assert order == [(0, [1, 2]), (1, [1, 3]), (2, [0, 1, 2, 3]), (3, [0, 1, 2])]
    with torch.no_grad():
        for run, skip in zip(runs, skips, strict=True):
            assert torch.equal(run.result, model(x, skip=skip))


def test_forward_is_restored_to_what_dict_held() -> None:
    """accelerate keeps its dispatch hook in __dict__['forward']: it must run, and stay."""
    model = Model()
    calls: list[str] = []
    original = model.blocks[1].forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append("hook")
        return original(*args, **kwargs)

    model.blocks[1].forward = hooked
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        assert model.blocks[1].__dict__["forward"] is not hooked
        drive(lockstep, [lockstep.start(lambda: model(torch.ones(1, WIDTH)))], again=True)
    assert calls == ["hook", "hook"]
    assert model.blocks[1].__dict__["forward"] is hooked
    assert "forward" not in model.blocks[0].__dict__
    assert "forward" not in model.blocks[2].__dict__


def test_an_accelerate_hook_stays_in_place() -> None:
    accelerate = pytest.importorskip("accelerate.hooks")
    model = Model()
    accelerate.add_hook_to_module(model.blocks[1], accelerate.ModelHook())
    dispatched = model.blocks[1].__dict__["forward"]
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        (result,) = drive(lockstep, [lockstep.start(lambda: model(torch.ones(1, WIDTH)))])
    assert model.blocks[1].__dict__["forward"] is dispatched
    accelerate.remove_hook_from_module(model.blocks[1])
    with torch.no_grad():
        assert torch.equal(result, model(torch.ones(1, WIDTH)))


def test_hooks_of_a_block_run_once_a_visit() -> None:
    model = Model()
    calls: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        drive(lockstep, [lockstep.start(lambda: model(torch.ones(1, WIDTH)))], again=True)
    assert calls == [1]


class Shared(Model):
    """Visits its second block twice, as ALBERT does."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for index in (0, 1, 1, 2):
            x = self.blocks[index](x)
        return x


def test_a_block_visited_twice_is_refused_by_name() -> None:
    model = Shared()
    refused = pytest.raises(UserError, match=r"^blocks\.1 is visited twice")
    with torch.no_grad(), refused, Lockstep(model.named()) as lockstep:
        drive(lockstep, [lockstep.start(lambda: model(torch.ones(1, WIDTH)))])
    assert all("forward" not in block.__dict__ for block in model.blocks)


class Writing(nn.Module):
    """A block with a side effect on what it is given, or on itself."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("state", torch.zeros(1))

    def forward(self, x: Tensor, extra: dict[str, Any], collected: list[Tensor]) -> Tensor:
        if self.what == "hidden state":
            x += 1
        elif self.what == "keyword":
            extra["mask"].mul_(2)
        elif self.what == "view":
            x[:, 0].zero_()
        elif self.what == "list":
            collected.append(x)
        elif self.what == "buffer":
            self.state += 1
        return x + self.linear(x)


@pytest.mark.parametrize("what", ["hidden state", "keyword", "view", "list", "buffer"])
def test_a_block_that_changes_its_arguments_cannot_run_twice(what: str) -> None:
    block = Writing(what)

    def forward() -> Any:
        return block(torch.ones(1, WIDTH), extra={"mask": torch.ones(1)}, collected=[])

    refused = pytest.raises(UserError, match=r"^blocks\.7 changes .* use prune\.pause=linear")
    with torch.no_grad():
        with refused, Lockstep([("blocks.7", block)]) as lockstep:
            drive(lockstep, [lockstep.start(forward)], again=True)
        plain = forward()
        with Lockstep([("blocks.7", block)]) as lockstep:
            (once,) = drive(lockstep, [lockstep.start(forward)])
    assert torch.equal(once, plain)


def test_a_block_that_changes_nothing_may_run_twice() -> None:
    block = Writing("")
    x, mask = torch.ones(1, WIDTH), torch.ones(1)
    with torch.no_grad(), Lockstep([("block", block)]) as lockstep:
        run = lockstep.start(lambda: block(x, extra={"mask": mask}, collected=[x]))
        x.add_(1)  # by someone else, while the run waits
        drive(lockstep, [run], again=True)
    assert run.result is not None


class WithCache(nn.Module):
    """A block that is handed something named like a cache."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def _cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((), {"past_key_values": _cache}),
        ((), {"layer_past": lambda: (torch.ones(1), torch.ones(1))}),
        ((), {"cache_params": object}),
        ((), {"state": _cache}),
        ((_cache,), {}),
    ],
)
def test_a_cache_is_refused(args: Any, kwargs: Any) -> None:
    block = WithCache()
    given = [make() for make in args]
    named = {key: make() for key, make in kwargs.items()}
    refused = pytest.raises(UserError, match=r"^layers\.3 is given a cache .*use_cache=False")
    with refused, Lockstep([("layers.3", block)]) as lockstep:
        lockstep.start(lambda: block(torch.ones(1, 2), *given, **named))
    assert "forward" not in block.__dict__


def test_no_cache_is_accepted() -> None:
    block = WithCache()
    harmless = {
        "past_key_values": None,
        "layer_past": None,
        "use_cache": False,
        "cache_position": torch.arange(2),
    }
    with Lockstep([("layers.3", block)]) as lockstep:
        drive(lockstep, [lockstep.start(lambda: block(torch.ones(1, 2), None, **harmless))])


class Failing(Model):
    """Raises between its blocks where its input says so."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
                x = block(x)
                if x.isnan().any():
                    raise ArithmeticError("no number")
        return x


@pytest.mark.parametrize("poisoned", [0, 1])
def test_an_exception_in_a_model_surfaces_and_everything_is_restored(poisoned: int) -> None:
    model = Failing()
    inputs = [torch.ones(1, WIDTH), torch.ones(1, WIDTH)]
    inputs[poisoned][0, 0] = float("nan")
    before = state()
    runs: list[Run] = []
    with pytest.raises(ArithmeticError, match="no number"), Lockstep(model.named()) as lockstep:
        runs = [lockstep.start(lambda x=x: model(x)) for x in inputs]
        drive(lockstep, runs)
    assert state() == before
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert [run.place for run in runs] == [None, None]


def test_an_exception_before_the_first_block_surfaces() -> None:
    model = Model()

    def forward() -> Any:
        raise ArithmeticError("early")

    with pytest.raises(ArithmeticError, match="early"), Lockstep(model.named()) as lockstep:
        lockstep.start(lambda: model(torch.ones(1, WIDTH)))
        lockstep.start(forward)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_closed_runs_leave_nothing_behind() -> None:
    """Neither the states a run held, nor a half-run `finally`."""
    model = Model()
    ended: list[str] = []
    held: list[weakref.ref[Tensor]] = []

    def forward() -> Any:
        x = torch.ones(4, WIDTH)
        held.append(weakref.ref(x))
        try:
            return model(x)
        finally:
            ended.append("finally")

    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        run = lockstep.start(forward)
        run.resume(Pass())
        assert run.place == AtBlock(1)
        run.close()
        assert ended == ["finally"]
        gc.collect()
        assert held[0]() is None
        assert lockstep.lowest([run]) is None
    assert run.result is None


def test_a_run_may_be_closed_inside_a_block() -> None:
    model = Model()
    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        run = lockstep.start(lambda: model(torch.ones(1, WIDTH)))
        run.resume(Pass(seen=pause))
        assert isinstance(run.place, Tensor)
        run.close()
    assert run.place is None


def test_a_pause_outside_a_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside a lockstep run"):
        pause(1)


def test_a_pass_shows_the_output_and_runs_its_watch() -> None:
    model = Model(2)
    outputs: list[Tensor] = []
    entries: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        entries.append("in")
        yield
        entries.append("out")

    with torch.no_grad(), Lockstep(model.named()) as lockstep:
        run = lockstep.start(lambda: model(torch.ones(1, WIDTH)))
        run.resume(Pass(watch=noted(), again=True))
        run.resume(Pass(seen=outputs.append))
        run.resume(Pass(watch=noted()))
    assert entries == ["in", "out", "in", "out"]
    with torch.no_grad():
        assert torch.equal(outputs[0], model.blocks[0](torch.ones(1, WIDTH)))
