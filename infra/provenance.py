"""What a number was made with: package versions, commit and machine, without importing a package.

provenance()["torch"]

It is looked up once: later in a process, the checkout may no longer be what was imported from it.
"""

import platform
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "sparseramp", "torch", "transformers", "tokenizers", "datasets", "timm", "safetensors", "gguf",
    "greenlet", "numpy", "optuna", "ray", "mlflow",
)  # fmt: skip
# Ray compares its own version and Python's too, unless its environment variables say otherwise.
COMPARED = ("ray", "torch", "transformers")


def compared_versions() -> dict[str, str]:
    """What driver and workers must have in common; of Python the minor, of torch no build."""
    major, minor, _ = platform.python_version_tuple()
    versions = {"python": f"{major}.{minor}"}
    for package in COMPARED:
        try:
            versions[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


@cache
def provenance() -> Mapping[str, str]:
    """Versions of what is installed, Python, platform, host and the checkout's commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def _commit() -> str:
    """The checkout's commit, `+dirty` where tracked files were changed; empty outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed in a folder that lies in somebody's checkout
        return ""
    git = ["git", "-C", str(root)]
    try:
        commit, status = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git here, or another user's checkout
        return ""
    return commit.strip() + ("+dirty" if status else "")
