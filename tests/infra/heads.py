"""A Ray head of a test's own, started by the command line with a token, and stopped in the end.

with head(tmp_path, "--num-cpus=1") as (address, token):
    ...
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.dashboards import free_port


@contextmanager
def head(
    folder: Path, *options: str, port: int = 0, **variables: str
) -> Iterator[tuple[str, Path]]:
    """Address and token of a head that is started as the README of infra/deploy says."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port = port or free_port()
    scratch = f"/tmp/ramp-{port}"  # a longer path is too long for Ray's sockets
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}",
         "--disable-usage-stats", "--block", f"--temp-dir={scratch}",
         "--object-store-memory=100000000", *options],
        env=os.environ | as_user_of(token) | variables,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout
        assert any("--block" in line for line in process.stdout), "Ray did not start"
        yield f"127.0.0.1:{port}", token
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


def as_user_of(token: Path) -> dict[str, str]:
    """The variables of whoever has the token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
