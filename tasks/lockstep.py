"""Lockstep execution: many forwards of one model that wait for each other at every block.

    with Lockstep(blocks) as lockstep:
        runs = [lockstep.start(lambda b=b: model(**b)) for b in batches]
        while (i := lockstep.lowest(runs)) is not None:
            for run in lockstep.standing(runs, i):
                run.resume(Pass())

The model's own forward drives: each runs as a coroutine (greenlet), and each block's forward is
replaced, for the duration, by one that hands control to the scheduler and is told how to go on.
torch keeps grad mode, autocast, default device and function modes per thread; whatever a model
has entered when it pauses is set aside at every switch, so that it never reaches another run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import greenlet
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
)
from torch.utils._python_dispatch import (
    _pop_mode as _pop_dispatch_mode,
)
from torch.utils._python_dispatch import (
    _push_mode as _push_dispatch_mode,
)
from torch.utils._pytree import tree_leaves, tree_map

from infra.errors import UserError
from modalities.blocks import hidden_state

_DEVICES = ("cpu", "cuda")
if not torch.cuda.is_available():
    # transformers asks this inside vision-language models. Without a driver torch 2.14 raises, and
    # that ended the process with a segmentation fault where the stack was a coroutine's.
    setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # noqa: B010 # for mypy


@contextmanager
def torch_state_set_aside() -> Iterator[None]:
    """Leave every thread-local context of torch, and enter them again at the end."""
    function_modes = [_pop_mode() for _ in _get_current_function_mode_stack()]
    dispatch_modes = [_pop_dispatch_mode() for _ in _get_current_dispatch_mode_stack()]
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    cache = torch.is_autocast_cache_enabled()
    dtype = torch.get_default_dtype()
    try:
        # The guard saves grad mode, inference mode and dispatch keys, and restores all of them.
        with torch.inference_mode(False), torch.no_grad():
            for device in _DEVICES:
                torch.set_autocast_enabled(device, False)
            yield
    finally:
        for device, enabled, precision in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, precision)
        torch.set_autocast_cache_enabled(cache)
        torch.set_default_dtype(dtype)
        for mode in reversed(dispatch_modes):
            _push_dispatch_mode(mode)
        for mode in reversed(function_modes):
            _push_mode(mode)


@dataclass(frozen=True)
class Pass:
    """How a run goes through the block it stands at.

    `watch` is entered around the block; `again` drops the output and comes back to the same
    place; `apart` hands the block copies of its arguments, so that it may write to them and its
    output shares no memory with what the run goes on with; `seen` is handed the block's output.
    """

    watch: AbstractContextManager[Any] = field(default_factory=nullcontext)
    again: bool = False
    apart: bool = False
    seen: Callable[[Any], None] | None = None


class Run:
    """One forward, as a coroutine. `place` is what it waits at; `result` is there when it ended."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.place: Any = None
        self.result: Any = None
        self._greenlet = greenlet.greenlet(function)
        self.resume(None)

    def resume(self, instruction: Any) -> None:
        """Go on until the next pause or the end. What the forward raises is raised here."""
        self.place = None
        with torch_state_set_aside():  # of the scheduler: a run begins, and pauses, without any
            value = (
                self._greenlet.switch(instruction) if self._greenlet else self._greenlet.switch()
            )
        if self._greenlet.dead:
            self.result = value
        else:
            self.place = value

    def close(self) -> None:
        """End the forward where it stands and free what it holds."""
        self.place = None
        with torch_state_set_aside():
            self._greenlet.throw(greenlet.GreenletExit)


def pause(place: Any) -> Any:
    """Called inside a run: wait at `place`; returns the scheduler's instruction."""
    parent = greenlet.getcurrent().parent
    if parent is None:
        raise RuntimeError("pause() outside a lockstep run")
    with torch_state_set_aside():
        return parent.switch(place)


@dataclass(frozen=True, order=True)
class AtBlock:
    """A run stands before block `index`."""

    index: int


class Lockstep(AbstractContextManager["Lockstep"]):
    """Replaces the forward of each block while it is entered.

    Raises UserError, naming the block, where a block is visited again by the same forward,
    changes its arguments or is given a cache: a second pass would then see other inputs.

    The hidden states of runs that wait before a block stay where they are up to `limit_bytes` in
    all; the rest wait in host memory. What a run holds at a pause inside a block stays where it is.
    """

    def __init__(
        self, blocks: Sequence[tuple[str, nn.Module]], *, limit_bytes: float = math.inf
    ) -> None:
        self.blocks, self.limit_bytes = blocks, limit_bytes
        self.held_bytes = 0
        self._before: list[Any] = []
        self._runs: list[Run] = []

    def __enter__(self) -> Lockstep:
        for index, (_, block) in enumerate(self.blocks):
            # accelerate keeps its dispatch hook in __dict__: put back exactly what was there.
            self._before.append(block.__dict__.get("forward"))
            block.forward = self._waiting(index, block.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for run in self._runs:
            if run.place is not None:
                run.close()
        for (_, block), before in zip(self.blocks, self._before, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before

    def start(self, function: Callable[[], Any]) -> Run:
        """Run a forward up to its first block."""
        run = Run(function)
        self._runs.append(run)
        return run

    def lowest(self, runs: Iterable[Run]) -> int | None:
        """The lowest block at which a run stands; None when all have ended."""
        places = [run.place.index for run in runs if isinstance(run.place, AtBlock)]
        return min(places, default=None)

    def standing(self, runs: Iterable[Run], index: int) -> list[Run]:
        """The runs that stand before a block."""
        return [run for run in runs if run.place == AtBlock(index)]

    def _waiting(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        name, block = self.blocks[index]
        visitors: WeakSet[greenlet.greenlet] = WeakSet()

        def forward(*args: Any, **kwargs: Any) -> Any:
            visitor = greenlet.getcurrent()
            if visitor in visitors:
                raise UserError(
                    f"{name} is visited twice in one forward: shared blocks cannot be "
                    "pruned in lockstep"
                )
            visitors.add(visitor)
            _refuse_cache(name, args, kwargs)
            while True:
                how: Pass = self._wait(index, hidden_state((args, kwargs)))
                before = _versions(block, args, kwargs)
                given = _copied((args, kwargs)) if how.apart else (args, kwargs)
                with how.watch:
                    output = original(*given[0], **given[1])
                del given
                if how.again and _versions(block, args, kwargs) != before:
                    raise UserError(
                        f"{name} changes its arguments in place, so it cannot be run "
                        "twice: use prune.pause=linear"
                    )
                if how.seen is not None:
                    how.seen(output)
                if not how.again:
                    return output
                del output, how  # its watcher holds inputs, and the run may wait for long

        return forward

    def _wait(self, index: int, state: torch.Tensor | None) -> Any:
        if state is None:
            return pause(AtBlock(index))
        if self.held_bytes + state.nbytes <= self.limit_bytes:
            self.held_bytes += state.nbytes
            try:
                return pause(AtBlock(index))
            finally:
                self.held_bytes -= state.nbytes
        # The model's own frames hold this tensor too, so its contents move, not the argument.
        device = state.device
        state.data = state.data.to("cpu", copy=True)
        how = pause(AtBlock(index))
        state.data = state.data.to(device)
        return how


def _versions(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Changes when a tensor among the arguments or buffers is written to, or a list grows."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    written = [x._version for x in [*tensors, *block.buffers()] if not x.is_inference()]
    return [*written, *(len(x) for x in (*args, *kwargs.values()) if isinstance(x, list))]


def _copied(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def _refuse_cache(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
    for key, value in given.items():
        named = ("past" in key or key == "cache_params") and not isinstance(value, bool | None)
        if named or any(kind.__name__ == "Cache" for kind in type(value).__mro__):
            raise UserError(f"{name} is given a cache ({key}): run the model with use_cache=False")
