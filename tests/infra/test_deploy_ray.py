"""The recipes of infra/deploy that start Ray: the Slurm script with stand-ins, a head with a token.

python -m pytest tests/infra/test_deploy_ray.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.scripts.scripts import cli

from tests.infra.heads import head

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "infra" / "deploy"
SLURM = DEPLOY / "slurm.sh"

STANDINS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "sbcast": 'cp --preserve "${@: -2:1}" "${@: -1}"',
    "scontrol": 'echo scontrol "$@" >>calls',
    "ray": 'stat -c "%a %s" "$RAY_AUTH_TOKEN_PATH" >>calls; echo "$RAY_AUTH_MODE $@" >>calls\n'
    'while [[ $1 != -- ]]; do shift; done; shift; "$@"',
    "sparseramp": 'echo sparseramp $RAY_ADDRESS "$@" >>calls\n'
    "trap 'echo stopped >>calls; exit 130' TERM\nwhile [[ $1 == search ]]; do sleep 0.1; done",
}


@pytest.fixture
def slurm(tmp_path: Path, driver: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """Stand-ins for Slurm, Ray and the driver in the working directory, which note their calls."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, body in STANDINS.items():
        path = tmp_path / ".venv" / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return driver


def submit(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "3", "HEAD_IP": "192.0.2.7"}
    return subprocess.Popen(
        ["bash", SLURM, *arguments], cwd=folder, env=os.environ | job, start_new_session=True,
        text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_slurm_starts_ray_with_a_token_of_the_job(
    slurm: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    slurm.append(submit(tmp_path, "check", "mine.toml"))
    assert slurm[0].wait(30) == 0
    token, ray, ours = (tmp_path / "calls").read_text().splitlines()
    mode, size = token.split()
    assert mode == "600" and int(size) >= 40
    assert ray.startswith("token symmetric-run --address 192.0.2.7:6379 --min-nodes 3 ")
    assert ours == "sparseramp 192.0.2.7:6379 check mine.toml"
    assert not Path(f"/tmp/sparseramp-{os.getpid()}.token").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_stops_the_driver_and_queues_the_job_again(
    slurm: list[subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    slurm.append(submit(tmp_path, "search", "mine.toml"))
    calls = tmp_path / "calls"
    deadline = time.monotonic() + 30
    while not (calls.exists() and "search" in calls.read_text().splitlines()[-1]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # the stand-in sets its trap
    slurm[0].send_signal(number)
    assert slurm[0].wait(30) == 130
    assert calls.read_text().splitlines()[-2:] == ["stopped", f"scontrol requeue {os.getpid()}"]


def test_slurm_says_that_ray_did_not_start(
    slurm: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """`ray symmetric-run` then exits with 0."""
    (tmp_path / ".venv" / "bin" / "ray").write_text("#!/bin/sh\nexit 0\n")
    slurm.append(submit(tmp_path, "search", "mine.toml"))
    _, errors = slurm[0].communicate(timeout=30)
    assert slurm[0].returncode == 1
    assert errors == "slurm.sh: Ray did not start on all 3 nodes, see above\n"


RECIPES = re.sub(
    r"\\\n[# ]*", " ", "\n".join(each.read_text() for each in sorted(DEPLOY.iterdir()))
)
GIVEN = [
    *re.findall(r"ray (symmetric-run) (.*?) -- ", RECIPES),
    *re.findall(r"ray (start) (.*?)(?:#|$)", RECIPES, re.MULTILINE),
    *re.findall(r"ray (job submit) (.*?) -- ", RECIPES),
]


@pytest.mark.parametrize(("command", "given"), GIVEN)
def test_ray_knows_the_options(command: str, given: str) -> None:
    group, found = cli, None
    for name in command.split():
        found = group.commands[name]
        group = found
    options = {option for each in found.params for option in each.opts}
    if command == "symmetric-run":  # which hands the rest to `ray start`
        options |= {option for each in cli.commands["start"].params for option in each.opts}
        assert not re.search("--(head|node-ip-address|port|block) ", given)
    assert set(re.findall(r"--[a-z-]+", given)) <= options


def test_the_recipes_use_all_three() -> None:
    assert {command for command, _ in GIVEN} == {"symmetric-run", "start", "job submit"}


def test_a_token_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Ray looks for it before it connects, so no head is needed."""
    code = (
        "from infra import environment; environment.prepare()\n"
        "from infra.cluster import connection; connection.check_address = lambda _: None\n"
        "from flows.cli import main; main(['doctor', '--json'])"
    )
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"} | given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("sparseramp: cannot use Ray at 127.0.0.1:9: its token is missing")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and token of a head."""
    options = ("--include-dashboard=false", "--num-cpus=1")
    with head(tmp_path_factory.mktemp("h"), *options) as address_and_token:
        yield address_and_token


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda token: {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}, ""),
        (lambda _: {}, "its token is missing here"),
        (lambda _: {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}, "or another one"),
        (lambda _: {"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}, "its token is missing here"),
        (
            lambda token: {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{token}s"},
            "its token is missing here",
        ),
    ],
    ids=["right", "none", "wrong", "mode-only", "no-file"],
)
def test_doctor_with_and_without_the_token(
    started: tuple[str, Path], given: Callable[[Path], dict[str, str]], complaint: str
) -> None:
    address, token = started
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor", "--json"],
        cwd=ROOT,
        env=clean | {"RAY_ADDRESS": address} | given(token),
        capture_output=True,
        text=True,
    )
    if not complaint:
        assert (done.returncode, done.stderr) == (0, "")
        assert len(json.loads(done.stdout)["cluster"]["nodes"]) == 1
        return
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sparseramp: cannot use Ray at {address}: ") and complaint in line
