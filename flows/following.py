"""How far the fine-tunes of a driver are, asked in a thread while it waits for them.

with following(cluster.told, lambda facts: print(steps_in_words(facts))):
    results = list(cluster.run(run_trial, trials))
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from flows.live import steps_in_words
from infra.errors import UserError
from infra.progress import Facts
from infra.store import RunStore, write_atomic

FILE = "progress.json"  # of a run of `sparseramp recover`, for `sparseramp status`
LOOK_S = 1.0


@contextmanager
def following(ask: Callable[[], list[Facts]], show: Callable[[Facts], None]) -> Iterator[None]:
    """Inside, `show` is given what is new, in a thread; `tenth` says that it is worth a line: the
    first that is known of a trial, and the first in each tenth of its steps."""
    done = threading.Event()

    def look() -> None:
        last: dict[int, Facts] = {}
        tenths: dict[int, int] = {}
        ended = False
        while not ended:
            ended = done.wait(LOOK_S)  # once more after the end: it may have come within a second
            for facts in ask():
                number = facts["trial"]
                if last.get(number) == facts:
                    continue
                tenth = 10 * facts["step"] // facts["steps"]
                show(facts | {"tenth": tenths.get(number) != tenth})
                last[number], tenths[number] = facts, tenth

    thread = threading.Thread(target=look, name="following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def shown(store: RunStore, ask: Callable[[], list[Facts]]) -> Iterator[None]:
    """Inside, the one fine-tune of a run is shown on stderr: a line that changes on a terminal,
    else a line for every tenth of its steps. The last of it is in the run, for `status`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    known: Facts = {}

    def show(facts: Facts) -> None:
        first = not known
        known.update(facts)
        if first and facts["begun"]:
            console.print(f"goes on at step {facts['begun']}")
        if facts["tenth"] and not console.is_terminal:
            console.print(steps_in_words(facts))
        with suppress(UserError):  # what decides whether the run can go on is its result
            write_atomic(store.path(FILE), json.dumps({"time": _now()} | facts).encode())

    def line() -> Text:
        return Text(steps_in_words(known) if known else "measures the checkpoint as it is")

    store.path(FILE).unlink(missing_ok=True)
    board: Any = nullcontext()
    if console.is_terminal:
        board = Live(
            console=console, get_renderable=line, refresh_per_second=2, redirect_stdout=False
        )
    else:
        console.print(line())
    with board, following(ask, show):
        yield
    store.path(FILE).unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
