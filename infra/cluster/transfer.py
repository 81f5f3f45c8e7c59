"""Checkpoints travel to the driver: renamed on its own node, pulled in pieces from another.

fetch(result, Path("runs/quickstart/best"))
"""

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.cluster.ray_machines import RayMachines
from infra.cluster.worker import first_line, read_chunk, remove_folder
from infra.records import TrialResult
from infra.sources import sha256_of


class LostCheckpointError(OSError):
    """A checkpoint is gone or damaged where it was made: only its trial can make it again."""


def fetch(result: TrialResult, destination: Path) -> None:
    """Bring a checkpoint to `destination`; see `Cluster.fetch`."""
    partial = destination.with_name(f".{destination.name}.partial")
    destination.parent.mkdir(parents=True, exist_ok=True)
    own = ray.get_runtime_context().get_node_id()
    node = _node_now(result, own)
    if not damaged(result, partial):  # its driver was killed before it could rename it
        hashes = result.checkpoint_sha256
    else:
        hashes = _bring(result, node, own, partial)
    for name, sha256 in result.checkpoint_sha256.items():
        if hashes[name] != sha256:
            raise LostCheckpointError(
                f"{result.checkpoint}/{name} on {result.host} is not the file that was saved"
            )
    replaced = destination.with_name(f".{destination.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if destination.exists():
        destination.rename(replaced)
    partial.rename(destination)
    shutil.rmtree(replaced, ignore_errors=True)
    if node != own:
        with contextlib.suppress(RayError):  # the node has gone, and with it the folder
            ray.get(_on_node(node, remove_folder).remote(result.checkpoint))


def damaged(result: TrialResult, folder: Path) -> str:
    """The first file of a checkpoint that is not in a folder as it was saved; empty: all are."""
    for name, sha256 in result.checkpoint_sha256.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            return name
    return ""


def _bring(result: TrialResult, node: str, own: str, partial: Path) -> dict[str, str]:
    """Move or copy a checkpoint to `partial`; returns the SHA-256 of what arrived."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if node != own:
            return _pull(result, node, partial)
        shutil.move(result.checkpoint, partial)
        return {name: sha256_of(partial / name) for name in result.checkpoint_sha256}
    except (RayError, FileNotFoundError) as error:
        reason = first_line(getattr(error, "cause", error))
        raise LostCheckpointError(
            f"{result.checkpoint} on {result.host} is out of reach: {reason}"
        ) from error
    except OSError:  # the disk of the run is full: what is there of the copy fills it
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _node_now(result: TrialResult, own: str) -> str:
    """The node that holds the checkpoint; it has another id when Ray was started again there."""
    hosts = {node.node: node.host for node in RayMachines().nodes()}
    if result.node in hosts:
        return result.node
    same = [node for node, host in hosts.items() if host == result.host]
    return own if own in same else (same or [result.node])[0]


def _pull(result: TrialResult, node: str, folder: Path) -> dict[str, str]:
    """Copy the files of a checkpoint from its node; returns the SHA-256 of what arrived."""
    read = _on_node(node, read_chunk)
    hashes = {}
    for name in result.checkpoint_sha256:
        digest, offset = hashlib.sha256(), 0
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            while chunk := ray.get(read.remote(str(Path(result.checkpoint, name)), offset)):
                file.write(chunk)
                digest.update(chunk)
                offset += len(chunk)
        hashes[name] = digest.hexdigest()
    return hashes


def _on_node(node: str, function: Any) -> Any:
    """The function as a Ray task of that node, which takes nothing from its trials."""
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(num_cpus=0)(function).options(scheduling_strategy=there)
