"""The native kernels on a processor without AVX: an ARM one, emulated.

python -m pytest tests/tasks/test_portable.py  # Debian: g++-aarch64-linux-gnu, qemu-user
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.engines import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="no cross compiler or emulator"
)
def test_the_kernels_are_right_on_arm(tmp_path: Path) -> None:
    sources = [*build.SOURCES.glob("*.cpp"), Path(__file__).parent / "bitmask_driver.cpp"]
    flags = [*build.FLAGS, "-fvisibility=default", "-fopenmp", "-static", f"-I{build.SOURCES}"]
    subprocess.run([COMPILER, *flags, *sources, "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([EMULATOR, tmp_path / "driver"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "instruction sets tried: 1\n"
