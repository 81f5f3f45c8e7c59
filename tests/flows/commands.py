"""The command line in a process of its own, and a small project for it to work on.

done = run("search", spec, "--json", cache=folder)
assert done.returncode == 0, done.stderr
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.models import write_checkpoint, write_text

ROOT = Path(__file__).resolve().parents[2]

# Tiny at every point, but all stages are there: scouts, two rungs, three calibration seeds.
SPEC = """
[model]
source = "{model}"
[data]
source = "{text}"
[prune]
sparsity = 0.5
[calibration]
samples = 4
length = 16
[evaluation]
context = 16
selection_windows = 4
report_windows = 4
[search]
scouts = 3
wave = 2
[cluster]
parallel = 1
[tracking]
enabled = false
[run]
dir = "{run}"
"""


def write_project(folder: Path) -> Path:
    """A checkpoint, text and a spec of a search of them; the spec's path."""
    model = write_checkpoint("llama", folder / "model")
    write_text(folder / "text.txt")
    spec = folder / "tiny.toml"
    spec.write_text(SPEC.format(model=model, text=folder / "text.txt", run=folder / "run"))
    return spec


# In a network namespace of its own, which has a loopback interface and nothing else.
OFFLINE = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')


def start(*arguments: str | Path, cache: Path, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Begin a command, as the leader of a process group."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "flows.cli", *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"SPARSERAMP_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    *arguments: str | Path, cache: Path, prefix: Sequence[str] = (), timeout_s: float = 100
) -> subprocess.CompletedProcess[str]:
    """A whole command."""
    process = start(*arguments, cache=cache, prefix=prefix)
    try:
        output, errors = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
