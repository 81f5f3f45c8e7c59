"""How long a trial may take: as the spec says, else a multiple of the median of those like it.

deadlines = Deadlines(timeout_s=0)
deadlines.note(spec, 2.5)  # a trial that ended
deadlines.limit_s(spec)    # inf until NUM_KNOWN like it have
"""

import math
import statistics
from collections import defaultdict

from infra.records import TrialSpec

NUM_KNOWN = 3
MULTIPLE = 10.0  # a busy node or a model that is loaded anew is slower, but not that much
SHORTEST_S = 60.0  # a worker of a cluster may take this long to load


class Deadlines:
    """The limit of each trial, from how long others took that differ in their candidate only."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` holds for all trials; 0: the median decides."""
        self.timeout_s = timeout_s
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def note(self, spec: TrialSpec, seconds: float) -> None:
        """A trial like this took so long."""
        self._seconds[_kind(spec)].append(seconds)

    def limit_s(self, spec: TrialSpec) -> float:
        """Seconds that a trial may take; infinite while too few like it are known."""
        if self.timeout_s:
            return self.timeout_s
        known = self._seconds.get(_kind(spec), [])
        if len(known) < NUM_KNOWN:
            return math.inf
        return max(SHORTEST_S, MULTIPLE * statistics.median(known))


def _kind(spec: TrialSpec) -> str:
    """What decides how long a trial takes: all of its spec but the candidate and the seed."""
    return spec.model_copy(
        update={
            "number": 0,
            "profile": [],
            "prune": spec.prune.model_copy(update={"beta": 0.0, "parameters": {}}),
            "calibration": spec.calibration.model_copy(update={"seed": 0}),
        }
    ).model_dump_json()
