"""A driver with a Ray of its own: what it prints, how it ends, and what it leaves behind.

python -m pytest tests/infra/test_cluster_processes.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import signal, sys
from infra.environment import prepare
prepare()
from infra.cluster import connect
from infra.specs import ClusterSpec
from tests.infra.test_cluster import trial
from tests.infra.trials import act

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
try:
    with connect(ClusterSpec(trial_timeout_s=float(sys.argv[1]))) as cluster:
        for result in cluster.run(act, map(trial, range(10), sys.argv[2:])):
            print(result.spec.number, result.state, result.attempts, result.cause, flush=True)
            started = result.device
except KeyboardInterrupt:
    print("stopped")
assert signal.getsignal(signal.SIGTERM) is stop, "Ray kept the handler of SIGTERM"
assert "torch" not in sys.modules
"""

pytestmark = pytest.mark.slow  # each starts and stops Ray


def start(driver: list[subprocess.Popen[str]], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    driver.append(process)
    return process


def wait_until_sleeping(file: Path) -> psutil.Process:
    """The worker, when it has written down its pid."""
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return psutil.Process(int(file.read_text()))


def gone(process: psutil.Process, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


def test_lost_workers_leave_no_trace_on_the_output(driver: list[subprocess.Popen[str]]) -> None:
    output, errors = start(driver, "0", "ok", "exit", "ok").communicate(timeout=90)
    assert output.splitlines() == [
        "0 complete 1 ",
        "1 failed 3 lost 3 times: ActorDiedError",
        "2 complete 1 ",
    ]
    assert errors == ""


def test_a_stopped_worker_is_killed_at_the_deadline(
    driver: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(driver, "3", f"pid:{tmp_path / 'pid'}", "ok")
    worker = wait_until_sleeping(tmp_path / "pid")
    worker.suspend()  # answers nothing, not even Ray
    output, _ = process.communicate(timeout=60)
    assert output.splitlines() == [
        "0 failed 1 TimeoutError: not done in trial_timeout_s=3",
        "1 complete 1 ",
    ]
    assert not worker.is_running()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [False, True], ids=["driver", "group"])
def test_signals_stop_driver_worker_and_ray(
    driver: list[subprocess.Popen[str]], tmp_path: Path, number: signal.Signals, to_all: bool
) -> None:
    process = start(driver, "0", "ok", f"pid:{tmp_path / 'pid'}")
    worker = wait_until_sleeping(tmp_path / "pid")
    ours = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=30)
    print(number, to_all, time.monotonic() - started)
    assert output.splitlines() == ["0 complete 1 ", "stopped"]
    assert errors == ""
    assert process.returncode == 0
    assert all(gone(each, 5) for each in [worker, *ours])


def test_kill_of_the_driver_ends_its_worker(
    driver: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(driver, "0", f"pid:{tmp_path / 'pid'}")
    worker = wait_until_sleeping(tmp_path / "pid")
    process.kill()
    assert gone(worker, 10)
