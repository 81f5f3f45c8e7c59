"""The page of a comparison, from the files of synthetic cells.

python -m pytest tests/flows/test_comparison.py
"""

import subprocess
from pathlib import Path

import pytest

from flows.cells import cells_of
from flows.comparison import write_comparison
from flows.report import write_report
from infra.store import RunStore
from tests.flows.test_report import BROWSER, make_model, make_run, make_spec

WIDTH = """<script>
addEventListener("load", () => document.querySelectorAll(".scroll").forEach(
  box => box.dataset.hidden = box.scrollWidth - box.clientWidth));
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods by three allocations, one of which has no result; the numbers are all alike."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    lists = {"methods": ["magnitude", "sparsegpt"], "allocations": ["uniform", "arithmetic", "als"]}
    models = {"models": ["org/SmolLM2-135M-Instruct"]}
    spec = make_spec(compare=lists | models, run={"dir": str(folder)})
    with RunStore.open(spec, "compare"):
        for cell in cells_of(spec):
            if cell.spec.prune.allocation == "als":
                continue
            with RunStore.open(cell.spec) as store:
                store.write_model(make_model())
                for result in make_run():
                    store.write_result(result)
            write_report(store.dir)
    write_comparison(folder)
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to draw the page with")
@pytest.mark.parametrize("width", [1100, 1300, 1420])
def test_every_column_is_seen(folder: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "compare.html"
    page.write_text((folder / "compare.html").read_text().replace("</body>", f"{WIDTH}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--window-size={width},900", "--dump-dom", "--virtual-time-budget=1500"]
    command = [str(BROWSER), *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=100, check=True)
    assert 'data-hidden="0"' in done.stdout.decode()
