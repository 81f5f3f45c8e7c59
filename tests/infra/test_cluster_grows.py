"""A cluster that starts without a node for trials: the autoscaler adds one, and takes it away.

python -m pytest tests/infra/test_cluster_grows.py -m slow

Ray's provider for tests stands for the machines: nodes are processes here.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.dashboards import free_port
from infra.environment import CHECKOUT
from tests.flows.commands import write_project
from tests.infra.heads import as_user_of, head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

NOTHING = (  # to do on a new machine, but Ray wants the keys
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
    "rsync_exclude", "rsync_filter",
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "cluster_name": "grows",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{key: [] for key in NOTHING},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {
            "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80 * 2**20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
}


def command(address: str, token: Path, cache: Path, *words: str) -> str:
    """What one of ours prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=CHECKOUT,
        env=clean | {"RAY_ADDRESS": address, "SPARSERAMP_CACHE": str(cache)} | as_user_of(token),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_node_is_added_for_a_search_and_goes_when_it_is_done(tmp_path: Path) -> None:
    port = free_port()
    CONFIG["provider"]["gcs_address"] = f"127.0.0.1:{port}"
    config = tmp_path / "autoscaling.json"
    config.write_text(json.dumps(CONFIG))
    spec = write_project(tmp_path)
    options = (f"--autoscaling-config={config}", "--include-dashboard=false", "--num-cpus=0")
    variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with head(tmp_path, *options, port=port, **variables) as (address, token):
        needs = ["cluster.gpus_per_trial=1", "cluster.grows=true"]
        said = command(address, token, tmp_path / "c", "search", str(spec), "--json", *needs)
        kinds = [json.loads(line).get("kind") for line in said.splitlines()]
        assert kinds.index("waiting") < kinds.index("model") < kinds.index("trial")
        assert "finished" in kinds
        left: list[Any] = [None, None]
        while len(left) > 1:  # the time limit of the test is that of this loop
            time.sleep(2)
            doctor = command(address, token, tmp_path / "c", "doctor", "--json")
            left = json.loads(doctor)["cluster"]["nodes"]
        assert left[0]["gpus"] == 0
