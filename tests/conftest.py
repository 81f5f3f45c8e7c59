"""What every test shares: no telemetry, no hub, and GPU tests skipped where there is no GPU.

python -m pytest -m "not slow and not gpu"
"""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

# Before any library is imported; Ray's worker processes inherit it.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # only here: most tests must not pay for it

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture
def driver() -> Iterator[list[subprocess.Popen[str]]]:
    """Started drivers, each in a process group of its own, which no test outlives."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
