"""What a trial tells of its progress: at most once a second, and no trouble where nobody hears.

That it reaches the driver from another node is in test_cluster.py.

python -m pytest tests/infra/test_progress.py
"""

import pytest
from ray.exceptions import RpcError

from infra import progress
from infra.cluster import told
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


def test_a_store_that_does_not_answer_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def breaks(*_: object, **options: object) -> None:
        asked.append(options["namespace"])
        raise RpcError("the head is gone")

    monkeypatch.setattr(told, "_prefix", lambda: "01/")
    for name in ("_internal_kv_put", "_internal_kv_list", "_internal_kv_del"):
        monkeypatch.setattr(told, name, breaks)
    told.keep({"trial": 7, "step": 1})
    assert told.told() == []
    told.forget()
    assert asked == [told.NAMESPACE] * 3
