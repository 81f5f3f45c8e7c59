"""What is said of cells that have no result, and the exit code that goes with it.

python -m pytest tests/flows/test_status.py
"""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from flows import following
from flows import study as flow
from flows.cells import study_cells
from flows.cli import _parser
from flows.leaderboard import STUDY, unfit_cells, write_leaderboard
from flows.status import print_status, status
from infra.spec_files import load_spec
from infra.specs import RunSpec
from infra.store import RunStore
from infra.study_files import load_study
from tests.flows.commands import write_project

SPENT = "budget: all 3 trials are begun"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of three cells, the first of which is refused, the second stopped."""
    write_project(tmp_path)
    text = '[[cells]]\nspec = "tiny.toml"\nmethods = ["wanda", "magnitude", "sparsegpt"]\n'
    (tmp_path / "s.toml").write_text(f'[study]\ndir = "{tmp_path / "study"}"\n{text}')
    spec = load_study(tmp_path / "s.toml")
    refused, stopped, _ = cells = study_cells(spec)
    own = cells[0].spec.model_copy(update={"run": RunSpec(dir=spec.dir)})
    with RunStore.open(own, "study") as store:
        store.path(STUDY).write_text(spec.model_dump_json())
    with RunStore.open(refused.spec) as store:
        store.event("stopped", cause="UserError", reason="no room")
    with RunStore.open(stopped.spec) as store:
        store.event("stopped", cause="BudgetSpent", reason=SPENT)
    return tmp_path / "study"


def states_of(folder: Path) -> list[tuple[str, str]]:
    return [(row["state"], row["cause"]) for row in status(folder)["cells"]]


def test_a_cell_that_never_began_is_told_from_one_that_the_budget_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [("refused", "no room"), ("stopped", SPENT)]
    assert states_of(folder) == [*first, ("not begun", "the same command goes on")]
    print_status(status(folder))
    assert "cells   1 refused, 1 stopped by the budget, 1 not begun\n" in capsys.readouterr().out
    own = RunStore.read(folder).spec
    with RunStore.open(own, "study") as store:
        store.event("stopped", cause="BudgetSpent", reason=SPENT)
        assert states_of(folder)[2][0] == "not begun"  # a driver is at work
    assert states_of(folder) == [*first, ("stopped", SPENT)]
    print_status(status(folder))
    assert "cells   1 refused, 2 stopped by the budget\n" in capsys.readouterr().out


def test_of_a_fine_tune_it_says_the_step_and_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOOK_S", 0.01)
    spec = load_spec(write_project(tmp_path), ["recovery.steps=200"])
    seen = {"trial": 0, "begun": 50, "step": 60, "steps": 200, "loss": 3.214, "seconds": 5.0}

    def said() -> str:
        capsys.readouterr()
        print_status(status(tmp_path / "run"))
        return capsys.readouterr().out.splitlines()[1]

    with RunStore.open(spec, "recover") as store:
        assert said() == "no step of 200 yet"
        with pytest.raises(KeyboardInterrupt), following.shown(store, lambda: [seen]):
            while not store.path(following.FILE).exists():
                time.sleep(0.01)
            told = capsys.readouterr().err.splitlines()
            assert re.fullmatch(r"(step 60.*, about 1 min 10 s left); told \d.\d s ago", said())
            raise KeyboardInterrupt
        first, *rest = told
        assert first == "measures the checkpoint as it is"
        assert rest == ["goes on at step 50", "step 60 of 200, loss 3.21, about 1 min 10 s left"]
    assert re.fullmatch(r"step 60 of 200, loss 3.21; told .* ago; the same command goes on", said())


def test_what_a_spent_budget_left_as_an_earlier_start_had_it_is_no_failure(folder: Path) -> None:
    """That start was told to end, or killed; this one has not come to the cell."""
    last = study_cells(load_study(folder.parent / "s.toml"))[-1]
    with RunStore.open(last.spec) as store:
        store.event("stopped", cause="SIGTERM", reason="")
    assert states_of(folder)[-1] == ("unfinished", "the same command goes on")
    with RunStore.open(RunStore.read(folder).spec, "study") as store:
        store.event("stopped", cause="BudgetSpent", reason=SPENT)
    assert states_of(folder)[-1] == ("stopped", SPENT)
    board = write_leaderboard(folder)
    assert [row["state"] for row in unfit_cells(board)] == ["refused"]


def test_a_study_with_refused_cells_ends_with_3_and_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board = write_leaderboard(folder)
    board["rows"] = [row for row in board["rows"] if row["state"] != "not begun"]
    monkeypatch.setattr(flow, "study", lambda spec, **_: board)
    options: Any = _parser().parse_args(["study", str(folder.parent / "s.toml"), "--json"])
    assert options.command(options) == 3
    assert capsys.readouterr().err == (
        f"sparseramp: 1 of 2 cells have no result (1 refused): {folder}/leaderboard.html says why\n"
    )
    board["rows"] = [row for row in board["rows"] if row["state"] == "stopped"]
    assert options.command(options) == 0  # it was asked to stop there
    assert capsys.readouterr().err == ""
