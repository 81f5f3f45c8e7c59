"""What a study shows on a terminal: lines before the first cell, and a table that fits.

python -m pytest tests/flows/test_terminal.py
"""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.cells import study_cells
from flows.leaderboard import print_leaderboard
from flows.overview import Overview
from flows.study import study
from infra.study_files import load_study
from tests.flows.commands import write_project

ALWAYS = {"model", "sparsity", "method", "gain", "outcome"}
MEAN = {"mean": 15.4321, "stderr": 0.1234}
ROW: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "sparsity": 0.6,
    "goal": "60 % sparsity",
    "method": "sparsegpt",
    "allocation": "arithmetic",
    "headline": "perplexity",
    **{side: {"perplexity": MEAN} for side in ("dense", "uniform", "metrics")},
    "gain": {"mean": 12.345, "low": 10.5, "high": 14.2, "unit": "perplexity"},
    "verdict": "gain",
    "cause": "no gain: the interval holds zero; 2 of 18 trials failed",
    "state": "complete",
    "beta": 0.0123,
    "tilt": 0.52,
    "trials": 18,
    "used_s": 4321.0,
    "peak_memory_bytes": 3 * 10**9,
}


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_leaderboard_fits_its_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    board = {"rows": [ROW], "used_s": 4321.0, "spent": ""}
    print_leaderboard(board, "runs/night")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    heading = next(line for line in lines if "model" in line)
    names = [name.strip() for name in heading.strip("┃ ").split("┃")]
    assert set(names) >= ALWAYS
    assert "smollm2-135m-instruct" in "".join(lines)  # in one piece
    more = {80: [], 100: [], 120: ["allocation", "tilt"]}
    if width in more:
        assert names == [n for n in names if n in {*ALWAYS, *more[width]}]
    assert len(names) >= (13 if width == 200 else 5)
    monkeypatch.delenv("FORCE_COLOR")
    print_leaderboard(board, "runs/night")
    assert "memory" in capsys.readouterr().out  # in a file, all are there


@pytest.mark.parametrize("width", [50, 80])
def test_where_nothing_fits_all_is_folded_and_nothing_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    row = ROW | {"model": "llama-3.1-70b-instruct-with-a-long-name"}
    print_leaderboard({"rows": [row], "used_s": 1.0, "spent": ""}, "runs/night")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    columns = zip(*(line.split("│")[1:-1] for line in lines if line.startswith("│")), strict=True)
    shown = {"".join("".join(column).split()) for column in columns}
    words = (row["model"], "60%", row["method"], "12.345perplexity", row["cause"])
    assert shown == {word.replace(" ", "") for word in words}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_study_says_what_it_does_before_a_cell_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    write_project(tmp_path)
    text = f'[study]\ndir = "{tmp_path / "study"}"\n[[cells]]\nspec = "tiny.toml"\n'
    (tmp_path / "s.toml").write_text(text)
    spec = load_study(tmp_path / "s.toml")
    said: list[str] = []

    def starts(spec: Any) -> Any:
        said.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(spec, as_json=as_json, connect=starts)
    first, second = said[0].splitlines()
    assert "1 cells: their files are read" in first and "Ray starts" in second
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    overview = Overview(study_cells(spec), lambda cell: None, lambda: None, console=screen)
    cell = study_cells(spec)[0]
    for kind, state in (("started", "reading the model"), ("model", "model")):
        overview.view_of(cell).event({"kind": kind})
        assert overview.lines[cell.name].state == state
