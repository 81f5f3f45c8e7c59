"""Studies from the command line: two modalities, a budget, stops, and what the files say.

python -m pytest tests/flows/test_study.py
"""

import csv
import itertools
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from flows.cells import study_cells
from flows.leaderboard import Leaderboard
from flows.overview import Overview
from flows.stop import stop
from flows.study import _budget, _Writer
from infra.driver import Driver
from infra.errors import UserError
from infra.spec_files import load_spec
from infra.specs import RunSpec
from infra.store import RunStore
from infra.study_files import BudgetSpec, load_study
from tests.browser import draw, needs_browser
from tests.flows.commands import run, start, write_project
from tests.timm_models import write_images, write_timm

VISION = """
[model]
source = "{model}"
modality = "vision"
[data]
source = "{images}"
[prune]
sparsity = 0.5
[calibration]
samples = 4
[evaluation]
selection_windows = 8
report_windows = 8
calibration_seeds = 1
[search]
scouts = 2
[cluster]
parallel = 1
[tracking]
enabled = false
"""

STUDY = """
[study]
dir = "{dir}"
[[cells]]
spec = "tiny.toml"
overrides = {{ "search.scouts" = 2, "evaluation.calibration_seeds" = 1 }}
methods = ["magnitude", "wanda"]
[[cells]]
spec = "vision.toml"
allocations = ["uniform"]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a vision model, and a study of both."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    model = write_timm("vit", folder / "vit")
    write_images(folder / "images")
    vision = VISION.format(model=model, images=folder / "images")
    (folder / "vision.toml").write_text(vision)
    (folder / "study.toml").write_text(STUDY.format(dir=folder / "study"))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(project: Path, cache: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The study, stopped by its budget and then gone on with to the end."""
    short = run("study", project / "study.toml", "budget.trials=3", "--json", cache=cache)
    assert short.returncode == 0, short.stderr
    board = json.loads(short.stdout.splitlines()[-1])
    assert board["spent"] == "budget: all 3 trials are begun"
    assert {row["state"] for row in board["rows"]} == {"stopped"}
    assert sum(row["trials"] for row in board["rows"]) == 3
    assert all(row["cause"] == board["spent"] for row in board["rows"])
    said = run("status", project / "study", cache=cache).stdout
    assert "cells   3 stopped by the budget\n" in said
    assert said.count("stopped: budget: all 3 trials are begun") == 3
    kept = trial_files(project / "study")
    done = run("study", project / "study.toml", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert kept.items() <= trial_files(project / "study").items()
    return project / "study", [json.loads(line) for line in done.stdout.splitlines()]


def trial_files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.glob("*/trials/*.json")}


@pytest.mark.timeout(300)
def test_the_leaderboard_of_two_modalities(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, printed = finished
    board = printed[-1]
    rows = {row["cell"]: row for row in board["rows"]}
    assert list(rows) == [
        "model_magnitude_arithmetic_0.5",
        "model_wanda_arithmetic_0.5",
        "vit_wanda_uniform_0.5",
    ]
    assert {row["state"] for row in rows.values()} == {"complete"}
    assert [row["blocks"] for row in rows.values()][:2] == [3, 3]
    for name, row in rows.items():
        report = json.loads((folder / name / "report.json").read_text())
        assert (folder / row["report"]).is_file()
        assert row["gain"]["mean"] == report["gain"]["mean"]
        assert row["beta"] == report["best"]["beta"]
        assert row["realised"] == pytest.approx(0.5, abs=1e-3)
        costs = [json.loads(f.read_text())["cost"] for f in (folder / name / "trials").iterdir()]
        assert all(cost["held_s"] > 0 for cost in costs)
        assert row["used_s"] == pytest.approx(sum(c["held_s"] * c["cpus"] for c in costs))
    with (folder / "leaderboard.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["cell"] for line in table] == list(rows)
    assert float(table[0]["gain"]) == rows[table[0]["cell"]]["gain"]["mean"]
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    assert 'href="vit_wanda_uniform_0.5/report.html"' in page
    assert "Best tilt by family" in page
    told = {(event["cell"], event["number"]) for event in printed if event.get("kind") == "trial"}
    assert {cell for cell, _ in told} <= set(rows)


@needs_browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [1280, 800])
def test_the_leaderboard_in_a_browser(
    finished: tuple[Path, list[dict[str, Any]]], width: int, tmp_path: Path
) -> None:
    folder, _ = finished
    seen = draw(folder / "leaderboard.html", tmp_path, width)
    assert (seen.errors, seen.too_wide, seen.num_plots) == ([], [], 3)
    assert seen.hidden_px == 0 or width < 1000
    assert len(seen.links) == 3
    assert all((folder / link).is_file() for link in seen.links)


@pytest.mark.timeout(300)
def test_a_finished_cell_is_not_touched_when_another_is_added(
    finished: tuple[Path, list[dict[str, Any]]], project: Path, cache: Path
) -> None:
    """And one that no node could hold is a row, beside cells that go on."""
    folder, _ = finished
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/*") if file.is_file()}
    text = (project / "study.toml").read_text()
    more = '[[cells]]\nspec = "vision.toml"\nmethods = ["magnitude"]\nallocations = ["uniform"]\n'
    large = more.replace("magnitude", "wanda")
    large += 'name = "large"\noverrides = {"cluster.cpus_per_trial" = 4000}\n'
    (project / "more.toml").write_text(text + more + large)
    done = run("study", project / "more.toml", "--json", cache=cache)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"sparseramp: 1 of 5 cells have no result (1 refused): {folder}/leaderboard.html says why"
    )
    rows = {row["cell"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows["vit_magnitude_uniform_0.5"]["state"] == "complete"
    refused = rows["large-vit_wanda_uniform_0.5"]
    assert refused["state"] == "refused"
    assert refused["cause"].startswith("no node holds a trial of 4000 CPUs")
    after = {file: file.stat().st_mtime_ns for file in folder.glob("*/*") if file in before}
    assert after == before
    again = run("report", folder, "--json", cache=cache)
    assert json.loads(again.stdout)["rows"] == list(rows.values())
    found = json.loads(run("status", folder, "--json", cache=cache).stdout)
    assert found["driver"] is None
    assert found["states"] == {"complete": 4, "refused": 1}
    shown = run("status", folder, cache=cache)
    assert "no driver is at work" in shown.stdout
    stopped = run("stop", folder, cache=cache)
    assert stopped.returncode == 2
    assert stopped.stderr.startswith(f"sparseramp: nobody is at work on {folder}: ")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["signal", "file"])
def test_stop_from_another_terminal(
    project: Path, cache: Path, driver: list[subprocess.Popen[str]], tmp_path: Path, how: str
) -> None:
    """A study, whose cells refuse to be stopped alone; by the file as from another host."""
    folder = tmp_path / "study"
    (project / "long.toml").write_text(
        '[[cells]]\nspec = "tiny.toml"\nsparsities = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]\n'
    )
    process = start("study", project / "long.toml", f"study.dir={folder}", "--json", cache=cache)
    driver.append(process)
    deadline = time.monotonic() + 90
    while not trial_files(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = json.loads(run("status", folder, "--json", cache=cache).stdout)
    assert (found["driver"]["pid"], found["driver"]["host"]) == (process.pid, socket.gethostname())
    assert found["age_s"] < 30
    assert found["trials"]["complete"] >= 1
    assert found["states"]["going"] >= 1
    if how == "signal":
        cell = max(folder.glob("*/run.json"), key=os.path.getmtime).parent  # not yet ended
        alone = run("stop", cell, cache=cache)
        assert alone.returncode == 2
        assert f"stop {folder.resolve()}" in alone.stderr
        stopped = run("stop", folder, cache=cache)
        assert stopped.returncode == 0, stopped.stderr
        assert f"{folder} has stopped; {len(trial_files(folder))} finished trials" in stopped.stdout
    else:
        (folder / "stop").touch()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "sparseramp: stopped; the same command goes on where it left off\n"
    assert not (folder / "stop").exists()
    assert RunStore.read(folder).events()[-1]["cause"] == "stop"
    assert json.loads(run("status", folder, "--json", cache=cache).stdout)["driver"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("priority = 1", "priorty = 1"), r"unknown key 'cells\.0\.priorty': did you mean"),
        (("priority = 1", "priority = 0"), r"cells\.0\.priority=0.*greater than 0"),
        (('spec = "tiny.toml"', ""), r"'cells\.0\.spec' is missing"),
        (
            ('"tiny.toml"', '"none.toml"'),
            r"no spec none\.toml beside .*s\.toml or in",
        ),
        (("[study]", "[study]\nfolder = 1"), r"unknown key 'study\.folder'"),
        (("[[cells]]", "[budget]\nhours = -1\n[[cells]]"), r"budget\.hours=-1"),
        (("search.scouts", "search.scoutz"), r"unknown key 'search\.scoutz'.*tiny\.toml, of "),
        (("[[cells]]", "[cells]"), r"valid list"),
    ],
)
def test_a_wrong_study_file_is_one_line(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    write_project(tmp_path)
    text = '[study]\n[[cells]]\nspec = "tiny.toml"\npriority = 1\n'
    text += 'overrides = {"search.scouts" = 2}\n'
    (tmp_path / "s.toml").write_text(text.replace(*change))
    with pytest.raises(UserError, match=message) as caught:
        load_study(tmp_path / "s.toml")
    assert "\n" not in str(caught.value)
    assert "s.toml" in str(caught.value) or "none.toml" in str(caught.value)


def test_cells_of_different_settings_need_names_of_their_own(tmp_path: Path) -> None:
    write_project(tmp_path)
    group = '[[cells]]\nspec = "tiny.toml"\n'
    (tmp_path / "s.toml").write_text(
        group + group + group + 'name = "more"\noverrides = {"search.scouts" = 9}\n'
    )
    names = [cell.name for cell in study_cells(load_study(tmp_path / "s.toml"))]
    assert names == ["model_wanda_arithmetic_0.5", "more-model_wanda_arithmetic_0.5"]
    (tmp_path / "s.toml").write_text(group + group + 'overrides = {"search.scouts" = 9}\n')
    with pytest.raises(UserError, match="two cells of different settings are called"):
        study_cells(load_study(tmp_path / "s.toml"))


def test_a_study_file_is_no_spec(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "s.toml").write_text('[[cells]]\nspec = "tiny.toml"\n')
    with pytest.raises(UserError, match="is a study file: sparseramp study"):
        load_spec(tmp_path / "s.toml")


def test_hours_of_a_driver_that_was_killed_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though none of its cells had ended: while they go on, the study says so once a minute."""
    write_project(tmp_path)
    (tmp_path / "s.toml").write_text('[[cells]]\nspec = "tiny.toml"\n')
    cells = study_cells(load_study(tmp_path / "s.toml"))
    now = [0.0]
    monkeypatch.setattr("flows.study.time.monotonic", lambda: now[0])
    own = cells[0].spec.model_copy(update={"run": RunSpec(dir=str(tmp_path / "study"))})
    with RunStore.open(own, "study") as store:
        writer = _Writer(store, Leaderboard(store, cells))
        view = Overview(cells, writer.ended, writer.going, as_json=True).view_of(cells[0])
        time.sleep(0.2)
        for now[0] in (30.0, 61.0, 90.0, 120.0):
            view.event({"kind": "wave"})
        assert [event["event"] for event in store.events()] == ["created", "going"]
        left_s = _budget(BudgetSpec(hours=1), store).until
    assert 3590 < left_s <= 3600 - 0.2


def test_a_stop_that_a_beginning_driver_removes_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver on another host has its lock before it removes what meant an earlier one."""
    spec = load_spec(write_project(tmp_path))
    RunStore.open(spec).close()
    file, heard, looks = tmp_path / "run" / "stop", [], itertools.count()

    def driver_of(folder: Path) -> Driver | None:
        assert next(looks) < 100
        if folder != file.parent or len(heard) == 2:
            return None
        if file.exists():
            heard.append(file.unlink())
        return Driver(1, "elsewhere", "2026-01-01T00:00:00+00:00")

    monkeypatch.setattr("flows.stop.driver_of", driver_of)
    monkeypatch.setattr("flows.stop.WAIT_S", 0.0)
    assert stop(file.parent)["pid"] == 1
    assert len(heard) == 2 and not file.exists()
