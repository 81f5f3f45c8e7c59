"""Fewer bits through the same commands: a search, and a comparison with lists of bits.

python -m pytest tests/flows/test_bits.py
"""

import json
import shutil
from pathlib import Path

import pytest

from flows.cells import cells_of, earlier_cells
from infra.errors import UserError
from infra.spec_files import load_spec, parse_spec
from tests.flows.commands import run, write_project
from tests.models import write_wide

LISTS = """
[compare]
methods = ["rtn", "gptq", "sparsegpt"]
allocations = ["uniform", "arithmetic"]
bits = [3.5, 4.125]
sparsities = [0.5]
"""
FEW = """
[compare]
methods = ["rtn", "gptq", "sparsegpt"]
bits = [3.5]
"""
SMALL = ("search.scouts=2", "evaluation.calibration_seeds=1", "--json")


def wide_project(folder: Path) -> Path:
    spec = write_project(folder)
    shutil.rmtree(folder / "model")
    write_wide(folder / "model")
    return spec


def test_cells_have_the_numbers_that_their_method_has(tmp_path: Path) -> None:
    spec_file = write_project(tmp_path)
    spec_file.write_text(spec_file.read_text() + LISTS)
    cells = cells_of(load_spec(spec_file))
    assert [cell.name.removeprefix("model_") for cell in cells] == [
        f"{method}_{allocation}_{goal}"
        for bits in ("3.5bits", "4.125bits")
        for method, goal in (("rtn", bits), ("gptq", bits), ("sparsegpt", f"0.5_{bits}"))
        for allocation in ("uniform", "arithmetic")
    ]
    for cell in cells:  # each can be written down and read again
        assert parse_spec(cell.spec.model_dump(mode="json"), "cell") == cell.spec
    assert earlier_cells(load_spec(spec_file), cells, tmp_path) == []
    text = spec_file.read_text().replace("sparsity = 0.5", 'method = "gptq"\nbits = 3')
    spec_file.write_text(text)
    with pytest.raises(UserError, match=r"add compare\.sparsities"):
        cells_of(load_spec(spec_file, ["compare.sparsities=[]"]))
    spec_file.write_text(text.replace('method = "gptq"\nbits = 3', ""))
    without = load_spec(spec_file, ["compare.bits=[]"])
    with pytest.raises(UserError, match=r"'rtn' needs prune\.bits from 2\.25 to 8"):
        cells_of(without)


def test_contradictions_are_one_line(tmp_path: Path) -> None:
    spec = write_project(tmp_path)
    for overrides, message in (
        (["prune.method=gptq"], "needs prune.bits from 2.25 to 8"),
        (["prune.method=sparsegpt", "prune.bits=1"], "codes and their scales take 2.25 or more"),
        (["prune.method=gptq", "prune.bits=3"], "leave prune.sparsity out"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            load_spec(spec, overrides)
        assert len(str(refused.value).splitlines()) == 1


def test_no_sparsity_can_be_said_on_the_command_line(tmp_path: Path) -> None:
    spec = load_spec(
        write_project(tmp_path), ["prune.method=gptq", "prune.bits=3", "prune.sparsity=0"]
    )
    assert spec.prune.goal == "3 bits"


@pytest.mark.timeout(300)
def test_bits_are_searched_and_reported(tmp_path: Path) -> None:
    spec = wide_project(tmp_path)
    text = spec.read_text().replace("sparsity = 0.5", 'method = "gptq"\nbits = 3.5')
    spec.write_text(text)
    done = run("search", spec, *SMALL, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["goal"] == "3.5 bits"
    for side in ("uniform", "best"):
        assert result[side]["bits"] == pytest.approx(3.5, abs=2e-3)
    assert "3.5 bits" in report["gain"]["conclusion"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert report["size"].startswith("Packed, the weights of blocks take 0.2 MB instead of 1.")
    assert report["size"] in page and "Weights are masked" not in page
    assert "bits per weight" in page and "<th>bits</th>" in page
    card = (tmp_path / "run" / "best" / "README.md").read_text(encoding="utf-8")
    assert ", 3.5 bits" in card and "A rate r stands for 8 - 5.75 r bits" in card
    packed = run("pack", tmp_path / "run" / "best", "--json", cache=tmp_path / "cache")
    assert packed.returncode == 0, packed.stderr
    assert json.loads(packed.stdout)["bits"] < 3.6
    refused = run(
        *("pack", tmp_path / "run" / "best", tmp_path / "x", "--format", "compressed-tensors"),
        cache=tmp_path / "cache",
    )
    assert refused.returncode == 2 and "engines read matrices of 4 or 8" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.timeout(300)
def test_a_comparison_of_bits(tmp_path: Path) -> None:
    spec = wide_project(tmp_path)
    spec.write_text(spec.read_text() + FEW)
    done = run("compare", spec, *SMALL, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["state"] for row in rows] == ["complete"] * 3
    for row in rows:
        assert row["realised_bits"] == pytest.approx(3.5, abs=2e-3)
        joint = row["method"] == "sparsegpt"
        assert row["goal"] == ("50 % sparsity, 3.5 bits" if joint else "3.5 bits")
        assert (row["realised"] >= 0.5) == joint
