"""A checkpoint on its way into a run directory, in a thread, while the dispatch loop goes on.

    fetching = Fetching(cluster.fetch, result, store.path("best"), store.check_owner)
    yield fetching.ended          # in Run.trials()
    fetching.ended.result()       # raises what went wrong

Whatever is written is written inside `writing`, which asks who owns the run; once `stop` has
returned, nothing is written any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock, Thread

from infra.records import TrialResult

Writing = Callable[[], AbstractContextManager[None]]
Fetch = Callable[[TrialResult, Path, Writing], None]


class FetchStoppedError(Exception):
    """The run has ended: nobody is told."""


class Fetching:
    """One fetch, begun at once."""

    def __init__(
        self, fetch: Fetch, result: TrialResult, destination: Path, check_owner: Callable[[], None]
    ) -> None:
        self.ended: Future[None] = Future()
        self._check_owner = check_owner
        self._gate, self._stopped = Lock(), False
        arguments = (fetch, result, destination)
        # A daemon: a node that does not answer must not keep a driver that was told to end.
        Thread(target=self._run, args=arguments, name="fetch", daemon=True).start()

    def stop(self) -> None:
        """End it before its next write."""
        with self._gate:
            self._stopped = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around each write; raises where the run has ended or belongs to another driver."""
        with self._gate:
            if self._stopped:
                raise FetchStoppedError
            self._check_owner()
            yield

    def _run(self, fetch: Fetch, result: TrialResult, destination: Path) -> None:
        try:
            fetch(result, destination, self.writing)
        except BaseException as error:  # noqa: BLE001  raised again by whoever asks for the result
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)
