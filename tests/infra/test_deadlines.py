"""How long a trial may take; what happens then is in test_cluster.py."""

import math

import pytest

from infra.cluster.deadlines import Deadlines
from tests.infra.trials import trial


def test_the_median_of_those_that_differ_in_their_candidate_decides() -> None:
    deadlines = Deadlines(timeout_s=0)
    first = trial(0, "model")
    dearer = first.model_copy(update={"windows": 512})
    for number, seconds in enumerate((30.0, 20.0)):
        prune = first.prune.model_copy(update={"beta": 0.01 * number})
        deadlines.note(first.model_copy(update={"number": number, "prune": prune}), seconds)
        assert deadlines.limit_s(first) == math.inf
    deadlines.note(first, 1000.0)
    assert deadlines.limit_s(first) == pytest.approx(300.0)
    assert deadlines.limit_s(dearer) == math.inf
    for _ in range(3):
        deadlines.note(dearer, 0.1)
    assert deadlines.limit_s(dearer) == 60.0


def test_what_the_spec_says_holds_from_the_first_trial() -> None:
    assert Deadlines(timeout_s=5).limit_s(trial(0, "model")) == 5
