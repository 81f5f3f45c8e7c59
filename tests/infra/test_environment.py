"""Nothing is reported, and another project's packages are not taken for ours.

python -m pytest tests/infra/test_environment.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.environment import CHECKOUT, TELEMETRY_OFF, guard, prepare

GUARD = """
import sys
from infra.environment import guard
from infra.errors import UserError
try:
    guard()
except UserError as error:
    print(error)
assert "tasks" not in sys.modules, "imported to find out"
"""


def test_telemetry_is_off_whatever_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TELEMETRY_OFF:
        monkeypatch.setenv(name, "on")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    prepare()
    assert {name: os.environ[name] for name in TELEMETRY_OFF} == TELEMETRY_OFF
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_libraries_see_that_telemetry_is_off() -> None:
    """Their own words for it may change with a release."""
    code = (
        "from infra.environment import prepare; prepare()\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "from huggingface_hub import constants\n"
        "print(usage_stats_enabled(), is_telemetry_disabled(), "
        "constants.HF_HUB_DISABLE_TELEMETRY)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in TELEMETRY_OFF}
    environment.pop("CI", None)  # MLflow is silent there of its own accord
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


def test_a_call_without_ray_does_not_start_it() -> None:
    """As of a thread that still copies a checkpoint when its driver ends."""
    code = (
        "from infra.environment import prepare; prepare()\n"
        "import ray\n"
        "try:\n"
        "    ray.remote(lambda: 1).remote()\n"
        "except ray.exceptions.RaySystemError:\n"
        "    print(ray.is_initialized())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


def test_this_checkout_passes() -> None:
    guard()


def test_a_namesake_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('ran')")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\nimport infra\n"
         f"sys.path.insert(0, {str(tmp_path)!r})\n{GUARD}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"tasks would be imported from {tmp_path}/tasks/__init__.py instead of")
