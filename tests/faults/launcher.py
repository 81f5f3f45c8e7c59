"""Start the command of a disturbed run, and see how it ends.

    launcher = Launcher(folder, "processes")
    launcher.run(folder / "run", FAULT="kill:17")  # Ended(code=-9, errors="")

Each is a process of its own. Where trials are processes, too, it is forked from this one, which
has imported what they need; else it begins with an interpreter.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.flows.commands import ROOT

OVERRIDES = ("search.scouts=4", "prune.sparsity=0.7", "cluster.parallel=0")  # 12 trials
STUDY = """
[[cells]]
spec = "tiny.toml"
methods = ["magnitude", "wanda"]
[cells.overrides]
"search.scouts" = 2
"evaluation.calibration_seeds" = 1
"compare.checkpoints" = true
"cluster.parallel" = 0
"""
LONGEST_S = 300.0  # of one command, on a busy machine
LATE = -1000  # in place of an exit code


class Ended(NamedTuple):
    """How a command ended, or that it stands still; negative codes are signals."""

    code: int | None
    errors: str


class Launcher:
    """Starts the command of one run; where trials are processes it is forked, which is quick."""

    def __init__(self, folder: Path, cluster: str, command: str = "search") -> None:
        self.folder, self.forks, self.command = folder, cluster == "processes", command
        self.environment = {"FAULT_CLUSTER": cluster, "SPARSERAMP_CACHE": str(folder / "cache")}
        if self.forks:  # what every driver and worker needs, once
            import optuna  # noqa: F401
            import sqlalchemy  # noqa: F401
            import tqdm
            import transformers
            from transformers.generation import continuous_batching  # noqa: F401
            from transformers.models.llama import modeling_llama  # noqa: F401

            import flows.study  # noqa: F401
            import tasks.sweep
            import tasks.trial  # noqa: F401

            transformers.logging.set_verbosity_error()
            # Its own is shared by forked processes, and stays locked when one of them is killed.
            tqdm.tqdm.set_lock(threading.RLock())

    def start(self, run: Path, *overrides: str, **environment: str) -> int:
        """The process that runs the command."""
        arguments = ["search", str(self.folder / "tiny.toml"), f"run.dir={run}", *OVERRIDES]
        if self.command == "study":
            arguments = ["study", str(self.folder / "study.toml"), f"study.dir={run}"]
        arguments += ["--json", *overrides]
        given = self.environment | environment
        self.errors = self.folder / "errors.txt"
        if not self.forks:
            with self.errors.open("w") as errors, (self.folder / "output.txt").open("w") as output:
                return subprocess.Popen(
                    [sys.executable, "-m", "tests.faults.child", *arguments],
                    cwd=ROOT, env=os.environ | given, stdout=output, stderr=errors,
                    start_new_session=True,
                ).pid  # fmt: skip
        from tests.faults import child

        def command() -> None:
            os.environ.update(given)
            child.main(arguments)

        return fork(command, self.folder / "output.txt", self.errors)

    def wait(self, pid: int, seconds: float = LONGEST_S) -> Ended:
        """Until it ends or stops itself; one that is late is killed."""
        deadline, pause, late = time.monotonic() + seconds, 0.001, False
        while True:
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                return Ended(None, "")
            if done and late:
                return Ended(LATE, f"not done in {seconds:g} s")
            if done:
                return Ended(os.waitstatus_to_exitcode(status), self.errors.read_text())
            if not late and time.monotonic() > deadline:
                late = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def run(self, run: Path, **environment: str) -> Ended:
        """The whole command."""
        return self.wait(self.start(run, **environment))


def fork(command: Callable[[], None], output: Path, errors: Path) -> int:
    """A process that runs a command, as the leader of its group, with its output in files."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        for number, file in ((1, output), (2, errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        command()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    except BaseException:  # noqa: BLE001  as an interpreter prints it
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def write_tiny_project(folder: Path) -> None:
    """In a process of its own: this one is forked, and must have no threads."""
    (folder / "study.toml").write_text(STUDY)
    code = f"from tests.flows.commands import *; write_project(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
