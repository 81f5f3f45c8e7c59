"""A small model whose forward enters torch's contexts, and how tests drive it in lockstep.

with Lockstep(model.named()) as lockstep:
    drive(lockstep, [lockstep.start(lambda: model(x, inner="autocast"))])
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from tasks.lockstep import Lockstep, Pass, Run

WIDTH = 8


class Doubling(TorchFunctionMode):
    """Doubles the result of every linear: a mode that is felt."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


class Tripling(TorchDispatchMode):
    """Triples the result of every addmm, below autograd."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 3 if func is torch.ops.aten.addmm.default else result


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What `from_pretrained` does around a constructor, and some models around a product."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "function mode": Doubling,
    "dispatch mode": Tripling,
    "two function modes": lambda: entered(Doubling(), Doubling()),
    "many at once": lambda: entered(
        torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), Doubling()
    ),
}


@contextmanager
def entered(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def state() -> tuple[Any, ...]:
    """All that torch keeps per thread and a context may change."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        len(_get_current_function_mode_stack()),
        len(_get_current_dispatch_mode_stack()),
    )


class Block(nn.Module):
    """A residual product that notes the state it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.states: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.states.append(state())
        return x + self.linear(x)


class Model(nn.Module):
    """Blocks inside whatever contexts a call asks for, all of them or from the second on."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.requires_grad_(False)

    def forward(self, x: Tensor, outer: str = "", inner: str = "") -> Tensor:
        with CONTEXTS[outer]() if outer else ExitStack():
            for block in self.blocks:
                with CONTEXTS[inner]() if inner else ExitStack():
                    x = block(x)
        return x * torch.ones(1, device=x.device)

    def named(self) -> list[tuple[str, nn.Module]]:
        return [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]


def drive(lockstep: Lockstep, runs: list[Run], again: bool = False) -> list[Any]:
    """Take all runs to their ends, through every block twice where `again` says so."""
    while (index := lockstep.lowest(runs)) is not None:
        for repeat in (True, False) if again else (False,):
            for run in lockstep.standing(runs, index):
                run.resume(Pass(again=repeat))
    return [run.result for run in runs]
