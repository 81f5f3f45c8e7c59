"""The command line with a fault in it: the process signals itself at a given point.

    FAULT=kill:17 python -m tests.faults.child search tiny.toml run.dir=run

A point is a moment at which the run directory changes: just before and just after every event, and
every rename by which a file or the checkpoint appears there. FAULT_POINTS names a file to list
them in; FAULT=kill:new kills at the first that is not in it, and lists that one only.
FAULT_CLUSTER=processes runs trials in plain processes in place of Ray's workers.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP, "term": signal.SIGTERM}


def main(arguments: list[str]) -> None:
    """Run a command of `sparseramp`, with the faults that the environment asks for."""
    from flows import cli, search, study
    from infra.store import RunStore
    from tests.faults.processes import connect

    if os.environ.get("FAULT_CLUSTER") == "processes":
        forked = partial(connect, method="fork")  # the driver computes nothing
        search.connect = forked  # type: ignore[attr-defined, assignment]
        study.study = partial(study.study, connect=forked)  # type: ignore[arg-type, assignment]
    fault, _, number = os.environ.get("FAULT", "").partition(":")
    reach = _Points(SIGNALS.get(fault), -1 if number == "new" else int(number or 0))
    RunStore.event = reach.around(  # type: ignore[method-assign]
        RunStore.event,
        lambda store, kind, **fields: (
            f"event {kind} {fields.get('number', '')} {store.dir}/events.jsonl"
        ),
    )
    for name in ("replace", "rename"):
        wrapped = reach.around(getattr(Path, name), lambda path, target: f"file {target}")
        setattr(Path, name, wrapped)
    cli.main(arguments)


class _Points:
    """Counts the points of a process, and does what is asked at one of them."""

    def __init__(self, number: signal.Signals | None, at: int) -> None:
        self.number, self.at, self.count = number, at, 0
        self.owner = os.getpid()  # workers that are forked from it have no points
        self.list = os.environ.get("FAULT_POINTS", "")

    def around(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            label = name(*args, **kwargs)
            self.reach(f"before {label}")
            answer = function(*args, **kwargs)
            self.reach(f"after {label}")
            return answer

        return wrapped

    def reach(self, label: str) -> None:
        if os.getpid() != self.owner:
            return
        self.count += 1
        if self.at < 0:
            with open(self.list) as file:  # noqa: PTH123  Path's methods are what is watched
                if f"{label}\n" in file:
                    return
            self.at = self.count
        if self.list:
            with open(self.list, "a") as file:  # noqa: PTH123
                file.write(f"{label}\n")
        if self.count == self.at and self.number:
            os.kill(self.owner, self.number)


if __name__ == "__main__":
    main(sys.argv[1:])
