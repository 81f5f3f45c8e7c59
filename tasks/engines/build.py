"""Builds the native kernels at first use, with the C++ compiler that is on the PATH.

    library = native_library()  # a ctypes.CDLL; raises BuildError with one line where it cannot

The library is kept in ~/.cache/sparseramp (SPARSERAMP_CACHE), under a digest of the sources, flags
and compiler. CXX names another compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from infra.cache import cache_dir

SOURCES = Path(__file__).parent / "native"
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
_AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
_AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi2")]
# Files that need instructions which only some processors have: sparseramp_best_isa looks for them.
FLAGS_OF = {"avx2.cpp": _AVX2, "avx512.cpp": [*_AVX2, *_AVX512]}


class BuildError(Exception):
    """There is no usable compiler; the message is one line."""


@cache
def native_library() -> ctypes.CDLL:
    """The kernels, compiled if no earlier process has done it (about 8 s of processor time)."""
    compiler = find_compiler()
    version = _run([compiler, "--version"])
    digest = hashlib.sha256(repr([version, FLAGS, FLAGS_OF, platform.machine()]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = cache_dir()
    library = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"the kernels in {folder} cannot be used: {error}") from error


def find_compiler() -> str:
    """The path of CXX, c++, g++ or clang++. Raises BuildError where there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler on the PATH ({wanted or 'c++, g++ or clang++'})")


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            made = Path(scratch) / f"{source.stem}.o"
            # On other processors the files of x86 are empty, and their flags unknown.
            own = FLAGS_OF.get(source.name, []) if platform.machine() == "x86_64" else []
            command = [compiler, *FLAGS, *own, "-c", str(source), "-o", str(made)]
            try:  # the process uses the OpenMP that torch has loaded, and so torch's threads
                _run([*command, "-fopenmp"])
                openmp = ["-fopenmp"]
            except BuildError:  # a compiler without OpenMP: one thread
                _run(command)
                openmp = []
            objects.append(str(made))
        linked = Path(scratch) / library.name
        _run([compiler, "-shared", *openmp, *objects, "-o", str(linked)])
        linked.replace(library)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise BuildError(f"{Path(command[0]).name} cannot compile the kernels: {lines[0][:200]}")
    return done.stdout
