"""A comparison of a tiny model, end to end; and the loop that drives its cells.

python -m pytest tests/flows/test_compare.py
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flows.cells import cells_of
from flows.dispatch_loop import Entry, drive
from flows.report import build_report, render
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.spec_files import load_spec, parse_spec
from infra.specs import ClusterSpec
from tests.flows.commands import run, write_project
from tests.flows.test_report import make_model, make_run, make_spec
from tests.infra.trials import trial
from tests.infra.virtual import VirtualCluster, node

LISTS = """
[compare]
methods = ["magnitude", "wanda"]
allocations = ["uniform", "arithmetic", "{broken}", "als"]
sparsities = [0.5, 0.6]
"""
SMALL = ("search.scouts=2", "evaluation.calibration_seeds=1", "--json")
ONE = ClusterSpec(cpus_per_trial=1)
METHODS, SPARSITIES = ("magnitude", "wanda"), (0.5, 0.6)


def trials_of(cell: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((cell / "trials").glob("*.json"))]


@pytest.mark.timeout(300)
def test_a_comparison_end_to_end(tmp_path: Path) -> None:
    """Every cell is a row; what cells share is run once; a second start repeats nothing."""
    spec = write_project(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text('{"no.such.matrix": 0.5}')
    spec.write_text(spec.read_text() + LISTS.format(broken=broken))
    checked = run("check", spec, *SMALL, cache=tmp_path / "cache")
    assert checked.returncode == 0, checked.stderr
    plan = json.loads(checked.stdout)
    assert plan["cells"] == 16
    assert (plan["run"], plan["not_in_seconds"]) == (str(tmp_path / "run"), [])
    assert [name.split("_")[2] for name in plan["refused"]] == ["broken", "als"] * 4
    done = run("compare", spec, *SMALL, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    rows = json.loads(line)["rows"]
    folder = tmp_path / "run"
    assert json.loads((folder / "compare.json").read_text())["rows"] == rows
    assert [(row["sparsity"], row["method"]) for row in rows[::4]] == [
        (sparsity, method) for sparsity in SPARSITIES for method in METHODS
    ]
    by_name = {row["cell"]: row for row in rows}
    for method in METHODS:
        for sparsity in SPARSITIES:
            cell = f"model_{method}_{{}}_{sparsity:g}".format
            refused = by_name[cell("als")]
            assert refused["state"] == "refused" and "not reproduced" in refused["cause"]
            failed = by_name[cell("broken")]
            assert failed["state"] == "refused" and "has no rate for" in failed["cause"]
            assert by_name[cell("uniform")]["verdict"] == "baseline"
            assert by_name[cell("uniform")]["search_cost"] == 0
            found = by_name[cell("arithmetic")]
            assert found["search_cost"] > 0
            assert found["gain"]["low"] <= found["gain"]["mean"] <= found["gain"]["high"]
            assert found["verdict"] in ("gain", "no gain")
            assert found["cause"].startswith("no gain") == (found["verdict"] == "no gain")
            assert list(found["metrics"]) == ["perplexity", "bits_per_byte", "loss"]
            for value in (*found["metrics"].values(), found["relative_loss"]):
                assert value["n"] == 4
            ratio = found["metrics"]["loss"]["mean"] / found["dense"]["loss"]["mean"]
            assert found["relative_loss"]["mean"] == pytest.approx(ratio)

            # The uniform final was run in one cell and copied to the other, which is not billed.
            finals = [
                {**trial, "spec": {**trial["spec"], "number": 0}}
                for allocation in ("uniform", "arithmetic")
                for trial in trials_of(folder / cell(allocation))
                if trial["spec"]["stage"] == "final"
                and trial["spec"]["prune"]["allocation"] == "uniform"
            ]
            held = sorted(final["cost"].pop("held_s") for final in finals)
            assert len(held) == 2 and held[0] == 0 < held[1]
            assert finals[0] == finals[1]
            assert not (folder / cell("arithmetic") / "best").exists()
            assert (folder / cell("arithmetic") / "report.html").exists()
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "not reproduced" in page and 'id="plot1"' in page

    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("*/trials/*.json")}
    again = run("compare", spec, *SMALL, cache=tmp_path / "cache")
    assert again.returncode == 0, again.stderr
    assert {f: f.stat().st_mtime_ns for f in folder.glob("*/trials/*.json")} == stamps
    assert json.loads(again.stdout)["rows"] == rows


@pytest.mark.timeout(300)
def test_a_model_that_overflows_is_rows_with_the_cause(tmp_path: Path) -> None:
    """Of two models one gives infinite losses: its cells say so, the other's are finished."""
    spec = write_project(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "loud")
    tensors = load_file(tmp_path / "loud" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "loud" / "model.safetensors", metadata={"format": "pt"})
    models = [str(tmp_path / name) for name in ("loud", "model")]
    lists = ('compare.allocations=["uniform", "lamp"]', f"compare.models={json.dumps(models)}")
    done = run("compare", spec, *SMALL, *lists, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["model"], row["state"]) for row in rows] == [
        ("loud", "refused"),
        ("loud", "refused"),
        ("model", "complete"),
        ("model", "complete"),
    ]
    assert "nan" in rows[0]["cause"] and rows[0]["cause"] == rows[1]["cause"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("names", [("arithmetic", "uniform"), ("uniform", "arithmetic")])
def test_a_cell_that_contradicts_itself_is_refused_alone(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """Whatever the order of the list: a fixed pattern has no line, and uniform is finished."""
    spec = write_project(tmp_path)
    lists = (f"compare.allocations={json.dumps(names)}", "prune.pattern=2:4")
    done = run("compare", spec, *SMALL, *lists, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows = {row["allocation"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["uniform"]["state"] == "complete"
    assert rows["arithmetic"]["state"] == "refused"
    assert "fixes the rate of every matrix" in rows["arithmetic"]["cause"]


def test_a_misspelt_name_is_refused_not_a_row(tmp_path: Path) -> None:
    spec = write_project(tmp_path)
    for list_, name, known in (("methods", "wandaa", "wanda"), ("allocations", "owll", "owl")):
        done = run("compare", spec, f'compare.{list_}=["{name}"]', cache=tmp_path / "cache")
        assert done.returncode == 2
        assert f"'{name}': did you mean '{known}'?" in done.stderr


def test_cells_have_names_that_a_file_may_have(tmp_path: Path) -> None:
    raw = {
        "model": {"source": "pypi:w==1/w/SmolLM2-135M.gguf"},
        "data": {"source": "text.txt"},
        "prune": {"allocation": "owl", "parameters": {"M": 4.0}, "beta": 0.01},
        "compare": {
            "models": ["org/Model_B@main", "pypi:w==1/w/SmolLM2-135M.gguf", "other/model_b"],
            "allocations": ["owl", "rates/mine.json"],
            "sparsities": [0.6, 0.6],
        },
        "run": {"dir": str(tmp_path)},
    }
    cells = cells_of(parse_spec(raw, "test"))
    names = [cell.name for cell in cells]
    assert names[0] == "model-b_wanda_owl_0.6"
    assert names[3] == "smollm2-135m_wanda_mine_0.6"
    assert len(set(names)) == len(names) == 6
    assert cells[0].spec.prune.parameters == {"M": 4.0}
    assert cells[1].spec.prune.parameters == {}
    assert cells[0].spec.run.dir == str(tmp_path / names[0])
    # A list more or less is no other cell.
    assert "compare" not in cells[0].spec.identity()


def test_a_spec_with_lists_and_numbers_is_read_back(tmp_path: Path) -> None:
    from infra.store import RunStore

    path = tmp_path / "some.toml"
    path.write_text(
        '[model]\nsource = "a/b"\n[data]\nsource = "text.txt"\n[prune]\nallocation = "owl"\n'
        'parameters = {lambda = 0.1}\n[compare]\nmethods = ["wanda"]\n[published]\nbest = 22.2\n'
    )
    spec = load_spec(path, [f"run.dir={tmp_path / 'run'}"])
    with RunStore.open(spec, "compare"):
        assert RunStore.read(tmp_path / "run").spec == spec


def test_published_numbers_stand_beside_the_measured() -> None:
    spec = make_spec(published={"best": 22.2})
    page = render(build_report(spec, make_model(), make_run(), 1.0))
    assert "<th>published</th>" in page and "<td>22.2</td>" in page
    plain = render(build_report(make_spec(), make_model(), make_run(), 1.0))
    assert "<th>published</th>" not in plain


class Waves:
    """A run of waves; a trial is named by its work."""

    def __init__(self, log: list[str], name: str, *waves: str) -> None:
        self.log, self.name, self.waves = log, name, waves
        self.out: set[int] = set()
        self.taken: list[str] = []

    def trials(self) -> Iterator[TrialSpec | None]:
        self.log.append(f"{self.name} begins")
        number = 0
        for wave in self.waves:
            for what in wave.split():
                self.out.add(number)
                yield trial(number, what)
                number += 1
            while self.out:
                yield None

    def take(self, result: TrialResult) -> None:
        if result.cause:
            raise UserError(result.cause)
        self.out.remove(result.spec.number)
        self.taken.append(result.spec.model.source)

    def wait(self, problem: str) -> None:
        raise AssertionError(problem)

    def finish(self) -> None:
        self.log.append(f"{self.name} ends")

    def stop(self, error: BaseException) -> None:
        self.log.append(f"{self.name} stops: {error}")

    def reader(self, number: int) -> Callable[[], TrialResult]:
        return lambda: TrialResult(spec=trial(number, "u"), state="complete")


def driven(parallel: int, *waves: tuple[str, ...], keep_going: bool = True) -> list[str]:
    """As many trials at once as given, the oldest returns first."""
    log: list[str] = []

    def answer(spec: TrialSpec) -> TrialResult:
        log.append(spec.model.source)
        cause = "bad" if spec.model.source == "bad" else ""
        return TrialResult(spec=spec, state="complete", cause=cause)

    cluster = VirtualCluster([node("a", cpus=parallel)], answer=answer)
    runs = [Waves(log, name, *each) for name, each in zip("ABC", waves, strict=False)]
    entries = [Entry(partial(lambda run: run, run), cluster.share_of(ONE)) for run in runs]
    drive(cluster, entries, keep_going=keep_going)
    return log


def test_a_worker_alone_takes_one_run_after_the_other() -> None:
    log = driven(1, ("a1 a2", "a3"), ("b1",))
    assert log == ["A begins", "a1", "a2", "a3", "A ends", "B begins", "b1", "B ends"]


def test_a_second_worker_is_kept_busy_by_the_next_run() -> None:
    log = driven(2, ("a1 a2 a3", "a4"), ("b1 b2",))
    # While a3 is out, A has nothing to offer; once it is back, A comes before B.
    assert log == ["A begins", "a1", "a2", "a3", "B begins", "b1", "a4", "b2", "A ends", "B ends"]


def test_equal_trials_are_run_once() -> None:
    """Those that are out, and those that are finished."""
    log = driven(2, ("u a1", "a2"), ("u b1",), ("u",))
    assert log.count("u") == 1
    assert {"A ends", "B ends", "C ends"} <= set(log)


def test_a_run_that_fails_ends_alone() -> None:
    log = driven(2, ("a1 bad",), ("b1",))
    assert "A stops: bad" in log and "B ends" in log
    with pytest.raises(UserError, match="bad"):
        driven(2, ("a1 bad",), ("b1",), keep_going=False)
