"""Where numbers come from is what was there when the process began.

python -m pytest tests/infra/test_provenance.py
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import search
from infra import provenance
from infra.errors import UserError
from tests.flows.test_report import make_spec

CODE = """
import subprocess
from infra.provenance import provenance
before = provenance()["commit"]
subprocess.run(["sh", "-c", COMMIT], check=True)
print(before, provenance()["commit"])
"""
COMMIT = (
    "echo >> code && git add code && "
    "git -c user.name=a -c user.email=a@b commit -qm x && git rev-parse HEAD"
)


def test_a_commit_made_while_running_is_not_the_run_s(tmp_path: Path) -> None:
    (tmp_path / "infra").mkdir()
    shutil.copy(str(provenance.__file__), tmp_path / "infra")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    first = subprocess.run(
        ["sh", "-c", COMMIT], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    code = CODE.replace("COMMIT", repr(f"{COMMIT} > /dev/null"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [first, first]


def test_it_is_read_before_a_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(spec: object) -> None:
        raise UserError("gone")

    provenance.provenance.cache_clear()
    monkeypatch.setattr(search, "pin", fetch)
    with pytest.raises(UserError, match="gone"):
        search.search(make_spec())
    assert provenance.provenance.cache_info().currsize == 1
