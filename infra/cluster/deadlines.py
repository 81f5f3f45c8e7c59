"""How long a trial may take whose spec sets no limit: a multiple of the median of those like it.

deadlines = Deadlines()
deadlines.note(kind_of(spec), 2.5)  # a trial that ended
deadlines.limit_s(kind_of(spec))    # inf until NUM_KNOWN like it have
"""

import math
import statistics
from bisect import insort
from collections import defaultdict

from infra.records import TrialSpec

NUM_KNOWN = 3
MULTIPLE = 10.0  # a busy node or a model that is loaded anew is slower, but not that much
SHORTEST_S = 60.0  # a worker of a cluster may take this long to load


class Deadlines:
    """The limit of each trial, from how long others took that differ in their candidate only."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._limits: dict[str, float] = {}

    def note(self, kind: str, seconds: float) -> None:
        """A trial of this kind took so long."""
        known = self._seconds[kind]
        insort(known, seconds)
        if len(known) >= NUM_KNOWN:
            self._limits[kind] = max(SHORTEST_S, MULTIPLE * statistics.median(known))

    def limit_s(self, kind: str) -> float:
        """Seconds that a trial may take; infinite while too few like it are known."""
        return self._limits.get(kind, math.inf)


def kind_of(spec: TrialSpec) -> str:
    """What decides how long a trial takes: all of its spec but the candidate and the seed."""
    return spec.model_copy(
        update={
            "number": 0,
            "profile": [],
            "prune": spec.prune.model_copy(update={"beta": 0.0, "parameters": {}}),
            "calibration": spec.calibration.model_copy(update={"seed": 0}),
        }
    ).model_dump_json()
