"""The live view: JSON lines into a pipe, a board on a terminal, an honest time left."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
from typing import Any

import pytest
from rich.console import Console

from flows import following
from flows.live import Board, duration, live
from infra.spec_files import parse_spec
from infra.specs import Spec


def make_spec(protocol: str = "ladder", **sections: Any) -> Spec:
    raw = {"model": {"source": "org/tiny"}, "data": {"source": "texts"}, **sections}
    if protocol == "paper":
        raw |= {"search": {"protocol": "paper", "sampler": "grid"}, "prune": {"pause": "block"}}
    return parse_spec(raw, "test.toml")


def trial(number: int, beta: float, loss: float | None, rung: int = 0) -> dict[str, Any]:
    return {
        "kind": "trial", "number": number, "stage": "search", "rung": rung, "beta": beta,
        "label": f"beta {beta:.4g}",
        "tilt": beta * 36, "state": "failed" if loss is None else "complete",
        "cause": "" if loss else "the loss is NaN", "loss": loss, "seconds": 11.0,
        "token_passes": 100, "host": "a", "scores": {},
    }  # fmt: skip


def make_board(
    clock: list[float], protocol: str = "ladder", **sections: Any
) -> tuple[Board, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, no_color=True)
    spec = make_spec(protocol, **sections)
    return Board(spec, 1000, console, lambda: clock[0]), screen


def shown(board: Board, screen: io.StringIO) -> str:
    screen.truncate(0)
    board.console.print(board.render())
    return screen.getvalue()


def test_without_a_terminal_every_event_is_one_json_line() -> None:
    file = io.StringIO()
    events = [{"kind": "started", "done": 0}, trial(0, 0.0, 4.5), {"kind": "finished"}]
    with live(make_spec(), 1000, console=Console(file=file)) as view:
        for event in events:
            view.event(event)
    assert [json.loads(line) for line in file.getvalue().splitlines()] == events


def test_a_fine_tune_is_a_row_until_its_trial_ends_and_a_line_each_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "LOOK_S", 0.001)
    clock = [0.0]
    board, screen = make_board(clock)
    facts = {"trial": 7, "begun": 50, "step": 60, "steps": 200, "loss": 3.214, "seconds": 5.0}
    event = {"kind": "recovery", **facts}
    board.event(event | {"tenth": True})
    row = "trial 7, step 60 of 200, loss 3.21, about 1 min 10 s left"
    assert row in shown(board, screen)
    board.event(trial(7, 0.0, 4.5) | {"stage": "final"})
    board.event(event)  # it was asked before the trial ended
    assert row not in shown(board, screen)
    file, asked = io.StringIO(), threading.Event()
    steps = iter([0, 1, 19, 20, 21, 200])

    def ask() -> list[dict[str, Any]]:
        if (step := next(steps, None)) is None:
            asked.set()
            return []
        return [facts | {"step": step}]

    with (
        live(make_spec(), 1000, console=Console(file=file)) as view,
        following.following(ask, lambda told: view.event({"kind": "recovery", **told})),
    ):
        assert asked.wait(10)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["step"] for line in lines] == [0, 20, 200]
    assert lines[1] == event | {"step": 20}


def test_json_is_given_on_a_terminal_when_asked_for() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=20)
    with live(make_spec(), 1000, as_json=True, console=console) as view:
        view.event({"kind": "wave", "candidates": ["beta 0.1"] * 20, "note": "[red]x"})
    assert json.loads(file.getvalue())["note"] == "[red]x"


def test_time_left_follows_token_passes_and_counts_down() -> None:
    clock = [0.0]
    board, screen = make_board(clock)
    assert "time left not known yet" in shown(board, screen)
    clock[0] = 20.0
    board.event(trial(0, 0.0, 4.5))
    board.event(trial(1, 0.01, 4.3))
    assert board.time_left() == pytest.approx(80)
    clock[0] = 30.0
    assert board.time_left() == pytest.approx(70)
    assert "30.0 s, about 1 min 10 s left" in shown(board, screen)
    board.event({"kind": "climb", "rung": 1, "planned": 600})
    assert board.time_left() == pytest.approx(30)


def test_time_left_says_that_it_knows_nothing_of_tasks() -> None:
    clock = [0.0]
    board, screen = make_board(clock, evaluation={"tasks": ["boolq"]})
    clock[0] = 20.0
    board.event(trial(0, 0.0, 4.5))
    assert "about 3 min 00 s left, without lm-eval's tasks" in shown(board, screen)


def test_work_of_an_earlier_driver_counts_as_done_but_not_as_speed() -> None:
    clock = [0.0]
    board, screen = make_board(clock)
    board.event({"kind": "started", "done": 700})
    assert "resuming" in shown(board, screen) and "70%" in shown(board, screen)
    clock[0] = 10.0
    board.event(trial(9, 0.01, 4.3))
    assert board.time_left() == pytest.approx(20)


def test_trials_of_an_earlier_call_count_and_are_not_told_again() -> None:
    clock = [0.0]
    board, screen = make_board(clock)
    board.event({**trial(0, 0.0, 4.5), "earlier": True})
    board.event({**trial(1, 0.01, 4.3), "earlier": True})
    assert (board.trials, screen.getvalue(), board.time_left()) == (2, "", None)
    assert board.best().startswith("beta 0.01 (tilt 0.36), loss 4.3000, uniform 4.5000")


def test_best_is_that_of_the_highest_rung() -> None:
    board, screen = make_board([0.0])
    board.event(trial(0, 0.0, 4.50))
    board.event(trial(1, 0.01, 4.30))
    assert "beta 0.01 (tilt 0.36), loss 4.3000, uniform 4.5000; rung 0" in board.best()
    board.event(trial(2, 0.0, 4.60, rung=1))
    assert board.best().startswith("beta 0 (tilt 0.00), loss 4.6000; rung 1")
    assert "paper protocol" not in shown(board, screen)


def test_best_is_that_of_the_score_that_is_searched() -> None:
    """Of equal scores the first candidate's, as the search chooses."""
    board, screen = make_board([0.0], search={"objective": "top1"})
    for number, loss, top1 in ((1, 4.5, 0.75), (0, 4.4, 0.5), (2, 4.3, 0.75)):
        event = trial(number, 0.01 * number, loss) | {"scores": {"top1": top1}}
        board.event(event)
    assert board.best().startswith("beta 0.01 (tilt 0.36), top1 75.00 %, uniform 50.00 %; rung 0")
    assert "top1 50.00 %" in screen.getvalue()


def test_failures_are_shown_with_their_cause_and_never_best() -> None:
    board, screen = make_board([0.0])
    board.event(trial(0, 0.02, None))
    assert "failed: the loss is NaN" in screen.getvalue()
    assert board.best() == "none yet" and "1 trial, 1 failed" in shown(board, screen)


def test_paper_protocol_is_said_beside_its_losses() -> None:
    board, _ = make_board([0.0], "paper")
    board.event(trial(0, 0.0, 4.50))
    assert "report split: paper protocol" in board.best()


def test_durations() -> None:
    assert [duration(x) for x in (8.44, 59.96, 185, 7620)] == [
        "8.4 s", "1 min 00 s", "3 min 05 s", "2 h 07 min",
    ]  # fmt: skip


def test_a_real_terminal_gets_the_board() -> None:
    code = (
        "from flows.live import live\nfrom tests.flows.test_live import make_spec, trial\n"
        "with live(make_spec(), 1000) as view:\n"
        "    view.event(trial(0, 0.0, 4.5))\n    view.event({'kind': 'finished'})\n"
    )
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=slave, env=env) as process:
        os.close(slave)
        text = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # Linux ends a pseudo-terminal so
                break
            if not chunk:
                break
            text += chunk
    os.close(master)
    assert process.returncode == 0
    assert b"loss 4.5000" in text and b"finished" in text and b'"kind"' not in text


def test_storage_trouble_scrolls_by_and_the_stage_stays() -> None:
    board, screen = make_board([0.0])
    board.event({"kind": "wave", "rung": 0, "candidates": ["beta 0"]})
    board.event({"kind": "storage", "problem": "Optuna storage x is locked", "untold": 3})
    assert "Optuna storage x is locked (3 trials untold)" in screen.getvalue()
    board.event({"kind": "storage", "problem": "", "untold": 0})
    assert "can be written again" in screen.getvalue()
    assert board.stage == "rung 0: 1 candidates"
