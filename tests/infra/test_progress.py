"""What a worker tells of its progress reaches the driver, each driver its own, and fails nothing.

python -m pytest tests/infra/test_progress.py
"""

import pytest

from infra import progress
from infra.progress import Facts, listen, tell


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_listeners", [])


def test_nobody_is_told_and_a_listener_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    tell(step=0)
    told: list[Facts] = []
    listen(told.append)
    for clock[0] in (1.0, 1.5, 1.9, 2.0, 2.5):
        tell(step=clock[0])
    tell(always=True, step=3)
    assert [facts["step"] for facts in told] == [1.0, 2.0, 3]
