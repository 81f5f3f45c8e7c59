"""The process's surroundings: nothing is reported to anyone, and our packages are ours.

    prepare()  # first of all, before Ray, MLflow or the hub is imported
    guard()

Both must run before anything heavy is imported: these libraries read their variables on import.
"""

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

from infra.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "tasks", "modalities", "infra")

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
QUIET = {
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow warns where there is no git
    "HF_HUB_DISABLE_XET": "1",  # its transfers start again from zero after a kill
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else Ray prints lost workers on standard output
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread that asks Ray as it ends starts another Ray
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes every worker install anew
    "TOKENIZERS_PARALLELISM": "false",  # warns, and may deadlock, in a forked process
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def prepare() -> None:
    """Turn telemetry off, whatever the user's shell says, and start-up noise unless it objects."""
    os.environ.update(TELEMETRY_OFF)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def reuse_freed_memory() -> None:
    """Let a process that computes keep what it frees, for the next of many equal buffers.

    glibc hands every large buffer back to the kernel, which clears its pages anew at the next use:
    a tenth of a sweep's time on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most it takes: hidden states, but no logits
        mallopt(_M_TRIM_THRESHOLD, 2**28)


def guard() -> None:
    """Refuse to start with someone else's `flows`, `tasks`, `modalities` or `infra`.

    They are also names on package indexes. Nothing is imported to find out.
    """
    for name in PACKAGES:
        found = find_spec(name)
        ours = CHECKOUT / name / "__init__.py"
        origin = Path(found.origin).resolve() if found and found.origin else None
        if origin != ours:
            raise UserError(
                f"{name} would be imported from {origin or 'nowhere'} instead of {ours}: uninstall "
                "the package of that name, or remove it from PYTHONPATH"
            )
