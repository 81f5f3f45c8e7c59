"""A search as a job of Ray's job server: submitted, stopped and submitted again, with a token.

python -m pytest tests/infra/test_deploy_jobs.py -m slow

Needs Ray's dashboard: pip install --no-deps --require-hashes -r infra/deploy/cluster.lock
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from infra.dashboards import free_port
from infra.environment import CHECKOUT
from tests.flows.commands import write_project
from tests.infra.heads import as_user_of, head

MISSING = [
    name for name in ("aiohttp_cors", "opencensus", "prometheus_client") if not find_spec(name)
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(bool(MISSING), reason=f"Ray's dashboard needs {', '.join(MISSING)}"),
]


class Jobs:
    """`ray job ...` for one server."""

    def __init__(self, url: str, token: Path) -> None:
        self.url = url
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.stranger = clean | {"PYTHONPATH": ""}
        self.user = self.stranger | as_user_of(token)

    def run(self, *words: str, user: dict[str, str] | None = None) -> str:
        """What a command prints, on either stream."""
        command, *rest = words
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", command, "--address", self.url]
        done = subprocess.run(
            [*ray, *rest],
            cwd=CHECKOUT,
            env=user or self.user,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.stdout

    def submit(self, name: str, *words: str) -> None:
        """Start a command of ours there, with this checkout."""
        ours = [sys.executable, "-m", "flows.cli", *words]
        options = ["--no-wait", "--working-dir", ".", "--submission-id", name]
        said = self.run("submit", *options, "--", *ours)
        assert "submitted successfully" in said, said

    def ends(self, name: str) -> str:
        """How it ended, when it has."""
        while True:
            said = self.run("status", name)
            for state in ("succeeded", "failed", "was stopped"):
                if state in said.lower():
                    return state
            time.sleep(1)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    port = free_port()
    options = ("--include-dashboard=true", f"--dashboard-port={port}", "--num-cpus=1")
    cache = tmp_path_factory.mktemp("cache")
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "SPARSERAMP_CACHE": str(cache)}
    with head(tmp_path_factory.mktemp("h"), *options, **variables) as (_, token):
        yield Jobs(f"http://127.0.0.1:{port}", token)


def events(run: Path) -> list[str]:
    """The kinds of what a run has told so far."""
    file = run / "events.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["event"] for line in lines]


def test_a_job_is_stopped_and_the_same_command_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    spec = str(write_project(tmp_path))
    command = ["search", spec, "--json", "search.scouts=150"]  # `ray job` takes seconds itself
    jobs.submit("first", *command)
    while events(tmp_path / "run").count("trial") < 3:
        time.sleep(0.2)  # the time limit of the test is that of this loop
    jobs.run("stop", "first")
    assert jobs.ends("first") == "was stopped"
    assert events(tmp_path / "run")[-1] == "stopped"  # it had the time to say so
    assert "sparseramp: stopped" in jobs.run("logs", "first")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/trials").iterdir()}
    assert len(done) >= 3

    jobs.submit("second", *command)
    assert jobs.ends("second") == "succeeded", jobs.run("logs", "second")
    assert (tmp_path / "run/report.json").is_file()
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert "finished" in events(tmp_path / "run")


def test_a_command_that_is_refused_says_so_in_its_log(jobs: Jobs, tmp_path: Path) -> None:
    jobs.submit("refused", "search", shlex.quote(str(tmp_path / "none.toml")))
    assert jobs.ends("refused") == "failed"
    assert "sparseramp: " in (log := jobs.run("logs", "refused")) and "none.toml" in log


def test_without_the_token_nobody_submits(jobs: Jobs) -> None:
    said = jobs.run("submit", "--no-wait", "--", "true", user=jobs.stranger)
    assert "submitted successfully" not in said
    assert "authentication" in said.lower()
