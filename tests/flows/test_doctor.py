"""`doctor` tells, whatever is missing; it fails only where a named cluster cannot be used.

python -m pytest tests/flows/test_doctor.py
"""

import json
import socket
import sys
from pathlib import Path

import pytest

from flows.doctor import doctor, show
from infra import environment
from infra.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_json_is_the_dictionary(capsys: pytest.CaptureFixture[str]) -> None:
    environment.prepare()
    show(as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found.keys() == doctor().keys()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert {"torch", "ray", "optuna", "mlflow"} <= found["versions"].keys()
    assert found["packages"] == "this checkout's"
    assert set(found["telemetry"].values()) == {"off"}
    assert found["cluster"] is None


def test_a_bare_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No GPU, no compiler, no git, no cache folder yet, and telemetry left on by the shell."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    monkeypatch.setenv("COLUMNS", "200")
    found = doctor()
    assert (found["compiler"], found["devices"]["gpus"]) == ("", [])
    assert found["disks"]["cache"]["free_bytes"] > 0
    show()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "GPU none" in lines
    assert "telemetry ON: DO_NOT_TRACK" in lines
    assert "cluster this machine (no cluster.address and no RAY_ADDRESS)" in lines


def test_a_cluster_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        cluster = doctor()["cluster"]
        with pytest.raises(UserError, match="no Ray cluster answers"):  # after the table
            show()
    assert cluster["address"] == address
    assert "no Ray cluster answers" in cluster["error"]
    assert f"{address}: cannot be used" in capsys.readouterr().out
