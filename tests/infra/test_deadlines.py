"""How long a trial may take; what happens then is in test_cluster.py."""

import math

import pytest

from infra.cluster.deadlines import Deadlines, kind_of
from tests.infra.trials import trial


def test_the_median_of_those_that_differ_in_their_candidate_decides() -> None:
    deadlines = Deadlines()
    first = trial(0, "model")
    dearer = kind_of(first.model_copy(update={"windows": 512}))
    kind = kind_of(first)
    for number, seconds in enumerate((30.0, 20.0)):
        prune = first.prune.model_copy(update={"beta": 0.01 * number})
        other = first.model_copy(update={"number": number, "prune": prune})
        deadlines.note(kind_of(other), seconds)
        assert deadlines.limit_s(kind) == math.inf
    deadlines.note(kind, 1000.0)
    assert deadlines.limit_s(kind) == pytest.approx(300.0)
    assert deadlines.limit_s(dearer) == math.inf
    for _ in range(3):
        deadlines.note(dearer, 0.1)
    assert deadlines.limit_s(dearer) == 60.0
