"""What this machine offers: processor, cores, memory and GPUs, within a container's limits.

    print(describe_devices().gpus)

torch is not imported: GPUs are read from nvidia-smi.
"""

import math
import os
import platform
import subprocess
from pathlib import Path

import psutil

from infra.frozen import Frozen

CGROUP = Path("/sys/fs/cgroup")


class Gpu(Frozen):
    """One GPU as its driver sees it."""

    name: str
    memory_bytes: int
    free_bytes: int
    driver: str


class Devices(Frozen):
    """What a process on this machine may use."""

    cpu: str
    cores: int
    memory_bytes: int
    available_bytes: int
    gpus: list[Gpu]


def describe_devices() -> Devices:
    """Measure now; a machine without GPUs or without nvidia-smi has an empty list of them."""
    memory = psutil.virtual_memory()
    limit = _cgroup("memory.max")
    total = min(memory.total, limit) if limit is not None else memory.total
    used_of_limit = _cgroup("memory.current") if limit is not None else None
    free_of_limit = total - used_of_limit if used_of_limit is not None else total
    return Devices(
        cpu=_cpu_name(),
        cores=num_cores(),
        memory_bytes=total,
        available_bytes=max(0, min(memory.available, free_of_limit)),
        gpus=_gpus(),
    )


def num_cores() -> int:
    """Physical cores that this process may use; hyperthreads do not speed up matrix products."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed, _cpu_quota(physical)))


def _cpu_quota(default: int) -> int:
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no control groups, or those of version 1
        return default
    return default if quota == "max" else math.ceil(int(quota) / int(period))


def _cgroup(name: str) -> int | None:
    try:
        return int((CGROUP / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[Gpu]:
    query = ["--query-gpu=name,memory.total,memory.free,driver_version"]
    try:
        output = subprocess.run(
            ["nvidia-smi", *query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):  # none here, or a driver that does not answer
        return []
    gpus = []
    for line in output.splitlines():
        name, total, free, driver = (field.strip() for field in line.split(","))
        # Memory is "[N/A]" where a GPU shares it with the processor.
        sizes = [int(mib) * 2**20 if mib.isdigit() else 0 for mib in (total, free)]
        gpus.append(Gpu(name=name, memory_bytes=sizes[0], free_bytes=sizes[1], driver=driver))
    return gpus
