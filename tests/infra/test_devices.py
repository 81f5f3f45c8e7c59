"""What a machine offers, within a container's limits.

python -m pytest tests/infra/test_devices.py
"""

import os
import stat
from pathlib import Path

import pytest

from infra import devices
from infra.devices import describe_devices, num_cores

SMI = """#!/bin/sh
echo "NVIDIA H100 80GB HBM3, 81559, 81000, 580.1"
echo "NVIDIA GB10, [N/A], [N/A], 580.1"
"""


def test_this_machine() -> None:
    found = describe_devices()
    assert found.cpu
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert 0 < found.available_bytes <= found.memory_bytes


def test_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("104857600\n")
    (tmp_path / "memory.current").write_text("4857600\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    found = describe_devices()
    assert (found.memory_bytes, found.available_bytes) == (100 * 2**20, 100_000_000)
    assert found.cores == 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert describe_devices().memory_bytes > 100 * 2**20
    assert num_cores() >= found.cores


def test_gpus_as_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hopper, shared = describe_devices().gpus
    assert (hopper.name, hopper.memory_bytes) == ("NVIDIA H100 80GB HBM3", 81559 * 2**20)
    assert (shared.memory_bytes, shared.driver) == (0, "580.1")
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert describe_devices().gpus == []
