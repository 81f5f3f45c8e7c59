"""What ended a run is what its last event says, and a report does not disturb one that is at work.

python -m pytest tests/flows/test_stop.py
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import _parser
from flows.stop import cause_of, stoppable
from infra.errors import UserError
from infra.store import RunStore
from tests.flows.test_plan import answer, at, make_model, make_spec, search_trial


def interrupt(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # which the signal cuts short


def ask_by_signal(folder: Path) -> None:
    """As `sparseramp stop` does on the driver's own host."""
    (folder / "stop").touch()
    interrupt(signal.SIGTERM)


def ask_by_file(folder: Path) -> None:
    """As it does from another."""
    (folder / "stop").touch()
    time.sleep(5)


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (ask_by_signal, "stop"),
        (ask_by_file, "stop"),
        (lambda _: interrupt(signal.SIGTERM), "SIGTERM"),
        (lambda _: interrupt(signal.SIGINT), "SIGINT"),
    ],
)
def test_who_has_stopped_a_run(tmp_path: Path, end: Callable[[Path], None], cause: str) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt) as caught, stoppable(tmp_path):
            end(tmp_path)
        assert cause_of(caught.value) == {"cause": cause, "reason": ""}
        assert not (tmp_path / "stop").exists()
        ignored = cause != "SIGINT"  # what is being cleaned up is not to be cut short
        kept = signal.SIG_IGN if ignored else signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == kept
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, own)
    assert cause_of(UserError("no room")) == {"cause": "UserError", "reason": "no room"}


def test_a_report_leaves_a_run_alone_that_is_at_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(run={"dir": str(tmp_path / "run")})
    options = _parser().parse_args(["report", spec.run.dir])
    with RunStore.open(spec) as store:
        store.write_model(make_model())
        store.write_result(answer(search_trial(spec, at(spec, 0.004), 0)))
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
        options.command(options)
        shown = capsys.readouterr().out
        assert shown.startswith(f"{spec.run.dir} is at work, so no report is written now")
        assert f"driven by pid {os.getpid()}" in shown
        assert "best    beta 0.004, loss 4.0" in shown
        options.json = True
        options.command(options)
        assert json.loads(capsys.readouterr().out)["trials"]["complete"] == 1
        after = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
        assert after == before
    with pytest.raises(UserError, match="final"):
        options.command(options)  # nobody is at work, and there is nothing to compare
