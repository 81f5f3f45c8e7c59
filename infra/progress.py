"""How far a trial is, told to whoever listens in its process; nobody, unless somebody asked.

listen(print)
tell(trial=7, step=37, steps=200, loss=3.21)  # at most once a second
"""

import math
import time
from collections.abc import Callable
from typing import Any

SHORTEST_S = 1.0

Facts = dict[str, Any]

_listeners: list[Callable[[Facts], None]] = []  # at most one
_last = {"told": -math.inf}


def listen(listener: Callable[[Facts], None]) -> None:
    """From here on, this process tells the listener, and nobody else."""
    _listeners[:] = [listener]
    _last["told"] = -math.inf


def tell(*, always: bool = False, **facts: Any) -> None:
    """Give facts that JSON can hold to the listener; dropped where it was told a moment ago."""
    now = time.monotonic()
    if always or now - _last["told"] >= SHORTEST_S:
        _last["told"] = now
        for listener in _listeners:
            listener(facts)
